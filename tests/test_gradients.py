"""The gradient family against jax.grad."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nets
from jaxlrp import errors, gradients
from nets import close, draw, same

PARAMETERS = nets.mlp_parameters(4, 6, 3)
MLP = partial(nets.mlp, PARAMETERS)
X = draw(1, 5, 4)
CLASSES = [2, 0, 1, 1, 2]

SEEDS = {
    "none": (None, lambda y: y.sum()),
    "integer": (1, lambda y: y[..., 1].sum()),
    "integer array": (np.asarray(CLASSES), lambda y: y[np.arange(5), CLASSES].sum()),
    "callable": (lambda y: 2.0 * (y > 0), lambda y: (2.0 * (y > 0) * y).sum()),
}
every_target = pytest.mark.parametrize("target, score", SEEDS.values(), ids=SEEDS)


@every_target
def test_family(target, score):
    """1 starts at the target, where LRP starts with its value."""
    right = jax.grad(lambda x: score(MLP(x)))(X)
    close(gradients.gradient(MLP, target=target)(X), right)
    close(gradients.sensitivity(MLP, target=target)(X), right**2)
    close(gradients.gradient_x_input(MLP, target=target)(X), right * X)


def test_one_example():
    right = jax.grad(lambda x: MLP(x)[2])(X[0])
    close(gradients.gradient(MLP, target=2)(X[0]), right)
    close(gradients.gradient_x_input(MLP, target=2)(X[0]), right * X[0])


def two(p, x, *, scale=1.0):
    return {"y": scale * nets.mlp(p, x["a"]) + x["b"].sum(), "n": x["a"].argmax(-1)}


def test_argnums_and_pytrees():
    x = {"a": X, "b": draw(2, 3)}
    right = jax.grad(lambda p, x: two(p, x, scale=3.0)["y"].sum(), (0, 1))(PARAMETERS, x)
    for name, change in {
        "gradient": lambda g, v: g,
        "sensitivity": lambda g, v: g**2,
        "gradient_x_input": lambda g, v: g * v,
    }.items():
        method = getattr(gradients, name)
        wanted = jax.tree.map(change, right, (PARAMETERS, x))
        close(method(two, (0, 1))(PARAMETERS, x, scale=3.0), wanted)
        close(method(two, [1, 0])(PARAMETERS, x, scale=3.0), wanted[::-1])
        close(method(two, 1)(PARAMETERS, x, scale=3.0), wanted[1])
        close(method(two, argnums=-1)(PARAMETERS, x, scale=3.0), wanted[1])


def test_derivative_is_the_functions_own():
    """A custom derivative counts here, as it does not for LRP."""

    @jax.custom_jvp
    def f(x):
        return x**2

    f.defjvp(lambda primals, tangents: (f(*primals), 7.0 * tangents[0]))
    same(gradients.gradient(f)(X), jnp.full(X.shape, 7.0))


def test_transformations_and_dtype():
    x = X.astype(np.float32)
    f = partial(nets.mlp, jax.tree.map(lambda v: v.astype(np.float32), PARAMETERS))
    for method in (gradients.gradient, gradients.sensitivity, gradients.gradient_x_input):
        right = method(f, target=1)(x)
        assert right.dtype == np.float32 and method(f).__name__
        close(jax.jit(method(f, target=1))(x), right, 1e-6)
        close(jax.vmap(method(f, target=1))(x), right, 1e-6)
        close(jax.jit(lambda t, method=method: method(f, target=t)(x))(1), right, 1e-6)
        assert not np.any(jax.jit(lambda t, method=method: method(f, target=t)(x))(3))


@pytest.mark.parametrize("method", [gradients.gradient, gradients.sensitivity, gradients.gradient_x_input])
def test_errors(method):
    """The same as those of lrp."""
    with pytest.raises(errors.TargetError, match="3 is out of range: the output has 3 classes"):
        method(MLP, target=3)(X)
    with pytest.raises(errors.TargetError, match="shape"):
        method(MLP, target=lambda y: y[0])(X)
    with pytest.raises(errors.InputError, match="argnums=1 does not exist"):
        method(MLP, argnums=1)(X)
    with pytest.raises(errors.InputError, match="int"):
        method(lambda x: 2.0 * x)(np.arange(3))
