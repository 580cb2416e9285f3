"""Measuring explanations: the conservation ledger, pixel flipping, and other measures."""

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

__all__ = [
    "Curves",
    "Ledger",
    "LedgerRow",
    "complexity",
    "conservation",
    "deletion",
    "fills",
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
]
