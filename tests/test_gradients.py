"""The gradient family against jax.grad, sums and loops written out."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nets
from jaxlrp import errors, gradients, lrp, rules
from nets import close, draw, quick_compilation, same  # noqa: F401

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


@pytest.mark.slow
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


# ---------------------------------------------------------------------------------------------------- means


def smooth(x):
    """An MLP without kinks, (n, 4) -> (n, 3)."""
    (v, c), (w, b) = PARAMETERS
    return jnp.tanh(x @ v + c) @ w + b


@every_target
def test_integrated_gradients(target, score):
    """The integral by a fine midpoint rule, and completeness, from a baseline that differs from feature to feature."""
    origin = draw(41, 4)
    relevance, ends = gradients.integrated_gradients(smooth, target=target, baseline=origin, report=True)(X)
    seed = jax.grad(lambda y: score(y))(smooth(X))  # of the input itself, also where the target is a callable
    slope = jax.jit(jax.grad(lambda x: (seed * smooth(x)).sum()))
    points = [origin + t * (X - origin) for t in (np.arange(2000) + 0.5) / 2000]
    close(relevance, (X - origin) * np.mean([slope(x) for x in points], 0), 1e-6)
    close(relevance.sum(1), (seed * (smooth(X) - smooth(origin))).sum(1), 1e-10)
    close((ends.start, ends.value), ((seed * smooth(X)).sum(1), (seed * smooth(origin + 0 * X)).sum(1)))
    close((ends.point, ends.distance), (origin + 0 * X, jnp.sqrt(((X - origin) ** 2).sum(1))))


def test_integrated_gradients_of_a_polynomial_is_exact():
    """x^6 has a gradient of degree 5: three points of Gauss and Legendre are enough, two are not."""
    f = lambda x: (x**6).sum()
    close(gradients.integrated_gradients(f, baseline=1.0, steps=3)(X[0]), X[0] ** 6 - 1)
    wrong = gradients.integrated_gradients(f, baseline=1.0, steps=2)(X[0])
    assert abs(wrong.sum() - (f(X[0]) - 4)) > 1e-3


def test_integrated_gradients_of_pytrees():
    f = lambda a, x: (a * x["b"] * x["c"]).sum()
    a, x = X, {"b": 2 * X, "c": 3 + X}
    half = lambda a, x: jax.tree.map(lambda v: v / 2, (a, x))
    integral = (1 - 0.5**3) / 3 / 0.5  # of t^2 from 1/2 to 1, over its length
    right = jax.tree.map(lambda v, g: v / 2 * g * integral, (a, x), jax.grad(f, (0, 1))(a, x))
    close(gradients.integrated_gradients(f, (0, 1), baseline=half)(a, x), right)
    close(gradients.integrated_gradients(f, (0, 1), baseline=half(a, x))(a, x), right)
    wanted = {"b": f(a, x) / 2, "c": f(a, x) / 2}
    found = gradients.integrated_gradients(f, 1)(a, x)
    close(jax.tree.map(jnp.sum, found), wanted)


def explicit_noise(key, i, x):
    """What `smoothgrad` documents for sample i of the first array: the range of the example times N(0, 1)."""
    noise = jax.random.normal(jax.random.fold_in(jax.random.fold_in(key, i), 0), x.shape, x.dtype)
    return (x.max() - x.min()) * noise


@pytest.mark.parametrize("method", [gradients.gradient, gradients.sensitivity, gradients.gradient_x_input])
def test_smoothgrad(method):
    """An explicit mean, example by example; the target of the untouched input even where noise changes the argmax."""
    key, target = jax.random.key(3), lambda y: jax.nn.one_hot(y.argmax(-1), 3)
    found = gradients.smoothgrad(smooth, target=target, deviation=0.5, samples=5, key=key, of=method)(X)
    change = {"gradient": lambda g, x: g, "sensitivity": lambda g, x: g**2, "gradient_x_input": lambda g, x: g * x}
    for n, x in enumerate(X):
        label = int(smooth(x).argmax())
        noisy = [x + 0.5 * explicit_noise(jax.random.fold_in(key, n), i, x) for i in range(5)]
        slopes = [jax.grad(lambda x, label=label: smooth(x)[label])(x) for x in noisy]
        close(found[n], np.mean([change[method.__name__](g, x) for g, x in zip(slopes, noisy, strict=True)], 0))


def test_smoothgrad_has_the_noise_it_says():
    """Of x^2/2 the gradient is the noisy input itself."""
    found = gradients.smoothgrad(lambda x: (x**2).sum() / 2, deviation=0.2, samples=64)(X[0].repeat(500))
    noise = found - X[0].repeat(500)
    np.testing.assert_allclose(noise.std(), 0.2 * jnp.ptp(X[0]) / 8, rtol=0.1)
    assert abs(noise.mean()) < 0.1 * noise.std()
    close(gradients.smoothgrad(MLP, deviation=0.0, samples=3)(X), gradients.gradient(MLP)(X))


def test_smoothgrad_of_lrp():
    explain = lambda f, argnums, target: lrp(f, nets.linear(rules.Epsilon()), argnums, target)
    close(gradients.smoothgrad(MLP, target=1, deviation=0.0, of=explain)(X), explain(MLP, 0, 1)(X))


def test_noise_depends_on_the_place_and_not_on_the_batch():
    explain = jax.jit(gradients.smoothgrad(smooth, target=1))
    close(explain(X)[:2], explain(X[:2]))
    one = gradients.smoothgrad(smooth, target=1, key=jax.random.fold_in(jax.random.key(0), 3))
    close(explain(X)[3], one(X[3]))
    other = gradients.smoothgrad(smooth, target=1, key=jax.random.key(1))(X)
    assert abs(other - explain(X)).max() > 1e-3


# ---------------------------------------------------------------------------------------------------- occlusion


def windows(n, size, stride):
    """(first, last + 1) along one axis: until the end is covered."""
    first = [0]
    while first[-1] + size < n:
        first.append(first[-1] + stride)
    return [(a, min(a + size, n)) for a in first]


def occluded(f, x, region, stride, fill):
    """An explicit loop over the tiles of one example (h, w, c), the score f in float64."""
    total, count = np.zeros(x.shape), np.zeros(x.shape)
    for a, b in windows(x.shape[0], region[0], stride[0]):
        for c, d in windows(x.shape[1], region[1], stride[1]):
            y = np.array(x)
            y[a:b, c:d] = np.broadcast_to(fill, x.shape)[a:b, c:d]
            total[a:b, c:d] += (f(x) - f(y)) / y[a:b, c:d].size
            count[a:b, c:d] += 1
    return total / count


IMAGES = draw(51, 2, 5, 7, 3)
WEIGHT = draw(52, 5, 7, 3, 4)


def picture(x):
    """(n, 5, 7, 3) -> (n, 4)."""
    return jnp.tanh(jnp.einsum("...hwc,hwck->...k", jnp.tanh(x), WEIGHT) / 4)


@pytest.mark.parametrize("region, stride", [((2, 3), (2, 3)), ((2, 3), (1, 2)), ((3, 9), (2, 4)), ((1, 1), (1, 1))])
def test_occlusion(region, stride):
    """Tiles that overlap, that do not fit, that are wider than the image; fills and ways to write an image."""
    fill = draw(53, 3)
    labels = np.asarray([3, 1])
    options = {"region": region, "stride": stride, "fill": fill}
    right = [occluded(lambda x, n=n: picture(x)[labels[n]], IMAGES[n], region, stride, fill) for n in range(2)]
    found = jax.jit(gradients.occlusion(picture, target=labels, **options))(IMAGES)
    close(found, jnp.asarray(right))
    one = jax.jit(gradients.occlusion(picture, target=1, **options))(IMAGES[1])
    close(one, jnp.asarray(right[1]))
    front = lambda x: picture(jnp.moveaxis(x, -3, -1))
    options = {**options, "fill": fill[:, None, None]}
    for channels, x, label, wanted in (
        (1, IMAGES, labels, np.asarray(right)),
        (-3, IMAGES, labels, np.asarray(right)),
        (0, IMAGES[1], 1, right[1]),
    ):
        found = jax.jit(gradients.occlusion(front, target=label, channels=channels, **options))(jnp.moveaxis(x, -1, -3))
        close(found, np.moveaxis(wanted, -1, -3))


def test_occlusion_of_a_linear_function():
    """Position by position it is the weight times what was replaced, and the default needs no options."""
    w = draw(54, 4, 3)
    close(gradients.occlusion(lambda x: x @ w, target=2)(X), X * w[:, 2])
    mean = lambda x: jnp.broadcast_to(x.mean(1, keepdims=True), x.shape)
    close(gradients.occlusion(lambda x: x @ w, target=2, fill=mean)(X), (X - mean(X)) * w[:, 2])
    tiles = gradients.occlusion(lambda x: x @ w, target=2, region=2)(X)
    close(tiles[:, ::2] * 2, (X * w[:, 2]).reshape(5, 2, 2).sum(-1))
    pair = gradients.occlusion(lambda a, x: a @ w + x["b"] @ w, (0, 1), fill=1.0)(X, {"b": 2 * X})
    close(pair, ((X - 1) * w.sum(1), {"b": (2 * X - 1) * w.sum(1)}))


# ---------------------------------------------------------------------------------------------------- token ids

TABLE = draw(61, 9, 4)
IDS = np.asarray([[1, 2, 2, 8], [7, 0, 3, 1]])


@jax.custom_jvp
def straight(x):
    """Rounds, and lets the gradient through."""
    return jnp.round(x)


straight.defjvp(lambda primals, tangents: (straight(*primals), tangents[0]))


def reader(rows):
    """Rows (n, 4, 4) -> (n, 3), by what LRP would treat otherwise: attention, a custom derivative, a maximum at 0."""
    a = jax.nn.softmax(rows @ jnp.swapaxes(rows, -1, -2))
    rows = jax.nn.relu(straight(a @ rows * 3)) + jnp.tanh(rows)
    return rows.sum(-2) @ draw(62, 4, 3)


LOOKUPS = {
    "index": lambda ids: TABLE[ids],
    "one-hot": lambda ids: jax.nn.one_hot(ids, 9) @ TABLE,
    "scan": lambda ids: jax.lax.scan(lambda c, i: (c, TABLE[i]), 0, ids.T)[1].swapaxes(0, 1),
}


@pytest.mark.parametrize("look", LOOKUPS.values(), ids=LOOKUPS)
def test_gradient_x_input_of_token_ids(look):
    slope = jax.jit(jax.grad(lambda rows: reader(rows)[:, 1].sum()))(TABLE[IDS])
    explain = jax.jit(gradients.gradient_x_input(lambda ids: reader(look(ids)), target=1))
    close(explain(IDS), (TABLE[IDS] * slope).sum(-1))


def test_gradient_x_input_of_ids_beside_numbers():
    x = draw(63, 2, 4, 4)
    f = lambda batch, scale: reader(TABLE[batch["ids"]] * batch["x"] * scale)
    g = jax.jit(jax.grad(lambda rows, x: reader(rows * x * 2.0).sum(), (0, 1)))(TABLE[IDS], x)
    batch = {"ids": IDS, "x": x}
    found = gradients.gradient_x_input(f)(batch, 2.0)
    close(jax.jit(gradients.gradient_x_input(f))(batch, 2.0), found)
    close(found, {"ids": (TABLE[IDS] * g[0]).sum(-1), "x": x * g[1]})
    with pytest.raises(errors.UnknownPrimitiveError, match="one of several indices"):
        gradients.gradient_x_input(lambda i: TABLE[i, i])(IDS[0] % 4)


def test_occlusion_of_token_ids():
    """The mask token is id 5; relevance is in the score's dtype."""
    f = lambda ids: reader(TABLE[ids]).astype(np.float32)
    explain = jax.jit(gradients.occlusion(f, target=1, fill=5))
    found, read = explain(IDS), jax.jit(lambda ids: reader(TABLE[ids]))
    assert found.dtype == np.float32
    right = np.zeros(IDS.shape)
    for place in np.ndindex(IDS.shape):
        masked = np.array(IDS)
        masked[place] = 5
        right[place] = (read(IDS) - read(masked))[place[0], 1]
    close(found, right, 1e-6)
    close(explain(IDS[0]), found[0], 1e-6)


# ---------------------------------------------------------------------------------------------------- all of them

BASELINES = {
    "integrated_gradients": lambda f, **options: gradients.integrated_gradients(f, baseline=0.1, **options),
    "smoothgrad": lambda f, **options: gradients.smoothgrad(f, deviation=0.0, **options),
    "occlusion": lambda f, **options: gradients.occlusion(f, region=2, fill=0.1, **options),
}


@pytest.mark.parametrize("method", BASELINES.values(), ids=BASELINES)
def test_baselines_under_transformations(method):
    explain = method(smooth, target=1)
    right = explain(X)
    one = jax.jit(explain)
    close(one(X), right)
    close(jax.jit(lambda t: method(smooth, target=t)(X))(1), right)
    close(jax.jit(jax.vmap(explain))(X), right)
    close(jnp.stack([one(x) for x in X]), right)
    for dtype, tolerance in ((np.float32, 1e-5), (jnp.bfloat16, 0.1)):
        low = jax.jit(method(lambda x: smooth(x).astype(x.dtype), target=1))(X.astype(dtype))
        assert low.dtype == dtype
        close(low, right, tolerance)


@pytest.mark.parametrize("method", BASELINES.values(), ids=BASELINES)
def test_errors_of_baselines(method):
    with pytest.raises(errors.TargetError, match="3 is out of range: the output has 3 classes"):
        method(MLP, target=3)(X)
    with pytest.raises(errors.InputError, match="argnums=1 does not exist"):
        method(MLP, argnums=1)(X)
    with pytest.raises(errors.InputError, match="bool"):
        method(lambda x: 2.0 * x)(X > 0)
