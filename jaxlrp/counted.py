"""A while loop whose length depends on constants alone is a scan that does not say so.

What decides when it ends is sliced out of its condition and its body and run once; relevance passes the scan of that
length, which a while loop, of unknown length, would not let through.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
from jax import lax
from jax.extend import core as jex

from . import _compat


def as_scan(eqn: Any, operands: Sequence[Any]) -> Any | None:
    """The `while` equation as a closed jaxpr of one scan, or None if its length is not known.

    operands: the value of each operand of the equation where it is a constant, else None. In a shard_map, outside which
    its body may mean nothing, a loop stays as it is.
    """
    if any(_compat.varying(v.aval) for v in eqn.invars):
        return None
    cond, body = (_compat.closed(eqn.params[k]) for k in ("cond_jaxpr", "body_jaxpr"))
    before, consts = _compat.while_arity(eqn.params)
    shared, init = operands[before : before + consts], operands[before + consts :]
    asked = _reads(cond.jaxpr, cond.jaxpr.outvars)
    deciding = {i - before for i in asked if i >= before}
    while True:
        read = _reads(body.jaxpr, [body.jaxpr.outvars[i] for i in sorted(deciding)])
        grown = deciding | {i - consts for i in read if i >= consts}
        if grown == deciding:
            break
        deciding = grown
    needed = [init[i] for i in deciding] + [operands[i] for i in asked if i < before]
    needed += [shared[i] for i in read if i < consts]
    if eqn.effects or any(value is None for value in needed):
        return None

    order = sorted(deciding)

    def run(closed: Any, outvars: Sequence[Any], fixed: Sequence[Any], state: Sequence[Any]) -> list[Any]:
        """Some outputs of a jaxpr, from its constants and the deciding part of the state."""
        inputs = [*fixed, *(state[order.index(i)] if i in deciding else None for i in range(len(init)))]
        chosen = _reads(closed.jaxpr, outvars)
        part = closed.jaxpr.replace(
            invars=[closed.jaxpr.invars[i] for i in chosen], outvars=list(outvars), eqns=_slice(closed.jaxpr, outvars)
        )
        return jax.core.eval_jaxpr(part, closed.consts, *(inputs[i] for i in chosen))

    after = [body.jaxpr.outvars[i] for i in order]
    with jax.ensure_compile_time_eval():
        length, _ = lax.while_loop(
            lambda c: run(cond, cond.jaxpr.outvars, operands[:before], c[1])[0],
            lambda c: (c[0] + 1, run(body, after, shared, c[1])),
            (0, [init[i] for i in order]),
        )
    if isinstance(length, jax.core.Tracer):
        return None

    def scanned(*values: Any) -> Any:
        def step(carry: Any, _: None) -> tuple[Any, None]:
            return jax.core.eval_jaxpr(body.jaxpr, body.consts, *values[before : before + consts], *carry), None

        return lax.scan(step, list(values[before + consts :]), None, length=int(length))[0]

    avals = [v.aval for v in eqn.invars]
    shapes = [jax.ShapeDtypeStruct(a.shape, a.dtype, weak_type=a.weak_type) for a in avals]
    jaxpr = _compat.closed(jax.make_jaxpr(scanned)(*shapes))
    eqns = [e.replace(source_info=eqn.source_info) for e in jaxpr.jaxpr.eqns]
    return jex.ClosedJaxpr(jaxpr.jaxpr.replace(eqns=eqns), jaxpr.consts)


def _slice(jaxpr: Any, outvars: Sequence[Any]) -> list[Any]:
    """The equations that these outputs depend on, in order."""
    wanted, eqns = {v for v in outvars if not isinstance(v, jex.Literal)}, []
    for e in reversed(jaxpr.eqns):
        if any(v in wanted for v in e.outvars):
            wanted.update(v for v in e.invars if not isinstance(v, jex.Literal))
            eqns.append(e)
    return eqns[::-1]


def _reads(jaxpr: Any, outvars: Sequence[Any]) -> list[int]:
    """Which inputs of the jaxpr these outputs depend on."""
    read = {v for e in _slice(jaxpr, outvars) for v in e.invars if not isinstance(v, jex.Literal)}
    read |= {v for v in outvars if not isinstance(v, jex.Literal)}
    return [i for i, v in enumerate(jaxpr.invars) if v in read]
