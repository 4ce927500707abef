"""Gene sets of a GMT file, as columns of a screen."""

from collections.abc import Sequence
from pathlib import Path

from pyro_causalcell.data.spec import shown
from pyro_causalcell.errors import DataError

__all__ = ["gene_sets", "read_gmt"]


def read_gmt(path: str | Path) -> dict[str, list[str]]:
    """Read a GMT file: on each line a set's name, a description, and its genes, separated by tabs.

    Args:
        path: The file.

    Returns:
        Name -> genes, in the order of the file, each gene once.

    Raises:
        DataError: There is no such file, a line is not of this form, or a name comes twice.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"expected a GMT file at {path}, found none; check the path")
    sets: dict[str, list[str]] = {}
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise DataError(f"expected GMT text in {path}, found other bytes; unpack the file first") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        name, *rest = (field.strip() for field in line.split("\t"))
        genes = list(dict.fromkeys(gene for gene in rest[1:] if gene))
        if not name or not genes:
            raise DataError(
                f"expected name, description and genes separated by tabs in line {number} of {path}, found "
                f"{line[:60]!r}; is it a GMT file?"
            )
        if name in sets:
            raise DataError(f"expected each gene set once in {path}, found {name!r} twice; rename one")
        sets[name] = genes
    if not sets:
        raise DataError(f"expected gene sets in {path}, found an empty file; check the path")
    return sets


def gene_sets(path: str | Path, genes: Sequence[str], *, min_genes: int = 5) -> dict[str, list[int]]:
    """The sets of a GMT file as columns of a screen.

    Args:
        path: The file.
        genes: Names of the screen's genes (``screen.genes``), as the file spells them.
        min_genes: Sets with fewer genes in the screen are left out.

    Returns:
        Name of each set that is kept -> columns of its genes. Its values, as a list, are the setting
        ``gene_sets`` of a guide.

    Raises:
        DataError: The file is no GMT, or no set has so many genes in the screen.
    """
    column = {gene: g for g, gene in enumerate(genes)}
    found = {name: [column[gene] for gene in s if gene in column] for name, s in read_gmt(path).items()}
    kept = {name: sorted(columns) for name, columns in found.items() if len(columns) >= min_genes}
    if not kept:
        most = max(map(len, found.values()))
        raise DataError(
            f"expected a gene set with {min_genes} genes of the screen in {path}, found {most} at most; the "
            f"screen calls its genes {shown(genes, 3)}. Use a file with the same names, or lower min_genes"
        )
    return kept
