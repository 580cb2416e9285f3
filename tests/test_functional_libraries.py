"""Models of other libraries: Equinox as (function, parameters); Haiku, which needs no help.

The reference is the same network written in plain JAX with the same numbers.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import models
from functional_models import COMPOSITES, IMAGES, explained, named
from jaxlrp import functional, lrp
from jaxlrp.errors import InputError
from nets import close, draw, quick_compilation, randomise, same  # noqa: F401


def library(name: str):
    """Equinox and Haiku are in the extra `models`; a machine without one says so in pytest's summary."""
    return pytest.importorskip(name, reason=f'{name} is not installed: pip install "jaxlrp[models]"')


def outputs_only(f):
    return lambda *args: f(*args)[0]


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
