"""Measuring explanations: the conservation ledger, pixel flipping and other measures, and search by them."""

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
from .search import Found, ascend, grid, surrogate

__all__ = [
    "Curves",
    "Found",
    "Ledger",
    "LedgerRow",
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
    "relevance_mass",
    "relevance_rank",
    "sensitivity_n",
    "sparseness",
    "srg",
    "surrogate",
]
