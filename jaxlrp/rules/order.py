"""When passes are computed, in a program that is compiled whole for a CPU.

Late: XLA starts what it can as soon as it can, and keeps it. What a rule makes of parameters and inputs alone, from
sign-split kernels to whole denominators, it would make during the forward pass, for all layers, before any relevance
comes to use it up.

One after another: of a convolution whose kernels `jax.vmap` made many, one for each gamma, JAX makes one of groups, at
which XLA is slow.

An eager call has no order but its own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero

from .._compat import varying


def compiled() -> bool:
    """Whether what is computed here becomes part of a program: not so in an eager call, nor in `jax.vmap` of one."""
    return isinstance(jnp.zeros(()), jax.core.Tracer)


def sharded(*arrays: jax.core.ShapedArray) -> bool:
    """Whether arrays, of these types, lie on several devices by their type (explicit sharding)."""
    return any(s is not None for a in arrays for s in a.sharding.spec)


def late(r: jax.Array) -> jax.Array | None:
    """0, which XLA can know only when it knows r: added to what is to be made then. None where it can be made at once.

    One number of r is enough, and the same one for all that `jax.vmap` runs at a time, so that what is shared stays so.
    """
    spread = sharded(jax.typeof(r)) or varying(jax.typeof(r))
    if jax.default_backend() != "cpu" or spread or jnp.iscomplexobj(r) or not r.size:
        return None
    return _late(lax.stop_gradient(r))


@jax.custom_batching.custom_vmap
@jax.jit
def _late(r: jax.Array) -> jax.Array:
    # A tanh is evaluated once. Anything cheaper XLA would write, with all that r is made of, into each loop that adds.
    first = lax.slice(r, [0] * r.ndim, [1] * r.ndim).reshape(())
    return jnp.tanh((first > jnp.inf).astype(r.dtype))


@_late.def_vmap
def _(size: int, batched: list[bool], r: jax.Array) -> tuple[jax.Array, bool]:
    zero = late(r)
    return jnp.zeros((), r.dtype) if zero is None else zero, False


def kernel_by_kernel(product: Callable[[jax.Array, jax.Array], jax.Array]) -> Callable[..., jax.Array]:
    """`product(s, kernel)`, linear in each; of several kernels, as `jax.vmap` makes them, one after another.

    Its derivatives are those of `product`: of several kernels, as JAX has them.
    """

    @jax.custom_jvp
    def pulled(s: jax.Array, kernel: jax.Array) -> jax.Array:
        return mapped(s, kernel)

    def derivative(primals: tuple[jax.Array, ...], tangents: tuple[Any, ...]) -> tuple[jax.Array, jax.Array]:
        (s, kernel), (ds, dkernel) = primals, tangents
        terms = [product(ds, kernel)] if not isinstance(ds, SymbolicZero) else []
        terms += [product(s, dkernel)] if not isinstance(dkernel, SymbolicZero) else []
        return pulled(s, kernel), sum(terms[1:], terms[0])

    pulled.defjvp(derivative, symbolic_zeros=True)

    @jax.custom_batching.custom_vmap
    def mapped(s: jax.Array, kernel: jax.Array) -> jax.Array:
        return product(s, kernel)

    @mapped.def_vmap
    def _(size: int, batched: list[bool], s: jax.Array, kernel: jax.Array) -> tuple[jax.Array, bool]:
        if not batched[1]:
            return kernel_by_kernel(jax.vmap(product, (0, None)))(s, kernel), True
        if not batched[0]:
            return lax.map(lambda w: pulled(s, w), kernel), True
        return lax.map(lambda both: pulled(*both), (s, kernel)), True

    return pulled
