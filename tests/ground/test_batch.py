"""The tensors that pass between the rooms."""

import torch

from pyro_causalcell.batch import Batch, Dims, carried


def _batch(n: int = 3) -> Batch:
    return Batch(
        x_ng=torch.ones(n, 4),
        u_np=torch.zeros(n, 2),
        library_n1=torch.full((n, 1), 4.0),
        batch_nb=torch.zeros(n, 0),
        condition_n=torch.zeros(n, dtype=torch.long),
        index_n=torch.arange(n),
        n_total=10,
    )


def test_number_of_cells_does_not_need_x():
    assert _batch(3)._replace(x_ng=None).n_cells == 3


def test_to_moves_every_tensor_and_the_batches_inside():
    moved = _batch()._replace(time_n=torch.ones(3), control=_batch(2)).to("meta")
    for batch in (moved, moved.control):
        tensors = [field for field in batch if isinstance(field, torch.Tensor)]
        assert len(tensors) >= 6 and {t.device.type for t in tensors} == {"meta"}
    assert moved.n_total == 10
    assert _batch()._replace(x_ng=None).to("cpu").x_ng is None


def test_dims_are_the_arguments_models_take():
    first = ("n_cells", "n_genes", "n_targets", "n_batches", "target_cells")
    # with defaults: older run folders do not have them
    later = ("n_conditions", "times", "n_embedding", "longest_gap", "latest_start", "doses_vary")
    assert Dims._fields == first + later and set(Dims._field_defaults) == set(later)


def test_the_targets_that_cells_carry_and_their_doses():
    """A triple, a target at another dose, and control: nothing is lost, the others have dose 0."""
    u_np = torch.tensor([[1.0, 2.0, 0.0, -0.5], [0.0, 0.0, 0.25, 0.0], [0.0, 0.0, 0.0, 0.0]])
    for most in (None, 3, 7):
        target_nm, dose_nm1 = carried(u_np, most)
        assert target_nm.shape == (3, min(most or 3, 4))
        assert torch.equal(torch.zeros(3, 4).scatter(1, target_nm, dose_nm1.squeeze(-1)), u_np)
    assert carried(u_np[2:])[0].shape == (1, 1)
    assert carried(torch.zeros(2, 0))[0].shape == (2, 0)
