"""Body x rules -> function: evaluates the program with every Op replaced by a `jax.custom_vjp`.

The forward pass of an Op is its own equations, the backward pass its rule: the cotangent is the relevance. Loops and
wrappers are applied again by JAX's public functions around their interpreted bodies, so JAX's own reverse mode carries
relevance through them. Nothing here knows LRP.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import primitives as p

from . import _compat
from .program import Atom, Body, Constant, Equation, Group, Loop, Op, Step
from .rules import Layer, Rule

Env = dict[Atom, Any]
Rules = dict[int, Rule]  # by the Op's position in `Body.ops()`


class Interpreter:
    """Runs one body with any rules, as often as wanted.

    plain: positions of Ops to be evaluated as they stand, with JAX's own derivative.
    """

    def __init__(self, body: Body, plain: frozenset[int]):
        self.body = body
        self._index = {op: i for i, op in enumerate(body.ops())}
        self._plain = plain
        self._jitted: dict[Group, Any] = {}

    def __call__(self, rules: Rules, *inputs: Any) -> list[Any]:
        return self._run_body(self.body, rules, inputs)

    def _run_body(self, body: Body, rules: Rules, inputs: Sequence[Any]) -> list[Any]:
        env: Env = dict(zip((*body.constants, *body.inputs), (*body.constants.values(), *inputs), strict=True))
        self._run(body.steps, rules, env)
        return [_read(env, a) for a in body.outputs]

    def _run(self, steps: Sequence[Step], rules: Rules, env: Env) -> None:
        for s in steps:
            if isinstance(s, Op):
                if self._index[s] in self._plain:
                    self._run(s.steps, rules, env)
                else:
                    rule = rules[self._index[s]]
                    env[s.output] = apply(s, rule, [env[v] for v in s.inputs], [env[v] for v in s.params])
            elif isinstance(s, Group):
                env.update(zip(s.outputs, self._group(s, rules, [env[v] for v in s.inputs]), strict=True))
            elif isinstance(s, Loop):
                outputs = self._loop(s, rules, [_read(env, a) for a in s.equation.inputs])
                env.update(zip(s.equation.outputs, outputs, strict=True))
            else:
                outputs = s.evaluate(*(_read(env, a) for a in s.inputs))
                env.update(zip(s.outputs, outputs, strict=True))

    def _group(self, group: Group, rules: Rules, inputs: list[Any]) -> Sequence[Any]:
        """A `jit` or `remat` again around its steps; one function per group, so that JAX finds it compiled."""
        own = {i: rules[i] for op, i in self._index.items() if i in rules and op in self._inside(group)}
        if group not in self._jitted:

            def call(rules: Rules, inputs: list[Any]) -> list[Any]:
                env: Env = dict(zip(group.inputs, inputs, strict=True))
                self._run(group.steps, rules, env)
                return [env[v] for v in group.outputs]

            params = group.wrapper.params
            if group.wrapper.primitive is p.remat_p:
                self._jitted[group] = jax.checkpoint(call, prevent_cse=params["prevent_cse"], policy=params["policy"])
            else:
                call.__name__ = str(params["name"])
                self._jitted[group] = jax.jit(call)
        return self._jitted[group](own, inputs)

    def _inside(self, group: Group) -> set[Op]:
        return set(Body((), (), {}, group.steps).ops())

    def _loop(self, loop: Loop, rules: Rules, inputs: list[Any]) -> Sequence[Any]:
        e = loop.equation
        if e.primitive is p.cond_p:
            branches = [lambda *xs, body=body: tuple(self._run_body(body, rules, xs)) for body in loop.bodies]
            return lax.switch(inputs[0], branches, *inputs[1:])
        consts, carries = _compat.scan_arity(e.params)
        (body,) = loop.bodies

        def step(carry: tuple[Any, ...], xs: tuple[Any, ...]) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
            outputs = self._run_body(body, rules, [*inputs[:consts], *carry, *xs])
            return tuple(outputs[:carries]), tuple(outputs[carries:])

        carry, ys = lax.scan(
            step,
            tuple(inputs[consts : consts + carries]),
            tuple(inputs[consts + carries :]),
            length=e.params["length"],
            reverse=e.params["reverse"],
            unroll=e.params["unroll"],
        )
        return (*carry, *ys)


def apply(op: Op, rule: Rule, inputs: list[Any], params: list[Any]) -> Any:
    """The Op's value, with the rule as its derivative with respect to the inputs."""

    def evaluate(rule: Rule, inputs: list[Any], params: list[Any]) -> Any:
        env: Env = dict(zip((*op.inputs, *op.params), (*inputs, *params), strict=True))
        for e in op.steps:
            env.update(zip(e.outputs, e.evaluate(*(_read(env, a) for a in e.inputs)), strict=True))
        return env[op.output]

    def forward(rule: Rule, inputs: list[Any], params: list[Any]) -> tuple[Any, Any]:
        output = evaluate(rule, inputs, params)
        kept = (inputs, params, output)
        return output, (rule, [k if n in rule.uses else None for n, k in zip(_KEPT, kept, strict=True)])

    def backward(saved: Any, relevance: jax.Array) -> tuple[None, list[Any], None]:
        rule, (inputs, params, output) = saved
        layer = Layer(op, inputs, params, output)
        received = rule.propagate(layer, relevance.astype(layer.dtype))
        dtypes = [v.aval.dtype for v in op.inputs]
        return None, [jnp.asarray(r).astype(d) for r, d in zip(received, dtypes, strict=True)], None

    function = jax.custom_vjp(evaluate)
    function.defvjp(forward, backward)
    return function(rule, inputs, params)


_KEPT = ("inputs", "params", "output")


def _read(env: Env, atom: Atom) -> Any:
    return atom.value if isinstance(atom, Constant) else env[atom]


__all__ = ["Interpreter", "Equation"]
