"""Activations and softmaxes as people write them."""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jax.scipy.special import erf, erfc, logsumexp
from jax.scipy.stats import norm as normal

SLOPES = np.array([0.1, 0.2, 0.3, 0.4])


@jax.custom_jvp
def users_own(x):
    return x * jax.nn.sigmoid(1.5 * x) + 0.1 * jnp.tanh(x)


users_own.defjvp(lambda primals, tangents: (users_own(*primals), tangents[0]))


@jax.custom_vjp
def users_other(x):
    return jnp.maximum(x, 0) - 0.1 * jnp.minimum(x, 0) ** 2


users_other.defvjp(lambda x: (users_other(x), x), lambda x, g: (g,))

ACTIVATIONS: dict[str, Callable] = {
    "relu": jax.nn.relu,
    "relu, linen": nn.relu,
    "relu, nnx": nnx.relu,
    "relu, maximum": lambda x: jnp.maximum(x, 0),
    "relu, maximum from the left": lambda x: jnp.maximum(0.0, x),
    "relu, lax": lambda x: lax.max(x, jnp.zeros_like(x)),
    "relu, clip": lambda x: jnp.clip(x, 0),
    "relu, where": lambda x: jnp.where(x > 0, x, 0),
    "relu, select": lambda x: lax.select(x > 0, x, jnp.zeros_like(x)),
    "relu, product": lambda x: x * (x > 0),
    "relu, product of floats": lambda x: x * (x > 0).astype(x.dtype),
    "relu, absolute value": lambda x: (x + jnp.abs(x)) / 2,
    "relu6": jax.nn.relu6,
    "relu6, clip": lambda x: jnp.clip(x, 0, 6),
    "relu6, min of max": lambda x: jnp.minimum(jnp.maximum(x, 0), 6),
    "relu6, max of min": lambda x: jnp.maximum(jnp.minimum(x, 6), 0),
    "relu6, clamp": lambda x: lax.clamp(0.0, x, 6.0),
    "leaky relu": jax.nn.leaky_relu,
    "leaky relu, where": lambda x: jnp.where(x > 0, x, 0.1 * x),
    "leaky relu, maximum": lambda x: jnp.maximum(x, 0.1 * x),
    "elu": jax.nn.elu,
    "elu, where": lambda x: jnp.where(x > 0, x, jnp.exp(x) - 1),
    "selu": jax.nn.selu,
    "celu": jax.nn.celu,
    "silu": jax.nn.silu,
    "silu, linen": nn.silu,
    "silu, product": lambda x: x * jax.nn.sigmoid(x),
    "silu, product from the right": lambda x: jax.nn.sigmoid(x) * x,
    "silu, lax": lambda x: x * lax.logistic(x),
    "silu, quotient": lambda x: x / (1 + jnp.exp(-x)),
    "swish with a factor": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "gelu": lambda x: jax.nn.gelu(x, approximate=True),
    "gelu, exact": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu, tanh": lambda x: 0.5 * x * (1 + jnp.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))),
    "gelu, tanh of products": lambda x: (x * 0.5) * (jnp.tanh(x * 0.7978845608 * (1 + 0.044715 * x * x)) + 1.0),
    "gelu, erf": lambda x: x * 0.5 * (1 + erf(x / np.sqrt(2))),
    "gelu, erfc": lambda x: 0.5 * x * erfc(-x / np.sqrt(2)),
    "gelu, normal distribution": lambda x: x * normal.cdf(x),
    "tanh": jnp.tanh,
    "tanh, nnx": nnx.tanh,
    "sigmoid": jax.nn.sigmoid,
    "sigmoid, quotient": lambda x: 1 / (1 + jnp.exp(-x)),
    "softplus": jax.nn.softplus,
    "softplus, logaddexp": lambda x: jnp.logaddexp(x, 0.0),
    "softplus, log of exp": lambda x: jnp.log(1 + jnp.exp(x)),
    "hard swish": jax.nn.hard_swish,
    "hard swish, relu6": lambda x: x * jax.nn.relu6(x + 3) / 6,
    "hard swish, clip": lambda x: x * jnp.clip(x + 3, 0, 6) / 6,
    "hard swish, min of max": lambda x: x * jnp.minimum(jnp.maximum(x + 3, 0), 6) / 6,
    "hard swish, hard sigmoid": lambda x: x * jax.nn.hard_sigmoid(x),
    "hard sigmoid": jax.nn.hard_sigmoid,
    "hard tanh": jax.nn.hard_tanh,
    "hard tanh, clip": lambda x: jnp.clip(x, -1, 1),
    "mish": jax.nn.mish,
    "mish, product": lambda x: x * jnp.tanh(jax.nn.softplus(x)),
    "log sigmoid": jax.nn.log_sigmoid,
    "squareplus": jax.nn.squareplus,
    "squareplus, by hand": lambda x: 0.5 * (x + jnp.sqrt(x * x + 4)),
    "soft sign": jax.nn.soft_sign,
    "soft sign, quotient": lambda x: x / (1 + jnp.abs(x)),
    "prelu, array of slopes": lambda x: jnp.where(x >= 0, x, SLOPES * x),
    "prelu, maximum and minimum": lambda x: jnp.maximum(x, 0) + SLOPES * jnp.minimum(x, 0),
    "prelu, linen": lambda x: nn.PReLU().apply({"params": {"negative_slope": jnp.float64(0.3)}}, x),
    "square": jnp.square,
    "square, product": lambda x: x * x,
    "exponential": jnp.exp,
    "user's own, custom_jvp": users_own,
    "user's own, custom_vjp": users_other,
}


# ---------------------------------------------------------------------------------------------------- softmax

SOFTMAXES: dict[str, Callable] = {
    "jax.nn": jax.nn.softmax,
    "linen": nn.softmax,
    "jit": jax.jit(jax.nn.softmax),
    "by hand": lambda z: jnp.exp(z) / jnp.exp(z).sum(-1, keepdims=True),
    "by hand, one exponential": lambda z: (e := jnp.exp(z)) / e.sum(-1, keepdims=True),
    "by hand, shifted": lambda z: (e := jnp.exp(z - z.max(-1, keepdims=True))) / e.sum(-1, keepdims=True),
    "by hand, shifted by a constant": lambda z: (
        (e := jnp.exp(z - lax.stop_gradient(z.max(-1, keepdims=True)))) / e.sum(-1, keepdims=True)
    ),
    "by hand, in jit": jax.jit(lambda z: (e := jnp.exp(z - z.max(-1, keepdims=True))) / jnp.sum(e, -1)[:, None]),
    "by hand, through logsumexp": lambda z: jnp.exp(z - logsumexp(z, -1, keepdims=True)),
}
LOG_SOFTMAXES: dict[str, Callable] = {
    "jax.nn": jax.nn.log_softmax,
    "linen": nn.log_softmax,
    "logsumexp": lambda z: z - logsumexp(z, axis=-1, keepdims=True),
    "by hand": lambda z: z - jnp.log(jnp.exp(z).sum(-1, keepdims=True)),
    "by hand, shifted": lambda z: (s := z - z.max(-1, keepdims=True)) - jnp.log(jnp.exp(s).sum(-1, keepdims=True)),
    "by hand, shifted by a constant": lambda z: (
        (s := z - lax.stop_gradient(z.max(-1, keepdims=True))) - jnp.log(jnp.exp(s).sum(-1, keepdims=True))
    ),
}
