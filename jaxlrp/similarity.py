"""BiLRP: which pairs of features make two inputs alike, to a network that embeds them."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.tree_util import all_leaves

from .attribute import pullback
from .composites import Composite
from .errors import InputError
from .trace import check_argnums


def bilrp(
    fun: Callable,
    composite: Composite,
    argnums: int = 0,
    *,
    pool: Callable[[Any], jax.Array] = lambda relevance: relevance,
    batch_size: int = 64,
    on_unknown: str = "error",
) -> Callable:
    """Relevance of pairs of features for the similarity s(x, y) = sum_m f_m(x) f_m(y) of two embeddings:

        R_ij = sum_m R_i[f_m](x) R_j[f_m](y),    R[f_m] the relevance that starts at f_m alone, with its value

        pairs = jaxlrp.bilrp(model.apply, composite, argnums=1)(variables, x, y)

    A function of `fun`'s arguments with the explained one twice, first x, then y. Returns (*x.shape, *y.shape) for
    embeddings (m,); for embeddings (n, m), which belong to n pairs of examples, (n, *x.shape[1:], *y.shape[1:]). Where
    every R[f_m] conserves, the pairs sum to s. It is the cosine where `fun` normalises its embeddings.

    Args: as `jaxlrp.lrp`, argnums one integer, and
      pool: a linear function of the relevance of x, or of y, that is applied to each R[f_m] before the pairs are made:
        sums over features or over the patches of an image. What it returns takes the place of x and y in the shape.
      batch_size: how many f_m are explained at a time, at a cost in memory; all of them share one forward pass.

    Source: Eberle et al. 2020. Raises InputError for a batch_size that is no positive integer and, when called, for
    several explained arguments and for embeddings or relevance of other shapes; else as `jaxlrp.lrp`.
    """
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise InputError(f"bilrp(batch_size={batch_size!r}): write a positive integer, such as 64")

    @functools.wraps(fun, updated=())
    def explained(*args: Any, **kwargs: Any) -> jax.Array:
        if not isinstance(argnums, int) or len(args) < 2:
            raise InputError(
                f"bilrp explains one argument, given twice; got argnums={argnums!r} and {len(args)} argument(s): write "
                f"bilrp(f, composite, argnums=1)(params, x, y) for embeddings f(params, x) and f(params, y)"
            )
        (i,) = check_argnums(fun, argnums, len(args) - 1)
        if not all_leaves(args[i : i + 2]):
            raise InputError(f"bilrp explains arrays, got {jax.tree.structure(args[i : i + 2])}")
        xs = [jnp.asarray(x) for x in args[i : i + 2]]
        both = pullback(fun, composite, i, on_unknown=on_unknown)

        def embed(x: jax.Array) -> tuple[jax.Array, jax.Array]:
            """f(x), and every R[f_m] along a new first axis."""
            value, pull = both(*args[:i], x, *args[i + 2 :], **kwargs)
            shape: tuple[int, ...] = getattr(value, "shape", ())
            if len(shape) not in (1, 2):
                raise InputError(f"bilrp: an embedding must be one array of shape (m,) or (n, m), got {value}")
            batches = math.ceil(shape[-1] / batch_size)
            size = math.ceil(shape[-1] / batches)
            # rows of zeros, which add nothing, fill the last batch: all of one size are one compiled program
            directions = jnp.eye(batches * size, shape[-1], dtype=value.dtype)
            return value, jax.lax.map(lambda one: pool(pull(value * one)[0]), directions, batch_size=size)

        alike = xs[0].shape == xs[1].shape and xs[0].dtype == xs[1].dtype  # then one program serves both
        values, relevance = jax.lax.map(embed, jnp.stack(xs)) if alike else zip(*map(embed, xs), strict=True)
        batch = values[0].shape[:-1]
        shapes = [r.shape[1:] for r in relevance]
        if values[0].shape != values[1].shape or any(shape[: len(batch)] != batch for shape in shapes):
            raise InputError(
                f"bilrp: embeddings of shapes {[v.shape for v in values]}, with relevance of shapes {shapes}: write a "
                f"function whose embeddings are of one length, and of as many examples as its argument has"
            )
        first, second = (r.reshape(len(r), *(batch or (1,)), -1) for r in relevance)
        pairs = jnp.einsum("mni,mnj->nij", first, second, precision="highest")
        return pairs.reshape(*batch, *(n for shape in shapes for n in shape[len(batch) :]))

    return explained


__all__ = ["bilrp"]
