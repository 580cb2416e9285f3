"""nnx models, which keep their parameters inside, as (function, parameters); any pytree that can be called will do.

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
from functional_models import COMPOSITES, IMAGES, explained, named
from jaxlrp import composites, functional, plan, rules, select, value_and_lrp
from jaxlrp.errors import InputError
from nets import close, draw, quick_compilation, randomise, same  # noqa: F401

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
