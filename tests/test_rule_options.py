"""Options of the rules, and the rules for sums, pools, maxima and softmax, against sums written down to be read.

References are dense float64 matrices (reference.py) or loops over windows; every case is explained plainly, compiled
and mapped over its examples.
"""

from functools import partial
from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import nets
import reference
from jaxlrp import Composite, composites, errors, lrp, rules, select
from nets import draw, linear, quick_compilation  # noqa: F401
from operations import OPERATIONS, Operation
from reference import contributions, distribute, negative, positive
from test_rules import dense_layer, examples

BY_NAME = {operation.name: operation for operation in OPERATIONS}


def equal(got, right, where=""):
    np.testing.assert_allclose(got, right, rtol=0, atol=1e-8, err_msg=where)


def on(kind: str, rule: rules.Rule) -> Composite:
    return Composite([(select.kind(kind), rule)])


def check(cases, xs, Rs):
    """Each case is (f, composite, right): f's relevance must be right(x, R). All are compiled together."""

    def explain(x, R, cases=cases):
        return [lrp(f, composite, target=lambda y: R)(x) for f, composite, _ in cases]

    compiled = jax.jit(explain)
    ways = {
        "plain": [explain(xs[0], Rs[0], cases[:1])],  # step by step, which takes longest
        "jit": [compiled(x, R) for x, R in zip(xs, Rs, strict=True)],
        "vmap": list(zip(*jax.jit(jax.vmap(explain))(xs, Rs), strict=True)),
    }
    xs, Rs = np.asarray(xs), np.asarray(Rs)
    rights = [[right(x, R) for *_, right in cases] for x, R in zip(xs, Rs, strict=True)]
    for how, results in ways.items():
        for i, (got, right) in enumerate(zip(results, rights, strict=False)):
            for k, (one, other) in enumerate(zip(got, right, strict=False)):
                equal(one, other, f"{how}, example {i}, case {k}")


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


# ---------------------------------------------------------------------------------------------------- sums


def summed(x):
    return x[0] + 2 * x[1] - x[2]


def test_norm_and_uniform_and_absolute_share_on_sums():
    xs, Rs = draw(14, 4, 3, 5), draw(15, 4, 5)
    xs = xs.at[0, :, 0].set(0).at[1, 0].set(0)
    signs = np.array([1, 2, -1])[:, None]

    def absolute(x, R):
        sizes = abs(x * signs)
        return np.divide(sizes, sizes.sum(0), out=np.zeros_like(x), where=sizes.sum(0) != 0) * R

    def norm(x, R):
        z = (x * signs).sum(0)
        return x * signs / (z + 0.1 * np.where(z >= 0, 1, -1)) * R

    def uniform(x, R):
        return np.ones_like(x) / 3 * R

    cases = {rules.AbsoluteShare(): absolute, rules.Norm(0.1): norm, rules.Uniform(): uniform}
    check([(summed, on("add", r) + on("scale", rules.Pass()), right) for r, right in cases.items()], xs, Rs)


def test_absolute_share_on_a_residual_sum():
    """Both branches get relevance of the sign that arrives, in proportion to their sizes."""
    w, xs, Rs = draw(16, 5, 5), draw(17, 3, 5), draw(18, 3, 5)

    def right(x, R):
        y = x @ np.asarray(w)
        s = R / (abs(x) + abs(y))
        layer = reference.Layer(np.asarray(w), np.zeros(5), np.ones((5, 5), bool))
        return abs(x) * s + reference.zero(x, layer, abs(y) * s)

    check([(lambda x: x + x @ w, on("add", rules.AbsoluteShare()) + linear(rules.Zero()), right)], xs, Rs)


def test_sums_that_broadcast():
    """An operand that is repeated gets the sum over its copies."""
    x, y, R = draw(19, 3, 4), draw(20, 1, 4), draw(21, 3, 4)
    size = abs(x) + abs(y)
    f = lambda x, y: x + y
    cases = {
        rules.AbsoluteShare(): (abs(x) / size * R, (abs(y) / size * R).sum(0, keepdims=True)),
        rules.Uniform(): (R / 2, R.sum(0, keepdims=True) / 2),
        rules.Norm(0.0): (x / (x + y) * R, (y / (x + y) * R).sum(0, keepdims=True)),
    }
    for rule, right in cases.items():
        equal(lrp(f, on("add", rule), argnums=(0, 1), target=lambda z: R)(x, y)[0], right[0])
        equal(lrp(f, on("add", rule), argnums=(0, 1), target=lambda z: R)(x, y)[1], right[1])


@pytest.mark.parametrize(
    "rule", [rules.Uniform(), rules.AbsoluteShare(), rules.Norm(0.0)], ids=lambda r: type(r).__name__
)
def test_a_term_that_occurs_twice_counts_twice(rule):
    x, y, R = draw(22, 3, 4), draw(23, 3, 4), draw(24, 3, 4)
    right = {
        rules.Uniform: (2 * R / 3, R / 3),
        rules.AbsoluteShare: (2 * abs(x) / (2 * abs(x) + abs(y)) * R, abs(y) / (2 * abs(x) + abs(y)) * R),
        rules.Norm: (2 * x / (2 * x + y) * R, y / (2 * x + y) * R),
    }[type(rule)]
    got = lrp(lambda x, y: x + y + x, on("add", rule), argnums=(0, 1), target=lambda z: R)(x, y)
    equal(got[0], right[0])
    equal(got[1], right[1])


# ---------------------------------------------------------------------------------------------------- windows

# size, stride, padding, base dilation, window dilation
WINDOWS = {
    "apart": (2, 2, "VALID", 1, 1),
    "overlapping": (3, 1, "VALID", 1, 1),
    "padded": (3, 2, "SAME", 1, 1),
    "padding of its own": (2, 2, ((1, 0), (0, 1)), 1, 1),
    "dilated": (2, 1, "VALID", 1, 2),
    "spread": (2, 1, ((1, 1), (0, 1)), 2, 1),
}


def taps(name, shape):
    """For every output position of a window over (h, w, c), the positions it reads that are no padding."""
    size, stride, padding, base, dilation = WINDOWS[name]
    wide = [(n - 1) * base + 1 for n in shape[:2]]
    span = (size - 1) * dilation + 1
    if padding == "SAME":
        outs = [-(-n // stride) for n in wide]
        lows = [max((o - 1) * stride + span - n, 0) // 2 for o, n in zip(outs, wide, strict=True)]
    else:
        pads = ((0, 0), (0, 0)) if padding == "VALID" else padding
        outs = [(n + sum(p) - span) // stride + 1 for n, p in zip(wide, pads, strict=True)]
        lows = [p[0] for p in pads]
    found = {}
    for k in np.ndindex(*outs, shape[2]):
        reads = []
        for d in np.ndindex(size, size):
            at = [i * stride - low + o * dilation for i, low, o in zip(k, lows, d, strict=False)]
            if all(0 <= p < n and p % base == 0 for p, n in zip(at, wide, strict=True)):
                reads.append((at[0] // base, at[1] // base, k[2]))
        found[k] = reads
    return found


def window(name, x, reducer, start):
    """A window over one example (h, w, c)."""
    size, stride, padding, base, dilation = WINDOWS[name]
    padding = padding if isinstance(padding, str) else (*padding, (0, 0))
    three = lambda n: (n, n, 1)
    return lax.reduce_window(x, start, reducer, three(size), three(stride), padding, three(base), three(dilation))


def looped(name, share, x, R):
    """Each window's relevance, times share(its elements), goes to its elements."""
    received = np.zeros_like(x)
    for k, reads in taps(name, x.shape).items():
        if reads:
            for at, part in zip(reads, share(np.array([x[at] for at in reads])), strict=True):
                received[at] += part * R[k]
    return received


def pooled_examples(name):
    """Integers, so that most windows tie; and relevance."""
    xs = np.random.default_rng(25).integers(-2, 3, size=(3, 5, 4, 2)).astype(float)
    outputs = jax.eval_shape(lambda x: window(name, x, lax.max, -np.inf), xs[0]).shape
    return xs, draw(26, 3, *outputs)


every_window = pytest.mark.parametrize("name", WINDOWS)


@every_window
def test_windows_of_the_reference(name):
    """The loops read what the pools read."""
    (x, *_), _ = pooled_examples(name)
    got = window(name, x, lax.max, -np.inf)
    for k, reads in taps(name, x.shape).items():
        assert got[k] == max((x[at] for at in reads), default=-np.inf)


def first(v, best=np.max):
    return np.eye(len(v))[np.argmax(v == best(v))]


def split(v, best=np.max):
    return (v == best(v)) / (v == best(v)).sum()


def proportional(v):
    return v / v.sum() if v.sum() else np.zeros_like(v)


@every_window
def test_max_pools(name):
    """Winner takes all, the first of several or in equal parts; or all in proportion."""
    xs, Rs = pooled_examples(name)
    pool = partial(window, name, reducer=lax.max, start=-np.inf)
    cases = {rules.Winner(): first, rules.Winner("first"): first, rules.Winner("split"): split,
             rules.Proportional(): proportional}  # fmt: skip
    check([(pool, on("max_pool", rule), partial(looped, name, share)) for rule, share in cases.items()], xs, Rs)


@every_window
def test_min_pools(name):
    xs, Rs = pooled_examples(name)
    pool = partial(window, name, reducer=lax.min, start=np.inf)
    cases = {rules.Winner(): partial(first, best=np.min), rules.Winner("split"): partial(split, best=np.min)}
    check([(pool, on("max_pool", rule), partial(looped, name, share)) for rule, share in cases.items()], xs, Rs)


@every_window
def test_average_pools(name):
    """In proportion, with a stabiliser or without; or in equal parts, whatever the values."""
    xs, Rs = pooled_examples(name)
    pool = lambda x: window(name, x, lax.add, 0.0) / 4

    def norm(v, eps=0.2):
        z = v.sum() / 4
        return v / 4 / (z + eps * (1 if z >= 0 else -1))

    cases = {rules.Norm(0.2): norm, rules.Epsilon(0.2): norm, rules.Zero(): proportional,
             rules.Uniform(): lambda v: np.ones_like(v) / len(v)}  # fmt: skip
    check([(pool, on("avg_pool", rule), partial(looped, name, share)) for rule, share in cases.items()], xs, Rs)


# ---------------------------------------------------------------------------------------------------- axes


def along(axes, share, x, R):
    """As `looped`, for windows that are whole axes."""
    kept = [i for i in range(x.ndim) if i not in axes]
    flat = x.transpose(*kept, *axes).reshape(*(x.shape[i] for i in kept), -1)
    parts = np.stack([share(v) for v in flat.reshape(-1, flat.shape[-1])]).reshape(flat.shape)
    sent = (parts * np.reshape(R, flat.shape[:-1])[..., None]).reshape(*(x.shape[i] for i in (*kept, *axes)))
    return sent.transpose(np.argsort([*kept, *axes]))


AXES = pytest.mark.parametrize("axes, keepdims", [((0,), False), ((2,), True), ((0, 2), False), ((0, 1, 2), False)])


@AXES
def test_reductions_over_axes(axes, keepdims):
    xs = np.random.default_rng(27).integers(-2, 3, size=(2, 2, 3, 4)).astype(float)
    options = {"axis": axes, "keepdims": keepdims}
    Rs = draw(28, 2, *np.max(xs[0], **options).shape)
    largest, smallest = (partial(f, **options) for f in (jnp.max, jnp.min))
    cases = [
        (largest, "max_pool", rules.Winner(), first),
        (largest, "max_pool", rules.Winner("split"), split),
        (largest, "max_pool", rules.Proportional(), proportional),
        (smallest, "max_pool", rules.Winner(), partial(first, best=np.min)),
        (smallest, "max_pool", rules.Winner("split"), partial(split, best=np.min)),
        (partial(jnp.mean, **options), "reduce", rules.Uniform(), lambda v: np.ones_like(v) / len(v)),
        (partial(jnp.sum, **options), "reduce", rules.Zero(), proportional),
    ]

    check([(f, on(kind, rule), partial(along, axes, share)) for f, kind, rule, share in cases], xs, Rs)


def test_maximum_of_two_values_splits_ties():
    x, y, R = np.array([1.0, 2.0, 3.0, -1.0]), np.array([2.0, 2.0, 1.0, -1.0]), np.array([1.0, 10.0, 100.0, 1000.0])
    for ties in ("first", "split"):
        got = lrp(jnp.maximum, on("max_pool", rules.Winner(ties)), argnums=(0, 1), target=lambda z: R)(x, y)
        equal(got, ([0, 5, 100, 500], [1, 5, 0, 500]))


def softmax(v):
    return np.exp(v - v.max()) / np.exp(v - v.max()).sum()


@AXES
def test_logsumexp_is_a_smooth_maximum(axes, keepdims):
    """R_i = s_i R."""
    xs = 3 * draw(29, 2, 2, 3, 4)
    f = partial(jax.nn.logsumexp, axis=axes, keepdims=keepdims)
    Rs = draw(30, 2, *f(xs[0]).shape)
    right = partial(along, axes, softmax)
    written = lambda x: jnp.log(jnp.exp(x).sum(axes, keepdims=keepdims))
    check([(f, on("max_pool", rules.Winner()), right), (written, on("max_pool", rules.Winner("split")), right)], xs, Rs)


# ---------------------------------------------------------------------------------------------------- softmax


@pytest.mark.parametrize("axis", [0, 1, -1])
@pytest.mark.parametrize("log", [False, True], ids=["softmax", "log_softmax"])
def test_softmax_on_every_axis(axis, log):
    """R_i = x_i (R_i - s_i sum_j R_j), at the raw logits; those of -inf get nothing."""
    xs, Rs = 2 * draw(31, 2, 2, 3, 4), draw(32, 2, 2, 3, 4)
    xs = xs.at[0, 0, 0, 0].set(-jnp.inf).at[1, 1, 2, 3].set(-jnp.inf)
    function = jax.nn.log_softmax if log else jax.nn.softmax
    variants = {
        "plain": lambda x: function(x, axis=axis),
        "transposed": lambda x: function(x.transpose(2, 0, 1), axis=(axis % 3 + 1) % 3).transpose(1, 2, 0),
    }
    if not log:
        variants["by hand"] = lambda x: jnp.exp(x) / jnp.exp(x).sum(axis, keepdims=True)

    def right(x, R):
        s = np.exp(x - x.max(axis, keepdims=True))
        s = s / s.sum(axis, keepdims=True)
        return np.where(np.isneginf(x), 0, np.where(np.isneginf(x), 0, x) * (R - s * R.sum(axis, keepdims=True)))

    cases = [(f, on("softmax", rules.SoftmaxTaylor()), right) for f in variants.values()]
    check(cases, xs, jnp.where(jnp.isneginf(xs), 0, Rs))


# ---------------------------------------------------------------------------------------------------- gradients


W1, W2, C1, C2 = (np.asarray(draw(33 + i, *s)) for i, s in enumerate([(5, 6), (6, 4), (6,), (4,)]))

RELUS = {
    "guided": (composites.guided_backprop(), lambda z, R: R if z > 0 and R > 0 else 0.0),
    "deconvnet": (composites.deconvnet(), lambda z, R: R if R > 0 else 0.0),
    "beta-smooth": (composites.beta_smooth(2.0), lambda z, R: R / (1 + np.exp(-2.0 * z))),
}


SPELLINGS = (jax.nn.relu, lambda x: jnp.maximum(x, 0), lambda x: jnp.maximum(0.0, x))


def test_modified_relus():
    """The gradient, unit by unit, with another derivative at the relus, however they are written."""

    def net(relu, x):
        return relu(relu(x @ W1 + C1) @ W2 + C2)

    def right(x, R, relu):
        z = x @ W1 + C1
        y = np.maximum(z, 0) @ W2 + C2
        g = [relu(y[k], R[k]) for k in range(4)]
        h = [relu(z[j], sum(W2[j, k] * g[k] for k in range(4))) for j in range(6)]
        return np.array([sum(W1[i, j] * h[j] for j in range(6)) for i in range(5)])

    cases = [
        (partial(net, spelling), composite, partial(right, relu=relu))
        for composite, relu in RELUS.values()
        for spelling in SPELLINGS
    ]
    check(cases, draw(40, 3, 5), draw(41, 3, 4))


def test_modified_relus_leave_everything_else_to_the_gradient():
    """Sums, pools, softmax, products, other activations."""

    def smooth(x):
        y = jnp.tanh(x @ W1[:, :5]) * x
        y = jax.nn.softmax(y + 3 * x) @ W1
        return y.reshape(2, 3).max(0)

    xs, Rs = draw(42, 3, 5), draw(43, 3, 3)

    def right(x, R, relu):
        y, pull = jax.vjp(smooth, x)
        return pull(np.array([relu(z, r) for z, r in zip(y, R, strict=True)]))[0]

    f = lambda x: jax.nn.relu(smooth(x))
    check([(f, composite, partial(right, relu=relu)) for composite, relu in RELUS.values()], xs, Rs)


def test_excitation_backprop():
    """Zhang 2016: R_j = sum_k a_j w+_jk / (sum_i a_i w+_ik) R_k, from the winning logit of a relu network down."""
    xs = np.abs(draw(44, 3, 5))

    def f(x):
        return jax.nn.relu(x @ W1) @ W2

    def right(x, R):
        a = np.maximum(x @ W1, 0)
        layers = [reference.Layer(positive(w), np.zeros(w.shape[1]), np.ones(w.shape, bool)) for w in (W1, W2)]
        return reference.zero(x, layers[0], reference.zero(a, layers[1], R))

    check([(f, composites.excitation_backprop(), right)], xs, np.eye(4)[:3])


# ---------------------------------------------------------------------------------------------------- bounded ReLUs

BOUNDED = {
    "relu": (jax.nn.relu, np.inf),
    "maximum": (lambda x: jnp.maximum(0.0, x), np.inf),
    "relu6": (jax.nn.relu6, 6.0),
    "clip": (lambda x: jnp.clip(x, 0, 6), 6.0),
    "by hand": (lambda x: jnp.minimum(jnp.maximum(x, 0), 2.0), 2.0),
}


@pytest.mark.parametrize("relu, bound", BOUNDED.values(), ids=BOUNDED)
def test_gradients_with_modified_relus_know_the_upper_bound(relu, bound):
    x, R = np.linspace(-8.0, 8.0, 9), np.asarray([1.0, -2.0, 3.0] * 3)
    explain = lambda composite: np.asarray(lrp(relu, composite, target=lambda y: R)(x))
    np.testing.assert_allclose(explain(composites.deconvnet()), np.maximum(R, 0))
    np.testing.assert_allclose(explain(composites.guided_backprop()), np.maximum(R, 0) * ((x > 0) & (x < bound)))
    sigmoid = lambda v: 1 / (1 + np.exp(-3.0 * v))
    smooth = sigmoid(x) - (sigmoid(x - bound) if np.isfinite(bound) else 0)
    np.testing.assert_allclose(explain(composites.beta_smooth(3.0)), smooth * R, atol=1e-12)


@pytest.mark.parametrize("f", [jnp.tanh, lambda x: jnp.clip(x, -1, 1), lambda x: jnp.maximum(x, 1.0), jax.nn.gelu])
def test_gradients_with_modified_relus_need_relus(f):
    with pytest.raises(errors.SelectorError, match="GuidedBackprop cannot be applied to.*it is for: activation"):
        lrp(f, composites.guided_backprop())(np.ones(3))
