"""jaxlrp: Layer-wise Relevance Propagation as a JAX function transformation."""

import importlib
from typing import Any

from . import composites, errors, evaluate, gradients, kinds, patterns, rules, select
from .attribute import logits, lrp, plan, rewrite, value_and_lrp
from .classes import per_target
from .composites import Composite
from .functional import functional
from .similarity import bilrp


def __getattr__(name: str) -> Any:
    """`jaxlrp.plot` and `jaxlrp.nn`, imported when asked for: they need matplotlib and Flax."""
    if name not in ("nn", "plot"):
        raise AttributeError(f"module 'jaxlrp' has no attribute {name!r}")
    return importlib.import_module(f"jaxlrp.{name}")


__version__ = "0.1.0"

__all__ = [
    "Composite",
    "bilrp",
    "composites",
    "errors",
    "evaluate",
    "functional",
    "gradients",
    "kinds",
    "logits",
    "lrp",
    "patterns",
    "per_target",
    "plan",
    "rewrite",
    "rules",
    "select",
    "value_and_lrp",
]
