"""From an AnnData to the tensors of a minibatch: the screen, its splits, its minibatches."""

from pyro_causalcell.data.gene_sets import gene_sets, read_gmt
from pyro_causalcell.data.interactions import Interaction, InteractionKind, interaction, interaction_kind
from pyro_causalcell.data.minibatches import Anchors, Minibatches
from pyro_causalcell.data.screen import Screen, read
from pyro_causalcell.data.spec import ScreenSpec
from pyro_causalcell.data.splits import (
    Split,
    held_out_batches,
    held_out_combinations,
    held_out_guides,
    held_out_perturbations,
    random_cells,
)

__all__ = [
    "Anchors",
    "Interaction",
    "InteractionKind",
    "Minibatches",
    "Screen",
    "ScreenSpec",
    "Split",
    "gene_sets",
    "held_out_batches",
    "held_out_combinations",
    "held_out_guides",
    "held_out_perturbations",
    "interaction",
    "interaction_kind",
    "random_cells",
    "read",
    "read_gmt",
]
