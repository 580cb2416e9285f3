"""The Flax models of Hugging Face transformers, as they are installed, are explained with no code for any of them.

They are small, their numbers random: what is tested is that every layer is known, that the forward value is
kept, and that relevance is neither lost nor made where no rule says so.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip(
    "transformers.modeling_flax_utils",  # which the 5th version has no more
    reason='NOT TESTED: the Flax models of Hugging Face transformers. They need: pip install -e ".[hf]"',
    exc_type=ImportError,
)

import transformers

import hf_models
from jaxlrp import composites, plan, value_and_lrp
from jaxlrp.evaluate import conservation
from ledgers import closes
from nets import close, quick_compilation, same  # noqa: F401

COMPOSITE = composites.attnlrp()

MODELS = [*hf_models.REQUIRED, *(pytest.param(name, marks=pytest.mark.slow) for name in hf_models.OTHERS)]


def second(logits: jax.Array) -> jax.Array:
    """Relevance starts at the second class."""
    return jnp.zeros_like(logits).at[..., 1].set(logits[..., 1])


@pytest.mark.parametrize("name", MODELS)
def test_value_and_relevance(name):
    """In float32 and compiled, as in practice. XLA may add up in another order beside a backward pass."""
    with jax.enable_x64(False):
        case = hf_models.build(name)
        value = jax.jit(case.fun)(case.params, *case.inputs)
        explain = jax.jit(value_and_lrp(case.fun, COMPOSITE, case.argnums, target=second))
        kept, relevance = explain(case.params, *case.inputs)
    assert value.dtype == jnp.float32 and np.ptp(value) > 0.01
    close(kept, value, 1e-6)
    for r, x in zip(relevance, case.inputs, strict=True):
        assert r.shape == x.shape and r.dtype == jnp.float32
        assert np.isfinite(r).all() and np.any(r)


@pytest.mark.slow
@pytest.mark.parametrize("name", hf_models.MODELS)
def test_value_to_the_bit(name):
    """Where nothing is compiled as a whole."""
    with jax.enable_x64(False):
        case = hf_models.build(name)
        same(
            value_and_lrp(case.fun, COMPOSITE, case.argnums)(case.params, *case.inputs)[0],
            case.fun(case.params, *case.inputs),
        )


@pytest.mark.parametrize("name", MODELS)
def test_ledger_closes(name):
    """In float64, but for what a model itself casts to float32: rounding hides next to nothing."""
    case = hf_models.build(name, jnp.float64)
    fun = jax.jit(case.fun)
    ledger = conservation(fun, COMPOSITE, case.argnums, target=1 if case.batched else None, batched=case.batched)
    closes(ledger(case.params, *case.inputs), 1e-6)


# What a person finds who reads the models: two layers in each encoder and decoder.
LAYERS = {
    "resnet": {"conv": 11, "dense": 1, "max_pool": 1, "add": 3},
    "vit": {"conv": 1, "dense": 13, "attention": 2, "layer_norm": 5, "activation": 2, "add": 4},
    "clip": {"conv": 1, "dense": 26, "attention": 4, "layer_norm": 11, "rms_norm": 2, "activation": 4, "embedding": 1},
    "bert": {"dense": 14, "attention": 2, "layer_norm": 5, "activation": 3, "add": 4, "embedding": 1},
    "roberta": {"dense": 14, "attention": 2, "layer_norm": 5, "activation": 3, "add": 4, "embedding": 1},
    "distilbert": {"dense": 14, "attention": 2, "layer_norm": 5, "activation": 3, "add": 4, "embedding": 1},
    "gpt2": {"dense": 9, "attention": 2, "layer_norm": 5, "activation": 2, "add": 4, "embedding": 1},
    "llama": {"dense": 15, "attention": 2, "rms_norm": 5, "activation": 2, "product": 2, "embedding": 1},
    "bart": {"dense": 33, "attention": 6, "layer_norm": 12, "activation": 4, "add": 10, "embedding": 2},
    "whisper": {"conv": 2, "dense": 33, "attention": 6, "layer_norm": 12, "activation": 6, "embedding": 1},
}


@pytest.mark.parametrize("name", LAYERS)
def test_layers_are_recognised(name):
    with jax.enable_x64(False):
        case = hf_models.build(name)
        rows = plan(case.fun, COMPOSITE, case.argnums)(case.params, *case.inputs)
    kinds = [row.kind for row in rows]
    assert {kind: kinds.count(kind) for kind in LAYERS[name]} == LAYERS[name], f"\n{rows}"
    assert not {"unknown", "softmax", "resize", "batch_norm"} & set(kinds)


def test_no_architecture_is_left_out():
    """Every file of Flax models in the library has its test."""
    there = Path(transformers.__file__).parent.glob("models/*/modeling_flax_*.py")
    tested = {name.partition("-")[0] for name in hf_models.MODELS}
    assert {path.parent.name for path in there} - {"auto"} == tested
