"""Recurrent and state-space nets: gates get nothing, signals all, through every time step.

The references are LRP's formulas as loops over time in NumPy (Arras et al. 2017) and, for state spaces, gradient times
input of the model with its gates detached (Rezaei Jafari et al. 2024).
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from jaxlrp import Composite, composites, evaluate, lrp, plan, rewrite, rules, select, value_and_lrp
from nets import close, draw, quick_compilation, same  # noqa: F401

kind = select.kind
EPS = 0.01
# one stabiliser for the sum W x + U h + b, as in the paper, where it is a single layer
ARRAS = Composite([
    (kind("product", "matmul"), rules.SignalTakesAll()),
    (kind("add"), rules.Epsilon(EPS)),
    (kind("dense"), rules.Zero()),
])  # fmt: skip
EXACT = Composite([
    (kind("product", "matmul"), rules.SignalTakesAll(epsilon=0.0)),
    (kind("rms_norm"), rules.ConstantStatistics(0.0)),
    (kind("dense", "conv", "add", "scale", "reduce"), rules.Zero()),
])  # fmt: skip

BATCH, TIME, INPUTS, HIDDEN = 2, 4, 3, 5
X, R = draw(0, BATCH, TIME, INPUTS), draw(1, BATCH, TIME, HIDDEN)


# ---------------------------------------------------------------------------------------------------- the formulas


class Gate(NamedTuple):
    """a = x W + h U + b"""

    W: np.ndarray
    U: np.ndarray
    b: np.ndarray

    def __call__(self, x, h):
        return x @ self.W + h @ self.U + self.b


def stab(z):
    return z + EPS * np.where(z >= 0, 1, -1)


def linear(x, W, z, R):
    """sum_j x_i w_ij / stab(z_j) R_j"""
    return np.array([sum(x[i] * W[i, j] / stab(z[j]) * R[j] for j in range(len(z))) for i in range(len(x))])


def sigmoid(a):
    return 1 / (1 + np.exp(-a))


def lstm(p: dict[str, Gate], x, R):
    """Relevance of x_t, where R_t starts at every h_t: c = f * c' + i * g, h = o * tanh(c)."""
    c = h = np.zeros(R.shape[1])
    seen = []
    for x_t in x:
        i, f, o = (sigmoid(p[k](x_t, h)) for k in "ifo")
        a = p["g"](x_t, h)
        new = f * c + i * np.tanh(a)
        seen.append((x_t, h, a, f * c, i * np.tanh(a), new))
        c, h = new, o * np.tanh(new)
    R_x, R_c, R_h = np.zeros(x.shape), 0.0, 0.0
    for t in reversed(range(len(x))):
        x_t, h, a, kept, added, new = seen[t]
        R_c = R_c + R_h + R[t]  # o gets nothing, tanh passes
        R_g = added / stab(new) * R_c
        R_c = kept / stab(new) * R_c
        R_x[t], R_h = linear(x_t, p["g"].W, a, R_g), linear(h, p["g"].U, a, R_g)
    return R_x


def gru(p: dict[str, Gate], x, R):
    """h = (1 - z) * n + z * h', n = tanh(x W + b + r * q), q = h' U + c."""
    W, U, b, c = p["n"]
    h = np.zeros(R.shape[1])
    seen = []
    for x_t in x:
        r, z = (sigmoid(p[k](x_t, h)) for k in "rz")
        q = h @ U + c
        a = x_t @ W + b + r * q
        new = (1 - z) * np.tanh(a) + z * h
        seen.append((x_t, h, a, r * q, q, (1 - z) * np.tanh(a), z * h, new))
        h = new
    R_x, R_h = np.zeros(x.shape), 0.0
    for t in reversed(range(len(x))):
        x_t, h, a, gated, q, added, kept, new = seen[t]
        R_t = R_h + R[t]
        R_n, R_kept = added / stab(new) * R_t, kept / stab(new) * R_t
        R_q = gated / stab(a) * R_n
        R_x[t] = linear(x_t, W, a, R_n)
        s = np.divide(R_q, q, out=np.zeros_like(q), where=q != 0)  # without bias q is 0 at the first step
        R_h = R_kept + [sum(h[i] * U[i, j] * s[j] for j in range(len(q))) for i in range(len(h))]
    return R_x


def simple(p: dict[str, Gate], x, R):
    """h = tanh(x W + h' U + b)"""
    (gate,) = p.values()
    hs = [np.zeros(R.shape[1])]
    for x_t in x:
        hs.append(np.tanh(gate(x_t, hs[-1])))
    R_x, R_h = np.zeros(x.shape), 0.0
    for t in reversed(range(len(x))):
        R_t, a = R_h + R[t], gate(x[t], hs[t])
        R_x[t], R_h = linear(x[t], gate.W, a, R_t), linear(hs[t], gate.U, a, R_t)
    return R_x


def by_example(reference, p, x, R) -> np.ndarray:
    return np.stack([reference(p, *pair) for pair in zip(np.asarray(x), np.asarray(R), strict=True)])


# ---------------------------------------------------------------------------------------------------- the cells


def shaken(tree, seed: int = 7):
    """The parameters with biases that are not zero."""
    leaves, structure = jax.tree.flatten(tree)
    rng = np.random.default_rng(seed)
    return jax.tree.unflatten(structure, [jnp.asarray(rng.normal(size=v.shape) / 2) for v in leaves])


def linen(module: nn.Module, x=X) -> tuple[Callable, dict]:
    return module.apply, shaken(jax.eval_shape(module.init, jax.random.key(0), x))


def functional(module: nnx.Module) -> tuple[Callable, nnx.State]:
    graph, params, rest = nnx.split(module, nnx.Param, ...)
    fresh = lambda: jax.tree.map(lambda v: v, rest)  # its random counters belong to whoever traces
    return (lambda params, x: nnx.merge(graph, params, fresh())(x)), shaken(params)


def rnn(cell: type) -> tuple[Callable, dict]:
    return linen(nn.RNN(cell(HIDDEN, param_dtype=jnp.float64)))


def nnx_rnn(cell: type, **options) -> nnx.RNN:
    inner = cell(INPUTS, HIDDEN, param_dtype=jnp.float64, rngs=nnx.Rngs(0), **options)
    return nnx.RNN(inner, rngs=nnx.Rngs(0))


def gates_of_linen(cell: dict, keys: str) -> dict[str, Gate]:
    numbers = jax.tree.map(np.asarray, cell)
    found = {}
    for k in keys:
        x, h = numbers[f"i{k}"], numbers[f"h{k}"]
        found[k] = Gate(x["kernel"], h["kernel"], x.get("bias", 0) + h.get("bias", 0))
    return found


def linen_lstm(params):
    return gates_of_linen(params["params"]["cell"], "ifgo")


def linen_gru(params):
    cell = params["params"]["cell"]
    n = (cell["in"]["kernel"], cell["hn"]["kernel"], cell["in"]["bias"], cell["hn"]["bias"])
    return gates_of_linen(cell, "rz") | {"n": tuple(map(np.asarray, n))}


def linen_mgu(params):
    """One gate for both purposes."""
    cell = params["params"]["cell"]
    (forget,) = gates_of_linen(cell, "f").values()
    n = (cell["in"]["kernel"], cell["hn"]["kernel"], cell["in"]["bias"], cell["hn"]["bias"])
    return {"r": forget, "z": forget, "n": tuple(map(np.asarray, n))}


def linen_simple(params):
    cell = jax.tree.map(np.asarray, params["params"]["cell"])
    return {"h": Gate(cell["i"]["kernel"], cell["h"]["kernel"], cell["i"]["bias"])}


def nnx_lstm(params):
    cell = jax.tree.map(np.asarray, nnx.to_pure_dict(params)["cell"])
    names = {"i": ("ii", "hi"), "f": ("if_", "hf"), "g": ("ig", "hg"), "o": ("io", "ho")}
    return {k: Gate(cell[i]["kernel"], cell[h]["kernel"], cell[h]["bias"]) for k, (i, h) in names.items()}


def nnx_joined(params, keys: str):
    """Of cells that compute all gates in one product."""
    cell = jax.tree.map(np.asarray, nnx.to_pure_dict(params)["cell"])
    i, h = cell["dense_i"], cell["dense_h"]
    bias = i.get("bias", h.get("bias"))
    parts = zip(*(np.split(a, len(keys), -1) for a in (i["kernel"], h["kernel"], bias)), strict=True)
    return {k: Gate(*part) for k, part in zip(keys, parts, strict=True)}


def nnx_gru(params):
    found = nnx_joined(params, "rzn")
    return found | {"n": (*found["n"], 0.0)}


CELLS: dict[str, tuple[Callable, Callable, Callable]] = {
    "linen LSTM": (partial(rnn, nn.LSTMCell), linen_lstm, lstm),
    "linen optimised LSTM": (partial(rnn, nn.OptimizedLSTMCell), linen_lstm, lstm),
    "linen GRU": (partial(rnn, nn.GRUCell), linen_gru, gru),
    "linen MGU": (partial(rnn, nn.MGUCell), linen_mgu, gru),
    "linen simple": (partial(rnn, nn.SimpleCell), linen_simple, simple),
    "nnx LSTM": (lambda: functional(nnx_rnn(nnx.LSTMCell)), nnx_lstm, lstm),
    "nnx optimised LSTM": (
        lambda: functional(nnx_rnn(nnx.OptimizedLSTMCell)), partial(nnx_joined, keys="ifgo"), lstm,
    ),
    "nnx GRU": (lambda: functional(nnx_rnn(nnx.GRUCell)), nnx_gru, gru),
    "nnx simple": (
        lambda: functional(nnx_rnn(nnx.SimpleCell, dtype=jnp.float64)), partial(nnx_joined, keys="h"), simple,
    ),
}  # fmt: skip


@pytest.mark.parametrize("make, gates, reference", CELLS.values(), ids=CELLS)
def test_cells(make, gates, reference):
    """Stabilisers, biases and all: every message of every step is that of the paper's formulas."""
    f, params = make()
    got = jax.jit(lrp(f, ARRAS, argnums=1, target=lambda y: R))(params, X)
    close(got, by_example(reference, gates(params), X, R))
    assert (abs(got) > 0).all(), "relevance reaches every step"


@pytest.mark.parametrize("framework", ["linen", "nnx"])
def test_bidirectional(framework):
    """The layer that runs backwards is the same on the sequence turned round."""
    if framework == "linen":
        both = nn.Bidirectional(*(nn.RNN(c(HIDDEN, param_dtype=jnp.float64)) for c in (nn.LSTMCell, nn.GRUCell)))
        f, params = linen(both)
        forth, back = ({"params": params["params"][f"{way}_rnn"]} for way in ("forward", "backward"))
        forth, back = linen_lstm(forth), linen_gru(back)
    else:
        both = nnx.Bidirectional(nnx_rnn(nnx.LSTMCell), nnx_rnn(nnx.GRUCell), rngs=nnx.Rngs(0))
        f, params = functional(both)
        forth, back = nnx_lstm(params["forward_rnn"]), nnx_gru(params["backward_rnn"])
    start = draw(2, BATCH, TIME, 2 * HIDDEN)
    got = jax.jit(lrp(f, ARRAS, argnums=1, target=lambda y: start))(params, X)
    turned = by_example(gru, back, X[:, ::-1], start[:, ::-1, HIDDEN:])[:, ::-1]
    close(got, by_example(lstm, forth, X, start[..., :HIDDEN]) + turned)


def test_stacked_layers_and_a_readout():
    """The last state decides; what arrives at the first layer's states is what the second passes on."""
    f, params = rnn(nn.LSTMCell)
    module = nn.RNN(nn.LSTMCell(2, param_dtype=jnp.float64))
    upper = shaken(jax.eval_shape(module.init, jax.random.key(1), R), 8)
    V = draw(3, 2, 3)

    def model(x):
        return module.apply(upper, f(params, x))[:, -1] @ V

    readout = Composite([(select.last("dense"), rules.Epsilon(EPS))])
    got = jax.jit(lrp(model, readout + ARRAS, target=1))(X)
    states = np.asarray(f(params, X))
    last = np.asarray(module.apply(upper, states)[:, -1])
    start = np.zeros((BATCH, TIME, 2))
    for h, y, r in zip(last, last @ V, start, strict=True):
        r[-1] = linear(h, np.asarray(V), y, y * (np.arange(3) == 1))
    between = by_example(lstm, linen_lstm(upper), states, start)
    close(got, by_example(lstm, linen_lstm(params), X, between))


def test_sequences_of_several_lengths():
    """Steps past a sequence's end get nothing, and the backward layer starts at that end."""
    both = nn.Bidirectional(*(nn.RNN(nn.GRUCell(HIDDEN, param_dtype=jnp.float64)) for _ in range(2)))
    f, params = linen(both)
    lengths = np.array([TIME, 2])
    start = draw(2, BATCH, TIME, 2 * HIDDEN) * (np.arange(TIME) < lengths[:, None])[..., None]
    run = lambda params, x: f(params, x, seq_lengths=lengths)
    got = jax.jit(lrp(run, ARRAS, argnums=1, target=lambda y: start))(params, X)
    forth, back = (linen_gru({"params": params["params"][f"{way}_rnn"]}) for way in ("forward", "backward"))
    for r, x, R, n in zip(got, np.asarray(X), np.asarray(start), lengths, strict=True):
        turned = gru(back, x[:n][::-1], R[:n, HIDDEN:][::-1])[::-1]
        close(r[:n], gru(forth, x[:n], R[:n, :HIDDEN]) + turned)
        assert not r[n:].any()


def test_words():
    """Relevance of a word is that of its embedding, summed."""
    f, params = rnn(nn.LSTMCell)
    table, ids = draw(6, 7, INPUTS), np.array([[3, 0, 6, 3], [1, 5, 5, 2]])
    got = jax.jit(lrp(lambda ids, table: f(params, table[ids]), ARRAS, target=lambda y: R))(ids, table)
    close(got, by_example(lstm, linen_lstm(params), np.asarray(table)[ids], R).sum(-1))


# ---------------------------------------------------------------------------------------------------- detached


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


# ---------------------------------------------------------------------------------------------------- conservation


def without_bias(params):
    zero = lambda path, v: v * 0 if path[-1].key == "bias" else v
    return jax.tree_util.tree_map_with_path(zero, params)


SMALL = Composite([(kind("product"), rules.SignalTakesAll()), (kind("add"), rules.Epsilon(1e-12))])


def test_everything_arrives_at_inputs_and_the_first_carry():
    module = nn.RNN(nn.OptimizedLSTMCell(HIDDEN, param_dtype=jnp.float64))
    params = without_bias(linen(module)[1])
    carry = shaken(module.cell.initialize_carry(jax.random.key(0), X[:, 0].shape), 9)
    f = lambda params, x, carry: module.apply(params, x, initial_carry=carry)[:, -1]
    composite = SMALL + composites.epsilon(1e-12)
    both = jax.jit(lrp(f, composite, argnums=(1, 2), target=2))(params, X, carry)
    total = sum(np.sum(r.reshape(BATCH, -1), 1) for r in jax.tree.leaves(both))
    close(total, f(params, X, carry)[:, 2], 1e-8)
    assert (abs(both[0]).max((0, 2)) > 1e-4).all(), "every step has its share"

    # where the carry is not explained, the ledger has what ends there
    first = jax.tree.map(lambda c: c[:1], carry)  # the same for all examples
    ledger = evaluate.conservation(lambda params, x: f(params, x, first), composite, argnums=1, target=2)(params, X[:1])
    assert abs(ledger.gap).max() < 1e-6 * abs(ledger.start).max()
    ended = sum(r.ended for r in ledger if r.name == "constants of scan")
    close(ended, sum(np.sum(r[:1], 1) for r in jax.tree.leaves(both[1])), 1e-6)


def test_the_ledger_closes_with_stabilisers_and_biases():
    f, params = rnn(nn.LSTMCell)
    last = lambda params, x: f(params, x)[:, -1]
    ledger = evaluate.conservation(last, ARRAS, argnums=1, target=0)(params, X)
    assert abs(ledger.gap).max() < 1e-6
    by_name = {row.name: row for row in ledger}
    for t in range(TIME):
        for name in ("ii", "hi", "if", "hf", "io", "ho"):
            assert not by_name[f"params/cell/{name}[{t}]"].size.any(), "gates get nothing"
        assert by_name[f"params/cell/ig[{t}]"].size.all() and by_name[f"params/cell/hg[{t}]"].bias.all()
    assert all(row.stabiliser.any() for row in ledger if row.name.startswith("add#5"))


def test_relevance_within_the_loop():
    """Every layer's relevance at every step, gates' zeros among them, from the same pass."""
    f, params = rnn(nn.GRUCell)
    _, total, inside = jax.jit(value_and_lrp(f, ARRAS, argnums=1, target=lambda y: R, layers=kind("dense")))(params, X)
    close(total, jax.jit(lrp(f, ARRAS, argnums=1, target=lambda y: R))(params, X))
    for name, r in inside.items():
        assert r.shape == (TIME, BATCH, HIDDEN)
        gate = name.rpartition("/")[2] in ("ir", "hr", "iz", "hz")
        assert bool(np.any(r)) is not gate, name


# ---------------------------------------------------------------------------------------------------- what is a gate

GATES: dict[str, Callable] = {
    "sigmoid": jax.nn.sigmoid,
    "sigmoid by hand": lambda a: 1 / (1 + jnp.exp(-a)),
    "sigmoid from tanh": lambda a: 0.5 * jnp.tanh(a / 2) + 0.5,
    "hard sigmoid": jax.nn.hard_sigmoid,
    "clipped line": lambda a: jnp.clip(0.2 * a + 0.5, 0, 1),
    "rest": lambda a: 1 - jax.nn.sigmoid(a),
    "product of gates": lambda a: jax.nn.sigmoid(a) * jax.nn.sigmoid(2 * a),
    "mean of gates": lambda a: jnp.broadcast_to(jax.nn.sigmoid(a).mean(-1, keepdims=True), a.shape),
    "repeated gate": lambda a: jnp.repeat(jax.nn.sigmoid(a)[:, :1], 4, 1),
    "slice of a gate": lambda a: jax.nn.sigmoid(jnp.concatenate([a, a], 1))[:, 2:6],
    "split gate": lambda a: jnp.split(jax.nn.sigmoid(jnp.concatenate([a, a], 1)), 2, 1)[1],
    "masked gate": lambda a: jnp.where(a > 0, jax.nn.sigmoid(a), 0),
    "gate in half precision": lambda a: jax.nn.sigmoid(a.astype(jnp.bfloat16)).astype(a.dtype),
    "decay": lambda a: jnp.exp(-jax.nn.softplus(a)),
    "decay by logaddexp": lambda a: jnp.exp(-jnp.logaddexp(a, 0.0)),
    "decay by square": lambda a: jnp.exp(-(a**2) / 2),
    "softmax": jax.nn.softmax,
    "moved softmax": lambda a: jax.nn.softmax(a.T, 0).T,
    "one of a softmax": lambda a: jnp.broadcast_to(jax.nn.softmax(a)[:, 1:2], a.shape),
    "marked": lambda a: checkpoint_name(a, "gate"),
    "made from what is marked": lambda a: jax.nn.softplus(checkpoint_name(a, "gate")[:, ::-1] @ draw(50, 4, 4) + 1),
    "product of gates in a loop": lambda a: lax.scan(
        lambda g, _: (g * jax.nn.sigmoid(a), None), jnp.ones_like(a), None, length=2
    )[0],
    "either of two": lambda a: lax.cond(a.sum() > 0, jax.nn.sigmoid, lambda a: 1 - jax.nn.sigmoid(a), a),
}  # fmt: skip
NO_GATES: dict[str, Callable] = {
    "nothing": lambda a: a,
    "tanh": jnp.tanh,
    "relu": jax.nn.relu,
    "softplus": jax.nn.softplus,
    "silu": jax.nn.silu,
    "twice a sigmoid": lambda a: 2 * jax.nn.sigmoid(a),
    "less than a sigmoid": lambda a: jax.nn.sigmoid(a) - 0.5,
    "sum of gates": lambda a: jax.nn.sigmoid(a) + jax.nn.sigmoid(2 * a),
    "dense layer on a gate": lambda a: jax.nn.sigmoid(a) @ draw(51, 4, 4),
    "growth": lambda a: jnp.exp(jax.nn.softplus(a)),
    "growth by square": lambda a: jnp.exp(a**2),
    "log softmax": jax.nn.log_softmax,
    "another name": lambda a: checkpoint_name(a, "signal"),
    "made from what is marked, and from what is not": lambda a: a + checkpoint_name(a, "gate"),
    "sum of gates in a loop": lambda a: lax.scan(
        lambda g, _: (g + jax.nn.sigmoid(a), None), jnp.zeros_like(a), None, length=2
    )[0],
    "one of two": lambda a: lax.cond(a.sum() > 0, jax.nn.sigmoid, lambda a: 2 * jax.nn.sigmoid(a), a),
}  # fmt: skip
S, A, START = draw(52, 3, 4), draw(53, 3, 4), draw(54, 3, 4)
TAKES_ALL = Composite([(kind("product", "matmul"), rules.SignalTakesAll())]) + composites.epsilon()


def shares(f: Callable, *args, composite=TAKES_ALL, start=START):
    return lrp(f, composite, argnums=(0, 1), target=lambda y: start)(*args)


@pytest.mark.parametrize("gate", GATES.values(), ids=GATES)
def test_gates(gate):
    """On either side of the product."""
    same(shares(lambda s, a: jnp.sin(s) * gate(a), S, A), (START, jnp.zeros_like(A)))
    same(shares(lambda s, a: gate(a) * jnp.sin(s), S, A), (START, jnp.zeros_like(A)))
    assert not plan(lambda s, a: jnp.sin(s) * gate(a), TAKES_ALL, argnums=(0, 1))(S, A).notes


@pytest.mark.parametrize("factor", NO_GATES.values(), ids=NO_GATES)
def test_what_is_no_gate(factor):
    f = lambda s, a: jnp.sin(s) * factor(a)
    same(shares(f, S, A)[0], START / 2)
    (note,) = (n for n in plan(f, TAKES_ALL, argnums=(0, 1))(S, A).notes if "gate" in n)
    assert note.startswith("mul") and "test_recurrent.py" in note and note.endswith("each gets half")


def test_marks_come_before_bounds():
    """A signal between 0 and 1 is no gate where the model says which one is."""
    f = lambda s, a: jax.nn.sigmoid(s) * checkpoint_name(a, "gate")
    same(shares(f, S, A), (START, jnp.zeros_like(A)))


def test_both_are_gates():
    f = lambda s, a: jax.nn.sigmoid(s) * jax.nn.sigmoid(a)
    same(shares(f, S, A), (START / 2, START / 2))


def test_the_signal_by_hand():
    f = lambda s, a: jnp.sin(s) * jax.nn.sigmoid(a)
    for signal, right in (("first", (START, 0 * START)), ("second", (0 * START, START))):
        composite = Composite([(kind("product"), rules.SignalTakesAll(signal))])
        same(shares(f, S, A, composite=composite), right)


def test_the_numerator_is_the_signal():
    f = lambda s, a: jnp.sin(s) / jnp.exp(a)
    same(shares(f, S, A), (START, jnp.zeros_like(A)))
    composite = Composite([(kind("product"), rules.SignalTakesAll("second"))])
    same(shares(f, S, A, composite=composite), (jnp.zeros_like(A), START))


def test_a_signal_that_is_broadcast():
    s = draw(55, 1, 4)
    same(shares(lambda s, a: jnp.sin(s) * jax.nn.sigmoid(a), s, A), (START.sum(0, keepdims=True), jnp.zeros_like(A)))


def test_a_matrix_times_itself():
    x, start = draw(62, 4, 4), draw(63, 4, 4)
    s = start / (2 * x @ x)
    composite = Composite([(kind("matmul"), rules.SignalTakesAll("first", 0.0))])
    close(lrp(lambda x: x @ x, composite, target=lambda y: start)(x), x * (s @ x.T + x.T @ s))


def test_matrix_products():
    """Attention with its weights held constant: R_V = V * A^T (R / stab(A V)), the weights get nothing."""
    scores, V, start = draw(56, 3, 3), draw(57, 3, 4), draw(58, 3, 4)
    A = np.asarray(jax.nn.softmax(scores))
    y = A @ V
    right = V * (A.T @ (start / (y + 0.3 * np.where(y >= 0, 1, -1))))
    composite = Composite([(kind("matmul"), rules.SignalTakesAll(epsilon=0.3))])
    cases = {
        "weights first": lambda v, a: jax.nn.softmax(a) @ v,
        "weights second": lambda v, a: (v.T @ jax.nn.softmax(a).T).T,
        "einsum": lambda v, a: jnp.einsum("kd,qk->qd", v, jax.nn.softmax(a)),
        "marked": lambda v, a: checkpoint_name(jax.nn.softmax(a), "gate") @ v,
    }
    run = jax.jit(lambda *args: [shares(f, *args, composite=composite, start=start) for f in cases.values()])
    for got in run(V, scores):
        close(got[0], right)
        assert not got[1].any()


def test_matrix_products_without_a_gate():
    """Half each, which is the rule of AttnLRP; by hand, all to one."""
    V, W, start = draw(59, 3, 5), draw(60, 5, 4), draw(61, 3, 4)
    f = lambda v, w: jnp.sin(v) @ jnp.sin(w)
    attention = Composite([(kind("matmul"), rules.UniformEpsilon(0.2))])
    none, first, second = (
        shares(f, V, W, composite=Composite([(kind("matmul"), rules.SignalTakesAll(signal, 0.2))]), start=start)
        for signal in ("gated", "first", "second")
    )
    same(none, shares(f, V, W, composite=attention, start=start))
    y = jnp.sin(V) @ jnp.sin(W)
    s = start / (y + 0.2 * np.where(y >= 0, 1, -1))
    close(first[0], jnp.sin(V) * (s @ jnp.sin(W).T))
    close(second[1], jnp.sin(W) * (jnp.sin(V).T @ s))
    assert not first[1].any() and not second[0].any()


@pytest.mark.parametrize("rule", [rules.SignalTakesAll(), rules.Uniform()], ids=["signal", "uniform"])
def test_products_keep_nothing_of_the_forward_pass(rule):
    """A scan would else keep gates and signals of every step for a rule that does not read them."""
    composite = Composite([(kind("product"), rule), (kind("add"), rules.Uniform())])
    step = lambda c, x: (jax.nn.sigmoid(c) * jnp.sin(x) + c, None)
    f = rewrite(lambda x: lax.scan(step, jnp.ones(4), x)[0], composite)
    kept = jax.make_jaxpr(lambda x: jax.vjp(f, x)[1])(S)
    assert not kept.jaxpr.outvars
