"""The public verbs: rewrite, lrp, value_and_lrp, plan, logits."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .assign import Gradient, Plan, assign
from .composites import Composite
from .errors import InputError, TargetError
from .facts import infer
from .interpret import Interpreter
from .places import place
from .program import Body, Op
from .recognise import recognise
from .trace import Traced, trace

Target = Any  # None | int | integer array | callable


def _analyse(
    fun: Callable, args: tuple, kwargs: dict[str, Any], argnums: int | Sequence[int] | None
) -> tuple[Traced, Body]:
    if not callable(fun):
        raise InputError(f"the first argument must be a function, got {fun!r}")
    traced = trace(fun, args, kwargs, argnums)
    facts = dict(traced.facts)
    infer(traced.block, facts)
    body = recognise(traced.block, facts)
    return traced, place(body, [traced.block.inputs[i] for i in traced.explained])


def _plain(ops: Sequence[Op], rules: Sequence[Any]) -> frozenset[int]:
    """Ops that need no custom derivative: what moves values, what blocks, and what the gradient was asked for."""
    kinds = ("structural", "blocked")
    return frozenset(
        i for i, (op, r) in enumerate(zip(ops, rules, strict=True)) if op.kind in kinds or type(r) is Gradient
    )


def rewrite(
    fun: Callable, composite: Composite, argnums: int | Sequence[int] = 0, *, on_unknown: str = "error"
) -> Callable:
    """A function like `fun`, with the same outputs, whose VJP propagates relevance instead of gradients.

    Args:
      fun: any JAX function. Arguments that are not arrays stay Python values, as under `jax.grad`.
      composite: which rule each layer gets.
      argnums: the explained positional argument, or several; floating point, any pytree.
      on_unknown: "error", or "gradient" to let the plain derivative through primitives that have no kind.

    Relevance of an output is pulled back by `y, pull = jax.vjp(rewrite(f, c), x); (R,) = pull(y)`. The cotangent of
    every other argument is zero. Rules compute in float32 or wider; relevance has the input's dtype.

    Raises (when called): InputError, NoRuleError, SelectorError, UnknownPrimitiveError.
    """

    @functools.wraps(fun, updated=())
    def rewritten(*args: Any, **kwargs: Any) -> Any:
        traced, body = _analyse(fun, args, kwargs, argnums)
        ops = list(body.ops())
        rules, _ = assign(ops, composite, on_unknown)
        plain = _plain(ops, rules)
        run = Interpreter(body, plain)
        outputs = run({i: r for i, r in enumerate(rules) if i not in plain}, *traced.arrays)
        return jax.tree.unflatten(traced.out_tree, outputs)

    return rewritten


def value_and_lrp(
    fun: Callable,
    composite: Composite,
    argnums: int | Sequence[int] = 0,
    target: Target = None,
    *,
    on_unknown: str = "error",
) -> Callable:
    """A function of `fun`'s arguments that returns (fun's output, relevance of the explained argument(s)).

    Args: as `rewrite`, and
      target: where relevance starts. None: every output with its own value. An int, or an integer array with one class
        per example: that logit's value (last axis; output (C,) or (N, C)). A callable: start relevance from the output,
        a pytree like it. A traced index out of range gives zero relevance.

    Returns relevance shaped like the explained argument, in its dtype; a tuple of them if `argnums` is a sequence.

    Raises: as `rewrite`; TargetError for a target out of range or of the wrong shape; InputError for NaN parameters
    (where they are concrete).
    """

    @functools.wraps(fun, updated=())
    def explained(*args: Any, **kwargs: Any) -> Any:
        traced, body = _analyse(fun, args, kwargs, argnums)
        _check_nan(traced, args, kwargs)
        ops = list(body.ops())
        rules, _ = assign(ops, composite, on_unknown)
        plain = _plain(ops, rules)
        run = Interpreter(body, plain)
        own = {i: r for i, r in enumerate(rules) if i not in plain}

        def forward(*xs: Any) -> Any:
            arrays = list(traced.arrays)
            for i, x in zip(traced.explained, xs, strict=True):
                arrays[i] = x
            return jax.tree.unflatten(traced.out_tree, run(own, *arrays))

        value, pull = jax.vjp(forward, *(jnp.asarray(traced.arrays[i]) for i in traced.explained))
        return value, jax.tree.unflatten(traced.explained_tree, pull(start(value, target)))

    return explained


def lrp(
    fun: Callable,
    composite: Composite,
    argnums: int | Sequence[int] = 0,
    target: Target = None,
    *,
    on_unknown: str = "error",
) -> Callable:
    """A function of `fun`'s arguments that returns the relevance of the explained argument(s): see `value_and_lrp`."""
    both = value_and_lrp(fun, composite, argnums, target, on_unknown=on_unknown)

    @functools.wraps(fun, updated=())
    def explained(*args: Any, **kwargs: Any) -> Any:
        return both(*args, **kwargs)[1]

    return explained


def plan(
    fun: Callable, composite: Composite, argnums: int | Sequence[int] = 0, *, on_unknown: str = "error"
) -> Callable:
    """A function of `fun`'s arguments (arrays, or `jax.ShapeDtypeStruct`s) that returns the `Plan`; nothing is run."""

    @functools.wraps(fun, updated=())
    def planned(*args: Any, **kwargs: Any) -> Plan:
        _, body = _analyse(fun, args, kwargs, argnums)
        return assign(list(body.ops()), composite, on_unknown)[1]

    return planned


def logits(fun: Callable) -> Callable:
    """`fun` up to its final softmax or log_softmax: a function of the same arguments that returns what enters it.

    `fun` must have one array as output; where it ends in neither, its output is returned as it is.

    Raises (when called) InputError for a function of several outputs.
    """

    @functools.wraps(fun, updated=())
    def before_softmax(*args: Any, **kwargs: Any) -> jax.Array:
        traced, body = _analyse(fun, args, kwargs, None)
        if len(body.outputs) != 1:
            raise InputError(f"logits({fun!r}): the function must have one array as output, it has {len(body.outputs)}")
        ops = list(body.ops())
        ends = [op.inputs[0] for op in ops if op.kind == "softmax" and op.output is body.outputs[0]]
        if ends:
            body = dataclasses.replace(body, outputs=(ends[0],))
        return Interpreter(body, frozenset(range(len(ops))))({}, *traced.arrays)[0]

    return before_softmax


def start(value: Any, target: Target) -> Any:
    """The start relevance for an output: a pytree like it."""
    if target is None:
        return jax.tree.map(_own_value, value)
    if callable(target):
        return _called(value, target)
    return jax.tree.map(lambda y: y * _chosen(y, target), _single(value, target))


def _own_value(y: jax.Array) -> Any:
    return y if jnp.issubdtype(y.dtype, jnp.inexact) else np.zeros(y.shape, jax.dtypes.float0)


def _single(value: Any, target: Target) -> jax.Array:
    leaves = jax.tree.leaves(value)
    if len(leaves) != 1 or leaves[0].ndim not in (1, 2):
        shapes = [y.shape for y in leaves]
        raise TargetError(
            f"target={target!r} needs one output of shape (classes,) or (examples, classes), got {shapes}; for "
            f"any other output pass a callable: target=lambda y: start relevance like y"
        )
    return value


def _chosen(y: jax.Array, target: Target) -> jax.Array:
    """One-hot mask of the chosen logits, checked where the target is concrete."""
    traced = isinstance(target, jax.core.Tracer)
    index = target if traced else np.asarray(target)
    classes, batch = y.shape[-1], y.shape[:-1]
    if not jnp.issubdtype(index.dtype, jnp.integer) or isinstance(target, bool):
        raise TargetError(f"target={target!r} must be None, an integer, an integer array or a callable")
    if index.ndim > 1 or (index.ndim == 1 and index.shape != batch):
        raise TargetError(
            f"target of shape {index.shape} does not fit an output of shape {y.shape}: write one integer, or "
            f"{'one per example, shape ' + str(batch) if batch else 'a scalar, for the output has no examples axis'}"
        )
    if not traced:
        wrong = (index < 0) | (index >= classes)
        if wrong.any():
            bad = index[wrong].ravel()[0]
            raise TargetError(f"target {bad} is out of range: the output has {classes} classes, 0 to {classes - 1}")
    return jax.nn.one_hot(index, classes, dtype=y.dtype)


def _called(value: Any, target: Callable) -> Any:
    begun = target(value)
    trees = [jax.tree.structure(tree) for tree in (begun, value)]
    if trees[:1] != trees[1:]:
        raise TargetError(f"the target's start relevance has the structure {trees[0]}, the output {trees[1]}")

    def fit(r: Any, y: jax.Array) -> Any:
        if not jnp.issubdtype(y.dtype, jnp.inexact):
            return _own_value(y)
        if jnp.shape(r) != y.shape:
            raise TargetError(f"the target's start relevance has shape {jnp.shape(r)}, the output {y.shape}")
        return jnp.asarray(r, y.dtype)

    return jax.tree.map(fit, begun, value)


def _check_nan(traced: Traced, args: tuple, kwargs: dict[str, Any]) -> None:
    """Raises InputError naming the first parameter with a NaN, among those that are concrete."""
    for i, (value, array) in enumerate(zip(traced.block.inputs, traced.arrays, strict=True)):
        if i not in traced.explained and _has_nan(array):
            raise InputError(f"parameter {traced.facts[value].names[0]!r} of shape {array.shape} contains NaN")
    for array in traced.block.constants.values():
        if _has_nan(array):
            raise InputError(f"an array of shape {array.shape} that the function closes over contains NaN")


def _has_nan(array: Any) -> bool:
    if isinstance(array, jax.core.Tracer) or not jnp.issubdtype(jnp.result_type(array), jnp.inexact):
        return False
    with jax.ensure_compile_time_eval():
        return bool(jnp.isnan(jnp.asarray(array)).any())
