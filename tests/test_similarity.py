"""BiLRP against what the definition says, in sums written out."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import primitives

import nets
from jaxlrp import bilrp, composites, rules, value_and_lrp
from nets import close, draw, linear, quick_compilation  # noqa: F401

X, Y = draw(1, 4), draw(2, 4)
LRP_0 = linear(rules.Zero())
TABLE, MIX = draw(3, 9, 4), draw(4, 4, 5)
IDS = np.array([[1, 5, 2], [8, 0, 3]]), np.array([[7, 7, 1, 4], [2, 6, 0, 5]])


def words(mix, ids):
    """(n, T) -> (n, T, 5)"""
    return jnp.tanh(TABLE[ids] @ mix)


def embed(mix, ids):
    return words(mix, ids).sum(1)


def test_linear_map():
    """s = x W W' y', so the pair (i, j) has x_i (W W')_ij y_j."""
    w = draw(5, 4, 7)
    close(bilrp(lambda x: x @ w, LRP_0)(X, Y), X[:, None] * (w @ w.T) * Y)


def test_relu_network_without_biases():
    """LRP-0 is gradient x input of every dimension, and nothing is lost: the pairs sum to the similarity."""
    f = partial(nets.mlp, [(w, 0 * b) for w, b in nets.mlp_parameters(4, 16, 16, 5)])
    pairs = jax.jit(bilrp(f, LRP_0))(X, Y)
    jacobian = jax.jacobian(f)
    close(pairs, (X * jacobian(X)).T @ (Y * jacobian(Y)))
    close(pairs.sum(), f(X) @ f(Y))


@pytest.mark.parametrize("name, batch_size", [("epsilon", 1), ("epsilon", 2), ("alpha-beta", 3), ("alpha-beta", 64)])
def test_one_explanation_for_each_dimension(name, batch_size):
    f, rule = partial(nets.mlp, nets.mlp_parameters(4, 6, 5)), nets.LOCAL[name]
    each = jax.jit(lambda x: [value_and_lrp(f, rule, target=m)(x)[1] for m in range(5)])
    right = sum(jnp.outer(a, b) for a, b in zip(each(X), each(Y), strict=True))
    close(jax.jit(bilrp(f, rule, batch_size=batch_size))(X, Y), right)


def test_token_ids_of_several_pairs():
    """Sums of words share out what each word adds; every pair of sentences is apart, and they may differ in length."""
    pairs = jax.jit(bilrp(embed, LRP_0, argnums=1))(MIX, *IDS)
    close(pairs, jnp.einsum("nim,njm->nij", *(words(MIX, ids) for ids in IDS)), 1e-7)  # a sum has an epsilon
    close(
        jax.jit(bilrp(lambda mix, ids: embed(mix, ids[None])[0], LRP_0, argnums=-1))(MIX, *(i[1] for i in IDS)),
        pairs[1],
    )


def test_pool():
    """Patches of an image instead of its pixels: the same linear map of either side of the pairs."""
    kernel, x, y = draw(7, 3, 3, 2, 5), draw(8, 4, 6, 2), draw(9, 4, 6, 2)
    f = lambda image: jax.nn.relu(nets.conv(image[None], kernel)).sum((0, 1, 2))
    patches = lambda relevance: relevance.reshape(2, 2, 3, 2, 2).sum((1, 3, 4))
    matrix = jax.jacobian(patches)(x).reshape(6, 48)
    pixels = jax.jit(bilrp(f, composites.epsilon()))(x, y).reshape(48, 48)
    pooled = jax.jit(bilrp(f, composites.epsilon(), pool=patches))(x, y)
    assert pooled.shape == (2, 3, 2, 3)
    close(pooled.reshape(6, 6), matrix @ pixels @ matrix.T)


def test_one_forward_pass_for_all_dimensions():
    """And one program for two sentences of one length."""

    def count(jaxpr) -> int:
        inner = [getattr(v, "jaxpr", v) for e in jaxpr.eqns for v in jax.tree.leaves(list(e.params.values()))]
        here = sum(e.primitive is primitives.tanh_p for e in jaxpr.eqns)
        return here + sum(count(v) for v in inner if hasattr(v, "eqns"))

    run = bilrp(partial(embed, MIX), LRP_0, batch_size=2)
    assert count(jax.make_jaxpr(run)(*IDS).jaxpr) == 2
    assert count(jax.make_jaxpr(run)(IDS[0], IDS[0] + 1).jaxpr) == 1


def test_numbers_of_the_composite_are_arguments():
    f = partial(nets.mlp, nets.mlp_parameters(4, 6, 5))
    traced = []
    run = jax.jit(lambda composite: traced.append(1) or bilrp(f, composite)(X, Y))
    small, large = (run(composites.epsilon(number)) for number in (1e-6, 0.5))
    assert len(traced) == 1 and not np.allclose(small, large)
    close(large, jax.jit(bilrp(f, composites.epsilon(0.5)))(X, Y))
