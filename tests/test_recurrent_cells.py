"""Recurrent nets: gates get nothing, signals all, through every time step.

The references are the formulas in recurrent.py.
"""

from collections.abc import Callable
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import recurrent
from jaxlrp import Composite, composites, evaluate, lrp, rules, select, value_and_lrp
from jaxlrp.select import kind
from nets import close, draw, quick_compilation  # noqa: F401
from recurrent import BATCH, EPS, HIDDEN, INPUTS, TIME, Gate, by_example, gru, linear, linen, lstm, shaken, simple

X, R = recurrent.X, recurrent.R
# one stabiliser for the sum W x + U h + b, as in the paper, where it is a single layer
ARRAS = Composite([
    (kind("product", "matmul"), rules.SignalTakesAll()),
    (kind("add"), rules.Epsilon(EPS)),
    (kind("dense"), rules.Zero()),
])  # fmt: skip


# ---------------------------------------------------------------------------------------------------- the cells


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
