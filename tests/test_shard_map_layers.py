"""Layers in `shard_map`: names, places, masks, their relevance and the ledger are those of the model on one device."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import PartitionSpec as P

import nets
from devices import ROWS, SPECS, SQUARE, TENSOR, VMA, B, C, U, V, W, X, deep, mlp, sharded, tensor_parallel
from jaxlrp import Composite, composites, lrp, plan, rules, select, value_and_lrp
from jaxlrp.errors import UnknownPrimitiveError
from jaxlrp.evaluate import conservation
from nets import close, quick_compilation  # noqa: F401


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
    assert "test_shard_map_layers.py" in rows[0].source or "linear.py" in rows[0].source
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
