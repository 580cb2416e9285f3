"""A call of the user's function, its explained arguments taken apart, and what is explained of its output."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ..attribute import Target, start
from ..errors import InputError
from ..trace import check_argnums, explainable


class Root(NamedTuple):
    """How good a reference point is: one number per example (a scalar where the function is of one example).

    point: the reference, like the explained argument(s). value: f there; of a root it is 0. start: f(x).
    distance: |x - point|, Euclidean. The relevance of `integrated_gradients` sums to start - value, that of
    `simple_taylor` where f is linear in between.
    """

    point: Any
    value: jax.Array
    start: jax.Array
    distance: jax.Array


@dataclasses.dataclass(frozen=True, eq=False)
class Call:
    """method: what messages call the one who asks. ids: whether integers may be explained."""

    fun: Callable
    argnums: int | Sequence[int]
    target: Target
    args: tuple
    kwargs: dict[str, Any]
    method: str
    ids: bool = False

    @cached_property
    def _wanted(self) -> tuple[int, ...]:
        return check_argnums(self.fun, self.argnums, len(self.args))

    @cached_property
    def x(self) -> tuple:
        """The explained arguments."""
        return tuple(
            jax.tree.map(lambda v, i=i: explainable(v, f"of {self.method}", i, self.ids), self.args[i])
            for i in self._wanted
        )

    def output(self, point: tuple) -> Any:
        """What `fun` returns with the explained arguments in another place."""
        full = list(self.args)
        for i, v in zip(self._wanted, point, strict=True):
            full[i] = v
        return self.fun(*full, **self.kwargs)

    def seed(self, value: Any) -> Any:
        """The cotangent that starts at this output: 1 at the target, or what a callable makes of the output."""
        if callable(self.target):
            return start(value, self.target)
        return start(jax.tree.map(jnp.ones_like, value), self.target)

    @cached_property
    def batched(self) -> bool:
        """Whether the output is (examples, classes), of as many examples as the explained arguments have."""
        counts = {jnp.shape(v)[:1] for v in jax.tree.leaves(self.x)}
        value = jax.eval_shape(lambda: self.fun(*self.args, **self.kwargs))
        return all(y.ndim == 2 and counts == {y.shape[:1]} for y in jax.tree.leaves(value))

    def score(self, point: tuple, seed: Any = None) -> jax.Array:
        """f, one number per example (a scalar where there are none): the output times `seed`, None: its own."""
        value = self.output(point)
        seed = self.seed(value) if seed is None else seed
        products = [
            (jax.lax.stop_gradient(s) * y).sum(tuple(range(1, y.ndim)) if self.batched else None)
            for s, y in zip(jax.tree.leaves(seed), jax.tree.leaves(value), strict=True)
            if jnp.issubdtype(y.dtype, jnp.inexact)
        ]
        return jnp.stack(products).sum(0)

    def only(self, results: tuple) -> Any:
        """A tuple, one for each explained argument, as the caller wants it: of one `argnums`, the first."""
        return results[0] if isinstance(self.argnums, int) else results

    def reference(self, given: Any) -> tuple:
        """A point that the user gave: a number, what broadcasts to the explained argument(s), or a function of them."""
        if callable(given):
            given = given(*self.x)
        if jax.tree_util.all_leaves([given]) and jnp.ndim(given) == 0:
            given = jax.tree.map(lambda _: given, self.x)
        elif isinstance(self.argnums, int):
            given = (given,)
        given = tuple(given)
        shapes = [jax.tree.map(jnp.shape, tree) for tree in (given, self.x)]

        def fit(r: Any, v: Any) -> jax.Array:
            if jnp.issubdtype(v.dtype, jnp.integer) and not jnp.issubdtype(jnp.result_type(r), jnp.integer):
                raise InputError(
                    f"{self.method} of ids of dtype {v.dtype}: {r!r} is none; write the id of a mask token"
                )
            return jnp.broadcast_to(jnp.asarray(r, v.dtype), v.shape)

        alike = len({jax.tree.structure(tree) for tree in (given, self.x)}) == 1
        if not alike or not all(map(_broadcasts, jax.tree.leaves(given), jax.tree.leaves(self.x))):
            raise InputError(
                f"{self.method}: the reference has shapes {self.only(shapes[0])}, the explained input "
                f"{self.only(shapes[1])}"
            )
        return jax.tree.map(fit, given, self.x)

    def root(self, point: tuple, value: jax.Array, begun: jax.Array) -> Root:
        difference = jax.tree.map(jnp.subtract, self.x, point)
        return Root(self.only(point), value, begun, jnp.sqrt(dot(difference, difference, self.batched)))


def _broadcasts(r: Any, v: Any) -> bool:
    given, full = jnp.shape(r), v.shape
    return len(given) <= len(full) and all(a in (1, b) for a, b in zip(given[::-1], full[::-1], strict=False))


def dot(a: Any, b: Any, batched: bool) -> jax.Array:
    products = jax.tree.map(lambda u, v: (u * v).sum(tuple(range(1, u.ndim)) if batched else None), a, b)
    return jnp.stack(jax.tree.leaves(products)).sum(0)
