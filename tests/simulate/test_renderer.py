import numpy as np
import pytest
import torch
from sklearn.metrics import r2_score

from pyro_causalcell.errors import DataError
from pyro_causalcell.nets import Encoder
from pyro_causalcell.simulate.renderer import FACTORS, SHAPES, render

SCENE = np.array([0.0, 0, 0, 0.4, 0.7, 1.0, 0.5, 3.0, 2.0, 0])


def scene(**changes):
    factors_f = SCENE.copy()
    for name, value in changes.items():
        factors_f[FACTORS.index(name)] = value
    return factors_f


def draws(n, seed=0, n_shapes=7):
    rng = np.random.default_rng(seed)
    place_n3, turn_n6 = rng.uniform(-2, 2, (n, 3)), rng.uniform(0, 2 * np.pi, (n, 6))
    return np.column_stack([place_n3, turn_n6, rng.integers(n_shapes, size=n)])


def object_mask(**changes):
    """Pixels of the object: those that change with its hue."""
    near, far = render(np.stack([scene(**changes), scene(**changes, hue_object=3.6)]), 64).astype(int)
    return np.abs(near - far).sum(-1) > 10


def test_images_are_bytes_and_the_same_each_time():
    factors_nf = draws(40)
    first = render(factors_nf, 32)
    assert first.shape == (40, 32, 32, 3) and first.dtype == np.uint8
    np.testing.assert_array_equal(first, render(factors_nf, 32))
    assert render(factors_nf[:2], 64).shape == (2, 64, 64, 3)
    assert render(factors_nf[:0]).shape == (0, 32, 32, 3)


def test_rows_do_not_depend_on_their_neighbours():
    factors_nf = draws(40)
    alone = np.concatenate([render(row_f[None]) for row_f in factors_nf])
    assert np.abs(alone.astype(int) - render(factors_nf)).max() <= 1


@pytest.mark.parametrize("name", FACTORS)
def test_every_factor_shows(name):
    changed = scene(**{name: 5.0 if name == "shape" else SCENE[FACTORS.index(name)] + 0.3})
    before, after = render(np.stack([SCENE, changed]), 32).astype(int)
    assert np.abs(before - after).mean() > 0.2


def test_the_object_moves_as_it_should():
    def middle(**changes):
        row_n, column_n = np.nonzero(object_mask(**changes))
        return row_n.mean(), column_n.mean(), len(row_n)

    row, column, size = middle()
    assert middle(pos_x=1.5)[1] > column + 5
    assert middle(pos_z=1.5)[0] < row - 5  # up
    assert middle(pos_y=-1.5)[2] > size * 1.1  # nearer, so larger


@pytest.mark.parametrize("shape", range(len(SHAPES)))
def test_all_of_a_shape_is_within_its_bound(shape):
    """A turn by any angle leaves about as much of the object, so that nothing is cut off."""
    areas = [object_mask(shape=shape, rot_alpha=a, rot_beta=b).sum() for a, b in draws(6)[:, 3:5]]
    assert 120 < min(areas) and max(areas) < 4 * min(areas)


def test_a_sphere_is_where_geometry_says():
    """The body of the head is nearly a ball: its outline has the size that its distance gives."""
    rows = np.nonzero(object_mask(shape=5.0, rot_alpha=0.0, rot_beta=0.0))[0]
    distance = np.hypot(10.0, 9.0)
    radius = 1.6 * 0.85 / distance / 0.37 * 32  # pixels of 64
    assert 2 * radius < np.ptp(rows) < 4 * radius  # neck and bun stick out


def test_hues_are_those_of_their_angles():
    def ground(hue):
        return render(scene(hue_back=hue)[None], 32)[0, 0, 0].astype(int)

    red, green, blue = ground(0.0), ground(2 * np.pi / 3), ground(4 * np.pi / 3)
    assert red.argmax() == 0 and green.argmax() == 1 and blue.argmax() == 2
    assert sorted(red) == sorted(green) == sorted(blue)


def test_turning_all_hues_by_a_third_turns_red_to_green():
    factors_nf = draws(20)
    turned_nf = factors_nf.copy()
    turned_nf[:, 6:9] += 2 * np.pi / 3
    difference = render(turned_nf).astype(int) - np.roll(render(factors_nf), 1, axis=-1)
    assert np.abs(difference).max() <= 1


def test_the_spotlight_points_at_the_object_and_casts_a_shadow():
    lit = render(scene(hue_spot=2 * np.pi / 3, hue_back=0.0)[None], 64)[0].astype(int)
    pool = lit[..., 1] > lit[0, 0, 1] + 25
    row_n, column_n = np.nonzero(pool & ~object_mask())
    assert len(row_n) > 100
    angle = scene(rot_spot=1.0 + np.pi)[None]  # from the other side the pool falls elsewhere
    angle[0, 7], angle[0, 8] = 2 * np.pi / 3, 0.0
    other = render(angle, 64)[0].astype(int)
    other_n = np.nonzero(other[..., 1] > other[0, 0, 1] + 25)[1]
    assert abs(other_n.mean() - column_n.mean()) > 5


def answers(factors_nf, n_shapes):
    """What a network is to say of scenes: angles as sine and cosine, the shape as one of n."""
    turn_n6, shape_ns = factors_nf[:, 3:9], torch.eye(n_shapes)[factors_nf[:, 9].long()]
    return torch.cat([factors_nf[:, :3] / 2, turn_n6.sin(), turn_n6.cos(), shape_ns], 1)


def recoloured(image_n, factors_nf):
    """The same scenes in other hues: colours may change places, if the hues turn with them."""
    thirds, sign = int(torch.randint(3, ())), 1 - 2 * int(torch.randint(2, ()))
    factors_nf = factors_nf.clone()
    factors_nf[:, 6:9] = sign * factors_nf[:, 6:9] + thirds * 2 * torch.pi / 3
    image_n = image_n if sign > 0 else image_n[..., [0, 2, 1]]
    return image_n.roll(thirds, -1) / 255, factors_nf


def probe(n_train, epochs, *, n_hidden, n_shapes):
    """R2 of a small network for every factor on 500 new images; the lower one of sine and cosine.

    The factors are drawn independently, so that none can be told from another.
    """
    factors_nf = draws(n_train + 500, n_shapes=n_shapes)
    image_n, factors_nf = torch.tensor(render(factors_nf)), torch.tensor(factors_nf, dtype=torch.float32)
    torch.manual_seed(0)
    net = Encoder(3 * 32**2, 15 + n_shapes, log_input=False, network="image", n_hidden=n_hidden)
    optimiser = torch.optim.AdamW(net.parameters(), weight_decay=0.01)
    batches = n_train // 128
    rate = torch.optim.lr_scheduler.OneCycleLR(optimiser, 3e-3, total_steps=epochs * batches)
    for _ in range(epochs):
        for rows in torch.randperm(n_train)[: 128 * batches].split(128):
            x_n, known_nf = recoloured(image_n[rows], factors_nf[rows])
            loss = (net(x_n.flatten(1))[0] - answers(known_nf, n_shapes)).square().mean()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            rate.step()
    with torch.no_grad():
        found_no = net(image_n[n_train:].flatten(1) / 255)[0]
    score_o = r2_score(answers(factors_nf[n_train:], n_shapes), found_no, multioutput="raw_values")
    turns = np.minimum(score_o[3:9], score_o[9:15])
    return dict(zip(FACTORS, [*score_o[:3], *turns, score_o[15:].min()], strict=True))


def test_a_network_begins_to_read_the_scenes():
    score = probe(768, 30, n_hidden=64, n_shapes=2)
    assert min(score[name] for name in ("pos_x", "hue_back", "hue_spot")) > 0.5


@pytest.mark.slow
def test_a_network_reads_every_factor():
    score = probe(38_000, 9, n_hidden=256, n_shapes=7)
    assert score.pop("shape") > 0.5 and min(score.values()) > 0.85, score


@pytest.mark.gpu
def test_a_gpu_draws_the_same_images():
    factors_nf = draws(30)
    difference = render(factors_nf, device="cuda").astype(int) - render(factors_nf)
    assert np.abs(difference).mean() < 0.1


def test_tables_of_another_form_are_refused():
    with pytest.raises(DataError, match="10 factors"):
        render(np.zeros((3, 9)))
    with pytest.raises(DataError, match="from 0 to 6"):
        render(scene(shape=7.0)[None])
