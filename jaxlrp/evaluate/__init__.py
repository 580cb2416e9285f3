"""Measuring explanations: the conservation ledger, and whether flipping what is relevant changes the score."""

from . import fills
from .flipping import Curves, deletion, insertion, pixel_flipping, srg
from .ledger import Ledger, LedgerRow, conservation

__all__ = [
    "Curves",
    "Ledger",
    "LedgerRow",
    "conservation",
    "deletion",
    "fills",
    "insertion",
    "pixel_flipping",
    "srg",
]
