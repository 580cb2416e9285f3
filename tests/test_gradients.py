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


# ---------------------------------------------------------------------------------------------------- simple Taylor


def test_simple_taylor_of_a_linear_function():
    """f = w x + b: the nearest root along the gradient is x - f w / |w|^2, and the relevance sums to f."""
    w, b = draw(31, 4), 0.7
    relevance, root = gradients.simple_taylor(lambda x: x @ w + b, report=True)(X[0])
    f = X[0] @ w + b
    np.testing.assert_allclose(root.point, X[0] - f * w / (w @ w), rtol=1e-10)
    np.testing.assert_allclose(relevance, w * f * w / (w @ w), rtol=1e-10)
    np.testing.assert_allclose(root.distance, abs(f) / np.sqrt(w @ w), rtol=1e-10)
    np.testing.assert_allclose((root.start, relevance.sum()), (f, f), rtol=1e-10)
    assert abs(root.value) < 1e-10 * abs(f)


@pytest.mark.parametrize("target", [None, 1, np.asarray([0, 2, 1, 1, 0])], ids=["none", "one", "each"])
def test_simple_taylor_on_a_segment(target):
    """The definition, one example at a time: the first root between x and the reference, by a scan of the segment."""
    reference = -2.0 * X
    explain = gradients.simple_taylor(MLP, target=target, root=reference, steps=200, report=True)
    relevance, root = jax.jit(explain)(X)
    for n in range(len(X)):
        pick = (lambda y: y.sum()) if target is None else (lambda y, n=n: y[np.broadcast_to(target, len(X))[n]])
        f = lambda x, pick=pick: pick(MLP(x))
        line = [X[n] + t * (reference[n] - X[n]) for t in np.linspace(0, 1, 201)]
        values = np.asarray([f(x) for x in line])
        crossed = np.flatnonzero(np.sign(values) != np.sign(values[0]))
        assert root.start[n] == pytest.approx(float(values[0]))
        if len(crossed):
            assert abs(root.value[n]) < 1e-12 * abs(values).max()
            k = crossed[0]
            low, high = np.linalg.norm(line[k - 1] - X[n]), np.linalg.norm(line[k] - X[n])
            assert low <= root.distance[n] <= high
        else:
            np.testing.assert_allclose(abs(root.value[n]), abs(values).min(), rtol=1e-9)
        slope = jax.grad(f)(root.point[n])
        np.testing.assert_allclose(relevance[n], slope * (X[n] - root.point[n]), rtol=1e-7, atol=1e-10)


def test_simple_taylor_at_a_given_root():
    """With a root of the user's own: the point itself, whatever f is there, and two explained arguments."""
    origin = gradients.simple_taylor(MLP, target=0, root=lambda x: 0 * x, report=True)
    relevance, root = origin(X)
    close(relevance, jax.grad(lambda x: MLP(x)[:, 0].sum())(0 * X) * X)
    close(root.value, MLP(0 * X)[:, 0])
    pair = gradients.simple_taylor(lambda a, b: (a * b).sum(), (0, 1), root=lambda a, b: (a / 2, b / 2))(X, 2 * X)
    close(pair, (X * X / 2, X * X / 2))


def test_simple_taylor_is_gradient_x_input_where_f_has_no_bias():
    """On a bias-free ReLU network the origin is a root of the same linear piece, reached in the limit."""
    f = lambda x: jax.nn.relu(x @ draw(32, 4, 6)) @ draw(33, 6, 3)
    near = gradients.simple_taylor(f, target=2, root=lambda x: 1e-9 * x)
    close(near(X), gradients.gradient_x_input(f, target=2)(X), 1e-7)


def test_simple_taylor_under_transformations():
    one = gradients.simple_taylor(MLP, target=1)
    right = one(X)
    close(jax.jit(one)(X), right, 1e-9)
    close(jax.vmap(one)(X), right, 1e-9)
    half = gradients.simple_taylor(lambda x: MLP(x).astype(np.float32), target=1)(X.astype(np.float32))
    assert half.dtype == np.float32


def test_simple_taylor_errors():
    with pytest.raises(errors.InputError, match="root='origin'.*write"):
        gradients.simple_taylor(MLP, root="origin")
    with pytest.raises(errors.InputError, match="steps=0.*positive"):
        gradients.simple_taylor(MLP, steps=0)
    with pytest.raises(errors.TargetError, match="3 is out of range"):
        gradients.simple_taylor(MLP, target=3)(X)
