"""Conditional relevance: masks at a layer's output, and the relevance that is reported there."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import nets
from jaxlrp import Composite, composites, errors, lrp, plan, rewrite, rules, select, value_and_lrp
from nets import LOCAL, close, draw, quick_compilation  # noqa: F401

RULES = {name: LOCAL[name] for name in ("epsilon", "zplus", "alpha-beta")}
every_rule = pytest.mark.parametrize("composite", RULES.values(), ids=RULES)
EPSILON = LOCAL["epsilon"]
X = draw(0, 2, 4, 4, 2)
PARAMETERS = nets.cnn_parameters()
KERNELS = draw(1, 3, 3, 2, 4) / 3, draw(2, 3, 3, 4, 4) / 6, draw(3, 16, 3) / 4
BIASES = draw(4, 4) / 3, draw(5, 4) / 3, draw(6, 3) / 3
RESIDUAL = draw(7, 1, 1, 2, 4)


def lower(x):
    """(n, 4, 4, 2) -> (n, 4, 4, 4)"""
    return jax.nn.relu(nets.conv(x, KERNELS[0]) + BIASES[0])


def middle(y):
    """(n, 4, 4, 4) -> (n, 4, 4, 4)"""
    return jax.nn.relu(nets.conv(y, KERNELS[1]) + BIASES[1])


def upper(y):
    """(n, 4, 4, 4) -> (n, 3)"""
    y = nets.pool(y, lax.max, -np.inf)
    return y.reshape(len(y), -1) @ KERNELS[2] + BIASES[2]


def net(x):
    return upper(middle(lower(x)))


def through(f, composite, x, R):
    """The relevance of x where that of f's output is R."""
    return lrp(f, composite, target=lambda y: R)(x)


def by_hand(composite, first=1.0, second=1.0, target=1):
    """The network cut at the outputs of `lower` and `middle`, and the relevance multiplied there."""
    a = lower(X)
    b = middle(a)
    R = through(middle, composite, a, second * lrp(upper, composite, target=target)(b))
    return through(lower, composite, X, first * R)


# the relus' names; a relu passes on what it gets, so that a mask at the convolution does the same
FIRST, SECOND = "relu", "relu#2"


def channel(i: int) -> np.ndarray:
    return np.eye(4)[i]


@every_rule
def test_masks_are_those_of_the_network_cut_by_hand(composite):
    region = np.zeros((4, 4, 1))
    region[:2] = 1
    cases = {
        "one channel": ({FIRST: channel(2)}, {"first": channel(2)}),
        "the upper half": ({SECOND: region}, {"second": region}),
        "channel and region": ({SECOND: region * channel(1)}, {"second": region * channel(1)}),
        "one example": ({FIRST: np.array([1, 0]).reshape(2, 1, 1, 1)}, {"first": np.array([1, 0]).reshape(2, 1, 1, 1)}),
        "weights": ({FIRST: draw(8, 4)}, {"first": draw(8, 4)}),
        "two layers": ({FIRST: channel(0), SECOND: channel(3)}, {"first": channel(0), "second": channel(3)}),
        "nothing masked": ({FIRST: np.ones(4)}, {}),
        "a number": ({SECOND: 0.5}, {"second": 0.5}),
        "bool": ({FIRST: channel(1) > 0}, {"first": channel(1)}),
        "the convolution": ({"conv[0]": channel(1)}, {"first": channel(1)}),
        "pool": ({"max_pool": np.float32(2)}, {"second": 2}),
    }
    got, right = jax.jit(
        lambda: (
            {n: lrp(net, composite, target=1, masks=masks)(X) for n, (masks, _) in cases.items()},
            {n: by_hand(composite, **hand) for n, (_, hand) in cases.items()},
        )
    )()
    close(got, right, 1e-10)


@every_rule
@pytest.mark.parametrize("name", [FIRST, "conv[1]"])
def test_channels_add_up(composite, name):
    """Several conditions are a vmap over masks, in one program; one after the other they are the same."""

    @jax.jit
    def explain(masks):
        one = lambda mask: lrp(net, composite, target=1, masks={name: mask})(X)
        return lrp(net, composite, target=1)(X), jax.vmap(one)(masks), jnp.stack([one(m) for m in masks])

    whole, each, looped = explain(np.eye(4))
    close(each, looped)
    close(each.sum(0), whole, 1e-10)
    assert sum(np.any(e) for e in each) > 1


def test_masks_are_linear():
    m, n = draw(9, 4), draw(10, 4)
    explain = jax.jit(jax.vmap(lambda mask: lrp(net, EPSILON, masks={FIRST: mask})(X)))
    first, second, both = explain(jnp.stack([m, n, 2 * m - 3 * n]))
    close(both, 2 * first - 3 * second, 1e-10)


def test_masks_at_several_layers_multiply():
    """All pairs of channels add up; a pair's relevance is what passes through both."""
    pairs = jax.vmap(
        jax.vmap(lambda m, n: lrp(net, EPSILON, target=1, masks={FIRST: m, SECOND: n})(X), (None, 0)), (0, None)
    )
    each = jax.jit(pairs)(np.eye(4), np.eye(4))
    assert each.shape == (4, 4, *X.shape)
    close(each.sum((0, 1)), lrp(net, EPSILON, target=1)(X), 1e-10)
    close(each[1, 2], by_hand(EPSILON, channel(1), channel(2)), 1e-10)


def test_other_masks_do_not_compile_again():
    traced = []

    @jax.jit
    def explain(mask):
        traced.append(mask)
        return lrp(net, EPSILON, masks={FIRST: mask})(X)

    explain(channel(0)), explain(channel(1))
    assert len(traced) == 1


def test_vmap_over_masks_maps_the_backward_pass_alone():
    def convolutions(f, *args):
        return str(jax.make_jaxpr(f)(*args)).count("conv_general_dilated[")

    one = convolutions(lambda m: lrp(net, EPSILON, masks={FIRST: m})(X), channel(0))
    several = jax.make_jaxpr(jax.vmap(lambda m: lrp(net, EPSILON, masks={SECOND: m})(X)))(np.eye(4))
    shapes = [e.outvars[0].aval.shape for e in several.eqns if e.primitive is lax.conv_general_dilated_p]
    assert len(shapes) == one and shapes[:2] == [(2, 4, 4, 4)] * 2  # the forward pass, once for all conditions


def test_masks_in_a_loop_hold_in_every_iteration():
    ws = draw(11, 3, 4, 4)
    x = draw(12, 2, 4)

    def step(x, w):
        return jax.nn.relu(x @ w + 0.5)

    def looped(x):
        return lax.scan(lambda x, w: (step(x, w), None), x, ws)[0]

    R, mask = jnp.ones((2, 4)), channel(1) + channel(2)
    states = [x]
    for w in ws:
        states.append(step(states[-1], w))
    for w, state in zip(ws[::-1], states[-2::-1], strict=True):
        R = through(partial(step, w=w), EPSILON, state, mask * R)
    got = lrp(looped, EPSILON, target=lambda y: jnp.ones_like(y), masks={"relu": mask})(x)
    close(got, R, 1e-10)


@pytest.mark.parametrize("wrap", [jax.jit, jax.checkpoint])
def test_masks_within_wrappers(wrap):
    close(lrp(wrap(net), EPSILON, masks={FIRST: channel(2)})(X), lrp(net, EPSILON, masks={FIRST: channel(2)})(X))


def test_masks_on_a_residual_sum():
    """A mask at a branch leaves the other alone, one at the sum cuts both."""

    def branch(x):
        return jax.nn.relu(nets.conv(x, KERNELS[0]))

    def skip(x):
        return nets.conv(x, RESIDUAL)

    def f(x):
        return branch(x) + skip(x)

    R = draw(13, 2, 4, 4, 4)
    arrived = lrp(lambda a, b: a + b, EPSILON, argnums=(0, 1), target=lambda y: R)(branch(X), skip(X))
    one, other = through(branch, EPSILON, X, channel(1) * arrived[0]), through(skip, EPSILON, X, arrived[1])
    close(lrp(f, EPSILON, target=lambda y: R, masks={"relu": channel(1)})(X), one + other, 1e-10)
    close(
        lrp(f, EPSILON, target=lambda y: R, masks={"add": channel(1)})(X), through(f, EPSILON, X, channel(1) * R), 1e-10
    )


def test_masks_on_several_kinds():
    """A mask of ones changes nothing, of zeros ends everything, wherever the Op lets all of it through."""

    def f(x):
        y = (lower(x)[:, ::2] * 2.0).reshape(2, 8, 4)
        y = y / jnp.sqrt((y**2).mean(-1, keepdims=True) + 1e-3)
        y = jax.nn.softmax(y @ y.swapaxes(1, 2) @ y)  # the other way round they are one layer, attention
        y = y * jax.nn.sigmoid(y @ KERNELS[2][:4, :1])
        return jnp.concatenate([y, jnp.ones((2, 1, 4))], 1).mean(1)[:, :3]

    names = [row.name for row in plan(f, EPSILON)(X) if row.kind != "blocked"]
    assert {row.kind for row in plan(f, EPSILON)(X)} >= {"conv", "scale", "softmax", "matmul", "product", "reduce"}

    @jax.jit
    def explain():
        whole = lrp(f, EPSILON)(X)
        return whole, [lrp(f, EPSILON, masks={name: 1.0})(X) for name in names]

    whole, each = explain()
    for name, relevance in zip(names, each, strict=True):
        np.testing.assert_allclose(relevance, whole, rtol=0, atol=1e-10 * abs(whole).max(), err_msg=name)


def test_masks_do_not_open_what_is_blocked():
    """No relevance passes a sign; a mask there is refused."""

    def f(x):
        return jnp.concatenate([lax.sign(x), x])

    (name,) = (row.name for row in plan(f, Composite())(X) if row.kind == "blocked")
    with pytest.raises((errors.SelectorError, errors.InputError), match=name):
        lrp(f, Composite(), masks={name: 1.0})(X)


def split(x):
    a, b = jnp.split(lower(x), 2, axis=-1)
    return a + 2 * b


def test_mask_on_an_op_of_several_outputs():
    """A split cannot be masked as one array."""
    with pytest.raises((errors.SelectorError, errors.InputError), match="split"):
        lrp(split, EPSILON, masks={"split": 1.0})(X)


def test_layers_pass_over_an_op_of_several_outputs():
    *_, layers = value_and_lrp(split, EPSILON, layers=select.kind("structural", "conv"))(X)
    assert "conv[0]" in layers


# ---------------------------------------------------------------------------------------------------- layers


@every_rule
def test_layers_are_those_of_the_network_cut_by_hand(composite):
    @jax.jit
    def explain():
        a = lower(X)
        b = middle(a)
        at_b = lrp(upper, composite, target=1)(b)
        at_a = through(middle, composite, a, at_b)
        pooled = nets.pool(b, lax.max, -np.inf)
        at_pool = lrp(lambda y: y.reshape(2, -1) @ KERNELS[2] + BIASES[2], composite, target=1)(pooled)
        hand = {"conv[0]": at_a, "relu": at_a, "conv[1]": at_b, "relu#2": at_b, "max_pool": at_pool,
                "dense[0]": net(X) * np.eye(3)[1]}  # fmt: skip
        right = (net(X), through(lower, composite, X, at_a), hand)
        return value_and_lrp(net, composite, target=1, layers=select.everything())(X), right

    got, right = explain()
    close(got, right, 1e-10)


def test_layers_under_masks():
    """What is reported is what remains behind the mask; below it, all is conditional."""
    *_, whole = value_and_lrp(net, EPSILON, target=1, layers=select.everything())(X)
    *_, layers = value_and_lrp(net, EPSILON, target=1, layers=select.everything(), masks={SECOND: channel(1)})(X)
    close(layers["max_pool"], whole["max_pool"])
    close(layers["relu#2"], whole["relu#2"] * channel(1))
    close(layers["relu"], through(middle, EPSILON, lower(X), whole["relu#2"] * channel(1)), 1e-10)


def test_layers_by_every_transform():
    def explain(x):
        return value_and_lrp(net, EPSILON, target=1, layers=select.kind("conv"))(x)

    right = explain(X)
    close(jax.jit(explain)(X), right)
    each = jax.vmap(lambda x: jax.tree.map(lambda v: v[0], explain(x[None])))(X)
    close(each, right)


def test_layers_within_loops_and_branches():
    """A loop with a constant start inside a branch, behind the watched layer."""
    w = draw(14, 4, 4) / 2

    def loop(x):
        return lax.scan(lambda c, _: (jnp.tanh(c @ w + x), None), jnp.ones_like(x), None, length=2)[0]

    def f(x):
        return lax.cond(w[0, 0] > 9, jnp.tanh, loop, x @ w)

    x = draw(15, 3, 4)
    R = lrp(loop, EPSILON)(x @ w)
    *_, layers = value_and_lrp(f, EPSILON, layers=select.kind("dense"))(x)
    close(layers["dense[0]"], R, 1e-10)


def test_layers_of_models_by_name():
    def f(p, x):
        return nets.cnn(p, x)

    value, relevance, layers = value_and_lrp(
        f, composites.epsilon_plus(), argnums=1, target=0, layers=select.named("conv*")
    )(PARAMETERS, X)
    assert set(layers) == {"conv1", "conv2", "conv3"}
    assert layers["conv1"].shape == (2, 4, 4, 4) and layers["conv3"].shape == (2, 2, 2, 6)
    close((value, relevance), value_and_lrp(f, composites.epsilon_plus(), argnums=1, target=0)(PARAMETERS, X))


# ---------------------------------------------------------------------------------------------------- cost and errors


def test_nothing_is_added_where_nothing_is_asked_for():
    """The program of an explanation is that of the rewritten function's transpose, equation for equation."""

    def plain(x):
        y, pull = jax.vjp(rewrite(net, EPSILON), x)
        return pull(y)[0]

    def program(f):
        return str(jax.make_jaxpr(f)(X))

    right = program(plain)
    assert program(lrp(net, EPSILON)) == right
    assert program(lrp(net, EPSILON, masks={})) == right
    assert program(lambda x: value_and_lrp(net, EPSILON)(x)[1]) == right
    nothing = select.where(lambda op: False)
    assert program(lambda x: value_and_lrp(net, EPSILON, layers=nothing, masks=None)(x)[1]) == right
    assert program(lrp(net, EPSILON, masks={FIRST: channel(0)})) != right


@pytest.mark.parametrize(
    "masks, error, message",
    [
        ({"tail": 1.0}, errors.SelectorError, r"no layer 'tail'.* conv\[0\], relu, conv\[1\], relu#2, max_pool, dense"),
        ({FIRST: 1.0, "conv": 1.0}, errors.SelectorError, "no layer 'conv'"),
        ({FIRST: np.ones(3)}, errors.InputError, r"masks\['relu'\].*\(3,\).*\(2, 4, 4, 4\)"),
        ({"dense[0]": np.ones((2, 4))}, errors.InputError, r"masks\['dense\[0\]'\].*\(2, 4\).*\(2, 3\)"),
        ({FIRST: np.ones((1, 2, 4, 4, 4))}, errors.InputError, r"\(1, 2, 4, 4, 4\)"),
    ],
)  # fmt: skip
def test_errors(masks, error, message):
    with pytest.raises(error, match=message):
        lrp(net, EPSILON, masks=masks)(X)


def test_masks_by_the_name_of_the_parameters():
    """The names are the plan's, also where a layer occurs twice."""
    p = {"w": draw(16, 4, 4), "b": draw(17, 4)}

    def f(p, x):
        for _ in range(2):
            x = jax.nn.relu(x @ p["shared"]["w"] + p["shared"]["b"])
        return x

    x = draw(18, 3, 4)
    names = [row.name for row in plan(f, EPSILON, argnums=1)({"shared": p}, x) if row.kind == "dense"]
    assert names == ["shared", "shared#2"]
    got = [lrp(f, EPSILON, argnums=1, masks={name: channel(0)})({"shared": p}, x) for name in names]
    hidden = jax.nn.relu(x @ p["w"] + p["b"])
    step = lambda x: jax.nn.relu(x @ p["w"] + p["b"])
    R = lrp(step, EPSILON)(hidden)
    close(got[0], through(step, EPSILON, x, channel(0) * R), 1e-10)
    close(got[1], through(step, EPSILON, x, through(step, EPSILON, hidden, channel(0) * step(hidden))), 1e-10)


def test_rules_that_have_no_derivative_get_masks_too():
    """The gradient, which is left to JAX elsewhere."""
    composite = Composite([(select.everything(), rules.Gradient())])
    got = lrp(net, composite, target=lambda y: jnp.ones_like(y), masks={FIRST: channel(1)})(X)
    g = jax.grad(lambda y: upper(middle(y)).sum())(lower(X))
    close(got, jax.vjp(lower, X)[1](channel(1) * g)[0], 1e-10)
