"""Attention: O = softmax(scale Q K^T + bias, masked) V is one layer, however it is spelled.

From each softmax the way goes up to a product of two data values, down to another; in between there are only moves,
casts, masks, and sums and products with what carries no relevance. Scales of Q before the product, rotations, repeated
heads and the projections are layers of their own.
"""

from __future__ import annotations

from jax.extend.core import primitives as p

from .graph import Draft, Graph
from .kinds import STRUCTURAL
from .program import Equation, Value
from .single import multiplies

_STEPS = STRUCTURAL | {p.mul_p, p.div_p, p.add_p, p.sub_p, p.neg_p, p.add_jaxvals_p}


def claim_attention(graph: Graph) -> None:
    """Claims what the softmaxes found so far are part of."""
    softmaxes = {d for d in graph.claims.values() if d.kind == "softmax" and d.label == "softmax"}
    for softmax in sorted(softmaxes, key=lambda d: graph.position[d.main]):
        inside = set(softmax.equations)
        made = {v for e in softmax.equations for v in e.outputs}
        (logits,) = {v for e in softmax.equations for v in graph.data(e) if v not in made}
        scores, weighted = _above(graph, logits), _below(graph, softmax.output, inside)
        if scores is None or weighted is None:
            continue
        region, exit = [*scores, *softmax.equations, *weighted], weighted[-1]
        # weights that are returned as well are computed there and here
        outside = [v for e in region for v in e.outputs if e is not exit and graph.read_outside(v, region)]
        shared = graph.needed(region, outside)
        own = [e for e in region if e not in shared]
        graph.claim(Draft("attention", "attention", own, exit.outputs[0], exit, shared=shared))


def _above(graph: Graph, value: Value) -> list[Equation] | None:
    """From the product of queries and keys to the logits."""
    path: list[Equation] = []
    while (e := graph.producer.get(value)) is not None and graph.free(e):
        path.append(e)
        if _is_product(graph, e):
            return path[::-1]
        if not _steps(graph, e):
            return None
        value = graph.data(e)[0]
    return None


def _below(graph: Graph, value: Value, inside: set[Equation]) -> list[Equation] | None:
    """From the weights to their product with the values."""
    path: list[Equation] = []
    while True:
        readers = [e for e in dict.fromkeys(graph.readers.get(value, [])) if e not in inside and graph.free(e)]
        onwards = [e for e in readers if _is_product(graph, e) or (_steps(graph, e) and e.primitive is not p.add_p)]
        if len(onwards) != 1:
            return None
        path.append(onwards[0])
        if _is_product(graph, onwards[0]):
            return path
        value = onwards[0].outputs[0]


def _is_product(graph: Graph, e: Equation) -> bool:
    return e.primitive is p.dot_general_p and len(graph.data(e)) == 2 and not multiplies(e)


def _steps(graph: Graph, e: Equation) -> bool:
    """Whether `e` moves, masks, scales or shifts one data value."""
    known = e.primitive in _STEPS or multiplies(e)
    one = known and len(graph.data(e)) == 1 and graph.carries(e) and len(e.outputs) == 1
    return one and not (e.primitive is p.div_p and e.inputs[0] not in graph.data(e))
