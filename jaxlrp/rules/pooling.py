"""Rules for max-pooling, and the shares that sums and average pools may take instead of their contributions'."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import primitives as p

from ..program import Equation, leaves
from ..single import reducer
from . import passes
from .arithmetic import divide
from .base import Rule, check_choice, rule
from .layer import Layer

_OVER_AXES = (p.reduce_max_p, p.reduce_min_p, p.reduce_p)
_OVER_WINDOWS = (p.reduce_window_max_p, p.reduce_window_min_p, p.reduce_window_p)
_MINIMA = (p.reduce_min_p, p.reduce_window_min_p)
_FROM_A_START = (p.reduce_p, p.reduce_window_p)  # which may be larger than every element
_CUMULATIVE = (p.cummax_p, p.cummin_p)
_OVER_DEVICES = (p.pmax_p, p.pmin_p)


@rule
class Winner(Rule):
    """All relevance to the largest element of each window (the smallest, for a minimum).

    ties: "first" in the window's order, or "split" in equal parts. For max-pooling, maxima over axes, cumulative maxima
    (there always the first), the maximum of two values and `x.at[i].max` (there ties always split). The smooth maxima
    logsumexp and cumlogsumexp give each element its softmax weight (Kauffmann et al. 2022); the maximum over devices
    (`lax.pmax`) is one window. Where the start of the reduction is larger than every element, relevance ends there.
    Source: Bach et al. 2015. Raises InputError for another choice.
    """

    ties: str = "first"
    kinds: ClassVar[frozenset[str]] = frozenset(("max_pool",))
    uses: ClassVar[frozenset[str]] = frozenset(("inputs", "params", "output"))

    def __post_init__(self) -> None:
        check_choice(self, "ties", "first", "split")

    def propagate(self, layer: Layer, relevance: jax.Array) -> tuple[jax.Array, ...]:
        e = leaves(layer.op.steps)[-1]
        if e.primitive in _OVER_DEVICES:
            return (_among_devices(e, layer, relevance, self.ties),)
        if e.primitive in _CUMULATIVE:
            return (_to_records(e, layer.output, relevance),)
        windowed, started = e.primitive in _OVER_WINDOWS, e.primitive in _FROM_A_START
        dilated = windowed and max(e.params["window_dilation"]) > 1
        differentiable = windowed and not dilated and not started
        if not windowed and e.primitive not in _OVER_AXES or differentiable and self.ties == "first":
            # the derivative of a window is its first winner, of two values half each on ties, of logsumexp a softmax
            return layer.pull(relevance)
        elements, pull = jax.vjp(lambda x: windows(e, x), layer.inputs[0])
        shape = elements.shape[1:]
        # one place wins however x is rounded: XLA may compute it anew here, and no element need equal the output then
        best = jnp.argmin(elements, 0) if _smallest(e) else jnp.argmax(elements, 0)
        wins = jax.nn.one_hot(best, len(elements), axis=0, dtype=bool)
        output = layer.output.reshape(shape)
        if self.ties == "split":
            wins |= elements == output
        if started:
            wins &= (elements == output).any(0)
        received = pull(wins * divide(relevance.reshape(shape), wins.sum(0).astype(relevance.dtype)))
        layer.book("ended", lambda: jnp.where(wins.any(0), 0, relevance.reshape(shape)))
        return received


@rule
class Proportional(Rule):
    """Max-pooling explained as if it had been a sum: R_j = x_j / (sum of the window) R_k.

    Source: the option "always average" of the LRP Toolbox, Lapuschkin et al. 2016. A window with sum 0 is dropped.
    """

    kinds: ClassVar[frozenset[str]] = frozenset(("max_pool",))
    uses: ClassVar[frozenset[str]] = frozenset(("inputs",))

    def supports(self, op: Any) -> bool:
        return op.kind == "max_pool" and leaves(op.steps)[-1].primitive in _OVER_AXES + _OVER_WINDOWS

    def propagate(self, layer: Layer, relevance: jax.Array) -> tuple[jax.Array, ...]:
        e = leaves(layer.op.steps)[-1]
        elements, pull = jax.vjp(lambda x: windows(e, x, fill=0.0), layer.inputs[0])
        z = elements.sum(0)
        relevance = relevance.reshape(z.shape)
        layer.book("dropped", lambda: jnp.where(z == 0, relevance, 0))
        return pull(elements * divide(relevance, z))


@rule
class AbsoluteShare(Rule):
    """A residual sum's relevance in proportion to the terms' sizes: R_i = |x_i| / (sum_j |x_j|) R.

    Every term gets the sign of R, where Epsilon gives a term that was subtracted the opposite sign. Units whose terms
    are all 0 are dropped. Source: the residual rule of autoLRP; compare Chefer et al. 2021, eq. 9.
    """

    kinds: ClassVar[frozenset[str]] = frozenset(("add",))
    uses: ClassVar[frozenset[str]] = frozenset(("inputs",))

    def propagate(self, layer: Layer, relevance: jax.Array) -> tuple[jax.Array, ...]:
        sizes = [n * jnp.abs(x) for n, x in zip(layer.occurrences, layer.inputs, strict=True)]
        z, pull = jax.vjp(lambda *xs: jnp.stack([jnp.broadcast_to(x, relevance.shape) for x in xs]).sum(0), *sizes)
        layer.book("dropped", lambda: jnp.where(z == 0, relevance, 0))
        return tuple(x * g for x, g in zip(sizes, pull(divide(relevance, z)), strict=True))


def _among_devices(e: Equation, layer: Layer, relevance: jax.Array, ties: str) -> jax.Array:
    """The winner among the devices of a shard_map, and along axes: those that `vmap` made of names are numbers."""
    (x,) = layer.inputs
    over = {"axis_name": e.params["axes"], "axis_index_groups": e.params["axis_index_groups"]}
    numbers = [a for a in e.params["axes"] if isinstance(a, int)]
    names = tuple(a for a in e.params["axes"] if not isinstance(a, int))
    wins = x == jnp.expand_dims(layer.output, numbers)
    if ties == "first":
        shape = [n if i in numbers else 1 for i, n in enumerate(x.shape)]
        order = jnp.arange(math.prod(shape)).reshape(shape)
        order += order.size * jax.lax.axis_index(names) if names else 0
        first = jax.lax.pmin(jnp.where(wins, order, np.iinfo(order.dtype).max), **over)
        wins &= order == jnp.expand_dims(first, numbers)
    # the transpose of the sum tells every device what arrived, of which each may hold a part
    count, pull = jax.vjp(lambda wins: jax.lax.psum(wins, **over), wins.astype(x.dtype))
    return wins * pull(relevance / count)[0]


def windows(e: Equation, x: jax.Array, fill: float | None = None) -> jax.Array:
    """The elements of every window, on a leading axis, each position shaped like the output (without its 1-axes)."""
    if e.primitive in _OVER_AXES:
        axes = tuple(e.params["axes"] if "axes" in e.params else e.params["dimensions"])
        kept = [i for i in range(x.ndim) if i not in axes]
        flat = x.transpose(*axes, *kept)
        return flat.reshape(-1, *flat.shape[len(axes) :])
    edge = fill if fill is not None else (np.inf if _smallest(e) else -np.inf)
    return jnp.stack(passes.slices(e, x, edge))


def _smallest(e: Equation) -> bool:
    """Whether the winner is the smallest element."""
    return e.primitive in _MINIMA or e.primitive in _FROM_A_START and reducer(e) is p.min_p


def _to_records(e: Equation, y: jax.Array, relevance: jax.Array) -> jax.Array:
    """What arrives at each place of a cumulative maximum y, sent back to where that maximum was first reached."""
    axis, reverse = e.params["axis"], e.params["reverse"]
    place = jax.lax.broadcasted_iota(jnp.int32, y.shape, axis)
    place = y.shape[axis] - 1 - place if reverse else place  # counted in the direction of the maximum
    new = (y != jnp.roll(y, -1 if reverse else 1, axis)) | (place == 0)
    latest = jax.lax.cummax(jnp.where(new, place, 0), axis, reverse)
    latest = y.shape[axis] - 1 - latest if reverse else latest
    _, pull = jax.vjp(lambda x: jnp.take_along_axis(x, latest, axis), y)
    return pull(relevance)[0]


__all__ = ["AbsoluteShare", "Proportional", "Winner"]
