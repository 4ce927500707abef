"""Networks of images: sizes, particles, and that an encoder and a decoder together can learn a picture."""

import pytest
import torch

from pyro_causalcell.nets import Decoder, Encoder


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def _encoder(size: int, n_extra: int = 0, **settings) -> Encoder:
    given = {"log_input": False, "network": "image", "n_hidden": 64}
    return Encoder(3 * size**2, 5, n_extra, **given | settings)


def _decoder(size: int, n_batches: int = 0, **settings) -> Decoder:
    return Decoder(5, 3 * size**2, n_batches, **{"network": "image", "n_hidden": 64} | settings)


@pytest.mark.parametrize("size", [8, 32, 64])
def test_sizes_and_leading_dimensions(size):
    encoder, decoder = _encoder(size), _decoder(size)
    x = torch.rand(2, 3, 3 * size**2)
    loc, scale = encoder(x)
    assert loc.shape == scale.shape == (2, 3, 5) and (scale > 1e-3).all()
    torch.testing.assert_close(encoder(x[1, 2])[0], loc[1, 2], rtol=1e-4, atol=1e-5)
    image = decoder(loc, torch.zeros(3, 0))
    assert image.shape == x.shape
    torch.testing.assert_close(decoder(loc[1], torch.zeros(3, 0)), image[1], rtol=1e-4, atol=1e-5)


def test_axes_are_rows_columns_and_colours():
    """A bright pixel changes the features next to it alone."""
    hidden = _encoder(16).hidden
    x_yxc = torch.zeros(16, 16, 3)
    x_yxc[0, 15, 2] = 1.0
    first = hidden.convolutions[0][:2]
    seen = []
    hidden.convolutions.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    hidden(torch.stack([x_yxc.flatten(), 0 * x_yxc.flatten()]))
    lit, dark = first(seen[0])
    change = (lit - dark).abs().sum(0)
    assert change[0, 7] > 0
    assert change[2:].sum() == 0 and change[:, :6].sum() == 0
    assert seen[0][0, 2, 0, 15] == 1 and seen[0].sum() == 1


@pytest.mark.parametrize("has", [("amx_bf16",), ("avx2", "avx512_bf16"), ("bf16",), ("avx2",), ()])
def test_medium_precision_computes_convolutions_in_half_where_the_processor_can(monkeypatch, has):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: dict.fromkeys(has, True))
    encoder, decoder = _encoder(16), _decoder(16)
    x, none_nb = torch.rand(8, 768), torch.zeros(8, 0)
    exact, before = decoder(encoder(x)[0], none_nb), torch.get_float32_matmul_precision()
    computed = []
    decoder.output.convolutions.register_forward_hook(lambda _, inputs, image: computed.append(image.dtype))
    try:
        torch.set_float32_matmul_precision("medium")
        near = decoder(encoder(x)[0], none_nb)
    finally:
        torch.set_float32_matmul_precision(before)
    difference = (near - exact).abs().max()
    assert near.dtype == torch.float32 and difference < 0.02 * exact.abs().max()
    if any("bf16" in name for name in has):
        assert computed == [torch.bfloat16] and difference > 0
    else:
        assert computed == [torch.float32]


def test_batch_columns_are_no_pixels():
    encoder, decoder = _encoder(8, 2), _decoder(8, 2)
    x, batch_nb = torch.rand(2, 192), torch.eye(2)
    loc, _ = encoder(x[:1].expand(2, -1), batch_nb)
    assert not torch.allclose(loc[0], loc[1])
    image = decoder(loc[:1].expand(2, -1), batch_nb)
    assert not torch.allclose(image[0], image[1])


def test_new_axes_leave_images_as_they_are():
    encoder, decoder = _encoder(8), _decoder(8)
    x, none_nb = torch.rand(4, 192), torch.zeros(4, 0)
    loc, _ = encoder(x)
    before = decoder(loc, none_nb)
    map_kk, offset_k = torch.randn(5, 5), torch.randn(5)
    encoder.rotate(map_kk, offset_k)
    decoder.rotate(map_kk, offset_k)
    turned, _ = encoder(x)
    torch.testing.assert_close(turned, loc @ map_kk.T + offset_k, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(decoder(turned, none_nb), before, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("n_pixels", [3 * 24**2, 3 * 4**2, 3 * 32**2 + 1, 1000])
def test_other_sizes_are_refused(n_pixels):
    with pytest.raises(ValueError, match="size is 8, 16, 32"):
        Encoder(n_pixels, 2, network="image")
    with pytest.raises(ValueError, match="size is 8, 16, 32"):
        Decoder(2, n_pixels, network="image")
    with pytest.raises(ValueError, match="multiple of 64"):
        _encoder(8, n_hidden=100)


def test_together_they_learn_a_few_pictures():
    x = torch.zeros(4, 8, 8, 3)
    for i in range(4):
        x[i, 2 * i : 2 * i + 2, :, i % 3] = 1.0
    x = x.flatten(1)
    encoder, decoder = _encoder(8), _decoder(8)
    optimiser = torch.optim.Adam([*encoder.parameters(), *decoder.parameters()], 1e-2)
    for _ in range(150):
        logits = decoder(encoder(x)[0], torch.zeros(4, 0))
        loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, x)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert loss < 0.05


def test_an_encoder_starts_blind_to_what_is_appended_last():
    encoder, pixels = _encoder(8, n_extra=3), torch.rand(4, 192)
    encoder.overlook_last(2)
    same = [encoder(pixels, torch.tensor([[1.0, a, a]]).expand(4, -1))[0] for a in (0.0, 5.0)]
    torch.testing.assert_close(*same)
    other = encoder(pixels, torch.tensor([[2.0, 0.0, 0.0]]).expand(4, -1))[0]
    assert (other - same[0]).abs().max() > 1e-3
