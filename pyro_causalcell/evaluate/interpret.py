"""What programmes and doubles mean: genes of programmes, gene sets they hold, kinds of interaction.

A programme is read in two directions. Its *signature* asks the decoder: which genes change when the programme
moves? Its *attributions* ask the encoder: from which genes was the programme read? Both are tables of
programmes by genes, and :func:`enrichment` takes either.
"""

from collections.abc import Mapping, Sequence
from operator import attrgetter
from typing import Any

import numpy as np
import pandas as pd
import torch
import xarray as xr
from numpy.typing import NDArray
from pyro import poutine
from torch import Tensor

from pyro_causalcell.baselines.fitted import ModelPredictor
from pyro_causalcell.baselines.means import Moments, moments
from pyro_causalcell.batch import Batch
from pyro_causalcell.data import Minibatches, Screen, ScreenSpec, interaction
from pyro_causalcell.data.interactions import Interaction
from pyro_causalcell.data.spec import CONTROL, shown
from pyro_causalcell.errors import CausalCellError, DataError, PredictionError
from pyro_causalcell.evaluate.response import other_genes
from pyro_causalcell.inference import Fit
from pyro_causalcell.inference.posterior import is_local, sample_sites
from pyro_causalcell.predict import global_means, graph, programme_names
from pyro_causalcell.predict.cells import (
    TARGET_SUM,
    Given,
    asked_times,
    cell_trace,
    prior_cells,
    seeded,
    situated,
)

__all__ = [
    "classify_doubles",
    "doubles_of",
    "encoder_attributions",
    "enrichment",
    "interaction_classes",
    "programme_signatures",
]

OPEN = 0.5
"""Probability above which a perturbation is said to move a programme."""
UNKNOWN = "unknown"
"""Kind of a double of which a part was not measured."""
_RESAMPLES = 100  # of the genes, for the agreement of a kind
_CHUNK = 4096  # cells held dense at a time

# ---------------------------------------------------------------- genes of programmes


def programme_signatures(fit: Fit, *, n_cells: int = 256, seed: int = 0) -> xr.Dataset:
    """How genes respond when one programme goes from low to high in control cells.

    Control cells are drawn from the model, with the global latents at their posterior means. One programme at
    a time is set one standard deviation below its mean in these cells, then one above; all other programmes
    stay as drawn. What the decoder then expects is averaged over the cells. Where the model follows cells
    over time, these are control cells of the first snapshot.

    A programme's sign is arbitrary in most models, so that of its whole signature is too.

    Args:
        fit: The fit.
        n_cells: Control cells drawn.
        seed: Seed of the draws.

    Returns:
        Over (programme, gene): ``change`` of the expected expression in log1p CP10k (in the units of the
        training data for models of normalised values), and ``standardised``, the change of the expected value
        in standard deviations of the gene among these cells at the median library. By the second a gene leads
        because its change stands out, not because the gene is rare.

    Raises:
        PredictionError: Fewer than two cells are asked for.

    Source: Lopez et al., CLeaR 2023, appendix G (which genes a latent stands for); the measure is ours.
    """
    if n_cells < 2:
        raise PredictionError(f"expected n_cells of at least 2, found {n_cells}; 256 is a good start")
    draw = global_means(fit)
    change_kg, standardised_kg = [], []
    with seeded(fit, seed):
        cells = prior_cells(fit, torch.zeros(n_cells, fit.dims.n_targets, device=fit.device), seed)
        median = float(np.median(fit.cells.library))
        cells = cells._replace(library_n1=torch.full_like(cells.library_n1, median))
        cells = situated(fit, cells, CONTROL, asked_times(fit, None)[0])
        drawn = sample_sites(cell_trace(fit, cells, draw))
        measured = drawn["x"]["fn"]
        sd_g = (measured.variance.mean(0) + measured.mean.var(0)).sqrt()
        latents = {name: site["value"] for name, site in drawn.items() if _is_programme(name, site)}
        for name, value_nk in latents.items():
            mean_k, sd_k = value_nk.mean(0), value_nk.std(0)
            for k in range(value_nk.shape[-1]):
                low_ng, high_ng = (
                    _expected(fit, cells, {**draw, **latents, name: _with_column(value_nk, k, end)})
                    for end in (mean_k[k] - sd_k[k], mean_k[k] + sd_k[k])
                )
                change_kg.append((_log(fit, high_ng, median) - _log(fit, low_ng, median)).mean(0))
                standardised_kg.append((high_ng - low_ng).mean(0) / sd_g)
    over = ("programme", "gene")
    return xr.Dataset(
        {
            "change": (over, torch.stack(change_kg).cpu().numpy()),
            "standardised": (over, torch.stack(standardised_kg).cpu().numpy()),
        },
        coords={"programme": programme_names(fit), "gene": fit.screen.genes},
        attrs={"change_units": "log1p CP10k" if fit.screen.is_counts else "as the training data"},
    )


def _is_programme(name: str, site: Mapping[str, Any]) -> bool:
    return is_local(dict(site)) and not site["is_observed"] and name != "x"


def _with_column(value_nk: Tensor, k: int, to: Tensor) -> Tensor:
    moved_nk = value_nk.clone()
    moved_nk[:, k] = to
    return moved_nk


def _expected(fit: Fit, cells: Batch, latents: Mapping[str, Tensor]) -> Tensor:
    """Expected value of every gene of cells with given latents, n, g."""
    mean_ng: Tensor = cell_trace(fit, cells, latents).nodes["x"]["fn"].mean
    return mean_ng


def _log(fit: Fit, mean_ng: Tensor, library: float) -> Tensor:
    return torch.log1p(TARGET_SUM * mean_ng / library) if fit.screen.is_counts else mean_ng


def encoder_attributions(
    fit: Fit, screen: Screen, *, n_cells: int = 256, n_steps: int = 50, seed: int = 0
) -> xr.Dataset:
    """From which genes the encoder reads each programme, by integrated gradients.

    The posterior mean of a programme is followed from the mean control cell to a measured one, in a straight
    line. What it gains on the way is shared out among the genes. The cell's design, library and batch stay
    its own, and global latents are at their posterior means.

    Args:
        fit: The fit.
        screen: The cells, through the fit's names. They need control cells among them.
        n_cells: Cells explained, drawn at random from all.
        n_steps: Points on the line.
        seed: Seed of the choice.

    Returns:
        Over (programme, gene): ``attribution``, the mean over cells, and ``magnitude``, the mean of its
        absolute values, by which to rank genes: among all cells together, gains and losses of a gene cancel.
        Over programme: ``output_change``, the mean change of the posterior mean along the line, which the
        attributions of all genes add up to.

    Raises:
        DataError: There are no control cells.
        CausalCellError: captum is not installed.

    Source: Sundararajan, Taly and Yan, ICML 2017 (integrated gradients); Lopez et al., CLeaR 2023, appendix
    G (for the programmes of a screen).
    """
    try:
        from captum.attr import IntegratedGradients
    except ImportError as error:
        raise CausalCellError(_missing("attributions need captum")) from error
    baseline_1g = torch.from_numpy(_mean_control_cell(screen)).to(fit.device).unsqueeze(0)
    rng = np.random.default_rng(seed)
    rows = np.sort(rng.choice(screen.n_cells, min(n_cells, screen.n_cells), replace=False))
    batch = next(iter(Minibatches(screen, rows, len(rows), shuffle=False, device=fit.device)))
    assert batch.x_ng is not None
    fit.pair.train(False)
    with seeded(fit, seed), torch.enable_grad():
        encoder = _PosteriorMean(fit, batch)
        change_nk = encoder(batch.x_ng) - encoder(baseline_1g.expand_as(batch.x_ng))
        gradients = IntegratedGradients(encoder)
        # One step of all cells at a time: a guide may know the cells by their place in the minibatch.
        part_kng = torch.stack(
            [
                gradients.attribute(
                    batch.x_ng, baseline_1g, target=k, n_steps=n_steps, internal_batch_size=len(rows)
                )
                for k in range(change_nk.shape[-1])
            ]
        )
    over = ("programme", "gene")
    return xr.Dataset(
        {
            "attribution": (over, part_kng.mean(1).cpu().numpy()),
            "magnitude": (over, part_kng.abs().mean(1).cpu().numpy()),
            "output_change": ("programme", change_nk.detach().mean(0).cpu().numpy()),
        },
        coords={"programme": programme_names(fit), "gene": fit.screen.genes},
    )


class _PosteriorMean:
    """Measured values of the cells of a minibatch -> posterior mean of their programmes, n, k."""

    def __init__(self, fit: Fit, batch: Batch):
        self.guide = poutine.condition(fit.guide, data=global_means(fit))
        self.batch = batch
        sites = sample_sites(poutine.trace(self.guide).get_trace(batch))
        names = [name for name, site in sites.items() if _is_programme(name, site)]
        self.at_mean = dict.fromkeys(names, attrgetter("mean"))

    def __call__(self, x_ng: Tensor) -> Tensor:
        guide = Given(self.at_mean)(self.guide)
        trace = poutine.trace(guide).get_trace(self.batch._replace(x_ng=x_ng))
        return torch.cat([trace.nodes[name]["value"] for name in self.at_mean], -1)


def _mean_control_cell(screen: Screen) -> NDArray[np.float32]:
    rows = np.flatnonzero(screen.condition_n == 0)
    if not len(rows):
        raise DataError(
            "attributions start from the mean control cell, and these data have no control cells; give a "
            "file with control cells, or read the signatures alone"
        )
    chunks = (rows[start : start + _CHUNK] for start in range(0, len(rows), _CHUNK))
    total_g = np.sum([screen.x(chunk).sum(0, dtype=np.float64) for chunk in chunks], axis=0)
    return (total_g / len(rows)).astype(np.float32)


def _missing(what: str) -> str:
    return f"{what}, of the extra interpret: pip install 'pyro-causalcell[interpret]'"


# ---------------------------------------------------------------- gene sets


def enrichment(
    signatures: pd.DataFrame,
    gene_sets: Mapping[str, Sequence[str]],
    *,
    min_genes: int = 5,
    n_permutations: int = 1000,
    seed: int = 0,
) -> pd.DataFrame:
    """Which gene sets gather at one end of a programme's ranked genes (preranked GSEA, offline).

    All genes of the screen are ranked, and only they are the background: a set is judged by those of its
    genes that were measured. Sets with fewer than ``min_genes`` of them are not tested, nor sets that hold
    them all.

    Args:
        signatures: Programmes (index) by genes (columns), signed: for example
            ``programme_signatures(fit)["standardised"].to_pandas()``.
        gene_sets: Name -> genes (``data.read_gmt``).
        min_genes: Measured genes that a set needs.
        n_permutations: Random sets of genes behind each p-value.
        seed: Seed of the permutations.

    Returns:
        One row for each programme and tested set, surest first within a programme: ``programme``,
        ``gene_set``, ``n_genes`` (measured), ``score`` (normalised enrichment score: positive where the set's
        genes rise with the programme), ``p_value`` (zero: none of the permutations reached the score),
        ``fdr`` (false discovery rate among the sets of one programme) and ``leading_genes``, which carry the
        score. A programme whose genes are all the same has score NaN and p-value 1.

    Raises:
        DataError: No set has enough genes of the screen.
        CausalCellError: gseapy is not installed.

    Source: Subramanian et al., PNAS 2005; computed by gseapy (Fang, Liu and Peltz, Bioinformatics 2023).
    """
    tested = _tested_sets([str(gene) for gene in signatures.columns], gene_sets, min_genes)
    try:
        import gseapy
    except ImportError as error:
        raise CausalCellError(_missing("enrichment needs gseapy")) from error
    tables = []
    for programme, score_g in signatures.iterrows():
        if np.ptp(score_g.to_numpy()) == 0:
            table = pd.DataFrame({"Term": list(tested), "NES": np.nan, "NOM p-val": 1.0, "FDR q-val": 1.0})
            table["Lead_genes"] = ""
        else:
            table = gseapy.prerank(
                rnk=score_g.astype(np.float64),
                gene_sets=tested,
                min_size=1,
                max_size=signatures.shape[1],
                permutation_num=n_permutations,
                outdir=None,
                no_plot=True,
                threads=1,
                seed=seed,
            ).res2d
        tables.append(table.assign(programme=programme))
    found = pd.concat(tables, ignore_index=True)
    result = pd.DataFrame(
        {
            "programme": found["programme"].astype(str),
            "gene_set": found["Term"].astype(str),
            "n_genes": [len(tested[str(name)]) for name in found["Term"]],
            "score": found["NES"].astype(float),
            "p_value": found["NOM p-val"].astype(float),
            "fdr": found["FDR q-val"].astype(float),
            "leading_genes": found["Lead_genes"].str.replace(";", " "),
        }
    )
    order = {str(name): i for i, name in enumerate(signatures.index)}
    result = result.assign(place=result["programme"].map(order), size=-result["score"].abs())
    result = result.sort_values(["place", "fdr", "size"], kind="stable", ignore_index=True)
    return result.drop(columns=["place", "size"])


def _tested_sets(
    genes: list[str], gene_sets: Mapping[str, Sequence[str]], min_genes: int
) -> dict[str, list[str]]:
    """The measured genes of each set that can be tested."""
    measured = set(genes)
    inside = {name: [gene for gene in of if gene in measured] for name, of in gene_sets.items()}
    tested = {name: of for name, of in inside.items() if min_genes <= len(of) < len(measured)}
    if tested:
        return tested
    largest = max((len(of) for of in inside.values()), default=0)
    example = next((str(gene) for of in gene_sets.values() for gene in of), "none")
    raise DataError(
        f"expected a gene set with {min_genes} or more of the screen's {len(genes)} genes, and not all of "
        f"them; the largest overlap of {len(gene_sets)} sets is {largest}. Genes of the screen are called "
        f"{shown(genes[:3])}, those of the sets {example}: use the same names and the same case"
    )


# ---------------------------------------------------------------- doubles


def doubles_of(spec: ScreenSpec) -> list[str]:
    """The fitted conditions with exactly two targets."""
    return [name for name in spec.conditions if len(spec.split(name)) == 2]


def interaction_classes(spec: ScreenSpec, conditions: Sequence[str], found: Moments) -> pd.DataFrame:
    """The kind of every double among some conditions, with the numbers behind it.

    Effects are differences from control in log1p CP10k, over all genes but the two targets' own. What
    the noise of the means adds to their lengths and products is taken off.

    Args:
        spec: Names and separator of the screen.
        conditions: Control, singles and doubles, in the order of ``found``; others are not used.
        found: Moments of their cells, measured or predicted (``baselines.means.moments``).

    Returns:
        One row a double: ``double``, ``first``, ``second``, ``kind``; ``agreement``, the share of resamples
        of the genes that have the same kind; the other fields of ``data.Interaction``; and the lengths of
        the effects, ``size_first``, ``size_second`` and ``size_double``. The kind is "unknown" and numbers
        are NaN where control, a single or the double has fewer than two cells.

    Raises:
        DataError: The moments are of other conditions or genes.
    """
    shape = (len(conditions), len(spec.genes))
    if found.mean_cg.shape != shape:
        raise DataError(
            f"expected means of shape {shape}, found {found.mean_cg.shape}; give moments of these conditions "
            "and of the screen's genes"
        )
    place = {spec.canonical(name): i for i, name in enumerate(conditions) if found.cells_c[i] > 1}
    names = [spec.canonical(name) for name in conditions]
    rows = []
    for double in dict.fromkeys(names):
        parts = sorted(set(spec.split(double)))
        if len(parts) != 2:
            continue
        row: dict[str, Any] = {"double": double, "first": parts[0], "second": parts[1]}
        needed = [CONTROL, *parts, double]
        if all(name in place for name in needed):
            index = [place[name] for name in needed]
            scored_g = other_genes(spec, [double])[0]
            error_4g = found.variance_cg[index] / found.cells_c[index][:, None]
            row |= _classified(found.mean_cg[index][:, scored_g], error_4g[:, scored_g])
        else:
            row["kind"] = UNKNOWN
        rows.append(row)
    numbers = [*Interaction._fields[1:], "size_first", "size_second", "size_double"]
    return pd.DataFrame(rows, columns=["double", "first", "second", "kind", "agreement", *numbers])


def _classified(mean_4g: NDArray[np.float64], error_4g: NDArray[np.float64]) -> dict[str, Any]:
    """Kind and numbers from the means of control, first, second and double and their squared errors."""
    effect_3g = mean_4g[1:] - mean_4g[0]
    product_33g = effect_3g[:, None] * effect_3g[None]
    product_33g -= error_4g[0]  # the three effects share the control cells
    product_33g[range(3), range(3)] -= error_4g[1:]
    product_33 = product_33g.sum(-1)
    found = interaction(product_33)
    size_3 = np.sqrt(np.maximum(np.diag(product_33), 0.0))
    sizes = dict(zip(["size_first", "size_second", "size_double"], size_3.tolist(), strict=True))
    n_genes = mean_4g.shape[1]
    times_rg = np.random.default_rng(0).multinomial(n_genes, np.full(n_genes, 1 / n_genes), _RESAMPLES)
    again = [interaction(product).kind for product in np.moveaxis(product_33g @ times_rg.T, -1, 0)]
    return found._asdict() | sizes | {"agreement": float(np.mean([kind == found.kind for kind in again]))}


def classify_doubles(
    fit: Fit,
    screen: Screen | None = None,
    doubles: Sequence[str] | None = None,
    *,
    n_cells: int = 1000,
    seed: int = 0,
) -> pd.DataFrame:
    """Kinds of doubles as the cells show them and as the fit predicts them.

    Args:
        fit: The fit.
        screen: The cells, through the fit's names; None leaves the measured kinds out.
        doubles: Which, measured or not; None takes all that the fit knows.
        n_cells: Cells drawn of control and of each single and double.
        seed: Seed of the draws.

    Returns:
        Rows and columns of :func:`interaction_classes`, and ``source``: "measured" or "predicted". For fits
        whose edges have probabilities also ``programmes_first`` and ``programmes_second``, which each target
        moves, ``programmes_shared``, and ``programmes_pair``, which the pair's own interaction term moves.

    Raises:
        DataError: There is no double, a name is not that of a double, or a target is unknown.
    """
    spec = fit.screen
    names = doubles_of(spec) if doubles is None else [spec.canonical(name) for name in doubles]
    wrong = [name for name in names if len(spec.split(name)) != 2]
    if wrong or not names:
        raise DataError(
            f"expected doubles such as 'A{spec.separator}B', found {shown(wrong) or 'none'}; name pairs of "
            "the fitted targets"
        )
    spec.design(names)  # a misspelt target is told before the work
    asked = [CONTROL, *dict.fromkeys(t for name in names for t in spec.split(name)), *names]
    tables = {"predicted": interaction_classes(spec, asked, _predicted_moments(fit, asked, n_cells, seed))}
    if screen is not None:
        measured = _at(screen, moments(screen, np.arange(screen.n_cells)), asked)
        tables = {"measured": interaction_classes(spec, asked, measured), **tables}
    table = pd.concat([t.assign(source=source) for source, t in tables.items()], ignore_index=True)
    order = {name: i for i, name in enumerate(names)}
    table = table.sort_values("double", key=lambda c: c.map(order), kind="stable", ignore_index=True)
    table.insert(3, "source", table.pop("source"))
    return _with_programmes(fit, table)


def _predicted_moments(fit: Fit, conditions: Sequence[str], n_cells: int, seed: int) -> Moments:
    """Moments of drawn cells; each condition has draws of its own, so that their noise is independent."""
    model = ModelPredictor(fit)
    mean_cg, variance_cg = [], []
    for i, name in enumerate(conditions):
        (x_ng,) = model.cells([name], n_cells, seed + i)
        mean_cg.append(x_ng.mean(0))
        variance_cg.append(x_ng.var(0, ddof=1))
    return Moments(np.stack(mean_cg), np.stack(variance_cg), np.full(len(conditions), n_cells))


def _at(screen: Screen, found: Moments, conditions: Sequence[str]) -> Moments:
    """Moments of these conditions; those without cells are empty groups."""
    place = {name: i for i, name in enumerate(screen.conditions)}
    index = np.array([place.get(name, -1) for name in conditions])
    absent = index < 0
    mean_cg, variance_cg = found.mean_cg[index], found.variance_cg[index]
    mean_cg[absent] = variance_cg[absent] = np.nan
    return Moments(mean_cg, variance_cg, np.where(absent, 0, found.cells_c[index]))


def _with_programmes(fit: Fit, table: pd.DataFrame) -> pd.DataFrame:
    """Columns of the programmes that each target moves, for fits whose edges have probabilities."""
    try:
        edges = graph(fit)
    except PredictionError:  # perturbations move nothing
        return table
    if (edges["probability"] == 1).all():  # no gates: everything moves everything
        return table
    likely = edges[edges["probability"] > OPEN]
    moved: dict[str, set[str]] = {
        str(name): set(rows) for name, rows in likely.groupby("perturbation")["programme"]
    }
    order = list(dict.fromkeys(edges["programme"]))

    def joined(programmes: set[str]) -> str:
        return " ".join(sorted(programmes, key=order.index))

    def moved_by(targets: "pd.Series[str]") -> list[set[str]]:
        return [moved.get(target, set()) for target in targets]

    first, second = moved_by(table["first"]), moved_by(table["second"])
    return table.assign(
        programmes_first=[joined(names) for names in first],
        programmes_second=[joined(names) for names in second],
        programmes_shared=[joined(a & b) for a, b in zip(first, second, strict=True)],
        programmes_pair=[joined(names) for names in moved_by(table["first"] + ":" + table["second"])],
    )
