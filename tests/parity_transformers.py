"""The transformers of test_parity_transformers.py: others' in torch, and ours in plain JAX that read their weights.

The twins are written from the papers (Devlin et al. 2019; Dosovitskiy et al. 2021) and keep torch's layout: a kernel is
(out, in), images are NCHW. Parameters are {module: {name: array}}, under the names that the torch models have.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from jax import lax

import parity_models  # noqa: F401  first: it sees to it that torchvision can be imported

# isort: split

import zennit.core
from lxt.efficient import monkey_patch, monkey_patch_zennit, patches
from lxt.efficient.models import vit_torch
from torchvision.models import vision_transformer
from transformers import BertConfig
from transformers.activations import GELUActivation
from transformers.models.bert import modeling_bert

LAYERS, HEADS, WIDTH, HIDDEN, CLASSES = 2, 2, 16, 32, 5
VOCABULARY, TOKENS = 50, 7
SIZE, PATCH = 12, 4

Parameters = dict[str, dict[str, jax.Array]]


# ---------------------------------------------------------------------------------------------------- torch


def torch_bert(seed: int, attention: str = "eager") -> torch.nn.Module:
    """`attention`: "eager" or "sdpa", the two implementations; either is the patched one where it is patched."""
    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        intermediate_size=HIDDEN,
        max_position_embeddings=TOKENS,
        num_labels=CLASSES,
        attn_implementation=attention,
    )
    return randomise(modeling_bert.BertForSequenceClassification(config), seed)


def torch_vit(seed: int) -> torch.nn.Module:
    model = vision_transformer.VisionTransformer(SIZE, PATCH, LAYERS, HEADS, WIDTH, HIDDEN, num_classes=CLASSES)
    return randomise(model, seed)


def randomise(model: torch.nn.Module, seed: int) -> torch.nn.Module:
    """In float64, for inference: kernels that keep variances, biases, and norms' scales of either sign."""
    rng = np.random.default_rng(seed)
    scales = {m.weight for m in model.modules() if isinstance(m, torch.nn.LayerNorm)}
    for name, value in model.named_parameters():
        shape = tuple(value.shape)
        if value in scales:
            drawn = rng.uniform(0.5, 1.5, shape) * rng.choice([1, -1], shape, p=[0.8, 0.2])
        elif name.endswith("bias"):
            drawn = 0.3 * rng.standard_normal(shape)
        elif "embedding" in name or "token" in name:
            drawn = rng.standard_normal(shape)
        else:
            drawn = rng.standard_normal(shape) * np.prod(shape[1:]) ** -0.5
        value.data = torch.from_numpy(drawn)
    return model.double().eval().requires_grad_(False)


def parameters(model: torch.nn.Module) -> Parameters:
    tree: Parameters = {}
    for path, value in model.named_parameters():
        module, _, name = path.rpartition(".")
        tree.setdefault(module, {})[name] = jnp.asarray(value.numpy())
    return tree


# ---------------------------------------------------------------------------------------------------- lxt


def patch_attention(wrap: Callable, functional: ModuleType) -> bool:
    """Puts lxt's wrapper of attention functions around the one that torch's modules and transformers' call."""
    forward = functional.scaled_dot_product_attention
    wrapped = wrap(lambda _, *operands, **options: forward(*operands, **options))
    functional.scaled_dot_product_attention = lambda *operands, **options: wrapped(None, *operands, **options)
    return True


_passes = partial(patches.patch_method, patches.non_linear_forward, keep_original=True)

# lxt has no CP-LRP for BERT and no AttnLRP for torchvision's transformer; these are made of its own patches.
CP_BERT = {
    GELUActivation: _passes,
    torch.nn.Tanh: _passes,
    torch.nn.LayerNorm: partial(patches.patch_method, patches.layer_norm_forward),
    torch.nn.functional: partial(patch_attention, patches.cp_wrap_attention_forward),
}
ATTNLRP_VIT = {
    **{owner: patch for owner, patch in vit_torch.cp_LRP.items() if owner is not torch.nn.MultiheadAttention},
    torch.nn.functional: partial(patch_attention, patches.wrap_attention_forward),
}
TOUCHED = (*CP_BERT, *vit_torch.cp_LRP, torch.nn.Dropout, zennit.core.BasicHook, modeling_bert)


@contextmanager
def patched(module: ModuleType, patch_map: dict[Any, Callable] | None = None) -> Iterator[None]:
    """lxt's patches of `module`, by its own map where none is given, and of zennit.

    Undone at the end: they change classes that every other test uses.
    """
    before = [dict(vars(owner)) for owner in TOUCHED]
    try:
        monkey_patch(module, patch_map)
        monkey_patch_zennit()
        yield
    finally:
        for owner, attributes in zip(TOUCHED, before, strict=True):
            for name in set(vars(owner)) - set(attributes):
                delattr(owner, name)
            for name, value in attributes.items():
                if vars(owner)[name] is not value:
                    setattr(owner, name, value)


# ---------------------------------------------------------------------------------------------------- JAX


def dense(p: Parameters, name: str, x: jax.Array) -> jax.Array:
    return x @ p[name]["weight"].T + p[name]["bias"]


def layer_norm(p: Parameters, name: str, x: jax.Array, epsilon: float) -> jax.Array:
    centred = x - x.mean(-1, keepdims=True)
    variance = (centred**2).mean(-1, keepdims=True)
    return centred / jnp.sqrt(variance + epsilon) * p[name]["weight"] + p[name]["bias"]


def attention(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array | bool = True) -> jax.Array:
    """(N, T, WIDTH) each; `mask`: which keys count, for (N, heads, queries, keys)."""
    q, k, v = (x.reshape(*x.shape[:2], HEADS, -1) for x in (q, k, v))
    scores = jnp.einsum("nqhd,nkhd->nhqk", q, k) / jnp.sqrt(q.shape[-1])
    weights = jax.nn.softmax(jnp.where(mask, scores, -jnp.inf))
    weighted = jnp.einsum("nhqk,nkhd->nqhd", weights, v)
    return weighted.reshape(*weighted.shape[:2], WIDTH)


def mlp(p: Parameters, into: str, out: str, x: jax.Array) -> jax.Array:
    return dense(p, out, jax.nn.gelu(dense(p, into, x), approximate=False))


def bert(p: Parameters, ids: jax.Array, mask: jax.Array) -> jax.Array:
    """Logits (N, CLASSES) of token ids (N, T); `mask` (N, T): 0 where a sentence is padded."""
    return bert_of(p, p["bert.embeddings.word_embeddings"]["weight"][ids], mask)


def bert_of(p: Parameters, words: jax.Array, mask: jax.Array) -> jax.Array:
    """Likewise, of the word embeddings (N, T, WIDTH)."""

    def norm(name: str, x: jax.Array) -> jax.Array:
        return layer_norm(p, f"bert.{name}.LayerNorm", x, 1e-12)

    kinds = p["bert.embeddings.token_type_embeddings"]["weight"][0]
    x = norm("embeddings", words + kinds + p["bert.embeddings.position_embeddings"]["weight"][: words.shape[1]])
    for i in range(LAYERS):
        layer = f"encoder.layer.{i}"
        q, k, v = (dense(p, f"bert.{layer}.attention.self.{name}", x) for name in ("query", "key", "value"))
        y = attention(q, k, v, mask[:, None, None, :] > 0)
        x = norm(f"{layer}.attention.output", x + dense(p, f"bert.{layer}.attention.output.dense", y))
        y = mlp(p, f"bert.{layer}.intermediate.dense", f"bert.{layer}.output.dense", x)
        x = norm(f"{layer}.output", x + y)
    return dense(p, "classifier", jnp.tanh(dense(p, "bert.pooler.dense", x[:, 0])))


def vit(p: Parameters, images: jax.Array) -> jax.Array:
    """Logits (N, CLASSES) of images (N, 3, SIZE, SIZE)."""

    def norm(name: str, x: jax.Array) -> jax.Array:
        return layer_norm(p, f"encoder.{name}", x, 1e-6)

    conv = p["conv_proj"]
    patches = lax.conv_general_dilated(images, conv["weight"], (PATCH, PATCH), "VALID") + conv["bias"][:, None, None]
    x = patches.reshape(len(images), WIDTH, -1).swapaxes(1, 2)
    token = jnp.broadcast_to(p[""]["class_token"], (len(images), 1, WIDTH))
    x = jnp.concatenate([token, x], 1) + p["encoder"]["pos_embedding"]
    for i in range(LAYERS):
        layer = f"layers.encoder_layer_{i}"
        mixer = f"encoder.{layer}.self_attention"
        packed = norm(f"{layer}.ln_1", x) @ p[mixer]["in_proj_weight"].T + p[mixer]["in_proj_bias"]
        x = x + dense(p, f"{mixer}.out_proj", attention(*jnp.split(packed, 3, -1)))
        x = x + mlp(p, f"encoder.{layer}.mlp.0", f"encoder.{layer}.mlp.3", norm(f"{layer}.ln_2", x))
    return dense(p, "heads.head", norm("ln", x)[:, 0])
