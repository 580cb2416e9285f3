"""Every fact about JAX versions. Aim: almost empty."""

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
from jax import lax
from jax.extend import core as jex
from jax.sharding import AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P

# primitives that only move elements, of which a release may have some (jax 0.10 has stack, 0.12 all)
MOVES = tuple(getattr(lax, name) for name in ("stack_p", "unstack_p", "tile_p") if hasattr(lax, name))


def _primitives() -> tuple[Any, ...]:
    """Those of `shard_map` that JAX keeps without a public name, read off a program that is never run."""

    def on_each(x: jax.Array) -> Any:
        return lax.pcast(lax.psum(x, "i"), "i", to="varying"), lax.psum_scatter(x, "i", tiled=True)

    mesh = AbstractMesh((1,), ("i",), axis_types=(AxisType.Auto,))
    mapped = jax.shard_map(on_each, mesh=mesh, in_specs=P("i"), out_specs=P("i"))
    (outer,) = jax.make_jaxpr(mapped)(jax.ShapeDtypeStruct((1,), "float32")).eqns
    return outer.primitive, *(e.primitive for e in outer.params["jaxpr"].eqns)


# in a thread of its own: who imports this may be tracing, or have set a mesh
with ThreadPoolExecutor(1) as _thread:
    shard_map_p, psum_invariant_p, pvary_p, reduce_scatter_p = _thread.submit(_primitives).result()


def varying(aval: Any) -> frozenset[Any]:
    """The mesh axes along which a value may differ between devices, by its type (under `check_vma`)."""
    return aval.mat.varying if hasattr(aval, "mat") else getattr(aval, "vma", frozenset())


def vary(x: Any, axes: Any) -> Any:
    """`x` as a value that may differ along these mesh axes."""
    missing = tuple(a for a in axes if a not in varying(jax.typeof(x))) if axes else ()
    return lax.pcast(x, missing, to="varying") if missing else x


def summed(x: Any, axes: Any = ()) -> Any:
    """`x` summed over all mesh axes along which it may differ but these."""
    others = tuple(a for a in varying(jax.typeof(x)) if a not in axes)
    return lax.psum(x, others) if others else x


def alike(x: Any, axes: Any) -> Any:
    """`x` as a value that may differ along these mesh axes, and is summed over all others."""
    return vary(summed(x, axes), axes)


def scan_arity(params: dict[str, Any]) -> tuple[int, int]:
    """How many constants and carries a scan equation has (jax >= 0.11 keeps them in flat trees)."""
    if "num_consts" in params:
        return params["num_consts"], params["num_carry"]
    consts, carry, _ = params["ft_in"].unpack()
    return len(list(consts)), len(list(carry))


def while_arity(params: dict[str, Any]) -> tuple[int, int]:
    """How many constants the condition and the body of a while equation have."""
    return params["cond_nconsts"], params["body_nconsts"]


def closed(jaxpr: Any) -> Any:
    """`jaxpr` as a closed one (jax >= 0.11 has one class for both)."""
    return jaxpr if isinstance(jaxpr, jex.ClosedJaxpr) and hasattr(jaxpr, "consts") else jex.ClosedJaxpr(jaxpr, ())
