"""Local response normalisation: the layer, how it is recognised however it is written, and its Taylor rule."""

import subprocess
import sys
import textwrap
from collections.abc import Callable
from functools import partial
from pathlib import Path

import flax.linen
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax

from jaxlrp import Composite, composites, lrp, plan, rewrite, rules, select, value_and_lrp
from jaxlrp.errors import InputError
from jaxlrp.evaluate import conservation
from jaxlrp.nn import LocalResponseNorm, NNXLocalResponseNorm, local_response_norm
from nets import close, draw, quick_compilation  # noqa: F401

ROOT = Path(__file__).resolve().parent.parent
K, B, C, N = 1.3, 0.4, 0.75, 5  # of the layers written by hand: y = x / (K + B sum of N squares)^C
KIND = "local_response_norm"
MESSAGES = ("normalised", "over_y", "unnormalised")
every_message = pytest.mark.parametrize("messages", MESSAGES)
X = draw(0, 2, 3, 4, 8)


def taylor(messages: str = "normalised") -> Composite:
    return Composite([(select.kind(KIND), rules.LocalResponseTaylor(messages))])


def explain(f: Callable, x, R, messages: str = "normalised"):
    return jax.jit(lrp(f, taylor(messages), target=lambda y: jnp.asarray(R)))(x)


def shares(z: np.ndarray, y: np.ndarray, messages: str) -> np.ndarray:
    """v_jk from z_jk, with k on the first axis."""
    divisor = {"normalised": z.sum(1), "over_y": y, "unnormalised": np.ones_like(y)}[messages][:, None]
    return np.divide(z, divisor, out=np.zeros_like(z), where=divisor != 0)


def by_jacobian(f: Callable, x, R, messages: str = "normalised") -> np.ndarray:
    """R_j = sum_k v_jk R_k with z_kk what f gives where all but x_k are 0, and z_jk = x_j dy_k/dx_j."""
    shape = x.shape
    flat = lambda v: f(v.reshape(shape)).ravel()
    x = jnp.asarray(x).ravel()
    z = jax.jacobian(flat)(x) * x
    z = np.array(jnp.where(jnp.eye(x.size) > 0, jnp.diag(jnp.diag(jax.vmap(flat)(jnp.diag(x)))), z))
    return (shares(z, np.asarray(flat(x)), messages) * np.asarray(R).ravel()[:, None]).sum(0).reshape(shape)


def by_loops(x, R, messages: str, k=K, b=B, c=C, size=N) -> np.ndarray:
    """Binder et al. 2016 across the last axis, one message after the other."""
    out = np.zeros_like(x)
    for i in np.ndindex(x.shape[:-1]):
        z = np.zeros((x.shape[-1],) * 2)
        q = np.zeros(x.shape[-1])
        for unit in range(x.shape[-1]):
            window = range(max(0, unit - size // 2), min(x.shape[-1], unit + (size - 1) // 2 + 1))
            q[unit] = k + b * sum(x[i][j] ** 2 for j in window)
            for j in window:
                if j == unit:
                    z[unit, unit] = x[i][unit] / (k + b * x[i][unit] ** 2) ** c
                else:
                    z[unit, j] = -2 * b * c * x[i][unit] * x[i][j] ** 2 / q[unit] ** (c + 1)
        v = shares(z, x[i] / q**c, messages)
        for unit in range(x.shape[-1]):
            out[i] += v[unit] * R[i][unit]
    return out


# ---------------------------------------------------------------------------------------------------- the layer


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 9, 30])
@pytest.mark.parametrize("alpha_per", ["window", "element"])
def test_layer(size: int, alpha_per: str):
    got = local_response_norm(X, size, 2.0, 0.7, 0.6, alpha_per=alpha_per)
    right = np.empty_like(X)
    for channel in range(X.shape[-1]):
        window = X[..., max(0, channel - size // 2) : channel + (size - 1) // 2 + 1]
        b = 0.7 / size if alpha_per == "window" else 0.7
        right[..., channel] = X[..., channel] / (2.0 + b * (window**2).sum(-1)) ** 0.6
    close(got, right, 1e-12)


@pytest.mark.parametrize("size", [2, 3, 5])
def test_layer_within_channels(size: int):
    low, high = size // 2, (size - 1) // 2
    padded = np.pad(X**2, ((0, 0), (low, high), (low, high), (0, 0)))
    total = sum(padded[:, i : i + 3, j : j + 4] for i in range(size) for j in range(size))
    right = X / (1.0 + 0.3 / size**2 * total) ** 0.75
    close(local_response_norm(X, size, alpha=0.3, axis=(1, 2)), right, 1e-12)


def test_layer_axis_and_dtype():
    moved = local_response_norm(jnp.moveaxis(X, -1, 1), alpha=1.0, axis=1)
    close(jnp.moveaxis(moved, 1, -1), local_response_norm(X, alpha=1.0), 1e-12)
    assert local_response_norm(X.astype(jnp.bfloat16)).dtype == jnp.bfloat16
    for beta in (0.75, 0.5, 1, 2):  # the roots that stand for 0.75 agree with a power
        close(local_response_norm(X, beta=beta), local_response_norm(X, beta=jnp.asarray(float(beta))), 1e-12)


@pytest.mark.parametrize("options", [{}, {"size": 3, "axis": (1, 2)}, {"alpha_per": "element", "k": 2.0}])
def test_modules(options):
    right = local_response_norm(X, **options)
    module = LocalResponseNorm(**options)
    assert not module.init(jax.random.key(0), X)
    close(module.apply({}, X), right, 0)
    close(NNXLocalResponseNorm(**options)(X), right, 0)


def test_without_flax():
    """The function needs none, and a module says what is missing."""
    code = """
        import sys; sys.modules["flax"] = None
        import numpy, jaxlrp.nn
        assert jaxlrp.nn.local_response_norm(numpy.ones(3, "float32")).shape == (3,)
        try: jaxlrp.nn.LocalResponseNorm
        except ModuleNotFoundError as error: assert "flax" in str(error)
        else: raise AssertionError
    """
    run = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize(
    "options, says",
    [
        ({"size": 0}, "size=0"),
        ({"size": 2.0}, "size=2.0"),
        ({"size": True}, "size=True"),
        ({"alpha_per": "channel"}, 'alpha_per=\'channel\'.*"window" or "element"'),
        ({"k": 0.0}, "k=0.0.*> 0"),
        ({"alpha": -1.0}, "alpha=-1.0"),
        ({"beta": np.nan}, "beta=nan"),
        ({"axis": 4}, "axis=4.*0 to 3"),
        ({"axis": (1, -3)}, "once"),
        ({"axis": ()}, "at least one"),
    ],
)
def test_layer_errors(options, says):
    with pytest.raises(InputError, match=says):
        local_response_norm(X, **options)


def test_integers_are_an_error():
    with pytest.raises(InputError, match="int64.*floating point"):
        local_response_norm(np.arange(5))


def test_messages_are_checked():
    with pytest.raises(InputError, match='messages=\'raw\'.*"normalised" or "over_y" or "unnormalised"'):
        rules.LocalResponseTaylor("raw")


# ---------------------------------------------------------------------------------------------------- recognition


def shifts(squares, axis=-1):
    padded = jnp.pad(squares, [(N // 2, N // 2) if i == axis % squares.ndim else (0, 0) for i in range(squares.ndim)])
    return [lax.slice_in_dim(padded, i, i + squares.shape[axis], axis=axis) for i in range(N)]


def windowed(squares):
    return lax.reduce_window(squares, 0.0, lax.add, (1,) * (squares.ndim - 1) + (N,), (1,) * squares.ndim, "SAME")


def by_window(x):
    return x / (K + B * windowed(x * x)) ** C


def by_slices(x):
    return x * (K + B * sum(shifts(jnp.square(x)))) ** -C


def by_padded_input(x):
    return x * (K + B * sum(s**2 for s in shifts(x))) ** -C


def by_loop(x):
    """As pylearn2 and its kin: the sum begins with k."""
    scale = K
    for s in shifts(x**2):
        scale = scale + B * s
    return x / scale**C


def by_zero_filled_shifts(x):
    squares, none = x**2, [(0, 0)] * (x.ndim - 1)
    total = squares
    for i in range(1, N // 2 + 1):
        total = total + jnp.pad(squares[..., :-i], [*none, (i, 0)]) + jnp.pad(squares[..., i:], [*none, (0, i)])
    return x / (K + B * total) ** C


def by_rolls_of_padded_input(x):
    padded = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(N, N)]) ** 2
    total = sum(jnp.roll(padded, i, -1) for i in range(-(N // 2), N // 2 + 1))
    return x / (K + B * total[..., N:-N]) ** C


def by_stack(x):
    return x / jnp.power(K + B * jnp.stack(shifts(jnp.abs(x) ** 2)).sum(0), C)


def by_running_sum(x):
    total = jnp.cumsum(jnp.pad(x**2, [(0, 0)] * (x.ndim - 1) + [(N // 2 + 1, N // 2)]), -1)
    return x / (K + B * (total[..., N:] - total[..., :-N])) ** C


def by_convolution(x):
    rows = (x**2).reshape(-1, 1, x.shape[-1])
    total = lax.conv_general_dilated(rows, jnp.full((1, 1, N), B, x.dtype), (1,), "SAME")
    return x / (total.reshape(x.shape) + K) ** C


def by_convolution_power_first(x):
    """The power is taken before the reshape back."""
    rows = (x**2).reshape(-1, 1, x.shape[-1])
    factor = (K + B * lax.conv_general_dilated(rows, np.ones((1, 1, N), x.dtype), (1,), "SAME")) ** -C
    return x * factor.reshape(x.shape)


def band(channels):
    return (abs(np.arange(channels)[:, None] - np.arange(channels)) <= N // 2).astype(float)


def by_matrix(x):
    return x / (K + B * (x**2 @ band(x.shape[-1]))) ** C


def by_matrix_in_front(x):
    first = jnp.einsum("dc,...c->d...", jnp.asarray(B * band(x.shape[-1])), x**2)
    return x / (K + jnp.moveaxis(first, 0, -1)) ** C


def by_pointwise_convolution(x):
    kernel = jnp.asarray(band(x.shape[-1]), x.dtype)[None, None]
    squares = jnp.reshape(x**2, (-1, 1, 1, x.shape[-1]))
    total = lax.conv_general_dilated(squares, kernel, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    return x / (K + B * total.reshape(x.shape)) ** C


def by_logarithm(x):
    return x * jnp.exp(-C * jnp.log(K + B * windowed(x**2)))


def by_log1p(x):
    return x * (jnp.exp(-jnp.log1p(B / K * windowed(x**2)) * C) / K**C)


def by_roots(x):
    q = K + B * windowed(x**2)
    return x * lax.rsqrt(q) * jnp.sqrt(lax.rsqrt(q))


def by_quotients(x):
    q = K + B * windowed(x**2)
    return x / (jnp.sqrt(q) * jnp.sqrt(jnp.sqrt(q)))


def by_reciprocal(x):
    return (1 / (K + B * windowed(lax.integer_pow(x, 2))) ** C) * x


def by_moved_axis(x):
    moved = jnp.moveaxis(x, -1, 0)
    total = lax.reduce_window(moved**2, 0.0, lax.add, (N,) + (1,) * (x.ndim - 1), (1,) * x.ndim, "SAME")
    return x / jnp.moveaxis(K + B * total, 0, -1) ** C


def by_average(x):
    return x / (K + B * N * windowed(x**2) / N) ** C


def by_jitted_parts(x):
    return x * jax.jit(lambda s: (K + B * windowed(s)) ** -C)(jax.jit(jnp.square)(x))


def by_function(x):
    return local_response_norm(x, N, K, B, C, alpha_per="element")


ACROSS = [
    by_zero_filled_shifts, by_rolls_of_padded_input,
    by_window, by_slices, by_padded_input, by_loop, by_stack, by_running_sum, by_convolution, by_matrix,
    by_convolution_power_first, by_matrix_in_front, by_pointwise_convolution, by_logarithm, by_log1p, by_roots,
    by_quotients, by_reciprocal, by_moved_axis, by_average, by_jitted_parts, by_function,
]  # fmt: skip
every_form = pytest.mark.parametrize("form", ACROSS, ids=lambda f: f.__name__)


class Linen(flax.linen.Module):
    form: Callable

    @flax.linen.compact
    def __call__(self, x):
        return self.form(x)


class NNX(nnx.Module):
    def __init__(self, form):
        self.form = form

    def __call__(self, x):
        return self.form(x)


WRAPS: dict[str, Callable[[Callable], Callable]] = {
    "plain": lambda f: f,
    "linen": lambda f: partial(Linen(f).apply, {}),
    "nnx": lambda f: NNX(f),
    "jit": jax.jit,
    "vmap": jax.vmap,
    "jit of vmap": lambda f: jax.jit(jax.vmap(f)),
    "checkpoint": jax.checkpoint,
}


def kinds(f: Callable, x=X) -> list[str]:
    return [row.kind for row in plan(f, taylor() + composites.epsilon())(x) if row.kind != "structural"]


@pytest.mark.slow
@every_form
def test_recognised(form):
    """In every wrap the same layer, with the relevance of the definition."""
    R = draw(1, *X.shape)
    right = by_jacobian(form, X[0, 0], R[0, 0])
    close(right, by_loops(X[0, 0], R[0, 0], "normalised"), 1e-10)
    for name, wrap in WRAPS.items():
        assert kinds(wrap(form)) == [KIND], name

    wraps = WRAPS if form in (by_window, by_convolution) else {"plain": WRAPS["plain"]}

    @jax.jit
    def explained(x, R):
        each = {name: lrp(wrap(form), taylor(), target=lambda y: R)(x) for name, wrap in wraps.items()}
        return each | {"vmap of lrp": jax.vmap(lambda x, R: lrp(form, taylor(), target=lambda y: R)(x))(x, R)}

    for name, got in explained(X, R).items():
        np.testing.assert_allclose(got[0, 0], right, rtol=0, atol=1e-10 * abs(right).max(), err_msg=name)
        close(got, by_loops(X, R, "normalised"), 1e-10)


@every_message
@pytest.mark.parametrize("form", [by_function, by_loop, by_matrix, by_convolution_power_first])
def test_messages(form, messages):
    """The double loop, and the definition by the Jacobian."""
    R = draw(2, *X.shape)
    close(explain(form, X, R, messages), by_loops(X, R, messages), 1e-10)
    x, R = X[0, 0], R[0, 0]
    close(explain(form, x, R, messages), by_jacobian(form, x, R, messages), 1e-10)


@every_form
def test_value_is_unchanged(form):
    """Bit for bit, compiled in the same way."""
    x = X.astype(np.float32)
    assert np.array_equal(jax.jit(rewrite(form, taylor()))(x), jax.jit(form)(x))


def spatially(x, size=3):
    window = (1, size, size, 1)
    return lax.reduce_window(x**2, 0.0, lax.add, window, (1,) * 4, "SAME")


UNEVEN = np.broadcast_to(draw(5, 3, 3, 1, 1) ** 2, (3, 3, 1, 8))


def depthwise(x, kernel):
    numbers = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(x, kernel, (1, 1), "SAME", feature_group_count=8, dimension_numbers=numbers)


WITHIN = {
    "function": lambda x: local_response_norm(x, 3, K, B, C, axis=(1, 2)),
    "even": lambda x: local_response_norm(x, 2, K, B, 2.0, axis=(1, 2)),
    "window": lambda x: x / (K + B * spatially(x)) ** C,
    "avg_pool": lambda x: x / (K + B * flax.linen.avg_pool(x**2, (3, 3), (1, 1), "SAME")) ** C,
    "depthwise": lambda x: x / (K + depthwise(x**2, jnp.ones((3, 3, 1, 8)))) ** C,
    "depthwise, a constant": lambda x: x / (K + depthwise(x**2, np.ones((3, 3, 1, 8)))) ** C,
    "uneven weights": lambda x: x / (K + depthwise(x**2, UNEVEN)) ** C,
    "two axes in turn": lambda x: (
        x / (K + lax.reduce_window(lax.reduce_window(
            x**2, 0.0, lax.add, (1, 3, 1, 1), (1,) * 4, "SAME"
        ), 0.0, lax.add, (1, 1, 3, 1), (1,) * 4, "SAME")) ** C
    ),
}  # fmt: skip


@pytest.mark.parametrize("form", WITHIN.values(), ids=WITHIN)
def test_within_channels(form):
    x = X[:1]
    R = draw(3, *x.shape)
    assert kinds(form, x) == [KIND]
    close(explain(form, x, R), by_jacobian(form, x, R), 1e-10)


def test_divisive_normalisation():
    """Learned weights between all channels, an offset for each (Balle et al. 2016): parameters of the function."""
    weights, offset = jnp.asarray(draw(4, 8, 8) ** 2), jnp.asarray(draw(5, 8) ** 2 + 0.5)
    f = lambda x, weights, offset: x / jnp.sqrt(offset + x**2 @ weights)
    x, R = X[0, 0], draw(6, 4, 8)
    got = jax.jit(lrp(f, taylor(), target=lambda y: R))(x, weights, offset)
    close(got, by_jacobian(lambda x: f(x, weights, offset), x, R), 1e-10)


def test_numbers_may_be_parameters():
    f = lambda x, p: x / (p["k"] + p["alpha"] * windowed(x**2)) ** p["beta"]
    R = draw(7, *X.shape)
    table = plan(f, taylor())(X, {"k": K, "alpha": B, "beta": jnp.asarray(C)})
    assert [row.kind for row in table] == [KIND]
    got = jax.jit(lrp(f, taylor(), target=lambda y: R))(X, {"k": K, "alpha": B, "beta": jnp.asarray(C)})
    close(got, by_loops(X, R, "normalised"), 1e-10)


def test_half_precision():
    """In bfloat16 the rule computes in float32 and sends bfloat16."""

    def model(x):
        return (x / (K + B * windowed(x.astype(jnp.float32) ** 2)) ** C).astype(x.dtype)

    x, R = jnp.asarray(X, jnp.bfloat16), jnp.asarray(draw(8, *X.shape), jnp.bfloat16)
    for f in (model, partial(local_response_norm, size=N, k=K, alpha=B, alpha_per="element")):
        assert KIND in kinds(f, x)
        got = explain(f, x, R)
        assert got.dtype == jnp.bfloat16
        close(got, by_loops(np.asarray(x, float), np.asarray(R, float), "normalised"), 0.02)


def test_in_a_network():
    """Between a ReLU and a dense layer, twice, one of them under scan."""
    w = draw(9, 8, 8)

    def model(x):
        x = by_window(jax.nn.relu(x @ w))
        x, _ = lax.scan(lambda x, _: (by_function(jnp.tanh(x @ w)), None), x, None, length=2)
        return x @ w

    found = kinds(model)
    assert found.count(KIND) == 2, found
    relevance = lrp(model, taylor() + Composite([(select.kind("dense"), rules.Zero())]))(X)
    close(relevance.sum(), model(X).sum(), 1e-9)
    identity = [row.rule for row in plan(model, composites.epsilon())(X) if row.kind == KIND]
    assert identity == [rules.Pass()] * 2


def squeeze_excite(x):
    scale = jax.nn.sigmoid(x.mean((1, 2)) @ draw(10, 8, 8))
    return x * scale[:, None, None]


def reflected(x):
    padded = jnp.pad(x**2, [(0, 0)] * 3 + [(2, 2)], mode="reflect")
    return x / (K + sum(padded[..., i : i + 8] for i in range(N))) ** C


OTHERS: dict[str, Callable] = {
    "layer norm": lambda x: (x - x.mean(-1, keepdims=True)) * lax.rsqrt(x.var(-1, keepdims=True) + 1e-6),
    "flax layer norm": lambda x: flax.linen.LayerNorm().bind(
        {"params": {"scale": jnp.ones(8), "bias": jnp.zeros(8)}}
    )(x),
    "rms norm": lambda x: x * lax.rsqrt((x**2).mean(-1, keepdims=True) + 1e-6),
    "rms norm, by an average pool": lambda x: x / jnp.sqrt(
        lax.reduce_window(x**2, 0.0, lax.add, (1, 1, 1, 8), (1,) * 4, "VALID") / 8 + 1e-6
    ),
    "l2": lambda x: x / jnp.sqrt((x * x).sum(-1, keepdims=True)),
    "l2, linalg": lambda x: x / jnp.linalg.norm(x, axis=-1, keepdims=True),
    "global response norm": lambda x: x * jnp.sqrt((x**2).sum((1, 2), keepdims=True)),
    "squeeze and excite": squeeze_excite,
    "swish": lambda x: x * jax.nn.sigmoid(x),
    "swish of a window": lambda x: x * jax.nn.sigmoid(windowed(x**2)),
    "inverse square root unit": lambda x: x / jnp.sqrt(1 + x**2),
    "no square": lambda x: x / (K + windowed(jnp.abs(x))) ** C,
    "a cube": lambda x: x / (K + windowed(jnp.abs(x) ** 3)) ** C,
    "a rising power": lambda x: x * (K + windowed(x**2)) ** C,
    "a rising power, by logarithm": lambda x: x / jnp.exp(-C * jnp.log(K + windowed(x**2))),
    "an exponential": lambda x: x * jnp.exp(-windowed(x**2)),
    "a sum of powers": lambda x: x / (1 + (K + windowed(x**2)) ** C),
    "another numerator": lambda x: x**3 / (K + windowed(x**2)) ** C,
    "the squares' own share": lambda x: x**2 / (K + windowed(x**2)) ** C,
    "two inputs": lambda x: jnp.tanh(x) / (K + windowed(x**2)) ** C,
    "a strided window": lambda x: x[..., ::2] / (K + windowed(x**2)[..., ::2]) ** C,
    "a pad that reflects": reflected,
    "a pad with ones": lambda x: x / (
        K + windowed(jnp.pad(x**2, [(0, 0)] * 3 + [(2, 2)], constant_values=1.0))[..., 2:-2]
    ) ** C,
    "edges cut off": lambda x: x / (K + windowed(jnp.pad(x[..., 1:-1] ** 2, [(0, 0)] * 3 + [(1, 1)]))) ** C,
    "own squares cut off": lambda x: x / (
        K + windowed(x**2) + jnp.pad(x[..., 1:-1] ** 2, [(0, 0)] * 3 + [(1, 1)])
    ) ** C,
    "weights that differ": lambda x: x / (K + depthwise(x**2, draw(5, 3, 3, 1, 8) ** 2)) ** C,
    "a softmax": lambda x: jax.nn.softmax(x, -1),
}  # fmt: skip


@pytest.mark.parametrize("f", OTHERS.values(), ids=OTHERS)
def test_others_are_not(f):
    assert KIND not in kinds(f)


def test_an_inner_value_that_is_read_elsewhere():
    def f(x):
        q = K + B * windowed(x**2)
        return x / q**C + q

    assert KIND not in kinds(f)


def test_a_statistic_that_the_user_holds_constant():
    """stop_gradient says that the factor is no data: a scale remains, which passes everything on."""
    f = lambda x: x / lax.stop_gradient((K + B * windowed(x**2)) ** C)
    assert KIND not in kinds(f)
    close(explain(f, X, f(X)), f(X), 1e-8)


# ---------------------------------------------------------------------------------------------------- laws

numbers = st.floats(-8, 8, allow_nan=False).map(lambda v: 0.0 if abs(v) < 1e-6 else v)
vectors = st.lists(numbers, min_size=7, max_size=7).map(np.asarray)
law = settings(deadline=None, derandomize=True, database=None, max_examples=60)
layers = st.fixed_dictionaries({
    "size": st.sampled_from([1, 2, 3, 5, 7]),
    "k": st.floats(0.1, 4),
    "alpha": st.floats(0, 4),
    "beta": st.floats(0.05, 4),
})  # fmt: skip


@partial(jax.jit, static_argnums=0)
def _messages(size, x, k, alpha, beta):
    f = rewrite(lambda x: local_response_norm(x, size, k, alpha, beta, alpha_per="element"), taylor())
    return jax.vmap(jax.vjp(f, x)[1])(jnp.eye(x.size))[0]


def messages_of(layer, x) -> np.ndarray:
    """v_jk, with k on the first axis."""
    return np.asarray(_messages(layer["size"], x, layer["k"], layer["alpha"], layer["beta"]))


@law
@given(vectors, layers)
def test_own_relevance_keeps_its_sign_and_neighbours_get_the_other(x, layer):
    v = messages_of(layer, x)
    own, others = np.diag(v), v - np.diag(np.diag(v))
    c = layer["beta"]
    bound = 1 / (1 - 2 * (c / (c + 1)) ** (c + 1))
    assert np.all(others <= 1e-12)
    assert np.all((x == 0) | (own >= 1 - 1e-9) & (own <= bound + 1e-9))
    np.testing.assert_allclose(v.sum(1), x != 0, rtol=0, atol=1e-9)


def test_the_bound_is_met():
    """One neighbour whose square is 1 / (b c): in the limit of a small x_k the own share is 1.8316."""
    v = messages_of({"size": 3, "k": 1.0, "alpha": 2.0, "beta": 0.75}, np.asarray([1e-7, np.sqrt(1 / 1.5)]))
    assert abs(v[0, 0] - 1.8316) < 1e-4


@law
@given(vectors, layers, st.floats(0.1, 10))
def test_scale_law(x, layer, factor):
    """Relevance of s x at b / s^2 is that of x at b."""
    scaled = {**layer, "alpha": layer["alpha"] / factor**2}
    np.testing.assert_allclose(messages_of(scaled, factor * x), messages_of(layer, x), rtol=0, atol=1e-9)


@law
@given(vectors, layers)
def test_without_neighbours_the_identity(x, layer):
    for still in ({**layer, "alpha": 0.0}, {**layer, "alpha": 1e-13}, {**layer, "size": 1}):
        np.testing.assert_allclose(messages_of(still, x), np.diag((x != 0).astype(float)), rtol=0, atol=1e-9)


@every_message
def test_books(messages):
    """Normalised it conserves, but for what arrives at zeros; the ledger shows what the others create."""
    x = np.where(draw(11, *X.shape) > 0.5, 0, X)
    rule = rules.LocalResponseTaylor(messages)
    assert rule.conserves == (messages == "normalised")
    ones = lambda y: jnp.ones_like(y)
    (row,) = conservation(by_window, taylor(messages), target=ones)(x)
    assert np.all(abs(row.gap) <= 1e-9 * row.size)
    close(row.passed.sum(), lrp(by_window, taylor(messages), target=ones)(x).sum(), 1e-9)
    close(row.arrived.sum(), x.size)
    if messages != "unnormalised":  # which sends x_k R_k itself
        close(row.dropped.sum(), (x == 0).sum())
    if messages == "normalised":
        assert not np.any(row.created)
    else:
        assert np.any(row.created)


def test_rule_is_a_pytree_without_leaves():
    rule = rules.LocalResponseTaylor("over_y")
    assert jax.tree.leaves(rule) == []
    assert jax.tree.map(lambda v: v, rule) == rule
    value, relevance = jax.jit(lambda c, x: value_and_lrp(by_window, c)(x))(taylor("over_y"), X)
    close(value, by_window(X), 1e-12)
    close(relevance, by_loops(X, by_window(X), "over_y"), 1e-10)


# ---------------------------------------------------------------------------------------------------- edges of the rule


def window(x, size):
    return lax.reduce_window(x, 0.0, lax.add, (1,) * (x.ndim - 1) + (size,), (1,) * x.ndim, "SAME")


def test_zeros_without_a_constant():
    """k = 0: a unit that is 0 among others that are not sends nothing, and nothing is not a number."""
    x = np.asarray([[0.5, 1.0, 0.0, 0.0, 2.0, 0.0, 0.0, 1.5]])
    for f in (lambda x: x / jnp.sqrt(window(x * x, 5)), lambda x: x / (0.1 * window(x * x, 5)) ** 0.75):
        taylor = Composite([(select.kind("local_response_norm"), rules.LocalResponseTaylor())])
        value, relevance = value_and_lrp(f, taylor)(x)
        assert np.isfinite(relevance).all()
        np.testing.assert_allclose(relevance.sum(), value.sum(), rtol=1e-7)


def test_two_windows_in_a_row_are_no_band():
    """At the edges the second one misses what the first had cut off."""
    kinds = lambda f: {row.kind for row in plan(f, composites.epsilon())(np.ones((2, 9)))}
    assert "local_response_norm" not in kinds(lambda x: x / (1 + window(window(x * x, 3), 3)) ** 0.75)


def test_sums_that_start_from_an_array_of_one_number():
    """`s = zeros_like(x); s = s + shifted`, as it is written most often; and full_like(x, k)."""
    x = np.random.default_rng(3).normal(size=(2, 9))
    taylor = Composite([(select.kind("local_response_norm"), rules.LocalResponseTaylor())])

    def accumulated(begin, x):
        padded, s = jnp.pad(x * x, ((0, 0), (1, 1))), begin(x)
        for i in range(3):
            s = s + padded[:, i : i + 9]
        return s

    right = lrp(lambda x: x / (2 + window(x * x, 3)) ** 0.75, taylor)(x)
    for f in (
        lambda x: x / (2 + accumulated(jnp.zeros_like, x)) ** 0.75,
        lambda x: x / accumulated(lambda x: jnp.full_like(x, 2.0), x) ** 0.75,
    ):
        assert [row.kind for row in plan(f, taylor)(x)] == ["local_response_norm"]
        for g in (f, jax.jit(f)):
            np.testing.assert_allclose(lrp(g, taylor)(x), right, atol=1e-10)
