"""Who makes and who reads each value of a block, which equations are claimed by which Op, and dominators."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable, Iterator
from typing import Any

import jax
import numpy as np

from . import _compat
from .facts import Facts, fact_of
from .program import Atom, Block, Constant, Equation, Fact, Linear, Value, Wrapper


@dataclasses.dataclass(eq=False)
class Draft:
    """An Op while it is being put together."""

    kind: str
    label: str
    equations: list[Equation]
    output: Value
    main: Equation
    linear: Linear | None = None
    shared: list[Equation] = dataclasses.field(default_factory=list)  # evaluated by the Op, and left to others as well


class Graph:
    """A block's equations with their data flow; recognition claims them, each once."""

    def __init__(self, block: Block, facts: Facts):
        self.block = block
        self.facts = facts
        self.equations = block.equations
        self.position = {e: i for i, e in enumerate(self.equations)}
        self.producer: dict[Value, Equation] = {}
        self.readers: dict[Value, list[Equation]] = {}
        self._literals: set[Equation] = set()
        for e in self.equations:
            for v in dict.fromkeys(e.values):
                self.readers.setdefault(v, []).append(e)
            if not e.eqn.effects and all(self.producer.get(v) in self._literals for v in e.values):
                self._literals.add(e)
            for v in e.outputs:
                self.producer[v] = e
        self._roots = {*block.inputs, *block.constants}
        self.results = {v for v in block.outputs if isinstance(v, Value)}
        self.wrappers = dict(_wrappers(block.nodes))
        self.claims: dict[Equation, Draft] = {}
        self._parents: dict[Value, tuple[Value | None, int]] | None = None

    def fact(self, atom: Atom) -> Fact:
        return fact_of(self.facts, atom)

    def data(self, e: Equation) -> list[Value]:
        """Operands of `e` that carry relevance, in order, repeats included."""
        return [v for v in e.inputs if isinstance(v, Value) and self.facts[v].data]

    def tokens(self, e: Equation) -> list[Value]:
        """Operands of `e` that are ids to be explained."""
        return [v for v in e.inputs if isinstance(v, Value) and self.facts[v].token]

    def derived(self, e: Equation) -> list[Value]:
        """Operands of `e` that depend on the explained input in any way."""
        return [v for v in e.inputs if isinstance(v, Value) and self.facts[v].derived]

    def carries(self, e: Equation) -> bool:
        """Whether relevance passes through `e`."""
        return bool(self.data(e)) and any(self.fact(v).data for v in e.outputs)

    def relevant(self, e: Equation) -> bool:
        """Whether relevance, or ids that it will arrive at, pass through `e`."""
        return bool(self.data(e) or self.tokens(e)) and any(self.fact(v).relevant for v in e.outputs)

    def known(self, value: Value) -> bool:
        """Whether anything computes `value`: what only dead code reads is not computed."""
        return value in self.producer or value in self._roots

    def literal(self, e: Equation) -> bool:
        """Whether nothing but literals goes into `e`: no input, no constant, no effect."""
        return e in self._literals

    def literal_value(self, value: Value) -> np.ndarray:
        """What equations of literals alone compute."""
        wanted, steps = {value}, []
        for e in reversed(self.equations):
            if any(v in wanted for v in e.outputs):
                wanted.update(e.values)
                steps.append(e)
        env: dict[Atom, Any] = {}
        with jax.ensure_compile_time_eval():
            for e in reversed(steps):
                values = [a.value if isinstance(a, Constant) else env[a] for a in e.inputs]
                results = values if e.primitive is _compat.pvary_p else e.compute(values)  # on no device
                env.update(zip(e.outputs, results, strict=True))
        return np.asarray(env[value])

    def free(self, e: Equation) -> bool:
        return e not in self.claims

    def reader(self, value: Value) -> Equation | None:
        """The one equation that reads `value`, if there is just one and it is no result of the block."""
        readers = self.readers.get(value, [])
        return readers[0] if len(readers) == 1 and value not in self.results else None

    def claim(self, draft: Draft) -> Draft:
        draft.equations.sort(key=self.position.__getitem__)
        for e in draft.equations:
            self.claims[e] = draft
        return draft

    def between(self, exit: Equation, entry: Value) -> list[Equation]:
        """The equations on paths from `entry` to `exit`: everything derived that `exit` needs, back to `entry`."""
        found, todo = {exit}, [exit]
        while todo:
            for v in self.derived(todo.pop()):
                e = self.producer.get(v)
                if v is not entry and e is not None and e not in found:
                    found.add(e)
                    todo.append(e)
        return sorted(found, key=self.position.__getitem__)

    def sealed(self, region: Iterable[Equation], exit: Value, open: Collection[Value] = ()) -> bool:
        """Whether the region is free and none of its values but `exit`, and those `open`, is read outside it."""
        inside = set(region)
        return all(
            self.free(e) and all(v is exit or v in open or not self.read_outside(v, inside) for v in e.outputs)
            for e in inside
        )

    def read_outside(self, value: Value, region: Collection[Equation]) -> bool:
        return value in self.results or any(r not in region for r in self.readers.get(value, []))

    def needed(self, region: Iterable[Equation], values: Iterable[Value]) -> list[Equation]:
        """Those equations of the region that compute `values`, in order."""
        wanted, found = set(values), []
        for e in sorted(region, key=self.position.__getitem__, reverse=True):
            if any(v in wanted for v in e.outputs):
                wanted.update(e.values)
                found.append(e)
        return found[::-1]

    def dominator(self, values: list[Value]) -> Value | None:
        """The nearest value that every path from the explained inputs to any of `values` passes."""
        parents = self._dominators()
        node: Value | None = values[0]
        for other in values[1:]:
            rival: Value | None = other
            while node is not rival:
                if node is None or rival is None:
                    return None
                if parents[node][1] >= parents[rival][1]:
                    node = parents[node][0]
                else:
                    rival = parents[rival][0]
        return node

    def _dominators(self) -> dict[Value, tuple[Value | None, int]]:
        if self._parents is None:
            self._parents = {v: (None, 0) for v in self.block.inputs if self.facts[v].derived}
            for e in self.equations:
                sources = self.derived(e)
                if sources:
                    parent = self.dominator(sources)
                    level = 0 if parent is None else self._parents[parent][1] + 1
                    for v in e.outputs:
                        self._parents[v] = (parent, level)
        return self._parents


def _wrappers(nodes: Iterable[Equation]) -> Iterator[tuple[object, Wrapper]]:
    for n in nodes:
        if isinstance(n, Wrapper):
            yield n.key, n
            yield from _wrappers(n.children)


def small(atom: Atom) -> bool:
    """A literal or a scalar: no parameter that a person would name."""
    return isinstance(atom, Constant) or atom.aval.size == 1
