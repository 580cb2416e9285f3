"""The transformation itself: rewriting never changes a value, and relevance passes every form that JAX gives a program.

Wherever two programs compute the same thing (wrapped in `jit` or `remat`, as a loop or unrolled, one example at a time
or in a batch), their relevance must be the same; the plainest of them is the reference.
"""

from collections.abc import Iterator
from functools import cache, partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.ad_checkpoint import checkpoint_name

import nets
from jaxlrp import Composite, composites, gradients, lrp, plan, rewrite, rules, select, value_and_lrp
from nets import LOCAL, close, draw, explained, quick_compilation, same  # noqa: F401

pytestmark = pytest.mark.smoke

EPSILON, ZERO = composites.epsilon(0.1), LOCAL["zero"]
X, W, B = draw(1, 3, 4), draw(2, 4, 5), draw(3, 5)
MLP = partial(nets.mlp, nets.mlp_parameters(4, 6, 3))


@pytest.fixture
def optimised() -> Iterator[None]:
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)


def single(*arrays):
    return tuple(jnp.asarray(np.asarray(a, np.float32)) for a in arrays)


def variables_of(model, x):
    return nets.randomise(jax.eval_shape(model.init, jax.random.key(0), x))


# ---------------------------------------------------------------------------------------------------- values

ACTIVATIONS = {f.__name__: f for f in (
    jax.nn.relu, jax.nn.relu6, jax.nn.elu, jax.nn.celu, jax.nn.selu, jax.nn.silu, jax.nn.sigmoid, jax.nn.softplus,
    jax.nn.hard_sigmoid, jax.nn.hard_tanh, jax.nn.hard_silu, jax.nn.leaky_relu, jax.nn.log_sigmoid, jax.nn.mish,
    jax.nn.soft_sign, jax.nn.squareplus, jax.nn.sparse_plus, jax.nn.sparse_sigmoid, jax.nn.softmax, jax.nn.log_softmax,
    jnp.tanh, jnp.sin, jnp.exp, jnp.abs, jnp.square, jnp.arctan, jnp.sinh, jax.scipy.special.erf,
)} | {
    "gelu-tanh": jax.nn.gelu,
    "gelu-erf": partial(jax.nn.gelu, approximate=False),
    "glu": jax.nn.glu,
    "leaky-by-maximum": lambda x: jnp.maximum(x, 0.1 * x),
    "leaky-by-where": lambda x: jnp.where(x > 0, x, 0.2 * x),
    "clip": lambda x: jnp.clip(x, -0.5, 0.5),
    "cube": lambda x: x**3,
    "silu-by-hand": lambda x: x / (1 + jnp.exp(-x)),
    "gelu-by-hand": lambda x: 0.5 * x * (1 + jnp.tanh(0.8 * (x + 0.04 * x**3))),
}  # fmt: skip


def hidden(activation):
    """A function that neither begins nor ends with the activation, and its arguments."""
    x, w, b = single(X, draw(2, 4, 6), draw(3, 6))
    return lambda x, w, b, v: activation(x @ w + b) @ v, (
        x,
        w,
        b,
        *single(draw(4, jax.eval_shape(activation, b).shape[-1], 2)),
    )


@pytest.mark.parametrize("activation", ACTIVATIONS.values(), ids=ACTIVATIONS)
def test_value_with_activation(activation):
    f, args = hidden(activation)
    same(rewrite(f, EPSILON)(*args), f(*args))


def test_compiled_value_with_activations():
    functions = {name: hidden(activation) for name, activation in ACTIVATIONS.items()}
    compiled = jax.jit(lambda: {name: value_and_lrp(f, EPSILON)(*args) for name, (f, args) in functions.items()})()
    close(
        {name: value for name, (value, _) in compiled.items()},
        {name: f(*args) for name, (f, args) in functions.items()},
        1e-6,
    )
    for name, (_, relevance) in compiled.items():
        assert np.isfinite(relevance).all() and np.any(relevance) and relevance.dtype == np.float32, name


def check_value(f, *args):
    """The value of `f`: bit for bit as it runs eagerly; compiled, and beside the relevance, to float32's rounding."""
    right = f(*args)
    same(rewrite(f, EPSILON)(*args), right)
    value, relevance = jax.jit(value_and_lrp(f, EPSILON))(*args)
    close(value, right, 1e-6)
    assert np.isfinite(relevance).all() and np.any(relevance)
    assert relevance.shape == args[0].shape and relevance.dtype == args[0].dtype


def test_value_of_cnn(optimised):
    (x,) = single(draw(5, 2, 4, 4, 2))
    f, p = lambda x, p: nets.cnn(p, x), nets.cnn_parameters(dtype=np.float32)
    check_value(f, x, p)
    close(jax.jit(rewrite(f, EPSILON))(x, p), f(x, p), 1e-6)


def test_value_of_flax_resnet(optimised):
    model, (x,) = nets.ResNet(), single(draw(6, 2, 8, 8, 3))
    check_value(lambda x, variables: model.apply(variables, x), x, variables_of(model, x))


def attention(x):
    """Two batches, three positions, two heads of two features; all three operands are data."""
    heads = jnp.stack([x, -x]).reshape(2, 3, 2, 2)
    return jax.nn.dot_product_attention(heads, jnp.tanh(heads), heads**2)


PROGRAMS = {
    "attention": attention,
    "cumsum": lambda x: jnp.cumsum(x @ W, 1),
    "derivative": lambda x: jax.grad(lambda x: (jax.nn.relu(x @ W) ** 2).sum())(x),
    "dropout": lambda x: jnp.where(jax.random.bernoulli(jax.random.key(0), 0.5, x.shape), 2 * x, 0) @ W,
    "dynamic slice": lambda x: lax.dynamic_slice(x, (np.argmax(B) % 2, 0), (2, 3)) @ W[:3],
    "dynamic update": lambda x: lax.dynamic_update_slice(jnp.ones((5, 4)), x, (1, 0)) @ W,
    "einsum of three": lambda x: jnp.einsum("ni,ij,nk->jk", x, W, x),
    "gather": lambda x: x[:, jnp.asarray([2, 0, 2])] @ W[:3],
    "logsumexp": lambda x: jax.nn.logsumexp(x @ W, 1),
    "resize": lambda x: jax.image.resize(x, (6, 5), "bilinear") @ jnp.ones((5, 2)),
    "roll and pad": lambda x: jnp.pad(jnp.roll(x, 1, 1), ((1, 0), (0, 1)), constant_values=2.0) @ draw(21, 5, 2),
    "statistics": lambda x: (x - x.mean(1, keepdims=True)) / jnp.sqrt(x.var(1, keepdims=True) + 0.1) @ W,
    "straight-through": lambda x: (x + lax.stop_gradient(jnp.round(x) - x)) @ W,
    "vmap": lambda x: jax.vmap(lambda x: jax.nn.relu(W.T @ x))(x),
    "while among parameters": lambda x: x @ lax.while_loop(lambda w: (w**2).sum() > 1, lambda w: w / 2, W),
}  # fmt: skip


@pytest.mark.parametrize("f", PROGRAMS.values(), ids=PROGRAMS)
def test_value_of_program(f):
    """What people write: the value stays, and relevance is of the value's magnitude."""
    right = f(X)
    same(rewrite(f, EPSILON)(X), right)
    value, relevance = jax.jit(value_and_lrp(f, EPSILON))(X)
    close(value, right)
    assert 0 < abs(relevance).sum() < 100 * abs(right).sum()


def test_value_of_layer_across_jit_boundary():
    """The bias outside belongs to the product inside: the wrapper falls, and the value stays to rounding."""
    inner = jax.jit(lambda x, w: x @ w)
    across, plain = (partial(lambda dot, x, w, b: jnp.tanh(dot(x, w) + b), dot) for dot in (inner, jnp.matmul))
    args = single(X, W, B)
    assert [row.kind for row in plan(across, EPSILON)(*args)] == ["dense", "activation"]
    close(rewrite(across, EPSILON)(*args), across(*args), 1e-6)
    close(lrp(across, EPSILON)(*args), lrp(plain, EPSILON)(*args), 1e-6)


@pytest.mark.parametrize("composite", LOCAL.values(), ids=LOCAL)
def test_vjp_of_rewrite_is_lrp(composite):
    R = draw(7, 3, 3)
    _, pull = jax.vjp(rewrite(MLP, composite), X)
    close(pull(R)[0], lrp(MLP, composite, target=lambda y: R)(X))


def test_parameters_receive_no_relevance():
    _, pull = jax.vjp(rewrite(nets.mlp, EPSILON, argnums=1), nets.mlp_parameters(4, 6, 3), X)
    parameters, relevance = pull(draw(7, 3, 3))
    assert np.any(relevance) and not any(np.any(r) for r in jax.tree.leaves(parameters))


# ---------------------------------------------------------------------------------------------------- wrappers


def custom_jvp(f):
    """With a derivative that is wrong on purpose: relevance does not look at it."""
    wrapped = jax.custom_jvp(f)
    wrapped.defjvp(lambda primals, tangents: (f(*primals), 0 * f(*primals)))
    return wrapped


def custom_vjp(f):
    wrapped = jax.custom_vjp(f)
    wrapped.defvjp(lambda *args: (f(*args), args), lambda args, g: jax.tree.map(jnp.zeros_like, args))
    return wrapped


policies = jax.checkpoint_policies
WRAPPERS = {
    "jit": jax.jit,
    "remat": jax.checkpoint,
    "remat-saves-dots": partial(jax.checkpoint, policy=policies.dots_saveable),
    "remat-saves-names": partial(jax.checkpoint, policy=policies.save_only_these_names("hidden")),
    "remat-without-barrier": partial(jax.checkpoint, prevent_cse=False),
    "custom-jvp": custom_jvp,
    "custom-vjp": custom_vjp,
    "jit-remat": lambda f: jax.jit(jax.checkpoint(f)),
    "remat-jit": lambda f: jax.checkpoint(jax.jit(f)),
    "jit-custom-vjp-jit": lambda f: jax.jit(custom_vjp(jax.jit(f))),
    "named-call": partial(jax.named_call, name="block"),
}


def two_blocks(wrap, x, w, b, v):
    """Twice an expanding and a projecting layer, with the input added."""

    @wrap
    def block(x, w, b, v):
        return x + jnp.tanh(checkpoint_name(jax.nn.relu(x @ w + b), "hidden") @ v)

    return block(block(x, w, b, v), 0.5 * w, b, v).sum(0)


TWO_BLOCKS = X, draw(8, 4, 6), draw(9, 6), draw(10, 6, 4)
plain_blocks = cache(lambda: explained(partial(two_blocks, lambda f: f), *TWO_BLOCKS))


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_wrapped(wrap):
    """The blocks, and all of them together once more."""
    wrapped = wrap(partial(two_blocks, wrap))
    close(explained(wrapped, *TWO_BLOCKS), plain_blocks())


@pytest.mark.parametrize("name", ["jit", "remat", "jit-custom-vjp-jit"])
def test_wrapped_without_jit(name):
    wrapped = partial(two_blocks, WRAPPERS[name])
    close(value_and_lrp(wrapped, nets.SOME[0])(*TWO_BLOCKS), plain_blocks()[0])


plain_cnn = cache(lambda: explained(nets.cnn, nets.cnn_parameters(), draw(5, 2, 4, 4, 2), argnums=1))


def test_wrappers_are_applied_again():
    """What a person wraps for memory or compile time stays wrapped: the name, and remat's policy."""
    policy = policies.save_only_these_names("hidden")

    @jax.jit
    @partial(jax.checkpoint, policy=policy, prevent_cse=False)
    def mine(x):
        return jnp.tanh(jax.nn.relu(x @ W) @ W.T)

    (outer,) = jax.make_jaxpr(rewrite(lambda x: mine(x), EPSILON))(X).eqns
    (inner,) = outer.params["jaxpr"].eqns
    assert outer.params["name"] == "mine"
    assert inner.params["policy"] is policy and inner.params["prevent_cse"] is False


@pytest.mark.parametrize("wrap", [custom_vjp, lambda f: jax.jit(jax.checkpoint(f))], ids=["custom-vjp", "jit-remat"])
def test_wrapped_cnn(wrap):
    close(explained(wrap(nets.cnn), nets.cnn_parameters(), draw(5, 2, 4, 4, 2), argnums=1), plain_cnn())


CLOSED_OVER = {
    "dense": lambda x: x @ W,
    "weights left": lambda x: W.T @ x.T,
    "numpy weights": lambda x: x @ np.asarray(W),
    "scaled weights": lambda x: x @ (2 * W),
    "bias": lambda x: x @ W + B,
    "scale": lambda x: x * B[:4],
    "transpose": lambda x: x.T,
    "reshape": lambda x: x.reshape(2, 6),
    "cast": lambda x: x.astype(np.float32),
    "negative": lambda x: -x,
    "sum": lambda x: x.sum(0),
    "products": lambda x: x @ x.T,
    "shifted activation": lambda x: jnp.tanh(2 - x),
}


@pytest.mark.parametrize("f", CLOSED_OVER.values(), ids=CLOSED_OVER)
def test_wrapped_single_layer(f):
    """One layer alone in a wrapper, its weights closed over; and the derivative of a custom_vjp never counts."""
    wrappers = (jax.jit, jax.checkpoint, custom_jvp, custom_vjp)
    right, *got = jax.jit(lambda x: [lrp(g, nets.SOME[-1])(x) for g in (f, *(wrap(f) for wrap in wrappers))])(X)
    for relevance, wrap in zip(got, wrappers, strict=True):
        close({wrap.__name__: relevance}, {wrap.__name__: right})


def test_wrapper_with_more_than_is_used():
    """Arguments that nothing reads, results that nobody takes: in a wrapper, and in a wrapper within."""

    def f(wrap, x):
        inner = wrap(lambda x, w: (-x, jnp.argmax(x), x @ w))
        outer = wrap(lambda x, w: (inner(x + x.sum(), W)[0], jnp.sin(x), inner(x, W)))
        return outer(jnp.tanh(x), W)[0]

    right = explained(partial(f, lambda f: f), X)
    for wrap in (jax.jit, jax.checkpoint):
        close(explained(partial(f, wrap), X), right)


def test_wrapper_that_hands_its_argument_on():
    """One of its results is what it was given, which somebody else made."""
    layers = (lambda x: jax.nn.gelu(x), lambda x: x @ W, lambda x: jnp.tanh(x @ W + B), lambda x: x.T)
    for layer in layers:
        right = explained(lambda x, f=layer: f(jnp.sin(x)), X)
        for wrap in (jax.jit, jax.checkpoint):
            close(explained(lambda x, f=layer, wrap=wrap: wrap(lambda x: (x, f(x)))(jnp.sin(x))[1], X), right)


def test_custom_vjp_with_static_argument():
    @partial(jax.custom_vjp, nondiff_argnums=(1,))
    def power(x, n):
        return jax.nn.relu(x @ W) ** n

    power.defvjp(lambda x, n: (power(x, n), x), lambda n, x, g: (0 * x,))
    close(explained(lambda x: power(x, 2), X), explained(lambda x: jax.nn.relu(x @ W) ** 2, X))


def test_stop_gradient_makes_a_constant():
    stopped = explained(lambda x: jax.nn.relu(x @ W) + lax.stop_gradient(x @ W), X)
    close(stopped, explained(lambda x, c: jax.nn.relu(x @ W) + c, X, X @ W))


# ---------------------------------------------------------------------------------------------------- loops


def stack(parameters):
    return jax.tree.map(lambda *vs: jnp.stack(vs), *parameters)


def body(x, p):
    return nets.layer(x, p), None


def by_fori(parameters, x):
    stacked = stack(parameters)
    return lax.fori_loop(0, len(parameters), lambda i, x: nets.layer(x, jax.tree.map(lambda v: v[i], stacked)), x)


def by_nested_scan(parameters, x):
    stacked = jax.tree.map(lambda v: v.reshape(2, 2, *v.shape[1:]), stack(parameters))
    return lax.scan(lambda x, ps: lax.scan(body, x, ps), x, stacked)[0]


def by_collecting(parameters, x):
    return lax.scan(lambda x, p: (nets.layer(x, p),) * 2, x, stack(parameters))[1][-1]


def by_switch(parameters, x):
    branches = [partial(lambda p, x: nets.layer(x, p), p) for p in parameters]
    return lax.scan(lambda x, i: (lax.switch(i, branches, x), None), x, jnp.arange(len(branches)))[0]


def by_while(parameters, x):
    """Its length depends on constants only."""
    stacked, count = stack(parameters), len(parameters)

    def step(carry):
        i, x = carry
        return i + 1, nets.layer(x, jax.tree.map(lambda v: v[i], stacked))

    return lax.while_loop(lambda carry: carry[0] < count, step, (0, x))[1]


LOOPS = {
    "scan": lambda ps, x: lax.scan(body, x, stack(ps))[0],
    "scan-reversed": lambda ps, x: lax.scan(body, x, stack(ps[::-1]), reverse=True)[0],
    "scan-unrolled-by-2": lambda ps, x: lax.scan(body, x, stack(ps), unroll=2)[0],
    "scan-of-remat": lambda ps, x: lax.scan(jax.checkpoint(body), x, stack(ps))[0],
    "scan-of-jit": lambda ps, x: lax.scan(jax.jit(body), x, stack(ps))[0],
    "jit-remat-scan": jax.jit(jax.checkpoint(lambda ps, x: lax.scan(body, x, stack(ps))[0])),
    "jit-remat-scan-remat-jit": jax.jit(
        jax.checkpoint(lambda ps, x: lax.scan(jax.checkpoint(jax.jit(body)), x, stack(ps))[0])
    ),
    "scan-of-scan": by_nested_scan,
    "scan-collecting": by_collecting,
    "scan-of-switch": by_switch,
    "fori_loop": by_fori,
    "jit-fori_loop": jax.jit(by_fori),
    "fori_loop-of-arrays": lambda ps, x: lax.fori_loop(
        jnp.asarray(0), jnp.asarray(len(ps)), lambda i, x: nets.layer(x, jax.tree.map(lambda v: v[i], stack(ps))), x
    ),
    "while_loop": by_while,
}


def unrolled(parameters, x):
    for p in parameters:
        x = nets.layer(x, p)
    return x


FOUR_LAYERS = nets.mlp_parameters(4, 4, 4, 4, 4), X
plain_loop = cache(lambda: explained(unrolled, *FOUR_LAYERS, argnums=1))


@pytest.mark.parametrize("loop", LOOPS.values(), ids=LOOPS)
def test_loop_equals_unrolled(loop):
    close(explained(loop, *FOUR_LAYERS, argnums=1), plain_loop())


@pytest.mark.parametrize("name", ["scan-of-jit", "fori_loop"])
def test_loop_without_jit(name):
    close(value_and_lrp(LOOPS[name], nets.SOME[0], argnums=1)(*FOUR_LAYERS), plain_loop()[0])


def test_scan_equals_unrolled_for_every_rule():
    """And with layers that are no part of the loop on either side."""
    parameters, first, last = nets.mlp_parameters(5, 5, 5, 5), draw(11, 4, 5), draw(12, 5, 2)

    def f(loop, x):
        return jax.nn.relu(loop(parameters, jax.nn.relu(x @ first))) @ last

    scanned, right = (explained(partial(f, g), X, rows=LOCAL.values(), target=1) for g in (LOOPS["scan"], unrolled))
    close(scanned, right)


def test_recurrent_scan():
    """Data enters by the carry and at every step, and leaves by the carry and at every step."""
    w, u = draw(13, 4, 5), 0.5 * draw(14, 5, 5)

    def step(h, x):
        h = jnp.tanh(x @ w + h @ u)
        return h, h.sum(keepdims=True)

    def by_hand(xs):
        h, sums = xs[0] @ w, []
        for x in xs:
            h, s = step(h, x)
            sums.append(s)
        return h, jnp.concatenate(sums)

    def scanned(xs):
        h, sums = lax.scan(step, xs[0] @ w, xs)
        return h, sums[:, 0]

    close(explained(scanned, X), explained(by_hand, X))


def test_map_equals_batch():
    right = explained(MLP, X)
    close(explained(lambda x: lax.map(MLP, x), X), right)
    close(explained(lambda x: lax.map(MLP, x, batch_size=2), X), right)  # 3 examples: a batch and a rest


ROWS = {
    "dense": lambda x: x @ W[:3] + B,
    "weights left": lambda x: W[:3].T @ x,
    "softmax": jax.nn.softmax,
    "log_softmax": jax.nn.log_softmax,
    "products": lambda x: x[:, None] * x,
    "maximum": lambda x: x.max(keepdims=True),
    "convolution": lambda x: lax.conv(x[None, None], B[None, None, :3], (1,), "SAME")[0, 0],
}


@pytest.mark.parametrize("f", ROWS.values(), ids=ROWS)
def test_vmap_in_the_network_equals_a_python_loop(f):
    """Over columns, so that the batch axis is not in front."""
    R = draw(22, *jax.vmap(f, 1)(X).shape)
    batched, looped = lambda x: jax.vmap(f, 1)(x), lambda x: jnp.concatenate([f(x[:, i])[None] for i in range(4)])
    got, right = (explained(g, X, target=lambda y: R) for g in (batched, looped))
    close(got, right, 1e-7)


BRANCHES = (
    lambda x: jax.nn.relu(x @ W),
    lambda x: jnp.concatenate([x, x[:, :1]], 1) * B,
    lambda x: jnp.tanh(jax.nn.relu(x @ W + B) @ draw(15, 5, 5)),
)


@pytest.mark.parametrize("chosen", [0, 2])
def test_cond_takes_its_branch(chosen):
    """The predicate is a parameter, or computed from the data."""
    right = explained(BRANCHES[chosen], X)
    f = lambda x, p: lax.cond(p, BRANCHES[0], BRANCHES[2], x)
    close(explained(f, X, chosen == 0), right)
    close(explained(lambda x: f(x, (x**2).sum() * (1 - chosen) > 0), X), right)


def test_switch_takes_its_branch():
    f = jax.jit(lrp(lambda x, i: lax.switch(i, BRANCHES, x), EPSILON))
    right = jax.jit(lambda x: [lrp(branch, EPSILON)(x) for branch in BRANCHES])(X)
    for i, r in enumerate(right):
        close(f(X, jnp.asarray(i)), r)
    close(jax.vmap(f, (None, 0))(X, jnp.arange(3)), jnp.stack(right))


def test_cond_with_more_than_data():
    """Branches read parameters, and return integers too."""

    def f(x, w, on):
        y, n = lax.cond(on, lambda x, w: (x @ w, 1), lambda x, w: (x @ (2 * w), 2), x, w)
        return y * n

    close(lrp(f, ZERO)(X, W, jnp.asarray(False)), lrp(lambda x: x @ W * 4, ZERO)(X), 1e-6)


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return x + nn.relu(nn.Dense(4)(x)), None


class Scanned(nn.Module):
    block: type[nn.Module] = Block

    @nn.compact
    def __call__(self, x):
        layers = nn.scan(self.block, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
        return layers(name="layers")(x, None)[0]


class Unrolled(nn.Module):
    block: type[nn.Module] = Block

    @nn.compact
    def __call__(self, x):
        for i in range(3):
            x, _ = self.block(name=f"layers{i}")(x, None)
        return x


def test_flax_scan_and_remat():
    stacked = variables_of(Scanned(), X)
    each = {f"layers{i}": jax.tree.map(lambda v, i=i: v[i], stacked["params"]["layers"]) for i in range(3)}
    right = explained(Unrolled().apply, {"params": each}, X, argnums=1)
    close(explained(Unrolled(nn.remat(Block)).apply, {"params": each}, X, argnums=1), right)
    close(explained(Scanned().apply, stacked, X, argnums=1), right)
    close(explained(Scanned(nn.remat(Block, prevent_cse=False)).apply, stacked, X, argnums=1), right)


# ------------------------------------------------------------------------------------- transformations of lrp itself


@pytest.mark.parametrize("composite", LOCAL.values(), ids=LOCAL)
def test_vmap_over_inputs(composite):
    f = jax.jit(lrp(MLP, composite, target=1))
    right = jnp.stack([f(x) for x in X])
    close(jax.vmap(f)(X), right)
    close(f(X), right)  # a batch by hand


def test_vmap_without_jit():
    close(jax.vmap(lrp(MLP, EPSILON))(X), lrp(MLP, EPSILON)(X))


def test_vmap_over_targets():
    def f(t):
        return lrp(MLP, EPSILON, target=t)(X)

    close(jax.vmap(f)(jnp.arange(3)), jnp.stack([f(t) for t in range(3)]))


DEEP = partial(nets.mlp, nets.mlp_parameters(4, 6, 5, 3))


def mixed(low, gamma, epsilon):
    """A rule of its own for each of three layers, with one number each."""
    return Composite([
        (select.first(), rules.ZBox(low, 4.0)),
        (select.depth(1, 2), rules.Gamma(gamma)),
        (select.last(), rules.Epsilon(epsilon)),
    ])  # fmt: skip


MIXED = [mixed(-3.0, 0.1, 0.5), mixed(-4.0, 0.2, 0.1), mixed(-5.0, 1.0, 0.01)]


def test_vmap_over_stacked_composite():
    stacked = jax.tree.map(lambda *numbers: jnp.stack(numbers), *MIXED)
    right = jax.jit(lambda cs, x: jnp.stack([lrp(DEEP, c)(x) for c in cs]))(MIXED, X)
    close(jax.vmap(lambda c: lrp(DEEP, c)(X))(stacked), right)
    pairs = jax.jit(jax.vmap(lambda c, x: lrp(DEEP, c)(x)))(stacked, X)
    close(pairs, jnp.stack([right[i, i] for i in range(3)]))


def test_jit_with_composite_as_argument_compiles_once():
    traces = []

    def f(x):
        traces.append(x)
        return DEEP(x)

    explain = jax.jit(lambda composite, x: lrp(f, composite)(x))
    for composite in MIXED:
        close(explain(composite, X), lrp(DEEP, composite)(X))
    assert len(traces) == 1


@pytest.mark.parametrize("rule", [rules.Epsilon, rules.Gamma, rules.GeneralizedGamma])
@pytest.mark.parametrize("f", [DEEP, partial(LOOPS["jit-remat-scan"], FOUR_LAYERS[0])], ids=["plain", "jit-remat-scan"])
def test_grad_with_respect_to_a_rules_number(rule, f):
    R, weights, h = draw(16, *f(X).shape), draw(17, 3, 4), 1e-5

    @jax.jit
    def score(number):
        return (weights * lrp(f, nets.linear(rule(number)), target=lambda y: R)(X)).sum()

    differences = (score(0.3 + h) - score(0.3 - h)) / (2 * h)
    assert abs(differences) > 1e-3
    np.testing.assert_allclose(jax.grad(score)(0.3), differences, rtol=1e-6)


@pytest.mark.parametrize("rule", ["epsilon", "gamma"])
def test_grad_with_respect_to_input_and_parameters(rule):
    at = nets.mlp_parameters(4, 6, 3), X
    toward, weights, h = jax.tree.map(lambda v: draw(18, *v.shape), at), draw(17, 3, 4), 1e-6

    @jax.jit
    def score(parameters, x):
        return (weights * lrp(nets.mlp, LOCAL[rule], argnums=1, target=0)(parameters, x)).sum()

    def moved(i, size):
        return [jax.tree.map(lambda v, d: v + size * d, a, t) if i == j else a
                for j, (a, t) in enumerate(zip(at, toward, strict=True))]  # fmt: skip

    for i, gradient in enumerate(jax.grad(score, (0, 1))(*at)):
        slope = sum(jax.tree.leaves(jax.tree.map(lambda g, d: (g * d).sum(), gradient, toward[i])))
        differences = (score(*moved(i, h)) - score(*moved(i, -h))) / (2 * h)
        np.testing.assert_allclose(slope, differences, rtol=1e-5)


def test_explained_inside_scan():
    explain = lrp(MLP, EPSILON, target=2)

    def step(total, x):
        return total + explain(x), explain(x)

    right = explain(X)
    close(lax.scan(step, jnp.zeros(4), X), (right.sum(0), right))
    close(lax.map(explain, X), right)


# ---------------------------------------------------------------------------------------------------- forms of programs


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


# ---------------------------------------------------------------------------------------------------- dtypes

HALVES = pytest.mark.parametrize(
    "dtype, tolerance", [(jnp.bfloat16, 0.05), (jnp.float16, 0.005)], ids=["bfloat16", "float16"]
)


@HALVES
def test_half_precision(dtype, tolerance):
    """With parameters of the same dtype, and of float32."""
    half = jax.tree.map(lambda v: v.astype(dtype), nets.mlp_parameters(4, 8, 3))
    full, x = jax.tree.map(lambda v: v.astype(np.float32), half), X.astype(dtype)
    explain = partial(explained, nets.mlp, rows=LOCAL.values(), argnums=1, target=0)
    right = [r for _, r in explain(full, x.astype(np.float32))]
    for parameters in (half, full):
        relevance = [r for _, r in explain(parameters, x)]
        assert {r.dtype for r in relevance} == {np.dtype(dtype)} and right[0].dtype == np.float32
        close(relevance, right, tolerance)


@HALVES
def test_rules_compute_in_float32(dtype, tolerance):
    """What float32 gives for these numbers, rounded once; a sum of 64 in half precision is further off."""
    x, w, R = draw(23, 64).astype(dtype), draw(24, 64, 8).astype(dtype), jnp.abs(draw(25, 8)).astype(dtype)
    explain = lrp(lambda x, w: x @ w, LOCAL["zplus"], target=lambda y: R)
    full = explain(x.astype(np.float32), w.astype(np.float32))
    np.testing.assert_array_equal(explain(x, w), full.astype(dtype))


def test_half_precision_of_flax_resnet():
    model, x = nets.ResNet(), draw(6, 1, 8, 8, 3).astype(jnp.bfloat16)
    half = jax.tree.map(lambda v: v.astype(jnp.bfloat16), variables_of(model, x))
    explain = jax.jit(lrp(model.apply, composites.epsilon_plus(0.1), argnums=1, target=0))
    relevance = explain(half, x)
    assert relevance.dtype == jnp.bfloat16
    close(relevance, explain(*jax.tree.map(lambda v: v.astype(np.float32), (half, x))), 0.1)


def test_casts_inside_the_network():
    """A network that computes in bfloat16 and is given float32: the values are bfloat16's, the rules are float32's."""

    def f(dtype, x, w, v):
        y = jax.nn.relu(jnp.dot(x.astype(dtype), w.astype(dtype), preferred_element_type=jnp.float32))
        return (y.astype(dtype) @ v.astype(dtype)).astype(jnp.float32)

    args = single(X, W, draw(20, 5, 2))
    half, full = (explained(partial(f, t), *args, rows=LOCAL.values()) for t in (jnp.bfloat16, jnp.float32))
    assert {r.dtype for _, r in half} == {np.dtype(np.float32)}
    close(half, full, 0.05)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_a_sum_in_half_precision_that_cancels(dtype):
    """Two such values cancel exactly every so often: relevance there is bounded by rounding, not by epsilon."""
    x, y = jnp.asarray([1.0, 1.0], dtype), jnp.asarray([-1.0, 0.5], dtype)
    _, pull = jax.vjp(rewrite(lambda x, y: x + y, composites.epsilon(), (0, 1)), x, y)
    (r_x, r_y) = (np.asarray(r, np.float64) for r in pull(jnp.ones(2, dtype)))
    bound = 2 / float(jnp.finfo(dtype).eps)
    np.testing.assert_allclose(r_x, [bound, 2 / 3], rtol=1e-2)
    np.testing.assert_allclose(r_y, [-bound, 1 / 3], rtol=1e-2)


def test_sums_in_half_precision_lose_nothing_where_they_are_zero():
    """One residual sum in some 250 is exactly 0 in 8 bits: what lies below must not lose its share by that."""

    def f(params, x):
        for up, down in params:
            x = x + jax.nn.gelu(nn.LayerNorm().apply({"params": SCALE}, x) @ up) @ down
        return x

    def off(explain):
        full, half = (
            np.asarray(jax.jit(explain)(*args), np.float64) for args in ((params, x), jax.tree.map(short, (params, x)))
        )
        return np.abs(half - full).max() / np.abs(full).max()

    short = lambda v: v.astype(jnp.bfloat16)
    wide = lambda v: short(v).astype(jnp.float32)
    SCALE = {"scale": jnp.ones(128, jnp.bfloat16), "bias": jnp.zeros(128, jnp.bfloat16)}
    params = jax.tree.map(wide, [(draw(i, 128, 256) / 11, draw(i + 9, 256, 128) / 16) for i in range(8)])
    x = wide(draw(20, 32, 128))
    yardstick = off(gradients.gradient_x_input(f, 1, 3))
    assert off(lrp(f, composites.attnlrp(), 1, 3)) < 1.2 * yardstick < 0.1


def test_numbers_of_another_dtype():
    """A float64 number, as a stacked composite holds where JAX has float64, explains a float32 layer in float32."""
    x, w = (jnp.asarray(draw(i, 3, 3), jnp.float32) for i in (27, 28))
    for number in (np.float64(0.3), jnp.asarray(0.3, jnp.float64)):
        got = lrp(lambda x: x @ w, nets.linear(rules.GeneralizedGamma(number)))(x)
        assert got.dtype == jnp.float32
        close(got, lrp(lambda x: x @ w, nets.linear(rules.GeneralizedGamma(0.3)))(x), 1e-6)


def test_masks_that_become_numbers_inside_a_layer():
    """Booleans cast to float32 within a layer that computes in another dtype."""

    def f(x):
        mask = jnp.tril(jnp.ones((2, 2), bool)).astype(jnp.float32)
        bias = jnp.where(mask > 0, 0.0, -9.0).astype(x.dtype)
        return jax.nn.softmax(x @ x.T + bias) @ x

    explain = lrp(jax.jit(f), composites.attnlrp())  # the mask, made of literals, is part of the layer
    x = draw(26, 2, 3).astype(jnp.bfloat16)
    close(explain(x), explain(x.astype(np.float32)), 0.05)
