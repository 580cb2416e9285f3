"""What the tests of recognition share: the layers' names, the wraps, and the table to which nets are added.

A table is a list of (kind, rule), one pair per layer in program order; conv layers get ZPlus and dense layers Epsilon,
so that every other rule in a table is the one that `composites.base()` gives.
"""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import numpy as np
import pytest

import models
from jaxlrp import Composite, composites, plan, rules, select
from jaxlrp.analysis import analyse
from jaxlrp.program import Op
from models import conv

CONV, DENSE = ("conv", "ZPlus"), ("dense", "Epsilon")
ACT, BN, MOVE = ("activation", "Pass"), ("batch_norm", "Pass"), ("structural", "Pass")
ADD, SCALE, REDUCE, AVG = (("add", "Epsilon"), ("scale", "Epsilon"), ("reduce", "Epsilon"), ("avg_pool", "Epsilon"))
MAX, SOFTMAX, PRODUCT = ("max_pool", "Winner"), ("softmax", "SoftmaxTaylor"), ("product", "Uniform")

COMPOSITE = composites.epsilon_plus()
ZERO = Composite([(select.kind("dense", "conv"), rules.Zero())])


def rows(function: Callable, *args) -> list[tuple[str, str]]:
    return [(row.kind, type(row.rule).__name__) for row in plan(function, COMPOSITE)(*args)]


def ops(function: Callable, *args) -> list[Op]:
    return list(analyse(function, args, {}, 0)[1].ops())


def names(function: Callable, *args) -> list[str]:
    """Of the layers that have parameters."""
    return [
        row.name for row in plan(function, COMPOSITE)(*args) if row.kind in ("dense", "conv", "batch_norm", "scale")
    ]


def close(got, right, tolerance=1e-10, where=""):
    right = np.asarray(right)
    assert np.any(right), "a comparison with nothing shows nothing"
    np.testing.assert_allclose(got, right, rtol=0, atol=tolerance * abs(right).max(), err_msg=where)


# The same layers, however the function is wrapped.
WRAPS: dict[str, Callable[[Callable], Callable]] = {
    "plain": lambda f: f,
    "jit": jax.jit,
    "jit of jit": lambda f: jax.jit(lambda *args: jax.jit(f)(*args)),
    "checkpoint": jax.checkpoint,
    "jit of checkpoint": lambda f: jax.jit(jax.checkpoint(f)),
}
every_wrap = pytest.mark.parametrize("wrap", WRAPS.values(), ids=WRAPS)


P = {
    **models.numbers(),
    "side": {"kernel": models.rng(3).normal(size=(3, 3, 3, 4)), "bias": models.rng(4).normal(size=4)},
    "third": {"kernel": models.rng(5).normal(size=(3, 3, 3, 4)), "bias": models.rng(6).normal(size=4)},
    "wide": {"kernel": models.rng(7).normal(size=(3, 3, 8, 4)), "bias": models.rng(8).normal(size=4)},
    "wide_norm": {k: np.concatenate([v, v]) for k, v in models.numbers()["norm"].items()},
    "depthwise": {"kernel": models.rng(9).normal(size=(3, 3, 1, 4))},
    "grouped": {"kernel": models.rng(10).normal(size=(3, 3, 2, 4))},
    "gate": {"kernel": models.rng(11).normal(size=(4, 4)), "bias": models.rng(12).normal(size=4)},
    "flat": {"kernel": models.rng(13).normal(size=(256, 3)), "bias": models.rng(14).normal(size=3)},
    "mean": models.rng(15).normal(size=3),
    "std": np.array([0.5, 1.0, 2.0]),
    "spatial": models.rng(16).normal(size=(8, 8, 1)),
}
LINEAR_NETS = []  # piecewise linear: the zero rule is gradient x input
OTHER_NETS = []


@dataclass(frozen=True)
class Net:
    apply: Callable  # (x, parameters) -> output
    rows: list[tuple[str, str]]
    input: tuple[int, ...]

    def __str__(self) -> str:
        return self.apply.__name__.strip("_").replace("_", "-")


def net(*rows: tuple[str, str], linear: bool = True, input=models.IMAGES):
    def add(function):
        (LINEAR_NETS if linear else OTHER_NETS).append(Net(function, list(rows), input))
        return function

    return add


def layer(x, p):
    return conv(x, p["kernel"]) + p["bias"]
