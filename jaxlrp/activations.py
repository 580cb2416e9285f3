"""Activations: layers that take several element-wise equations and come back together (silu, gelu, softplus ...).

They are found by data flow: a wrapper whose body is element-wise (`jax.nn.softplus` is jitted), element-wise paths that
part at one value and meet again (x * sigmoid(x)), or a chain that bends more than once (1 / (1 + exp(-x))); of
candidates that overlap the largest is taken.
"""

from __future__ import annotations

from collections.abc import Iterator

from jax.extend.core import primitives as p

from .graph import Draft, Graph, small
from .kinds import ELEMENTWISE, kind_of
from .program import Atom, Equation, Value, Wrapper, leaves

_JOINS = frozenset((p.mul_p, p.div_p, p.select_n_p, p.max_p, p.min_p, p.pow_p, p.clamp_p))
_SHIFTS = frozenset((p.add_p, p.sub_p))
_COPIES = frozenset((p.copy_p, p.convert_element_type_p, p.reduce_precision_p))

Candidate = tuple[str, list[Equation], Equation, Equation]  # label, region, its last equation, who is to blame


def claim_activations(graph: Graph) -> None:
    wrapped = [c for node in graph.block.nodes for c in _wrapped(graph, node)]
    whole = {e for c in wrapped for e in c[1]}  # what is an activation in its own right
    candidates = [*wrapped, *_joined(graph, whole), *_chained(graph, whole)]
    for label, region, exit, blamed in sorted(candidates, key=_size, reverse=True):
        if graph.sealed(region, exit.outputs[0]):
            region, end = _with_copies(graph, region, exit)
            graph.claim(Draft("activation", label, region, end, blamed))


def _size(candidate: Candidate) -> int:
    return len(candidate[1])


def _wrapped(graph: Graph, node: Equation) -> Iterator[Candidate]:
    """Wrappers with an element-wise body: one value of the data in, one of the same shape out, no array parameters."""
    if not isinstance(node, Wrapper):
        return
    inside = [e for e in leaves([node]) if e in graph.position]
    made = {v for e in inside for v in e.outputs}
    used = [v for e in inside for v in e.values if v not in made]
    entries = {v for v in used if graph.fact(v).derived}
    exits = {v for v in node.outputs if v in made and (v in graph.results or v in graph.readers)}
    if len(entries) == len(exits) == 1:
        (entry,), (exit,) = entries, exits
        if (
            entry.aval.shape == exit.aval.shape
            and graph.fact(entry).data
            and graph.fact(exit).data
            and all(small(v) for v in used if v is not entry)
            and all(not graph.derived(e) or e.primitive in ELEMENTWISE for e in inside)
            and any(_bends(graph, e) for e in inside)
            and not (_shifts(graph, inside) and sum(_bends(graph, e) for e in inside) == 1)  # tanh(2 - x): two layers
        ):
            yield _title(node), [e for e in inside if graph.derived(e)], graph.producer[exit], node
            return
    for child in node.children:
        yield from _wrapped(graph, child)


def _joined(graph: Graph, whole: set[Equation]) -> Iterator[Candidate]:
    """Element-wise paths that part at one value and meet again.

    A sum at the end may as well be a residual's: it counts only where no summand holds a whole activation. Parameters
    that are arrays may be slopes (PReLU) but no shifts (a BatchNorm between).
    """
    lines: dict[Value, tuple[Value, ...]] = {}  # the values that an element-wise path to this one must pass
    for e in graph.equations:
        sources = graph.derived(e)
        if not sources or not graph.free(e) or e.primitive not in ELEMENTWISE:
            continue
        out = e.outputs[0]
        first, *rest = (lines.get(v, (v,)) for v in sources)
        same = all(v.aval.shape == out.aval.shape for v in sources)
        common = tuple(v for v in first if all(v in line for line in rest)) if same else ()
        lines[out] = (*common, out)
        if len(sources) > 1 and common and graph.fact(common[-1]).data and graph.fact(out).data:
            region = graph.between(e, common[-1])
            sums = e.primitive in _SHIFTS and any(r in whole for r in region)
            shifts = any(not all(map(small, _others(graph, r))) for r in _shifts(graph, region))
            if not sums and not shifts and any(_bends(graph, r) for r in region):
                yield _label(region), region, e, e


def _shifts(graph: Graph, region: list[Equation]) -> list[Equation]:
    """The sums and differences of data with something that is none."""
    return [r for r in region if r.primitive in _SHIFTS and len(graph.derived(r)) == 1]


def _others(graph: Graph, e: Equation) -> list[Atom]:
    """The operands of `e` that do not depend on the data."""
    return [a for a in e.inputs if not graph.fact(a).derived]


def _chained(graph: Graph, whole: set[Equation]) -> Iterator[Candidate]:
    """Element-wise steps in a row, each read once, with literals only: they bend, are scaled or shifted, bend again.

    Two bends next to each other are two activations, but for the maximum and minimum of a clip.
    """
    seen: set[Equation] = set()
    for e in graph.equations:
        if e in seen or e in whole or not _links(graph, e):
            continue
        chain = [e]
        while (follower := graph.reader(chain[-1].outputs[0])) is not None and _links(graph, follower):
            clip = {chain[-1].primitive, follower.primitive} <= {p.max_p, p.min_p}
            if follower in whole or (_bends(graph, follower) and _bends(graph, chain[-1]) and not clip):
                break
            chain.append(follower)
        seen.update(chain)
        while chain and not _bends(graph, chain[-1]):
            chain.pop()
        if sum(_bends(graph, link) for link in chain) > 1:
            yield _label(chain), chain, chain[-1], chain[-1]


def _links(graph: Graph, e: Equation) -> bool:
    """Whether `e` is element-wise in one value of the data, with nothing but literals beside it."""
    one = graph.free(e) and graph.carries(e) and len(graph.derived(e)) == 1 and e.primitive in ELEMENTWISE
    same = one and graph.derived(e)[0].aval.shape == e.outputs[0].aval.shape
    return same and all(small(a) and not graph.fact(a).names for a in _others(graph, e))


def _with_copies(graph: Graph, region: list[Equation], exit: Equation) -> tuple[list[Equation], Value]:
    """The region and what merely copies or casts its result (the exact gelu ends in a copy)."""
    while (e := graph.reader(exit.outputs[0])) is not None and e.primitive in _COPIES:
        if not graph.free(e) or not graph.carries(e):
            break
        region, exit = [*region, e], e
    return region, exit.outputs[0]


def _bends(graph: Graph, e: Equation) -> bool:
    """Whether `e` is not linear in what it reads of the data."""
    derived = graph.derived(e)
    if e.primitive in _JOINS and len(derived) > 1:
        return True
    inverse = e.primitive is p.div_p and e.inputs[0] not in derived
    return bool(derived) and (inverse or kind_of(e.primitive) in ("activation", "max_pool"))


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
