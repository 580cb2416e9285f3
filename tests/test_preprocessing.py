"""What lies between the explained input and its first layers: relevance reaches the pixels, whatever their values.

A mean and a factor that one layer alone reads belong to that layer. Where several layers share them, or something that
cannot join lies between, they are Ops of their own. Epsilon and its kin send them nothing where x - mean is 0, and in
proportion is right; behind the rules of a first layer relevance passes them, for R x / (x - mean) would explode.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jaxlrp import Composite, composites, lrp, plan, rules, select, value_and_lrp
from nets import close, draw, quick_compilation  # noqa: F401

IMAGE = np.asarray(jax.random.uniform(jax.random.key(0), (1, 8, 8, 3), np.float64)) + 1e-7
KERNEL = draw(1, 3, 3, 3, 4)
HALVES = KERNEL[..., :2], KERNEL[..., 2:]


def conv(x, w, padding="SAME"):
    return lax.conv_general_dilated(x, w, (1, 1), padding, dimension_numbers=("NHWC", "HWIO", "NHWC"))


def standardise(x):
    return (x - 0.5) / 0.25


SHARED: dict[str, tuple[Callable, Callable]] = {
    "two stems": (
        lambda x: jnp.concatenate([conv(h := standardise(x), HALVES[0]), conv(h, HALVES[1])], -1),
        lambda x: conv(standardise(x), KERNEL),
    ),
    "a crop after it": (
        lambda x: conv(standardise(x)[:, 1:-1], KERNEL, "VALID"),
        lambda x: conv(standardise(x[:, 1:-1]), KERNEL, "VALID"),
    ),
    "reflection": (
        lambda x: conv(jnp.pad(standardise(x), ((0, 0), (1, 1), (1, 1), (0, 0)), mode="reflect"), KERNEL, "VALID"),
        lambda x: conv(standardise(jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), mode="reflect")), KERNEL, "VALID"),
    ),
}


@pytest.mark.parametrize("flat", [rules.Flat(), rules.WSquare()], ids=["flat", "w2"])
@pytest.mark.parametrize("name", SHARED)
def test_what_several_layers_share_passes(name: str, flat: rules.Rule):
    """Rules that look at the weights alone give what they give where the preprocessing has joined the layer."""
    composite = Composite([(select.first("conv"), flat)])
    split, joined = (lrp(f, composite)(IMAGE) for f in SHARED[name])
    close(split, joined, 1e-9)


@pytest.mark.parametrize("name", SHARED)
def test_relevance_stays_of_its_magnitude(name: str):
    """Also at a pixel that the mean makes nearly zero; whatever arrives at the first layers arrives at the pixels."""
    image = IMAGE.copy()
    image[0, 2, 2] = 0.5 + 1e-9
    split, joined = SHARED[name]
    for composite in (composites.epsilon_plus_flat(), composites.epsilon_gamma_box(-2.0, 2.0), composites.epsilon()):
        relevance, right = lrp(split, composite)(image), lrp(joined, composite)(image)
        assert abs(relevance).max() < 20 * abs(right).max()


def test_a_box_in_other_units_is_said():
    box = composites.epsilon_gamma_box(0.0, 1.0)
    split, joined = SHARED["two stems"]
    table = plan(split, box)(IMAGE)
    assert len(table.notes) == 2 and all("units" in note and "scale" in note for note in table.notes), str(table)
    assert not plan(joined, box)(IMAGE).notes
    # a row of one's own for the preprocessing is left as it is
    mine = Composite([(select.kind("scale"), rules.Epsilon(0.1))]) + box
    assert isinstance(plan(split, mine)(IMAGE)[0].rule, rules.Epsilon)


RAW: dict[str, Callable] = {
    "resize": lambda x: jax.image.resize(x, (1, 16, 16, 3), "bilinear"),
    "shrink": lambda x: jax.image.resize(x, (1, 4, 4, 3), "cubic"),
    "flip": lambda x: x[:, :, ::-1],
    "channels": lambda x: x[..., ::-1],
    "crop": lambda x: x[:, 1:7, 2:],
}


@pytest.mark.parametrize("prepare", RAW.values(), ids=RAW)
def test_first_layer_behind_a_move_or_resize(prepare: Callable):
    """It is still the first, and conserves: an interpolation hands relevance on by its weights, which sum to one."""
    f = lambda x: jax.nn.relu(conv(prepare(x), KERNEL))
    table = plan(f, composites.epsilon_plus_flat())(IMAGE)
    (first,) = (row for row in table if row.kind == "conv")
    assert isinstance(first.rule, rules.Flat), str(table)
    value, relevance = value_and_lrp(f, composites.epsilon_plus_flat())(IMAGE)
    np.testing.assert_allclose(relevance.sum(), value.sum(), rtol=1e-7)


def test_weights_written_into_the_program_are_a_layer():
    """No interpolation: a matrix of ones or of random numbers is dense; one whose columns are means is a resize."""
    x = draw(2, 3, 6)
    kind = lambda f: [row.kind for row in plan(f, composites.epsilon())(x) if row.kind != "structural"]
    assert kind(lambda x: x @ jnp.ones((6, 4))) == ["dense"]
    assert kind(lambda x: x @ jax.random.normal(jax.random.key(0), (6, 4))) == ["dense"]
    assert kind(lambda x: x @ jnp.full((6, 2), 1 / 6)) == ["resize"]


def test_long_chains_of_literals_are_quick():
    """Each equation is looked at once, however often it is read."""

    @jax.jit
    def f(x):
        c = jnp.arange(36.0).reshape(6, 6) / 36
        for _ in range(60):
            c = c * c - c
        return x @ c

    assert [row.kind for row in plan(f, composites.epsilon())(draw(2, 3, 6))] == ["dense"]


def test_bias_that_varies_by_position():
    """Of a mapped convolution, or untied: the bias is the layer's, whatever axes it varies along."""
    x, w, b = draw(3, 2, 5, 5, 3), draw(4, 4, 3, 3, 3, 2), draw(5, 4, 2)
    heads = lambda x, w, b: jax.vmap(lambda w, b: conv(x, w) + b)(w, b)
    assert [row.kind for row in plan(heads, composites.epsilon_plus())(x, w, b)][-1] == "conv"
    R = draw(6, 4, 2, 5, 5, 2)
    mapped = lrp(heads, composites.epsilon_plus(), target=lambda y: R)(x, w, b)
    single = lambda w, b, r: lrp(lambda x: conv(x, w) + b, composites.epsilon_plus(), target=lambda y: r)(x)
    close(mapped, sum(single(w[i], b[i], R[i]) for i in range(4)), 1e-9)


def test_names_leave_out_what_jax_writes():
    """A transformation and an einsum's formula name no layer."""
    w = draw(7, 3, 4)
    assert plan(lambda x: jnp.einsum("nd,dk->nk", x, w), composites.epsilon())(draw(8, 2, 3))[0].name == "dense[0]"
    assert plan(jax.vmap(lambda x: x @ w), composites.epsilon())(draw(8, 2, 3))[0].name == "dense[0]"


def test_layers_of_a_network_that_splits():
    """A split has several outputs, none of which is the layer's: it is left out, everything else is there."""
    w, v = draw(9, 6, 6), draw(10, 3, 2)
    f = lambda x: sum(jnp.split(jax.nn.relu(x @ w), 2, -1)) @ v
    _, _, seen = value_and_lrp(f, composites.epsilon(), layers=select.everything())(draw(11, 4, 6))
    assert {"dense[0]", "relu", "add", "dense[1]"} <= seen.keys()
