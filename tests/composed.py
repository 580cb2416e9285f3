"""A CNN, and the rule that each of its layers gets from each named composite."""

import jax
import numpy as np
import pytest

import models
from jaxlrp import Composite, composites, rules
from jaxlrp.rules import AlphaBeta, Epsilon, Flat, GeneralizedGamma, Pass, Winner, WSquare, ZBox, ZPlus


def close(got, right, tolerance=1e-10):
    right = np.asarray(right)
    assert np.any(right), "a comparison with nothing shows nothing"
    np.testing.assert_allclose(got, right, rtol=0, atol=tolerance * abs(right).max())


# The CNN with a second dense layer, so that one of each is not the first, and not the last.
CNN = models.cnn()
X = models.images()
WIDE = {"kernel": models.rng(3).normal(size=(3, 5)), "bias": models.rng(4).normal(size=5)}
P = {**CNN.parameters, "last": WIDE}


def cnn(x, p):
    return models.dense(jax.nn.relu(models.plain_cnn(x, p)), p["last"])


LAYERS = ["stem", "relu", "block", "relu#2", "add", "max_pool", "avg_pool", "reduce", "head", "relu#3", "last"]
N = Epsilon(1e-9)  # zennit's Norm


def table(stem, conv, dense) -> list[tuple[str, rules.Rule]]:
    """What the layers of `cnn` get: activations and sums are the same in all."""
    return list(zip(LAYERS, [stem, Pass(), conv, Pass(), N, Winner(), N, N, dense, Pass(), dense], strict=True))


NAMED: dict[str, tuple[Composite, list[tuple[str, rules.Rule]]]] = {
    "epsilon": (composites.epsilon(), table(Epsilon(1e-6), Epsilon(1e-6), Epsilon(1e-6))),
    "epsilon, number": (composites.epsilon(epsilon=0.1), table(Epsilon(0.1), Epsilon(0.1), Epsilon(0.1))),
    "epsilon_plus": (composites.epsilon_plus(), table(ZPlus(), ZPlus(), Epsilon(1e-6))),
    "epsilon_plus, number": (composites.epsilon_plus(epsilon=0.1), table(ZPlus(), ZPlus(), Epsilon(0.1))),
    "epsilon_plus_flat": (composites.epsilon_plus_flat(), table(Flat(), ZPlus(), Epsilon(1e-6))),
    "epsilon_plus_flat, number": (composites.epsilon_plus_flat(epsilon=0.1), table(Flat(), ZPlus(), Epsilon(0.1))),
    "epsilon_gamma_box": (
        composites.epsilon_gamma_box(-3.0, 4.0),
        table(ZBox(-3.0, 4.0), GeneralizedGamma(0.25), Epsilon(1e-6)),
    ),
    "epsilon_gamma_box, numbers": (
        composites.epsilon_gamma_box(low=-3.0, high=4.0, epsilon=0.1, gamma=0.5),
        table(ZBox(-3.0, 4.0), GeneralizedGamma(0.5), Epsilon(0.1)),
    ),
    "epsilon_alpha2_beta1": (
        composites.epsilon_alpha2_beta1(),
        table(AlphaBeta(2.0, 1.0), AlphaBeta(2.0, 1.0), Epsilon(1e-6)),
    ),
    "epsilon_alpha2_beta1, number": (
        composites.epsilon_alpha2_beta1(epsilon=0.1),
        table(AlphaBeta(2.0, 1.0), AlphaBeta(2.0, 1.0), Epsilon(0.1)),
    ),
    "epsilon_alpha2_beta1_flat": (
        composites.epsilon_alpha2_beta1_flat(),
        table(Flat(), AlphaBeta(2.0, 1.0), Epsilon(1e-6)),
    ),
    "deep_taylor": (composites.deep_taylor(), table(WSquare(), ZPlus(), ZPlus())),
    "deep_taylor, non-negative": (composites.deep_taylor("nonnegative"), table(ZPlus(), ZPlus(), ZPlus())),
    "deep_taylor, box": (
        composites.deep_taylor("box", low=-3.0, high=4.0),
        table(ZBox(-3.0, 4.0), ZPlus(), ZPlus()),
    ),
    "deep_taylor, bounds": (composites.deep_taylor(low=-3.0, high=4.0), table(ZBox(-3.0, 4.0), ZPlus(), ZPlus())),
}
every_composite = pytest.mark.parametrize("composite, right", NAMED.values(), ids=NAMED)
