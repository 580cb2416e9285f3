"""Whether an explanation depends on what the network has learnt: its parameters are shuffled, and it has to change."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from typing import Any

import jax
import jax.numpy as jnp
from jax.tree_util import keystr, tree_flatten_with_path

from ..errors import SelectorError
from ..tiles import tiles_of
from .flipping import as_partial, called, relevance_of
from .metrics import correlation


def parameter_randomisation(
    explain: Callable,
    params: Any,
    inputs: Any,
    *,
    layers: str | Sequence[str] | None = None,
    key: Any = None,
    channels: int | None = -1,
) -> jax.Array:
    """(stages, N): how much of each example's map is left after parameters were shuffled.

        Spearman's rank correlation, over the positions, of |R| before and |R| after

    from -1 to 1. A smoke test, and no more: a map that hardly changes (near 1) does not show what was learnt, whether
    the method ignores the parameters or the explanation is wired to the wrong ones. Do not rank methods by it. Maps
    that vary from pixel to pixel decorrelate whatever they show, so those with little covariance between neighbours
    score well; and a network with random parameters still passes the sizes of its activations on, so a faithful map
    keeps some of its pattern (Binder et al. 2023).

    The correlation is of |R|, not of R: shuffling turns signs, and turned signs would hide a pattern that stays.
    Equal values have equal ranks. NaN where a map is constant.

    Source: Adebayo et al. 2018, cascading randomisation. There parameters are drawn anew; here the values of each array
    are permuted, which keeps their scale. Arrays whose values are all equal (a bias of zeros) therefore stay.

    Args:
      explain: a function of parameters and inputs (N, ...) to relevance like the inputs, or without their channels;
        with its targets fixed. Compiled once.
      params: any pytree. Arrays that are not floating point or complex stay.
      layers: patterns, as in `fnmatch`, of the parameter's path joined by "/", such as ["params/out/*",
        "params/Conv_2/*"], from the output on. At each stage the parameters of one more pattern are shuffled. None: one
        stage with all of them.
      key: a `jax.random.key`; None: key(0).
      channels: as `pixel_flipping`; a position's channels are summed first.

    Raises SelectorError for a pattern that matches no parameter; InputError for shapes that do not fit, or relevance
    with NaN.
    """
    patterns = ("*",) if layers is None else (layers,) if isinstance(layers, str) else tuple(layers)
    if not patterns or not all(isinstance(pattern, str) for pattern in patterns):
        raise SelectorError(f"layers={layers!r}: write patterns of parameter paths, or None for all at once")
    flat, structure = tree_flatten_with_path(params)
    leaves = [leaf for _, leaf in flat]
    paths = {
        i: keystr(path, simple=True, separator="/")
        for i, (path, leaf) in enumerate(flat)
        if jnp.issubdtype(jnp.result_type(leaf), jnp.inexact)
    }
    matched = [{i for i, path in paths.items() if fnmatchcase(path, pattern)} for pattern in patterns]
    if set() in matched:
        shown = ", ".join(list(paths.values())[:12]) + (", ..." if len(paths) > 12 else "")
        raise SelectorError(
            f"layers: {patterns[matched.index(set())]!r} matches no parameter; they are: {shown or 'none'}"
        )
    inputs, function, key = jnp.asarray(inputs), as_partial(explain), jax.random.key(0) if key is None else key
    tiles = tiles_of(inputs, 1, channels)

    def explained(leaves: list[Any]) -> jax.Array:
        return relevance_of(tiles, inputs, called(function, jax.tree.unflatten(structure, leaves), inputs))

    original, stages = explained(leaves), []
    for group in matched:
        for i in group & paths.keys():
            leaves[i] = shuffled(jax.random.fold_in(key, i), jnp.asarray(leaves[i]))
            del paths[i]  # once: the same permutation again could undo itself
        stages.append(_rank_correlation(original, explained(leaves)))
    return jnp.stack(stages)


@jax.jit
def shuffled(key: jax.Array, leaf: jax.Array) -> jax.Array:
    """The same numbers in another order."""
    return jax.random.permutation(key, leaf.ravel()).reshape(leaf.shape)


@jax.jit
def _rank_correlation(a: jax.Array, b: jax.Array) -> jax.Array:
    """(N,): Spearman's, of the absolute values (N, positions)."""
    first, second = (jax.vmap(ranks)(jnp.abs(v)) for v in (a, b))
    return correlation(first, second)


def ranks(v: jax.Array) -> jax.Array:
    """Each number's place among all, up to an offset; equal numbers share the mean of theirs. NaN if one is NaN."""
    ordered = jnp.sort(v)
    below, upto = (jnp.searchsorted(ordered, v, side=side) for side in ("left", "right"))
    return jnp.where(jnp.isnan(v).any(), jnp.nan, (below + upto).astype(v.dtype))
