"""Measuring explanations: the conservation ledger, pixel flipping and other measures, search by them, and sweeps."""

from . import fills
from .flipping import Curves, deletion, insertion, pixel_flipping, srg
from .ledger import Ledger, LedgerRow, conservation
from .metrics import (
    complexity,
    infidelity,
    max_sensitivity,
    pointing_game,
    relevance_mass,
    relevance_rank,
    sensitivity_n,
    sparseness,
)
from .randomisation import parameter_randomisation
from .results import Sweep, read_sweep
from .search import Found, ascend, grid, surrogate
from .sweep import sweep

__all__ = [
    "Curves",
    "Found",
    "Ledger",
    "LedgerRow",
    "Sweep",
    "ascend",
    "complexity",
    "conservation",
    "deletion",
    "fills",
    "grid",
    "infidelity",
    "insertion",
    "max_sensitivity",
    "parameter_randomisation",
    "pixel_flipping",
    "pointing_game",
    "read_sweep",
    "relevance_mass",
    "relevance_rank",
    "sensitivity_n",
    "sparseness",
    "srg",
    "surrogate",
    "sweep",
]
