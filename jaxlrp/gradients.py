"""The gradient family: the baselines that LRP is measured against. Called as `lrp`, without a composite.

They start with 1 at the target (at every output for None) and differentiate the function itself.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from .attribute import Target, start
from .errors import InputError
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


class Root(NamedTuple):
    """How good a root point is: one number per example (a scalar where the function is of one example).

    point: the root point, like the explained argument(s). value: f there; a root has 0, and the relevance sums to
    f(x) - value where f is linear in between. start: f(x). distance: |x - point|, Euclidean.
    """

    point: Any
    value: jax.Array
    start: jax.Array
    distance: jax.Array


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
        wanted = check_argnums(fun, argnums, len(args))
        x = tuple(jax.tree.map(lambda v, i=i: explainable(v, "of a Taylor expansion", i), args[i]) for i in wanted)

        def score(point: tuple) -> jax.Array:
            """f, one number per example."""
            full = list(args)
            for i, v in zip(wanted, point, strict=True):
                full[i] = v
            value = fun(*full, **kwargs)
            seed = start(value, target) if callable(target) else start(jax.tree.map(_ones, value), target)
            products = [
                (jax.lax.stop_gradient(s) * y).sum(tuple(range(1, y.ndim)) if batched else None)
                for s, y in zip(jax.tree.leaves(seed), jax.tree.leaves(value), strict=True)
                if jnp.issubdtype(y.dtype, jnp.inexact)
            ]
            return jnp.stack(products).sum(0)

        batched = _of_examples(jax.eval_shape(lambda: fun(*args, **kwargs)), x)
        begun = score(x)
        if callable(root):
            given = root(*x)
            point = _like(x, (given,) if isinstance(argnums, int) else tuple(given))
        else:
            if isinstance(root, str):
                g = jax.grad(lambda v: score(v).sum())(x)
                length = begun / jnp.maximum(_dot(g, g, batched), jnp.finfo(begun.dtype).tiny)
                toward, furthest = jax.tree.map(lambda v: -v * _column(length, v), g), reach
            else:
                reference = _like(x, (root,) if isinstance(argnums, int) else tuple(root))
                toward, furthest = jax.tree.map(jnp.subtract, reference, x), 1.0

            def at(t: jax.Array) -> tuple:
                return jax.tree.map(lambda v, d: v + _column(t, v) * d, x, toward)

            point = at(_search(lambda t: score(at(t)), begun, furthest, steps))
        slope = jax.grad(lambda v: score(v).sum())(point)
        difference = jax.tree.map(jnp.subtract, x, point)
        relevance = jax.tree.map(jnp.multiply, slope, difference)
        unpack = (lambda tree: tree[0]) if isinstance(argnums, int) else (lambda tree: tree)
        if not report:
            return unpack(relevance)
        distance = jnp.sqrt(_dot(difference, difference, batched))
        return unpack(relevance), Root(unpack(point), score(point), begun, distance)

    return explained


def _like(x: tuple, given: tuple) -> tuple:
    """A point that the user gave, in the dtypes of x."""
    shapes = [jax.tree.map(jnp.shape, tree) for tree in (given, x)]
    if shapes[0] != shapes[1]:
        raise InputError(
            f"simple_taylor: the root or reference has shapes {shapes[0]}, the explained input {shapes[1]}"
        )
    return jax.tree.map(lambda r, v: jnp.asarray(r, v.dtype), given, x)


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


def _of_examples(value: Any, x: tuple) -> bool:
    """Whether the output is (examples, classes), of as many examples as the explained arguments have."""
    counts = {jnp.shape(v)[:1] for v in jax.tree.leaves(x)}
    return all(y.ndim == 2 and counts == {y.shape[:1]} for y in jax.tree.leaves(value))


def _column(t: jax.Array, v: jax.Array) -> jax.Array:
    """One number per example, to multiply an array of them."""
    return t.reshape(t.shape + (1,) * (v.ndim - t.ndim))


def _dot(a: Any, b: Any, batched: bool) -> jax.Array:
    products = jax.tree.map(lambda u, v: (u * v).sum(tuple(range(1, u.ndim)) if batched else None), a, b)
    return jnp.stack(jax.tree.leaves(products)).sum(0)
