"""State-space nets and a convolutional LSTM: relevance is gradient times input of the model with its gates detached.

That is how the authors of MambaLRP run it (Rezaei Jafari et al. 2024).
"""

from collections.abc import Callable
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from jaxlrp import Composite, lrp, plan, rules, select
from jaxlrp.select import kind
from nets import close, draw, quick_compilation, same  # noqa: F401
from recurrent import INPUTS, linen

EXACT = Composite([
    (kind("product", "matmul"), rules.SignalTakesAll(epsilon=0.0)),
    (kind("rms_norm"), rules.ConstantStatistics(0.0)),
    (kind("dense", "conv", "add", "scale", "reduce"), rules.Zero()),
])  # fmt: skip


def passing(activation: Callable) -> Callable:
    """The activation as a factor that is held constant: gradient times input passes it unchanged."""
    return lambda v: v * lax.stop_gradient(activation(v) / v)


def gradient_x_input(f: Callable, x, R):
    y, pull = jax.vjp(f, x)
    return x * pull(R / y)[0]


def test_convolutional_lstm():
    x, start = draw(4, 1, 3, 6, 2), draw(5, 1, 3, 6, 4)
    f, params = linen(nn.RNN(nn.ConvLSTMCell(4, (3,), param_dtype=jnp.float64)), x)

    def detached(x):
        cell, hold = params["params"]["cell"], lax.stop_gradient
        conv = lambda v, p: nn.Conv(4 * 4, (3,), param_dtype=jnp.float64).apply({"params": p}, v)
        c = h = jnp.zeros((1, 6, 4))
        hs = []
        for t in range(3):
            i, g, f, o = jnp.split(conv(x[:, t], cell["ih"]) + conv(h, cell["hh"]), 4, -1)
            c = hold(jax.nn.sigmoid(f + 1)) * c + hold(jax.nn.sigmoid(i)) * passing(jnp.tanh)(g)
            h = hold(jax.nn.sigmoid(o)) * passing(jnp.tanh)(c)
            hs.append(h)
        return jnp.stack(hs, 1)

    np.testing.assert_allclose(detached(x), f(params, x), rtol=1e-12)
    got = jax.jit(lrp(f, EXACT, argnums=1, target=lambda y: start))(params, x)
    close(got, gradient_x_input(detached, x, start), 1e-10)


STATES, WIDTH, RANK = 3, 4, 2


def mamba_parameters() -> dict[str, jax.Array]:
    shapes = {"norm": (INPUTS,), "in": (INPUTS, 2 * WIDTH), "conv": (3, 1, WIDTH), "conv_bias": (WIDTH,),
              "project": (WIDTH, RANK + 2 * STATES), "delta": (RANK, WIDTH), "delta_bias": (WIDTH,),
              "A_log": (WIDTH, STATES), "D": (WIDTH,), "out": (WIDTH, INPUTS)}  # fmt: skip
    return {name: draw(10 + i, *shape) / 1.5 for i, (name, shape) in enumerate(shapes.items())}


def recurrence(h, inputs):
    decay, added, C = inputs
    h = decay * h + added
    return h, (h * C).sum(-1)


def scan(decay, added, C):
    return lax.scan(recurrence, jnp.zeros((WIDTH, STATES)), (decay, added, C))[1]


def parallel(decay, added, C):
    """The same by associative scan."""
    _, h = lax.associative_scan(lambda a, b: (a[0] * b[0], b[0] * a[1] + b[1]), (decay, added))
    return jnp.einsum("tdn,tn->td", h, C)


def at_once(decay, added, C):
    """The same as one sum over all pairs of steps, with the products of all decays between them (Mamba-2's form)."""
    total = jnp.cumsum(jnp.log(decay), 0)
    past = jnp.tril(jnp.ones((len(decay), len(decay)), bool))[..., None, None]
    kernel = jnp.exp(jnp.where(past, total[:, None] - total[None], -jnp.inf))
    return jnp.einsum("tn,tsdn,sdn->td", C, kernel, added)


def mamba(p, x, run, gate, silu=jax.nn.silu, half=lambda y: y, hold=lambda v: v):
    """A residual block on (time, inputs): norm, causal convolution, selective state space, output gate."""
    normed = x * hold(lax.rsqrt((x**2).mean(-1, keepdims=True) + 1e-5)) * p["norm"]
    u, z = jnp.split(normed @ p["in"], 2, -1)
    u = lax.conv_general_dilated(
        u[None], p["conv"], (1,), [(2, 0)], dimension_numbers=("NTC", "TIO", "NTC"), feature_group_count=WIDTH
    )[0]
    u = silu(u + p["conv_bias"])
    low, B, C = jnp.split(gate(u @ p["project"]), (RANK, RANK + STATES), -1)
    delta = jax.nn.softplus(low @ p["delta"] + p["delta_bias"])
    decay = jnp.exp(delta[..., None] * -jnp.exp(p["A_log"]))
    added = delta[..., None] * B[:, None] * u[..., None]
    y = run(decay, added, C) + p["D"] * u
    return x + half(y * silu(z)) @ p["out"]


def mark(v):
    return checkpoint_name(v, "gate")


SEQUENCE = draw(30, 9, INPUTS)


@pytest.fixture(scope="module")
def mamba_relevance():
    """MambaLRP as its authors run it: gradient times input of the detached model."""
    stop = lax.stop_gradient
    detached = partial(mamba, mamba_parameters(), run=scan, gate=stop, hold=stop, silu=passing(jax.nn.silu),
                       half=lambda y: y / 2 + stop(y / 2))  # fmt: skip
    start = draw(31, 9, INPUTS)
    return start, gradient_x_input(detached, SEQUENCE, start)


@pytest.mark.parametrize("run", [scan, parallel, at_once])
def test_selective_state_space(run, mamba_relevance):
    """One mark, on the projection from which B, C and Delta are made."""
    start, right = mamba_relevance
    f = partial(mamba, run=run, gate=mark)
    got = jax.jit(lrp(f, EXACT, argnums=1, target=lambda y: start))(mamba_parameters(), SEQUENCE)
    close(got, right, 1e-10)
    (note,) = plan(f, EXACT, argnums=1)(mamba_parameters(), SEQUENCE).notes
    assert note.endswith("none of its operands is known as a gate: each gets half"), "the output gate's halves"


def test_selective_state_space_without_marks(mamba_relevance):
    """The decay is known as a gate; of the other products the plan's notes ask, and the signal is named by hand."""
    start, right = mamba_relevance
    f, p = partial(mamba, run=scan, gate=lambda v: v), mamba_parameters()
    asked = plan(f, EXACT, argnums=1)(p, SEQUENCE).notes
    assert [note.split()[0] for note in asked] == ["mul", "mul#2", "mul#4", "mul#5"]
    by_hand = Composite([
        (select.exactly("mul#2"), rules.SignalTakesAll("second")),  # (Delta B) * u
        (select.exactly("mul#4"), rules.SignalTakesAll("first")),  # h * C
    ])  # fmt: skip
    close(jax.jit(lrp(f, by_hand + EXACT, argnums=1, target=lambda y: start))(p, SEQUENCE), right, 1e-10)


def test_products_are_found_by_named_scope():
    def f(x, w, gate=lambda v: v):
        def step(h, x):
            h = h * x
            with jax.named_scope("read"):
                y = gate(x @ w) * h
            return h, y

        return lax.scan(step, jnp.ones(4), x)[1]

    x, w, start = draw(40, 3, 4), draw(41, 4, 4), draw(42, 3, 4)
    read = select.where(lambda op: op.kind == "product" and op.scope.endswith("read"))
    composite = Composite([(read, rules.SignalTakesAll("second"))])
    half = Composite([(kind("product"), rules.Uniform())])
    got = lrp(f, composite + half + EXACT, target=lambda y: start)(x, w)
    unnamed = Composite([(read, rules.SignalTakesAll())]) + half + EXACT
    same(got, lrp(partial(f, gate=mark), unnamed, target=lambda y: start)(x, w))
    # h_t is the product of all x so far: each product halves what reached it
    right, carried = np.zeros((3, 4)), np.zeros(4)
    for t in reversed(range(3)):
        carried = (carried + start[t]) / 2
        right[t] = carried
    close(got, right)
