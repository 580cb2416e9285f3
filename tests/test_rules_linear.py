"""Options of the rules for linear layers, against dense float64 matrices: bias, relative epsilon, four quadrants."""

from functools import partial
from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nets
import reference
from jaxlrp import lrp, rules
from nets import draw, linear, quick_compilation  # noqa: F401
from operations import OPERATIONS, Operation
from reference import contributions, distribute, negative, positive
from rule_checks import check, equal, on
from test_rules import dense_layer, examples

BY_NAME = {operation.name: operation for operation in OPERATIONS}


# ---------------------------------------------------------------------------------------------------- bias policies


def shared(c, z, b, R, policy, connected):
    """R_j = sum_k c_jk / z_k R_k with the bias b inside z: kept by it, given to what is connected, or left out."""
    if policy == "ignore":
        return distribute(c, z - b, R)
    received = distribute(c, z, R)
    if policy == "distribute":
        share = np.divide(R * b, z, out=np.zeros_like(z), where=z != 0)
        received += distribute(connected.astype(float), connected.sum(0), share)
    return received


def zero(a, layer, R, policy):
    c = contributions(a, layer)
    return shared(c, c.sum(0) + layer.b, layer.b, R, policy, layer.connected)


def epsilon(a, layer, R, policy, eps=0.3):
    """The stabiliser has the sign of the denominator; what it absorbs is not distributed."""
    c = contributions(a, layer)
    b = 0 * layer.b if policy == "ignore" else layer.b
    z = c.sum(0) + b
    stable = z + eps * np.where(z >= 0, 1, -1)
    received = distribute(c, stable, R)
    if policy == "distribute":
        received += distribute(layer.connected.astype(float), layer.connected.sum(0), R * b / stable)
    return received


def zplus(a, layer, R, policy):
    c, b = positive(contributions(a, layer)), positive(layer.b)
    return shared(c, c.sum(0) + b, b, R, policy, layer.connected)


def alpha_beta(a, layer, R, policy, alpha=2.5, beta=1.5):
    c, b = negative(contributions(a, layer)), negative(layer.b)
    return alpha * zplus(a, layer, R, policy) - beta * shared(c, c.sum(0) + b, b, R, policy, layer.connected)


def gamma(a, layer, R, policy, gamma=0.4):
    c = contributions(a, layer)
    c, b = c + gamma * positive(c), layer.b + gamma * positive(layer.b)
    return shared(c, c.sum(0) + b, b, R, policy, layer.connected)


def generalised_gamma(a, layer, R, policy, gamma=0.4):
    """The side of a unit is that of its output, bias included, whatever the policy."""
    c, received = contributions(a, layer), np.zeros_like(a)
    z = c.sum(0) + layer.b
    for part, chosen in ((positive, z > 0), (negative, z < 0)):
        d, b = c + gamma * part(c), layer.b + gamma * part(layer.b)
        received += shared(d, d.sum(0) + b, b, np.where(chosen, R, 0), policy, layer.connected)
    return received


POLICIES = ("absorb", "distribute", "ignore")
WITH_BIAS = {
    "zero": (rules.Zero, zero),
    "epsilon": (partial(rules.Epsilon, 0.3), epsilon),
    "zplus": (rules.ZPlus, zplus),
    "alpha-beta": (partial(rules.AlphaBeta, 2.5, 1.5), alpha_beta),
    "gamma": (partial(rules.Gamma, 0.4), gamma),
    "generalised-gamma": (partial(rules.GeneralizedGamma, 0.4), generalised_gamma),
}
LAYERS = ("dense", "conv-strided-same", "conv-grouped", "conv-batch-norm")
some_layers = pytest.mark.parametrize("operation", [BY_NAME[name] for name in LAYERS], ids=str)
FRONTS = {"any sign": (lambda x: x, lambda x: x), "behind a relu": (jax.nn.relu, positive)}


@some_layers
def test_policies_of_the_bias(operation: Operation):
    """All rules under all policies, in one program; inputs of any sign and known to be non-negative."""
    xs, Rs = examples(operation)
    parameters = operation.parameters(with_bias=True)
    layer = dense_layer(operation, True)
    cases = list(product(WITH_BIAS, POLICIES, FRONTS))

    def explain(x, R):
        return [
            lrp(
                lambda x, front=FRONTS[front][0]: operation.apply(front(x), *parameters),
                linear(WITH_BIAS[name][0](bias=policy)),
                target=lambda y: R,
            )(x)
            for name, policy, front in cases
        ]

    compiled = jax.jit(explain)
    ways = {"jit": [compiled(x, R) for x, R in zip(xs, Rs, strict=True)]}
    if operation.name in ("dense", "conv-grouped"):
        ways["vmap"] = list(zip(*jax.jit(jax.vmap(explain))(xs, Rs), strict=True))
    if operation.name == "dense":
        ways["plain"] = [explain(xs[0], Rs[0])]
    for how, results in ways.items():
        for got, x, R in zip(results, xs, Rs, strict=False):
            for relevance, (name, policy, front) in zip(got, cases, strict=True):
                right = WITH_BIAS[name][1](FRONTS[front][1](x).ravel(), layer, R.ravel(), policy)
                # a relu passes on what arrives, also where it gave 0
                equal(relevance, right.reshape(x.shape), f"{how}, {name}, {policy}, {front}")


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("name", WITH_BIAS)
def test_policies_do_not_matter_without_bias(name, policy):
    operation = BY_NAME["conv-strided-same"]
    xs, Rs = examples(operation)
    rule, right = WITH_BIAS[name]
    layer = dense_layer(operation, False)
    got = jax.jit(
        lambda: lrp(operation.apply, linear(rule(bias=policy)), target=lambda y: Rs[0])(
            xs[0], *operation.parameters(False)
        )
    )()
    equal(got, right(xs[0].ravel(), layer, Rs[0].ravel(), "absorb").reshape(xs[0].shape))


def test_policies_on_a_scale():
    """y = g x + b: the bias's share goes to the one input there is."""
    g, b, x, R = draw(0, 4), draw(1, 4), draw(2, 3, 4), draw(3, 3, 4)
    right = {"absorb": R * g * x / (g * x + b), "distribute": R, "ignore": R}
    for policy, relevance in right.items():
        got = lrp(lambda x: x * g + b, on("scale", rules.Zero(bias=policy)), target=lambda y: R)(x)
        equal(got, relevance, policy)


# ---------------------------------------------------------------------------------------------------- relative epsilon


@pytest.mark.parametrize("policy", ["absorb", "distribute"])
@pytest.mark.parametrize("shape", [(3, 5), (2, 3, 5)], ids=str)
def test_relative_epsilon_on_dense(shape, policy):
    """In units of the root mean square of z over all axes but the first, the examples'."""
    x, w, b, R = draw(4, *shape), draw(5, 5, 4), draw(6, 4), draw(7, *shape[:-1], 4)
    rule = rules.Epsilon(0.2, stabiliser="relative", bias=policy)
    compiled = jax.jit(lambda x, R: lrp(lambda x: x @ w + b, linear(rule), target=lambda y: R)(x))
    got = compiled(x, R)
    for i in range(len(x)):
        z = np.asarray(x[i] @ w + b)
        eps = 0.2 * np.sqrt((z**2).mean())
        layer = reference.Layer(np.asarray(w), np.asarray(b), np.ones(w.shape, bool))
        for a, r, found in zip(*(np.reshape(v[i], (-1, v.shape[-1])) for v in (x, R, got)), strict=True):
            equal(found, epsilon(a, layer, r, policy, eps), f"example {i}")
    equal(jax.vmap(lambda x, R: compiled(x[None], R[None])[0])(x, R), got)


def test_relative_epsilon_on_conv():
    x, R, kernel = draw(8, 3, 4, 4, 2), draw(9, 3, 2, 2, 3), draw(10, 3, 3, 2, 3)
    f = lambda x: nets.conv(x, kernel, stride=2) + 0.3
    layer = reference.layer(lambda x, k, b: (nets.conv(x[None], k, stride=2) + 0.3)[0], (4, 4, 2), kernel, None)
    got = lrp(f, linear(rules.Epsilon(0.2, stabiliser="relative")), target=lambda y: R)(x)
    for a, r, found, z in zip(x, R, got, f(x), strict=True):
        eps = 0.2 * np.sqrt((z**2).mean())
        equal(found.ravel(), epsilon(np.ravel(a), layer, np.ravel(r), "absorb", eps))


def test_relative_epsilon_on_a_sum():
    x, y, R = draw(11, 3, 4), draw(12, 3, 4), draw(13, 3, 4)
    z = x + y
    stable = z + 0.2 * np.sqrt((z**2).mean(1, keepdims=True)) * np.sign(z)
    composite = on("add", rules.Norm(0.2, stabiliser="relative"))
    equal(lrp(jnp.add, composite, argnums=(0, 1), target=lambda z: R)(x, y), (x / stable * R, y / stable * R))


# ---------------------------------------------------------------------------------------------------- four quadrants


def four_quadrants(a, layer, R, pp, nn, pn, np_):
    """Each combination of the signs of input and weight is distributed on its own; no bias."""
    received = np.zeros_like(a)
    parts = {"++": (positive, positive, pp), "--": (negative, negative, nn),
             "+-": (positive, negative, pn), "-+": (negative, positive, np_)}  # fmt: skip
    for of_a, of_w, number in parts.values():
        c = of_a(a)[:, None] * of_w(layer.w)
        received += number * distribute(c, c.sum(0), R)
    return received


@some_layers
def test_four_quadrants(operation: Operation):
    xs, Rs = examples(operation)
    parameters = operation.parameters(with_bias=True)
    layer = dense_layer(operation, True)
    numbers = ((1.0, 0.0, 0.0, 0.0), (0.7, 0.6, -0.5, 0.2), (0.0, 1.0, 0.0, 0.0), (2.0, 0.0, -1.0, 0.0))

    cases = [
        (
            lambda x, front=front: operation.apply(front(x), *parameters),
            linear(rules.FourQuadrant(*n)),
            lambda x, R, n=n, f=f: four_quadrants(f(x).ravel(), layer, R.ravel(), *n).reshape(x.shape),
        )
        for n in numbers
        for front, f in FRONTS.values()
    ]
    check(cases, xs, Rs)
