"""Layers that take several equations and come back together: activations (silu, gelu, softplus ...) and softmax.

They are found by data flow. A wrapper (`jax.nn.softplus` is jitted) whose body is element-wise is one activation. Where
element-wise paths from one value join again (x * sigmoid(x)), all between is one activation. A softmax is what lies
between a quotient and the immediate dominator of its two operands, when it holds an exponential and its sum.
"""

from __future__ import annotations

from jax.extend.core import primitives as p

from .graph import Draft, Graph, small
from .kinds import ELEMENTWISE, kind_of
from .program import Equation, Value, Wrapper, leaves

_SOFTMAX = frozenset((
    p.exp_p, p.reduce_max_p, p.reduce_sum_p, p.max_p, p.stop_gradient_p, p.sub_p, p.div_p, p.log_p, p.add_p,
    p.broadcast_in_dim_p, p.reshape_p, p.squeeze_p, p.convert_element_type_p, p.select_n_p, p.is_finite_p, p.copy_p,
    p.reduce_precision_p,
))  # fmt: skip
_JOINS = frozenset((p.mul_p, p.div_p, p.select_n_p, p.max_p, p.min_p, p.pow_p, p.clamp_p))


def claim_softmax(graph: Graph) -> None:
    for e in reversed(graph.equations):
        if e.primitive not in (p.div_p, p.sub_p) or not graph.free(e) or len(set(graph.data(e))) != 2:
            continue
        wanted = {p.exp_p, p.reduce_sum_p} | ({p.log_p} if e.primitive is p.sub_p else {p.div_p})
        entry = graph.dominator(graph.derived(e))
        region: list[Equation] = []
        while entry is not None and graph.fact(entry).data:
            wider = graph.between(e, entry)
            seen = {r.primitive for r in wider}
            if not seen <= _SOFTMAX or not graph.sealed(wider, _out(e)):
                break
            if wanted <= seen:
                region = wider
            # the quotient's operands meet at the exponential, or at the shift by the maximum: the logits lie beyond
            above = graph.producer.get(entry)
            shift = above is not None and above.primitive is p.sub_p and len(graph.derived(above)) == 2
            if above is None or (region and not shift):
                break
            entry = graph.dominator(graph.derived(above))
        if region:
            label = "log_softmax" if e.primitive is p.sub_p else "softmax"
            graph.claim(Draft("softmax", label, region, _out(e), e))


def claim_activations(graph: Graph) -> None:
    for node in graph.block.nodes:
        _claim_wrapped(graph, node)
    _claim_joins(graph)


def _claim_wrapped(graph: Graph, node: Equation) -> None:
    if not isinstance(node, Wrapper):
        return
    inside = [e for e in leaves([node]) if e in graph.position]
    made = {v for e in inside for v in e.outputs}
    used = [v for e in inside for v in e.values if v not in made]
    entries = {v for v in used if graph.fact(v).derived}
    exits = [v for v in node.outputs if v in made and (v in graph.results or v in graph.readers)]
    if len(entries) == len(set(exits)) == 1:
        (entry,), exit = entries, exits[0]
        if (
            isinstance(exit, Value)
            and entry.aval.shape == exit.aval.shape
            and graph.fact(entry).data
            and graph.fact(exit).data
            and all(small(v) for v in used if v is not entry)
            and all(not graph.derived(e) or e.primitive in ELEMENTWISE for e in inside)
            and any(_bends(graph, e) for e in inside)
        ):
            region = [e for e in inside if graph.derived(e)]
            if graph.sealed(region, exit):
                graph.claim(Draft("activation", _title(node), region, exit, node))
                return
    for child in node.children:
        _claim_wrapped(graph, child)


def _claim_joins(graph: Graph) -> None:
    """Element-wise paths that part at one value and meet again."""
    lines: dict[Value, tuple[Value, ...]] = {}  # the values that an element-wise path to this one must pass
    joins: list[tuple[Equation, Value]] = []
    for e in graph.equations:
        sources = graph.derived(e)
        if not sources or not graph.free(e) or e.primitive not in ELEMENTWISE:
            continue
        out = _out(e)
        first, *rest = (lines.get(v, (v,)) for v in sources)
        same = all(v.aval.shape == out.aval.shape for v in sources)
        common = tuple(v for v in first if all(v in line for line in rest)) if same else ()
        lines[out] = (*common, out)
        if len(sources) > 1 and common:
            joins.append((e, common[-1]))
    for e, entry in reversed(joins):
        if graph.free(e) and graph.fact(entry).data and graph.fact(_out(e)).data:
            region = graph.between(e, entry)
            if any(_bends(graph, r) for r in region) and graph.sealed(region, _out(e)):
                region, end = _with_copies(graph, region, e)
                graph.claim(Draft("activation", _label(region), region, end, e))


def _with_copies(graph: Graph, region: list[Equation], exit: Equation) -> tuple[list[Equation], Value]:
    """The region and what merely copies or casts its result (the exact gelu ends in a copy)."""
    while (e := graph.reader(_out(exit))) is not None and e.primitive in (p.copy_p, p.convert_element_type_p):
        if not graph.free(e) or not graph.carries(e):
            break
        region, exit = [*region, e], e
    return region, _out(exit)


def _bends(graph: Graph, e: Equation) -> bool:
    """Whether `e` is not linear in what it reads of the data."""
    kind = kind_of(e.primitive)
    several = e.primitive in _JOINS and len(graph.derived(e)) > 1
    return bool(graph.derived(e)) and (kind in ("activation", "max_pool") or several)


def _out(e: Equation) -> Value:
    out = e.outputs[0]
    assert isinstance(out, Value)
    return out


def _title(wrapper: Wrapper) -> str:
    """The function's name: `jax.nn.relu` is a custom_jvp without a name around a jit that has one."""
    name = str(wrapper.params.get("name", ""))
    if name.isidentifier():
        return name
    inner = [c for c in wrapper.children if isinstance(c, Wrapper)]
    return _title(inner[0]) if len(inner) == 1 else "activation"


def _label(region: list[Equation]) -> str:
    """A name for a hand-written activation, for the eye only: rules never look at it."""
    inside = {e.primitive for e in region}
    if p.logistic_p in inside:
        return "silu"
    if p.erf_p in inside or p.erfc_p in inside or (p.tanh_p in inside and p.integer_pow_p in inside):
        return "gelu"
    return str(region[-1].primitive) if len(region) == 1 else "activation"
