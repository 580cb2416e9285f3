"""Loops, maps and branches in the network: relevance is that of the unrolled network, example by example."""

from functools import cache, partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from jax import lax

import nets
from jaxlrp import lrp, value_and_lrp
from nets import LOCAL, close, draw, explained, quick_compilation  # noqa: F401
from programs import EPSILON, FOUR_LAYERS, LOOPS, MLP, ZERO, B, W, X, unrolled, variables_of

pytestmark = pytest.mark.smoke

plain_loop = cache(lambda: explained(unrolled, *FOUR_LAYERS, argnums=1))


@pytest.mark.parametrize("loop", LOOPS.values(), ids=LOOPS)
def test_loop_equals_unrolled(loop):
    close(explained(loop, *FOUR_LAYERS, argnums=1), plain_loop())


@pytest.mark.parametrize("name", ["scan-of-jit", "fori_loop"])
def test_loop_without_jit(name):
    close(value_and_lrp(LOOPS[name], nets.SOME[0], argnums=1)(*FOUR_LAYERS), plain_loop()[0])


def test_scan_equals_unrolled_for_every_rule():
    """And with layers that are no part of the loop on either side."""
    parameters, first, last = nets.mlp_parameters(5, 5, 5, 5), draw(11, 4, 5), draw(12, 5, 2)

    def f(loop, x):
        return jax.nn.relu(loop(parameters, jax.nn.relu(x @ first))) @ last

    scanned, right = (explained(partial(f, g), X, rows=LOCAL.values(), target=1) for g in (LOOPS["scan"], unrolled))
    close(scanned, right)


def test_recurrent_scan():
    """Data enters by the carry and at every step, and leaves by the carry and at every step."""
    w, u = draw(13, 4, 5), 0.5 * draw(14, 5, 5)

    def step(h, x):
        h = jnp.tanh(x @ w + h @ u)
        return h, h.sum(keepdims=True)

    def by_hand(xs):
        h, sums = xs[0] @ w, []
        for x in xs:
            h, s = step(h, x)
            sums.append(s)
        return h, jnp.concatenate(sums)

    def scanned(xs):
        h, sums = lax.scan(step, xs[0] @ w, xs)
        return h, sums[:, 0]

    close(explained(scanned, X), explained(by_hand, X))


def test_map_equals_batch():
    right = explained(MLP, X)
    close(explained(lambda x: lax.map(MLP, x), X), right)
    close(explained(lambda x: lax.map(MLP, x, batch_size=2), X), right)  # 3 examples: a batch and a rest


ROWS = {
    "dense": lambda x: x @ W[:3] + B,
    "weights left": lambda x: W[:3].T @ x,
    "softmax": jax.nn.softmax,
    "log_softmax": jax.nn.log_softmax,
    "products": lambda x: x[:, None] * x,
    "maximum": lambda x: x.max(keepdims=True),
    "convolution": lambda x: lax.conv(x[None, None], B[None, None, :3], (1,), "SAME")[0, 0],
}


@pytest.mark.parametrize("f", ROWS.values(), ids=ROWS)
def test_vmap_in_the_network_equals_a_python_loop(f):
    """Over columns, so that the batch axis is not in front."""
    R = draw(22, *jax.vmap(f, 1)(X).shape)
    batched, looped = lambda x: jax.vmap(f, 1)(x), lambda x: jnp.concatenate([f(x[:, i])[None] for i in range(4)])
    got, right = (explained(g, X, target=lambda y: R) for g in (batched, looped))
    close(got, right, 1e-7)


BRANCHES = (
    lambda x: jax.nn.relu(x @ W),
    lambda x: jnp.concatenate([x, x[:, :1]], 1) * B,
    lambda x: jnp.tanh(jax.nn.relu(x @ W + B) @ draw(15, 5, 5)),
)


@pytest.mark.parametrize("chosen", [0, 2])
def test_cond_takes_its_branch(chosen):
    """The predicate is a parameter, or computed from the data."""
    right = explained(BRANCHES[chosen], X)
    f = lambda x, p: lax.cond(p, BRANCHES[0], BRANCHES[2], x)
    close(explained(f, X, chosen == 0), right)
    close(explained(lambda x: f(x, (x**2).sum() * (1 - chosen) > 0), X), right)


def test_switch_takes_its_branch():
    f = jax.jit(lrp(lambda x, i: lax.switch(i, BRANCHES, x), EPSILON))
    right = jax.jit(lambda x: [lrp(branch, EPSILON)(x) for branch in BRANCHES])(X)
    for i, r in enumerate(right):
        close(f(X, jnp.asarray(i)), r)
    close(jax.vmap(f, (None, 0))(X, jnp.arange(3)), jnp.stack(right))


def test_cond_with_more_than_data():
    """Branches read parameters, and return integers too."""

    def f(x, w, on):
        y, n = lax.cond(on, lambda x, w: (x @ w, 1), lambda x, w: (x @ (2 * w), 2), x, w)
        return y * n

    close(lrp(f, ZERO)(X, W, jnp.asarray(False)), lrp(lambda x: x @ W * 4, ZERO)(X), 1e-6)


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return x + nn.relu(nn.Dense(4)(x)), None


class Scanned(nn.Module):
    block: type[nn.Module] = Block

    @nn.compact
    def __call__(self, x):
        layers = nn.scan(self.block, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
        return layers(name="layers")(x, None)[0]


class Unrolled(nn.Module):
    block: type[nn.Module] = Block

    @nn.compact
    def __call__(self, x):
        for i in range(3):
            x, _ = self.block(name=f"layers{i}")(x, None)
        return x


def test_flax_scan_and_remat():
    stacked = variables_of(Scanned(), X)
    each = {f"layers{i}": jax.tree.map(lambda v, i=i: v[i], stacked["params"]["layers"]) for i in range(3)}
    right = explained(Unrolled().apply, {"params": each}, X, argnums=1)
    close(explained(Unrolled(nn.remat(Block)).apply, {"params": each}, X, argnums=1), right)
    close(explained(Scanned().apply, stacked, X, argnums=1), right)
    close(explained(Scanned(nn.remat(Block, prevent_cse=False)).apply, stacked, X, argnums=1), right)
