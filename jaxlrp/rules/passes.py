"""How the passes through a layer, a rule's and the network's own, are written where XLA's are slow: on CPU.

By taps: sum_t x_t W_t over the places t of the window, x_t the strided slice of x that t reads. XLA's convolutions are
slow where the window is one element wide, where each channel has a window of its own, where the image is small beside
its kernel (which the transposed convolution reverses and transposes in memory first), where it is smaller than its
window, and where windows lie side by side (one product for all taps). A pass is written as matrix products or, channel
by channel, as sums of products there.

With channels last: in the body of a loop XLA computes convolutions of other layouts, which all transposed ones have, by
a plain loop over numbers. Outside of loops it puts channels last itself.

By slices: the largest element of each window is a maximum of strided slices, and relevance goes back to the slice it
came from; XLA's derivative, which compares pairs of numbers and places, takes up to ten times as long.

By rows: of a large dense kernel a rule's own, its positive part say, is made and used a few rows at a time, which
stay in the cache; whole it would be written to new memory and read again, at several times the cost of the product.

By sums: a kernel of ones reads all channels alike, and gives every unit the same: one channel, the sum of all, will do.

benchmarks/passes.py measures all forms; platforms other than CPU take the sums alone. Channels last and rows are for
programs that are compiled whole: an eager call has no loops, and would compile one each time. So are the values by
taps: a compiled program sums in an order of its own, an eager call in the written one. When it computes what: `order`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial, reduce
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import primitives as p

from .._compat import vary, varying
from ..program import Equation
from .order import compiled, sharded

WIDE = 2**16  # inputs x outputs of a kernel that costs time to move
LARGE, BLOCK = 2**22, 2**20  # elements of a dense kernel that does not stay in the cache, and of what does
MANY = 128  # places of a window, of which each becomes equations of its own and is numbered in 8 bits
FEW = {False: 64, True: 1024}  # positions of an image that is small beside it: forward, transposed

# of a window: which of two elements is kept, whether one beats the other, what padding holds
_EXTREMES = {
    p.reduce_window_max_p: (jnp.maximum, jnp.greater, -np.inf),
    p.reduce_window_min_p: (jnp.minimum, jnp.less, np.inf),
}


def rewritten(core: Equation) -> bool:
    """Whether this is a convolution, of data with a kernel, that is written anew."""
    if core.primitive is not p.conv_general_dilated_p or jax.default_backend() != "cpu":
        return False
    x, kernel, out = (a.aval for a in (*core.inputs[:2], core.outputs[0]))
    params = core.params
    spread = params["batch_group_count"] > 1 or any(n > 1 for n in params["lhs_dilation"])
    empty = 0 in (*x.shape, *kernel.shape, *out.shape)
    return not (spread or sharded(x, kernel) or empty) and jnp.issubdtype(out.dtype, np.floating)


def faster(core: Equation, transposed: bool) -> bool:
    """Whether taps are faster for this convolution."""
    if not rewritten(core):
        return False
    x, kernel, out = (a.aval for a in (*core.inputs[:2], core.outputs[0]))
    params = core.params
    images, kernels, _ = params["dimension_numbers"]
    window = [kernel.shape[i] for i in kernels[2:]]
    groups, channels = params["feature_group_count"], x.shape[images[1]]
    if groups > 1 or math.prod(window) == 1:
        return groups in (1, channels) and math.prod(window) <= MANY
    if patched(core):
        return True
    positions = math.prod(out.shape) / kernel.shape[kernels[0]]
    wide = channels * kernel.shape[kernels[0]] >= WIDE
    return math.prod(window) <= 49 and (_smaller(core) or (wide and positions <= FEW[transposed]))


def patched(core: Equation) -> bool:
    """Whether the windows of a convolution lie side by side and fill the image, as a vision transformer's do."""
    params, (x, kernel) = core.params, (a.aval for a in core.inputs)
    images, kernels, _ = params["dimension_numbers"]
    window = tuple(kernel.shape[i] for i in kernels[2:])
    full = all(x.shape[i] % n == 0 for i, n in zip(images[2:], window, strict=True))
    alone = params["feature_group_count"] == 1 and all(d == 1 for d in params["rhs_dilation"])
    return full and alone and params["window_strides"] == window and not np.any(params["padding"])


def _smaller(core: Equation) -> bool:
    """Whether the image of a convolution is smaller than its window."""
    x, kernel = (a.aval for a in core.inputs)
    images, kernels, _ = core.params["dimension_numbers"]
    return any(x.shape[i] < kernel.shape[j] for i, j in zip(images[2:], kernels[2:], strict=True))


def channels_last(core: Equation) -> bool:
    """Whether this convolution is written with channels last. In a loop groups of channels are slower so."""
    return rewritten(core) and core.params["feature_group_count"] == 1 and compiled()


def _conv(core: Equation, x: jax.Array, kernel: jax.Array, **numbers: Any) -> jax.Array:
    """Of batch, positions, channels with window, in, out."""
    n = x.ndim - 2
    last = (0, n + 1, *range(1, n + 1))
    spec = lax.ConvDimensionNumbers(last, (n + 1, n, *range(n)), last)
    params = {name: core.params[name] for name in ("rhs_dilation", "feature_group_count", "precision")}
    return lax.conv_general_dilated(
        x, kernel, dimension_numbers=spec, preferred_element_type=x.dtype, **params, **numbers
    )


def convolved(core: Equation, x: jax.Array, kernel: jax.Array) -> jax.Array:
    """The convolution of an equation that `rewritten` names, of any arrays of its shapes."""
    images, kernels, outputs = core.params["dimension_numbers"]
    x = x.transpose(images[0], *images[2:], images[1])
    kernel = kernel.transpose(*kernels[2:], kernels[1], kernels[0])
    out = _conv(core, x, kernel, window_strides=core.params["window_strides"], padding=core.params["padding"])
    return out.transpose(np.argsort((outputs[0], *outputs[2:], outputs[1])))


def back_convolved(core: Equation, r: jax.Array, kernel: jax.Array) -> jax.Array:
    """The transpose of `convolved` in x: a convolution of r, its strides between its elements, the window reversed."""
    params = core.params
    images, kernels, outputs = params["dimension_numbers"]
    strides, groups = params["window_strides"], params["feature_group_count"]
    r = r.transpose(outputs[0], *outputs[2:], outputs[1])
    kernel = jnp.flip(kernel.transpose(*kernels[2:], kernels[1], kernels[0]), range(r.ndim - 2))
    split = kernel.reshape(*kernel.shape[:-1], groups, -1).swapaxes(-3, -1)  # window, out, groups, in
    kernel = split.reshape(*split.shape[:-2], -1)
    padding = _edges(core, r, kernel)
    ones = [1] * (r.ndim - 2)
    out = _conv(core, r, kernel, window_strides=ones, padding=padding, lhs_dilation=strides)
    return out.transpose(np.argsort((images[0], *images[2:], images[1])))


def _edges(core: Equation, r: jax.Array, kernel: jax.Array) -> list[tuple[int, int]]:
    """What r, with strides - 1 zeros between its elements, is padded by: all windows that read an element of x."""
    params = core.params
    size = [core.inputs[0].aval.shape[i] for i in params["dimension_numbers"][0][2:]]
    sizes = zip(
        params["rhs_dilation"],
        kernel.shape,
        params["window_strides"],
        size,
        r.shape[1:],
        params["padding"],
        strict=False,
    )
    return [(d * (k - 1) - low, n - 1 + low - s * (m - 1)) for d, k, s, n, m, (low, _) in sizes]


def by_taps(core: Equation, x: jax.Array, kernel: jax.Array) -> jax.Array:
    """The convolution of an equation that `faster` names, of any arrays of its shapes."""
    params, precision = core.params, core.params["precision"]
    images, kernels, outputs = params["dimension_numbers"]
    x = x.transpose(images[0], *images[2:], images[1])  # batch, positions, channels
    kernel = kernel.transpose(*kernels[2:], kernels[1], kernels[0])  # window, in, out
    window, dilation, strides = kernel.shape[:-2], params["rhs_dilation"], params["window_strides"]
    back = np.argsort((outputs[0], *outputs[2:], outputs[1]))
    if patched(core):
        sizes = [m for n, w in zip(x.shape[1:-1], window, strict=True) for m in (n // w, w)]
        x = x.reshape(x.shape[0], *sizes, x.shape[-1])
        x = x.transpose(0, *range(1, x.ndim - 1, 2), *range(2, x.ndim - 1, 2), x.ndim - 1)
        x = x.reshape(*x.shape[: len(window) + 1], -1)  # of each place its patch, in a row
        kernel = kernel.reshape(-1, kernel.shape[-1])
        return jnp.tensordot(x, kernel, 1, precision=precision, preferred_element_type=x.dtype).transpose(back)
    x = lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), *((low, high, 0) for low, high in params["padding"]), (0, 0, 0)])
    reach = [d * (n - 1) for n, d in zip(window, dilation, strict=True)]
    counts = [(n - r - 1) // s + 1 for n, r, s in zip(x.shape[1:-1], reach, strides, strict=True)]
    groups = params["feature_group_count"]
    if groups > 1:
        x = jnp.repeat(x, kernel.shape[-1] // groups, -1)
    taps = []
    for t in np.ndindex(*window):
        start = [i * d for i, d in zip(t, dilation, strict=True)]
        stop = [i + (n - 1) * s + 1 for i, n, s in zip(start, counts, strides, strict=True)]
        part = lax.slice(x, (0, *start, 0), (x.shape[0], *stop, x.shape[-1]), (1, *strides, 1))
        if groups > 1:
            taps.append(part * kernel[t][0])
        else:
            taps.append(jnp.tensordot(part, kernel[t], 1, precision=precision, preferred_element_type=x.dtype))
    return sum(taps[1:], taps[0]).transpose(back)


def value(core: Equation, x: jax.Array, kernel: jax.Array) -> jax.Array:
    """The convolution of an equation that `rewritten` names, of any arrays of its shapes, in its fastest form."""
    if faster(core, transposed=False):
        return by_taps(core, x, kernel)
    return (convolved if channels_last(core) else _plain)(core, x, kernel)


def back(core: Equation, like: Any, r: jax.Array, kernel: jax.Array) -> jax.Array:
    """Its transpose in x, which is of the type `like`."""
    taps = faster(core, transposed=True)
    if taps and own_windows(core):
        return back_by_taps(core, r, kernel)
    if not taps and channels_last(core):
        return back_convolved(core, r, kernel)
    return jax.linear_transpose(lambda x: (by_taps if taps else _plain)(core, x, kernel), like)(r)[0]


def _plain(core: Equation, x: jax.Array, kernel: jax.Array) -> jax.Array:
    return core.primitive.bind(x, kernel, **{**core.params, "preferred_element_type": x.dtype})


def uniform(core: Equation) -> bool:
    """Whether this is a convolution of data in which all units read all channels."""
    if core.primitive is not p.conv_general_dilated_p:
        return False
    alone = core.params["feature_group_count"] == core.params["batch_group_count"] == 1
    return alone and not sharded(*(a.aval for a in core.inputs))


def by_sums(core: Equation, x: jax.Array) -> jax.Array:
    """The convolution of an equation that `uniform` names with a kernel of ones."""
    images, (outer, inner, *_), _ = core.params["dimension_numbers"]
    window = [1 if i in (outer, inner) else n for i, n in enumerate(core.inputs[1].aval.shape)]
    precise = (lax.Precision.HIGHEST,) * 2  # which costs nothing here
    params = {**core.params, "preferred_element_type": x.dtype, "precision": precise}
    ones = vary(jnp.ones(window, x.dtype), varying(jax.typeof(x)))
    out = core.primitive.bind(x.sum(images[1], keepdims=True), ones, **params)
    return jnp.broadcast_to(out, core.outputs[0].aval.shape)


def written(e: Equation) -> Callable[..., jax.Array] | None:
    """How the network's own forward pass computes this equation of a layer; None where as it stands.

    Maxima are the same bit for bit. Convolutions are to rounding, and are left alone in half precision, where that
    would show, and where taps gain little for the memory that they take.
    """
    if windowed(e):
        form: Callable[..., jax.Array] = extremes
    elif faster(e, transposed=False) and _in_full(e) and (own_windows(e) or _smaller(e)):
        form = one_by_one if own_windows(e) else by_taps
    else:
        return None
    return partial(form, e) if compiled() else None


def _in_full(e: Equation) -> bool:
    """Whether all is in one dtype, of at least 32 bits."""
    return {a.aval.dtype for a in (*e.inputs, *e.outputs)} in ({np.dtype(np.float32)}, {np.dtype(np.float64)})


def one_by_one(core: Equation, x: jax.Array, kernel: jax.Array) -> jax.Array:
    """`by_taps` of one example after another, whose padded image stays in the cache.

    It is what a loop gives, too, that XLA keeps for relevance: of taps alone it would keep all padded images instead.
    """
    images, _, outputs = core.params["dimension_numbers"]
    if x.shape[images[0]] == 1:
        return by_taps(core, x, kernel)

    def one(x: jax.Array) -> jax.Array:
        return by_taps(core, jnp.expand_dims(x, images[0]), kernel).squeeze(outputs[0])

    return jnp.moveaxis(lax.map(one, jnp.moveaxis(x, images[0], 0)), 0, outputs[0])


def own_windows(core: Equation) -> bool:
    """Whether each channel has windows of its own, in a convolution that `faster` names."""
    return core.primitive is p.conv_general_dilated_p and core.params["feature_group_count"] > 1


def back_by_taps(core: Equation, r: jax.Array, kernel: jax.Array) -> jax.Array:
    """The transpose of `by_taps` in x, where each channel has windows of its own: slices of r, too.

    JAX's transpose of the slices is a sum of pads, and XLA computes what is padded once for each of them.
    """
    params = core.params
    images, kernels, outputs = params["dimension_numbers"]
    shape = core.inputs[0].aval.shape
    size, channels = [shape[i] for i in images[2:]], shape[images[1]]
    r = r.transpose(outputs[0], *outputs[2:], outputs[1])
    kernel = kernel.transpose(*kernels[2:], kernels[1], kernels[0])
    window, dilation = kernel.shape[:-2], params["rhs_dilation"]
    edges = [(*e, n - 1) for e, n in zip(_edges(core, r, kernel), params["window_strides"], strict=True)]
    r = lax.pad(r, jnp.zeros((), r.dtype), [(0, 0, 0), *edges, (0, 0, 0)])
    taps = []
    for t in np.ndindex(*window):
        start = [d * (k - 1 - i) for i, k, d in zip(t, window, dilation, strict=True)]
        stop = [i + n for i, n in zip(start, size, strict=True)]
        taps.append(lax.slice(r, (0, *start, 0), (r.shape[0], *stop, r.shape[-1])) * kernel[t][0])
    total = sum(taps[1:], taps[0])
    total = total.reshape(*total.shape[:-1], channels, -1).sum(-1)
    return total.transpose(np.argsort((images[0], *images[2:], images[1])))


def windowed(e: Equation) -> bool:
    """Whether this is the largest, or the smallest, element of windows that is taken from slices."""
    if e.primitive not in _EXTREMES or jax.default_backend() != "cpu":
        return False
    x, out = e.inputs[0].aval, e.outputs[0].aval
    few = math.prod(e.params["window_dimensions"]) <= MANY
    infinite = jnp.issubdtype(x.dtype, np.floating) and jnp.finfo(x.dtype).bits >= 16
    return few and infinite and not sharded(x) and 0 not in (*x.shape, *out.shape)


def slices(e: Equation, x: jax.Array, edge: float) -> list[jax.Array]:
    """The elements of all windows of an equation, an array for each place of the window; `edge` stands in padding."""
    size, stride, dilation = (e.params[k] for k in ("window_dimensions", "window_strides", "window_dilation"))
    edges = zip(e.params["padding"], e.params["base_dilation"], strict=True)
    padded = lax.pad(x, jnp.asarray(edge, x.dtype), [(low, high, base - 1) for (low, high), base in edges])
    shape = e.outputs[0].aval.shape
    taken = []
    for offset in np.ndindex(*size):
        start = [o * d for o, d in zip(offset, dilation, strict=True)]
        stop = [b + (n - 1) * s + 1 for b, n, s in zip(start, shape, stride, strict=True)]
        taken.append(lax.slice(padded, start, stop, stride))
    return taken


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def extremes(e: Equation, x: jax.Array) -> jax.Array:
    """The value of an equation that `windowed` names."""
    better, _, edge = _EXTREMES[e.primitive]
    return reduce(better, slices(e, x, edge))


@extremes.defjvp
def _(e: Equation, primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    return jax.jvp(lambda x: e.evaluate(x)[0], primals, tangents)  # of ties the first, where maxima of two halve


def back_extremes(e: Equation, x: jax.Array, r: jax.Array) -> jax.Array:
    """Its transposed derivative at x: what a window received goes to the first of its elements that is the extreme.

    One place wins however x is rounded. XLA may compute x anew for each slice, so that none need equal their maximum.
    """
    better, beats, edge = _EXTREMES[e.primitive]
    parts, pull = jax.vjp(lambda x: slices(e, x, edge), x)
    best, winner = parts[0], jnp.zeros(parts[0].shape, jnp.int8)
    for i, part in enumerate(parts[1:], 1):
        winner = jnp.where(beats(part, best), jnp.int8(i), winner)
        best = better(best, part)
    (received,) = pull([jnp.where(winner == i, r, 0) for i in range(len(parts))])
    return received


def large(core: Equation) -> bool:
    """Whether this is a product of data with a dense kernel that is better made by rows, forward or back.

    The outputs of all positions are read and written with each block, so they must stay in the cache as well.
    """
    if core.primitive is not p.dot_general_p or jax.default_backend() != "cpu":
        return False
    x, kernel, out = (a.aval for a in (*core.inputs[:2], core.outputs[0]))
    plain = core.params["dimension_numbers"] == (((x.ndim - 1,), (0,)), ((), ()))
    return plain and not sharded(x, kernel) and kernel.size >= LARGE and out.size <= BLOCK and compiled()


def _rows(kernel: jax.Array) -> tuple[int, int]:
    """How many rows at a time, and how often that many."""
    rows = min(max(BLOCK * kernel.shape[0] // kernel.size, 1), kernel.shape[0])
    return rows, kernel.shape[0] // rows


def by_rows(core: Equation, x: jax.Array, kernel: jax.Array, make: Callable[[jax.Array], jax.Array]) -> jax.Array:
    """x @ make(kernel), of an equation that `large` names; `make` acts element by element."""
    rows, count = _rows(kernel)

    def add(start: Any, size: int, z: jax.Array | int) -> jax.Array:
        part = lax.dynamic_slice_in_dim(x, start, size, -1), make(lax.dynamic_slice_in_dim(kernel, start, size))
        return z + jnp.tensordot(*part, 1, precision=core.params["precision"], preferred_element_type=x.dtype)

    z = lax.fori_loop(1, count, lambda i, z: add(i * rows, rows, z), add(0, rows, 0))
    rest = len(kernel) - rows * count
    return add(rows * count, rest, z) if rest else z


def back_by_rows(core: Equation, s: jax.Array, kernel: jax.Array, make: Callable[[jax.Array], jax.Array]) -> jax.Array:
    """s @ make(kernel).T, likewise."""
    rows, count = _rows(kernel)
    axes = [*range(s.ndim - kernel.ndim + 1, s.ndim)], [*range(1, kernel.ndim)]

    def part(start: Any, size: int) -> jax.Array:
        own = make(lax.dynamic_slice_in_dim(kernel, start, size))
        return jnp.tensordot(s, own, axes, precision=core.params["precision"], preferred_element_type=s.dtype)

    parts = jnp.moveaxis(lax.map(lambda i: part(i * rows, rows), jnp.arange(count)), 0, -2)
    received = parts.reshape(*parts.shape[:-2], -1)
    rest = len(kernel) - rows * count
    return jnp.concatenate([received, part(rows * count, rest)], -1) if rest else received
