"""Several targets of the same inputs: one forward pass, and a backward pass for each."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .attribute import pullback, start
from .composites import Composite
from .errors import InputError, TargetError


def per_target(
    fun: Callable,
    composite: Composite,
    argnums: int | Sequence[int] = 0,
    targets: Any = None,
    *,
    batch_size: int | None = None,
    masks: dict[str, Any] | None = None,
    on_unknown: str = "error",
) -> Callable:
    """A function of `fun`'s arguments: the relevance of each of k targets, on a new first axis.

        every = jaxlrp.per_target(model.apply, composite, argnums=1, batch_size=50)(variables, x)    # all classes

    R[i] is what `lrp(fun, composite, argnums, targets[i])` gives. The forward pass is computed once, the denominators
    that rules divide by once for each `batch_size` targets.

    Args: as `lrp`, and
      targets: integers (k,), each a class that all examples are explained for, or (k, N), one for each example; None:
        every class of the output's last axis.
      batch_size: how many targets are explained at a time, which bounds memory; None: all at once.

    Returns (k, *x.shape) for each explained array x, in its dtype.

    Raises InputError for a batch_size that is no positive integer and, when called, TargetError for targets out of
    range or of another shape or dtype; else as `lrp`.
    """
    if batch_size is not None and (isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1):
        raise InputError(f"per_target(batch_size={batch_size!r}): write a positive integer, or None for all at once")
    both = pullback(fun, composite, argnums, None, masks, on_unknown=on_unknown)

    @functools.wraps(fun, updated=())
    def explained(*args: Any, **kwargs: Any) -> Any:
        value, pull = both(*args, **kwargs)
        classes = _classes(value, targets)

        def explain(target: jax.Array) -> Any:
            return pull(start(value, target))[0]

        if batch_size is None or batch_size >= len(classes):
            return jax.vmap(explain)(classes)
        return jax.lax.map(explain, classes, batch_size=batch_size)

    return explained


def _classes(value: Any, targets: Any) -> jax.Array:
    """The targets as an array; each of them is checked where they are concrete."""
    if targets is None:
        shapes = [jnp.shape(y) for y in jax.tree.leaves(value)]
        if len(shapes) != 1 or len(shapes[0]) not in (1, 2):
            raise TargetError(f"targets=None explains every class of one output, got outputs of shapes {shapes}")
        return jnp.arange(shapes[0][-1])
    array = targets if isinstance(targets, jax.core.Tracer) else np.asarray(targets)
    if array.ndim not in (1, 2) or 0 in array.shape or not jnp.issubdtype(array.dtype, jnp.integer):
        raise TargetError(
            f"targets of shape {array.shape} and dtype {array.dtype}: write integers (k,), or (k, examples), at least "
            f"one; for a single target, jaxlrp.lrp(fun, composite, target=...)"
        )
    if isinstance(array, np.ndarray):
        each = array.reshape(len(array), -1)
        for row in (each.min(1).argmin(), each.max(1).argmax()):
            start(value, array[row])  # which refuses what is out of range
    return jnp.asarray(array)


__all__ = ["per_target"]
