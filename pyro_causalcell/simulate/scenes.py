"""3DIdent-like sequences of scenes: factors that evolve, perfect interventions, and images of them."""

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple, get_args

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from pyro_causalcell.errors import DataError
from pyro_causalcell.simulate.decoder import CONTROL, check_at_least, stream
from pyro_causalcell.simulate.renderer import FACTORS, SHAPES, Engine, render

__all__ = ["BLOCKS", "Interventions", "scenes", "write_scenes"]

Interventions = Literal["fixed", "step"]
Floats = NDArray[np.float64]

BLOCKS: dict[str, tuple[str, ...]] = {
    "pos": ("pos_x", "pos_y", "pos_z"),
    "rot": ("rot_alpha", "rot_beta"),
    "rot_spot": ("rot_spot",),
    "hue_object": ("hue_object",),
    "hue_spot": ("hue_spot",),
    "hue_back": ("hue_back",),
    "shape": ("shape",),
}
"""Factors that an intervention sets together."""

_PARENTS = {
    "pos_x": ("rot_beta",),
    "pos_y": ("rot_alpha",),
    "pos_z": ("rot_alpha",),
    "rot_alpha": ("hue_back",),
    "rot_beta": ("hue_object",),
    "rot_spot": (),
    "hue_object": ("hue_spot", "hue_back", "shape"),
    "hue_spot": ("hue_back",),
    "hue_back": (),
    "shape": (),
}
_RESPONSIVE = {"pos", "rot"}
_SD = np.array([0.1] * 3 + [0.15] * 6)
_RANGE = 2.0  # positions
_TURN = 2 * math.pi
_SHAPE_STAYS = 0.95
_BURN_IN = 30
# Where the hue of an object goes, by its shape; two shapes take it from the other hues.
_HUE_OF_SHAPE = _TURN / 5 * np.array([0, 1, 0, 2, 0, 3, 4])
_FOLLOWS = {SHAPES.index("hare"): 0.0, SHAPES.index("dragon"): math.pi}


def scenes(
    n_sequences: int = 1000,
    *,
    length: int = 8,
    size: int | None = 32,
    targets: Sequence[str] = ("pos", "rot"),
    probability: float | None = None,
    interventions: Interventions = "fixed",
    shapes: Sequence[str] = SHAPES,
    shape_changes: bool = False,
    spot_follows_object: bool = False,
    seed: int = 0,
    device: str = "cpu",
    engine: Engine = "torch",
) -> xr.Dataset:
    r"""Simulates sequences of scenes whose factors drive one another, and draws them.

    Every factor takes half a step towards a goal that the scene before it sets, and noise is added:

    .. math::
        c' = c + (\mathrm{goal} - c) / 2 + \epsilon, \qquad \epsilon \sim \mathrm{N}(0, \sigma^2)

    Angles and hues take the shorter way round and stay in [0, 2 pi). Noise that would take a position out of
    [-2, 2] is drawn again.

    ============  ============================================================  =====
    factor        goal                                                          sd
    ============  ============================================================  =====
    pos_x         1.5 sin(rot_beta)                                             0.1
    pos_y, pos_z  1.5 sin(rot_alpha), 1.5 cos(rot_alpha)                        0.1
    rot_alpha     hue_back                                                      0.15
    rot_beta      hue_object                                                    0.15
    rot_spot      itself; atan2(pos_x, pos_y) with ``spot_follows_object``      0.15
    hue_object    set by the shape; for hare and dragon the circular mean of    0.15
                  hue_spot and hue_back, or its opposite; with one shape itself
    hue_spot      2 pi - hue_back                                               0.15
    hue_back      itself                                                        0.15
    shape         itself; with ``shape_changes`` drawn anew with probability    -
                  0.05
    ============  ============================================================  =====

    The first scene comes after 30 steps without interventions. From the second on, factors under intervention
    are drawn uniformly from their range at each step, whatever came before.

    Position and rotation are the responsive factors; with ``spot_follows_object`` the angle of the spotlight
    is one as well. The others evolve without them.

    Args:
        n_sequences: Sequences.
        length: Scenes of each.
        size: Pixels along each side; None draws no images.
        targets: What may be intervened on: keys of ``BLOCKS``. Those of CITRIS are all of them.
        probability: Of an intervention on each target, independently; 1 / number of targets if None.
        interventions: "fixed": the targets are drawn once for a sequence, as in CITE-VAE; "step": at each
            step, as in CITRIS.
        shapes: Shapes to draw from.
        shape_changes: Whether the shape may change within a sequence.
        spot_follows_object: Whether the spotlight turns with the position of the object.
        seed: Seed of everything. More sequences leave the first ones alone.
        device: Where images are drawn: "cpu" or "cuda".
        engine: What draws them, see :func:`~pyro_causalcell.simulate.renderer.render`.

    Returns:
        Dataset with ``image`` (sequence, time, y, x, rgb; bytes), ``factors`` (sequence, time, factor),
        ``target`` (sequence, time, factor: whether the scene came about under an intervention on the
        factor), ``adjacency`` (factor, parent: lagged effects, self-effects left out) and ``responsive``
        (factor). With fixed interventions also ``condition`` (sequence): "control", or targets joined by "+".
        The factor "shape" is a number in ``SHAPES``. attrs holds the settings and says that the data are
        simulated.

    Raises:
        DataError: A setting is out of its range.
        ImportError: VTK is asked for, and not installed.

    Source: the dynamics of Temporal Causal3DIdent, CITRIS (Lippe et al. 2022, ICML), appendix C.2; fixed
    interventions and short sequences are those of CITE-VAE. CITRIS has ``spot_follows_object``; without it
    the factors other than position and rotation evolve on their own.
    """
    _check(n_sequences, length, targets, probability, interventions, shapes)
    probability = 1 / len(targets) if probability is None else probability
    rules = _Rules([SHAPES.index(shape) for shape in shapes], shape_changes, spot_follows_object)
    drawn = [
        _sequence(rules, targets, probability, interventions, length, stream(seed, "latent", i))
        for i in range(n_sequences)
    ]
    factors_stf = np.stack([factors_tf for factors_tf, _ in drawn])
    target_stb = np.stack([target_tb for _, target_tb in drawn])
    parents = _PARENTS | ({"rot_spot": ("pos_x", "pos_y")} if spot_follows_object else {})
    parents = parents | ({"hue_object": ()} if len(shapes) == 1 else {})
    moving = _RESPONSIVE | ({"rot_spot"} if spot_follows_object else set())
    responsive = [factor for block in sorted(moving) for factor in BLOCKS[block]]
    data = xr.Dataset(
        {
            "factors": (("sequence", "time", "factor"), factors_stf),
            "target": (("sequence", "time", "factor"), _of_factors(target_stb)),
            "adjacency": (
                ("factor", "parent"),
                np.array([[parent in parents[factor] for parent in FACTORS] for factor in FACTORS]),
            ),
        },
        coords={
            "time": np.arange(length),
            "factor": list(FACTORS),
            "parent": list(FACTORS),
            "responsive": ("factor", np.isin(FACTORS, responsive)),
        },
        attrs={
            "simulated": 1,
            "process": "scenes",
            "targets": list(targets),
            "probability": probability,
            "interventions": interventions,
            "shapes": list(shapes),
            "shape_changes": int(shape_changes),
            "spot_follows_object": int(spot_follows_object),
            "seed": seed,
        },
    )
    if interventions == "fixed":
        names, on_sb = np.array(list(BLOCKS)), np.asarray(target_stb.any(1))
        data["condition"] = ("sequence", ["+".join(names[on_b]) or CONTROL for on_b in on_sb])
    if size is not None:
        image = render(factors_stf.reshape(-1, len(FACTORS)), size, device=device, engine=engine)
        image = image.reshape(n_sequences, length, size, size, 3)
        data["image"] = (("sequence", "time", "y", "x", "rgb"), image)
    return data


def write_scenes(data: xr.Dataset, path: str | Path) -> None:
    """Writes scenes as packed netCDF 4 (``xarray.open_dataset`` reads it); the file appears when it is whole.

    Args:
        data: What :func:`scenes` or a reader of such scenes made.
        path: The file.
    """
    part = Path(f"{path}.part")
    packed = {"image": {"zlib": True, "complevel": 1}} if "image" in data else {}
    data.to_netcdf(part, engine="h5netcdf", encoding=packed)
    os.replace(part, path)


class _Rules(NamedTuple):
    shapes: list[int]
    shape_changes: bool
    spot_follows_object: bool

    def start(self, rng: np.random.Generator) -> Floats:
        """Factors that are uniform over their ranges, [f]."""
        place, turns = rng.uniform(-_RANGE, _RANGE, 3), rng.uniform(0, _TURN, 6)
        return np.concatenate([place, turns, [rng.choice(self.shapes)]])

    def goal(self, c_f: Floats) -> Floats:
        """Where position, angles and hues go from a scene, [f - 1]."""
        x, y, _, alpha, beta, spot, hue_object, hue_spot, hue_back, shape = c_f
        to_spot = math.atan2(x, y) if self.spot_follows_object else spot
        to_hue = hue_object
        if len(self.shapes) > 1:
            sine, cosine = (part(hue_spot) + part(hue_back) for part in (math.sin, math.cos))
            mean, number = math.atan2(sine, cosine), int(shape)
            to_hue = mean + _FOLLOWS[number] if number in _FOLLOWS else _HUE_OF_SHAPE[number]
        place = 1.5 * math.sin(beta), 1.5 * math.sin(alpha), 1.5 * math.cos(alpha)
        return np.array([*place, hue_back, hue_object, to_spot, to_hue, -hue_back, hue_back])

    def step(self, c_f: Floats, rng: np.random.Generator) -> Floats:
        """The next scene, without interventions, [f]."""
        way_f = self.goal(c_f) - c_f[:-1]
        way_f[3:] = (way_f[3:] + math.pi) % _TURN - math.pi  # the shorter way round
        mean_f = c_f[:-1] + way_f / 2
        next_f = mean_f + _SD * rng.standard_normal(len(mean_f))
        while (outside := np.abs(next_f[:3]) > _RANGE).any():
            again = mean_f[:3] + _SD[:3] * rng.standard_normal(3)
            next_f[:3] = np.where(outside, again, next_f[:3])
        next_f[3:] %= _TURN
        changed = self.shape_changes and rng.random() >= _SHAPE_STAYS
        return np.append(next_f, rng.choice(self.shapes) if changed else c_f[-1])


def _sequence(
    rules: _Rules,
    targets: Sequence[str],
    probability: float,
    interventions: Interventions,
    length: int,
    rng: np.random.Generator,
) -> tuple[Floats, NDArray[np.bool_]]:
    """Factors [t, f] and targets [t, b] of one sequence."""
    may_b = np.isin(list(BLOCKS), targets)
    target_tb = may_b & (rng.random((length, len(BLOCKS))) < probability)
    if interventions == "fixed":
        target_tb[:] = target_tb[-1]
    target_tb[0] = False
    c_f = rules.start(rng)
    for _ in range(_BURN_IN):
        c_f = rules.step(c_f, rng)
    seen = [c_f]
    for set_f in _of_factors(target_tb)[1:]:
        seen.append(np.where(set_f, rules.start(rng), rules.step(seen[-1], rng)))
    return np.stack(seen), target_tb


def _of_factors(target_b: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Targets of the factors, from those of their blocks, over the last axis."""
    return np.repeat(target_b, [len(factors) for factors in BLOCKS.values()], axis=-1)


def _check(
    n_sequences: int,
    length: int,
    targets: Sequence[str],
    probability: float | None,
    interventions: str,
    shapes: Sequence[str],
) -> None:
    check_at_least("n_sequences", n_sequences, 1)
    check_at_least("length", length, 1)
    for name, given, names in (("targets", targets, tuple(BLOCKS)), ("shapes", shapes, SHAPES)):
        if not given or set(given) - set(names) or len(set(given)) < len(given):
            raise DataError(
                f"expected {name} among {list(names)}, each once, found {list(given)}. Name some of these."
            )
    if probability is not None and not 0 <= probability <= 1:
        raise DataError(f"expected probability between 0 and 1, found {probability}. Pass a probability.")
    if interventions not in get_args(Interventions):
        known = list(get_args(Interventions))
        raise DataError(f"expected interventions of {known}, found {interventions!r}. Pass one of these.")
