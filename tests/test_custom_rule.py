"""A rule written outside the package, with its public names only."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nets
from jaxlrp import Composite, errors, lrp, plan, rewrite, rules, select, value_and_lrp
from jaxlrp.evaluate import conservation
from nets import close, draw, linear, quick_compilation  # noqa: F401


@rules.rule
class PowerShare(rules.Rule):
    """R_j = sum_k |c_jk|^power / (sum_i |c_ik|^power) R_k; without bias."""

    power: float = 2.0
    kinds = rules.KERNEL

    def propagate(self, layer, relevance):
        a, w = abs(layer.active) ** self.power, abs(layer.kernel) ** self.power
        z = layer.forward(a, w)
        layer.book("dropped", lambda: jnp.where(z == 0, relevance, 0))
        return (layer.leave(a * layer.backward(rules.divide(relevance, z), w)),)


@rules.rule
class Damped(rules.Rule):
    """The rule of the documentation of `Rule`."""

    factor: float = 0.5
    kinds = rules.LINEAR

    def propagate(self, layer, relevance):
        output, pull = jax.vjp(layer.apply, *layer.inputs)
        return tuple(x * g for x, g in zip(layer.inputs, pull(self.factor * relevance / output), strict=True))


@rules.rule
class Creating(PowerShare):
    """Gives back a multiple of what it gets."""

    gain: float = 3.0
    conserves = False

    def propagate(self, layer, relevance):
        return super().propagate(layer, self.gain * relevance)


@rules.rule
class Booked(rules.Rule):
    """Half of the relevance is dropped, and the books say so."""

    kinds = rules.KERNEL
    uses = frozenset(("inputs", "output", "params"))

    def propagate(self, layer, relevance):
        layer.book("dropped", lambda: relevance / 2)
        s = relevance / 2 / layer.output
        layer.book("bias", lambda: s * layer.bias)
        return (layer.leave(layer.active * layer.backward(s, layer.kernel)),)


@rules.rule
class Returns(rules.Rule):
    """What it should not."""

    what: str = "nothing"

    def propagate(self, layer, relevance):
        (x,) = layer.inputs
        return {
            "nothing": None,
            "no array": (),
            "two arrays": (x, x),
            "one array alone": x,
            "another shape": (jnp.zeros((2, 2)),),
            "a shape that broadcasts": (jnp.zeros((1, x.shape[-1])),),
            "a number": (0.0,),
            "a string": ("relevance",),
        }[self.what]


X, W, B = draw(0, 3, 5), draw(1, 5, 4), draw(2, 4)
KERNEL = draw(3, 3, 3, 2, 4)
IMAGES = draw(4, 2, 4, 4, 2)


def dense(x, w=W, b=B):
    return x @ w + b


def by_hand(x, R, power=2.0):
    c = abs(np.asarray(x)[:, :, None] * np.asarray(W)) ** power
    return (c / c.sum(1, keepdims=True) * np.asarray(R)[:, None]).sum(2)


def test_equals_the_sum():
    R = draw(5, 3, 4)
    close(lrp(dense, linear(PowerShare()), target=lambda y: R)(X), by_hand(X, R))
    close(lrp(dense, linear(PowerShare(1.5)), target=lambda y: R)(X), by_hand(X, R, 1.5))


def test_equals_the_sum_behind_preprocessing_and_batch_norm():
    """`active`, `kernel`, `forward` and `leave` are those of the layer a person sees, in raw units."""
    R = draw(6, 3, 4)

    def normalised(x):
        x = ((x - 0.3) / 0.5).reshape(-1, 5)
        return ((x @ W + B - 0.1) / jnp.sqrt(0.7) * draw(7, 4) + 0.2).reshape(-1, 2, 2)

    close(lrp(normalised, linear(PowerShare()), target=lambda y: R.reshape(-1, 2, 2))(X), by_hand(X, R), 1e-10)


def test_equals_the_sum_on_a_convolution():
    R = draw(8, 2, 4, 4, 4)
    got = lrp(lambda x: nets.conv(x, KERNEL), linear(PowerShare()), target=lambda y: R)(IMAGES)
    m = jax.jacobian(lambda x: nets.conv(x[None], KERNEL)[0])(IMAGES[0]).reshape(64, 32)
    for relevance, x, r in zip(got, IMAGES, R, strict=True):
        c = (m * x.ravel()) ** 2
        close(relevance.ravel(), (c / c.sum(1, keepdims=True) * r.reshape(-1, 1)).sum(0), 1e-10)


def test_the_documented_rule():
    for f in (dense, lambda x: x.reshape(-1, 5, 1).mean(1), lambda x: x * draw(14, 5) + 0.3):
        R = jnp.ones(f(X).shape)
        composite = Composite([(select.everything(), Damped(0.25))]) + linear(Damped(0.25))
        close(lrp(f, composite, target=lambda y, R=R: R)(X), X * jax.vjp(f, X)[1](0.25 * R / f(X))[0])


def test_of_several_inputs():
    x, y = draw(9, 3, 4), draw(10, 3, 4)
    composite = Composite([(select.kind("add"), Damped(1.0))])
    close(lrp(lambda x, y: x + 2 * y, composite, argnums=(0, 1))(x, y), (x, 2 * y), 1e-8)


PARAMETERS = nets.mlp_parameters(5, 6, 3)


def deep(x):
    return nets.mlp(PARAMETERS, x)


def test_jit_and_vmap():
    f = lrp(deep, linear(PowerShare()), target=1)
    right = f(X)
    assert np.isfinite(right).all()
    close(jax.jit(f)(X), right)
    close(jax.vmap(f)(X), right)
    close(jax.jit(jax.vmap(f))(X), right)


def test_numbers_are_leaves():
    """vmap over the number, its derivative, and no second compilation for another one."""
    powers = jnp.array([0.5, 1.0, 2.0, 3.0])
    compiled = []

    @jax.jit
    def explain(power):
        compiled.append(power)
        return lrp(deep, linear(PowerShare(power)), target=1)(X)

    each = jnp.stack([explain(p) for p in powers])
    assert len(compiled) == 1
    close(jax.jit(jax.vmap(lambda p: lrp(deep, linear(PowerShare(p)), target=1)(X)))(powers), each)

    weight = draw(11, *X.shape)
    got = jax.jit(jax.grad(lambda p: (weight * lrp(deep, linear(PowerShare(p)), target=1)(X)).sum()))(2.0)
    step = 1e-5
    close(got, (weight * (explain(2 + step) - explain(2 - step))).sum() / (2 * step), 1e-6)

    composite = linear(PowerShare(2.0))
    gradient = jax.grad(lambda c: (weight * lrp(deep, c, target=1)(X)).sum())(composite)
    close(gradient.rows[0][1].power, got)


def test_is_shown_in_the_plan():
    (row,) = (r for r in plan(dense, linear(PowerShare(1.5)))(X))
    assert row.rule == PowerShare(1.5) and not row.base
    assert "PowerShare(power=1.5)" in str(plan(dense, linear(PowerShare(1.5)))(X))


def test_in_float32_and_bfloat16():
    """A rule computes in float32 or wider; the relevance is of the input's dtype."""
    R = draw(12, 3, 4)
    for dtype, tolerance in ((jnp.float32, 1e-5), (jnp.bfloat16, 2e-2)):
        seen = []

        class Looking(PowerShare):
            def propagate(self, layer, relevance, seen=seen):
                seen.extend(v.dtype for v in (relevance, layer.active, layer.kernel, layer.output, *layer.inputs))
                return super().propagate(layer, relevance)

        x, w, b = (v.astype(dtype) for v in (X, W, B))
        got = lrp(dense, linear(rules.rule(Looking)()), target=lambda y: R)(x, w, b)
        assert got.dtype == dtype and set(seen) == {jnp.dtype(jnp.float32)}
        close(got, by_hand(X, R), tolerance)


# ---------------------------------------------------------------------------------------------------- in a ledger


def test_ledger_closes():
    for rule in (PowerShare(), PowerShare(1.0), Booked()):
        ledger = conservation(deep, linear(rule), target=1)(X)
        assert [row.rule for row in ledger if row.kind == "dense"] == [type(rule).__name__] * 2
        assert all((abs(row.gap) <= 1e-5 * (row.size + abs(row.passed))).all() for row in ledger), str(ledger)
        assert (abs(ledger.gap) <= 1e-5 * (abs(ledger.start) + abs(ledger.received))).all()


def test_ledger_shows_a_rule_without_books():
    """`Damped` says that it conserves, and keeps no books: what it loses is the gap."""
    (row,) = conservation(lambda x: x @ W, linear(Damped(0.25)))(X)
    np.testing.assert_allclose(row.gap, 0.75 * row.arrived, rtol=1e-5)


def test_ledger_shows_what_is_created():
    (row,) = conservation(dense, linear(Creating()))(X)
    np.testing.assert_allclose(row.created, 2 * row.arrived, rtol=1e-5)
    np.testing.assert_allclose(row.gap, 0, atol=1e-6)


# ---------------------------------------------------------------------------------------------------- errors

WRONG = ("nothing", "no array", "two arrays", "one array alone", "another shape", "a shape that broadcasts",
         "a number", "a string")  # fmt: skip


@pytest.mark.parametrize("what", WRONG)
def test_wrong_results_are_refused(what):
    """By an error of jaxlrp's that names the rule and the layer."""
    with pytest.raises(errors.InputError, match="Returns"):
        lrp(dense, linear(Returns(what)))(X)


def test_without_propagate():
    @rules.rule
    class Empty(rules.Rule):
        pass

    with pytest.raises(NotImplementedError, match=r"Empty does not define propagate\(layer, relevance\)"):
        lrp(dense, linear(Empty()))(X)


def test_on_layers_it_is_not_for():
    with pytest.raises(errors.SelectorError, match="PowerShare"):
        plan(jnp.tanh, Composite([(select.kind("activation"), PowerShare())]))(X)


def test_kernel_of_a_layer_without_one():
    @rules.rule
    class Reading(rules.Rule):
        def propagate(self, layer, relevance):
            return (layer.kernel,)

    with pytest.raises(errors.InputError, match="has no kernel"):
        lrp(lambda x: x.sum(1), Composite([(select.kind("reduce"), Reading())]))(X)


def test_class_instead_of_rule():
    with pytest.raises(errors.InputError, match=r"PowerShare is a class; write PowerShare\(\)"):
        linear(PowerShare)


def test_rewrite_takes_it():
    R = draw(13, 3, 4)
    _, pull = jax.vjp(rewrite(dense, linear(PowerShare())), X)
    close(pull(R)[0], by_hand(X, R))
    value, relevance, layers = value_and_lrp(
        dense, linear(PowerShare()), target=lambda y: R, layers=select.kind("dense")
    )(X)
    close((value, relevance, layers), (dense(X), by_hand(X, R), {"dense[0]": R}))
