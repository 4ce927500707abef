"""From an AnnData to the tensors of a minibatch: the screen, its splits, its minibatches."""

from pyro_causalcell.data.gene_sets import gene_sets, read_gmt
from pyro_causalcell.data.interactions import Interaction, InteractionKind, interaction, interaction_kind
from pyro_causalcell.data.minibatches import Anchors, Minibatches
from pyro_causalcell.data.screen import Screen, read, read_embeddings
from pyro_causalcell.data.spec import ScreenSpec
from pyro_causalcell.data.splits import (
    Split,
    held_out_batches,
    held_out_combinations,
    held_out_guides,
    held_out_perturbations,
    held_out_times,
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
    "held_out_times",
    "interaction",
    "interaction_kind",
    "random_cells",
    "read",
    "read_embeddings",
    "read_gmt",
]
