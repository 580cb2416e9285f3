"""Measuring explanations: the conservation ledger."""

from .ledger import Ledger, LedgerRow, conservation

__all__ = ["Ledger", "LedgerRow", "conservation"]
