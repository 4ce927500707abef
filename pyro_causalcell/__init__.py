"""Probabilistic programs that predict and explain what a perturbation does to single cells."""

from pathlib import Path

import pyro
from torch import nn

__version__ = "0.1.0"

_CHECKOUT = Path(__file__).resolve().parent.parent
if (_CHECKOUT / "setup.cfg").exists() and (_CHECKOUT / "models" / "__init__.py").exists():
    __path__.append(str(_CHECKOUT))  # `python -m` from the checkout finds models/ and guides/ there

# Parameters live in their modules, not in one store for the whole process: two fits never share any.
pyro.settings.set(module_local_params=True)

# ... and Pyro's SVI then asks each of them for its unconstrained value, which plain torch ones do not offer.
nn.Parameter.unconstrained = lambda self: self  # type: ignore[attr-defined]
