"""Traced call -> Body, and what is kept of it for the next call."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any, Generic, TypeVar

from jax.extend.core import primitives as p

from ._compat import varying
from .errors import InputError
from .facts import infer, loses_tokens, prune
from .interpret import around
from .places import place
from .program import Body, leaves
from .recognise import recognise
from .source import source_of
from .trace import Traced, trace

T = TypeVar("T")


class Memory(Generic[T]):
    """What was made of the programs of one function: made once where `Traced.repeats` knows a program again.

    What a program closes over stays alive with what is made of it, so there is only room for the latest few programs,
    and of calls that differ in the arrays closed over alone only for the latest.
    """

    ROOM = 8

    def __init__(self) -> None:
        self._made: dict[Hashable, tuple[list[Any], T]] = {}

    def of(self, traced: Traced, make: Callable[[Traced], T]) -> T:
        key, constants = traced.repeats, list(traced.jaxpr.consts)
        if key is None:
            return make(traced)
        known, made = self._made.pop(key, ([], None))
        if made is None or list(map(id, known)) != list(map(id, constants)):
            made = make(traced)
        self._made[key] = constants, made
        while len(self._made) > self.ROOM:
            self._made.pop(next(iter(self._made)), None)
        return made


def analyse(
    fun: Callable, args: tuple, kwargs: dict[str, Any], argnums: int | Sequence[int] | None, **options: bool
) -> tuple[Traced, Body]:
    """options: `tokens` and `custom` of `trace`."""
    traced = trace(fun, args, kwargs, argnums, **options)
    return traced, recognised(traced)


def recognised(traced: Traced) -> Body:
    """The program as Ops."""
    facts = dict(traced.facts)
    infer(traced.block, facts)
    lost = [e for e in traced.block.equations if loses_tokens(e, facts)]
    reached = prune(traced.block, facts, traced.block.outputs)
    ids = {traced.block.inputs[i]: t for i, t in zip(traced.explained, traced.titles, strict=True)}
    ids = {value: title for value, title in ids.items() if facts[value].token}
    if not traced.everything and ids and reached.isdisjoint(ids):
        value, title = next(iter(ids.items()))
        where = f"; what is made of them ends in {lost[-1].primitive} ({source_of(lost[-1].eqn)})" if lost else ""
        raise InputError(
            f"the explained argument {title} has dtype {value.aval.dtype} and selects nothing that relevance reaches: "
            f"integers are explained as ids that index an embedding{where}; relevance of other numbers needs a "
            f"floating-point input, write .astype(jnp.float32)"
        )
    body = recognise(traced.block, facts)
    _check_devices(body)
    return place(body, [traced.block.inputs[i] for i in traced.explained])


def _check_devices(body: Body) -> None:
    """Raises InputError at a sum or maximum over devices whose shard_map, or vmap, is around all of this.

    Each of them would start with relevance of its own for what they all share, unless types keep track of that.
    """
    loops = around(body)
    for op in body.ops():
        bound = {a for loop in loops[op] for a in loop.equation.params.get("newly_manual_axes", ())}
        for e in leaves(op.steps) if op.kind != "blocked" else ():
            if e.primitive in (p.psum_p, p.pmax_p, p.pmin_p):
                named = {a for a in e.params["axes"] if not isinstance(a, int)}
                if named - bound - varying(e.inputs[0].aval):
                    raise InputError(
                        f"{e.primitive} over {', '.join(map(str, named))} ({op.source}): its devices lie around the "
                        f"explanation, and each would count the relevance of what they share; write lrp(shard_map(f)) "
                        f"(or vmap for shard_map), or shard_map(lrp(f), check_vma=True)"
                    )
