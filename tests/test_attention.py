"""Attention: one layer in every usual spelling, explained as the papers' formulas, written out, say."""

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
from nets import close, draw, quick_compilation  # noqa: F401

N, T, H, D = 2, 5, 2, 3
Q, K, V = draw(1, N, T, H, D), draw(2, N, T, H, D), draw(3, N, T, H, D)
CAUSAL = np.tril(np.ones((T, T), bool))
BIAS = draw(4, H, T, T)
EXACT = Composite([(select.kind("attention"), rules.Attention(epsilon=0.0))])


def scores(q, k):
    return jnp.einsum("nqhd,nkhd->nhqk", q, k) / np.sqrt(D)


def weighted(a, v):
    return jnp.einsum("nhqk,nkhd->nqhd", a, v)


def by_hand(q, k, v):
    """With the softmax written out, and two-dimensional products under vmap."""

    def one(q, k, v):
        s = q @ k.T / jnp.sqrt(float(D))
        e = jnp.exp(s - s.max(-1, keepdims=True))
        return (e / e.sum(-1, keepdims=True)) @ v

    return jax.vmap(jax.vmap(one, 1, 1))(q, k, v)


def rotated(x):
    """Rotary positions: a linear map of pairs, before the product; here of features 0 and 1."""
    angle = jnp.arange(T, dtype=float)[:, None, None]
    a, b, rest = x[..., :1], x[..., 1:2], x[..., 2:]
    return jnp.concatenate([a * jnp.cos(angle) - b * jnp.sin(angle), a * jnp.sin(angle) + b * jnp.cos(angle), rest], -1)


# each with the weights that it computes
SPELLINGS: dict[str, tuple[Callable, Callable]] = {
    "einsum": (lambda q, k, v: weighted(jax.nn.softmax(scores(q, k)), v), scores),
    "by hand": (by_hand, scores),
    "linen": (nn.dot_product_attention, scores),
    "linen, causal": (
        lambda q, k, v: nn.dot_product_attention(q, k, v, mask=CAUSAL[None, None]),
        lambda q, k: jnp.where(CAUSAL, scores(q, k), -1e300),
    ),
    "linen, biased": (
        lambda q, k, v: nn.dot_product_attention(q, k, v, bias=BIAS),
        lambda q, k: scores(q, k) + BIAS,
    ),
    "nnx": (nnx.dot_product_attention, scores),
    "jax.nn": (jax.nn.dot_product_attention, scores),
    "jax.nn, causal": (
        partial(jax.nn.dot_product_attention, is_causal=True),
        lambda q, k: jnp.where(CAUSAL, scores(q, k), -1e300),
    ),
    "jax.nn, biased, scaled, lengths": (
        lambda q, k, v: jax.nn.dot_product_attention(
            q, k, v, bias=BIAS[None], scale=0.3, key_value_seq_lengths=np.array([3, 5], np.int32)
        ),
        lambda q, k: jnp.where(
            (np.arange(T) < np.array([3, 5])[:, None])[:, None, None], scores(q, k) * np.sqrt(D) * 0.3 + BIAS, -1e300
        ),
    ),
    "masked by -inf": (
        lambda q, k, v: weighted(jax.nn.softmax(jnp.where(CAUSAL, scores(q, k), -jnp.inf)), v),
        lambda q, k: jnp.where(CAUSAL, scores(q, k), -1e300),
    ),
    "-inf added": (
        lambda q, k, v: weighted(jax.nn.softmax(scores(q, k) + jnp.where(CAUSAL, 0, -jnp.inf)), v),
        lambda q, k: jnp.where(CAUSAL, scores(q, k), -1e300),
    ),
    "where in the softmax": (
        lambda q, k, v: weighted(jax.nn.softmax(scores(q, k), where=CAUSAL), v),
        lambda q, k: jnp.where(CAUSAL, scores(q, k), -1e300),
    ),
    "a mask of heads, by einsum": (
        lambda q, k, v: weighted(jnp.einsum("nhqk,h->nhqk", jax.nn.softmax(scores(q, k)), jnp.ones(H)), v),
        scores,
    ),
    "cast": (
        lambda q, k, v: weighted(jax.nn.softmax(scores(q, k).astype(jnp.float64)).astype(v.dtype), v),
        scores,
    ),
    "in a jit": (jax.jit(lambda q, k, v: weighted(jax.nn.softmax(scores(q, k)), v)), scores),
    "in a remat": (jax.checkpoint(lambda q, k, v: weighted(jax.nn.softmax(scores(q, k)), v)), scores),
}  # fmt: skip


def attention_by_formulas(weights, q, k, v, R):
    """AttnLRP, step by step, Prop. 3.1 and 3.3; the scores are linear in the product of queries and keys."""
    q, k, v, R = (np.asarray(x, np.float64) for x in (q, k, v, R))
    S = np.asarray(weights(q, k))
    A = np.exp(S - S.max(-1, keepdims=True))
    A /= A.sum(-1, keepdims=True)
    Y = np.einsum("nhqk,nkhd->nqhd", A, v)
    R_A = A * np.einsum("nqhd,nkhd->nhqk", R / (2 * Y), v)
    R_v = v * np.einsum("nhqk,nqhd->nkhd", A, R / (2 * Y))
    P = np.einsum("nqhd,nkhd->nhqk", q, k)
    # R_S = S (R_A - A sum R_A) at the logits; the product's part of them is slope * P
    R_P = _slope(weights, q, k) * P * (R_A - A * R_A.sum(-1, keepdims=True))
    half = R_P / (2 * P)
    return q * np.einsum("nhqk,nkhd->nqhd", half, k), k * np.einsum("nhqk,nqhd->nkhd", half, q), R_v


def _slope(weights, q, k):
    """How much of a unit of the product q k arrives in each score; 0 where it is masked."""
    return (np.asarray(weights(2 * q, k)) - np.asarray(weights(q, k))) / np.einsum("nqhd,nkhd->nhqk", q, k)


@pytest.mark.parametrize("name", SPELLINGS)
def test_one_layer_by_the_papers_formulas(name):
    f, weights = SPELLINGS[name]
    kinds = [row.kind for row in plan(f, EXACT, (0, 1, 2))(Q, K, V)]
    assert kinds.count("attention") == 1 and not {"softmax", "matmul"} & set(kinds)
    value, pull = jax.vjp(rewrite(f, EXACT, (0, 1, 2)), Q, K, V)
    close(value, f(Q, K, V), 1e-14)
    R = draw(5, *value.shape)
    got = pull(jnp.asarray(R))
    # Flax takes the root of the size in float32, JAX's own attention its softmax
    close(got, attention_by_formulas(weights, Q, K, V, R), 1e-5 if name[:3] in ("lin", "nnx", "jax") else 1e-10)
    assert all(np.isfinite(r).all() for r in got)


def halved(x):
    """The identity, of which half the derivative passes."""
    return x / 2 + lax.stop_gradient(x / 2)


@pytest.mark.slow
def test_grouped_heads_cross_attention_and_rotation():
    """Fewer heads of keys and values, another length, rotary positions: against gradient x input, products halved."""
    k, v = draw(6, N, 4, 1, D), draw(7, N, 4, 1, D)
    project = draw(8, D, D)

    def model(q, k, v, attend):
        q, k = rotated(q @ project), rotated(jnp.pad(k, ((0, 0), (0, 1), (0, 0), (0, 0))))[:, :4]
        return attend(q, jnp.repeat(k, H, 2), jnp.repeat(v, H, 2)).sum((1, 2))

    def detached(q, k, v):
        a = jax.nn.softmax(scores(halved(q), halved(k)))
        return weighted(halved(a), halved(v))

    expected = [
        x * g
        for x, g in zip(
            (Q, k, v), jax.grad(lambda *xs: model(*xs, detached).sum(), argnums=(0, 1, 2))(Q, k, v), strict=True
        )
    ]
    composite = Composite([(select.kind("dense", "scale", "add", "reduce"), rules.Zero())]) + EXACT
    for attend in (jax.nn.dot_product_attention, nn.dot_product_attention):
        got = lrp(partial(model, attend=attend), composite, (0, 1, 2))(Q, k, v)
        close(list(got), expected, 1e-6)
    native = lambda q, k, v: jax.nn.dot_product_attention(q, k, v).sum((1, 2))  # which repeats the heads itself
    repeated = lambda q, k, v: detached(q, jnp.repeat(k, H, 2), jnp.repeat(v, H, 2)).sum()
    slopes = jax.grad(repeated, argnums=(0, 1, 2))(Q, k, v)
    close(list(lrp(native, composite, (0, 1, 2))(Q, k, v)), [x * g for x, g in zip((Q, k, v), slopes, strict=True)])


def test_one_value_for_queries_keys_and_values():
    """What stands in several places gets the sum of their shares."""
    apart = lrp(jax.nn.dot_product_attention, EXACT, (0, 1, 2))(Q, Q, Q)
    close(lrp(lambda x: jax.nn.dot_product_attention(x, x, x), EXACT)(Q), sum(apart), 1e-12)


def test_constant_weights_are_cp_lrp():
    composite = Composite([(select.kind("attention"), rules.Attention("constant", epsilon=0.0))])
    value, pull = jax.vjp(rewrite(SPELLINGS["einsum"][0], composite, (0, 1, 2)), Q, K, V)
    R = jnp.asarray(draw(5, *value.shape))
    r_q, r_k, r_v = pull(R)
    assert not np.any(r_q) and not np.any(r_k)
    close(r_v, V * jnp.einsum("nhqk,nqhd->nkhd", jax.nn.softmax(scores(Q, K)), R / value), 1e-12)
    close(r_v.sum(), R.sum(), 1e-10)


def test_scores_and_weights_of_zero_lose_nothing():
    """Queries of zero give scores of zero: all keys count alike, and the values' half is not lost."""
    zero = jnp.zeros_like(Q)
    value, pull = jax.vjp(rewrite(SPELLINGS["einsum"][0], EXACT, (0, 1, 2)), zero, K, V)
    r_q, r_k, r_v = pull(value)
    assert not np.any(r_q) and not np.any(r_k)
    close(r_v.sum(), value.sum() / 2, 1e-12)


def test_weights_that_are_returned_too():
    """Then they are layers of their own as well; attention stays one layer."""

    def f(q, k, v):
        a = jax.nn.softmax(scores(q, k))
        return weighted(a, v), a

    explain = lambda f, target: lrp(f, EXACT + composites.epsilon(), (0, 1, 2), target)(Q, K, V)
    assert sorted({row.kind for row in plan(f, EXACT, (0, 1, 2))(Q, K, V)}) > ["attention"]
    first = explain(f, lambda y: (y[0], jnp.zeros_like(y[1])))
    close(first, explain(lambda *xs: f(*xs)[0], None), 1e-12)
    second = explain(f, lambda y: (jnp.zeros_like(y[0]), y[1]))
    alone = explain(lambda *xs: f(*xs)[1], None)
    close(second[:2], alone[:2], 1e-12)


@pytest.mark.parametrize(
    "f",
    [
        lambda x: jax.nn.softmax(x @ draw(9, 3, 4)) @ draw(10, 4, 2),  # a softmax between two dense layers
        lambda x: jax.nn.softmax(jnp.tanh(x) @ draw(9, 3, 1), axis=-2).mT @ x,  # scores of a dense layer
        lambda x: jnp.exp(x @ x.mT) @ x,
        lambda x: jax.nn.log_softmax(x @ x.mT) @ x,
    ],
)
def test_no_attention(f):
    assert "attention" not in [row.kind for row in plan(f, composites.epsilon())(draw(1, 2, 5, 3))]


class Block(nn.Module):
    """A transformer block, before or after which the norm stands; GELU or gated."""

    gated: bool = False

    @nn.compact
    def __call__(self, x):
        y = nn.LayerNorm(name="norm1")(x)
        x = x + nn.MultiHeadDotProductAttention(2, qkv_features=6, name="attention")(y)
        y = (nn.RMSNorm if self.gated else nn.LayerNorm)(name="norm2")(x)
        up = nn.Dense(7, name="up")(y)
        up = nn.silu(nn.Dense(7, name="gate")(y)) * up if self.gated else nn.gelu(up)
        return nn.Dense(4, name="head")((x + nn.Dense(6, name="down")(up)).mean(1))


def parameters(model, x):
    """Each drawn from a seed of its own: layers of one shape must differ."""
    leaves, tree = jax.tree.flatten(model.init(jax.random.key(0), x))
    return jax.tree.unflatten(tree, [jnp.asarray(draw(20 + i, *v.shape)) for i, v in enumerate(leaves)])


def gradient_x_input(params, x, gated, constant):
    """AttnLRP (or CP-LRP, with constant weights and gates) of `Block` as gradient x input of a detached model."""
    p = params["params"]
    const = lax.stop_gradient
    dense = lambda name, x: x @ p[name]["kernel"] + p[name]["bias"]

    def norm(name, x):
        centred = x - x.mean(-1, keepdims=True) if "bias" in p[name] else x
        size = jnp.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6)
        return centred / const(size) * p[name]["scale"] + p[name].get("bias", 0)

    def slope(f, x):  # an activation passes
        return x * const(f(x) / x)

    def model(x):
        y, heads = norm("norm1", x), p["attention"]
        q, k, v = (
            jnp.einsum("ntd,dhe->nthe", y, heads[n]["kernel"]) + heads[n]["bias"] for n in ("query", "key", "value")
        )
        if constant:
            o = weighted(const(jax.nn.softmax(scores(q, k))), v)
        else:
            o = weighted(halved(jax.nn.softmax(scores(halved(q), halved(k)))), halved(v))
        x = x + jnp.einsum("nthe,hed->ntd", o, heads["out"]["kernel"]) + heads["out"]["bias"]
        y = norm("norm2", x)
        up = dense("up", y)
        if gated:
            gate = slope(jax.nn.silu, dense("gate", y))
            up = const(gate) * up if constant else halved(gate) * halved(up)
        else:
            up = slope(jax.nn.gelu, up)
        return dense("head", (x + dense("down", up)).mean(1))

    return x * jax.grad(lambda x: model(x)[:, 1].sum())(x)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("preset", ["attnlrp", "cp_lrp"])
def test_a_block_is_gradient_x_input_of_the_detached_model(preset, gated):
    x, model = jnp.asarray(draw(11, 2, 5, 6)), Block(gated)
    params = parameters(model, x)
    composite = getattr(composites, preset)(norm="constant_statistics", epsilon=1e-12)
    kinds = [row.kind for row in plan(model.apply, composite, 1)(params, x)]
    assert kinds.count("attention") == 1
    value, relevance = value_and_lrp(model.apply, composite, 1, target=1)(params, x)
    close(value, model.apply(params, x))
    close(relevance, gradient_x_input(params, x, gated, preset == "cp_lrp"), 2e-6)


@pytest.mark.parametrize(
    "composite", [composites.attnlrp(), composites.attnlrp(gamma=0.1, conv_gamma=0.25), composites.cp_lrp()]
)
def test_the_ledger_closes(composite):
    x, model = jnp.asarray(draw(11, 2, 5, 6)), Block(gated=True)
    params = parameters(model, x)
    ledger = conservation(model.apply, composite, 1, target=1)(params, x)
    size = max(row.size.max() for row in ledger)
    assert max(np.abs(row.gap).max() for row in ledger) < 1e-12 * size and np.abs(ledger.gap).max() < 1e-12 * size


@pytest.mark.smoke
def test_in_a_scan_over_layers():
    """Stacked layers in a loop are those layers one after the other."""
    kernels = draw(13, 3, 3, 6, 6)

    def layer(x, w):
        q, k, v = (jnp.reshape(x @ w[i], (2, 5, H, D)) for i in range(3))
        return x + jax.nn.dot_product_attention(q, k, v).reshape(2, 5, 6)

    looped = lambda x: lax.scan(lambda x, w: (layer(x, w), None), x, kernels)[0].sum(1)
    unrolled = lambda x: layer(layer(layer(x, kernels[0]), kernels[1]), kernels[2]).sum(1)
    x = draw(11, 2, 5, 6)
    got, right = (lrp(f, composites.attnlrp(), target=2)(x) for f in (looped, unrolled))
    close(got, right, 1e-12)


def masked_after_exp(x):
    """A softmax whose mask stands after the exponential."""
    s = scores_of(x)
    e = jnp.exp(s - s.max(-1, keepdims=True)) * jnp.tril(jnp.ones((5, 5)))
    return e / e.sum(-1, keepdims=True) @ x


def normalised_after_values(x):
    """A softmax that divides after the product with the values, as blockwise attention does."""
    s = scores_of(x)
    e = jnp.exp(s - lax.stop_gradient(s.max(-1, keepdims=True)))
    return (e @ x) / e.sum(-1, keepdims=True)


def of_neighbours(x):
    """Graph attention (Velickovic et al. 2018): a softmax over the edges that end in a node."""
    sender, receiver = np.array([0, 1, 2, 3, 4, 0]), np.array([0, 0, 1, 2, 2, 2])
    s = jax.nn.leaky_relu(x.sum(-1)[sender] + x[:, 0][receiver])
    e = jnp.exp(s - jax.ops.segment_max(s, receiver, 3)[receiver])
    a = e / jax.ops.segment_sum(e, receiver, 3)[receiver]
    return jax.ops.segment_sum(a[:, None] * x[sender], receiver, 3)


def scores_of(x):
    return x @ x.T


@pytest.mark.parametrize("f", [masked_after_exp, normalised_after_values, of_neighbours])
def test_a_softmax_in_pieces_does_not_divide_by_the_shift(f):
    """x - max(x) is zero at the largest element: there it passes, in float32 as in float64, compiled or not."""
    x = jnp.asarray(draw(14, 5, 4))
    value, relevance = value_and_lrp(f, composites.attnlrp())(x)
    close(value, f(x))
    assert "shift" in [row.name for row in plan(f, composites.attnlrp())(x)]
    assert np.abs(relevance).sum() < 10 * np.abs(value).sum()
    close(jax.jit(lrp(f, composites.attnlrp()))(x.astype(jnp.float32)), relevance, 1e-4)
    ledger = conservation(f, composites.attnlrp(), batched=False)(x)
    assert np.abs(ledger.gap).max() < 1e-10 * np.abs(relevance).sum()
