"""Body x rules -> function: evaluates the program with every Op replaced by a `jax.custom_vjp`.

The forward pass of an Op is its own equations, some in the form of `rules.passes`, so that the value of a compiled
program may differ by rounding; the backward pass is its rule: the cotangent is the relevance. Loops and wrappers are
applied again by JAX's public functions around their interpreted bodies, so JAX's own reverse mode carries relevance
through them. Nothing here knows LRP.

A probe is a dummy input of an Op whose cotangent is a report of what the rule saw; under scan there is one per
iteration. A mask multiplies the relevance that arrives at an Op's output. Both cost nothing where none is given.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import primitives as p
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from . import _compat
from .errors import InputError
from .program import Atom, Body, Constant, Equation, Group, Loop, Op, Step, Value
from .rules import Layer, Rule, passes, summed
from .tokens import Token, evaluate, plain, tokenise

Env = dict[Atom, Any]
# what a probe's cotangent is: report(layer, rule, relevance that arrived, relevance passed on to each input)
Report = Callable[[Layer, Rule, jax.Array, Sequence[jax.Array]], Any]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Settings:
    """What each Op gets, by its position in `Body.ops()`: its rule, and perhaps a probe and a mask."""

    rules: dict[int, Rule]
    probes: dict[int, Any] = dataclasses.field(default_factory=dict)
    masks: dict[int, Any] = dataclasses.field(default_factory=dict)

    def of(self, chosen: Sequence[int]) -> Settings:
        """The part for these Ops."""
        parts = ({i: d[i] for i in chosen if i in d} for d in (self.rules, self.probes, self.masks))
        return Settings(*parts)


class Interpreter:
    """Runs one body with any settings, as often as wanted. An Op without a rule keeps JAX's own derivative.

    total: under `shard_map` all devices' reports are added up in one probe, instead of one probe for each device.
    rectified: the Ops at which no relevance arrives where their output is not positive, whatever the settings.
    """

    def __init__(
        self,
        body: Body,
        report: Report | None = None,
        total: bool = False,
        rectified: frozenset[Op] = frozenset(),
    ):
        self.body, self._total, self._rectified = body, total, rectified
        self._index: dict[Op | Loop, int] = {op: i for i, op in enumerate(body.ops())}
        self._index |= {loop: -1 - k for k, loop in enumerate(loops(body))}
        self._report = report
        self._jitted: dict[Group, Any] = {}

    def __call__(self, settings: Settings, *inputs: Any) -> list[Any]:
        return list(map(plain, self._run_body(self.body, settings, inputs)))

    def _run_body(self, body: Body, settings: Settings, inputs: Sequence[Any]) -> list[Any]:
        env: Env = dict(zip((*body.constants, *body.inputs), (*body.constants.values(), *inputs), strict=True))
        self._run(body.steps, settings, env)
        return [_read(env, a) for a in body.outputs]

    def _run(self, steps: Sequence[Step], settings: Settings, env: Env) -> None:
        for s in steps:
            if isinstance(s, Op):
                self._op(s, settings, env)
            elif isinstance(s, Group):
                outputs = self._group(s, settings, [env[v] for v in s.inputs])
                env.update(zip(s.outputs, outputs, strict=True))
            elif isinstance(s, Loop):
                outputs = self._loop(s, settings, [_read(env, a) for a in s.equation.inputs])
                env.update(zip(s.equation.outputs, outputs, strict=True))
            else:
                _evaluate(s, env)

    def _op(self, op: Op, settings: Settings, env: Env) -> None:
        i = self._index[op]
        if i not in settings.rules:
            for e in op.steps:
                _evaluate(e, env, stop=op.kind == "blocked")
            return
        embeds = op.kind == "embedding"
        inputs = [tokenise(env[v], embeds) for v in op.inputs]
        params = [plain(env[v]) for v in op.params]
        probe, mask = settings.probes.get(i), settings.masks.get(i)
        env[op.output] = apply(op, settings.rules[i], inputs, params, probe, mask, self._report, op in self._rectified)

    def _group(self, group: Group, settings: Settings, inputs: list[Any]) -> Sequence[Any]:
        """A `jit` or `remat` again around its steps; one function per group, so that JAX finds it compiled."""
        if group not in self._jitted:

            def call(settings: Settings, inputs: list[Any]) -> list[Any]:
                env: Env = dict(zip(group.inputs, inputs, strict=True))
                self._run(group.steps, settings, env)
                return [env[v] for v in group.outputs]

            params = group.wrapper.params
            if group.wrapper.primitive is p.remat_p:
                call = jax.checkpoint(call, prevent_cse=params["prevent_cse"], policy=params["policy"])
            else:
                call.__name__ = str(params["name"])
                call = jax.jit(call)
            self._jitted[group] = call, self._within(Body((), (), {}, group.steps))
        function, own = self._jitted[group]
        return function(settings.of(own), inputs)

    def _end(self, loop: Loop, k: int, ends: Any, outputs: list[Any]) -> list[Any]:
        """The outputs of body k, those that replace data by a constant with the probe that sees what ends there."""
        if ends is not None:
            first = len(loop.constants) + sum(map(len, loop.replaced[:k]))
            for i, j in enumerate(loop.replaced[k]):
                outputs[j] = _ending(outputs[j], ends[first + i])
        return outputs

    def _within(self, body: Body) -> list[int]:
        """The positions of the Ops and loops in a body."""
        return [self._index[s] for s in around(body)]

    def _loop(self, loop: Loop, settings: Settings, inputs: list[Any]) -> Sequence[Any]:
        e, ends = loop.equation, settings.probes.get(self._index[loop])
        if e.primitive is p.cond_p:

            def branch(k: int, *xs: Any) -> tuple[Any, ...]:
                outputs = self._run_body(loop.bodies[k], settings, list(map(tokenise, xs, loop.tokens[k])))
                return tuple(map(tokenise, self._end(loop, k, ends, outputs), loop.makes_tokens))

            branches = [partial(branch, k) for k in range(len(loop.bodies))]
            return lax.switch(plain(inputs[0]), branches, *inputs[1:])
        if e.primitive is _compat.shard_map_p:
            return self._shard(loop, settings, list(map(tokenise, inputs, loop.tokens[0])))
        consts, carries = _compat.scan_arity(e.params)
        (body,), (tokens,) = loop.bodies, loop.tokens
        inputs = list(map(tokenise, inputs, tokens))
        if ends is not None:
            for j, c in enumerate(loop.constants):
                inputs[consts + c] = _ending(inputs[consts + c], ends[j])
        probes = settings.of(self._within(body)).probes

        def step(carry: tuple[Any, ...], xs: Any) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
            probes, xs = xs
            inner = dataclasses.replace(settings, probes=probes)
            outputs = self._end(loop, 0, ends, self._run_body(body, inner, [*inputs[:consts], *carry, *xs]))
            kept = map(tokenise, outputs[:carries], tokens[consts : consts + carries])
            return tuple(kept), tuple(outputs[carries:])

        carry, ys = lax.scan(
            step,
            tuple(inputs[consts : consts + carries]),
            (probes, tuple(inputs[consts + carries :])),
            length=e.params["length"],
            reverse=e.params["reverse"],
            unroll=e.params["unroll"],
        )
        return (*carry, *ys)

    def _shard(self, loop: Loop, settings: Settings, inputs: list[Any]) -> Sequence[Any]:
        """A `shard_map` again around its body. Rules are the same on all devices; so are masks without their axes."""
        e, (body,) = loop.equation, loop.bodies
        axes = {self._index[s]: tuple(device_counts(loop, s)) for s in around(body)}
        ranks = {self._index[op]: len(op.out_shape) for op in body.ops()}
        own = settings.of(list(axes))
        probes = {i: P() if self._total else P(*axes[i]) for i in own.probes}
        masks = {i: P(*axes[i]) if jnp.ndim(m) > ranks[i] else P() for i, m in own.masks.items()}

        def call(own: Settings, *xs: Any) -> tuple[Any, ...]:
            here = [jax.tree.map(_own, d, specs) for d, specs in ((own.probes, probes), (own.masks, masks))]
            return tuple(map(tokenise, self._run_body(body, Settings(own.rules, *here), xs), loop.makes_tokens))

        specs: Any = Settings(P(), probes, masks)  # type: ignore[arg-type]
        mesh, check_vma = e.params["mesh"], e.params["check_vma"]
        for op in body.ops():
            rule = own.rules.get(self._index[op])
            if rule is not None and not (rule.linear or check_vma):
                raise InputError(
                    f"{type(rule).__name__} at {op.name} ({op.source}): with check_vma=False a device may hold a part "
                    f"of the relevance, whose sign says nothing; write shard_map(..., check_vma=True)"
                )
        if AxisType.Explicit in mesh.axis_types:  # where an array lies is part of its type, and must be as mapped
            own = jax.reshard(own, jax.tree.map(partial(NamedSharding, mesh), specs))
        mapped = jax.shard_map(
            call,
            mesh=mesh,
            in_specs=(specs, *e.params["in_specs"]),
            out_specs=e.params["out_specs"],
            axis_names=e.params["newly_manual_axes"],
            check_vma=check_vma,
        )
        return mapped(own, *inputs)


def _own(array: Any, spec: P) -> Any:
    """A device's part of an array that has the devices as leading axes."""
    return jnp.reshape(array, jnp.shape(array)[len(spec) :]) if len(spec) else array


@jax.custom_vjp
def _ending(value: jax.Array, probe: jax.Array) -> jax.Array:
    """A constant at which relevance ends; the probe's cotangent is how much."""
    return value


def _ended(_: None, r: jax.Array) -> tuple[None, jax.Array]:
    return None, _compat.over_devices(summed(r).astype(jnp.float32))


_ending.defvjp(lambda value, probe: (value, None), _ended)


def loops(body: Body) -> list[Loop]:
    """Every loop, those inside loops included, in program order."""
    return [s for s in around(body) if isinstance(s, Loop)]


def around(body: Body) -> dict[Op | Loop, tuple[Loop, ...]]:
    """The loops around each Op and loop, outermost first."""
    found: dict[Op | Loop, tuple[Loop, ...]] = {}

    def walk(steps: Sequence[Step], outer: tuple[Loop, ...]) -> None:
        for s in steps:
            if isinstance(s, (Op, Loop)):
                found[s] = outer
            if isinstance(s, Group):
                walk(s.steps, outer)
            elif isinstance(s, Loop):
                for b in s.bodies:
                    walk(b.steps, (*outer, s))

    walk(body.steps, ())
    return found


def lead(body: Body, total: bool = False) -> dict[Op | Loop, tuple[int, ...]]:
    """The leading axes of the probe of each Op and loop: the lengths of the scans around it, the numbers of devices.

    total: as in `Interpreter`, so that there is no axis for devices.
    """

    def sizes(step: Op | Loop, loop: Loop) -> list[int]:
        if loop.equation.primitive is p.scan_p:
            return [loop.equation.params["length"]]
        return [] if total else [*device_counts(loop, step).values()]

    return {s: tuple(n for loop in outer for n in sizes(s, loop)) for s, outer in around(body).items()}


def device_counts(loop: Loop, step: Op | Loop) -> dict[Any, int]:
    """The mesh axes along which an Op's output differs in a shard_map, and their sizes; all where types do not tell."""
    params = loop.equation.params
    if loop.equation.primitive is not _compat.shard_map_p or not isinstance(step, Op):
        return {}
    own = params["newly_manual_axes"]
    known = _compat.varying(step.output.aval) if params["check_vma"] else own
    return {a: n for a, n in params["mesh"].shape.items() if a in own & known}


def apply(
    op: Op,
    rule: Rule,
    inputs: list[Any],
    params: list[Any],
    probe: Any,
    mask: Any,
    report: Report | None,
    rectified: bool = False,
) -> Any:
    """The Op's value, with the rule as its derivative with respect to the inputs."""

    def evaluate(rule: Rule, inputs: list[Any], params: list[Any], probe: Any, mask: Any) -> Any:
        env: Env = dict(zip((*op.inputs, *op.params), (*map(plain, inputs), *params), strict=True))
        for e in op.steps:
            if (written := passes.written(e)) is not None:
                env[e.outputs[0]] = written(*(_read(env, a) for a in e.inputs))
            else:
                _evaluate(e, env)
        return env[op.output]

    probed = probe is not None

    def forward(rule: Rule, inputs: list[Any], params: list[Any], probe: Any, mask: Any) -> tuple[Any, Any]:
        output = evaluate(rule, inputs, params, probe, mask)
        uses = _KEPT if probed else rule.needs(op)
        kept = [k if n in uses else None for n, k in zip(_KEPT, (inputs, params, output), strict=True)]
        return output, (rule, kept, mask)

    def backward(saved: Any, relevance: jax.Array) -> tuple[None, list[Any], None, Any, None]:
        rule, (inputs, params, output), mask = saved
        layer = Layer(op, inputs and list(map(plain, inputs)), params, output, probed, rectified, relevance)
        rule = jax.tree.map(lambda n: layer._cast(n) if hasattr(n, "dtype") else n, rule)
        relevance = layer._cast(relevance)
        if mask is not None:
            relevance = relevance * jnp.asarray(mask, layer.dtype)
        received = _checked(op, rule, rule.propagate(layer, relevance))
        row = report(layer, rule, relevance, received) if probed and report is not None else None
        sent = [_sent(r, v) for r, v in zip(received, op.inputs, strict=True)]
        return None, sent, None, row, None

    function = jax.custom_vjp(evaluate)
    function.defvjp(forward, backward)
    return function(rule, inputs, params, probe, mask)


def _checked(op: Op, rule: Rule, received: Any) -> Sequence[jax.Array]:
    """What a rule returned, if it is one array for each data input."""
    several = isinstance(received, (tuple, list))
    shapes = tuple(getattr(r, "shape", None) for r in received) if several else None
    if shapes != op.in_shapes:
        found = f"arrays of shapes {shapes}" if several else f"a {type(received).__name__}"
        raise InputError(
            f"{type(rule).__name__} at {op.name} ({op.kind}, {op.source}): propagate must return a tuple with one "
            f"array for each data input, of shapes {op.in_shapes}; it returned {found}"
        )
    return received


def _sent(received: jax.Array, value: Any) -> Any:
    """Relevance as the cotangent of an Op's input: at ids, of their carrier."""
    received = _compat.alike(received, _compat.varying(value.aval))  # what devices send to what they share adds up
    if jnp.issubdtype(value.aval.dtype, jnp.inexact):
        return jnp.asarray(received).astype(value.aval.dtype)
    return Token(None, jnp.asarray(received).astype(float))


_KEPT = ("inputs", "params", "output")


def _evaluate(e: Equation, env: Env, stop: bool = False) -> None:
    """stop: let no derivative through, not even to the equation: JAX has none of a maximum over devices."""
    values = [_read(env, a) for a in e.inputs]
    if stop or e.primitive in (p.pmax_p, p.pmin_p):
        values = [lax.stop_gradient(v) if isinstance(a, Value) else v for a, v in zip(e.inputs, values, strict=True)]
    outputs = evaluate(e, values) if any(isinstance(v, Token) for v in values) else e.evaluate(*values)
    env.update(zip(e.outputs, outputs, strict=True))


def _read(env: Env, atom: Atom) -> Any:
    return atom.value if isinstance(atom, Constant) else env[atom]


__all__ = ["Equation", "Interpreter", "Settings", "apply", "lead"]
