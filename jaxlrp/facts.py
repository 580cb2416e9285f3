"""What is known of every value before anything runs: does it carry relevance, what are its bounds, whose is it.

A forward pass over the equations says what depends on the explained inputs, a backward pass drops what no relevance
can reach from the outputs; in a scan the facts of the carry are a fixpoint over the body.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import primitives as p

from . import _compat, ranges
from .kinds import STRUCTURAL, kind_of
from .program import Atom, Block, Constant, Equation, Fact, Value
from .tokens import compares_with_all, embeds, joins, makes_token

Facts = dict[Value, Fact]

# output i is operand i, moved; the operands beside it may decide where to
_SEPARATE = frozenset((p.sort_p, lax.optimization_barrier_p))
_ROOTS = frozenset((p.sqrt_p, p.rsqrt_p))


def fact_of(facts: Facts, atom: Atom) -> Fact:
    if isinstance(atom, Constant):
        low, high = ranges.of_constant(np.asarray(atom.value))
        return Fact(low=low, high=high)
    return facts[atom]


def join(facts: Iterable[Fact]) -> Fact:
    """What holds for a value that may be any of several."""
    some = list(facts)
    low, high = ranges.hull((f.low, f.high) for f in some) if some else ranges.ANY
    derived = [f for f in some if f.derived]
    return Fact(
        data=any(f.data for f in some),
        derived=bool(derived),
        low=low,
        high=high,
        marked=bool(derived) and all(f.marked for f in derived),
        names=tuple(dict.fromkeys(n for f in some for n in f.names)),
        root=any(f.root for f in some),
        token=any(f.token for f in some),
    )


def infer(block: Block, facts: Facts) -> list[Fact]:
    """Adds the facts of every value in `block` (those of its inputs are there); returns those of its outputs."""
    for value in block.constants:
        facts[value] = Fact()
    counts: set[Value] = set()  # 0, 1, 2 ... along an axis
    maker: dict[Value, Equation] = {}
    for e in block.equations:
        maker.update(dict.fromkeys(e.outputs, e))
        inputs = [fact_of(facts, a) for a in e.inputs]
        tokens = [f.token for f in inputs]
        if e.primitive is p.scan_p:
            outputs = _scan(e, inputs, facts)
        elif e.primitive is p.cond_p:
            outputs = _cond(e, inputs, facts)
        elif e.primitive is _compat.shard_map_p:
            facts.update(zip(e.bodies[0].inputs, inputs, strict=True))
            outputs = infer(e.bodies[0], facts)
        elif e.primitive in _SEPARATE:
            outputs = [_simple(e, [f], maker) for f in inputs]
            if e.primitive is p.sort_p and any(f.derived for f in inputs):
                outputs = [f._replace(derived=True, names=()) for f in outputs]
        else:
            fact = _simple(e, inputs, maker)
            if e.primitive is p.iota_p or (e.primitive in STRUCTURAL and any(a in counts for a in e.inputs)):
                counts.update(e.outputs)
            token = makes_token(e, tokens) or compares_with_all(e, tokens, counts)
            data = fact.data or embeds(e, tokens)
            outputs = [fact._replace(data=data, token=token)] * len(e.outputs)
        for value, fact in zip(e.outputs, outputs, strict=True):
            inexact = jnp.issubdtype(value.aval.dtype, jnp.inexact)
            facts[value] = fact._replace(data=fact.data and inexact)
    return [fact_of(facts, a) for a in block.outputs]


def loses_tokens(e: Equation, facts: Facts) -> bool:
    """Whether `e` reads explained ids and gives nothing through which relevance would find them."""
    return any(fact_of(facts, a).token for a in e.inputs) and not any(facts[v].relevant for v in e.outputs)


def joins_constants(block: Block, facts: Facts) -> bool:
    """Whether constant ids are put among the explained ones, in the block or in a loop's body."""
    return any(
        joins(e, [fact_of(facts, a).token for a in e.inputs]) or any(joins_constants(b, facts) for b in e.bodies)
        for e in block.equations
    )


def prune(block: Block, facts: Facts, wanted: Iterable[Atom]) -> set[Value]:
    """Takes `data` from what no relevance arriving at `wanted` can reach; returns what it can.

    The block's inputs keep it, so that what blocks relevance is seen even where nothing lies before it.
    """
    reached = {a for a in wanted if isinstance(a, Value) and facts[a].relevant}
    for e in reversed(block.equations):
        arrives = [v in reached for v in e.outputs]
        if not any(arrives):
            continue
        if e.primitive is p.scan_p:
            reads = _scan_reads(e, arrives, facts)
        elif e.primitive is p.cond_p:
            chosen = [_reads(b, facts, arrives) for b in e.bodies]
            reads = [False, *map(any, zip(*chosen, strict=True))]
        elif e.primitive is _compat.shard_map_p:
            reads = _reads(e.bodies[0], facts, arrives)
        else:
            reads = arrives if e.primitive in _SEPARATE else [True] * len(e.inputs)
        found = zip(e.inputs, reads, strict=True)
        reached |= {a for a, read in found if read and isinstance(a, Value) and facts[a].relevant}
    for v in (v for e in block.equations for v in e.outputs):
        facts[v] = _kept(facts[v], v in reached)
    return reached


def _reads(body: Block, facts: Facts, arrives: Sequence[bool]) -> list[bool]:
    """Which inputs of a loop's body relevance reaches, if it arrives at these outputs."""
    reached = prune(body, facts, [a for a, here in zip(body.outputs, arrives, strict=True) if here])
    facts.update({v: _kept(facts[v], v in reached) for v in body.inputs})
    return [v in reached for v in body.inputs]


def _kept(fact: Fact, reached: bool) -> Fact:
    return fact._replace(data=fact.data and reached, token=fact.token and reached)


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


def _simple(e: Equation, inputs: list[Fact], maker: dict[Value, Equation]) -> Fact:
    both, (low, high) = join(inputs), ranges.bounds(e, [(f.low, f.high) for f in inputs], maker)
    if low == high and e.outputs[0].aval.dtype == bool:
        return Fact(low=low, high=high)  # a comparison that bounds decide is a constant
    # a value that depends on the data is nobody's parameter
    names = () if both.derived else both.names
    data = both.data and kind_of(e.primitive) != "blocked"
    marked = both.marked or (e.primitive is p.name_p and e.params["name"] == "gate")
    # that of a number is no variance's: embeddings are multiplied, scores divided by sqrt(d)
    root = e.primitive in _ROOTS and bool(e.outputs[0].aval.shape)
    return Fact(data, both.derived, low, high, marked, names, both.root or root)


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
        carry = [_widened(old, new) for old, new in zip(carry, grown, strict=True)]


def _widened(old: Fact, new: Fact) -> Fact:
    low, high = ranges.widen((old.low, old.high), (new.low, new.high))
    return new._replace(low=low, high=high)


def _cond(e: Equation, inputs: list[Fact], facts: Facts) -> list[Fact]:
    index, operands = inputs[0], inputs[1:]
    branches = []
    for body in e.bodies:
        facts.update(zip(body.inputs, operands, strict=True))
        branches.append(infer(body, facts))
    joined = [join(fs) for fs in zip(*branches, strict=True)]
    return [f._replace(derived=True, names=()) if index.derived else f for f in joined]
