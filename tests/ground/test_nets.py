"""Networks: shapes under particles, and changes of the latent axes that change nothing else."""

import pytest
import torch

from pyro_causalcell.nets import (
    MLP,
    Decoder,
    Encoder,
    MaskedLinear,
    straight_through,
    with_interactions,
)


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def _map(k: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(k, k) + 2 * torch.eye(k), torch.randn(k)


@pytest.mark.parametrize("norm", ["none", "batch", "layer"])
def test_leading_dimensions_are_cells_like_any_other(norm):
    net = MLP(5, n_hidden=8, norm=norm, dropout=0.5).eval()
    x = torch.randn(3, 7, 5)
    assert net(x).shape == (3, 7, 8)
    torch.testing.assert_close(net(x)[1], net(x[1]))


def test_settings_of_hidden_layers():
    kinds = [type(m).__name__ for m in MLP(5, 8, n_layers=3, norm="batch", dropout=0.1).layers]
    assert kinds == ["Linear", "BatchNorm1d", "ReLU", "Dropout"] * 3
    with pytest.raises(ValueError, match="norm is"):
        MLP(5, norm="instance")


def test_what_lies_beside_the_inputs_has_weights_of_its_own():
    torch.manual_seed(0)
    net = MLP(5, 8, n_extra=3)
    torch.manual_seed(0)
    plain = MLP(8, 8)  # the same start as of one matrix
    x, columns, design = torch.randn(2, 7, 5), torch.randn(2, 7, 1), torch.randn(2, 7, 2, requires_grad=True)
    hidden = net(x, columns, design)
    torch.testing.assert_close(hidden, plain(torch.cat([x, columns, design], -1)))
    hidden.sum().backward()
    assert design.grad is not None and bool((net.layers[0].extra.weight.grad != 0).any())
    assert isinstance(MLP(5, 8).layers[0], torch.nn.Linear)
    other = MLP(5, 8, n_extra=3)
    other.load_state_dict(plain.state_dict())  # of a run from before it had
    torch.testing.assert_close(other(x, columns, design), hidden)
    with pytest.raises(ValueError, match="expected 3 columns beside the inputs, found 1"):
        other(x, columns)
    with pytest.raises(ValueError, match="expected 0 columns beside the inputs, found 2"):
        plain(torch.cat([x, columns, design], -1), design)  # would be overlooked


@pytest.mark.parametrize(
    ("activation", "expected"),
    [("relu", [0.0, 0.0, 2.0]), ("leaky_relu", [-0.4, 0.0, 2.0]), ("silu", [-0.238406, 0.0, 1.761594])],
)
def test_activations(activation, expected):
    net = MLP(3, 3, n_layers=1, activation=activation)
    net.load_state_dict({"layers.0.weight": torch.eye(3), "layers.0.bias": torch.zeros(3)})
    torch.testing.assert_close(net(torch.tensor([-2.0, 0.0, 2.0])), torch.tensor(expected))


def test_masked_weights_neither_count_nor_learn():
    layer = MaskedLinear(torch.tensor([[1.0, 0.0, 0.5], [0.0, 1.0, 0.0]]))
    x = torch.randn(4, 3)
    expected = x @ (layer.weight * layer.mask_oi).T + layer.bias
    torch.testing.assert_close(layer(x), expected)
    layer(x).sum().backward()
    assert ((layer.weight.grad != 0) == (layer.mask_oi != 0)).all()
    assert "mask_oi" in layer.state_dict()


def test_encoder_takes_counts_or_values_and_extra_columns():
    counts, values = Encoder(6, 3, 2, n_hidden=8), Encoder(6, 3, 2, log_input=False, n_hidden=8)
    values.load_state_dict(counts.state_dict())
    x_ng, extra = torch.rand(4, 6) * 50, torch.randn(4, 2)
    for a, b in zip(counts(x_ng, extra), values(torch.log1p(x_ng), extra), strict=True):
        torch.testing.assert_close(a, b)
    loc, scale = counts(x_ng, extra)
    assert loc.shape == scale.shape == (4, 3) and bool((scale > 1e-3).all())


def test_decoder_rotation_changes_the_axes_and_nothing_else():
    decoder = Decoder(3, 6, 2, n_hidden=8)
    z_nk, batch_nb = torch.randn(5, 3), torch.eye(2)[[0, 1, 1, 0, 1]]
    before = decoder(z_nk, batch_nb)
    map_kk, offset_k = _map(3)
    decoder.rotate(map_kk, offset_k)
    torch.testing.assert_close(decoder(z_nk @ map_kk.T + offset_k, batch_nb), before, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(decoder(z_nk, batch_nb), before, atol=1e-2)


def test_encoder_rotation_moves_locations_exactly():
    encoder = Encoder(6, 3, n_hidden=8)
    x_ng = torch.rand(5, 6) * 9
    before, _ = encoder(x_ng)
    map_kk, offset_k = _map(3)
    encoder.rotate(map_kk, offset_k)
    after, scale = encoder(x_ng)
    torch.testing.assert_close(after, before @ map_kk.T + offset_k, rtol=1e-4, atol=1e-5)
    assert bool((scale > 0).all())


def test_decoder_broadcasts_batches_over_particles():
    decoder = Decoder(3, 6, 2, n_hidden=8)
    z_snk, batch_nb = torch.randn(4, 5, 3), torch.eye(2)[[0, 1, 1, 0, 1]]
    torch.testing.assert_close(decoder(z_snk, batch_nb)[2], decoder(z_snk[2], batch_nb))


def test_interactions_are_products_of_their_targets():
    u_np = torch.tensor([[1.0, 0.0, 1.0], [1.0, 1.0, 0.0], [0.0, 0.0, 0.0], [2.0, 0.5, 0.0]])
    assert with_interactions(u_np, ()) is u_np
    wide = with_interactions(u_np, ((0, 1), (0, 2)))
    assert wide[:, 3].tolist() == [0, 1, 0, 1] and wide[:, 4].tolist() == [1, 0, 0, 0]


def test_straight_through_draws_binary_gates_per_cell():
    u_np = torch.zeros(20_000, 2)
    u_np[:10_000, 0] = 1.0
    u_np[5_000:15_000, 1] = 1.0
    gate_pk, shift_pk = torch.tensor([[0.3], [0.8]]), torch.tensor([[1.0], [10.0]])
    loc_nk = straight_through(u_np, gate_pk, shift_pk)
    only_first, both, only_second, control = (
        loc_nk[:5000],
        loc_nk[5000:10_000],
        loc_nk[10_000:15_000],
        loc_nk[15_000:],
    )
    assert set(only_first.round().unique().tolist()) == {0.0, 1.0}
    assert set(both.round().unique().tolist()) == {0.0, 1.0, 10.0, 11.0}
    assert abs(float(only_first.mean()) - 0.3) < 0.03 and abs(float(only_second.mean()) - 8.0) < 0.3
    assert bool((control == 0).all())


def test_straight_through_has_gradients_and_survives_gates_at_the_ends():
    u_np = torch.eye(3)
    gate_pk = torch.tensor([[0.0], [1.0], [0.5]], requires_grad=True)
    shift_pk = torch.ones(3, 1, requires_grad=True)
    loc = straight_through(u_np, gate_pk, shift_pk)
    assert loc[0] == 0.0 and loc[1] == 1.0
    loc.sum().backward()
    assert bool(torch.isfinite(gate_pk.grad).all()) and float(gate_pk.grad[2]) > 0
    assert shift_pk.grad[1] == 1.0
