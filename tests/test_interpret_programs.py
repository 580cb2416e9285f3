"""Programs of every form: relevance passes whatever arguments, outputs, callbacks and dead code they have."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import nets
from jaxlrp import lrp, rewrite, value_and_lrp
from nets import close, explained, quick_compilation, same  # noqa: F401
from programs import EPSILON, ZERO, B, W, X, variables_of

pytestmark = pytest.mark.smoke


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit, jax.checkpoint], ids=["plain", "jit", "remat"])
def test_debug_callback_survives(wrap):
    seen = []

    @wrap
    def f(x):
        hidden = jax.nn.relu(x @ W)
        jax.debug.callback(lambda v: seen.append(np.asarray(v)), hidden)
        return hidden @ W.T

    right = lrp(lambda x: jax.nn.relu(x @ W) @ W.T, EPSILON)(X)
    for explain in (lrp(f, EPSILON), jax.jit(lrp(f, EPSILON))):
        seen.clear()
        close(explain(X), right)
        jax.effects_barrier()
        assert seen
        for v in seen:
            close(v, jax.nn.relu(X @ W))


def test_debug_print_survives(capfd):
    square = W @ W.T / 5

    def f(x, debug):
        def step(x, _):
            if debug:
                jax.debug.print("sum {s:.3f} of {n}", s=x.sum(), n=x.size)
            return jax.nn.relu(x @ square), None

        return lax.scan(step, x, None, length=2)[0]

    relevance = lrp(f, EPSILON)(X, True)
    jax.effects_barrier()
    assert capfd.readouterr().out.splitlines()[0] == f"sum {X.sum():.3f} of 12"
    close(relevance, lrp(f, EPSILON)(X, False))


def outputs(x, w):
    """What an output may be: data twice, the argument itself, a parameter, literals, integers, booleans, nothing."""
    y = jax.nn.relu(x @ w)
    best, large = jnp.argmax(y, -1), y > 1
    return {"y": (y, y), "x": x, "w": w, "one": 1.0, "best": best, "large": large, "none": None, "half": y[:, :2]}


def test_outputs_of_any_form():
    same(rewrite(outputs, EPSILON)(X, W), outputs(X, W))
    value, relevance = value_and_lrp(outputs, ZERO)(X, W)
    close(value["y"], outputs(X, W)["y"])

    def start(y):
        return 2 * y + jnp.pad(y[:, :2], ((0, 0), (0, 3)))

    close(relevance, X + lrp(lambda x: jax.nn.relu(x @ W), ZERO, target=start)(X))


def test_outputs_that_carry_nothing():
    for f in (lambda x: 1.0, lambda x: W, lambda x: jnp.argmax(x), lambda x: lax.stop_gradient(x)):
        assert not np.any(lrp(f, EPSILON)(X))
    close(lrp(lambda x: x, EPSILON)(X), X)
    close(lrp(lambda x: (x, x[0]), EPSILON)(X), X.at[0].mul(2))


def test_dead_code():
    """What reaches no output needs no rule, and its primitives no kind."""

    def f(x, unused, w):
        jnp.linalg.svd(x)
        low, _, high = jnp.split(x @ w, 3, axis=1)
        _, last = lax.scan(lambda c, _: (c + 1, jnp.tanh(high)), low, None, length=2)
        return last[-1]

    args = X, np.ones(7), W[:, :3]
    right = lrp(lambda x: jnp.tanh((x @ W[:, :3])[:, 2:]), EPSILON)(X)
    close(lrp(f, EPSILON)(*args), right)
    close(lrp(jax.jit(f), EPSILON)(*args), right)


DUPLICATES = {
    "x + x": lambda x: x + x,
    "x * x": lambda x: x * x,
    "max(x, x)": lambda x: jnp.maximum(x, x),
    "x . x": lambda x: (x[:, None, :] @ x[:, :, None])[:, 0],
    "concatenate": lambda x: jnp.concatenate([x, x], 1),
    "stack": lambda x: jnp.stack([x, x]),
    "two layers of one": lambda x: x @ W + x @ W,
    "scan": lambda x: lax.scan(lambda c, _: (0.5 * (c + x), None), x, None, length=2)[0],
    "cond": lambda x: lax.cond(True, lambda a, b: a + b, lambda a, b: a, x, x),
    "jit": lambda x: jax.jit(lambda a, b: 0.5 * a + b)(x, x),
    "both outputs": lambda x: jax.jit(lambda a: (a, a))(x)[1],
}


@pytest.mark.parametrize("f", DUPLICATES.values(), ids=DUPLICATES)
def test_duplicate_operands(f):
    """Nothing is lost or counted twice: each of these conserves."""
    value, relevance = value_and_lrp(f, ZERO)(X)
    close(value, f(X))
    np.testing.assert_allclose(relevance.sum(), value.sum(), rtol=1e-7)


def test_arguments_of_any_form():
    """Keywords, Python values, pytrees, None, a parameter that is used twice, numpy arrays, random keys."""

    def f(p, x, *, scale, train=False, name="plain", act=jax.nn.relu, key=None):
        assert name in ("plain", "other") and not (train and key is None)
        y = act(x["a"] @ p["w"] + x["b"] @ p["w"] + B) * scale
        return y + jax.random.normal(key, y.shape, y.dtype) if train else y

    def explain(p=None, **options):
        return lrp(f, ZERO, argnums=1)(p or {"w": W, "none": None}, {"a": X, "b": X[::-1]}, scale=2.0, **options)

    def right(act, noise=0.0):
        by_hand = lambda x: act(x["a"] @ W + x["b"] @ W + B) * 2 + noise
        return lrp(by_hand, ZERO)({"a": X, "b": X[::-1]})

    close(explain(), right(jax.nn.relu), 1e-7)
    close(explain(train=False, name="other"), explain())
    close(explain({"w": np.asarray(W)}), explain())
    close(explain(act=jnp.tanh, key=None), right(jnp.tanh), 1e-7)
    noise = jax.random.normal(jax.random.key(3), (3, 5), np.float64)
    close(explain(train=True, key=jax.random.key(3)), right(jax.nn.relu, noise), 1e-7)
    close(explain(train=True, key=jax.random.PRNGKey(3)), right(jax.nn.relu, noise), 1e-7)


class Trained(nn.Module):
    @nn.compact
    def __call__(self, x, train: bool = False):
        x = nn.relu(nn.BatchNorm(use_running_average=not train)(nn.Dense(5)(x)))
        return nn.Dense(2)(nn.Dropout(0.5, deterministic=not train)(x))


def test_flax_module_with_train_argument():
    variables = variables_of(Trained(), X)
    explain = lrp(Trained().apply, EPSILON, argnums=1)
    right, *got = jax.jit(lambda v, x: (explain(v, x), explain(v, x, False), explain(v, x, train=False)))(variables, X)
    close(got, [right, right])

    def training(x, key):
        """The batch's own statistics, and new ones as a second output."""
        return Trained().apply(variables, x, train=True, mutable="batch_stats", rngs={"dropout": key})

    value = rewrite(training, EPSILON)(X, jax.random.key(1))
    close(value, training(X, jax.random.key(1)))


def test_closures_are_parameters():
    parameters = nets.mlp_parameters(4, 6, 3)
    right = explained(nets.mlp, parameters, X, argnums=1)
    close(explained(lambda x: nets.mlp(parameters, x), X), right)
    close(explained(lambda x: jax.jit(partial(nets.mlp, parameters))(x), X), right)
    # closed over while they are traced themselves
    composite = nets.SOME[-1]
    traced = jax.jit(lambda ps, x: value_and_lrp(lambda x: nets.mlp(ps, x), composite)(x))
    close(traced(parameters, X), right[-1])
