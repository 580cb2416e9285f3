"""`shard_map`: a model spread over devices has the relevance of the same model on one.

The reference is always the model without `shard_map`; four CPU devices, which conftest.py asks for. With
`check_vma=True` JAX's types tell what differs between devices, and relevance of what they share is there once; with
`check_vma=False` each device may hold a part of it.
"""

from functools import cache, partial
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import nets
from jaxlrp import Composite, composites, lrp, plan, rewrite, rules, select, value_and_lrp
from jaxlrp.errors import UnknownPrimitiveError
from jaxlrp.evaluate import conservation
from jaxlrp.nn import local_response_norm
from jaxlrp.rules import passes
from nets import LOCAL, close, draw, explained, quick_compilation, same  # noqa: F401

MESH = jax.make_mesh((4,), ("d",), axis_types=(AxisType.Auto,))
SQUARE = jax.make_mesh((2, 2), ("a", "b"), axis_types=(AxisType.Auto, AxisType.Auto))
VMA = pytest.mark.parametrize("check_vma", [True, False], ids=["typed", "untyped"])

X, W, B, V, C, U = draw(1, 8, 8), draw(2, 8, 16), draw(3, 16), draw(4, 16, 8), draw(5, 8), draw(6, 8, 3)
RING = [(i, (i + 1) % 4) for i in range(4)]


def sharded(f, ins, outs, check_vma, mesh=MESH, **options):
    return jax.shard_map(f, mesh=mesh, in_specs=ins, out_specs=outs, check_vma=check_vma, **options)


def linear(rule):
    """The rule for dense layers; sums without a stabiliser, so that it makes no difference how they are split."""
    return Composite([(select.kind("dense"), rule), (select.kind("scale", "add", "reduce"), rules.Zero())])


ROWS = (linear(rules.Zero()), linear(rules.Epsilon(0.1)))


def mlp(x, w, v):
    return jax.nn.relu(x @ w) @ v


BATCH, TENSOR = (P("d"), P(), P()), (P(), P(None, "d"), P("d"))  # where x, w and v are


def tensor_parallel(x, w, v):
    """Each device has some of the hidden units."""
    return lax.psum(mlp(x, w, v), "d")


plain_mlp = cache(lambda: explained(mlp, X, W, V, rows=ROWS))

# ---------------------------------------------------------------------------------------------------- whole models


def deep(total, x, w, b, v, c, u):
    return jax.nn.relu(total(jax.nn.relu(x @ w + b) @ v) + c) @ u


SPECS = P(), P(None, "d"), P("d"), P("d"), P(), P()


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


# ---------------------------------------------------------------------------------------------------- collectives


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


# ---------------------------------------------------------------------------------------------------- what is around


def layers(block, x, w, v):
    """Three residual blocks, stacked."""
    ws, vs = (jnp.stack([a, -a, 2 * a]) / 8 for a in (w, v))
    return lax.scan(lambda x, wv: (x + block(x, *wv), None), x, (ws, vs))[0]


def custom_vjp(f):
    """With a derivative that is wrong on purpose."""
    wrapped = jax.custom_vjp(f)
    wrapped.defvjp(lambda *args: (f(*args), args), lambda args, g: jax.tree.map(jnp.zeros_like, args))
    return wrapped


AROUND = {
    "jit": lambda f, shard: jax.jit(shard(f)),
    "remat": lambda f, shard: jax.checkpoint(shard(f)),
    "vmap": lambda f, shard: jax.vmap(shard(f), (0, None, None)),
    "scan": lambda f, shard: partial(layers, shard(f)),
    "jit within": lambda f, shard: shard(jax.jit(f)),
    "remat within": lambda f, shard: shard(jax.checkpoint(jax.jit(f))),
    "scan within": lambda f, shard: shard(partial(layers, f)),
    "vmap within": lambda f, shard: shard(jax.vmap(f, (0, None, None))),
    "cond within": lambda f, shard: shard(lambda x, w, v: lax.cond(True, f, lambda *a: -f(*a), x, w, v)),
    "custom_vjp within": lambda f, shard: shard(custom_vjp(f)),
}


@VMA
@pytest.mark.parametrize("name", AROUND)
def test_with_other_transformations(name, check_vma):
    x = jnp.stack([X, -X]) if "vmap" in name else X
    plain = {"scan": partial(layers, mlp), "vmap": jax.vmap(mlp, (0, None, None))}.get(
        name.removesuffix(" within"), mlp
    )
    f = AROUND[name](tensor_parallel, lambda f: sharded(f, TENSOR, P(), check_vma))
    close(explained(f, x, W, V, rows=ROWS), explained(plain, x, W, V, rows=ROWS))


def test_mesh_of_two_axes():
    """Batch and hidden units; a mesh of which one axis alone is mapped; a shard_map in another."""
    ins, data = (P("a"), P(None, "b"), P("b")), {"axis_names": {"b"}}
    f = lambda x, w, v: lax.psum(mlp(x, w, v), "b")
    for check_vma in (True, False):
        close(explained(sharded(f, ins, P("a"), check_vma, SQUARE), X, W, V, rows=ROWS), plain_mlp())
        close(explained(sharded(f, (P(), *ins[1:]), P(), check_vma, SQUARE, **data), X, W, V, rows=ROWS), plain_mlp())
    # of one within the other JAX has a gradient without types only
    inner = sharded(f, (P(), *ins[1:]), P(), False, None, **data)
    nested = sharded(inner, (P("a"), P(), P()), P("a"), False, SQUARE, axis_names={"a"})
    close(explained(nested, X, W, V, rows=ROWS), plain_mlp())
    both = sharded(
        lambda x, w, v: lax.psum(mlp(x, w, v), ("a", "b")), (P(), P(None, ("a", "b")), P(("a", "b"))), P(), True, SQUARE
    )
    close(explained(both, X, W, V, rows=ROWS), plain_mlp())


# ---------------------------------------------------------------------------------------------------- lrp on devices


@VMA
def test_explained_on_each_device(check_vma):
    """`shard_map(lrp(f))`, each device with examples of its own; targets of every form."""
    ones = lambda y: jnp.ones(y.shape)
    for target in (None, 1, ones):
        explain = lrp(mlp, ROWS[1], target=target)
        close(jax.jit(sharded(explain, BATCH, P("d"), check_vma))(X, W, V), explain(X, W, V))
    # the weights are no arguments
    got = sharded(lrp(lambda x: mlp(x, W, V), ROWS[1]), P("d"), P("d"), check_vma)(X)
    close(got, plain_mlp()[1][1])

    def layers(*args):
        return value_and_lrp(mlp, ROWS[1], layers=select.kind("activation"), masks={"relu": B})(*args)[1:]

    got, right = (jax.jit(f)(X, W, V) for f in (sharded(layers, BATCH, P("d"), check_vma), layers))
    close(got, right)


@VMA
def test_large_kernels_on_devices(check_vma, monkeypatch):
    """Those whose parts are made a few rows at a time, in a loop of its own on each device."""
    rows = linear(rules.ZPlus())
    right = jax.jit(lrp(mlp, rows))(X, W, V)
    monkeypatch.setattr(passes, "LARGE", 1)
    monkeypatch.setattr(passes, "BLOCK", 64)
    explain = jax.jit(lrp(sharded(mlp, BATCH, P("d"), check_vma), rows))
    assert "while" in explain.lower(X, W, V).as_text()
    close(explain(X, W, V), right)
    close(jax.jit(lrp(sharded(tensor_parallel, TENSOR, P(), check_vma), rows))(X, W, V), right)


def test_explained_on_each_device_with_a_sum_over_them():
    """Types see to it that what all devices share is explained once."""
    explain = jax.jit(sharded(lrp(tensor_parallel, ROWS[1]), TENSOR, P(), True))
    close(explain(X, W, V), plain_mlp()[1][1])


def test_sharded_arguments():
    """Of a model without shard_map, which the compiler spreads over the devices: by types or not."""
    right = plain_mlp()[1][1]
    for mesh in (MESH, jax.make_mesh((4,), ("d",), axis_types=(AxisType.Explicit,))):
        for specs, out in ((BATCH, P("d")), (TENSOR, P())):
            args = [jax.device_put(a, NamedSharding(mesh, s)) for a, s in zip((X, W, V), specs, strict=True)]
            if mesh is MESH or out != P():  # by types such a product is ambiguous in the model itself
                relevance = jax.jit(lrp(mlp, ROWS[1]))(*args)
                close(relevance, right)
                assert relevance.sharding.is_equivalent_to(NamedSharding(mesh, out), 2)


@VMA
def test_mesh_whose_axes_are_types(check_vma):
    """`jax.make_mesh` makes these unless told otherwise; probes and masks must lie where the shard_map wants them."""
    mesh = jax.make_mesh((4,), ("d",), axis_types=(AxisType.Explicit,))
    args = [jax.device_put(a, NamedSharding(mesh, s)) for a, s in zip((X, W, V), TENSOR, strict=True)]
    f = sharded(tensor_parallel, TENSOR, P(), check_vma, mesh)
    explain = partial(value_and_lrp, layers=select.kind("activation"), composite=ROWS[1])
    mask = B.reshape(4, 1, 4)
    got = jax.jit(lambda *args: explain(f, masks={"relu": mask})(*args))(*args)
    _, relevance, seen = explain(mlp, masks={"relu": B})(X, W, V)
    close(got[1], relevance)
    close(jnp.moveaxis(jnp.asarray(np.asarray(got[2]["relu"])), 0, 1).reshape(8, 16), seen["relu"])


# ---------------------------------------------------------------------------------------------------- numbers of rules


@VMA
def test_composite_is_an_argument(check_vma):
    """Its numbers go into the shard_map, are differentiated there, and are many at once."""
    f = sharded(tensor_parallel, TENSOR, P(), check_vma)

    def score(f, epsilon):
        return (lrp(f, composites.epsilon(epsilon))(X, W, V) ** 2).sum()

    got, right = (
        jax.jit(lambda es, g=g: (jax.vmap(partial(score, g))(es), jax.vmap(jax.grad(partial(score, g)))(es)))(
            jnp.asarray([0.1, 0.5])
        )
        for g in (f, mlp)
    )
    close(got, right, 1e-11)


@VMA
def test_rules_with_arrays(check_vma):
    """An array of a rule is the same on every device."""
    box = Composite([(select.first(), rules.ZBox(X.min(0), X.max(0)))]) + ROWS[0]
    got, right = (jax.jit(lrp(f, box))(X, W, V) for f in (sharded(mlp, BATCH, P("d"), check_vma), mlp))
    close(got, right)


@VMA
def test_half_precision(check_vma):
    args = [a.astype(jnp.bfloat16) for a in (X, W, V)]
    got, right = ([r for _, r in explained(f, *args, rows=LOCAL.values())]
                  for f in (sharded(tensor_parallel, TENSOR, P(), check_vma), mlp))  # fmt: skip
    assert {r.dtype for r in got} == {np.dtype(jnp.bfloat16)}
    close(got, right, 0.05)


# ---------------------------------------------------------------------------------------------------- what is in models


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


# ---------------------------------------------------------------------------------------------------- names, layers


class Net(nn.Module):
    """A dense layer whose units are on all devices, and one that adds their parts up."""

    units: int = 16
    total: object = staticmethod(lambda y: y)

    @nn.compact
    def __call__(self, x):
        hidden = nn.relu(nn.Dense(self.units, name="wide")(x))
        return self.total(nn.Dense(8, use_bias=False, name="narrow")(hidden))


@VMA
def test_names_and_places(check_vma):
    """Names, first and last, depth reach into the body; rows address what is there, and the plan shows it."""
    params = nets.randomise(jax.eval_shape(Net().init, jax.random.key(0), X))
    specs = {"params": {"wide": {"kernel": P(None, "d"), "bias": P("d")}, "narrow": {"kernel": P("d")}}}
    f = sharded(Net(4, lambda y: lax.psum(y, "d")).apply, (specs, P()), P(), check_vma)
    composite = Composite([
        (select.named("params/wide/kernel") & select.first() & select.depth(0), rules.ZPlus()),
        (select.named("params/narrow*") & select.last() & select.depth(-1), rules.Epsilon(0.2)),
    ])  # fmt: skip
    rows = plan(f, composite, argnums=1)(params, X)
    assert [(row.name, row.kind, type(row.rule).__name__) for row in rows] == [
        ("params/wide", "dense", "ZPlus"), ("relu", "activation", "Pass"), ("params/narrow", "dense", "Epsilon"),
    ]  # fmt: skip
    assert "test_shard_map.py" in rows[0].source or "linear.py" in rows[0].source
    got, right = (jax.jit(lrp(g, composite, argnums=1))(params, X) for g in (f, Net().apply))
    close(got, right)


@VMA
def test_layers_and_masks(check_vma):
    """By device along the axes that differ; what all share is there once, without types in parts."""
    f = sharded(tensor_parallel, TENSOR, P(), check_vma)
    explain = partial(value_and_lrp, composite=ROWS[1], layers=select.everything())
    seen, right = (jax.jit(explain(f))(X, W, V)[2] for f in (f, mlp))
    assert seen.keys() == right.keys() == {"w", "relu", "v"}
    for name in ("w", "relu"):
        assert seen[name].shape == (4, 8, 4)
        close(jnp.moveaxis(seen[name], 0, 1).reshape(8, 16), right[name])
    close(seen["v"] if check_vma else seen["v"].sum(0), right["v"])
    # a mask for every device, and one for all
    masks = ((B.reshape(4, 1, 4), B), (B[:4], jnp.tile(B[:4], 4)), (0.5, 0.5))
    got, right = (
        jax.jit(lambda *args, g=g, i=i: [lrp(g, ROWS[1], masks={"relu": pair[i]})(*args) for pair in masks])(X, W, V)
        for i, g in enumerate((f, mlp))
    )
    close(got, right)


def test_layers_on_a_mesh_of_two_axes():
    f = sharded(lambda x, w, v: lax.psum(mlp(x, w, v), "b"), (P("a"), P(None, "b"), P("b")), P("a"), True, SQUARE)
    looped = lambda x, w, v: lax.scan(lambda x, _: (f(x, w, v), None), x, None, length=3)[0]
    _, relevance, seen = jax.jit(value_and_lrp(looped, ROWS[1], layers=select.everything()))(X, W, V)
    plain = lambda x, w, v: lax.scan(lambda x, _: (mlp(x, w, v), None), x, None, length=3)[0]
    _, whole, right = jax.jit(value_and_lrp(plain, ROWS[1], layers=select.everything()))(X, W, V)
    close(relevance, whole)
    assert {name: r.shape for name, r in seen.items()} == {
        "w": (3, 2, 2, 4, 8), "relu": (3, 2, 2, 4, 8), "v": (3, 2, 4, 8)
    }  # fmt: skip
    close(seen["v"].reshape(3, 8, 8), right["v"])
    close(seen["relu"].transpose(0, 1, 3, 2, 4).reshape(3, 8, 16), right["relu"])


@VMA
def test_ledger(check_vma):
    """The books are those of the model on one device, each row summed over devices."""

    def books(f):
        ledger = conservation(f, composites.epsilon(0.1), batched=False)(X, W, B, V, C, U)
        rows = [np.stack([getattr(row, c) for c in ("arrived", "passed", "bias", "stabiliser", "dropped", "ended")])
                for row in ledger]  # fmt: skip
        assert np.abs(ledger.gap).max() < 1e-9 * np.abs(ledger.start).max()
        return {"start": ledger.start, "received": ledger.received, "rows": np.stack(rows)}

    f = sharded(partial(deep, lambda y: lax.psum(y, "d")), SPECS, P(), check_vma)
    close(books(f), books(partial(deep, lambda y: y)))


@VMA
def test_resize_on_devices(check_vma):
    """Its kernel is made of literals, which the devices are handed."""
    f = lambda x: jax.image.resize(x, (len(x), 5), "bilinear") @ U[:5]
    g = sharded(f, P("d"), P("d"), check_vma)
    assert [row.kind for row in plan(g, ROWS[0])(X)] == ["resize", "dense"]
    close(jax.jit(lrp(g, ROWS[0]))(X), jax.jit(lrp(f, ROWS[0]))(X))


def test_while_on_devices_is_refused():
    """Also on each device, under a shard_map that runs as it stands."""

    def f(x):
        return lax.while_loop(lambda c: c[0] < 3, lambda c: (c[0] + 1, jax.nn.relu(c[1] @ W[:, :8])), (0, x))[1]

    for check_vma in (True, False):
        for g in (sharded(lrp(f, ROWS[0]), P("d"), P("d"), check_vma), lrp(sharded(f, P("d"), P("d"), True), ROWS[0])):
            with pytest.raises(UnknownPrimitiveError, match="stands in a shard_map; write lax.fori_loop"):
                g(X)
    counted = lambda x: lax.fori_loop(0, 3, lambda _, x: jax.nn.relu(x @ W[:, :8]), x)
    close(lrp(sharded(counted, P("d"), P("d"), True), ROWS[0])(X), lrp(f, ROWS[0])(X))
