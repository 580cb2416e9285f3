"""A network, its numbers, and loops that run it, which the tests of the transformation share."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

import nets
from jaxlrp import composites
from nets import LOCAL, draw

EPSILON, ZERO = composites.epsilon(0.1), LOCAL["zero"]
X, W, B = draw(1, 3, 4), draw(2, 4, 5), draw(3, 5)
MLP = partial(nets.mlp, nets.mlp_parameters(4, 6, 3))


def single(*arrays):
    return tuple(jnp.asarray(np.asarray(a, np.float32)) for a in arrays)


def variables_of(model, x):
    return nets.randomise(jax.eval_shape(model.init, jax.random.key(0), x))


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
