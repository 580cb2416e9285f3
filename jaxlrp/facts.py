"""What is known of every value before anything runs: does it carry relevance, can it be negative, whose is it.

A forward pass over the equations says what depends on the explained inputs, a backward pass drops what no relevance
can reach from the outputs; in a scan the facts of the carry are a fixpoint over the body.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import primitives as p

from . import _compat
from .kinds import STRUCTURAL, kind_of
from .program import Atom, Block, Constant, Equation, Fact, Value

Facts = dict[Value, Fact]

# the output is never negative, whatever the input
_NONNEG = frozenset((
    p.exp_p, p.exp2_p, p.logistic_p, p.abs_p, p.square_p, p.sqrt_p, p.rsqrt_p, p.erfc_p, p.iota_p, p.cosh_p, p.acosh_p,
    p.acos_p, p.bessel_i0e_p, p.igamma_p, p.igammac_p, p.regularized_incomplete_beta_p,
))  # fmt: skip
# the output is not negative where every operand is not
_KEEPS_SIGN = STRUCTURAL | {
    p.add_p, p.add_jaxvals_p, p.mul_p, p.div_p, p.min_p, p.integer_pow_p, p.cbrt_p, p.log1p_p, p.expm1_p, p.tanh_p,
    p.erf_p, p.erf_inv_p, p.sinh_p, p.asin_p, p.asinh_p, p.atan_p, p.atanh_p, p.bessel_i1e_p, p.rem_p,
    p.stop_gradient_p, p.floor_p, p.ceil_p, p.round_p, p.sign_p,
    p.reduce_sum_p, p.reduce_prod_p, p.reduce_max_p, p.reduce_min_p, p.cumsum_p, p.cumprod_p, p.cummax_p, p.cummin_p,
    p.reduce_window_max_p, p.reduce_window_min_p, p.reduce_window_sum_p, p.scatter_add_p, p.scatter_mul_p,
    p.scatter_max_p, p.scatter_min_p, p.select_and_scatter_add_p, p.dot_general_p, _compat.RAGGED_DOT,
    p.conv_general_dilated_p,
}  # fmt: skip
# operands whose sign matters, where others are indices, sizes or a predicate
_SIGNED = {
    p.gather_p: (0,), p.dynamic_slice_p: (0,), p.dynamic_update_slice_p: (0, 1), p.rem_p: (0,),
    p.select_and_gather_add_p: (0,), p.select_and_scatter_add_p: (0,), _compat.RAGGED_DOT: (0, 1),
    **dict.fromkeys((p.scatter_p, p.scatter_add_p, p.scatter_mul_p, p.scatter_max_p, p.scatter_min_p), (0, 2)),
}  # fmt: skip
# output i is operand i, moved; the operands beside it may decide where to
_SEPARATE = frozenset((p.sort_p, lax.optimization_barrier_p))
_ROOTS = frozenset((p.sqrt_p, p.rsqrt_p))


def fact_of(facts: Facts, atom: Atom) -> Fact:
    if isinstance(atom, Constant):
        value = np.asarray(atom.value)
        number = np.issubdtype(value.dtype, np.number) or value.dtype == bool
        return Fact(nonneg=bool(number and not np.iscomplexobj(value) and (value >= 0).all()))
    return facts[atom]


def join(facts: Iterable[Fact]) -> Fact:
    """What holds for a value that may be any of several."""
    some = list(facts)
    return Fact(
        data=any(f.data for f in some),
        derived=any(f.derived for f in some),
        nonneg=all(f.nonneg for f in some),
        names=tuple(dict.fromkeys(n for f in some for n in f.names)),
        root=any(f.root for f in some),
    )


def infer(block: Block, facts: Facts) -> list[Fact]:
    """Adds the facts of every value in `block` (those of its inputs are there); returns those of its outputs."""
    for value in block.constants:
        facts[value] = Fact()
    for e in block.equations:
        inputs = [fact_of(facts, a) for a in e.inputs]
        if e.primitive is p.scan_p:
            outputs = _scan(e, inputs, facts)
        elif e.primitive is p.cond_p:
            outputs = _cond(e, inputs, facts)
        elif e.primitive in _SEPARATE:
            outputs = [_simple(e, [f]) for f in inputs]
            if e.primitive is p.sort_p and any(f.derived for f in inputs):
                outputs = [f._replace(derived=True, names=()) for f in outputs]
        else:
            outputs = [_simple(e, inputs)] * len(e.outputs)
        for value, fact in zip(e.outputs, outputs, strict=True):
            inexact = jnp.issubdtype(value.aval.dtype, jnp.inexact)
            facts[value] = fact._replace(data=fact.data and inexact)
    return [fact_of(facts, a) for a in block.outputs]


def prune(block: Block, facts: Facts, wanted: Iterable[Atom]) -> set[Value]:
    """Takes `data` from what no relevance arriving at `wanted` can reach; returns what it can.

    The block's inputs keep it, so that what blocks relevance is seen even where nothing lies before it.
    """
    reached = {a for a in wanted if isinstance(a, Value) and facts[a].data}
    for e in reversed(block.equations):
        arrives = [v in reached for v in e.outputs]
        if not any(arrives):
            continue
        if e.primitive is p.scan_p:
            reads = _scan_reads(e, arrives, facts)
        elif e.primitive is p.cond_p:
            chosen = [_reads(b, facts, arrives) for b in e.bodies]
            reads = [False, *map(any, zip(*chosen, strict=True))]
        else:
            reads = arrives if e.primitive in _SEPARATE else [True] * len(e.inputs)
        found = zip(e.inputs, reads, strict=True)
        reached |= {a for a, read in found if read and isinstance(a, Value) and facts[a].data}
    for v in (v for e in block.equations for v in e.outputs):
        if v not in reached:
            facts[v] = facts[v]._replace(data=False)
    return reached


def _reads(body: Block, facts: Facts, arrives: Sequence[bool]) -> list[bool]:
    """Which inputs of a loop's body relevance reaches, if it arrives at these outputs."""
    reached = prune(body, facts, [a for a, here in zip(body.outputs, arrives, strict=True) if here])
    facts.update({v: facts[v]._replace(data=v in reached) for v in body.inputs})
    return [v in reached for v in body.inputs]


def _scan_reads(e: Equation, arrives: list[bool], facts: Facts) -> list[bool]:
    consts, carries = _compat.scan_arity(e.params)
    (body,) = e.bodies
    known = dict(facts)
    while True:
        trial = dict(known)
        reads = _reads(body, trial, arrives)
        grown = [a or r for a, r in zip(arrives[:carries], reads[consts:], strict=False)] + arrives[carries:]
        if grown == arrives:
            facts.update(trial)
            return reads
        arrives = grown


def _simple(e: Equation, inputs: list[Fact]) -> Fact:
    both = join(inputs)
    # a value that depends on the data is nobody's parameter
    names = () if both.derived else both.names
    data = both.data and kind_of(e.primitive) != "blocked"
    return Fact(data, both.derived, _nonneg(e, inputs), names, both.root or e.primitive in _ROOTS)


def _nonneg(e: Equation, inputs: list[Fact]) -> bool:
    prim = e.primitive
    if any(jnp.issubdtype(v.aval.dtype, jnp.complexfloating) for v in e.outputs):
        return False
    if prim in _NONNEG or e.outputs and e.outputs[0].aval.dtype == bool:
        return True
    if prim is p.max_p:
        return any(f.nonneg for f in inputs)
    if prim is p.clamp_p:  # clamp(low, x, high)
        return inputs[0].nonneg and inputs[2].nonneg
    if prim is p.integer_pow_p and e.params["y"] % 2 == 0:
        return True
    if prim is p.mul_p and e.inputs[0] is e.inputs[1]:
        return True
    if prim is p.select_n_p:
        return all(f.nonneg for f in inputs[1:])
    if prim is p.gather_p and (e.params["fill_value"] or 0) < 0:
        return False
    signed = [inputs[i] for i in _SIGNED.get(prim, range(len(inputs)))]
    return prim in _KEEPS_SIGN and all(f.nonneg for f in signed)


def _scan(e: Equation, inputs: list[Fact], facts: Facts) -> list[Fact]:
    consts, carries = _compat.scan_arity(e.params)
    carry = inputs[consts : consts + carries]
    (body,) = e.bodies
    while True:
        for value, fact in zip(body.inputs, [*inputs[:consts], *carry, *inputs[consts + carries :]], strict=True):
            facts[value] = fact
        outputs = infer(body, facts)
        grown = [join(pair) for pair in zip(carry, outputs[:carries], strict=True)]
        if grown == carry:
            return outputs
        carry = grown


def _cond(e: Equation, inputs: list[Fact], facts: Facts) -> list[Fact]:
    index, operands = inputs[0], inputs[1:]
    branches = []
    for body in e.bodies:
        facts.update(zip(body.inputs, operands, strict=True))
        branches.append(infer(body, facts))
    joined = [join(fs) for fs in zip(*branches, strict=True)]
    return [f._replace(derived=True, names=()) if index.derived else f for f in joined]
