"""What rules compute with: quotients safe at zero, the zeros of half precision, complex numbers as two real ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def by_parts(f: Callable[..., jax.Array], *arrays: jax.Array) -> jax.Array:
    """f of real numbers; where some are complex, f of the real parts and of the imaginary parts.

    A complex number is two values, and each has its relevance. Their pair travels as JAX's cotangents do, as the
    complex number R_re - i R_im, so that JAX's own derivatives carry it through whatever moves complex numbers.
    """
    if not any(map(jnp.iscomplexobj, arrays)):
        return f(*arrays)
    parts = [(x.real, x.imag) if jnp.iscomplexobj(x) else (x, x) for x in arrays]
    return jax.lax.complex(*(f(*side) for side in zip(*parts, strict=True)))


def summed(r: jax.Array) -> jax.Array:
    """The sum of relevance, over both parts of complex numbers."""
    return r.real.sum() - r.imag.sum() if jnp.iscomplexobj(r) else r.sum()


def halved(x: Any) -> bool:
    """Whether numbers of less than 32 bits are stored."""
    dtype = jnp.result_type(x)
    return bool(jnp.issubdtype(dtype, jnp.floating)) and jnp.finfo(dtype).bits < 32


def resolved(x: jax.Array, dtype: Any) -> jax.Array:
    """x, stored as `dtype`, without the zeros that half precision makes: t = eps / 2, its rounding error of 1, instead.

    A sum of two numbers of 8 bits is exactly 0 once in some 250 times. By R = z g each layer that reads it would send
    0, and g be lost to all that lies below; by R = t g, which the layer that made it divides by t, it is not.
    """
    return jnp.where(x == 0, float(jnp.finfo(dtype).eps) / 2, x)


def stabilise(z: jax.Array, epsilon: Any) -> jax.Array:
    """z + epsilon * sign(z), with sign(0) = +1 (Bach et al. 2015, eq. 58)."""

    def real(z: jax.Array, epsilon: jax.Array) -> jax.Array:
        epsilon = epsilon.astype(z.dtype)
        return z + jnp.where(z >= 0, epsilon, -epsilon)

    return by_parts(real, z, jnp.asarray(epsilon))


def divide(r: jax.Array, z: jax.Array) -> jax.Array:
    """r / z, and 0 where z is 0: a unit without contributions sends no messages."""

    def real(r: jax.Array, z: jax.Array) -> jax.Array:
        zero = z == 0
        return jnp.where(zero, 0, r / jnp.where(zero, 1, z))

    return by_parts(real, r, z)
