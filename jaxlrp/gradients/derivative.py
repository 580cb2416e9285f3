"""The gradient, its square, and gradient x input."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from ..analysis import analyse
from ..assign import assign
from ..attribute import Target
from ..composites import Composite
from ..interpret import Interpreter, Settings
from ..rules import EmbeddingSum, Layer, rule
from ..select import kind
from ..tokens import carrier_of, carrying
from .call import Call


def gradient(fun: Callable, argnums: int | Sequence[int] = 0, target: Target = None) -> Callable:
    """df/dx of the target: a function of `fun`'s arguments, its result shaped like the explained argument(s).

    target: as for `lrp`, started with 1. Raises TargetError and InputError as `lrp`.
    """

    @functools.wraps(fun, updated=())
    def explained(*args: Any, **kwargs: Any) -> Any:
        call = Call(fun, argnums, target, args, kwargs, "a gradient")
        value, pull = jax.vjp(lambda *point: call.output(point), *call.x)
        return call.only(pull(call.seed(value)))

    return explained


def sensitivity(fun: Callable, argnums: int | Sequence[int] = 0, target: Target = None) -> Callable:
    """(df/dx)^2, the squared gradient (Simonyan et al. 2014), as `gradient`."""
    inner = gradient(fun, argnums, target)

    @functools.wraps(fun, updated=())
    def explained(*args: Any, **kwargs: Any) -> Any:
        return jax.tree.map(jnp.square, inner(*args, **kwargs))

    return explained


def gradient_x_input(fun: Callable, argnums: int | Sequence[int] = 0, target: Target = None) -> Callable:
    """x * df/dx, as `gradient`; equals LRP-0 on piecewise linear networks.

    The explained argument may hold token ids, as for `lrp`: an id gets sum_d e_d df/de_d over the features e of the row
    it selects, in float. Then UnknownPrimitiveError, too, for an id that is one of several indices.
    """
    inner = gradient(fun, argnums, target)

    @functools.wraps(fun, updated=())
    def explained(*args: Any, **kwargs: Any) -> Any:
        call = Call(fun, argnums, target, args, kwargs, "gradient x input", ids=True)
        if any(jnp.issubdtype(v.dtype, jnp.integer) for v in jax.tree.leaves(call.x)):
            return _of_rows(call)
        return call.only(jax.tree.map(jnp.multiply, call.x, _tuple(inner(*args, **kwargs), call)))

    return explained


def _tuple(result: Any, call: Call) -> tuple:
    """The other way round than `Call.only`."""
    return (result,) if isinstance(call.argnums, int) else result


@rule
class _RowTimesGradient(EmbeddingSum):
    """R_t = sum_d e_d df/de_d, where what arrives is the gradient with respect to the rows e that are selected."""

    uses: ClassVar[frozenset[str]] = frozenset(("output",))
    conserves: ClassVar[bool] = False

    def propagate(self, layer: Layer, relevance: jax.Array) -> tuple[jax.Array, ...]:
        return super().propagate(layer, relevance * layer.output)


def _of_rows(call: Call) -> Any:
    """Gradient x input with ids among the inputs: only the embeddings have a rule, the rest JAX's own derivative."""
    traced, body = analyse(call.fun, call.args, call.kwargs, call.argnums, custom=False)
    ops = list(body.ops())
    places = [i for i, op in enumerate(ops) if op.label == "embedding"]
    rules, _ = assign([ops[i] for i in places], Composite([(kind("embedding"), _RowTimesGradient())]), "error")
    run, settings = Interpreter(body), Settings(dict(zip(places, rules, strict=True)))

    def forward(xs: list[Any]) -> Any:
        arrays = list(traced.arrays)
        for i, x in zip(traced.explained, xs, strict=True):
            arrays[i] = carrying(arrays[i], x)
        return jax.tree.unflatten(traced.out_tree, run(settings, *arrays))

    carriers = [carrier_of(traced.arrays[i]) for i in traced.explained]
    value, pull = jax.vjp(forward, carriers)
    (received,) = pull(call.seed(value))
    inputs = [traced.arrays[i] for i in traced.explained]
    relevance = [r if jnp.issubdtype(x.dtype, jnp.integer) else x * r for x, r in zip(inputs, received, strict=True)]
    return jax.tree.unflatten(traced.explained_tree, relevance)
