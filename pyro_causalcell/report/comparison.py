"""A comparison of methods as files: tables, one page of Markdown, two figures."""

from pathlib import Path

import pandas as pd

from pyro_causalcell import plot
from pyro_causalcell.baselines.compare import CEILING, FLOOR, MEASURES, Comparison

__all__ = ["write_comparison"]


def write_comparison(comparison: Comparison, folder: str | Path, reference: str = FLOOR) -> Path:
    """Write scores.csv, summary.csv, differences.csv, calibrated.csv, comparison.md and two figures.

    Args:
        comparison: What ``baselines.compare`` returns.
        folder: Where to write; made if it is not there.
        reference: Baseline of the differences and of the calibrated scores.

    Returns:
        The page, ``comparison.md``.

    Raises:
        DataError: There is no method of the name ``reference``.
    """
    differences, calibrated = comparison.differences(reference), comparison.calibrated(reference)
    summary = comparison.summary()
    page = _page(comparison, summary, differences, calibrated, reference)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tables = {"scores": comparison.table, "summary": summary}
    tables |= {"differences": differences, "calibrated": calibrated}
    for name, table in tables.items():
        table.to_csv(folder / f"{name}.csv", index=False)
    figure = plot.compare_methods(comparison.table, comparison.own, floor=reference)
    figure.savefig(folder / "comparison.png", dpi=150)
    plot.calibrated_scores(calibrated).savefig(folder / "calibrated.png", dpi=150)
    path = folder / "comparison.md"
    path.write_text(page, encoding="utf-8")
    return path


def _page(
    comparison: Comparison,
    summary: pd.DataFrame,
    differences: pd.DataFrame,
    calibrated: pd.DataFrame,
    reference: str,
) -> str:
    n_conditions = comparison.table["condition"].nunique()
    n_seeds = comparison.table["seed"].nunique()
    unresolved = list(dict.fromkeys(calibrated.loc[~calibrated["resolved"], "metric"]))
    lines = [
        "# Comparison",
        "",
        f"{len(comparison.methods)} methods, {n_conditions} held-out conditions, "
        f"{len(comparison.splits)} folds, seeds: {n_seeds}. Brackets hold 95 % bootstrap intervals over "
        "conditions.",
        "",
        *[f"- fold {f}: {words}" for f, words in enumerate(comparison.splits)],
        "",
    ]
    if len(comparison.left_out):
        rows = comparison.left_out.itertuples()
        few = "; ".join(f"{row.condition} ({row.cells}, fold {row.fold})" for row in rows)
        lines += [f"Not scored, too few held-out cells: {few}.", ""]
    lines += ["## Scores", "", *_table(summary, "mean", comparison), ""]
    lines += [f"## Differences from the {reference}", ""]
    lines += ["Bold: the interval lies on the better side of zero.", ""]
    lines += [*_table(differences, "difference", comparison), ""]
    lines += [f"## Between the {reference} (0) and the {CEILING} (1)", ""]
    lines += ["Not clipped: below 0 is worse than the baseline, above 1 less noisy than a repeat.", ""]
    if unresolved:
        lines += [
            f"The {CEILING} does not beat the {reference} on {', '.join(unresolved)}: these cannot tell "
            "methods apart here.",
            "",
        ]
    lines += [*_table(calibrated[calibrated["resolved"]], "score", comparison), ""]
    return "\n".join(lines)


def _table(table: pd.DataFrame, value: str, comparison: Comparison) -> list[str]:
    """Metrics down, methods across, as Markdown."""
    if table.empty:
        return ["None."]
    methods = [name for name in comparison.methods if name in set(table["method"])]
    cells = {(row.metric, row.method): _cell(row, value) for row in table.itertuples()}
    lines = ["| metric | " + " | ".join(methods) + " |", "|---" * (len(methods) + 1) + "|"]
    for metric in dict.fromkeys(table["metric"]):
        arrow = "↑" if MEASURES[metric].higher_is_better else "↓"
        row = " | ".join(cells[metric, method] for method in methods)
        lines.append(f"| {MEASURES[metric].heading} {arrow} | {row} |")
    return lines


def _cell(row: object, value: str) -> str:
    number, low, high = (float(getattr(row, name)) for name in (value, "low", "high"))
    if pd.isna(number):
        return "not defined"
    text = f"{number:.3f} [{low:.3f}, {high:.3f}]"
    return f"**{text}**" if getattr(row, "better", False) else text
