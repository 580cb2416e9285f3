"""The public verbs: rewrite, lrp, value_and_lrp, plan, logits."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Collection, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ._compat import vary, varying
from .analysis import Memory, analyse, recognised
from .assign import Plan, assign, is_end
from .composites import Composite
from .errors import InputError, SelectorError, TargetError
from .interpret import Interpreter, Settings, around, device_counts, lead
from .program import Atom, Body, Constant, Op, leaves
from .rules import Gradient, Layer, Rule, broadcasts, passes
from .select import Selector
from .silence import rectified
from .tokens import carrier_of, carrying
from .trace import Traced, trace

Target = Any  # None | int | integer array | callable


def chosen_rules(ops: Sequence[Op], rules: Sequence[Rule], watched: Collection[int] = ()) -> dict[int, Rule]:
    """The rules of the Ops that need a custom derivative, or are watched.

    What moves values, what blocks, and what the gradient was asked for is left to JAX, but for layers whose passes may
    be written faster.
    """

    def left(op: Op, rule: Rule) -> bool:
        faster = op.linear is not None or any(map(passes.windowed, leaves(op.steps)))
        return op.kind in ("structural", "blocked") or (type(rule) is Gradient and not faster)

    return {i: r for i, (op, r) in enumerate(zip(ops, rules, strict=True)) if i in watched or not left(op, r)}


def _arrived(layer: Layer, rule: Rule, relevance: jax.Array, received: Sequence[jax.Array]) -> jax.Array:
    """What `layers` reports; of complex numbers, the relevance of either part as a part (see `rules.by_parts`)."""
    return jnp.conj(relevance).astype(layer.op.output.aval.dtype)


def rewrite(
    fun: Callable, composite: Composite, argnums: int | Sequence[int] = 0, *, on_unknown: str = "error"
) -> Callable:
    """A function like `fun`, with the same outputs, whose VJP propagates relevance instead of gradients.

    Compiled for a CPU, some convolutions are summed in another order than XLA's, which is slow at those of single
    channels and of images smaller than their window: there the outputs are the same to rounding.

    Args:
      fun: any JAX function. Arguments that are not arrays stay Python values, as under `jax.grad`.
      composite: which rule each layer gets.
      argnums: the explained positional argument, or several; floating point, any pytree. (Token ids, which have no
        cotangent, are for `lrp`.)
      on_unknown: "error", or "gradient" to let the plain derivative through primitives that have no kind.

    Relevance of an output is pulled back by `y, pull = jax.vjp(rewrite(f, c), x); (R,) = pull(y)`. Only the cotangents
    of explained arguments are relevance: a layer's parameters get zero, a token joined to the data what ends there.
    Rules compute in float32 or wider; relevance has the input's dtype.

    Raises (when called): InputError, NoRuleError, SelectorError, UnknownPrimitiveError.
    """

    def make(traced: Traced) -> tuple[Interpreter, Settings]:
        body = recognised(traced)
        ops = list(body.ops())
        rules, _ = assign(ops, composite, on_unknown)
        return Interpreter(body, rectified=rectified(body, rules)), Settings(chosen_rules(ops, rules))

    memory: Memory[tuple[Interpreter, Settings]] = Memory()

    @functools.wraps(fun, updated=())
    def rewritten(*args: Any, **kwargs: Any) -> Any:
        traced = trace(fun, args, kwargs, argnums, tokens=False)
        run, settings = memory.of(traced, make)
        return jax.tree.unflatten(traced.out_tree, run(settings, *traced.arrays))

    return rewritten


def value_and_lrp(
    fun: Callable,
    composite: Composite,
    argnums: int | Sequence[int] = 0,
    target: Target = None,
    layers: Selector | None = None,
    masks: dict[str, Any] | None = None,
    *,
    on_unknown: str = "error",
) -> Callable:
    """A function of `fun`'s arguments: (fun's output, relevance of the explained argument(s)[, {layer: relevance}]).

    Args: as `rewrite`, and
      target: where relevance starts. None: every output with its own value. An int, or an integer array with one class
        per example: that logit's value (last axis; output (C,) or (N, C)). A callable: start relevance from the output,
        a pytree like it. A traced index out of range gives zero relevance.
      layers: a selector; the relevance that arrives at the output of each Op it selects is returned too, by the Op's
        name in the plan, from the same pass; after the mask, if the Op has one. In a scan the iterations are leading
        axes; in a shard_map, the mesh axes along which the Op's output differs (with check_vma=False all of them, and
        of what the devices share each holds a part of the relevance).
      masks: {Op's name: array that broadcasts to its output}; relevance arriving there is multiplied by it, so that
        only the chosen channels or positions are followed (conditional relevance, Achtibat et al. 2023); in a scan one
        mask serves every iteration, in a shard_map every device, unless it has the leading axes that `layers` gives.
        Several conditions at once: `jax.vmap` over the masks, which maps the backward pass alone.

    The explained argument may hold token ids (integers that index an embedding): the relevance of an id is that of what
    it selects, summed over the features, in float.

    Returns relevance shaped like the explained argument, in its dtype; a tuple of them if `argnums` is a sequence.

    Raises: as `rewrite`; TargetError for a target out of range or of the wrong shape; InputError for NaN parameters
    (where they are concrete).
    """

    both = pullback(fun, composite, argnums, layers, masks, on_unknown=on_unknown)

    @functools.wraps(fun, updated=())
    def explained(*args: Any, **kwargs: Any) -> Any:
        value, pull = both(*args, **kwargs)
        relevance, seen = pull(start(value, target))
        return (value, relevance) if layers is None else (value, relevance, seen)

    return explained


def pullback(
    fun: Callable,
    composite: Composite,
    argnums: int | Sequence[int] = 0,
    layers: Selector | None = None,
    masks: dict[str, Any] | None = None,
    *,
    on_unknown: str = "error",
) -> Callable:
    """A function of `fun`'s arguments: (fun's output, pull), pull(start relevance) = (relevance, {layer: relevance}).

    Any number of starts, mapped or one after another, share one forward pass. Args and errors as `value_and_lrp`.
    """

    def make(traced: Traced) -> tuple[Interpreter, list[Op], Sequence[Rule], dict[str, int]]:
        body = recognised(traced)
        ops = list(body.ops())
        rules, _ = assign(ops, composite, on_unknown)
        watched = [] if layers is None else _watched(ops, layers)
        run = Interpreter(body, _arrived, rectified=rectified(body, rules))
        return run, ops, rules, {ops[i].name: i for i in watched}

    memory: Memory[tuple[Interpreter, list[Op], Sequence[Rule], dict[str, int]]] = Memory()

    @functools.wraps(fun, updated=())
    def pulled(*args: Any, **kwargs: Any) -> Any:
        traced = trace(fun, args, kwargs, argnums)
        run, ops, rules, watched = memory.of(traced, make)
        check_nan(traced, run.body)
        masked = {} if masks is None else _masked(run.body, ops, masks)
        probes = _probes(run.body, ops, watched.values())
        settings = Settings(chosen_rules(ops, rules, {*watched.values(), *masked}), probes, masked)

        def forward(xs: list[Any], probes: dict[int, Any]) -> Any:
            arrays = list(traced.arrays)
            for i, x in zip(traced.explained, xs, strict=True):
                arrays[i] = carrying(arrays[i], x)
            outputs = run(dataclasses.replace(settings, probes=probes), *arrays)
            return jax.tree.unflatten(traced.out_tree, outputs)

        value, transposed = jax.vjp(forward, [carrier_of(traced.arrays[i]) for i in traced.explained], probes)

        def pull(begun: Any) -> tuple[Any, dict[str, Any]]:
            received, seen = transposed(begun)
            return jax.tree.unflatten(traced.explained_tree, received), {name: seen[i] for name, i in watched.items()}

        return value, pull

    return pulled


def lrp(
    fun: Callable,
    composite: Composite,
    argnums: int | Sequence[int] = 0,
    target: Target = None,
    *,
    masks: dict[str, Any] | None = None,
    on_unknown: str = "error",
) -> Callable:
    """A function of `fun`'s arguments that returns the relevance of the explained argument(s): see `value_and_lrp`."""
    both = value_and_lrp(fun, composite, argnums, target, masks=masks, on_unknown=on_unknown)

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
        _, body = analyse(fun, args, kwargs, argnums)
        return assign(list(body.ops()), composite, on_unknown)[1]

    return planned


def logits(fun: Callable) -> Callable:
    """`fun` up to its final softmax or log_softmax: a function of the same arguments that returns what enters it.

    `fun` must have one array as output (in any container); where it ends in neither, it is returned as it is.

    Raises (when called) InputError for a function of several outputs, of several such ends, or of one inside a loop.
    """

    @functools.wraps(fun, updated=())
    def before_softmax(*args: Any, **kwargs: Any) -> jax.Array:
        traced, body = analyse(fun, args, kwargs, None)
        if len(body.outputs) != 1:
            raise InputError(f"logits({fun!r}): the function must have one array as output, it has {len(body.outputs)}")
        ends = [op for op in body.ops() if is_end(op)]
        if not ends:
            return fun(*args, **kwargs)
        if len(ends) > 1 or ends[0].output not in {v for e in traced.block.equations for v in e.outputs}:
            where = ", ".join(f"{op.name} ({op.source})" for op in ends)
            raise InputError(f"logits({fun!r}): it ends in {where}: write a function that returns what enters it")
        (end,) = ends
        block, skipped = traced.block, set(leaves(end.steps))
        env: dict[Atom, Any] = dict(zip(block.inputs, traced.arrays, strict=True))
        env.update(block.constants.items())
        for e in block.equations:
            if e not in skipped:
                values = [a.value if isinstance(a, Constant) else env[a] for a in e.inputs]
                env.update(zip(e.outputs, e.evaluate(*values), strict=True))
            elif end.inputs[0] in env:  # the logits take the place of what the softmax makes of them
                env[end.output] = env[end.inputs[0]]
        return jax.tree.unflatten(traced.out_tree, [env[block.outputs[0]]])

    return before_softmax


def _watched(ops: Sequence[Op], layers: Selector) -> list[int]:
    """The Ops whose relevance can be reported, among those selected."""
    if not isinstance(layers, Selector):
        raise SelectorError(f"layers={layers!r} is no selector; write jaxlrp.select.named(...) or kind(...)")
    layers.check(ops)
    return [i for i, op in enumerate(ops) if layers.matches(op) and _has_one_output(op)]


def _has_one_output(op: Op) -> bool:
    """Whether relevance can be seen at the Op's output: a split has several, at what blocks there is none."""
    return op.kind not in ("blocked", "unknown") and not op.splits


def _masked(body: Body, ops: Sequence[Op], masks: dict[str, Any]) -> dict[int, Any]:
    if not isinstance(masks, dict):
        raise InputError(f"masks={masks!r}: write a dictionary from the layers' names in the plan to arrays")
    names, loops = {op.name: i for i, op in enumerate(ops)}, around(body)
    found = {}
    for name, mask in masks.items():
        if name not in names:
            raise SelectorError(f"masks: there is no layer {name!r}; the plan names: {', '.join(names)}")
        if not _has_one_output(ops[names[name]]):
            raise InputError(f"masks: {name!r} has no one output; mask the layers that read it")
        op, given = ops[names[name]], jnp.shape(mask)
        devices = tuple(n for loop in loops[op] for n in device_counts(loop, op).values())
        apart = devices and len(given) == len(devices) + len(op.out_shape) and given[: len(devices)] == devices
        if not broadcasts(given[len(devices) :] if apart else given, op.out_shape):
            each = f", nor, with {devices} devices in front, what follows" if devices else ""
            raise InputError(f"masks[{name!r}] of shape {given} does not broadcast to the output {op.out_shape}{each}")
        found[names[name]] = mask
    return found


def _probes(body: Body, ops: Sequence[Op], watched: Collection[int]) -> dict[int, jax.Array]:
    if not watched:
        return {}
    lengths, loops = lead(body), around(body)

    def probe(op: Op) -> jax.Array:
        inner = {a for loop in loops[op] for a in device_counts(loop, op)}
        zeros = jnp.zeros((*lengths[op], *op.out_shape), op.output.aval.dtype)
        return vary(zeros, varying(op.output.aval) - inner)  # along the axes of a shard_map around all of this

    return {i: probe(ops[i]) for i in watched}


def start(value: Any, target: Target) -> Any:
    """The start relevance for an output: a pytree like it, of complex numbers as `rules.by_parts` says."""
    if target is None:
        return jax.tree.map(_own_value, value)
    if callable(target):
        return _called(value, target)
    return jax.tree.map(lambda y: jnp.where(chosen(y, target) > 0, jnp.conj(y), 0), _single(value, target))


def _own_value(y: jax.Array) -> Any:
    inexact = jnp.issubdtype(jnp.result_type(y), jnp.inexact)
    return jnp.conj(y) if inexact else np.zeros(jnp.shape(y), jax.dtypes.float0)


def _single(value: Any, target: Target) -> jax.Array:
    leaves = jax.tree.leaves(value)
    if len(leaves) != 1 or leaves[0].ndim not in (1, 2):
        shapes = [y.shape for y in leaves]
        raise TargetError(
            f"target={target!r} needs one output of shape (classes,) or (examples, classes), got {shapes}; for "
            f"any other output pass a callable: target=lambda y: start relevance like y"
        )
    return value


def chosen(y: jax.Array, target: Target) -> jax.Array:
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
        return vary(jnp.conj(jnp.asarray(r, y.dtype)), varying(jax.typeof(y)))

    return jax.tree.map(fit, begun, value)


def check_nan(traced: Traced, body: Body) -> None:
    """Raises InputError naming the first parameter with a NaN, among those that are concrete."""
    for i, (name, array) in enumerate(zip(traced.names, traced.arrays, strict=True)):
        if i not in traced.explained and _has_nan(array):
            raise InputError(f"parameter {name!r} of shape {array.shape} contains NaN")
    for array in body.constants.values():
        if _has_nan(array):
            raise InputError(f"an array of shape {array.shape} that the function closes over contains NaN")


def _has_nan(array: Any) -> bool:
    if isinstance(array, jax.core.Tracer) or not jnp.issubdtype(jnp.result_type(array), jnp.inexact):
        return False
    with jax.ensure_compile_time_eval():
        found = jnp.isnan(jnp.asarray(array)).any()
        return not isinstance(found, jax.core.Tracer) and bool(found)  # a shard_map that runs eagerly traces constants
