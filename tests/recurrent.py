"""LRP's formulas for recurrent cells (Arras et al. 2017) as loops over time in NumPy, and nets to hold against them."""

from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from nets import draw

EPS = 0.01

BATCH, TIME, INPUTS, HIDDEN = 2, 4, 3, 5
X, R = draw(0, BATCH, TIME, INPUTS), draw(1, BATCH, TIME, HIDDEN)


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


def shaken(tree, seed: int = 7):
    """The parameters with biases that are not zero."""
    leaves, structure = jax.tree.flatten(tree)
    rng = np.random.default_rng(seed)
    return jax.tree.unflatten(structure, [jnp.asarray(rng.normal(size=v.shape) / 2) for v in leaves])


def linen(module: nn.Module, x=X) -> tuple[Callable, dict]:
    return module.apply, shaken(jax.eval_shape(module.init, jax.random.key(0), x))
