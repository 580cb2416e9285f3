"""The rule where token ids become numbers."""

from __future__ import annotations

from typing import ClassVar

import jax
from jax.extend.core import primitives as p

from ..program import leaves
from .base import Rule, rule
from .layer import Layer


@rule
class EmbeddingSum(Rule):
    """The relevance of an id is that of the row it selects: R_t = sum_d R_td over the features d.

    For rows of a table (any indexing) and one-hot vectors. Source: Arras et al. 2017, section 3.
    """

    kinds: ClassVar[frozenset[str]] = frozenset(("embedding",))
    uses: ClassVar[frozenset[str]] = frozenset()

    def propagate(self, layer: Layer, relevance: jax.Array) -> tuple[jax.Array, ...]:
        e = leaves(layer.op.steps)[-1]
        if e.primitive is p.gather_p:
            relevance = relevance.sum(tuple(e.params["dimension_numbers"].offset_dims))
        elif e.primitive is p.dynamic_slice_p:
            relevance = relevance.sum()
        return (relevance.reshape(layer.op.in_shapes[0]),)


__all__ = ["EmbeddingSum"]
