"""Networks of images: sizes, particles, and that an encoder and a decoder together can learn a picture."""

import pytest
import torch

from pyro_causalcell.nets import ImageDecoder, ImageEncoder


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.mark.parametrize("size", [8, 32, 64])
def test_sizes_and_leading_dimensions(size):
    encoder, decoder = ImageEncoder(5, size, width=8), ImageDecoder(5, size, width=8)
    x = torch.rand(2, 3, size, size, 3)
    loc, scale = encoder(x)
    assert loc.shape == scale.shape == (2, 3, 5) and (scale > 1e-3).all()
    torch.testing.assert_close(encoder(x[1, 2])[0], loc[1, 2])
    image = decoder(loc)
    assert image.shape == x.shape
    torch.testing.assert_close(decoder(loc[1, 2]), image[1, 2])


def test_axes_are_rows_columns_and_colours():
    """A bright pixel changes the features next to it alone."""
    encoder = ImageEncoder(2, 16, width=8)
    x = torch.zeros(1, 16, 16, 3)
    x[0, 0, 15, 2] = 1.0
    first = encoder.convolutions[0][0][0](x.movedim(-1, 1)) - encoder.convolutions[0][0][0](
        0 * x.movedim(-1, 1)
    )
    assert first[0, :, 0, 7].abs().sum() > 0
    assert first[0, :, 2:, :].abs().sum() == 0 and first[0, :, :, :6].abs().sum() == 0


@pytest.mark.parametrize(("size", "width"), [(24, 8), (4, 8), (32, 12)])
def test_other_sizes_are_refused(size, width):
    with pytest.raises(ValueError, match="size is 8, 16, 32"):
        ImageEncoder(2, size, width=width)
    with pytest.raises(ValueError, match="size is 8, 16, 32"):
        ImageDecoder(2, size, width=width)


def test_together_they_learn_a_few_pictures():
    x = torch.zeros(4, 8, 8, 3)
    for i in range(4):
        x[i, 2 * i : 2 * i + 2, :, i % 3] = 1.0
    encoder, decoder = ImageEncoder(2, 8, width=8, n_hidden=32), ImageDecoder(2, 8, width=8, n_hidden=32)
    optimiser = torch.optim.Adam([*encoder.parameters(), *decoder.parameters()], 1e-2)
    for _ in range(150):
        loss = torch.nn.functional.binary_cross_entropy_with_logits(decoder(encoder(x)[0]), x)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert loss < 0.05
