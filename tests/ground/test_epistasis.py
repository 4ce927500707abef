"""What targets of one cell leave of each other's effects, by hand."""

import torch

from pyro_causalcell.batch import carried
from pyro_causalcell.epistasis import combined, masked_doses


def test_a_target_takes_its_share_of_what_the_others_do_and_nothing_of_its_own():
    u_np = torch.tensor([[0.0, 0, 0], [1, 0, 0], [0, 1, 0], [1, 1, 0], [1, 1, 1]])
    gate_pk, shift_pk = torch.tensor([[1.0], [0.5], [1.0]]), torch.tensor([[2.0], [4.0], [-1.0]])
    masked_pk = torch.tensor([[0.25], [1.0], [0.0]])  # the second leaves nothing of the others
    loc_nk, var_nk = combined(u_np, gate_pk, shift_pk, masked_pk)
    expected = [0.0, 2.0, 2.0, 0.75 * 2.0, 0.75 * 2.0]
    torch.testing.assert_close(loc_nk.squeeze(1), torch.tensor(expected), atol=0.01, rtol=0)
    torch.testing.assert_close(
        var_nk.squeeze(1), torch.tensor([0.0, 0, 4, 0.75**2 * 4, 0.75**2 * 4]), atol=0.01, rtol=0
    )
    plain, unmasked = combined(u_np, gate_pk, shift_pk), combined(u_np, gate_pk, shift_pk, 0 * masked_pk)
    torch.testing.assert_close(plain, unmasked)
    assert plain[0].squeeze(1).tolist() == [0, 2, 2, 4, 3]


def test_doses_of_carried_targets_are_masked_alike():
    u_np = torch.tensor([[0.0, 0, 0], [2, 0, 0], [1, 0.5, 0], [1, 0, 1]])
    masked_pk = torch.tensor([[0.25, 0.0], [0.8, 0.5], [0.0, 0.1]])
    target_nm, dose_nm1 = carried(u_np)
    found_nmk = masked_doses(dose_nm1, masked_pk[target_nm])
    found = {
        (n, int(p)): found_nmk[n, m].tolist()
        for n, row in enumerate(target_nm)
        for m, p in enumerate(row)
        if u_np[n, p] != 0
    }
    expected = {
        (1, 0): [2.0, 2.0],
        (2, 0): [0.2, 0.5],
        (2, 1): [0.5 * 0.75, 0.5],
        (3, 0): [1.0, 0.9],
        (3, 2): [0.75, 1.0],
    }
    assert found.keys() == expected.keys()
    for key, values in expected.items():
        torch.testing.assert_close(torch.tensor(found[key]), torch.tensor(values))
    shift_pk = torch.randn(3, 2)
    loc_nk, _ = combined(u_np, torch.ones(3, 2), shift_pk, masked_pk)
    torch.testing.assert_close((found_nmk * shift_pk[target_nm]).sum(1), loc_nk)
