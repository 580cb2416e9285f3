"""Signs: which inputs of recognised layers are known to be non-negative, and that relevance does not depend on it."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import models
from activations import ACTIVATIONS, SOFTMAXES
from jaxlrp import Composite, lrp, rules, select
from jaxlrp.program import Op
from nets import quick_compilation  # noqa: F401
from recognition import P, close, ops
from recognition_nets import batch_norm_right_before_a_conv

NONNEGATIVE: dict[str, Callable] = {
    "relu": jax.nn.relu,
    "relu, maximum": lambda h: jnp.maximum(h, 0),
    "relu, where": lambda h: jnp.where(h > 0, h, 0) ** 2,
    "relu6": jax.nn.relu6,
    "clip": lambda h: jnp.clip(h, 0, 1),
    "sigmoid": jax.nn.sigmoid,
    "hard sigmoid": jax.nn.hard_sigmoid,
    "softmax": jax.nn.softmax,
    "softmax by hand": SOFTMAXES["by hand, shifted"],
    "square": jnp.square,
    "product with itself": lambda h: h * h,
    "even power": lambda h: h**4,
    "absolute value": jnp.abs,
    "exponential": jnp.exp,
    "max-pool of relu": lambda h: lax.reduce_window(jax.nn.relu(h), -jnp.inf, lax.max, (1, 1), (1, 1), "SAME"),
    "mean of relu": lambda h: jnp.repeat(jax.nn.relu(h).mean(-1, keepdims=True), 4, -1),
    "reshape of relu": lambda h: jax.nn.relu(h).reshape(4, 3).T,
    "concatenation of relus": lambda h: jnp.concatenate([jax.nn.relu(h)[:, :2], jax.nn.sigmoid(h)[:, 2:]], -1),
    "sum of relus": lambda h: jax.nn.relu(h) + jax.nn.relu(-h),
    "factor after relu": lambda h: jax.nn.relu(h) * 2 / 3,
    "relu, sorted": lambda h: jnp.sort(jax.nn.relu(h)),
    "relu, sorted by something signed": lambda h: lax.sort((h, jax.nn.relu(h)), num_keys=1)[1],
    "largest of relu": lambda h: lax.top_k(jax.nn.relu(h), 4)[0],
    "relu, taken": lambda h: jax.nn.relu(h)[:, jnp.asarray([3, 0, 0, 2])],
    "relu with a place set": lambda h: jax.nn.relu(h).at[:, 1].set(2),
    "relu with a slice replaced": lambda h: lax.dynamic_update_slice(jax.nn.relu(h), h[:, :1] ** 2, (0, 1)),
    "sum in segments": lambda h: jax.ops.segment_sum(jax.nn.relu(h), jnp.asarray([0, 2, 0]), 3),
    "cumulative product": lambda h: jnp.cumprod(jax.nn.relu(h), 1),
    "incomplete gamma function": lambda h: jax.scipy.special.gammainc(2.0, h * h),
    "behind a barrier": lambda h: lax.optimization_barrier((jax.nn.relu(h), h))[0],
    "modulus": lambda h: jnp.abs(h + 1j),
}
SIGNED: dict[str, Callable] = {
    "nothing": lambda h: h,
    "gelu": jax.nn.gelu,
    "exact gelu": lambda h: jax.nn.gelu(h, approximate=False),
    "gelu by hand": ACTIVATIONS["gelu, tanh"],
    "silu": jax.nn.silu,
    "tanh": jnp.tanh,
    "elu": jax.nn.elu,
    "leaky relu": jax.nn.leaky_relu,
    "hard tanh": jax.nn.hard_tanh,
    "clip": lambda h: jnp.clip(h, -1, 1),
    "difference of relus": lambda h: jax.nn.relu(h) - jax.nn.relu(-h),
    "relu less one": lambda h: jax.nn.relu(h) - 1,
    "relu turned round": lambda h: -jax.nn.relu(h),
    "odd power": lambda h: h**3,
    "relu and skip": lambda h: jax.nn.relu(h) + h,
    "parameter after relu": lambda h: jax.nn.relu(h) * models.rng(3).normal(size=4),
    "padding of minus one": lambda h: jnp.pad(jax.nn.relu(h)[:, 1:-1], ((0, 0), (1, 1)), constant_values=-1),
    "log softmax": jax.nn.log_softmax,
    "sorted": jnp.sort,
    "filled with minus one": lambda h: jnp.take(jax.nn.relu(h), jnp.arange(1, 5), 1, mode="fill", fill_value=-1),
    "relu with places set to minus one": lambda h: jax.nn.relu(h).at[:, 1].set(-1),
    "relu less, in place": lambda h: jax.nn.relu(h).at[:, 1].subtract(1),
    "smooth cumulative maximum": lambda h: lax.cumlogsumexp(jax.nn.relu(h) - 4, 1),
    "rotated twice": lambda h: ((1 + 2j) * (1 + 1j) * jax.nn.relu(h)).real,
}


def last_dense(front: Callable) -> tuple[Op, np.ndarray]:
    """The dense layer behind `front`, and what enters its core."""
    rng = models.rng(50)
    x, w, v = rng.normal(size=(3, 5)), 3 * rng.normal(size=(5, 4)), rng.normal(size=(4, 2))
    return ops(lambda x, w, v: front(x @ w) @ v, x, w, v)[-1], np.asarray(front(jnp.asarray(x @ w)))


@pytest.mark.parametrize("front", NONNEGATIVE.values(), ids=NONNEGATIVE)
def test_nonnegative_inputs_are_known(front: Callable):
    op, value = last_dense(front)
    assert op.kind == "dense" and (value >= 0).all()
    assert op.linear.nonneg


@pytest.mark.parametrize("front", SIGNED.values(), ids=SIGNED)
def test_signed_inputs_are_not_taken_for_nonnegative(front: Callable):
    op, value = last_dense(front)
    assert op.kind == "dense" and (value < 0).any()
    assert not op.linear.nonneg


def test_signs_of_every_input():
    def function(x, w):
        h = x @ w
        return jax.nn.relu(h) + jax.nn.gelu(h) + jax.nn.sigmoid(h)

    dense_, *_, add = ops(function, np.ones((2, 4)), np.ones((4, 4)))
    assert dense_.nonneg == (False,) and not dense_.linear.nonneg
    assert sorted(add.nonneg) == [False, True, True]


def test_signs_of_a_batch_norm_that_joined():
    """What enters the Op is non-negative, what enters its core is not."""
    _, _, block = ops(batch_norm_right_before_a_conv, models.images(), P)
    assert block.nonneg == (True,) and not block.linear.nonneg


def test_signs_of_a_carry_are_a_fixpoint():
    def loop(x, w, start):
        return lax.scan(lambda h, _: (jax.nn.relu(h @ w), None), start(x), None, length=3)[0]

    x, w = models.rng(0).normal(size=(2, 4)), np.ones((4, 4))
    for start, known in ((jax.nn.relu, True), (lambda x: x, False)):
        (op,) = [op for op in ops(lambda x, w, start=start: loop(x, w, start), x, w) if op.kind == "dense"]
        assert op.linear.nonneg is known
    # non-negative at first, signed from the second turn on
    turned = lambda x, w: lax.scan(lambda h, _: (-jax.nn.relu(h @ w), None), jax.nn.relu(x), None, length=3)[0]
    (op,) = [op for op in ops(turned, x, w) if op.kind == "dense"]
    assert not op.linear.nonneg


def test_signs_do_not_change_relevance():
    """The cheap form for non-negative inputs is the general one."""
    rng = models.rng(51)
    x, w, v = rng.normal(size=(3, 5)), rng.normal(size=(5, 4)), rng.normal(size=(4, 2))
    hide = lambda h: h * models.rng(0).uniform(1, 1, size=4)  # a parameter whose sign is not known
    for rule in (rules.ZPlus(), rules.AlphaBeta(2.0, 1.0), rules.GeneralizedGamma(0.3)):
        composite = Composite([(select.kind("dense"), rule)])
        known = lambda x, w, v: jax.nn.relu(x @ w) @ v
        unknown = lambda x, w, v: hide(jax.nn.relu(x @ w)) @ v
        assert ops(known, x, w, v)[-1].linear.nonneg and not ops(unknown, x, w, v)[-1].linear.nonneg
        close(lrp(known, composite)(x, w, v), lrp(unknown, composite)(x, w, v))
