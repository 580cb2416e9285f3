"""Small networks and numbers that the tests of the transformation share."""

from collections.abc import Iterator

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import ad, mlir

from jaxlrp import Composite, rules, select, value_and_lrp


def linear(rule: rules.Rule) -> Composite:
    """The rule for every dense and convolution layer."""
    return Composite([(select.kind("dense", "conv"), rule)])


# Composites that look at nothing but the layer itself, so that a loop's body gets what the unrolled loop gets.
LOCAL = {
    "zero": linear(rules.Zero()),
    "epsilon": linear(rules.Epsilon(0.1)),
    "zplus": linear(rules.ZPlus()),
    "gamma": linear(rules.Gamma(0.3)),
    "generalised-gamma": linear(rules.GeneralizedGamma(0.3)),
    "alpha-beta": linear(rules.AlphaBeta(2.0, 1.0)),
    "wsquare": linear(rules.WSquare()),
    "flat": linear(rules.Flat()),
}


SOME = tuple(LOCAL[name] for name in ("epsilon", "alpha-beta"))


def explained(f, *args, rows=SOME, argnums=0, target=None):
    """[(value, relevance) for each composite], in one compiled program: compiling is what these tests spend time on."""
    return jax.jit(lambda *args: [value_and_lrp(f, row, argnums, target)(*args) for row in rows])(*args)


@pytest.fixture(autouse=True, scope="module")
def quick_compilation() -> Iterator[None]:
    """For every module that imports it: XLA's optimiser would take half of the time."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def draw(seed: int, *shape: int, dtype=np.float64) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def randomise(tree, seed: int = 0):
    """The tree with numbers that no layer begins with: scales, biases and statistics are neither 0 nor 1."""
    leaves, structure = jax.tree.flatten(tree)
    rng = np.random.default_rng(seed)
    return jax.tree.unflatten(structure, [jnp.asarray(rng.uniform(0.3, 0.9, v.shape), v.dtype) - 0.4 * (v.ndim > 1)
                                          for v in leaves])  # fmt: skip


def primitive(name: str, fun):
    """A primitive of the user's own, of one operand: what `fun`, which keeps its shape, computes; its derivative."""
    new = Primitive(f"test_{name}")
    new.def_impl(fun)
    new.def_abstract_eval(lambda x: x)
    mlir.register_lowering(new, mlir.lower_fun(fun, multiple_results=False))
    ad.primitive_jvps[new] = lambda x, t: jax.jvp(fun, x, t)
    return new


def close(got, right, tolerance: float = 1e-12) -> None:
    """Trees of arrays are equal, to `tolerance` of the largest number in each array."""
    assert jax.tree.structure(got) == jax.tree.structure(right)
    for (path, b), a in zip(jax.tree_util.tree_flatten_with_path(right)[0], jax.tree.leaves(got), strict=True):
        where = jax.tree_util.keystr(path)
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        assert a.shape == b.shape, where
        assert np.isfinite(b).all() and np.any(b), f"{where}: a comparison with nothing shows nothing"
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * np.abs(b).max(), err_msg=where)


def same(got, right) -> None:
    """Trees of arrays are equal bit for bit, and of the same dtypes."""
    assert jax.tree.structure(got) == jax.tree.structure(right)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(right), strict=True):
        assert jnp.result_type(a) == jnp.result_type(b)
        np.testing.assert_array_equal(a, b)


# ---------------------------------------------------------------------------------------------------- dense layers


def mlp_parameters(*widths: int, seed: int = 0, dtype=np.float64) -> list[tuple[jax.Array, jax.Array]]:
    rng = np.random.default_rng(seed)
    return [
        (jnp.asarray(rng.normal(size=(n, m)) / np.sqrt(n), dtype), jnp.asarray(0.3 * rng.normal(size=m), dtype))
        for n, m in zip(widths, widths[1:], strict=False)
    ]


def layer(x, parameters):
    """One hidden layer: dense, relu, and the input added to it."""
    w, b = parameters
    return jax.nn.relu(x @ w + b) + x


def mlp(parameters, x):
    """Dense layers with relu between."""
    *hidden, (w, b) = parameters
    for v, c in hidden:
        x = jax.nn.relu(x @ v + c)
    return x @ w + b


# ---------------------------------------------------------------------------------------------------- convolutions


def conv(x, kernel, stride: int = 1):
    return lax.conv_general_dilated(x, kernel, (stride, stride), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


def pool(x, reducer, start, size: int = 2):
    return lax.reduce_window(x, np.asarray(start, x.dtype), reducer, (1, size, size, 1), (1, size, size, 1), "VALID")


def cnn_parameters(seed: int = 0, dtype=np.float64) -> dict[str, jax.Array]:
    rng = np.random.default_rng(seed)
    kernels = {"conv1": (3, 3, 2, 4), "conv2": (3, 3, 4, 4), "conv3": (1, 1, 4, 6), "dense": (6, 5), "out": (5, 3)}
    vectors = {"bias1": 4, "scale": 4, "shift": 4, "mean": 4, "bias_out": 3}
    p = {name: rng.normal(size=shape) / np.sqrt(np.prod(shape[:-1])) for name, shape in kernels.items()}
    p |= {name: 0.3 * rng.normal(size=n) for name, n in vectors.items()} | {"var": rng.uniform(0.1, 0.5, 4)}
    return {name: jnp.asarray(v, dtype) for name, v in p.items()}


def cnn(p, x):
    """(n, 4, 4, 2) -> (n, 3): a BatchNorm, a residual add, both kinds of pool, four activations."""
    x = conv(x, p["conv1"]) + p["bias1"]
    x = (x - p["mean"]) * lax.rsqrt(p["var"] + 1e-5) * p["scale"] + p["shift"]
    x = jax.nn.relu(x)
    x = x + jax.nn.silu(conv(x, p["conv2"]))
    x = pool(x, lax.max, -np.inf)
    x = pool(jax.nn.gelu(conv(x, p["conv3"])), lax.add, 0) / 4
    x = jnp.tanh(x.reshape(len(x), -1) @ p["dense"])
    return x @ p["out"] + p["bias_out"]


class ResNet(nn.Module):
    """(n, 8, 8, 3) -> (n, classes): a stem and two residual blocks, BatchNorm after every convolution."""

    classes: int = 3
    width: int = 4

    @nn.compact
    def __call__(self, x, train: bool = False):
        def norm(x):
            return nn.BatchNorm(use_running_average=not train)(x)

        x = nn.relu(norm(nn.Conv(self.width, (3, 3), use_bias=False)(x)))
        x = nn.max_pool(x, (2, 2), (2, 2))
        for stride in (1, 2):
            y = nn.relu(norm(nn.Conv(self.width, (3, 3), stride, use_bias=False)(x)))
            y = norm(nn.Conv(self.width, (3, 3), use_bias=False)(y))
            shortcut = x if stride == 1 else norm(nn.Conv(self.width, (1, 1), stride, use_bias=False)(x))
            x = nn.relu(y + shortcut)
        x = nn.avg_pool(x, (2, 2), (2, 2))
        return nn.Dense(self.classes)(x.reshape(len(x), -1))
