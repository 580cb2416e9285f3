"""The nouns: a program flattened into equations, its layers (Ops), and the steps that an interpreter walks.

A `Block` is one jaxpr (the function itself, or a loop's body) with every `jit`, `custom_jvp`, `custom_vjp` and `remat`
opened, so that a layer may be found across such a boundary. Recognition turns it into a `Body` of steps, in which
the wrappers no layer crosses stand closed again.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.extend import core as jex

from . import _compat


class Value:
    """One array of the program, known by identity."""

    __slots__ = ("aval",)

    def __init__(self, aval: Any):
        self.aval = aval


@dataclasses.dataclass(frozen=True, eq=False)
class Constant:
    """A literal written into the program."""

    value: Any
    aval: Any


Atom = Value | Constant


class Fact(NamedTuple):
    """What is known of a value before anything runs.

    data: depends on an explained input through floating-point values, so relevance may arrive here.
    derived: depends on an explained input in any way (comparisons, `stop_gradient` and integers included).
    low, high: bounds of every element.
    marked: the model calls it a gate, by `checkpoint_name(v, "gate")`, or it was computed from such values alone.
    names: key paths of the parameters it was computed from.
    root: a square root was taken on the way (how a BatchNorm's scale is told from any other).
    token: integers that stand for explained ids, so that relevance may arrive where they select something.
    """

    data: bool = False
    derived: bool = False
    low: float = -np.inf
    high: float = np.inf
    marked: bool = False
    names: tuple[str, ...] = ()
    root: bool = False
    token: bool = False

    @property
    def relevant(self) -> bool:
        """Whether relevance may arrive here."""
        return self.data or self.token

    @property
    def nonneg(self) -> bool:
        """No element can be negative."""
        return self.low >= 0

    @property
    def gate(self) -> bool:
        """Every element lies between 0 and 1, to rounding: what it multiplies passes as much of itself."""
        return self.low >= 0 and self.high <= 1 + 1e-6


@dataclasses.dataclass(frozen=True, eq=False)
class Equation:
    """One equation of a jaxpr, evaluated exactly as JAX would."""

    eqn: Any
    jaxpr: Any
    inputs: tuple[Atom, ...]
    outputs: tuple[Value, ...]
    scopes: tuple[object, ...] = ()  # keys of the wrappers around it, outermost first
    bodies: tuple[Block, ...] = ()

    @property
    def primitive(self) -> Any:
        return self.eqn.primitive

    @property
    def params(self) -> dict[str, Any]:
        return self.eqn.params

    @property
    def values(self) -> tuple[Value, ...]:
        return tuple(v for v in self.inputs if isinstance(v, Value))

    @cached_property
    def _single(self) -> tuple[Any, list[int]]:
        slots: dict[Any, int] = {}
        for i, v in enumerate(self.eqn.invars):
            if not isinstance(v, jex.Literal):
                slots.setdefault(v, i)
        single = self.jaxpr.replace(
            constvars=[], invars=list(slots), outvars=list(self.eqn.outvars), eqns=[self.eqn], effects=self.eqn.effects
        )
        return single, list(slots.values())

    def spread(self, inputs: Sequence[Any]) -> list[Any]:
        """These inputs, in a shard_map as values that may differ between devices where the equation's own may."""
        return [_compat.vary(x, _compat.varying(a.aval)) for x, a in zip(inputs, self.inputs, strict=True)]

    def evaluate(self, *inputs: Any) -> list[Any]:
        """The equation on these inputs: a one-equation jaxpr, so that name stacks and call conventions stay JAX's."""
        return self.compute(self.spread(inputs))

    def compute(self, inputs: Sequence[Any]) -> list[Any]:
        """The same, of inputs whose types are as they should be."""
        single, slots = self._single
        return jax.core.eval_jaxpr(single, (), *(inputs[i] for i in slots))


@dataclasses.dataclass(frozen=True, eq=False)
class Wrapper(Equation):
    """A `jit`, `remat`, `custom_jvp` or `custom_vjp` equation together with the nodes of its opened body.

    Its outputs are values of that body (or, rarely, a literal, which nothing reads as a value).
    """

    key: object = None
    children: tuple[Equation, ...] = ()


def leaves(nodes: Sequence[Equation]) -> list[Equation]:
    """The equations of these nodes, wrappers opened."""
    return [e for n in nodes for e in (leaves(n.children) if isinstance(n, Wrapper) else [n])]


@dataclasses.dataclass(frozen=True, eq=False)
class Block:
    """An opened jaxpr: inputs, outputs, constants it closes over, and its nodes in order."""

    inputs: tuple[Value, ...]
    outputs: tuple[Atom, ...]
    constants: dict[Value, Any]
    nodes: list[Equation]

    @cached_property
    def equations(self) -> list[Equation]:
        """The equations that matter for the outputs (or have effects), wrappers opened, in order."""
        needed = {v for v in self.outputs if isinstance(v, Value)}
        live = []
        for e in reversed(leaves(self.nodes)):
            if e.eqn.effects or any(v in needed for v in e.outputs):
                needed.update(e.values)
                live.append(e)
        return live[::-1]


@dataclasses.dataclass(frozen=True, eq=False)
class Linear:
    """How a dense or convolution Op is put together: `after(core(before(x), kernel))`.

    before: preprocessing and reshapes of the data; after: bias, BatchNorm, reshapes.
    scales: (step of `after`, {axis of its value: axis of the kernel}) for each step that multiplies, so that it
    folds into the kernel. shifted: `before` adds something. nonneg: what enters the core is known not to be negative.
    """

    before: tuple[Equation, ...]
    core: Equation
    slot: int  # which operand of the core carries the data
    after: tuple[Equation, ...]
    scales: tuple[tuple[Equation, dict[int, int]], ...]
    shifted: bool = False
    nonneg: bool = False


@dataclasses.dataclass(frozen=True, eq=False)
class Op:
    """One layer as a person would name it: data values in, one value out, and the equations between.

    paths: key paths of the parameters it reads, the kernel's first. first: only structural steps or preprocessing lie
    between it and the explained input. depth, height: dense and conv Ops on the longest path before and after it.
    kinds_after: kinds of the Ops that its output can reach. nonneg, gates, activated: of each input, whether it is
    known not to be negative, to be a gate, to come out of an activation. stopped: a parameter comes from the data, past
    something that lets no relevance through (`stop_gradient`).
    """

    kind: str
    label: str
    inputs: tuple[Value, ...]
    params: tuple[Value, ...]
    output: Value
    steps: tuple[Equation, ...]
    source: str
    paths: tuple[str, ...] = ()
    linear: Linear | None = None
    nonneg: tuple[bool, ...] = ()
    gates: tuple[bool, ...] = ()
    activated: tuple[bool, ...] = ()
    scope: str = ""
    name: str = ""
    first: bool = False
    depth: int = 0
    height: int = 0
    kinds_after: frozenset[str] = frozenset()
    stopped: bool = False

    @property
    def primitive(self) -> str:
        return str((self.linear.core if self.linear else leaves(self.steps)[-1]).primitive)

    @property
    def splits(self) -> bool:
        """Whether what makes the output makes others too."""
        return any(self.output in e.outputs and len(e.outputs) > 1 for e in leaves(self.steps))

    @property
    def in_shapes(self) -> tuple[tuple[int, ...], ...]:
        return tuple(tuple(v.aval.shape) for v in self.inputs)

    @property
    def out_shape(self) -> tuple[int, ...]:
        return tuple(self.output.aval.shape)


@dataclasses.dataclass(frozen=True, eq=False)
class Group:
    """A wrapper that no Op crosses, to be re-applied around the steps of its body."""

    wrapper: Wrapper
    steps: tuple[Any, ...]
    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class Loop:
    """A scan, cond or shard_map that carries data, with its recognised bodies."""

    equation: Equation
    bodies: tuple[Body, ...]
    constants: tuple[int, ...] = ()  # carries that start from a constant: relevance that reaches the start ends there
    replaced: tuple[tuple[int, ...], ...] = ()  # of each body, outputs that are constants where others carry data
    tokens: tuple[tuple[bool, ...], ...] = ()  # which inputs of each body are explained ids
    makes_tokens: tuple[bool, ...] = ()  # which outputs are

    @property
    def ends(self) -> int:
        """At how many constants relevance ends."""
        return len(self.constants) + sum(map(len, self.replaced))


Step = Equation | Op | Group | Loop


@dataclasses.dataclass(frozen=True, eq=False)
class Body:
    """A recognised block. carries: which of its outputs depend on the data, so that relevance may start there."""

    inputs: tuple[Value, ...]
    outputs: tuple[Atom, ...]
    constants: dict[Value, Any]
    steps: tuple[Step, ...]
    carries: tuple[bool, ...] = ()

    def ops(self) -> Iterator[Op]:
        """Every Op, loops' bodies included, in program order."""

        def walk(steps: Sequence[Step]) -> Iterator[Op]:
            for s in steps:
                if isinstance(s, Op):
                    yield s
                elif isinstance(s, Group):
                    yield from walk(s.steps)
                elif isinstance(s, Loop):
                    for b in s.bodies:
                        yield from walk(b.steps)

        return walk(self.steps)
