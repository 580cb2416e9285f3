"""Control flow whose body is more than a chain of layers: other forms of one recurrence, nests, names inside bodies.

Loops against the unrolled network are in test_interpret_loops.py, wrappers against none in test_interpret_wrappers.py,
`vmap` against batches in test_interpret_transforms.py, recurrent nets in test_recurrent_cells.py, `shard_map` in the
files test_shard_map_*.py.
"""

from functools import cache, partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax
from jax.ad_checkpoint import checkpoint_name

import jaxlrp
import nets
from jaxlrp import Composite, lrp, plan, rules, select, value_and_lrp
from nets import close, draw, explained, quick_compilation  # noqa: F401

kind = select.kind
# without stabilisers it makes no difference in which order a linear function is computed
EXACT = Composite([(kind("dense", "add", "scale", "reduce", "matmul"), rules.Zero())])
X, W = draw(1, 6, 4), draw(2, 4, 4)
DECAY, MATRICES = 0.5 + 0.4 * jnp.tanh(draw(3, 6, 4)), draw(4, 6, 4, 4) / 2

# ---------------------------------------------------------------------------------------------------- one recurrence


def scanned(step, coefficients, x):
    """h_t = a_t h_(t-1) + x_t W"""
    return lax.scan(lambda h, ax: (step(ax[0], h) + ax[1],) * 2, jnp.zeros(4), (coefficients, x @ W))[1]


def associative(step, coefficients, x):
    def combine(first, second):
        (a, x), (b, y) = first, second
        return jax.vmap(step)(b, a), jax.vmap(step)(b, x) + y

    return lax.associative_scan(combine, (coefficients, x @ W))[1]


def unrolled(step, coefficients, x):
    h, states = jnp.zeros(4), []
    for a, y in zip(coefficients, x @ W, strict=True):
        h = step(a, h) + y
        states.append(h)
    return jnp.stack(states)


def by_fori(step, coefficients, x):
    def body(t, states):
        before = jnp.where(t > 0, states[t - 1], 0.0)
        now = step(coefficients[t], before) + lax.dynamic_index_in_dim(x, t, keepdims=False) @ W
        return lax.dynamic_update_index_in_dim(states, now, t, 0)

    return lax.fori_loop(0, 6, body, jnp.zeros((6, 4)))


STEPS = {"decays": (jnp.multiply, DECAY), "matrices": (jnp.matmul, MATRICES)}


@pytest.mark.parametrize("form", [scanned, associative, unrolled, by_fori], ids=lambda f: f.__name__)
@pytest.mark.parametrize("name", STEPS)
def test_forms_of_a_linear_recurrence(name, form):
    """Zero gives x times the derivative of h by x, weighted with R / h, however h is computed."""
    step, coefficients = STEPS[name]
    R = draw(5, 6, 4)
    f = partial(form, step, coefficients)
    h, pull = jax.vjp(partial(unrolled, step, coefficients), X)
    value, relevance = jax.jit(value_and_lrp(f, EXACT, target=lambda y: R))(X)
    close((value, relevance), (h, X * pull(R / h)[0]), 1e-11)


@pytest.mark.parametrize("reverse", [False, True])
def test_prefix_sums(reverse):
    """A sum of everything before, as a scan, as an associative scan, and as the primitive for it."""

    def by_scan(x):
        return lax.scan(lambda s, v: (s + v,) * 2, jnp.zeros(4), x, reverse=reverse)[1]

    forms = (
        by_scan,
        partial(lax.associative_scan, jnp.add, reverse=reverse),
        partial(lax.cumsum, reverse=reverse),
    )
    first, *others = jax.jit(lambda x: [lrp(lambda x, f=f: f(x @ W), EXACT)(x) for f in forms])(X)
    for other in others:
        close(other, first)
    np.testing.assert_allclose(first.sum(), by_scan(X @ W).sum(), rtol=1e-12)


# ---------------------------------------------------------------------------------------------------- nests


def block(x, w):
    return x + jnp.tanh(checkpoint_name(jax.nn.relu(x @ w), "hidden") @ w.T)


FOUR = draw(6, 4, 4, 4) / 2


def plain(ws, x):
    for w in ws:
        x = block(x, w)
    return x


def cond_in_scan_in_cond(ws, x):
    def step(x, iw):
        i, w = iw
        return lax.cond(i >= 0, block, lambda x, w: x, x, w), None

    return lax.cond(ws[0, 0, 0] < 9, lambda x: lax.scan(step, x, (jnp.arange(4), ws))[0], jnp.tanh, x)


def scan_in_fori(ws, x):
    pairs = ws.reshape(2, 2, 4, 4)
    return lax.fori_loop(0, 2, lambda i, x: lax.scan(lambda x, w: (block(x, w), None), x, pairs[i])[0], x)


def while_in_scan(ws, x):
    """Two iterations of an inner loop that says itself when to stop."""

    def step(x, pair):
        return lax.while_loop(lambda c: c[0] < 2, lambda c: (c[0] + 1, block(c[1], pair[c[0]])), (0, x))[1], None

    return lax.scan(step, x, ws.reshape(2, 2, 4, 4))[0]


def scan_in_vmap(ws, x):
    return jax.vmap(lambda x: lax.scan(lambda x, w: (block(x, w), None), x, ws)[0])(x)


def vmap_in_scan(ws, x):
    return lax.scan(lambda x, w: (jax.vmap(block, (0, None))(x, w), None), x, ws)[0]


def remat_in_scan_in_remat(ws, x):
    return jax.checkpoint(lambda x: lax.scan(lambda x, w: (jax.checkpoint(block)(x, w), None), x, ws)[0])(x)


def switch_in_fori(ws, x):
    return lax.fori_loop(0, 4, lambda i, x: lax.switch(i, [partial(block, w=w) for w in ws], x), x)


def scan_with_a_counter(ws, x):
    """The carry holds an integer, and a tree that is handed on."""

    def step(carry, _):
        i, held = carry
        return (i + 1, {"x": block(held["x"], ws[i]), "w": held["w"]}), i

    return lax.scan(step, (0, {"x": x, "w": ws}), None, length=4)[0][1]["x"]


NESTS = (
    cond_in_scan_in_cond, scan_in_fori, while_in_scan, scan_in_vmap, vmap_in_scan, remat_in_scan_in_remat,
    switch_in_fori, scan_with_a_counter,
)  # fmt: skip
plain_stack = cache(lambda: explained(plain, FOUR, X, argnums=1))


@pytest.mark.parametrize("nest", NESTS, ids=lambda f: f.__name__)
def test_nest(nest):
    close(explained(nest, FOUR, X, argnums=1), plain_stack())


policies = jax.checkpoint_policies
POLICIES = {
    "everything": policies.everything_saveable,
    "nothing": policies.nothing_saveable,
    "dots": policies.dots_saveable,
    "dots without batch": policies.dots_with_no_batch_dims_saveable,
    "these names": policies.save_only_these_names("hidden"),
    "any but these names": policies.save_anything_except_these_names("hidden"),
    "names or dots": policies.save_from_both_policies(
        policies.dots_saveable, policies.save_only_these_names("hidden")
    ),
}  # fmt: skip


@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
def test_remat_policy(policy):
    """Around each layer of a scan, and around the scan."""

    def f(ws, x):
        step = jax.checkpoint(block, policy=policy)
        loop = jax.checkpoint(lambda x: lax.scan(lambda x, w: (step(x, w), None), x, ws)[0], policy=policy)
        return loop(x)

    close(explained(f, FOUR, X, argnums=1), plain_stack())


def test_in_single_precision():
    ws, x = FOUR.astype(np.float32), X.astype(np.float32)
    right = explained(plain, ws, x, argnums=1)
    for nest in (remat_in_scan_in_remat, scan_in_vmap, while_in_scan):
        close(explained(nest, ws, x, argnums=1), right, 1e-6)


# ---------------------------------------------------------------------------------------------------- vmap within


def test_vmap_over_parameters():
    """An ensemble: each member has weights of its own."""
    got = explained(lambda ws, x: jax.vmap(block, (None, 0))(x, ws).mean(0), FOUR, X, argnums=1)
    close(got, explained(lambda ws, x: jnp.stack([block(x, w) for w in ws]).mean(0), FOUR, X, argnums=1))


ACROSS = {"psum": jnp.sum, "pmean": jnp.mean, "pmax": jnp.max, "pmin": jnp.min}


@pytest.mark.parametrize("name", ACROSS)
def test_vmap_with_a_name(name):
    """What `shard_map` does with devices `vmap` does with an axis: a sum over it is a sum. Of ties the first wins."""
    x = X.at[3].set(X[1])

    def f(across, x):
        return jnp.tanh(2 * across(x @ W) + 1) @ W

    got = explained(lambda x: jax.vmap(partial(f, lambda y: getattr(lax, name)(y, "i")), axis_name="i")(x)[0], x)
    close(got, explained(partial(f, partial(ACROSS[name], axis=0)), x))


# ---------------------------------------------------------------------------------------------------- names in bodies


class Layer(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return x + nn.Dense(4, name="down")(nn.relu(nn.Dense(6, name="up")(x))), None


class Stack(nn.Module):
    loop: bool

    @nn.compact
    def __call__(self, x):
        if self.loop:
            layers = nn.scan(Layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
            return layers(name="layers")(x, None)[0]
        for i in range(3):
            x, _ = Layer(name=f"layers{i}")(x, None)
        return x


class NnxLayer(nnx.Module):
    def __init__(self, rngs):
        self.up = nnx.Linear(4, 6, param_dtype=jnp.float64, rngs=rngs)
        self.down = nnx.Linear(6, 4, param_dtype=jnp.float64, rngs=rngs)

    def __call__(self, x):
        return x + self.down(nnx.relu(self.up(x)))


class NnxStack(nnx.Module):
    def __init__(self, rngs):
        self.layers = nnx.vmap(NnxLayer)(rngs.split(3))

    def __call__(self, x):
        return nnx.scan(lambda x, layer: layer(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(x, self.layers)


def by_name(prefix):
    return Composite([
        (select.named(f"{prefix}*/up/kernel"), rules.ZPlus()),
        (select.named(f"{prefix}*/down"), rules.Epsilon(0.3)),
    ])  # fmt: skip


def stacked():
    """Parameters of the loop, and the same for the unrolled network."""
    params = nets.randomise(jax.eval_shape(Stack(True).init, jax.random.key(0), X))
    each = {f"layers{i}": jax.tree.map(lambda v, i=i: v[i], params["params"]["layers"]) for i in range(3)}
    return params, {"params": each}


def test_names_in_a_flax_scan():
    """Rows address what is in the body; the plan shows each layer of it once, and where it was written."""
    params, each = stacked()
    composite = by_name("params/layers")
    rows = plan(Stack(True).apply, composite, argnums=1)(params, X)
    assert [(row.name, row.kind, type(row.rule).__name__) for row in rows] == [
        ("params/layers/up", "dense", "ZPlus"), ("relu", "activation", "Pass"),
        ("params/layers/down", "dense", "Epsilon"), ("add", "add", "Epsilon"),
    ]  # fmt: skip
    assert rows[1].source.startswith("test_loops.py")
    assert all(row.name in str(rows) for row in rows)
    got = value_and_lrp(Stack(True).apply, composite, argnums=1, layers=select.named("params/layers/up"))(params, X)
    every = value_and_lrp(Stack(False).apply, composite, argnums=1, layers=select.named("params/*/up"))(each, X)
    close(got[:2], every[:2])
    close(got[2]["params/layers/up"], jnp.stack([every[2][f"params/layers{i}/up"] for i in range(3)]))


def test_names_in_an_nnx_scan():
    fun, params = jaxlrp.functional(NnxStack(nnx.Rngs(0)))
    params = nets.randomise(params)
    composite = by_name("layers")
    names = [row.name for row in plan(fun, composite, argnums=1)(params, X) if row.kind == "dense"]
    assert names == ["layers/up", "layers/down"]

    def unrolled(params, x):
        for i in range(3):
            up, down = (jax.tree.map(lambda v, i=i: v[i], params["layers"][name]) for name in ("up", "down"))
            x = x + (jax.nn.relu(x @ up["kernel"] + up["bias"]) @ down["kernel"] + down["bias"])
        return x

    plain = Composite([(select.named("up"), rules.ZPlus()), (select.named("down"), rules.Epsilon(0.3))])
    rows = [(select.depth(i, i + 1), rule) for i, rule in enumerate([r for _, r in plain.rows] * 3)]
    got = explained(fun, params, X, rows=[composite], argnums=1)
    close(got, explained(unrolled, params, X, rows=[Composite(rows)], argnums=1))


def test_names_in_branches():
    """Each branch's layers have rows of their own, and rules only where the branch is taken."""
    p = {"left": {"kernel": W}, "right": {"kernel": 2 * W}}

    def f(p, x, on):
        return lax.cond(on, lambda x: x @ p["left"]["kernel"], lambda x: jnp.tanh(x @ p["right"]["kernel"]), x)

    composite = Composite([(select.named("left*"), rules.Epsilon(0.5)), (select.named("right*"), rules.ZPlus())])
    rows = plan(f, composite, argnums=1)(p, X, True)
    assert {row.name for row in rows} == {"left", "right", "tanh"}
    for on, plain, rule in (
        (True, lambda x: x @ W, rules.Epsilon(0.5)),
        (False, lambda x: jnp.tanh(x @ (2 * W)), rules.ZPlus()),
    ):
        close(jax.jit(lrp(f, composite, argnums=1))(p, X, jnp.asarray(on)), lrp(plain, nets.linear(rule))(X))


def test_flax_remat_scan():
    """Its own nest of scans and remats."""

    class Deep(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.remat_scan(nn.Dense, lengths=(2, 2))(4, name="layers")(x)

    params = nets.randomise(jax.eval_shape(Deep().init, jax.random.key(0), X))
    (kernels, biases) = (params["params"]["layers"][n].reshape(4, *s) for n, s in (("kernel", (4, 4)), ("bias", (4,))))

    def unrolled(kernels, biases, x):
        for w, b in zip(kernels, biases, strict=True):
            x = x @ w + b
        return x

    close(explained(Deep().apply, params, X, argnums=1), explained(unrolled, kernels, biases, X, argnums=2))
