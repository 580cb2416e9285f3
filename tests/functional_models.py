"""What the tests of models with parameters inside share: images, layers by name, relevance by two composites."""

import jax
import jax.numpy as jnp

import models
from jaxlrp import composites, plan, value_and_lrp

COMPOSITES = (composites.epsilon(0.1), composites.epsilon_plus_flat())
IMAGES = jnp.asarray(models.images())


def explained(f, argnums, *args):
    """The value and, for each composite, the relevance: one compiled program."""
    return jax.jit(lambda *args: [value_and_lrp(f, c, argnums)(*args) for c in COMPOSITES])(*args)


def named(f, params, *args, argnums=1):
    """{kind: the names of its layers} for what parameters name."""
    found: dict[str, list[str]] = {}
    for row in plan(f, COMPOSITES[0], argnums)(params, *args):
        if row.kind in ("dense", "conv", "batch_norm", "scale"):
            found.setdefault(row.kind, []).append(row.name)
    return found
