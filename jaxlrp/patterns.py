"""Patterns for PatternNet and PatternAttribution, learned from data in one streaming pass.

For every unit y = w^T x + b of a dense or conv layer (x: what the kernel reads at one position, so every patch of an
image is a sample), with E+ the mean over the samples of a regime and E over all samples:

    c = E+[x y] - E+[x] E[y],        a = c / (w^T c)

The linear estimator takes all samples: a = cov(x, y) / var(y). The two-component estimator takes those with y > 0, for
only they pass a ReLU. Source: Kindermans et al. 2018, section 4, the estimators S_a and S_a+-.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from . import _compat
from .analysis import analyse
from .assign import assign
from .attribute import start
from .composites import Composite
from .errors import InputError
from .interpret import Interpreter, Settings, around, lead
from .program import Op
from .rules import KERNEL, Layer, Rule, rule
from .runs import kernel_axes
from .select import kind

_ESTIMATORS = ("auto", "two_component", "linear")
_SUMS = ("count", "chosen", "y", "x", "xy")
_ROUNDING = 16  # a difference of sums that is no larger than so many of their units in the last place is zero

Row = dict[str, Any]


def fit(
    fun: Callable,
    batches: Iterable[Any],
    argnums: int | Sequence[int] = 0,
    estimator: str = "auto",
    *,
    on_unknown: str = "error",
) -> dict[str, np.ndarray]:
    """The patterns of `fun`'s dense and conv layers: {name in the plan: array of its effective kernel's shape}.

        patterns = jaxlrp.patterns.fit(model, loader)
        relevance = jaxlrp.lrp(model, jaxlrp.composites.pattern_attribution(patterns), target=3)(x)

    Args:
      fun, argnums, on_unknown: as `jaxlrp.lrp`. Fit the function that is explained, called the same way, for the
        layers' names to agree.
      batches: an iterable, read once, of fun's arguments: a tuple holds the positional ones, anything else is the only
        one. Each is an array or a pytree of arrays; what is not an array, close over. Equal shapes compile once.
      estimator: "two_component", "linear", or "auto": the first for layers that only activation functions read (behind
        reshapes and max-pools too), the second for all others, such as logits, and what is added to a shortcut.

    Sums are taken in float32 or wider, at the highest matmul precision, and added up over batches in float64. A unit
    without variance in its regime, up to rounding, or that is never in it, has the pattern 0. A layer in a scan learns
    from all iterations, of which each holds its own sums until the batch ends. `numpy.savez(file, **patterns)` and
    `dict(numpy.load(file))` keep the result.

    Raises InputError for an unknown estimator, an array in place of an iterable, no batches, data or parameters that
    are not finite, a layer with other weights at each iteration of a scan, a convolution whose kernel is the data; as
    `jaxlrp.lrp` for arguments and primitives.
    """
    if estimator not in _ESTIMATORS:
        raise InputError(f"estimator={estimator!r}: write {' or '.join(repr(e) for e in _ESTIMATORS)}")
    if isinstance(batches, (jax.Array, np.ndarray)):
        raise InputError(
            f"batches is one array of shape {batches.shape}: write [array], or pass an iterator over arrays"
        )
    collect = jax.jit(lambda *args: _collect(fun, args, argnums, estimator, on_unknown))
    totals: dict[str, Row] = {}
    empty = True
    for batch in batches:
        with jax.default_matmul_precision("highest"):  # a covariance is a difference of sums
            rows = collect(*(batch if type(batch) is tuple else (batch,)))
        for name, row in jax.device_get(rows).items():
            _add(totals.setdefault(name, {}), row, name)
        empty = False
    if empty:
        raise InputError("batches is empty: patterns are learned from at least one batch")
    for name in (n for n, total in totals.items() if not total):
        raise InputError(f"{name} was not run by any batch: it is in a branch of a cond that was never taken")
    return {name: _solve(total) for name, total in totals.items()}


@rule
class _Observe(Rule):
    """Sends nothing back; its probe's cotangent is what the fit needs."""

    kinds: ClassVar[frozenset[str]] = KERNEL

    def propagate(self, layer: Layer, relevance: jax.Array) -> tuple[jax.Array, ...]:
        return (jnp.zeros_like(layer.inputs[0]),)


def _collect(
    fun: Callable, args: tuple, argnums: int | Sequence[int], estimator: str, on_unknown: str
) -> dict[str, Row]:
    """The sums of one batch by layer, with the lengths of the scans around it as leading axes."""
    traced, body = analyse(fun, args, {}, argnums)
    ops, lengths, loops = list(body.ops()), lead(body), around(body)
    rules, _ = assign(ops, Composite([(kind("dense", "conv"), _Observe())]), on_unknown)
    watched: dict[int, Rule] = {i: r for i, r in enumerate(rules) if isinstance(r, _Observe)}
    for op in (ops[i] for i in watched):
        if any(loop.equation.primitive is _compat.shard_map_p for loop in loops[op]):
            raise InputError(
                f"{op.name} ({op.source}) is inside a shard_map, where each device sees a part of the data: fit the "
                f"function without shard_map; its layers have the same names"
            )
    positive = {op for op in ops if estimator == "two_component" or (estimator == "auto" and _activated(op, ops))}
    run = Interpreter(body, functools.partial(_report, positive))

    def forward(probes: dict[int, Row]) -> Any:
        return jax.tree.unflatten(traced.out_tree, run(Settings(watched, probes), *traced.arrays))

    value, pull = jax.vjp(forward, {i: _probe(ops[i], lengths[ops[i]]) for i in watched})
    (rows,) = pull(start(value, None))
    return {ops[i].name: _merge(row, lengths[ops[i]]) for i, row in rows.items()}


def _activated(op: Op, ops: Sequence[Op]) -> bool:
    """Whether activation functions read the Op's output, and nothing else does."""
    readers = [o for o in ops if op.output in o.inputs]
    moves = ("structural", "max_pool")
    return bool(readers) and all(o.kind == "activation" or (o.kind in moves and _activated(o, ops)) for o in readers)


def _probe(op: Op, lengths: tuple[int, ...]) -> Row:
    """Zeros in the place of `_report`'s sums."""
    assert op.linear is not None  # as every dense and conv Op has
    core, slot = op.linear.core, op.linear.slot
    if op.kind == "conv" and slot == 1:
        raise InputError(f"{op.name} ({op.source}): a convolution whose kernel is the data has no units to learn from")
    if core.primitive is _compat.RAGGED_DOT:
        raise InputError(f"{op.name} ({op.source}): a ragged product's groups get no patterns; loop over them")
    kernel = core.inputs[1 - slot].aval.shape
    units = (kernel_axes(core, core.inputs[slot]) or {}).values()
    narrow = tuple(n if i in units else 1 for i, n in enumerate(kernel))
    shapes = dict.fromkeys(("count", "chosen", "y"), narrow) | dict.fromkeys(("x", "xy", "kernel"), kernel)
    dtype = jnp.promote_types(op.output.aval.dtype, jnp.float32)
    return {name: jnp.zeros((*lengths, *shape), dtype) for name, shape in shapes.items()}


def _report(
    positive: Collection[Op], layer: Layer, rule: Rule, relevance: jax.Array, received: Sequence[jax.Array]
) -> Row:
    """Sums over all positions: of 1, of the regime's mask m, of y by unit; of m x and m x y by weight.

    The kernel's gradient where the cotangent is v is the sum of x v, whatever the layer's strides, groups, dilations.
    """
    y = layer.output
    mask = (y > 0).astype(y.dtype) if layer.op in positive else jnp.ones_like(y)
    sums = jax.linear_transpose(lambda kernel: layer.forward(layer.entered, kernel), layer.kernel)
    return {
        "count": layer.per_unit(jnp.ones_like(y)),
        "chosen": layer.per_unit(mask),
        "y": layer.per_unit(y),
        "x": sums(mask)[0],
        "xy": sums(mask * y)[0],
        "kernel": layer.kernel,
    }


def _merge(row: Row, lengths: tuple[int, ...]) -> Row:
    """The sums over the iterations of scans, and whether all that ran (in a branch, not all do) had one kernel."""
    flat = {name: v.reshape(-1, *v.shape[len(lengths) :]) for name, v in row.items()}
    kernels = flat.pop("kernel")
    ran = flat["count"].reshape(len(kernels), -1).any(axis=1)
    kernel = kernels[jnp.argmax(ran)]
    other = (kernels != kernel).reshape(len(kernels), -1).any(axis=1)
    return {**{name: v.sum(axis=0) for name, v in flat.items()}, "kernel": kernel, "differs": (ran & other).any()}


def _add(total: Row, row: Row, name: str) -> None:
    """Adds the sums of one batch to the total."""
    if not row["count"].any():  # in a branch that was not taken
        return
    for sums in _SUMS:
        if not np.isfinite(row[sums]).all():
            raise InputError(f"{name}: its data or its weights are not finite")
        total[sums] = total.get(sums, 0) + row[sums].astype(np.float64)
    total.setdefault("kernel", row["kernel"])
    if row["differs"] or not np.array_equal(total["kernel"], row["kernel"]):
        raise InputError(
            f"{name} has other weights in other iterations of a scan, or in other batches: one pattern cannot serve "
            f"them all; write a loop over layers in Python"
        )


def _solve(total: Row) -> np.ndarray:
    """a = c / (w^T c), and 0 where w^T c is no more than rounding."""
    kernel, count, chosen = total["kernel"], total["count"], np.maximum(total["chosen"], 1)
    xy, x_y = total["xy"] / chosen, total["x"] / chosen * (total["y"] / count)
    axes = tuple(i for i, n in enumerate(count.shape) if n != kernel.shape[i])
    scale = (kernel * (xy - x_y)).sum(axes, keepdims=True)
    size = (np.abs(kernel) * (np.abs(xy) + np.abs(x_y))).sum(axes, keepdims=True)
    learned = np.abs(scale) > _ROUNDING * np.finfo(kernel.dtype).eps * size
    return np.where(learned, (xy - x_y) / np.where(learned, scale, 1), 0).astype(kernel.dtype)
