"""Where each Op stands in the whole program: its name, its depth, and whether it is the first.

An Op is first if every path from it back to the explained input is structural or preprocessing. Its depth and height
count the dense and conv Ops on the longest path before and after it; a loop's body counts once.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence

from jax.extend.core import primitives as p

from . import _compat
from .program import Atom, Body, Group, Loop, Op, Step, Value

_NAMED = ("dense", "conv", "scale", "batch_norm", "embedding")
_WEIGHTED = ("dense", "conv")
_RAW = ("structural", "scale", "batch_norm", "resize", "blocked")

Before = tuple[bool, int]  # only structural steps so far; depth
After = tuple[int, frozenset[str]]  # height; kinds that can be reached


def place(body: Body, explained: Sequence[Value]) -> Body:
    """The same body with every Op's `name`, `first`, `depth`, `height` and `kinds_after`."""
    places = _Places()
    places.forward(body, {v: (v in explained, 0) for v in body.inputs})
    places.backward(body, {})
    return places.apply(body)


class _Places:
    def __init__(self) -> None:
        self.before: dict[Op, Before] = {}
        self.after: dict[Op, After] = {}
        self.names: Counter[str] = Counter()
        self.positions: Counter[str] = Counter()

    def forward(self, body: Body, env: dict[Atom, Before]) -> list[Before]:
        """What holds at the body's outputs. Values that carry nothing are absent: raw, depth 0."""
        for s in _flat(body.steps):
            if isinstance(s, Op):
                raw, depth = _meet([env[v] for v in s.inputs if v in env])
                self.before[s] = (raw, depth)
                for v in _outputs(s):
                    env[v] = (raw and s.kind in _RAW, depth + (s.kind in _WEIGHTED))
            elif isinstance(s, Loop):
                inputs = [env.get(a, (True, 0)) for a in s.equation.inputs]
                env.update(zip(s.equation.outputs, self._loop_forward(s, inputs), strict=True))
        return [env.get(a, (True, 0)) for a in body.outputs]

    def _loop_forward(self, loop: Loop, inputs: list[Before]) -> list[Before]:
        e = loop.equation
        if e.primitive is p.cond_p:
            results = [self.forward(b, dict(zip(b.inputs, inputs[1:], strict=True))) for b in loop.bodies]
            return [_meet(pair) for pair in zip(*results, strict=True)]
        if e.primitive is _compat.shard_map_p:
            return self.forward(loop.bodies[0], dict(zip(loop.bodies[0].inputs, inputs, strict=True)))
        consts, carries = _compat.scan_arity(e.params)
        (body,) = loop.bodies
        while True:
            outputs = self.forward(body, dict(zip(body.inputs, inputs, strict=True)))
            carry = inputs[consts : consts + carries]
            # a carry is raw only while it stays raw; its depth counts the body once
            kept = [(old[0] and new[0], old[1]) for old, new in zip(carry, outputs[:carries], strict=True)]
            if kept == carry:
                return outputs
            inputs = [*inputs[:consts], *kept, *inputs[consts + carries :]]

    def backward(self, body: Body, env: dict[Value, After]) -> None:
        """`env` holds what is known of the values that are read further on, and grows with those read here."""

        def note(v: Value, after: After) -> None:
            old = env.get(v, (0, frozenset()))
            env[v] = (max(old[0], after[0]), old[1] | after[1])

        for s in reversed(_flat(body.steps)):
            if isinstance(s, Op):
                known = [env[v] for v in _outputs(s) if v in env]
                height = max((h for h, _ in known), default=0)
                kinds = frozenset().union(*(k for _, k in known))
                self.after[s] = (height, kinds)
                for v in s.inputs:
                    note(v, (height + (s.kind in _WEIGHTED), kinds | {s.kind}))
            elif isinstance(s, Loop):
                outer = s.equation.inputs[1:] if s.equation.primitive is p.cond_p else s.equation.inputs
                for b in s.bodies:
                    inner: dict[Value, After] = {}
                    for a, result in zip(b.outputs, s.equation.outputs, strict=True):
                        if isinstance(a, Value):
                            inner[a] = env.get(result, (0, frozenset()))
                    self.backward(b, inner)
                    for read, v in zip(outer, b.inputs, strict=True):
                        if isinstance(read, Value) and v in inner:
                            note(read, inner[v])

    def apply(self, body: Body) -> Body:
        return dataclasses.replace(body, steps=tuple(self._placed(s) for s in body.steps))

    def _placed(self, s: Step) -> Step:
        if isinstance(s, Group):
            return dataclasses.replace(s, steps=tuple(self._placed(t) for t in s.steps))
        if isinstance(s, Loop):
            return dataclasses.replace(s, bodies=tuple(self.apply(b) for b in s.bodies))
        if not isinstance(s, Op):
            return s
        (first, depth), (height, kinds) = self.before[s], self.after[s]
        return dataclasses.replace(s, name=self._name(s), first=first, depth=depth, height=height, kinds_after=kinds)

    def _name(self, op: Op) -> str:
        if op.kind in _NAMED and op.paths:
            name = op.paths[0].rpartition("/")[0] or op.paths[0]
        elif op.kind in _WEIGHTED:
            # parameters were closed over: the name stack if the model leaves one, else the position
            # but for what JAX itself writes there: the transformations, and an einsum's formula
            scope = "/".join(s for s in op.scope.split("/") if not s.endswith("()") and "->" not in s)
            name = scope or f"{op.kind}[{self.positions[op.kind]}]"
            self.positions[op.kind] += 1
        else:
            name = op.label
        self.names[name] += 1
        return name if self.names[name] == 1 else f"{name}#{self.names[name]}"


def _outputs(op: Op) -> list[Value]:
    """The Op's output; of a structural primitive with several, all."""
    return [op.output, *(v for e in op.steps for v in e.outputs if isinstance(v, Value) and v is not op.output)]


def _meet(states: Sequence[Before]) -> Before:
    return all(raw for raw, _ in states), max((d for _, d in states), default=0)


def _flat(steps: Sequence[Step]) -> list[Step]:
    return [t for s in steps for t in (_flat(s.steps) if isinstance(s, Group) else [s])]
