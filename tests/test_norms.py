"""Normalisation by statistics of the data: found however it is written, and explained by both of its rules."""

from collections.abc import Callable
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax

from jaxlrp import Composite, composites, lrp, plan, rewrite, rules, select, value_and_lrp
from jaxlrp.evaluate import conservation
from nets import close, draw, quick_compilation, same  # noqa: F401

X = draw(1, 2, 3, 4, 8)
G, B, W = draw(2, 8), draw(3, 8), draw(4, 8, 5)
NORMS = select.kind("layer_norm", "rms_norm", "group_norm", "batch_norm")


def mean(x, axes=-1):
    return x.mean(axes, keepdims=True)


def grouped(x):
    y = x.reshape(2, 12, 4, 2)
    return ((y - mean(y, (1, 3))) / jnp.sqrt(y.var((1, 3), keepdims=True) + 1e-5)).reshape(x.shape) * G + B


def linen(model: nn.Module) -> Callable:
    variables = jax.tree.map(lambda v: draw(5, *v.shape), model.init(jax.random.key(0), X)["params"])
    if isinstance(model, nn.BatchNorm):
        empty = {"mean": np.zeros(8), "var": np.ones(8)}
        return lambda x: model.apply({"params": variables, "batch_stats": empty}, x, mutable=["batch_stats"])[0]
    return lambda x: model.apply({"params": variables}, x)


def of_nnx(model: nnx.Module) -> Callable:
    graph, state = nnx.split(model)
    return lambda x: nnx.merge(graph, state, copy=True)(x)


HAND: dict[str, tuple[str, Callable]] = {
    "variance": ("layer_norm", lambda x: (x - mean(x)) / jnp.sqrt(x.var(-1, keepdims=True) + 1e-5) * G + B),
    "standard deviation": ("layer_norm", lambda x: (x - mean(x)) / (x.std(-1, keepdims=True) + 1e-5) * G),
    "centred once": ("layer_norm", lambda x: (c := x - mean(x)) * lax.rsqrt(mean(c * c) + 1e-5) * G + B),
    "mean of squares": ("layer_norm", lambda x: (x - (m := mean(x))) * lax.rsqrt(mean(x**2) - m**2 + 1e-5) + B),
    "scale in the factor": ("layer_norm", lambda x: (x - mean(x)) * (lax.rsqrt(x.var(-1, keepdims=True) + 1e-5) * G)),
    "several axes": ("layer_norm", lambda x: (x - mean(x, (1, 2, 3))) / x.std((1, 2, 3), keepdims=True)),
    "standardize": ("layer_norm", jax.nn.standardize),
    "vmapped": ("layer_norm", jax.vmap(lambda x: (x - x.mean()) * lax.rsqrt(jnp.maximum(0.0, x.var()) + 1e-5))),
    "jit": ("layer_norm", jax.jit(lambda x: (x - mean(x)) / jnp.sqrt(x.var(-1, keepdims=True) + 1e-5))),
    "rms": ("rms_norm", lambda x: G * (x * lax.rsqrt(mean(jnp.square(x)) + 1e-6))),
    "rms, quotient": ("rms_norm", lambda x: x / jnp.sqrt(mean(x**2) + 1e-6) * G),
    "rms, power": ("rms_norm", lambda x: x * jnp.power(mean(x * x) + 1e-6, -0.5)),
    "l2": ("rms_norm", lambda x: x / jnp.linalg.norm(x, axis=-1, keepdims=True)),
    "l2, guarded": ("rms_norm", lambda x: x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)),
    "groups": ("group_norm", grouped),
    "instances": ("group_norm", lambda x: (x - mean(x, (1, 2))) * lax.rsqrt(x.var((1, 2), keepdims=True) + 1e-5)),
    "batch": ("batch_norm", lambda x: (x - mean(x, (0, 1, 2))) / jnp.sqrt(x.var((0, 1, 2), keepdims=True) + 1e-5) * G),
}  # fmt: skip
MODULES: dict[str, tuple[str, Callable]] = {
    "LayerNorm": ("layer_norm", linen(nn.LayerNorm())),
    "LayerNorm, slow variance": ("layer_norm", linen(nn.LayerNorm(use_fast_variance=False))),
    "RMSNorm": ("rms_norm", linen(nn.RMSNorm())),
    "GroupNorm": ("group_norm", linen(nn.GroupNorm(num_groups=4))),
    "InstanceNorm": ("group_norm", linen(nn.InstanceNorm())),
    "BatchNorm": ("batch_norm", linen(nn.BatchNorm(use_running_average=False))),
    "nnx.LayerNorm": ("layer_norm", of_nnx(nnx.LayerNorm(8, rngs=nnx.Rngs(0)))),
    "nnx.RMSNorm": ("rms_norm", of_nnx(nnx.RMSNorm(8, rngs=nnx.Rngs(0)))),
    "nnx.GroupNorm": ("group_norm", of_nnx(nnx.GroupNorm(8, num_groups=4, rngs=nnx.Rngs(0)))),
    "nnx.BatchNorm": ("batch_norm", of_nnx(nnx.BatchNorm(8, rngs=nnx.Rngs(0)))),
}
EVERY = HAND | MODULES
every = pytest.mark.parametrize("kind, norm", EVERY.values(), ids=EVERY)


@every
def test_is_one_layer_that_passes_relevance(kind: str, norm: Callable):
    """A dense layer after it and a tanh before it, so that it stands alone: the norm itself is the identity."""
    f = lambda x: norm(jnp.tanh(x)) @ W
    table = plan(f, composites.epsilon())(X)
    assert [row.kind for row in table] == ["activation", kind, "dense"], str(table)
    assert isinstance(table[1].rule, rules.Pass)
    with jax.disable_jit():  # a norm takes in jits of which it is only a part (jnp.mean, jnp.var), and fusions round
        same(rewrite(f, composites.epsilon())(X), f(X))
    R = draw(6, 2, 3, 4, 5)
    inside = norm(jnp.tanh(X))
    right = lrp(lambda h: h @ W, composites.epsilon(), target=lambda y: R)(inside)
    close(lrp(f, composites.epsilon(), target=lambda y: R)(X), right)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_identity_under_vmap_follows_the_moved_axes(axis: int):
    """Mapped over an axis that is not the first, the layer also transposes: relevance goes back to where x was."""
    norm = HAND["centred once"][1]
    f = jax.vmap(norm, axis)
    R = draw(7, *f(X).shape)
    close(lrp(f, composites.epsilon(), target=lambda y: R)(X), jnp.moveaxis(R, 0, axis))


def test_identity_where_the_norm_transposes():
    """Keys of cosine attention, square, so that the shapes do not tell."""
    k, q = draw(12, 4, 4), draw(13, 3, 4)
    across = lambda k: q @ (k.T / jnp.linalg.norm(k, axis=-1))
    before = lambda k: q @ (k / jnp.linalg.norm(k, axis=-1, keepdims=True)).T
    close(lrp(across, composites.epsilon())(k), lrp(before, composites.epsilon())(k))


def dense_reference(x, g, b, R, epsilon, hold_mean, centred=True):
    """Over the last axis, row by row, with the Jacobian at constant sigma written out."""
    out = np.zeros_like(x)
    n = x.shape[-1]
    for i in np.ndindex(x.shape[:-1]):
        v = x[i]
        m = v.mean() if centred else 0.0
        sigma = np.sqrt(((v - m) ** 2).mean() + 1e-5)
        y = g * (v - m) / sigma + b
        J = np.diag(g / sigma)
        if centred and not hold_mean:
            J = J @ (np.eye(n) - 1 / n)
        out[i] = v * (J.T @ (R[i] / (y + epsilon * np.where(y >= 0, 1, -1))))
    return out


@pytest.mark.parametrize("epsilon", [0.0, 0.1])
@pytest.mark.parametrize("choice", ["propagated", "held"])
@pytest.mark.parametrize("name", ["variance", "centred once", "mean of squares", "rms"])
def test_constant_statistics(name: str, choice: str, epsilon: float):
    norms = {
        "variance": HAND["variance"][1],
        "centred once": HAND["centred once"][1],
        "mean of squares": HAND["mean of squares"][1],
        "rms": lambda x: G * (x * lax.rsqrt(mean(jnp.square(x)) + 1e-5)),
    }
    g, b = {"rms": (G, 0.0), "mean of squares": (np.ones(8), B)}.get(name, (G, B))
    R = draw(8, *X.shape)
    composite = Composite([(NORMS, rules.ConstantStatistics(epsilon, choice))])
    explain = lrp(norms[name], composite, target=lambda y: R)
    right = dense_reference(
        np.asarray(X), np.asarray(g), np.asarray(b), np.asarray(R), epsilon, choice == "held", name != "rms"
    )
    for run in (explain, jax.jit(explain)):
        np.testing.assert_allclose(run(X), right, atol=1e-8, rtol=1e-8)
    # one example at a time
    one = jax.vmap(lambda x, R: lrp(norms[name], composite, target=lambda y: R)(x))
    np.testing.assert_allclose(one(X, R), right, atol=1e-8, rtol=1e-8)


def test_equals_the_layer_norm_rule_of_relevancepropagation_jl():
    """s = R' / (x - mean), R_in = x (s - mean(s)), where R' is the affine part's share by LRP-0."""
    x, R = np.asarray(draw(9, 4, 8)), np.asarray(draw(10, 4, 8))
    centred = x - x.mean(-1, keepdims=True)
    normal = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5)
    share = R * G * normal / (G * normal + B)
    s = share / centred
    right = x * (s - s.mean(-1, keepdims=True))
    composite = Composite([(NORMS, rules.ConstantStatistics(0.0))])
    got = lrp(HAND["centred once"][1], composite, target=lambda y: R)(x)
    np.testing.assert_allclose(got, right, rtol=1e-8, atol=1e-8)


@every
def test_constant_statistics_apply_to_every_form(kind: str, norm: Callable):
    """And the ledger closes: what the bias and the stabiliser keep is all that is not passed on."""
    composite = Composite([(NORMS, rules.ConstantStatistics(1e-3))]) + composites.epsilon()
    f = lambda x: norm(jnp.tanh(x)) @ W
    ledger = conservation(f, composite, batched=False)(X)
    for row in ledger:
        assert abs(row.gap).max() <= 1e-9 * row.size.max(), f"{row.name}\n{ledger}"
    (row,) = (row for row in ledger if row.kind == kind)
    assert row.rule == "ConstantStatistics"


def test_scale_invariance():
    """Relevance through a norm without an offset is blind to the input's scale; so is the identity's."""
    norm = lambda x: (x - mean(x)) / jnp.linalg.norm(x - mean(x), axis=-1, keepdims=True) * G
    for rule in (rules.Pass(), rules.ConstantStatistics(0.0)):
        explain = lrp(norm, Composite([(NORMS, rule)]))
        close(explain(7.0 * X), explain(X))


NOT_NORMS: dict[str, Callable] = {
    "squeeze and excite": lambda x: x * jax.nn.sigmoid(mean(x, (1, 2))),
    "a mean taken off": lambda x: x - mean(x),
    "the root of a mean": lambda x: x / jnp.sqrt(mean(jnp.abs(x)) + 1),
    "softmax": jax.nn.softmax,
    "element-wise": lambda x: x * lax.rsqrt(1 + x**2),
    "weight normalisation": lambda x: x @ (W / jnp.linalg.norm(W, axis=0)),
    "statistics of another value": lambda x: jnp.sin(x) / jnp.sqrt(mean(x**2) + 1),
    "an amplifier": lambda x: x * jnp.sqrt((x**2).sum(-1, keepdims=True)),
    "squash": lambda x: (n := (x**2).sum(-1, keepdims=True)) / (1 + n) * x / jnp.sqrt(n),
    "differences": lambda x: (x - jnp.roll(x, 1, -1)) / jnp.linalg.norm(x, axis=-1, keepdims=True),
    "a part": lambda x: x[..., :2] / jnp.linalg.norm(x, axis=-1, keepdims=True),
    "a flip": lambda x: jnp.flip(x, -1) / jnp.linalg.norm(x, axis=-1, keepdims=True),
    "local sums": lambda x: (
        x / jnp.sqrt(1 + jnp.stack([(x**2)[..., max(0, c - 1) : c + 2].sum(-1) for c in range(8)], -1))
    ),
}


@pytest.mark.parametrize("f", NOT_NORMS.values(), ids=NOT_NORMS)
def test_what_is_no_norm(f: Callable):
    g = lambda x: f(jnp.tanh(x))
    kinds = {row.kind for row in plan(g, composites.epsilon())(X)}
    assert lrp(g, composites.epsilon())(X).shape == X.shape
    assert not kinds & {"layer_norm", "rms_norm", "group_norm", "batch_norm"}


def test_statistics_that_are_read_elsewhere():
    """Running averages that the function returns: computed on their own, the layer stays one Op."""
    model = nn.BatchNorm(use_running_average=False)
    variables = model.init(jax.random.key(0), X)
    f = lambda x: model.apply(variables, x, mutable=["batch_stats"])
    alone = lambda x: f(x)[0]
    zeros = partial(jax.tree.map, jnp.zeros_like)
    for composite in (composites.epsilon(), Composite([(NORMS, rules.ConstantStatistics())]) + composites.epsilon()):
        value, relevance = value_and_lrp(f, composite, target=lambda y: (y[0], zeros(y[1])))(X)
        close(value[0], f(X)[0])
        close(relevance, lrp(alone, composite)(X), 1e-12)
    # what starts at the averages goes its own way: as if the function returned nothing else
    averages = lambda x: jax.tree.leaves(f(x)[1])
    close(lrp(f, composites.epsilon(), target=lambda y: (zeros(y[0]), y[1]))(X), lrp(averages, composites.epsilon())(X))


@pytest.mark.parametrize("jitted", [False, True])
def test_a_statistic_that_a_later_layer_reads(jitted):
    """Statistics are one Op's own and another's input, whether or not a jit stands around either of them."""
    wrap = jax.jit if jitted else lambda f: f

    @wrap
    def norm(x):
        mean = x.mean(-1, keepdims=True)
        scale = lax.rsqrt(jnp.square(x - mean).mean(-1, keepdims=True) + 1e-5)
        return (x - mean) * scale, mean, scale

    def once(x):
        y, mean, scale = norm(x)
        return (y + mean + scale) * 2.0

    def thrice(x):
        return (norm(x)[0] + norm(x)[1] + norm(x)[2]) * 2.0

    assert [r.kind for r in plan(once, composites.epsilon())(X)].count("layer_norm") == 1
    value, relevance = value_and_lrp(once, composites.epsilon())(X)
    close(value, once(X))
    close(relevance, lrp(thrice, composites.epsilon())(X), 1e-12)


def test_in_a_scan():
    """A stack of residual blocks with LayerNorm, as a loop and unrolled."""
    ws = draw(11, 3, 8, 8)
    block = lambda x, w: x + jnp.tanh(HAND["centred once"][1](x) @ w)
    looped = lambda x: lax.scan(lambda x, w: (block(x, w), None), x, ws)[0]
    unrolled = lambda x: block(block(block(x, ws[0]), ws[1]), ws[2])
    for rule in (rules.Pass(), rules.ConstantStatistics()):
        composite = Composite([(NORMS, rule)]) + composites.epsilon(0.1)
        explain = [jax.jit(lrp(f, composite)) for f in (looped, unrolled)]
        close(explain[0](X), explain[1](X), 1e-7)


def test_half_precision():
    norm = partial(linen(nn.LayerNorm(dtype=jnp.bfloat16)))
    relevance = lrp(lambda x: norm(x), composites.epsilon())(X.astype(jnp.bfloat16))
    assert relevance.dtype == jnp.bfloat16 and np.isfinite(np.asarray(relevance, np.float32)).all()
