"""Normalisation by statistics of the data: LayerNorm, RMSNorm, GroupNorm, InstanceNorm, L2, BatchNorm in training mode.

Such a layer ends in a product (or quotient) of x, or of x - mean(x), with a root of a sum of squares; both come from
one value, the layer's input. Called a statistic is what reaches the product only through a sum over axes. With its
roots held constant the layer is linear, which is all that its rules need (`rules.ConstantStatistics`).
"""

from __future__ import annotations

from jax.extend.core import primitives as p

from .graph import Draft, Graph
from .kinds import PSUMS, STRUCTURAL
from .program import Constant, Equation, Value
from .runs import parameter_step

# what keeps every element; a mask may stand on the way to a sum as well
_RESHAPES = frozenset((
    p.reshape_p, p.transpose_p, p.squeeze_p, p.broadcast_in_dim_p, p.convert_element_type_p, p.copy_p,
    p.reduce_precision_p,
))  # fmt: skip
_SUMS = frozenset((p.add_p, p.sub_p, p.neg_p, p.add_jaxvals_p))
_PRODUCTS = frozenset((p.mul_p, p.div_p))
_POWERS = {p.sqrt_p: 0.5, p.rsqrt_p: -0.5, p.square_p: 2.0, p.abs_p: 1.0}
ROOTS = frozenset((p.sqrt_p, p.rsqrt_p, p.pow_p))
_GUARDS = STRUCTURAL | _SUMS | _RESHAPES | {p.max_p, p.min_p, p.clamp_p, p.stop_gradient_p}
_OF_STATISTICS = _GUARDS | _PRODUCTS | ROOTS | PSUMS | {p.square_p, p.integer_pow_p, p.reduce_sum_p}


def claim_norms(graph: Graph) -> None:
    for e in reversed(graph.equations):
        if e.primitive not in _PRODUCTS or not graph.free(e) or not graph.carries(e) or len(set(graph.derived(e))) != 2:
            continue
        entry = graph.dominator(graph.derived(e))
        found = None if entry is None else _normalises(graph, e, entry)
        # the mean may be taken off before both paths part: then the input lies above the difference
        above = None if entry is None else graph.producer.get(entry)
        if above is not None and above.primitive is p.sub_p and len(graph.derived(above)) == 2:
            higher = graph.dominator(graph.derived(above))
            centred = higher is not None and any(r.primitive is p.reduce_sum_p for r in graph.between(above, higher))
            wider = _normalises(graph, e, higher) if higher is not None and centred else None
            entry, found = (higher, wider) if wider else (entry, found)
        if not found or entry is None or not graph.fact(entry).data:
            continue
        region, statistics = found
        if not graph.sealed(region, e.outputs[0], statistics):
            continue
        region, output = _affine(graph, region, entry, e.outputs[0], statistics)
        kind, label = _kind(graph, region)
        # statistics that are read elsewhere too (running averages) are computed there and here
        shared = graph.needed(region, [v for v in statistics if graph.read_outside(v, region)])
        own = [r for r in region if r not in shared]
        graph.claim(Draft(kind, label, own, output, e, shared=shared))


def _normalises(graph: Graph, exit: Equation, entry: Value) -> tuple[list[Equation], set[Value]] | None:
    """The equations between and the statistics among their values, if `exit` normalises `entry`.

    That is, if what it gives is linear in `entry` but for roots of sums, and blind to its scale.

    Each value has a degree: by what power of c it grows where the entry grows by c, numbers added to it left aside.
    """
    region = graph.between(exit, entry)
    linear, summands, statistics = {entry: 1.0}, dict[Value, float](), dict[Value, float]()
    rooted = set[Value]()
    for e in region:
        sources, out = set(graph.derived(e)), e.outputs[0]
        degrees = linear | summands | statistics
        degree = _degree(e, degrees) if sources <= degrees.keys() and len(e.outputs) == 1 else None
        if degree is None:
            return None
        if sources <= statistics.keys():
            quotient = e.primitive is p.div_p and len(sources) == 2  # that of two statistics would not be held constant
            if quotient or e.primitive not in _OF_STATISTICS:
                return None
            statistics[out] = degree
            if e.primitive in ROOTS or sources & rooted:
                rooted.add(out)
        elif e.primitive is p.reduce_sum_p and out.aval.size < entry.aval.size == e.values[0].aval.size:
            statistics[out] = degree
        elif sources <= linear.keys() | statistics.keys() and _is_linear(graph, e, linear):
            linear[out] = degree
        elif not sources & statistics.keys() or (e.primitive in _SUMS and not sources & rooted):
            summands[out] = degree  # on its way to a sum: squared, masked
        else:
            return None
    ends = [v for v in graph.derived(exit) if v in rooted]
    return (region, set(statistics)) if ends and linear.get(exit.outputs[0]) == 0 else None


def _degree(e: Equation, degrees: dict[Value, float]) -> float | None:
    """The degree of what `e` gives; None for a primitive that has no place in a norm."""
    known = [degrees[a] for a in e.inputs if isinstance(a, Value) and a in degrees]
    first = known[0]
    if e.primitive in _PRODUCTS:
        sign = 1 if e.primitive is p.mul_p else -1
        if len(known) == 2:
            return first + sign * known[1]
        return first if e.primitive is p.mul_p or e.inputs[0] in degrees else -first
    if e.primitive in _POWERS:
        return first * _POWERS[e.primitive]
    if e.primitive is p.integer_pow_p:
        return first * e.params["y"]
    if e.primitive is p.pow_p:
        exponent = e.inputs[1]
        return first * float(exponent.value) if isinstance(exponent, Constant) and exponent.aval.size == 1 else None
    return max(known) if e.primitive in _GUARDS | PSUMS | {p.reduce_sum_p} else None


def _is_linear(graph: Graph, e: Equation, linear: dict[Value, float]) -> bool:
    """Whether `e` is linear in its linear operands, statistics and parameters held constant, each element in place."""
    scaled = e.primitive in _PRODUCTS and sum(a in linear for a in e.inputs) == 1
    shifted = e.primitive in _SUMS and sum(a in linear for a in e.inputs) == 1
    kept = e.primitive in _RESHAPES and e.inputs[0].aval.size == e.outputs[0].aval.size
    return kept or shifted or (scaled and (e.primitive is p.mul_p or e.inputs[0] in linear))


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


def _affine(
    graph: Graph, region: list[Equation], entry: Value, output: Value, statistics: set[Value]
) -> tuple[list[Equation], Value]:
    """With the reshapes around it that undo each other, a scale and a bias after it."""
    above, below = graph.producer.get(entry), graph.reader(output)
    if (
        above is not None
        and below is not None
        and above.primitive is below.primitive is p.reshape_p
        and graph.free(above)
        and graph.free(below)
        and above.values[0].aval.shape == _shape(below)
        and graph.sealed([above, *region, below], below.outputs[0], statistics)
    ):
        region, output = [above, *region, below], below.outputs[0]
    for wanted in (p.mul_p, p.add_p):
        e = graph.reader(output)
        if e is not None and e.primitive is wanted and graph.free(e) and parameter_step(graph, e) is not None:
            region, output = [*region, e], e.outputs[0]
    return region, output
