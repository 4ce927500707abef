"""What targets of one cell leave of each other's effects, by hand."""

import pytest
import torch

from pyro_causalcell.batch import carried
from pyro_causalcell.epistasis import Epistasis, combined, masked_doses, pooled

SUM = torch.tensor(1.0)


def test_a_target_takes_its_share_of_what_the_others_do_and_nothing_of_its_own():
    u_np = torch.tensor([[0.0, 0, 0], [1, 0, 0], [0, 1, 0], [1, 1, 0], [1, 1, 1]])
    gate_pk, shift_pk = torch.tensor([[1.0], [0.5], [1.0]]), torch.tensor([[2.0], [4.0], [-1.0]])
    masked_pk = torch.tensor([[0.25], [1.0], [0.0]])  # the second leaves nothing of the others
    loc_nk, var_nk = combined(u_np, gate_pk, shift_pk, Epistasis(masked_pk, SUM))
    expected = [0.0, 2.0, 2.0, 0.75 * 2.0, 0.75 * 2.0]
    torch.testing.assert_close(loc_nk.squeeze(1), torch.tensor(expected), atol=0.01, rtol=0)
    torch.testing.assert_close(
        var_nk.squeeze(1), torch.tensor([0.0, 0, 4, 0.75**2 * 4, 0.75**2 * 4]), atol=0.01, rtol=0
    )
    plain = combined(u_np, gate_pk, shift_pk)
    torch.testing.assert_close(plain, combined(u_np, gate_pk, shift_pk, Epistasis(0 * masked_pk, SUM)))
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
    for power in (1.0, 2.5):
        epistasis = Epistasis(masked_pk, torch.tensor(power))
        loc_nk, _ = combined(u_np, torch.ones(3, 2), shift_pk, epistasis)
        found_nk = pooled(found_nmk * shift_pk[target_nm], epistasis.power)
        torch.testing.assert_close(found_nk, loc_nk, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("power", "both"), [(1.0, 7.0), (2.0, 5.0), (8.0, 4.0481)])
def test_shifts_of_one_direction_saturate_and_those_of_single_targets_stay(power, both):
    u_np = torch.tensor([[0.0, 0, 0], [1, 0, 0], [0, 0, 1], [1, 1, 0], [1, 1, 1], [2, 0, 0]])
    shift_pk = torch.tensor([[3.0, -3.0], [4.0, -4.0], [-1.0, 0.5]], requires_grad=True)
    epistasis = Epistasis(torch.zeros(3, 2), torch.tensor(power, requires_grad=True))
    loc_nk, _ = combined(u_np, torch.ones(3, 2), shift_pk, epistasis)
    expected = [[0.0, 0], [3, -3], [-1, 0.5], [both, -both], [both - 1, 0.5 - both], [6, -6]]
    torch.testing.assert_close(loc_nk, torch.tensor(expected), rtol=1e-3, atol=1e-3)
    loc_nk[:3].sum().backward(retain_graph=True)  # control and single targets: nothing to be told about s
    torch.testing.assert_close(shift_pk.grad, torch.tensor([[1.0, 1], [0, 0], [1, 1]]), rtol=1e-3, atol=1e-3)
    assert epistasis.power.grad.abs() < 1e-2
    loc_nk[3:, 0].sum().backward()
    assert bool(torch.isfinite(shift_pk.grad).all()) and epistasis.power.grad < 0
