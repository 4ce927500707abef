"""Probabilistic programs that predict and explain what a perturbation does to single cells."""

from pathlib import Path

import pyro

__version__ = "0.1.0"

_CHECKOUT = Path(__file__).resolve().parent.parent
if (_CHECKOUT / "setup.cfg").exists() and (_CHECKOUT / "models" / "__init__.py").exists():
    __path__.append(str(_CHECKOUT))  # `python -m` from the checkout finds models/ and guides/ there

# Parameters live in their modules, not in one store for the whole process: two fits never share any.
pyro.settings.set(module_local_params=True)
