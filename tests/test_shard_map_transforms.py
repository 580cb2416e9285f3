"""`shard_map` with other transformations around and within, `lrp` on each device, and rules' numbers that go there.

The reference is the model without `shard_map`.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from devices import BATCH, MESH, ROWS, SQUARE, TENSOR, VMA, B, V, W, X, linear, mlp, plain_mlp, sharded, tensor_parallel
from jaxlrp import Composite, composites, lrp, rules, select, value_and_lrp
from jaxlrp.rules import passes
from nets import LOCAL, close, explained, quick_compilation  # noqa: F401

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
