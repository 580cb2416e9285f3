"""Every fact about JAX versions. Aim: almost empty."""

from typing import Any

from jax import lax
from jax.extend import core as jex

# primitives that only move elements, of which a release may have some (jax 0.10 has stack, 0.12 all)
MOVES = tuple(getattr(lax, name) for name in ("stack_p", "unstack_p", "tile_p") if hasattr(lax, name))


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
