"""`shard_map`: a model spread over devices by batch, units or heads has the relevance of the same model on one."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import PartitionSpec as P

import nets
from devices import BATCH, ROWS, SPECS, TENSOR, VMA, B, C, U, V, W, X, deep, mlp, sharded, tensor_parallel
from jaxlrp import Composite, composites, lrp, plan, rules, select, value_and_lrp
from nets import LOCAL, close, draw, explained, quick_compilation  # noqa: F401


@VMA
def test_tensor_parallel_for_every_rule(check_vma):
    """The second layer is one Op with the sum over devices in it, so that rules that split signs see whole sums."""
    args = X, W, B, V, C, U
    f = sharded(partial(deep, lambda y: lax.psum(y, "d")), SPECS, P(), check_vma)
    right = explained(partial(deep, lambda y: y), *args, rows=LOCAL.values(), target=1)
    close(explained(f, *args, rows=LOCAL.values(), target=1), right)
    assert [row.kind for row in plan(f, nets.SOME[0])(*args)] == ["dense", "activation", "dense", "activation", "dense"]


def convolutional(total, x, kernel, wide, scale, bias):
    """The second convolution's channels are added up over devices, a BatchNorm and a bias follow."""
    x = jax.nn.relu(nets.conv(x, kernel))
    return jax.nn.relu(total(nets.conv(x, wide)) * lax.rsqrt(scale**2 + 1) + bias)


@VMA
def test_channel_parallel_for_every_rule(check_vma):
    args = draw(11, 2, 4, 4, 3), draw(12, 3, 3, 3, 8), draw(13, 3, 3, 8, 2), draw(14, 2), draw(15, 2)
    ins = P(), P(None, None, None, "d"), P(None, None, "d"), P(), P()
    f = sharded(partial(convolutional, lambda y: lax.psum(y, "d")), ins, P(), check_vma)
    got, right = (explained(g, *args, rows=LOCAL.values()) for g in (f, partial(convolutional, lambda y: y)))
    close(got, right)
    assert [row.kind for row in plan(f, nets.SOME[0])(*args)] == ["conv", "activation"] * 2


@VMA
def test_batch_parallel_for_every_rule(check_vma):
    right = explained(mlp, X, W, V, rows=LOCAL.values(), target=2)
    close(explained(sharded(mlp, BATCH, P("d"), check_vma), X, W, V, rows=LOCAL.values(), target=2), right)


@VMA
@pytest.mark.parametrize("specs, f", [(BATCH, mlp), (TENSOR, tensor_parallel)], ids=["batch", "tensor"])
def test_against_the_gradient(check_vma, specs, f):
    """Without biases, Zero is gradient x input, which JAX gives for the model on one device."""
    y, pull = jax.vjp(lambda x: mlp(x, W, V), X)
    gradient = pull(jnp.ones_like(y))[0]
    value, relevance = value_and_lrp(sharded(f, specs, P("d") if f is mlp else P(), check_vma), ROWS[0])(X, W, V)
    close((value, relevance), (y, X * gradient))


@rules.rule
class Forgetful(rules.Rule):
    """In proportion, of the relevance that this device holds."""

    def propagate(self, layer, relevance):
        return (layer.inputs[0] * rules.divide(relevance, layer.output),)


@VMA
def test_psum_shares_relevance_out(check_vma):
    """Each device gets its share of all relevance; forgetting either is wrong by a factor, without a sign of it."""
    f = sharded(lambda x: lax.psum(jax.nn.relu(x), "d"), P("d"), P(), check_vma)
    value, relevance = value_and_lrp(f, ROWS[0])(X)
    close((value, relevance), (jax.nn.relu(X).reshape(4, 2, 8).sum(0), jax.nn.relu(X)))
    rule, factor = (rules.Pass(), 4) if check_vma else (Forgetful(), 1 / 4)
    wrong = lrp(f, Composite([(select.kind("reduce"), rule)]))(X)
    np.testing.assert_allclose(wrong.sum(), factor * relevance.sum(), rtol=1e-12)


@VMA
def test_tokens(check_vma):
    """Ids by batch, explained from without and on each device; and a table of which each device has some rows."""
    ids, table = jnp.asarray(np.random.default_rng(7).integers(0, 8, (8, 5))), X

    def f(embed, ids, table, v):
        return jax.nn.relu(embed(table, ids)).mean(1) @ v

    def part(table, ids):
        own = ids - 2 * lax.axis_index("d")
        return lax.psum(jnp.where(((own >= 0) & (own < 2))[..., None], table[jnp.clip(own, 0, 1)], 0.0), "d")

    whole = partial(f, lambda table, ids: table[ids])
    right = explained(whole, ids, table, U, rows=ROWS)
    for g, ins, out in ((whole, BATCH, P("d")), (partial(f, part), (P(), P("d"), P()), P())):
        close(explained(sharded(g, ins, out, check_vma), ids, table, U, rows=ROWS), right)
    close(jax.jit(sharded(lrp(whole, ROWS[1]), BATCH, P("d"), check_vma))(ids, table, U), right[1][1])


@VMA
def test_attention_by_heads(check_vma):
    """Each device has a head; it is one Op there too."""
    x, out = draw(8, 2, 6, 8), draw(9, 4, 4, 5)
    weights = draw(10, 3, 8, 16)

    def f(total, x, weights, out):
        q, k, v = ((x @ w).reshape(*x.shape[:2], -1, 4) for w in weights)
        return total(jnp.einsum("bthd,hdo->bto", jax.nn.dot_product_attention(q, k, v), out))

    ins = P(), P(None, None, "d"), P("d")
    g, whole = sharded(partial(f, lambda y: lax.psum(y, "d")), ins, P(), check_vma), partial(f, lambda y: y)
    rows = ROWS[1], composites.attnlrp(), composites.cp_lrp()
    close(explained(g, x, weights, out, rows=rows), explained(whole, x, weights, out, rows=rows), 1e-11)
    assert [row.kind for row in plan(g, ROWS[1])(x, weights, out)] == ["dense"] * 3 + ["attention", "dense"]


@VMA
def test_batch_norm_in_training(check_vma):
    """With statistics of the whole batch, as Flax computes them over devices."""
    net = nn.Sequential([nn.Dense(6), nn.BatchNorm(use_running_average=False, axis_name="d"), nn.Dense(3)])
    alone = nn.Sequential([nn.Dense(6), nn.BatchNorm(use_running_average=False), nn.Dense(3)])
    variables = nets.randomise(jax.eval_shape(alone.init, jax.random.key(0), X))

    def run(net, variables, x):
        return net.apply(variables, x, mutable=["batch_stats"])[0]

    rows = [
        Composite([(select.kind("batch_norm"), rule)]) + ROWS[1] for rule in (rules.Pass(), rules.ConstantStatistics())
    ]
    f = sharded(partial(run, net), (P(), P("d")), P("d"), check_vma)
    assert [row.kind for row in plan(f, rows[0], argnums=1)(variables, X)] == ["dense", "batch_norm", "dense"]
    got, right = (explained(g, variables, X, rows=rows, argnums=1) for g in (f, partial(run, alone)))
    close(got, right, 1e-10)
