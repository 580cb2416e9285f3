"""Local response normalisation as people write it, and its Taylor rule as loops and by the Jacobian."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jaxlrp import Composite, lrp, rules, select
from jaxlrp.nn import local_response_norm
from nets import draw

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
