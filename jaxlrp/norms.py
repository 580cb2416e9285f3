"""Normalisation by statistics of the data: LayerNorm, RMSNorm, GroupNorm, InstanceNorm, L2, BatchNorm in training mode.

Such a layer ends in a product (or quotient) of x, or of x - mean(x), with a root of a sum of squares; both come from
one value, the layer's input. Called a statistic is what reaches the product only through a sum over axes. With its
roots held constant the layer is linear, which is all that its rules need (`rules.ConstantStatistics`).
"""

from __future__ import annotations

from jax.extend.core import primitives as p

from .graph import Draft, Graph
from .kinds import STRUCTURAL
from .program import Equation, Value
from .runs import parameter_step

_MOVES = STRUCTURAL | {p.convert_element_type_p, p.copy_p, p.reduce_precision_p}
_SUMS = frozenset((p.add_p, p.sub_p, p.neg_p, p.add_jaxvals_p))
_PRODUCTS = frozenset((p.mul_p, p.div_p))
_SQUARES = frozenset((p.square_p, p.integer_pow_p, p.pow_p, p.mul_p))
ROOTS = frozenset((p.sqrt_p, p.rsqrt_p, p.pow_p))
_GUARDS = frozenset((p.max_p, p.min_p, p.clamp_p, p.integer_pow_p, p.square_p, p.stop_gradient_p))


def claim_norms(graph: Graph) -> None:
    for e in reversed(graph.equations):
        if e.primitive not in _PRODUCTS or not graph.free(e) or not graph.carries(e) or len(set(graph.derived(e))) != 2:
            continue
        entry = graph.dominator(graph.derived(e))
        region = None if entry is None else _normalises(graph, e, entry)
        # the mean may be taken off before both paths part: then the input lies above the difference
        above = None if entry is None else graph.producer.get(entry)
        if above is not None and above.primitive is p.sub_p and len(graph.derived(above)) == 2:
            higher = graph.dominator(graph.derived(above))
            centred = higher is not None and any(r.primitive is p.reduce_sum_p for r in graph.between(above, higher))
            wider = _normalises(graph, e, higher) if higher is not None and centred else None
            entry, region = (higher, wider) if wider else (entry, region)
        if not region or entry is None or not graph.fact(entry).data or not graph.sealed(region, e.outputs[0]):
            continue
        region, output = _affine(graph, region, entry, e.outputs[0])
        kind, label = _kind(graph, region)
        graph.claim(Draft(kind, label, region, output, e))


def _normalises(graph: Graph, exit: Equation, entry: Value) -> list[Equation] | None:
    """The equations between, if what `exit` gives is linear in `entry` but for roots of sums of its squares."""
    region = graph.between(exit, entry)
    linear, squares, statistics, rooted = {entry}, set[Value](), set[Value](), set[Value]()
    for e in region:
        sources, out = set(graph.derived(e)), e.outputs[0]
        if sources <= statistics:
            if e.primitive not in _MOVES | _SUMS | _PRODUCTS | ROOTS | _GUARDS | {p.reduce_sum_p}:
                return None
            statistics.add(out)
            if e.primitive in ROOTS or sources & rooted:
                rooted.add(out)
        elif e.primitive is p.reduce_sum_p and sources <= linear | squares and out.aval.size < entry.aval.size:
            statistics.add(out)
        elif sources <= linear | statistics and _is_linear(graph, e, linear):
            linear.add(out)
        elif sources <= linear | squares and e.primitive in _SQUARES | _MOVES | {p.div_p}:
            squares.add(out)
        else:
            return None
    ends = [v for v in graph.derived(exit) if v in rooted]
    return region if squares and ends and exit.outputs[0] in linear else None


def _is_linear(graph: Graph, e: Equation, linear: set[Value]) -> bool:
    """Whether `e` is linear in its linear operands, statistics and parameters held constant."""
    scaled = e.primitive in _PRODUCTS and sum(a in linear for a in e.inputs) == 1
    return e.primitive in _MOVES | _SUMS or (scaled and (e.primitive is p.mul_p or e.inputs[0] in linear))


def _kind(graph: Graph, region: list[Equation]) -> tuple[str, str]:
    """What a person calls it, by the axes that are summed over, and whether a mean is taken off."""
    sums = [e for e in region if e.primitive is p.reduce_sum_p]
    summed = sums[0].values[0].aval
    axes = tuple(sums[0].params["axes"])
    whole = summed.shape == _shape(region[-1])
    if not any(e.primitive is p.sub_p and len(graph.derived(e)) == 2 for e in region):
        return "rms_norm", "rms_norm"
    if whole and 0 in axes and len(axes) < summed.ndim:
        return "batch_norm", "batch_norm"
    if whole and summed.ndim - 1 in axes:
        return "layer_norm", "layer_norm"
    return "group_norm", "instance_norm" if whole else "group_norm"


def _shape(e: Equation) -> tuple[int, ...]:
    return tuple(e.outputs[0].aval.shape)


def _affine(graph: Graph, region: list[Equation], entry: Value, output: Value) -> tuple[list[Equation], Value]:
    """With the reshapes around it that undo each other, a scale and a bias after it."""
    above, below = graph.producer.get(entry), graph.reader(output)
    if (
        above is not None
        and below is not None
        and above.primitive is below.primitive is p.reshape_p
        and graph.free(above)
        and graph.free(below)
        and above.values[0].aval.shape == _shape(below)
        and graph.sealed([above, *region, below], below.outputs[0])
    ):
        region, output = [above, *region, below], below.outputs[0]
    for wanted in (p.mul_p, p.add_p):
        e = graph.reader(output)
        if e is not None and e.primitive is wanted and graph.free(e) and parameter_step(graph, e) is not None:
            region, output = [*region, e], e.outputs[0]
    return region, output
