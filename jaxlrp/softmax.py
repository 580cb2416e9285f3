"""Softmax, log_softmax and logsumexp, found by what they compute.

    softmax      exp(x - m) / sum(exp(x - m)), or exp(x - logsumexp(x))
    log_softmax  s - log(sum(exp(s))) with s = x - m, or x - logsumexp(x)
    logsumexp    log(sum(exp(x - m))) + m

The maximum m may be missing. In between there may be moves, casts and masks, and guards: a maximum with a number, a
small number added. The layer begins at the raw logits x.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax.extend.core import primitives as p

from .graph import Draft, Graph, small
from .kinds import PSUMS, STRUCTURAL
from .program import Equation, Value

_MOVES = STRUCTURAL | {p.convert_element_type_p, p.copy_p, p.reduce_precision_p, p.stop_gradient_p}
_GUARDS = PSUMS | {p.add_p, p.max_p, p.abs_p, p.pmax_p}  # over devices, sums and maxima go on
_MAXIMA = frozenset((p.reduce_max_p, p.scatter_max_p, p.cummax_p))
_LABELS = {p.div_p: "softmax", p.sub_p: "log_softmax", p.add_p: "logsumexp"}


def claim_softmax(graph: Graph) -> None:
    for e in reversed(graph.equations):
        if e.primitive not in _LABELS or not graph.free(e) or not graph.carries(e):
            continue
        entry = _entry(graph, e)
        if entry is None or not graph.fact(entry).data:
            continue
        label, kind, region = _LABELS[e.primitive], "softmax", graph.between(e, entry)
        after = graph.reader(e.outputs[0])
        if label == "log_softmax" and after is not None and after.primitive is p.exp_p and graph.free(after):
            region, label, e = [*region, after], "softmax", after
        if label == "logsumexp":
            kind = "max_pool"  # a smooth maximum
        if graph.sealed(region, e.outputs[0]):
            graph.claim(Draft(kind, label, region, e.outputs[0], e))


def claim_shifts(graph: Graph) -> None:
    """x - max(x), over axes or segments, in what is no softmax that is known: the shift cancels later on, x passes.

    As a sum it would be zero at the largest element, and relevance there would be divided by that.
    """
    for e in graph.equations:
        if e.primitive is not p.sub_p or not graph.free(e) or not graph.carries(e):
            continue
        entry = e.inputs[0]
        if len(set(graph.derived(e))) != 2 or graph.dominator(graph.derived(e)) is not entry:
            continue
        region = graph.between(e, entry) if isinstance(entry, Value) and graph.fact(entry).data else []
        found = {r.primitive for r in region} - {p.sub_p}
        if found & _MAXIMA and found <= _MAXIMA | _MOVES | {p.max_p}:
            outside = [v for r in region for v in r.outputs if r is not e and graph.read_outside(v, region)]
            if graph.sealed(region, e.outputs[0], outside):
                shared = graph.needed(region, outside)
                own = [r for r in region if r not in shared]
                graph.claim(Draft("activation", "shift", own, e.outputs[0], e, shared=shared))


def _entry(graph: Graph, e: Equation) -> Value | None:
    """The logits, if `e` is the last step of a softmax, a log_softmax or a logsumexp."""
    if e.primitive is p.add_p:
        return _logsumexp(graph, e)
    left, right = e.inputs
    if not isinstance(left, Value) or not isinstance(right, Value):
        return None
    if e.primitive is p.div_p:
        above, below = _argument(graph, left, p.exp_p), _summed(graph, right)
        if above is None or below is None:
            return None
        return _common(_unshifted(graph, above), _unshifted(graph, below))
    for v in _back(graph, right, guards=True):
        last = graph.producer.get(v)
        if last is None or not last.values:  # the logarithm of a number
            continue
        if last.primitive is p.log_p:
            argument = _summed(graph, last.values[0])
            shared = None if argument is None else _common(_back(graph, left), _back(graph, argument))
            return None if shared is None else _unshifted(graph, shared)[0]
        if last.primitive is p.add_p:
            logits = _logsumexp(graph, last)
            return None if logits is None else _common(_back(graph, left), _back(graph, logits))
    return None


def _logsumexp(graph: Graph, e: Equation) -> Value | None:
    """The x of log(sum(exp(x - m))) + m."""
    if len(e.values) != 2:
        return None
    for first, second in (e.values, e.values[::-1]):
        logarithm, best = _argument(graph, first, p.log_p), _argument(graph, second, p.reduce_max_p)
        argument = None if logarithm is None else _summed(graph, logarithm)
        if argument is not None and best is not None:
            unshifted = _unshifted(graph, argument)
            return _common(unshifted, _back(graph, best)) if unshifted[0] is not argument else None
    return None


def _summed(graph: Graph, v: Value) -> Value | None:
    """The x of sum(exp(x))."""
    argument = _argument(graph, v, p.reduce_sum_p)
    return None if argument is None else _argument(graph, argument, p.exp_p)


def _unshifted(graph: Graph, v: Value) -> list[Value]:
    """The values that `v` merely moves; those that x merely moves, where `v` is x - max(x)."""
    for u in _back(graph, v):
        e = graph.producer.get(u)
        if e is not None and e.primitive is p.sub_p and len(e.values) == 2:
            best = _argument(graph, e.values[1], p.reduce_max_p)
            shared = None if best is None else _common(_back(graph, e.values[0]), _back(graph, best))
            if shared is not None:
                return _back(graph, shared)
    return _back(graph, v)


def _argument(graph: Graph, v: Value, primitive: object) -> Value | None:
    """What the primitive was applied to, if `v` is its result, moved and guarded."""
    for u in _back(graph, v, guards=True):
        e = graph.producer.get(u)
        if e is not None and e.primitive is primitive and e.values:
            return e.values[0]
    return None


def _back(graph: Graph, v: Value, guards: bool = False) -> list[Value]:
    """`v` and the values before it that it merely moves."""
    chain = [v]
    while (e := graph.producer.get(chain[-1])) is not None:
        sources = {u for u in graph.derived(e) if jnp.issubdtype(u.aval.dtype, jnp.floating)}
        others = [a for a in e.inputs if a not in sources]
        guard = guards and e.primitive in _GUARDS and all(map(small, others))
        if len(sources) != 1 or not (e.primitive in _MOVES or guard):
            break
        chain.append(sources.pop())
    return chain


def _common(first: list[Value], second: list[Value]) -> Value | None:
    return next((v for v in first if v in second), None)
