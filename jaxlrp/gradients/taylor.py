"""A first-order Taylor expansion around a root point that is searched for."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from ..attribute import Target
from ..errors import InputError
from .call import Call, dot


def simple_taylor(
    fun: Callable,
    argnums: int | Sequence[int] = 0,
    target: Target = None,
    root: Any = "gradient",
    *,
    reach: float = 4.0,
    steps: int = 32,
    report: bool = False,
) -> Callable:
    """First-order Taylor expansion of the target at a root point: R_p = df/dx_p(root) (x_p - root_p), f(root) = 0.

    f is the target logit, one per example for an output of shape (N, C); for None it is the sum of the (example's)
    outputs, for a callable target the inner product of what it gives, taken as constant, with the output.

    root: where it is searched for, the nearest sign change of f on
      "gradient": the line x - t f(x) g / |g|^2, g = df/dx(x), t from 0 to `reach` (t = 1 is the root of a linear f);
      an array (or pytree) like the explained argument(s): the segment from x to it, a reference such as a black image;
      a callable: its result for the explained argument(s) is the root point itself.
    steps: how many points are tried before bisection. Where f does not change its sign, the point with the least |f|
    among those tried is taken: `report` says how close it is.
    report: return (relevance, `Root`) instead of the relevance.

    Source: Bach et al. 2015 (Taylor-type decomposition); Montavon et al. 2017, section 3. Raises TargetError and
    InputError as `gradient`; InputError for another root, or numbers out of range.
    """
    if isinstance(root, str) and root != "gradient":
        raise InputError(f'simple_taylor(root={root!r}): write "gradient", a reference array, or a function')
    if not isinstance(steps, int) or steps < 1 or not 0 < reach < float("inf"):
        raise InputError(f"simple_taylor(reach={reach!r}, steps={steps!r}): write positive numbers, steps an integer")

    @functools.wraps(fun, updated=())
    def explained(*args: Any, **kwargs: Any) -> Any:
        call = Call(fun, argnums, target, args, kwargs, "a Taylor expansion")
        x, score = call.x, call.score
        begun = score(x)
        if callable(root):
            point = call.reference(root)
        else:
            if isinstance(root, str):
                g = jax.grad(lambda v: score(v).sum())(x)
                length = begun / jnp.maximum(dot(g, g, call.batched), jnp.finfo(begun.dtype).tiny)
                toward, furthest = jax.tree.map(lambda v: -v * _column(length, v), g), reach
            else:
                toward, furthest = jax.tree.map(jnp.subtract, call.reference(root), x), 1.0

            def at(t: jax.Array) -> tuple:
                return jax.tree.map(lambda v, d: v + _column(t, v) * d, x, toward)

            point = at(_search(lambda t: score(at(t)), begun, furthest, steps))
        slope = jax.grad(lambda v: score(v).sum())(point)
        relevance = call.only(jax.tree.map(lambda g, v, r: g * (v - r), slope, x, point))
        return (relevance, call.root(point, score(point), begun)) if report else relevance

    return explained


def _search(f: Callable, begun: jax.Array, furthest: float, steps: int) -> jax.Array:
    """The t in [0, furthest] just before the first sign change of f, by trial and bisection; else that of least |f|."""
    tried = jnp.linspace(0.0, furthest, steps + 1, dtype=begun.dtype)
    values = jax.lax.map(lambda t: f(jnp.broadcast_to(t, begun.shape)), tried)
    crossed = jnp.sign(values) != jnp.sign(begun)
    found, k = crossed.any(0), jnp.argmax(crossed, 0)
    low, high = tried[jnp.maximum(k - 1, 0)], tried[k]

    def halve(_: int, bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        middle = (bounds[0] + bounds[1]) / 2
        beyond = jnp.sign(f(middle)) != jnp.sign(begun)
        return jnp.where(beyond, bounds[0], middle), jnp.where(beyond, middle, bounds[1])

    low, _ = jax.lax.fori_loop(0, jnp.finfo(begun.dtype).nmant + 4, halve, (low, high))
    return jnp.where(found, low, tried[jnp.argmin(jnp.abs(values), 0)])


def _column(t: jax.Array, v: jax.Array) -> jax.Array:
    """One number per example, to multiply an array of them."""
    return t.reshape(t.shape + (1,) * (v.ndim - t.ndim))
