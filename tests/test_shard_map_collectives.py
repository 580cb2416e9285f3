"""Collectives in `shard_map`: sums, gathers, permutations and maxima over devices have the relevance of one device."""

from functools import cache, partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import PartitionSpec as P

import nets
from devices import BATCH, ROWS, TENSOR, VMA, B, V, W, X, mlp, sharded, tensor_parallel
from jaxlrp import Composite, composites, lrp, plan, rewrite, rules, select
from jaxlrp.nn import local_response_norm
from nets import close, draw, explained, quick_compilation, same  # noqa: F401

RING = [(i, (i + 1) % 4) for i in range(4)]


class Program(NamedTuple):
    """What each device computes of x (8, 8), w (8, 16) and v (16, 8), where these are, and the same on one device."""

    device: object
    ins: tuple
    out: P
    plain: object


def ring(turn, x, w, v):
    """Every part of the batch passes every device."""
    total = hidden = jax.nn.relu(x @ w)
    for _ in range(3):
        hidden = turn(hidden)
        total = total + 0.5 * hidden
    return total @ v


def ring_in_scan(turn, x, w, v):
    def step(carry, _):
        hidden, total = carry
        return (turn(hidden), total + 0.5 * turn(hidden)), None

    hidden = jax.nn.relu(x @ w)
    return lax.scan(step, (hidden, hidden), None, length=3)[0][1] @ v


def mixed(x, w, v):
    """Each device makes its examples' part of what all examples give."""
    hidden = lax.all_gather(jax.nn.relu(x @ w), "d", tiled=True)
    return lax.dynamic_slice_in_dim(V[:8], 2 * lax.axis_index("d"), 2) @ hidden @ v


def gathered(x):
    """What all devices have, which types know."""
    return lax.all_gather(x, "d", tiled=True, to="invarying")


def all_to_all(x, w, v):
    """From examples to features and back, for a sum along all examples."""
    columns = jnp.cumsum(lax.all_to_all(x, "d", 1, 0, tiled=True), 0)
    return mlp(lax.all_to_all(columns, "d", 0, 1, tiled=True), w, v)


def softmax(x, w, v):
    z = x @ w
    e = jnp.exp(z - lax.pmax(lax.stop_gradient(z.max(-1, keepdims=True)), "d"))
    return lax.psum(e / lax.psum(e.sum(-1, keepdims=True), "d") @ v, "d")


def layer_norm(mean, total, x, w, v):
    z = x @ w
    centred = z - mean(z)
    return total(centred * lax.rsqrt(mean(centred**2) + 1e-5) @ v)


def mean(z):
    return z.mean(-1, keepdims=True)


FORWARD, BACK = lambda h: lax.ppermute(h, "d", RING), lambda h: jnp.roll(h, 2, 0)
SCATTER = partial(lax.psum_scatter, axis_name="d")
PROGRAMS = {
    "mean": Program(
        lambda x, w, v: lax.pmean(jax.nn.relu(x @ w).mean(0), "d") @ v,
        BATCH, P(), lambda x, w, v: jax.nn.relu(x @ w).mean(0) @ v,
    ),
    "all_gather": Program(mixed, BATCH, P("d"), lambda x, w, v: V[:8] @ jax.nn.relu(x @ w) @ v),
    "all_gather of weights": Program(
        lambda x, w, v: mlp(x, lax.all_gather(w, "d", tiled=True), v), (P("d"), P("d"), P()), P("d"), mlp
    ),
    "all_gather for all": Program(
        lambda x, w, v: gathered(jax.nn.relu(x @ w)) @ v, BATCH, P(), lambda x, w, v: jax.nn.relu(x @ w) @ v
    ),
    "ppermute": Program(partial(ring, FORWARD), BATCH, P("d"), partial(ring, BACK)),
    "ppermute in scan": Program(partial(ring_in_scan, FORWARD), BATCH, P("d"), partial(ring_in_scan, BACK)),
    "all_to_all": Program(all_to_all, BATCH, P("d"), lambda x, w, v: mlp(jnp.cumsum(x, 0), w, v)),
    "psum_scatter of examples": Program(
        lambda x, w, v: jax.nn.relu(SCATTER(x @ w, tiled=True) * B + 1) @ v,
        (P(None, "d"), P("d"), P()), P("d"), lambda x, w, v: jax.nn.relu(x @ w * B + 1) @ v,
    ),
    "psum_scatter of blocks": Program(
        lambda x, w, v: jax.nn.relu(SCATTER((x @ w).reshape(4, 2, 16)) * B + 1) @ v,
        (P(None, "d"), P("d"), P()), P("d"), lambda x, w, v: jax.nn.relu(x @ w * B + 1) @ v,
    ),
    "psum_scatter of features": Program(
        lambda x, w, v: lax.psum(jax.nn.relu(2 * SCATTER(x @ w, scatter_dimension=1, tiled=True)) @ v, "d"),
        (P(None, "d"), P("d"), P("d")), P(), lambda x, w, v: jax.nn.relu(2 * (x @ w)) @ v,
    ),
    "pmax": Program(
        lambda x, w, v: lax.pmax(jax.nn.relu(x @ w).max(0), "d") @ v,
        BATCH, P(), lambda x, w, v: jax.nn.relu(x @ w).max(0) @ v,
    ),
    "pmin": Program(
        lambda x, w, v: lax.pmin((x @ w).min(0), "d") @ v, BATCH, P(), lambda x, w, v: (x @ w).min(0) @ v
    ),
    "softmax": Program(softmax, TENSOR, P(), lambda x, w, v: jax.nn.softmax(x @ w) @ v),
    "layer_norm": Program(
        partial(layer_norm, lambda z: lax.pmean(mean(z), "d"), lambda y: lax.psum(y, "d")),
        TENSOR, P(), partial(layer_norm, mean, lambda y: y),
    ),
}  # fmt: skip
plain_program = cache(lambda name: explained(PROGRAMS[name].plain, X, W, V, rows=ROWS))


@VMA
@pytest.mark.parametrize("name", PROGRAMS)
def test_collective(name, check_vma):
    device, ins, out, plain = PROGRAMS[name]
    close(explained(sharded(device, ins, out, check_vma), X, W, V, rows=ROWS), plain_program(name), 1e-11)


@VMA
def test_recognised_as_on_one_device(check_vma):
    """Softmax and LayerNorm over features that are spread over devices."""
    for name in ("softmax", "layer_norm"):
        device, ins, out, plain = PROGRAMS[name]
        rows, right = (plan(f, ROWS[0])(X, W, V) for f in (sharded(device, ins, out, check_vma), plain))
        assert [(row.name, row.kind) for row in rows] == [(row.name, row.kind) for row in right]
        assert rows[1].kind == name


LAYERS = {
    "gelu by hand": lambda x: 0.5 * x * (1 + jnp.tanh(0.8 * (x + 0.04 * x**3))),
    "leaky": lambda x: jnp.maximum(x, 0.1 * x),
    "logaddexp": lambda x: jnp.logaddexp(x, 2 * x),
    "prefix sums": lambda x: lax.associative_scan(jnp.add, x, axis=1),
    "max_pool": lambda x: nets.pool(x[..., None, None], lax.max, -np.inf, 1),
    "local response": lambda x: local_response_norm(x[:, None]),
    "rms_norm": lambda x: x * lax.rsqrt((x**2).mean(-1, keepdims=True) + 1e-6),
    "attention": lambda x: jax.nn.dot_product_attention(*(x.reshape(-1, 2, 1, 4),) * 3, is_causal=True),
    "padding": lambda x: jnp.pad(x, ((0, 0), (1, 1))) @ draw(16, 10, 2),
}


@VMA
def test_numbers_are_numbers_on_devices(check_vma):
    """By types a number is handed to the devices before they use it; layers are told by their numbers all the same."""
    for name, layer in LAYERS.items():
        f = sharded(layer, P("d"), P("d"), check_vma)
        rows, right = ([(name, row.name, row.kind) for row in plan(g, ROWS[0])(X)] for g in (f, layer))
        assert rows == right


def test_modified_gradients():
    """Which look at the sign of what arrives, and for upper bounds of ReLUs."""
    f = lambda x, w, v: jax.nn.relu6(x @ w) @ v
    for composite in (composites.guided_backprop(), composites.deconvnet(), composites.beta_smooth()):
        g = sharded(lambda x, w, v: lax.psum(jax.nn.relu(f(x, w, v)), "d"), TENSOR, P(), True)
        parts = lambda x, w, v: sum(
            jax.nn.relu(f(x, w[:, i : i + 4], v[i : i + 4])) for i in range(0, 16, 4)
        )  # fmt: skip
        close(jax.jit(lrp(g, composite))(X, W, V), jax.jit(lrp(parts, composite))(X, W, V))


@VMA
@pytest.mark.parametrize("ties", ["first", "split"])
def test_ties_between_devices(check_vma, ties):
    x = X.at[5].set(X[3]).at[6].set(X[3])
    device, ins, out, plain = PROGRAMS["pmax"]
    row = Composite([(select.kind("max_pool"), rules.Winner(ties))]) + ROWS[0]
    got, right = (jax.jit(lrp(f, row))(x, W, V) for f in (sharded(device, ins, out, check_vma), plain))
    if ties == "split":  # within a device first
        got, right = (r[3] + r[5] + r[6] for r in (got, right))
    close(got, right)


@VMA
@pytest.mark.parametrize("rule", [rules.ConstantStatistics(), rules.ConstantStatistics(0.1, mean="held")], ids=repr)
def test_norm_rules_over_devices(check_vma, rule):
    device, ins, out, plain = PROGRAMS["layer_norm"]
    row = Composite([(select.kind("layer_norm"), rule)]) + ROWS[0]
    got, right = (jax.jit(lrp(f, row))(X, W, V) for f in (sharded(device, ins, out, check_vma), plain))
    close(got, right, 1e-10)


@VMA
def test_values_stay(check_vma):
    functions = [sharded(device, ins, out, check_vma) for device, ins, out, _ in PROGRAMS.values()]
    got, right = jax.jit(
        lambda *args: ([rewrite(f, ROWS[0])(*args) for f in functions], [f(*args) for f in functions])
    )(X, W, V)
    close(got, right)
    f = sharded(tensor_parallel, TENSOR, P(), check_vma)
    same(rewrite(f, ROWS[0])(X, W, V), f(X, W, V))


@VMA
def test_maximum_over_devices_where_no_relevance_arrives(check_vma):
    """JAX has no derivative of it, and needs none."""

    def f(most, x):
        return jnp.where(jnp.abs(x) > 0.5 * most(jnp.abs(x).max()), x, 0.0) @ W

    got = jax.jit(lrp(sharded(partial(f, lambda m: lax.pmax(m, "d")), P("d"), P("d"), check_vma), ROWS[0]))(X)
    close(got, lrp(partial(f, lambda m: m), ROWS[0])(X))
