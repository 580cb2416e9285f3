"""Rules for sums, pools, maxima and softmax, against sums and loops over windows."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import reference
from jaxlrp import lrp, rules
from nets import draw, linear, quick_compilation  # noqa: F401
from rule_checks import check, equal, on

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
