"""Convolution by taps: sum_t x_t W_t over the places t of the window, x_t the strided slice of x that t reads.

On CPU XLA's convolutions are slow where the window is one element wide, where each channel has a window of its own,
where the image is small beside its kernel (which the transposed convolution reverses and transposes in memory first),
and where it is smaller than its window. A pass of a rule is written as matrix products or, channel by channel, as sums
of products there. benchmarks/convolutions.py measures both forms; other platforms have convolutions of their own and
keep them.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import primitives as p

from ..program import Equation

WIDE = 2**16  # inputs x outputs of a kernel that costs time to move
FEW = {False: 64, True: 1024}  # positions of an image that is small beside it: forward, transposed


def faster(core: Equation, transposed: bool) -> bool:
    """Whether this convolution, of data with a kernel, is one that taps are faster for."""
    if core.primitive is not p.conv_general_dilated_p or jax.default_backend() != "cpu":
        return False
    x, kernel, out = (a.aval for a in (*core.inputs[:2], core.outputs[0]))
    params = core.params
    spread = params["batch_group_count"] > 1 or any(n > 1 for n in params["lhs_dilation"])
    sharded = any(s is not None for a in (x, kernel) for s in a.sharding.spec)  # explicitly, as part of the type
    if spread or sharded or 0 in (*x.shape, *kernel.shape, *out.shape) or not jnp.issubdtype(out.dtype, np.floating):
        return False
    images, kernels, _ = params["dimension_numbers"]
    window = [kernel.shape[i] for i in kernels[2:]]
    groups, channels = params["feature_group_count"], x.shape[images[1]]
    if groups > 1 or math.prod(window) == 1:
        return groups in (1, channels) and math.prod(window) <= 128
    smaller = any(x.shape[i] < n for i, n in zip(images[2:], window, strict=True))
    positions = math.prod(out.shape) / kernel.shape[kernels[0]]
    wide = channels * kernel.shape[kernels[0]] >= WIDE
    return math.prod(window) <= 49 and (smaller or (wide and positions <= FEW[transposed]))


def by_taps(core: Equation, x: jax.Array, kernel: jax.Array) -> jax.Array:
    """The convolution of an equation that `faster` names, of any arrays of its shapes."""
    params, precision = core.params, core.params["precision"]
    images, kernels, outputs = params["dimension_numbers"]
    x = x.transpose(images[0], *images[2:], images[1])  # batch, positions, channels
    kernel = kernel.transpose(*kernels[2:], kernels[1], kernels[0])  # window, in, out
    window, dilation, strides = kernel.shape[:-2], params["rhs_dilation"], params["window_strides"]
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
        part = lax.slice(x, (0, *start, 0), (len(x), *stop, x.shape[-1]), (1, *strides, 1))
        if groups > 1:
            taps.append(part * kernel[t][0])
        else:
            taps.append(jnp.tensordot(part, kernel[t], 1, precision=precision, preferred_element_type=x.dtype))
    total = sum(taps[1:], taps[0])
    return total.transpose(np.argsort((outputs[0], *outputs[2:], outputs[1])))


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
    window, dilation, strides = kernel.shape[:-2], params["rhs_dilation"], params["window_strides"]
    edges = [
        (d * (k - 1) - low, n - 1 + low - s * (m - 1), s - 1)
        for k, d, s, n, m, (low, _) in zip(
            window, dilation, strides, size, r.shape[1:], params["padding"], strict=False
        )
    ]
    r = lax.pad(r, jnp.zeros((), r.dtype), [(0, 0, 0), *edges, (0, 0, 0)])
    taps = []
    for t in np.ndindex(*window):
        start = [d * (k - 1 - i) for i, k, d in zip(t, window, dilation, strict=True)]
        stop = [i + n for i, n in zip(start, size, strict=True)]
        taps.append(lax.slice(r, (0, *start, 0), (len(r), *stop, r.shape[-1])) * kernel[t][0])
    total = sum(taps[1:], taps[0])
    total = total.reshape(*total.shape[:-1], channels, -1).sum(-1)
    return total.transpose(np.argsort((images[0], *images[2:], images[1])))
