"""Models that keep their parameters inside: nnx and Equinox as (function, parameters); Haiku, which needs no help.

The reference is the same network written in plain JAX with the same numbers.
"""

import subprocess
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import models
from jaxlrp import composites, functional, lrp, plan, rules, select, value_and_lrp
from jaxlrp.errors import InputError
from nets import close, draw, quick_compilation, randomise, same  # noqa: F401

COMPOSITES = (composites.epsilon(0.1), composites.epsilon_plus_flat())
IMAGES = jnp.asarray(models.images())


def library(name: str):
    """Equinox and Haiku are in the extra `models`; a machine without one says so in pytest's summary."""
    return pytest.importorskip(name, reason=f'{name} is not installed: pip install "jaxlrp[models]"')


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


def outputs_only(f):
    return lambda *args: f(*args)[0]


# ---------------------------------------------------------------------------------------------------- nnx


class Net(nnx.Module):
    """A list of convolutions, BatchNorm with no linear neighbour, Dropout, a Sequential."""

    def __init__(self, rngs):
        conv = partial(nnx.Conv, kernel_size=(3, 3), param_dtype=jnp.float64, rngs=rngs)
        linear = partial(nnx.Linear, param_dtype=jnp.float64, rngs=rngs)
        self.layers = nnx.List([conv(3, 4), conv(4, 4, use_bias=False)])
        self.norm = nnx.BatchNorm(4, param_dtype=jnp.float64, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)
        self.head = nnx.Sequential(linear(4, 5), nnx.relu, linear(5, 3))

    def __call__(self, x):
        for layer in self.layers:
            x = nnx.relu(layer(x))
        return self.head(self.drop(self.norm(x).mean((1, 2))))


def plain_net(p, x):
    for layer in p["layers"].values():
        x = jax.nn.relu(models.conv(x, layer["kernel"]) + layer.get("bias", 0.0))
    x = models.batch_norm(x, p["norm"]).mean((1, 2))
    first, second = p["head"]["layers"][0], p["head"]["layers"][2]
    return models.dense(jax.nn.relu(models.dense(x, first)), second)


def net(train: bool = False) -> Net:
    model = Net(nnx.Rngs(0, dropout=1))
    nnx.update(model, randomise(nnx.state(model, (nnx.Param, nnx.BatchStat))))
    model.train() if train else model.eval()
    return model


def test_nnx_by_the_names_of_its_attributes():
    model = net()
    fun, params = functional(model)
    vector = {"bias": (4,), "mean": (4,), "scale": (4,), "var": (4,)}
    head = {0: {"bias": (5,), "kernel": (4, 5)}, 2: {"bias": (3,), "kernel": (5, 3)}}
    layers = {0: {"bias": (4,), "kernel": (3, 3, 3, 4)}, 1: {"kernel": (3, 3, 4, 4)}}
    shapes = {"layers": layers, "norm": vector, "head": {"layers": head}}
    assert jax.tree.map(jnp.shape, params, is_leaf=lambda v: isinstance(v, jax.Array)) == shapes
    same(fun(params, IMAGES), model(IMAGES))
    same(params["norm"]["var"], model.norm.var[...])
    assert named(fun, params, IMAGES) == {
        "conv": ["layers/0", "layers/1"],
        "batch_norm": ["norm"],
        "dense": ["head/layers/0", "head/layers/2"],
    }


def test_nnx_relevance_is_that_of_plain_jax():
    fun, params = functional(net())
    params = jax.tree.map(lambda v: v.astype(np.float64), params)  # nnx makes statistics float32
    close(explained(fun, 1, params, IMAGES), explained(plain_net, 1, params, IMAGES), 1e-10)


def test_nnx_runs_with_the_parameters_it_is_given():
    """params is the only way in: other numbers, other outputs; and gradients arrive at every one that is read."""
    fun, params = functional(models.NnxCNN(nnx.Rngs(0)))
    other = jax.tree.map(jnp.asarray, models.numbers())
    assert jax.tree.structure(other) == jax.tree.structure(params)
    close(jax.jit(fun)(other, IMAGES), models.plain_cnn(IMAGES, other))
    close(explained(fun, 1, other, IMAGES), explained(lambda p, x: models.plain_cnn(x, p), 1, other, IMAGES), 1e-10)
    functions = (lambda p: models.plain_cnn(IMAGES, p), lambda p: fun(p, IMAGES))
    right, got = (jax.jit(jax.grad(lambda p, f=f: f(p)[:, 0].sum()))(other) for f in functions)
    close(got, right, 1e-10)


def test_named_selects_an_item_of_a_list():
    fun, params = functional(net())
    composite = composites.Composite([(select.named("layers/0*"), rules.Flat())]) + COMPOSITES[0]
    rows = {row.name: type(row.rule) for row in plan(fun, composite, 1)(params, IMAGES)}
    assert rows["layers/0"] is rules.Flat and rows["layers/1"] is rules.Epsilon


def test_nnx_in_training_mode_is_pure_and_leaves_the_model_alone():
    """The same dropout mask in every call, whatever the model draws meanwhile; no statistics are written."""
    model, twin = net(train=True), net(train=True)
    fun, params = functional(model)
    before = jax.tree.map(jnp.copy, nnx.state(model, nnx.Not(nnx.RngKey)))
    first = fun(params, IMAGES)
    assert not np.allclose(first, functional(net())[0](params, IMAGES))
    explained(fun, 1, params, IMAGES)
    same(nnx.state(model, nnx.Not(nnx.RngKey)), before)
    same(first, model(IMAGES))  # the model's own first draw
    assert not np.array_equal(model(IMAGES), first)
    same(fun(params, IMAGES), first)
    close(jax.jit(fun)(params, IMAGES), twin(IMAGES), 1e-6)  # float32 statistics
    for _, relevance in explained(fun, 1, params, IMAGES):
        assert np.isfinite(relevance).all() and np.any(relevance)


class Stack(nnx.Module):
    """Layers stacked along a leading axis, run by nnx.scan."""

    def __init__(self, rngs, depth=3):
        make = nnx.vmap(lambda rngs: nnx.Linear(4, 4, param_dtype=jnp.float64, rngs=rngs))
        self.layers = make(rngs.split(depth))

    def __call__(self, x):
        step = nnx.scan(lambda x, layer: nnx.relu(layer(x)) + x, in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        return step(x, self.layers)


def test_nnx_scan_over_stacked_layers():
    model, x = Stack(nnx.Rngs(0)), draw(1, 2, 4)
    fun, params = functional(model)
    assert jax.tree.map(jnp.shape, params) == {"layers": {"bias": (3, 4), "kernel": (3, 4, 4)}}
    params = randomise(params)

    def unrolled(params, x):
        for i in range(3):
            x = jax.nn.relu(models.dense(x, jax.tree.map(lambda v, i=i: v[i], params["layers"]))) + x
        return x

    local = composites.epsilon(0.1)
    got, right = (jax.jit(value_and_lrp(f, local, 1))(params, x) for f in (fun, unrolled))
    close(got, right, 1e-10)
    assert named(fun, params, x) == {"dense": ["layers"]}


class Tied(nnx.Module):
    def __init__(self, rngs):
        self.down = nnx.Linear(4, 4, use_bias=False, param_dtype=jnp.float64, rngs=rngs)
        self.up = nnx.Linear(4, 4, use_bias=False, param_dtype=jnp.float64, rngs=rngs)
        self.up.kernel = self.down.kernel

    def __call__(self, x, scale=1.0, *, relu=True):
        x = self.down(x)
        return scale * self.up(nnx.relu(x) if relu else x)


def test_a_shared_parameter_has_one_name():
    model, x = Tied(nnx.Rngs(0)), draw(1, 2, 4)
    fun, params = functional(model)
    (kernel,) = jax.tree.leaves(params)
    same(params["down"]["kernel"], kernel)
    close(fun({"down": {"kernel": 2 * kernel}}, x), 4 * model(x))
    assert named(fun, params, x) == {"dense": ["down", "down#2"]}


def test_arguments_pass_through():
    model, x = Tied(nnx.Rngs(0)), draw(1, 2, 4)
    fun, params = functional(model)
    same(fun(params, x, 3.0, relu=False), model(x, 3.0, relu=False))
    assert fun.__name__ == "Tied"


def test_nnx_random_keys_are_not_among_the_parameters():
    """Neither keys nor counts, so that every leaf is a number that can be explained, cast or saved."""
    _, params = functional(net(train=True))
    assert all(jnp.issubdtype(v.dtype, jnp.floating) for v in jax.tree.leaves(params))


# ---------------------------------------------------------------------------------------------------- any pytree


def test_any_callable_pytree_will_do_without_flax():
    code = """
import sys
sys.modules.update(dict.fromkeys(("flax", "equinox", "haiku")))
import dataclasses, functools, jax, jax.numpy as jnp, jaxlrp

@functools.partial(jax.tree_util.register_dataclass, data_fields=["blocks", "tables"], meta_fields=["scale"])
@dataclasses.dataclass
class Model:
    blocks: list
    tables: dict
    scale: float
    def __call__(self, x):
        for w in self.blocks:
            x = x @ w
        return self.scale * x @ self.tables["out"]

model = Model([jnp.ones((2, 3)), jnp.ones((3, 3))], {"out": jnp.ones((3, 1))}, 2.0)
fun, params = jaxlrp.functional(model)
assert set(params) == {"blocks", "tables"} and set(params["blocks"]) == {0, 1}, params
x = jnp.ones((1, 2))
assert fun(params, x) == model(x)
names = [row.name for row in jaxlrp.plan(fun, jaxlrp.composites.epsilon(), 1)(params, x) if row.kind == "dense"]
assert names == ["blocks", "blocks#2", "tables"], names
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_parameters_of_another_structure_are_refused():
    fun, params = functional(Tied(nnx.Rngs(0)))
    kernel, key = params["down"]["kernel"], r"\['down'\]\['kernel'\]"
    for wrong, missing, unknown in (
        ({}, key, "nothing"),
        ({**params, "up": params["down"]}, "nothing", r"\['up'\]\['kernel'\]"),
        ({"down": {0: kernel}}, key, r"\['down'\]\[0\]"),
        (kernel, key, "nothing"),
    ):
        with pytest.raises(InputError, match=rf"parameters of Tied .* missing: {missing}; too many: {unknown}"):
            fun(wrong, draw(1, 2, 4))


# ---------------------------------------------------------------------------------------------------- Equinox


def layer_norm(x, p, scale="weight", shift="bias", epsilon=1e-5):
    """Over the last axis, as a person writes it."""
    centred = x - x.mean(-1, keepdims=True)
    return centred / jnp.sqrt((centred**2).mean(-1, keepdims=True) + epsilon) * p[scale] + p[shift]


def rows_times(x, p):
    """Equinox keeps a kernel as (outputs, inputs)."""
    return x @ p["weight"].T + p["bias"]


def test_equinox_mlp_mixer():
    eqx = library("equinox")

    class Mixer(eqx.Module):
        patches: eqx.nn.MLP
        channels: eqx.nn.MLP
        norms: list
        head: eqx.nn.Linear

        def __init__(self, key):
            keys = jax.random.split(key, 3)
            self.patches = eqx.nn.MLP(6, 6, 7, 1, activation=jax.nn.gelu, key=keys[0])
            self.channels = eqx.nn.MLP(5, 5, 8, 1, activation=jax.nn.gelu, key=keys[1])
            self.norms = [eqx.nn.LayerNorm(5), eqx.nn.LayerNorm(5)]
            self.head = eqx.nn.Linear(5, 3, key=keys[2])

        def __call__(self, x):  # (patches, channels)
            x = x + jax.vmap(self.patches)(jax.vmap(self.norms[0])(x).T).T
            x = x + jax.vmap(self.channels)(jax.vmap(self.norms[1])(x))
            return self.head(x.mean(0))

    def plain(p, x):
        def two(x, p):
            return rows_times(jax.nn.gelu(rows_times(x, p["layers"][0])), p["layers"][1])

        x = x + two(layer_norm(x, p["norms"][0]).mT, p["patches"]).mT
        x = x + two(layer_norm(x, p["norms"][1]), p["channels"])
        return rows_times(x.mean(-2), p["head"])

    model, x = randomised(eqx, Mixer(jax.random.key(0))), draw(1, 3, 6, 5)
    one, params = functional(model)
    same(one(params, x[0]), model(x[0]))
    fun = jax.vmap(one, (None, 0))
    assert named(fun, params, x) == {
        "dense": ["patches/layers/0", "patches/layers/1", "channels/layers/0", "channels/layers/1", "head"]
    }
    close(explained(fun, 1, params, x), explained(plain, 1, params, x), 1e-10)


def test_equinox_conv_net():
    eqx = library("equinox")

    class Conv(eqx.Module):
        layers: list
        head: eqx.nn.Linear
        drop: eqx.nn.Dropout

        def __init__(self, key):
            keys = jax.random.split(key, 3)
            stem, block = eqx.nn.Conv2d(3, 4, 3, padding=1, key=keys[0]), eqx.nn.Conv2d(4, 4, 3, 2, key=keys[1])
            self.layers = [stem, jax.nn.relu, eqx.nn.MaxPool2d(2, 2), block, jax.nn.relu]
            self.head = eqx.nn.Linear(4, 3, key=keys[2])
            self.drop = eqx.nn.Dropout(0.5, inference=True)

        def __call__(self, x):  # (channels, height, width)
            for layer in self.layers:
                x = layer(x)
            return self.head(self.drop(x.mean((1, 2))))

    def plain(p, x):
        def conv(x, p, strides, padding):
            out = jax.lax.conv_general_dilated(x, p["weight"], (strides, strides), padding)
            return jax.nn.relu(out + p["bias"])

        x = conv(x, p["layers"][0], 1, "SAME")
        x = jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 1, 2, 2), (1, 1, 2, 2), "VALID")
        return rows_times(conv(x, p["layers"][3], 2, "VALID").mean((2, 3)), p["head"])

    model, x = randomised(eqx, Conv(jax.random.key(0))), IMAGES.transpose(0, 3, 1, 2)
    one, params = functional(model)
    same(one(params, x[0]), model(x[0]))
    assert set(params["layers"]) == {0, 3}
    fun = jax.vmap(one, (None, 0))
    assert named(fun, params, x) == {"conv": ["layers/0", "layers/3"], "dense": ["head"]}
    close(explained(fun, 1, params, x), explained(plain, 1, params, x), 1e-10)


def randomised(eqx, model):
    arrays, rest = eqx.partition(model, eqx.is_array)
    return eqx.combine(randomise(arrays), rest)


def test_equinox_batch_norm_keeps_its_state_as_an_argument():
    """The state goes in and comes out as ever; in inference mode BatchNorm joins its convolution."""
    eqx = library("equinox")

    class Normed(eqx.Module):
        conv: eqx.nn.Conv2d
        norm: eqx.nn.BatchNorm

        def __init__(self, key):
            self.conv, self.norm = eqx.nn.Conv2d(3, 4, 3, key=key), eqx.nn.BatchNorm(4, "batch", mode="batch")

        def __call__(self, x, state):
            x, state = self.norm(self.conv(x), state)
            return jax.nn.relu(x).mean((1, 2)), state

    model, state = eqx.nn.make_with_state(Normed)(jax.random.key(0))
    x = IMAGES.transpose(0, 3, 1, 2)
    batched = partial(jax.vmap, axis_name="batch", in_axes=(None, 0, None), out_axes=(0, None))
    train, _ = functional(randomised(eqx, model))
    _, state = batched(train)(functional(model)[1], x, state)  # one step moves the statistics
    one, params = functional(eqx.nn.inference_mode(randomised(eqx, model)))
    fun = outputs_only(batched(one))
    share = 1 - model.norm.momentum  # of the one batch that the running statistics have seen
    mean, var = (v / share for v in state.get(model.norm.batch_state_index))

    def plain(p, x, state):
        out = jax.lax.conv_general_dilated(x, p["conv"]["weight"], (1, 1), "VALID") + p["conv"]["bias"]
        wide = lambda v: v[:, None, None]
        out = (out - wide(mean)) / jnp.sqrt(wide(var) + 1e-5)
        return jax.nn.relu(out * wide(p["norm"]["weight"]) + wide(p["norm"]["bias"])).mean((2, 3))

    assert named(fun, params, x, state) == {"conv": ["conv"]}
    close(explained(fun, 1, params, x, state), explained(plain, 1, params, x, state), 1e-10)


# ---------------------------------------------------------------------------------------------------- Haiku


def test_haiku_transformer_block_needs_no_help():
    hk = library("haiku")

    class Block(hk.Module):
        def __call__(self, x):
            attend = hk.MultiHeadAttention(2, 4, model_size=8, w_init=hk.initializers.VarianceScaling(1.0))
            x = x + (lambda y: attend(y, y, y))(hk.LayerNorm(-1, True, True)(x))
            y = hk.LayerNorm(-1, True, True)(x)
            return x + hk.nets.MLP([16, 8], activation=jax.nn.gelu)(y)

    def network(x):
        return hk.Linear(3, name="head")(Block(name="block")(hk.Linear(8, name="embed")(x)).mean(-2))

    def plain(p, x):
        def dense(x, name):
            return x @ p[name]["w"] + p[name]["b"]

        def heads(x, name):
            return dense(x, f"block/multi_head_attention/{name}").reshape(*x.shape[:-1], 2, 4)

        norm = partial(layer_norm, scale="scale", shift="offset")
        x = dense(x, "embed")
        y = norm(x, p["block/layer_norm"])
        scores = jnp.einsum("nthd,nThd->nhtT", heads(y, "query"), heads(y, "key")) / np.sqrt(4)
        mixed = jnp.einsum("nhtT,nThd->nthd", jax.nn.softmax(scores), heads(y, "value"))
        x = x + dense(mixed.reshape(*x.shape[:-1], 8), "block/multi_head_attention/linear")
        y = dense(norm(x, p["block/layer_norm_1"]), "block/mlp/~/linear_0")
        x = x + dense(jax.nn.gelu(y), "block/mlp/~/linear_1")
        return dense(x.mean(-2), "head")

    transformed, x = hk.without_apply_rng(hk.transform(network)), draw(1, 2, 5, 6)
    params = randomise(transformed.init(jax.random.key(0), x))
    names = ["query", "key", "value", "linear"]
    assert named(transformed.apply, params, x) == {
        "dense": ["embed", *(f"block/multi_head_attention/{n}" for n in names), "block/mlp/~/linear_0",
                  "block/mlp/~/linear_1", "head"],
        "scale": ["scale"],
    }  # fmt: skip
    close(explained(transformed.apply, 1, params, x), explained(plain, 1, params, x), 1e-10)
    with pytest.raises(InputError, match=r"Transformed is Haiku's.*jaxlrp\.lrp\(transformed\.apply"):
        functional(transformed)


def test_haiku_conv_net_with_state_needs_no_help():
    hk = library("haiku")

    def network(x, train):
        x = jax.nn.relu(hk.BatchNorm(True, True, 0.9)(hk.Conv2D(4, 3)(x), train))
        x = jax.nn.relu(hk.Conv2D(4, 3, stride=2)(hk.MaxPool(2, 2, "VALID")(x)))
        return hk.nets.MLP([5, 3])(x.mean((1, 2)))

    def plain(params, state, x):
        dense = lambda x, p: x @ p["w"] + p["b"]
        wide = {"scale": params["batch_norm"]["scale"], "bias": params["batch_norm"]["offset"]}
        statistics = {"mean": state["batch_norm/~/mean_ema"], "var": state["batch_norm/~/var_ema"]}
        x = models.conv(x, params["conv2_d"]["w"]) + params["conv2_d"]["b"]
        x = jax.nn.relu(models.batch_norm(x, wide | {k: v["average"] for k, v in statistics.items()}))
        x = models.conv(models.max_pool(x), params["conv2_d_1"]["w"], (2, 2)) + params["conv2_d_1"]["b"]
        x = jax.nn.relu(dense(jax.nn.relu(x).mean((1, 2)), params["mlp/~/linear_0"]))
        return dense(x, params["mlp/~/linear_1"])

    transformed = hk.without_apply_rng(hk.transform_with_state(network))
    params, state = randomise(transformed.init(jax.random.key(0), IMAGES, True))
    state = jax.tree.map(jnp.abs, state)  # variances
    fun = outputs_only(lambda params, state, x: transformed.apply(params, state, x, False))
    assert named(fun, params, state, IMAGES, argnums=2) == {
        "conv": ["conv2_d", "conv2_d_1"],
        "dense": ["mlp/~/linear_0", "mlp/~/linear_1"],
    }
    close(explained(fun, 2, params, state, IMAGES), explained(plain, 2, params, state, IMAGES), 1e-10)
    random = hk.transform(lambda x: hk.Linear(3)(hk.dropout(hk.next_rng_key(), 0.5, x)))
    params = random.init(jax.random.key(0), draw(1, 2, 4))
    relevance = jax.jit(lrp(random.apply, COMPOSITES[0], argnums=2))(params, jax.random.key(1), draw(1, 2, 4))
    assert np.any(relevance) and not np.all(relevance)  # what dropout took from the value has no relevance
