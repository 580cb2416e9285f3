"""What is kept between calls of a jitted function: its plan, and what was compiled for it; and what is not."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxlrp
from jaxlrp import analysis, rules, select
from jaxlrp.errors import InputError

pytestmark = pytest.mark.smoke


def draw(*shape: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


@jax.jit
def network(params: Any, x: jax.Array) -> jax.Array:
    return jax.nn.relu(x @ params["hidden"]) @ params["out"]


def arguments(n: int = 3, seed: int = 0) -> tuple[Any, jax.Array]:
    return {"hidden": draw(5, 7, seed=seed), "out": draw(7, 4, seed=seed + 1)}, draw(n, 5, seed=seed + 2)


def counting() -> tuple[jaxlrp.Composite, list[str]]:
    """A composite, and a list that grows each time one of its rules is traced."""
    calls: list[str] = []

    @rules.rule
    class Counted(rules.ZPlus):
        def propagate(self, layer: Any, relevance: jax.Array) -> tuple[jax.Array, ...]:
            calls.append(layer.op.name)
            return super().propagate(layer, relevance)

    return jaxlrp.Composite([(select.kind("dense"), Counted())]), calls


def test_jitted_function_is_planned_and_compiled_once() -> None:
    composite, calls = counting()
    explain = jaxlrp.lrp(network, composite, argnums=1, target=0)
    expected = jaxlrp.lrp(network.__wrapped__, composite, argnums=1, target=0)
    for seed, traced in ((0, 2), (10, 0), (20, 0)):  # a rule is traced once for each of the two layers
        params, x = arguments(seed=seed)
        calls.clear()
        found = explain(params, x)
        assert len(calls) == traced
        np.testing.assert_allclose(found, expected(params, x), rtol=1e-5, atol=1e-6)


def test_other_shapes_dtypes_and_arguments_are_other_programs() -> None:
    composite, calls = counting()
    explain = jaxlrp.lrp(lambda p, x: network(p, x), composite, argnums=1, target=0)
    params, x = arguments()
    half = jax.tree.map(lambda a: a.astype(jnp.bfloat16), params)
    for args, traced in (((params, x), 2), (arguments(2), 2), ((half, x), 2), ((params, x), 0)):
        calls.clear()
        found = explain(*args)
        assert len(calls) == traced
        np.testing.assert_allclose(
            found, jaxlrp.lrp(network.__wrapped__, composite, argnums=1, target=0)(*args), rtol=1e-5, atol=1e-6
        )
    with jax.default_matmul_precision("float32"):
        calls.clear()
        explain(params, x)
        assert len(calls) == 2  # JAX traces it anew, and so is the plan
    calls.clear()
    explain(params, x)
    assert not calls


def test_what_the_function_closes_over_is_never_stale() -> None:
    composite, calls = counting()
    state: dict[str, Any] = {}
    explain = jaxlrp.lrp(lambda x: network(state["params"], x), composite, target=0)
    for seed, traced in ((0, 2), (0, 0), (10, 2), (10, 0)):
        if traced:
            state["params"], x = arguments(seed=seed)
        calls.clear()
        found = explain(x)
        assert len(calls) == traced
        plain = jaxlrp.lrp(lambda p, x: network.__wrapped__(p, x), composite, argnums=1, target=0)
        np.testing.assert_allclose(found, plain(state["params"], x), rtol=1e-5, atol=1e-6)


def test_of_what_was_closed_over_little_stays_alive() -> None:
    memory = analysis.Memory[list[Any]]()
    x = arguments()[1]
    for seed in range(3):  # one program, with other arrays
        params = arguments(seed=seed)[0]
        traced = analysis.trace(lambda x, p=params: network(p, x), (x,), {}, 0)
        assert memory.of(traced, lambda t: [t]) is memory.of(traced, lambda t: [])
    assert len(memory._made) == 1
    for seed in range(20):  # a program for each call
        w = draw(5, 4, seed=seed)
        memory.of(analysis.trace(lambda x, w=w: jax.jit(lambda x: x @ w)(x), (x,), {}, 0), lambda t: [t])
    assert len(memory._made) <= memory.ROOM


def test_scalars_of_a_call_are_part_of_its_program() -> None:
    composite, calls = counting()
    scaled = jax.jit(lambda params, x, factor: factor * network.__wrapped__(params, x))
    state = {"factor": 1.0}
    explain = jaxlrp.lrp(lambda p, x: scaled(p, x, state["factor"]), composite, argnums=1)
    params, x = arguments()
    one = jaxlrp.lrp(network.__wrapped__, composite, argnums=1)(params, x)
    for factor, traced in ((1.0, 2), (2.0, 2), (1.0, 0)):
        state["factor"] = factor
        calls.clear()
        np.testing.assert_allclose(explain(params, x), factor * one, rtol=1e-5, atol=1e-6)
        assert len(calls) == traced


def test_masks_are_those_of_the_call() -> None:
    params, x = arguments()
    masks: dict[str, Any] = {}
    for function in (network, network.__wrapped__):
        explain = jaxlrp.lrp(function, jaxlrp.composites.epsilon(), argnums=1, target=0, masks=masks)
        for mask in (jnp.arange(7) < 3, jnp.arange(7) >= 3):
            masks["hidden"] = mask
            right = jaxlrp.lrp(network, jaxlrp.composites.epsilon(), argnums=1, target=0, masks=dict(masks))(params, x)
            np.testing.assert_allclose(explain(params, x), right, rtol=1e-5, atol=1e-6)


def test_a_program_that_is_being_traced_leaves_nothing_behind() -> None:
    composite, _ = counting()
    explain = jaxlrp.value_and_lrp(network, composite, argnums=1, target=0, layers=select.kind("dense"))
    params, x = arguments()
    with jax.checking_leaks():
        under_jit = jax.jit(explain)(params, x)
    mapped = jax.vmap(lambda x: explain(params, x[None])[1][0])(x)
    value, relevance, seen = explain(params, x)
    for found, again in zip(jax.tree.leaves(under_jit), jax.tree.leaves((value, relevance, seen)), strict=True):
        np.testing.assert_allclose(found, again, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(mapped, relevance, rtol=1e-5, atol=1e-6)
    again = jax.jit(explain)(params, x)[1]
    np.testing.assert_allclose(again, relevance, rtol=1e-5, atol=1e-6)


def test_nan_is_found_in_a_known_program() -> None:
    explain = jaxlrp.lrp(network, jaxlrp.composites.epsilon(), argnums=1, target=0)
    params, x = arguments()
    explain(params, x)
    with pytest.raises(InputError, match="'out' of shape"):
        explain({**params, "out": params["out"].at[0].set(jnp.nan)}, x)


def test_rewritten_function_is_planned_once() -> None:
    composite, calls = counting()
    rewritten = jaxlrp.rewrite(network, composite, argnums=1)
    params, x = arguments()
    expected = jaxlrp.lrp(network, composite, argnums=1)(params, x)
    for traced in (2, 0):
        calls.clear()
        y, pull = jax.vjp(rewritten, params, x)
        np.testing.assert_allclose(pull(y)[1], expected, rtol=1e-5, atol=1e-6)
        assert len(calls) == traced
