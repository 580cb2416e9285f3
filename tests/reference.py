"""Every rule for linear layers, written to be read: the paper's sum, in float64, on a dense matrix.

Indices as in the papers: j runs over inputs (axis 0), k over outputs (axis 1). A layer computes

    z_k = sum_j c_jk + b_k        with the contributions        c_jk = a_j w_jk

and a rule turns the relevance R_k of the outputs into the relevance R_j of the inputs. Contributions are split by
sign, c+ = max(c, 0) and c- = min(c, 0), and so is the bias: this is right for inputs of either sign. Only `epsilon`
stabilises; everywhere else an output whose denominator is zero sends nothing.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Layer(NamedTuple):
    """A linear operation on one example, as numbers: z = a @ w + b."""

    w: np.ndarray  # (inputs, outputs)
    b: np.ndarray  # (outputs,)
    connected: np.ndarray  # (inputs, outputs), bool: is there a tap from j to k, whatever its weight


def layer(apply: Callable, shape: tuple[int, ...], kernel: np.ndarray, bias: np.ndarray | None) -> Layer:
    """The matrix of `x -> apply(x, kernel, bias)`: its Jacobian, and its value at zero as the bias."""

    def flat(a, kernel):
        return apply(a.reshape(shape), kernel, bias).ravel()

    zero = jnp.zeros(int(np.prod(shape)), kernel.dtype)
    jacobian = jax.jit(jax.jacobian(flat))
    w = np.asarray(jacobian(zero, kernel), np.float64).T
    b = np.asarray(flat(zero, kernel), np.float64)
    # A weight that happens to be zero hides its tap in w; a kernel of ones shows every tap, and no padding.
    connected = np.asarray(jacobian(zero, np.ones_like(kernel))).T != 0
    return Layer(w, b, connected)


def contributions(a, layer):
    return a[:, None] * layer.w


def positive(x):
    return np.maximum(x, 0)


def negative(x):
    return np.minimum(x, 0)


def distribute(messages, total, R):
    """R_j = sum_k messages_jk / total_k R_k, where a total of zero sends nothing."""
    share = np.zeros_like(messages)
    np.divide(messages, total, out=share, where=total != 0)
    return (share * R).sum(axis=1)


def zero(a, layer, R):
    """LRP-0, Bach 2015 eq. 56: R_j = sum_k c_jk / z_k R_k."""
    c = contributions(a, layer)
    z = c.sum(axis=0) + layer.b
    return distribute(c, z, R)


def epsilon(a, layer, R, eps):
    """LRP-epsilon, Bach 2015 eq. 58: R_j = sum_k c_jk / (z_k + eps sign z_k) R_k, where the sign of 0 is +1."""
    c = contributions(a, layer)
    z = c.sum(axis=0) + layer.b
    return distribute(c, np.where(z >= 0, z + eps, z - eps), R)


def zplus(a, layer, R):
    """The z+ rule, Montavon 2017 (there for a >= 0): R_j = sum_k c+_jk / (sum_j c+_jk + b+_k) R_k."""
    c = positive(contributions(a, layer))
    return distribute(c, c.sum(axis=0) + positive(layer.b), R)


def alpha_beta(a, layer, R, alpha, beta):
    """LRP-alpha-beta, Bach 2015 eq. 60: R_j = sum_k (alpha c+_jk / z+_k - beta c-_jk / z-_k) R_k."""
    c_plus = positive(contributions(a, layer))
    c_minus = negative(contributions(a, layer))
    z_plus = c_plus.sum(axis=0) + positive(layer.b)
    z_minus = c_minus.sum(axis=0) + negative(layer.b)
    return alpha * distribute(c_plus, z_plus, R) - beta * distribute(c_minus, z_minus, R)


def gamma(a, layer, R, gamma):
    """LRP-gamma, Montavon 2019, by contributions: R_j = sum_k (c + gamma c+)_jk / (z + gamma z+)_k R_k."""
    c = contributions(a, layer)
    z = c.sum(axis=0) + layer.b
    z_plus = positive(c).sum(axis=0) + positive(layer.b)
    return distribute(c + gamma * positive(c), z + gamma * z_plus, R)


def generalized_gamma(a, layer, R, gamma):
    """Generalised LRP-gamma, Andeol 2021: an output favours the contributions of its own sign, z = 0 sends nothing."""
    c = contributions(a, layer)
    z = c.sum(axis=0) + layer.b
    z_plus = positive(c).sum(axis=0) + positive(layer.b)
    z_minus = negative(c).sum(axis=0) + negative(layer.b)
    from_positive = distribute(c + gamma * positive(c), z + gamma * z_plus, np.where(z > 0, R, 0))
    from_negative = distribute(c + gamma * negative(c), z + gamma * z_minus, np.where(z < 0, R, 0))
    return from_positive + from_negative


def wsquare(a, layer, R):
    """The w^2 rule, Montavon 2017: R_j = sum_k w_jk^2 / (sum_j w_jk^2) R_k, without the bias."""
    w2 = layer.w**2
    return distribute(w2, w2.sum(axis=0), R)


def flat(a, layer, R):
    """The flat rule (Lapuschkin 2017, Kohlbrenner 2020): every input that k is connected to gets the same share."""
    taps = layer.connected.astype(np.float64)
    return distribute(taps, taps.sum(axis=0), R)


def zbox(a, layer, R, low, high):
    """The z^B rule, Montavon 2017: R_j = sum_k q_jk / (sum_j q_jk) R_k, q_jk = a_j w_jk - l_j w+_jk - h_j w-_jk."""
    low, high = np.broadcast_to(low, a.shape), np.broadcast_to(high, a.shape)
    q = contributions(a, layer) - low[:, None] * positive(layer.w) - high[:, None] * negative(layer.w)
    return distribute(q, q.sum(axis=0), R)


def pass_through(a, layer, R):
    """R_j = R_k: for layers whose output has the input's shape."""
    return R
