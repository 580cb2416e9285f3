"""jaxlrp: Layer-wise Relevance Propagation as a JAX function transformation."""

from . import composites, errors, evaluate, gradients, kinds, rules, select
from .attribute import logits, lrp, plan, rewrite, value_and_lrp
from .composites import Composite

__version__ = "0.1.0"

__all__ = [
    "Composite",
    "composites",
    "errors",
    "evaluate",
    "gradients",
    "kinds",
    "logits",
    "lrp",
    "plan",
    "rewrite",
    "rules",
    "select",
    "value_and_lrp",
]
