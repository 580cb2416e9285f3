"""Small models shared by the tests: one CNN written in linen, in nnx and in plain JAX, with the same numbers.

    stem: 3x3 conv - BatchNorm - relu;  block: 3x3 conv - relu, added to what it read;
    max-pool - average pool - mean over what is left;  head: dense

Every layer is called by the same name in all three, up to a prefix (`params/` in linen). All is float64.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

IMAGES = (2, 8, 8, 3)
WIDTH = 4
CLASSES = 3
EPSILON = 1e-5  # of the BatchNorm


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def images(seed: int = 1) -> np.ndarray:
    return rng(seed).normal(size=IMAGES)


def numbers() -> dict[str, dict[str, np.ndarray]]:
    """Parameters and statistics of the CNN, by layer."""
    draw = rng(0).normal
    channels = IMAGES[-1]
    return {
        "stem": {"kernel": draw(size=(3, 3, channels, WIDTH)), "bias": draw(size=WIDTH)},
        # one scale is negative: it turns its channel round
        "norm": {
            "scale": draw(size=WIDTH) * [1, -1, 1, 1],
            "bias": draw(size=WIDTH),
            "mean": draw(size=WIDTH),
            "var": draw(size=WIDTH) ** 2 + 0.5,
        },
        "block": {"kernel": draw(size=(3, 3, WIDTH, WIDTH)), "bias": draw(size=WIDTH)},
        "head": {"kernel": draw(size=(WIDTH, CLASSES)), "bias": draw(size=CLASSES)},
    }


class LinenCNN(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Conv(WIDTH, (3, 3), name="stem")(x)
        x = nn.relu(nn.BatchNorm(use_running_average=True, epsilon=EPSILON, name="norm")(x))
        x = nn.relu(nn.Conv(WIDTH, (3, 3), name="block")(x)) + x
        x = nn.max_pool(x, (2, 2), (2, 2))
        x = nn.avg_pool(x, (2, 2), (2, 2))
        x = x.mean((1, 2))
        return nn.Dense(CLASSES, name="head")(x)


class NnxCNN(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.stem = nnx.Conv(IMAGES[-1], WIDTH, (3, 3), rngs=rngs)
        self.norm = nnx.BatchNorm(WIDTH, use_running_average=True, epsilon=EPSILON, rngs=rngs)
        self.block = nnx.Conv(WIDTH, WIDTH, (3, 3), rngs=rngs)
        self.head = nnx.Linear(WIDTH, CLASSES, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.norm(self.stem(x)))
        x = nnx.relu(self.block(x)) + x
        x = nnx.max_pool(x, (2, 2), (2, 2))
        x = nnx.avg_pool(x, (2, 2), (2, 2))
        return self.head(x.mean((1, 2)))


def conv(x, kernel, strides=(1, 1), padding="SAME", **options):
    """A convolution of NHWC images with an HWIO kernel."""
    return lax.conv_general_dilated(x, kernel, strides, padding, dimension_numbers=("NHWC", "HWIO", "NHWC"), **options)


def batch_norm(x, p):
    return (x - p["mean"]) / jnp.sqrt(p["var"] + EPSILON) * p["scale"] + p["bias"]


def max_pool(x, size=2):
    return lax.reduce_window(x, -jnp.inf, lax.max, (1, size, size, 1), (1, size, size, 1), "VALID")


def avg_pool(x, size=2):
    return lax.reduce_window(x, 0.0, lax.add, (1, size, size, 1), (1, size, size, 1), "VALID") / size**2


def plain_cnn(x, p):
    x = conv(x, p["stem"]["kernel"]) + p["stem"]["bias"]
    x = jnp.maximum(batch_norm(x, p["norm"]), 0)
    x = jnp.maximum(conv(x, p["block"]["kernel"]) + p["block"]["bias"], 0) + x
    x = avg_pool(max_pool(x))
    x = jnp.mean(x, axis=(1, 2))
    return x @ p["head"]["kernel"] + p["head"]["bias"]


@dataclass(frozen=True)
class Model:
    """`apply(x, parameters)`, and what stands before the layers' names."""

    name: str
    apply: Callable[[Any, Any], jax.Array]
    parameters: Any
    prefix: str = ""

    def __str__(self) -> str:
        return self.name


def _linen() -> Model:
    own = numbers()
    norm = own["norm"]
    variables = {
        "params": {**own, "norm": {k: norm[k] for k in ("scale", "bias")}},
        "batch_stats": {"norm": {k: norm[k] for k in ("mean", "var")}},
    }
    return Model("linen", lambda x, variables: LinenCNN().apply(variables, x), variables, "params/")


def _nnx() -> Model:
    graph, state = nnx.split(NnxCNN(nnx.Rngs(0)))
    nnx.replace_by_pure_dict(state, jax.tree.map(jnp.asarray, numbers()))
    return Model("nnx", lambda x, state: nnx.merge(graph, state)(x), state)


def cnns() -> list[Model]:
    """The CNN as linen, nnx and plain JAX have it."""
    return [_linen(), _nnx(), Model("plain", plain_cnn, numbers())]


def cnn() -> Model:
    """The CNN in plain JAX."""
    return cnns()[-1]


def mlp_parameters(*sizes: int) -> list[dict[str, np.ndarray]]:
    draw = rng(2).normal
    return [{"kernel": draw(size=pair), "bias": draw(size=pair[1])} for pair in zip(sizes, sizes[1:], strict=False)]


def dense(x, p):
    return x @ p["kernel"] + p["bias"]


def mlp(x, layers):
    """Dense layers with a relu between."""
    for p in layers[:-1]:
        x = jax.nn.relu(dense(x, p))
    return dense(x, layers[-1])
