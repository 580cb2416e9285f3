"""Every fact about JAX versions, and the primitives that no public name reaches. Aim: almost empty."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.layout import Layout, with_layout_constraint
from jax.extend import core as jex
from jax.extend.core import primitives as p
from jax.sharding import AbstractMesh, AxisType, use_abstract_mesh
from jax.sharding import PartitionSpec as P


def some(place: Any, *names: str) -> tuple[Any, ...]:
    """Those of these primitives that this release has."""
    return tuple(getattr(place, name) for name in names if hasattr(place, name))


def _made_by(fun: Callable, *shapes: tuple[int, ...]) -> Any:
    """The primitive of the last equation of `fun`; tracing starts no backend."""
    return _traced(fun, *shapes)[-1].primitive


def _traced(fun: Callable, *shapes: tuple[int, ...]) -> Any:
    """The equations of `fun`; in a thread of its own, as who imports this may be tracing, or have set a mesh."""
    args = [jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes]
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(jax.make_jaxpr(fun), *args).result().eqns


def _on_each_device(x: jax.Array) -> Any:
    total, gathered = lax.psum(x, "i"), lax.all_gather(x, "i", tiled=True, to="invarying")
    return lax.pcast(total, "i", to="varying"), lax.psum_scatter(x, "i", tiled=True), gathered


def _reshard(x: jax.Array) -> jax.Array:
    with use_abstract_mesh(AbstractMesh((1,), ("i",), axis_types=(AxisType.Explicit,))):
        return jax.sharding.reshard(x, P())


def _batched_by_hand() -> Callable:
    fun = jax.custom_batching.custom_vmap(lambda x: x)
    fun.def_vmap(lambda size, batched, x: (x, batched[0]))
    return fun


def _remembering_less(x: jax.Array) -> jax.Array:
    fun = jax.custom_vjp(lambda x: x)
    fun.defvjp(lambda x: (x, None), lambda _, g: (g,), optimize_remat=True)
    return jax.vjp(fun, x)[0]


def _referring(x: jax.Array) -> jax.Array:
    reference = jax.new_ref(x)
    reference[...] = x
    return reference[...]


# in jax 0.10 there are stack and unstack, in 0.12 tile too
MOVES = (
    *some(lax, "stack_p", "unstack_p", "tile_p", "stage_p"),
    _made_by(_reshard, ()),
    _made_by(lambda x: with_layout_constraint(x, Layout((0, 1))), (1, 1)),
)
ACTIVATIONS = some(p, "log2_p", "one_minus_square_p")
POLYNOMIAL = some(p, "polynomial_p")
COMPARISONS = some(p, "eq_to_p", "le_to_p", "lt_to_p")
RAGGED_DOT = _made_by(lambda x, w: lax.ragged_dot(x, w, jnp.ones(1, jnp.int32)), (1, 1), (1, 1, 1))
# functions in a program, with the parameter that holds what they compute
BODIES = ("jaxpr", "call_jaxpr", "callee", "call", "fwd_jaxpr")
CALLS = (
    _made_by(lambda x: lax.composite(lambda x: x, name="jaxlrp.any")(x), ()),
    _made_by(_batched_by_hand(), ()),
    _made_by(_remembering_less, ()),
    _made_by(lambda x: jax.custom_derivatives.linear_call(lambda _, x: x, lambda _, x: x, (), x), ()),
)
# what an equation that makes, reads or writes a mutable array says of itself
REFERENCE = tuple({type(f) for e in _traced(_referring, ()) for f in e.effects})


# of shard_map, and what it is made of
_mesh = AbstractMesh((1,), ("i",), axis_types=(AxisType.Auto,))
(_mapped,) = _traced(jax.shard_map(_on_each_device, mesh=_mesh, in_specs=P("i"), out_specs=(P("i"), P("i"), P())), (1,))
shard_map_p = _mapped.primitive
psum_invariant_p, all_gather_invariant_p, pvary_p, reduce_scatter_p = (
    e.primitive for e in _mapped.params["jaxpr"].eqns
)


def varying(aval: Any) -> frozenset[Any]:
    """The mesh axes along which a value may differ between devices, by its type (under `check_vma`)."""
    return aval.mat.varying if hasattr(aval, "mat") else getattr(aval, "vma", frozenset())


def differentiable(eqn: Any) -> Any:
    """`eqn`, or what has its derivative: jax 0.10 is off by a factor at all_gather(to="invarying") without types."""
    if eqn.primitive is all_gather_invariant_p and not varying(eqn.invars[0].aval):
        return eqn.replace(primitive=p.all_gather_p, params={**eqn.params, "axis_index_groups": None})
    return eqn


def vary(x: Any, axes: Any) -> Any:
    """`x` as a value that may differ along these mesh axes."""
    missing = tuple(a for a in axes if a not in varying(jax.typeof(x))) if axes else ()
    return lax.pcast(x, missing, to="varying") if missing else x


def over_devices(x: Any, axes: Any = ()) -> Any:
    """`x` summed over all mesh axes along which it may differ but these."""
    others = tuple(a for a in varying(jax.typeof(x)) if a not in axes)
    return lax.psum(x, others) if others else x


def alike(x: Any, axes: Any) -> Any:
    """`x` as a value that may differ along these mesh axes, and is summed over all others."""
    return vary(over_devices(x, axes), axes)


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
