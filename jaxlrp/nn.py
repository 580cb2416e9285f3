"""Local response normalisation, which Flax has not: a function, a linen module and an nnx module.

    y_k = x_k / (k + b sum_{i in window(k)} x_i^2)^beta

`LocalResponseNorm` is the linen module, `NNXLocalResponseNorm` the nnx one; Flax is imported when one is asked for.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from .errors import InputError


def local_response_norm(
    x: jax.Array,
    size: int = 5,
    k: float = 1.0,
    alpha: float = 1e-4,
    beta: float = 0.75,
    *,
    alpha_per: str = "window",
    axis: int | Sequence[int] = -1,
) -> jax.Array:
    """y = x / (k + b * sum of x^2 over a window)^beta, across channels or within them.

        y = local_response_norm(x, size=5, k=2.0, alpha=1e-4, alpha_per="element")     # Krizhevsky et al. 2012
        y = local_response_norm(x, size=3, alpha=5e-5, axis=(-3, -2))                  # Caffe's WITHIN_CHANNEL, NHWC

    Args:
      x: floating-point array of any shape; the result has its shape and dtype. Computed in float32 or wider.
      size: length of the window along every axis of `axis`, an integer >= 1. The window of position k goes from
        k - size // 2 to k + (size - 1) // 2; beyond the edges there are zeros.
      k, alpha, beta: k > 0, alpha >= 0, beta >= 0 (their usual ranges: at other values k + b sum may reach 0). Numbers,
        or scalar arrays.
      alpha_per: "window": b = alpha / size^n over n axes, as in Caffe and PyTorch. "element": b = alpha, as in
        TensorFlow and in Krizhevsky et al. 2012.
      axis: the channels, or, to normalise within each channel, the spatial axes.

    Sources: Krizhevsky et al. 2012, section 3.3; Binder et al. 2016. `jaxlrp.rules.LocalResponseTaylor` explains it.

    Raises InputError for an x that is not floating point, a size that is no integer >= 1, an unknown alpha_per, an axis
    that x does not have or that is named twice, and for a k, alpha or beta out of range where it is a Python number.
    """
    if not jnp.issubdtype(jnp.result_type(x), jnp.floating):
        raise InputError(f"local_response_norm: x has dtype {jnp.result_type(x)}; it must be floating point")
    _check(size, k, alpha, beta, alpha_per)
    x = jnp.asarray(x)
    axes = _axes(axis, x.ndim)
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    window = [size if i in axes else 1 for i in range(x.ndim)]
    padding = [(n // 2, (n - 1) // 2) for n in window]
    total = lax.reduce_window(wide * wide, 0.0, lax.add, window, [1] * x.ndim, padding)
    b = alpha / size ** len(axes) if alpha_per == "window" else alpha
    return (wide * _inverse_power(k + b * total, beta)).astype(x.dtype)


def _inverse_power(q: jax.Array, beta: float) -> jax.Array:
    """q^-beta. Roots cost a tenth of a power, and three quarters, the usual exponent, are made of them."""
    if isinstance(beta, float) and beta == 0.75:
        root = lax.rsqrt(q)
        return root * jnp.sqrt(root)
    return q**-beta


def _check(size: int, k: float, alpha: float, beta: float, alpha_per: str) -> None:
    if isinstance(size, bool) or not isinstance(size, int) or size < 1:
        raise InputError(f"local_response_norm(size={size!r}): write an integer >= 1")
    if alpha_per not in ("window", "element"):
        raise InputError(f'local_response_norm(alpha_per={alpha_per!r}): write "window" or "element"')
    for name, value in (("k", k), ("alpha", alpha), ("beta", beta)):
        least = "> 0" if name == "k" else ">= 0"
        if isinstance(value, int | float) and not (math.isfinite(value) and (value > 0 or value == 0 and name != "k")):
            raise InputError(f"local_response_norm({name}={value!r}): write a finite number {least}")


def _axes(axis: int | Sequence[int], ndim: int) -> set[int]:
    wanted = (axis,) if isinstance(axis, int) else tuple(axis)
    if not all(isinstance(i, int) and -ndim <= i < ndim for i in wanted):
        raise InputError(f"local_response_norm(axis={axis!r}): x has {ndim} axes; write integers from 0 to {ndim - 1}")
    if not wanted or len({i % ndim for i in wanted}) != len(wanted):
        raise InputError(f"local_response_norm(axis={axis!r}): write each axis once, at least one")
    return {i % ndim for i in wanted}


def _linen() -> type:
    from flax import linen

    class LocalResponseNorm(linen.Module):
        """`local_response_norm` as a linen module without parameters; its fields are the function's arguments."""

        size: int = 5
        k: float = 1.0
        alpha: float = 1e-4
        beta: float = 0.75
        alpha_per: str = "window"
        axis: int | Sequence[int] = -1

        def __call__(self, x: jax.Array) -> jax.Array:
            return _call(self, x)

    return LocalResponseNorm


def _nnx() -> type:
    from flax import nnx

    class NNXLocalResponseNorm(nnx.Module):
        """`local_response_norm` as an nnx module without parameters, constructed with the function's arguments."""

        def __init__(
            self,
            size: int = 5,
            k: float = 1.0,
            alpha: float = 1e-4,
            beta: float = 0.75,
            *,
            alpha_per: str = "window",
            axis: int | Sequence[int] = -1,
        ):
            self.size, self.k, self.alpha, self.beta, self.alpha_per = size, k, alpha, beta, alpha_per
            self.axis = axis if isinstance(axis, int) else tuple(axis)

        def __call__(self, x: jax.Array) -> jax.Array:
            return _call(self, x)

    return NNXLocalResponseNorm


def _call(module: Any, x: jax.Array) -> jax.Array:
    m = module
    return local_response_norm(x, m.size, m.k, m.alpha, m.beta, alpha_per=m.alpha_per, axis=m.axis)


_MODULES = {"LocalResponseNorm": _linen, "NNXLocalResponseNorm": _nnx}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(__all__)}")
    made = _MODULES[name]()
    made.__module__, made.__qualname__ = __name__, name  # so that it can be pickled
    globals()[name] = made
    return made


__all__ = ["LocalResponseNorm", "NNXLocalResponseNorm", "local_response_norm"]  # noqa: F822
