"""Means of gradients: along a path, and over noise."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..attribute import Target
from ..errors import InputError
from ..tiles import keys_of
from .call import Call
from .derivative import gradient


def integrated_gradients(
    fun: Callable,
    argnums: int | Sequence[int] = 0,
    target: Target = None,
    *,
    baseline: Any = 0.0,
    steps: int = 32,
    report: bool = False,
) -> Callable:
    """R = (x - x') * integral of df/dx(x' + t (x - x')) dt over t from 0 to 1, as `gradient`.

    It is complete: R sums to f(x) - f(x'), up to the error of the quadrature, where f is the target logit (for None the
    sum of the outputs, for a callable the inner product of what it makes of the output at x with the output).

    baseline: x', a number, what broadcasts to the explained argument(s) (a pytree like them), or a function of them.
    steps: gradients, at the points of Gauss and Legendre: exact where f is a polynomial along the path, up to degree
    2 steps, and on a piecewise linear network no worse in order than equal steps. One at a time: the memory is that of
    one gradient.
    report: return (relevance, `Root`) instead: R.sum() - (start - value) is the error.

    Source: Sundararajan et al. 2017. Raises TargetError and InputError as `gradient`; InputError for another baseline.
    """
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise InputError(f"integrated_gradients(steps={steps!r}): write a positive integer")
    nodes, weights = np.polynomial.legendre.leggauss(steps)  # on [-1, 1], with weights of sum 2

    @functools.wraps(fun, updated=())
    def explained(*args: Any, **kwargs: Any) -> Any:
        call = Call(fun, argnums, target, args, kwargs, "integrated gradients")
        point = call.reference(baseline)
        seed = call.seed(call.output(call.x))  # of x all along: a path may change which class is predicted
        slope = jax.grad(lambda p: call.score(p, seed).sum())
        difference = jax.tree.map(jnp.subtract, call.x, point)

        def step(total: tuple, node: tuple[jax.Array, jax.Array]) -> tuple[tuple, None]:
            t, weight = node
            g = slope(jax.tree.map(lambda p, d: p + t.astype(p.dtype) * d, point, difference))
            return jax.tree.map(lambda s, g: s + weight.astype(s.dtype) * g, total, g), None

        at = jnp.asarray((nodes + 1) / 2), jnp.asarray(weights / 2)
        mean, _ = jax.lax.scan(step, jax.tree.map(_zeros, call.x), at)
        relevance = call.only(jax.tree.map(lambda m, d: (m * d).astype(d.dtype), mean, difference))
        if not report:
            return relevance
        return relevance, call.root(point, call.score(point, seed), call.score(call.x, seed))

    return explained


def smoothgrad(
    fun: Callable,
    argnums: int | Sequence[int] = 0,
    target: Target = None,
    *,
    deviation: float = 0.15,
    samples: int = 16,
    key: Any = None,
    of: Callable = gradient,
) -> Callable:
    """The mean over noisy inputs: R = 1/n sum_i of(f)(x + noise_i), noise of N(0, (deviation * (max x - min x))^2).

    The range max x - min x is that of each array, of each example if the output is (examples, classes).

    of: what is averaged, called as `of(fun, argnums, target)`: `gradient`, `sensitivity` (SmoothGrad squared),
    `gradient_x_input`, or an `lrp` with its composite. A callable target sees the output at x, without noise.
    samples: how many, one at a time: the memory is that of one.
    key: a `jax.random.key`; None: key(0). The key of example n is fold_in(key, n): its noise depends on its place, not
    on how many examples there are.

    Source: Smilkov et al. 2017. Raises TargetError and InputError as `gradient`; InputError for numbers out of range.
    """
    if isinstance(samples, bool) or not isinstance(samples, int) or samples < 1 or not 0 <= deviation < float("inf"):
        raise InputError(
            f"smoothgrad(deviation={deviation!r}, samples={samples!r}): write a number >= 0 and a positive integer"
        )
    if not callable(of):
        raise InputError(f"smoothgrad(of={of!r}): write a function such as gradients.gradient_x_input")

    @functools.wraps(fun, updated=())
    def explained(*args: Any, **kwargs: Any) -> Any:
        call = Call(fun, argnums, target, args, kwargs, "smoothgrad")
        begun = call.seed(call.output(call.x)) if callable(target) else None
        fixed = target if begun is None else lambda _: begun
        inner = of(lambda *point: call.output(point), tuple(range(len(call.x))), fixed)
        leaves, tree = jax.tree.flatten(call.x)
        own = jax.random.key(0) if key is None else key

        def noisy(x: jax.Array, key: jax.Array) -> jax.Array:
            noise = jax.random.normal(key, x.shape, x.dtype)
            return x + jnp.asarray(deviation, x.dtype) * (x.max() - x.min()) * noise

        def sample(i: jax.Array) -> tuple:
            keys = keys_of(own, jnp.arange(len(leaves[0]))) if call.batched else own
            points = []
            for j, x in enumerate(leaves):
                draw = lambda x, k, j=j: noisy(x, jax.random.fold_in(jax.random.fold_in(k, i), j))  # noqa: E731
                points.append((jax.vmap(draw) if call.batched else draw)(x, keys))
            return tuple(inner(*jax.tree.unflatten(tree, points)))

        def step(total: tuple, i: jax.Array) -> tuple[tuple, None]:
            return jax.tree.map(jnp.add, total, sample(i)), None

        total, _ = jax.lax.scan(step, jax.tree.map(_zeros, call.x), jnp.arange(samples))
        return call.only(jax.tree.map(lambda t, x: (t / samples).astype(x.dtype), total, call.x))

    return explained


def _zeros(x: jax.Array) -> jax.Array:
    """What a sum starts with: in float32 or wider."""
    return jnp.zeros(x.shape, jnp.promote_types(x.dtype, jnp.float32))
