"""Which layers a selector picks, and a net with layers of every common kind to pick from."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

import models
from jaxlrp import select
from jaxlrp.analysis import analyse
from jaxlrp.program import Op
from models import conv, dense


def ops(function: Callable, *args) -> list[Op]:
    return list(analyse(function, args, {}, 0)[1].ops())


def selected(selector: select.Selector, function: Callable, *args) -> list[str]:
    """Names of the layers that the selector picks, in program order."""
    found = ops(function, *args)
    selector.check(found)
    return [op.name for op in found if selector.matches(op)]


# A net with two stems, two heads and a layer of every common kind.
#
#   x --- left: conv - relu --- add - max_pool --- trunk: conv - relu - mean --- neck: dense - tanh --- head: dense
#     \-- right: conv - relu -/                                                                   \--- side: dense


def forked(x, p):
    left = jax.nn.relu(conv(x, p["left"]["kernel"]))
    right = jax.nn.relu(conv(x, p["right"]["kernel"]))
    y = models.max_pool(left + right)
    y = jax.nn.relu(conv(y, p["trunk"]["kernel"])).mean((1, 2))
    y = jnp.tanh(dense(y, p["neck"]))
    return dense(y, p["head"]), dense(y, p["side"])


def kernel(*shape: int) -> dict[str, np.ndarray]:
    return {"kernel": np.ones(shape)}


def layer(*shape: int) -> dict[str, np.ndarray]:
    return {"kernel": np.ones(shape), "bias": np.ones(shape[-1])}


FORKED = (
    forked,
    np.zeros((2, 8, 8, 3)),
    {
        "left": kernel(3, 3, 3, 4),
        "right": kernel(3, 3, 3, 4),
        "trunk": kernel(3, 3, 4, 4),
        "neck": layer(4, 5),
        "head": layer(5, 3),
        "side": layer(5, 2),
    },
)
ALL = [
    "left",
    "relu",
    "right",
    "relu#2",
    "add",
    "max_pool",
    "trunk",
    "relu#3",
    "reduce",
    "neck",
    "tanh",
    "head",
    "side",
]
WEIGHTED = ["left", "right", "trunk", "neck", "head", "side"]
