"""What the tests of `shard_map` share: meshes of four CPU devices, which conftest.py asks for, and a model on them.

With `check_vma=True` JAX's types tell what differs between devices, and relevance of what they share is there once;
with `check_vma=False` each device may hold a part of it.
"""

from functools import cache

import jax
import pytest
from jax import lax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from jaxlrp import Composite, rules, select
from nets import draw, explained

MESH = jax.make_mesh((4,), ("d",), axis_types=(AxisType.Auto,))
SQUARE = jax.make_mesh((2, 2), ("a", "b"), axis_types=(AxisType.Auto, AxisType.Auto))
VMA = pytest.mark.parametrize("check_vma", [True, False], ids=["typed", "untyped"])

X, W, B, V, C, U = draw(1, 8, 8), draw(2, 8, 16), draw(3, 16), draw(4, 16, 8), draw(5, 8), draw(6, 8, 3)


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


def deep(total, x, w, b, v, c, u):
    return jax.nn.relu(total(jax.nn.relu(x @ w + b) @ v) + c) @ u


SPECS = P(), P(None, "d"), P("d"), P("d"), P(), P()
