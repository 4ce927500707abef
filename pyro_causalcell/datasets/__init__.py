"""Real data sets: three small ones that come with the package, and readers of the public files of others."""

from pyro_causalcell.datasets.embedded import norman2019_subset, papalexi2021, semrau2017
from pyro_causalcell.datasets.images import read_causal3dident
from pyro_causalcell.datasets.pathways import replogle_pathways
from pyro_causalcell.datasets.readers import read_norman2019, read_replogle2022

__all__ = [
    "norman2019_subset",
    "papalexi2021",
    "read_causal3dident",
    "read_norman2019",
    "read_replogle2022",
    "replogle_pathways",
    "semrau2017",
]
