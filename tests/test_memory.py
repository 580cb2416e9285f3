"""What an explanation keeps from the forward pass, by XLA's own account of the compiled program."""

import jax
import jax.numpy as jnp
import pytest
from jax.ad_checkpoint import checkpoint_policies

from jaxlrp import composites, value_and_lrp
from jaxlrp.rules import order

WIDE, INNER, DEPTH = 64, 512, 12
X = jax.ShapeDtypeStruct((256, WIDE), jnp.float32)
PARAMS = tuple(jax.ShapeDtypeStruct((DEPTH, *shape), jnp.float32) for shape in ((WIDE, INNER), (INNER, WIDE)))
INSIDE = 4 * X.shape[0] * INNER * DEPTH  # bytes of one value inside the block, of all iterations


def block(x, weights):
    v, w = weights
    return x + jax.nn.relu(x @ v) @ w, None


def stacked(block):
    return lambda params, x: jax.lax.scan(block, x, params)[0]


def convolutions(windows, x):
    spec = ("NHWC", "HWIO", "NHWC")
    for w in windows:
        x = jax.nn.relu(jax.lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=spec))
    return x.mean((1, 2))


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


@pytest.mark.parametrize(
    "composite", [composites.epsilon_plus(), composites.epsilon_alpha2_beta1(), composites.epsilon_gamma_box(-1.0, 1.0)]
)
def test_nothing_is_computed_before_relevance_needs_it(composite, monkeypatch):
    """XLA for CPU would compute z+ of all layers as soon as it can, and keep it."""

    shapes = [jax.ShapeDtypeStruct((3, 3, 16, 16), jnp.float32)] * 8, jax.ShapeDtypeStruct((4, 32, 32, 16), jnp.float32)

    def needed():
        explain = value_and_lrp(lambda windows, x: convolutions(windows, x), composite, 1)
        return jax.jit(explain).lower(*shapes).compile().memory_analysis().temp_size_in_bytes

    late = needed()
    monkeypatch.setattr(order, "late", lambda relevance: None)
    assert late < 0.6 * needed()


def test_kernels_with_one_sign_are_not_kept():
    window = jax.ShapeDtypeStruct((3, 3, 128, 128), jnp.float32)
    explain = jax.jit(value_and_lrp(convolutions, composites.epsilon_plus(), 1))
    compiled = explain.lower([window] * 8, jax.ShapeDtypeStruct((1, 8, 8, 128), jnp.float32)).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 6 * 4 * window.size
