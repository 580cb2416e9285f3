"""What one equation is on its own, by its primitive and by which of its operands carry data."""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp
from jax.extend.core import primitives as p

from . import _compat
from .graph import Graph
from .kinds import LINEAR_IN, kind_of
from .program import Equation

_EXTREMA = {p.max_p: "maximum", p.min_p: "minimum"}
_ANY_REDUCTION = frozenset((p.reduce_p, p.reduce_window_p))


def classify(graph: Graph, e: Equation) -> tuple[str, str]:
    """The kind and the label of an equation that reads data, and is no part of a larger Op."""
    kind, label, slots = kind_of(e.primitive), str(e.primitive), data_slots(graph, e)
    one = len(slots) == 1
    if not graph.carries(e):
        return "blocked", label
    if in_complex_numbers(graph, e):
        return ("complex" if _scales_parts(e, slots) else "unknown"), label
    if multiplies(e) and one:
        return "scale", "scale"
    if kind in ("dense", "conv"):
        return "matmul", "matmul"  # two data operands, or a kernel that depends on the data
    if e.primitive in _EXTREMA and one:
        return "activation", "relu" if e.primitive is p.max_p else "clip"
    if e.primitive is p.clamp_p:
        return ("activation", "clip") if slots == [1] else ("max_pool", label)
    if e.primitive in _ANY_REDUCTION:
        return ("max_pool" if reducer(e) in _EXTREMA else "unknown"), label
    if e.primitive in _compat.POLYNOMIAL and 0 not in slots:
        return "reduce", label  # linear in its coefficients
    if e.primitive is p.scatter_mul_p and slots == [0]:
        return "reduce", label
    if e.primitive in (p.mul_p, p.div_p) and one:
        inverse = e.primitive is p.div_p and slots == [1]
        return ("activation", "reciprocal") if inverse else ("scale", "scale")
    if kind == "add" and one:
        return "scale", label
    if kind == "activation" and not one or kind == "reduce" and not linear_in(e, slots):
        return "unknown", label
    if e.primitive is _compat.psum_invariant_p:
        label = "psum"
    if kind == "max_pool":
        return kind, "max_pool" if e.primitive is p.reduce_window_max_p else _EXTREMA.get(e.primitive, label)
    return kind, label


def multiplies(e: Equation) -> bool:
    """Whether `e` is an einsum that sums over nothing: it multiplies element by element, as a head mask does."""
    return e.primitive is p.dot_general_p and e.params["dimension_numbers"][0] == ((), ())


def in_complex_numbers(graph: Graph, e: Equation) -> bool:
    """Whether `e` computes with complex numbers that depend on the data, and does not just move them."""
    complexes = (v for v in (*graph.data(e), *e.outputs) if jnp.issubdtype(v.aval.dtype, jnp.complexfloating))
    return kind_of(e.primitive) != "structural" and any(True for _ in complexes)


def data_slots(graph: Graph, e: Equation) -> list[int]:
    """The positions of the operands that carry relevance."""
    data = set(graph.data(e))
    return [i for i, a in enumerate(e.inputs) if a in data]


def linear_in(e: Equation, slots: Sequence[int]) -> bool:
    """Whether `e`, one whose kind says that it is linear, is so in these operands together."""
    if e.primitive is p.linear_solve_p:  # the operands before the last belong to the matrix
        return len(e.outputs) == 1 and list(slots) == [len(e.inputs) - 1]
    return set(slots) <= set(LINEAR_IN.get(e.primitive, slots if len(slots) == 1 else ()))


def reducer(e: Equation) -> object:
    """The primitive that combines two elements in a reduction by the user's function, if it is just one."""
    body = _compat.closed(e.params["jaxpr"]).jaxpr
    single = len(body.eqns) == 1 and len(body.invars) == 2 and body.outvars == body.eqns[0].outvars
    return body.eqns[0].primitive if single and set(body.eqns[0].invars) == set(body.invars) else None


def _scales_parts(e: Equation, slots: list[int]) -> bool:
    """Whether `e`, which has complex numbers in it, grows like a power of them: sums and products, and the modulus."""
    if e.primitive is p.div_p:
        return slots == [0]
    linear = kind_of(e.primitive) in ("complex", "add", "dense", "conv", "avg_pool")
    summed = kind_of(e.primitive) == "reduce" and linear_in(e, slots)
    return linear or summed or e.primitive in (p.neg_p, p.mul_p, p.abs_p)
