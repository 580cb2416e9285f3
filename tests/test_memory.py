"""What an explanation keeps from the forward pass, by XLA's own account of the compiled program."""

import ast
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.ad_checkpoint import checkpoint_policies

from jaxlrp import composites, value_and_lrp

WIDE, INNER, DEPTH = 64, 512, 12
X = jax.ShapeDtypeStruct((256, WIDE), jnp.float32)
PARAMS = tuple(jax.ShapeDtypeStruct((DEPTH, *shape), jnp.float32) for shape in ((WIDE, INNER), (INNER, WIDE)))
INSIDE = 4 * X.shape[0] * INNER * DEPTH  # bytes of one value inside the block, of all iterations


def block(x, weights):
    v, w = weights
    return x + jax.nn.relu(x @ v) @ w, None


def stacked(block):
    return lambda params, x: jax.lax.scan(block, x, params)[0]


def temporaries(fun):
    return jax.jit(fun).lower(PARAMS, X).compile().memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("composite", [composites.epsilon(), composites.epsilon_plus(), composites.attnlrp()])
def test_a_checkpoint_recomputes_instead_of_storing(composite):
    """As for the gradient: `jax.checkpoint`, by its policy, drops what lies inside a block.

    In a loop: elsewhere XLA for CPU merges the second computation with the first.
    """
    kept, recomputed, dots = (
        temporaries(value_and_lrp(stacked(each), composite, 1))
        for each in (
            block,
            jax.checkpoint(block),
            jax.checkpoint(block, policy=checkpoint_policies.dots_with_no_batch_dims_saveable),
        )
    )
    assert recomputed < 0.5 * kept
    assert INSIDE < dots < 0.7 * kept  # the products are saved, the activation between them is not
    assert recomputed < INSIDE


def test_in_the_order_of_the_readme_nothing_is_computed_too_early():
    """By default XLA for CPU computes z+ of all layers as soon as it can, and keeps it."""

    def layers(windows, x):
        spec = {"dimension_numbers": ("NHWC", "HWIO", "NHWC"), "feature_group_count": 16}
        for w in windows:
            x = jax.lax.conv_general_dilated(x, w, (1, 1), "SAME", **spec)
        return x.mean((1, 2))

    (option,) = re.findall(
        r'compiler_options=({".*"})', (Path(__file__).parent.parent / "README.md").read_text("utf-8")
    )
    shapes = [jax.ShapeDtypeStruct((3, 3, 1, 16), jnp.float32)] * 8, jax.ShapeDtypeStruct((4, 32, 32, 16), jnp.float32)
    lowered = jax.jit(value_and_lrp(layers, composites.epsilon_plus(), 1)).lower(*shapes)
    early, late = (lowered.compile(o).memory_analysis().temp_size_in_bytes for o in (None, ast.literal_eval(option)))
    assert late < 0.6 * early
