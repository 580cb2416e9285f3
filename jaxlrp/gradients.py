"""The gradient family: the baselines that LRP is measured against. Called as `lrp`, without a composite.

They start with 1 at the target (at every output for None) and differentiate the function itself.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from .attribute import Target, start
from .trace import check_argnums, explainable


def _gradient(fun: Callable, argnums: int | Sequence[int], target: Target, args: tuple, kwargs: dict[str, Any]) -> Any:
    wanted = check_argnums(fun, argnums, len(args))
    for i in wanted:
        for leaf in jax.tree.leaves(args[i]):
            explainable(leaf, "of a gradient", i)

    def forward(*chosen: Any) -> Any:
        full = list(args)
        for i, x in zip(wanted, chosen, strict=True):
            full[i] = x
        return fun(*full, **kwargs)

    value, pull = jax.vjp(forward, *(args[i] for i in wanted))
    # a callable target sees the output; an index starts with 1 where lrp starts with the logit
    seed = start(value, target) if callable(target) else start(jax.tree.map(_ones, value), target)
    pulled = pull(seed)
    return pulled[0] if isinstance(argnums, int) else pulled


def _ones(y: jax.Array) -> jax.Array:
    return jnp.ones_like(y)


def gradient(fun: Callable, argnums: int | Sequence[int] = 0, target: Target = None) -> Callable:
    """df/dx of the target: a function of `fun`'s arguments, its result shaped like the explained argument(s).

    target: as for `lrp`, started with 1. Raises TargetError and InputError as `lrp`.
    """

    @functools.wraps(fun, updated=())
    def explained(*args: Any, **kwargs: Any) -> Any:
        return _gradient(fun, argnums, target, args, kwargs)

    return explained


def sensitivity(fun: Callable, argnums: int | Sequence[int] = 0, target: Target = None) -> Callable:
    """(df/dx)^2, the squared gradient (Simonyan et al. 2014), as `gradient`."""
    inner = gradient(fun, argnums, target)

    @functools.wraps(fun, updated=())
    def explained(*args: Any, **kwargs: Any) -> Any:
        return jax.tree.map(jnp.square, inner(*args, **kwargs))

    return explained


def gradient_x_input(fun: Callable, argnums: int | Sequence[int] = 0, target: Target = None) -> Callable:
    """x * df/dx, as `gradient`; equals LRP-0 on piecewise linear networks."""
    inner = gradient(fun, argnums, target)

    @functools.wraps(fun, updated=())
    def explained(*args: Any, **kwargs: Any) -> Any:
        wanted = check_argnums(fun, argnums, len(args))
        inputs = args[wanted[0]] if isinstance(argnums, int) else tuple(args[i] for i in wanted)
        return jax.tree.map(jnp.multiply, inputs, inner(*args, **kwargs))

    return explained
