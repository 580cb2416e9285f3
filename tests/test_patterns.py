"""Patterns: what `patterns.fit` learns, against sums over explicit samples in float64, and the rules that use them."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import nets
import reference
from jaxlrp import Composite, composites, gradients, lrp, patterns, plan, rules, select
from nets import close, draw, linear, quick_compilation  # noqa: F401
from operations import OPERATIONS, Operation

every_operation = pytest.mark.parametrize("operation", OPERATIONS, ids=str)
every_estimator = pytest.mark.parametrize("estimator", ["two_component", "linear"])
FOLDED = ("batch-norm", "divided", "subtracted", "preprocessing", "inverted")  # what scales belongs to the layer


def folded(operation: Operation) -> bool:
    return any(word in operation.name for word in FOLDED)


def solve(x, y, w, estimator):
    """Kindermans 2018: x (samples, weights of one unit), y (samples,), w (weights,) -> the unit's pattern."""
    chosen = y > 0 if estimator == "two_component" else y == y
    if not chosen.any():
        return 0 * w
    c = (x[chosen] * y[chosen, None]).mean(0) - x[chosen].mean(0) * y.mean()
    return c / (w @ c)


def only(found):
    (pattern,) = found.values()
    return pattern


# ---------------------------------------------------------------------------------------------------- the estimators


def toy(estimator: str, samples: int = 400, inputs: int = 6):
    """x = a s + d eps, and w with w^T a = 1, w^T d = 0; eps is uncorrelated with s in the sample, as in the limit."""
    rng = np.random.default_rng(0)
    a, d = rng.normal(size=(2, inputs))
    d += 8 * a  # so that the weight must turn away from the signal
    s, eps = rng.normal(size=(2, samples))
    w = np.linalg.lstsq(np.stack([a, d]), np.array([1.0, 0.0]), rcond=None)[0]
    chosen = s > 0 if estimator == "two_component" else s == s
    basis = np.linalg.qr(np.stack([chosen, chosen * s], axis=1).astype(float))[0]
    eps -= basis @ (basis.T @ eps)
    return s[:, None] * a + eps[:, None] * d, a, d, w


@every_estimator
def test_signal_and_distractor(estimator):
    """The pattern is the signal's direction, whatever that of the weight."""
    x, a, d, w = toy(estimator)
    found = patterns.fit(lambda x: x @ w[:, None], np.split(x, 8), estimator=estimator)
    close(only(found), a[:, None], 1e-10)
    signal = lrp(lambda x: x @ w[:, None], composites.pattern_net(found))(x)
    close(signal, (x @ w)[:, None] * a, 1e-10)
    assert w @ a / np.linalg.norm(w) / np.linalg.norm(a) < 0.5


def test_in_the_limit():
    rng = np.random.default_rng(1)
    a, d = np.array([1.0, 0.0]), np.array([1.0, 1.0])
    w = np.array([1.0, -1.0])
    batches = (rng.normal(size=(50_000, 1)) * a + rng.normal(size=(50_000, 1)) * d for _ in range(4))
    found = patterns.fit(lambda x: x @ w[:, None] + 0.3, batches, estimator="linear")
    close(only(found), a[:, None], 0.02)


def units(operation: Operation, kernel, bias) -> tuple[np.ndarray, np.ndarray]:
    """(outputs, units): which unit an output is one sample of; (weights, units): which weights a unit has.

    Two outputs that read a common weight are samples of the same unit. Of a transposed convolution, two may not; its
    units are the channels.
    """
    flat = lambda k: operation.apply(operation.rng("taps").normal(size=operation.input), k, bias).ravel()
    taps = np.asarray(jax.jacobian(flat)(kernel)).reshape(-1, kernel.size) != 0
    same = np.linalg.matrix_power(taps.astype(int) @ taps.T, 4) > 0
    if any(word in operation.name for word in ("transpose", "dilated")) and operation.kind == "conv":
        channel = np.arange(len(taps)) % operation.output[-1]
        same = channel[:, None] == channel
    members = np.unique(same, axis=0).T
    return members, taps.T.astype(int) @ members > 0


@every_operation
def test_fit(operation: Operation):
    """Every way to write a layer, against the kernel's gradient of each output as its sample of x."""
    kernel, bias = operation.parameters(with_bias=True)
    f = lambda x: operation.apply(x, kernel, bias)
    xs = operation.rng("fit").normal(size=(4, *operation.input)) + 0.3
    members, owned = units(operation, kernel, bias)
    flat = lambda k, x: operation.apply(x, k, bias).ravel()
    samples = np.asarray(jax.jit(jax.vmap(jax.jacobian(flat), (None, 0)))(kernel, xs))
    samples, y = samples.reshape(*samples.shape[:2], -1), np.asarray(jax.vmap(partial(flat, kernel))(xs))
    right = np.zeros(kernel.size)
    for outputs, weights in zip(members.T, owned.T, strict=True):
        x = samples[:, outputs][..., weights].reshape(-1, weights.sum())
        right[weights] = solve(x, y[:, outputs].ravel(), kernel.ravel()[weights], "two_component")
    found, right = only(patterns.fit(f, iter(xs), estimator="two_component")), right.reshape(kernel.shape)
    assert found.shape == kernel.shape
    if folded(operation):
        # a scale that is folded into the kernel is folded out of the pattern: their product stays
        found, right = found * effective_kernel(f, xs[0]), right * kernel
    close(found, right, 1e-10)


def effective_kernel(f, x) -> np.ndarray:
    seen = []

    @rules.rule
    class Spy(rules.Rule):
        def propagate(self, layer, relevance):
            seen.append(layer.kernel)
            return (jnp.zeros_like(layer.inputs[0]),)

    lrp(f, linear(Spy()))(x)
    return np.asarray(seen[0])


CONVOLUTIONS = {  # strides, padding, kernel's dilation, groups
    "valid": ((1, 1), ((0, 0), (0, 0)), (1, 1), 1),
    "padded, strided": ((2, 3), ((1, 2), (0, 1)), (1, 1), 1),
    "dilated": ((1, 2), ((2, 2), (1, 0)), (2, 3), 1),
    "grouped": ((2, 1), ((1, 1), (1, 1)), (1, 1), 2),
    "depthwise": ((1, 1), ((1, 1), (1, 1)), (2, 1), 4),
}


@every_estimator
@pytest.mark.parametrize("options", CONVOLUTIONS.values(), ids=CONVOLUTIONS)
def test_patches(options, estimator):
    """Convolutions against loops over patches."""
    strides, padding, dilation, groups = options
    x, kernel, bias = draw(1, 3, 7, 8, 4), np.asarray(draw(2, 3, 2, 4 // groups, 8)), np.asarray(draw(3, 8))

    def f(x):
        return bias + lax.conv_general_dilated(
            x, kernel, strides, padding, rhs_dilation=dilation, feature_group_count=groups,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )  # fmt: skip

    padded = np.pad(x, ((0, 0), *padding, (0, 0)))
    span = [(k - 1) * d + 1 for k, d in zip(kernel.shape, dilation, strict=False)]
    right = np.zeros(kernel.shape)
    for unit in range(8):
        group = slice(*(np.array([0, 4 // groups]) + unit // (8 // groups) * (4 // groups)))
        patches = np.stack([
            image[i : i + span[0] : dilation[0], j : j + span[1] : dilation[1], group].ravel()
            for image in padded
            for i in range(0, image.shape[0] - span[0] + 1, strides[0])
            for j in range(0, image.shape[1] - span[1] + 1, strides[1])
        ])  # fmt: skip
        w = kernel[..., unit].ravel()
        right[..., unit] = solve(patches, patches @ w + bias[unit], w, estimator).reshape(kernel.shape[:-1])
    close(only(patterns.fit(f, [x[:1], x[1:]], estimator=estimator)), right, 1e-10)


P, X = nets.cnn_parameters(), draw(5, 12, 4, 4, 2)


def test_batches_add_up():
    """One batch, several, and batches of different lengths learn the same."""
    whole = patterns.fit(nets.cnn, [(P, X)], 1)
    close(patterns.fit(nets.cnn, ((P, x) for x in np.split(X, 3)), 1), whole, 1e-10)
    close(patterns.fit(nets.cnn, [(P, X[:7]), (P, X[7:])], 1), whole, 1e-10)
    # in float32 over many batches the error is that of one
    narrow = jax.tree.map(lambda v: v.astype(np.float32), P)
    many = patterns.fit(nets.cnn, ((narrow, x) for x in np.asarray(X, np.float32)[:, None]), 1)
    assert {v.dtype for v in many.values()} == {np.dtype(np.float32)}
    close(many, whole, 1e-3)


def test_one_compilation_for_equal_shapes():
    traced = []

    def f(x):
        traced.append(x.shape)
        return x @ P["dense"]

    patterns.fit(f, (draw(i, 3, 6) for i in range(5)))
    assert traced == [(3, 6)]
    patterns.fit(f, (draw(i, 3 + i % 2, 6) for i in range(5)))
    assert traced == [(3, 6), (3, 6), (4, 6)]


def test_auto_takes_the_two_components_where_an_activation_follows():
    fitted = {e: patterns.fit(nets.cnn, [(P, X)], 1, e) for e in ("auto", "two_component", "linear")}
    gated = {"conv1": True, "conv2": True, "conv3": True, "dense": True, "out": False}
    assert fitted["auto"].keys() == gated.keys()
    for name, positive in gated.items():
        close(fitted["auto"][name], fitted["two_component" if positive else "linear"][name])
    w = draw(6, 4, 4)

    def parts(x):
        shortcut = x @ w
        pooled = jax.nn.relu(nets.pool((shortcut @ w).reshape(-1, 2, 2, 1), lax.max, -np.inf))
        return pooled.sum() + (jax.nn.relu(shortcut) + shortcut).sum()

    one, two = patterns.fit(parts, [draw(7, 9, 4)]).values()
    close(one, patterns.fit(parts, [draw(7, 9, 4)], estimator="linear")["dense[0]"])
    close(two, patterns.fit(parts, [draw(7, 9, 4)], estimator="two_component")["dense[1]"])


def test_units_that_never_fire():
    """They have no signal to be found in, and learn 0; so does a unit that never changes, up to rounding."""
    w, b = np.array(draw(8, 4, 3)), np.array([0.0, -50.0, 0.3])
    w[:, 2] = 0
    for dtype in (np.float32, np.float64):
        f = lambda x, dtype=dtype: x @ w.astype(dtype) + b.astype(dtype)
        x = np.asarray(draw(9, 64, 4), dtype)
        found = only(patterns.fit(f, [x], estimator="two_component"))
        assert np.all(found[:, 0]) and not np.any(found[:, 1:])
        found = only(patterns.fit(f, [x], estimator="linear"))
        assert np.all(found[:, :2]) and not np.any(found[:, 2])
        assert not np.any(only(patterns.fit(f, [x[:1]] * 7, estimator="linear")))


def test_every_unit_keeps_its_relevance():
    """w^T a = 1, so that PatternAttribution conserves in layers without padding or ReLU."""
    w = [draw(i, 5, 5) for i in range(3)]
    f = lambda x: (x @ w[0] + 0.2) @ w[1] @ w[2]
    x = draw(4, 30, 5)
    found = patterns.fit(f, [x])
    assert len(found) == 3
    close(lrp(f, composites.pattern_attribution(found))(x).sum(-1), f(x).sum(-1), 1e-10)


# ------------------------------------------------------------------------------------------- loops, sharing, dtypes


def test_scan_learns_from_all_iterations():
    w = draw(1, 4, 6)
    step = lambda x: jax.nn.relu(x @ w)
    looped = lambda x: lax.scan(lambda c, x: (c, step(x)), 0.0, x)[1]
    x = draw(2, 5, 7, 4)
    close(only(patterns.fit(looped, [x])), only(patterns.fit(step, [x.reshape(35, 4)])), 1e-10)
    found = patterns.fit(looped, [x])
    for method in (composites.pattern_net, composites.pattern_attribution):
        right = lrp(step, method(patterns.fit(step, [x])))(x)
        close(lrp(looped, method(found))(x), right, 1e-10)


def test_recurrent():
    u, w = draw(1, 3, 4), draw(2, 4, 4)
    f = lambda x: lax.scan(lambda h, x: (jnp.tanh(x @ u + h @ w), None), jnp.zeros(4), x)[0]
    found = patterns.fit(f, iter(draw(3, 6, 5, 3)))
    x = draw(4, 5, 3)
    samples = []
    for sequence in np.asarray(draw(3, 6, 5, 3)):
        h = np.zeros(4)
        for v in sequence:
            samples.append(h)
            h = np.tanh(v @ u + h @ w)
    samples = np.asarray(samples)
    right = np.stack([solve(samples, samples @ w[:, k], np.asarray(w[:, k]), "linear") for k in range(4)], axis=1)
    assert len(found) == 2
    close(found[[n for n in found if found[n].shape == (4, 4)][0]], right, 1e-10)
    assert np.any(lrp(f, composites.pattern_net(found))(x))


def test_layers_that_share_weights_learn_apart():
    p = {"a": {"kernel": draw(1, 4, 4)}}
    f = lambda p, x: jax.nn.relu(x @ p["a"]["kernel"]) @ p["a"]["kernel"]
    x = draw(2, 20, 4)
    found = patterns.fit(f, [(p, x)], 1)
    assert list(found) == ["a", "a#2"]
    hidden = jax.nn.relu(x @ p["a"]["kernel"])
    close(found["a#2"], only(patterns.fit(lambda x: x @ p["a"]["kernel"], [hidden])), 1e-10)
    rows = plan(f, composites.pattern_net(found), 1)(p, x)
    for row in rows:
        if row.kind == "dense":
            np.testing.assert_array_equal(row.rule.pattern, found[row.name])


def test_half_precision_models_learn_in_float32():
    w = draw(1, 8, 4)
    x = draw(2, 64, 8)
    found = only(patterns.fit(lambda x: x @ w.astype(jnp.bfloat16), [x.astype(jnp.bfloat16)], estimator="linear"))
    assert found.dtype == np.float32
    close(found, only(patterns.fit(lambda x: x @ w, [x], estimator="linear")), 0.05)


# ---------------------------------------------------------------------------------------------------- the rules


@pytest.mark.parametrize("operation", [o for o in OPERATIONS if not folded(o)], ids=str)
def test_rules(operation: Operation):
    """Transposed passes of the operation with other kernels, on its dense matrix, where that holds no scale."""
    kernel, bias = operation.parameters(with_bias=True)
    pattern, R = operation.rng("a").normal(size=kernel.shape), operation.rng("R").normal(size=operation.output)
    x = operation.rng("x").normal(size=operation.input)
    f = lambda x: operation.apply(x, kernel, bias)
    for rule, weights in ((rules.PatternNet, pattern), (rules.PatternAttribution, kernel * pattern)):
        right = reference.layer(operation.apply, operation.input, weights, None).w @ R.ravel()
        close(lrp(f, linear(rule(pattern)), target=lambda _: R)(x), right.reshape(x.shape))


def test_batch_norm_is_part_of_the_kernel():
    """Behind a BatchNorm the pattern is that of the folded convolution."""
    conv = lambda x, kernel: nets.conv(x, kernel, 2)
    scale, shift = draw(3, 4) * lax.rsqrt(P["var"] + 1e-5), draw(4, 4)
    separate = lambda x: (conv(x, P["conv1"]) - P["mean"]) * lax.rsqrt(P["var"] + 1e-5) * draw(3, 4) + shift
    folded = lambda x: conv(x, P["conv1"] * scale) + (shift - P["mean"] * scale)
    one, other = (patterns.fit(f, [X], estimator="two_component") for f in (separate, folded))
    assert len(one) == 1
    close(only(one), only(other), 1e-10)
    for method in (composites.pattern_net, composites.pattern_attribution):
        close(lrp(separate, method(one))(X), lrp(folded, method(other))(X), 1e-10)


def test_preprocessing_is_part_of_the_layer():
    """The signal is in the units of the raw input; what it contributes has none."""
    mean, std = np.array([0.4, 0.6]), np.array([0.25, 0.5])
    inner, outer = lambda x: nets.conv(x, P["conv1"]), lambda x: nets.conv((x - mean) / std, P["conv1"])
    raw = X * std + mean
    found = patterns.fit(outer, [raw], estimator="two_component")
    close(only(found), only(patterns.fit(inner, [X], estimator="two_component")), 1e-10)
    composite = composites.pattern_net(found)
    close(lrp(outer, composite)(raw), std * lrp(inner, composite)(X), 1e-10)
    composite = composites.pattern_attribution(found)
    close(lrp(outer, composite)(raw), lrp(inner, composite)(X), 1e-10)


def test_lrp_zero_is_a_pattern():
    """With a_jk = x_j / (w^T x)_k, a pattern of each input, PatternAttribution is LRP-0 of a network without biases."""
    weights = [draw(i, 5, 5) for i in range(3)]
    zero, x = linear(rules.Zero()), draw(9, 5)

    def f(x):
        for w in weights[:-1]:
            x = jax.nn.relu(x @ w)
        return x @ weights[-1]

    activations = [x]
    for w in weights[:-1]:
        activations.append(jax.nn.relu(activations[-1] @ w))
    own = {f"dense[{i}]": a[:, None] / (a @ w) for i, (a, w) in enumerate(zip(activations, weights, strict=True))}
    close(lrp(f, composites.pattern_attribution(own), target=1)(x), lrp(f, zero, target=1)(x), 1e-10)

    # and this is what a linear network learns from x and -x
    g = lambda x: x @ weights[0] @ weights[1] @ weights[2]
    found = patterns.fit(g, [np.stack([x, -x])])
    close(lrp(g, composites.pattern_attribution(found), target=1)(x), lrp(g, zero, target=1)(x), 1e-10)


@pytest.mark.slow
def test_backward_pass_of_a_network():
    """The composites are the gradient's backward pass with other kernels, ReLU masks and pool winners included."""
    kernels = {name: P[name] for name in ("conv1", "conv2", "conv3", "dense", "out")}
    kernels["conv1"] *= P["scale"] * lax.rsqrt(P["var"] + 1e-5)
    ones = jax.tree.map(jnp.ones_like, kernels)
    rows = [composites.pattern_net(kernels), composites.pattern_attribution(ones)]
    gradient = gradients.gradient(nets.cnn, 1, target=2)(P, X) * nets.cnn(P, X)[:, 2][:, None, None, None]
    for _, got in nets.explained(nets.cnn, P, X, rows=rows, argnums=1, target=2):
        close(got, gradient, 1e-10)


# ---------------------------------------------------------------------------------------------------- use


def test_flax_model():
    model = nets.ResNet()
    variables = nets.randomise(model.init(jax.random.key(0), jnp.zeros((1, 8, 8, 3))))
    f = lambda x: model.apply(variables, x)
    found = patterns.fit(f, (draw(i, 6, 8, 8, 3) for i in range(3)))
    x = draw(7, 2, 8, 8, 3)
    weighted = [row for row in plan(f, composites.epsilon())(x) if row.kind in ("dense", "conv")]
    assert set(found) == {row.name for row in weighted} and len(found) == 7
    rows = [composites.pattern_net(found), composites.pattern_attribution(found)]
    for _, relevance in nets.explained(f, x, rows=rows, target=1):
        assert np.isfinite(relevance).all() and np.any(relevance)
    for_apply = patterns.fit(model.apply, ((variables, draw(i, 6, 8, 8, 3)) for i in range(3)), 1)
    close(list(for_apply.values()), list(found.values()), 1e-5)


@pytest.mark.slow
def test_transforms():
    found = patterns.fit(partial(nets.cnn, P), [X])
    explain = lambda found, x: lrp(partial(nets.cnn, P), composites.pattern_attribution(found), target=1)(x)
    right = explain(found, X)
    mapped = lambda found, x: jax.vmap(lambda x: explain(found, x[None])[0])(x)
    swept = lambda found, x: jax.vmap(explain, (0, None))(jax.tree.map(lambda v: jnp.stack([2 * v, v]), found), x)[1]
    slopes = jax.grad(lambda found, x: explain(found, x)[0].sum())
    *same, slope = jax.jit(lambda *args: [f(*args) for f in (explain, mapped, swept, slopes)])(found, X)
    close(same, [right] * 3, 1e-10)
    assert all(np.any(v) for v in jax.tree.leaves(slope))


def test_kept_in_a_file(tmp_path):
    variables = {"params": {"Dense_0": {"kernel": draw(1, 4, 3)}}}
    w = draw(4, 3, 3)
    f = lambda v, x: nn.Dense(3, use_bias=False).apply({"params": v["params"]["Dense_0"]}, x) @ w
    found = patterns.fit(f, [(variables, draw(2, 8, 4))], 1)
    assert "params/Dense_0" in found and len(found) == 2
    np.savez(tmp_path / "patterns.npz", **found)
    with np.load(tmp_path / "patterns.npz") as file:
        kept = dict(file)
    nets.same(kept, found)
    x = draw(3, 2, 4)
    right = lrp(f, composites.pattern_net(found), 1)(variables, x)
    nets.same(lrp(f, composites.pattern_net(kept), 1)(variables, x), right)


def test_exactly():
    """A name is taken literally where `named` would read brackets as a glob."""
    w = draw(1, 3, 3)
    f = lambda x: jax.nn.relu(x @ w) @ w
    composite = Composite([(select.exactly("dense[1]"), rules.Zero())]) + composites.epsilon(0.5)
    rows = [type(row.rule).__name__ for row in plan(f, composite)(draw(2, 3)) if row.kind == "dense"]
    assert rows == ["Epsilon", "Zero"]
