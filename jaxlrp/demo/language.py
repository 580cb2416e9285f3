"""A character-level LSTM that tells 20 European languages apart.

Architecture: embeddings of characters, two bidirectional LSTM layers of 150 units in each direction, and a dense layer
whose outputs are summed over the characters. 1,010,720 parameters.
Weights: PyPI package languageidentifier 1.1.1 (M. Toftrup et al., A reproduction of Apple's bi-directional LSTM models
for language identification in short strings, EACL 2021, student research workshop); redistribution and use are for
academic purposes, so they are read where they are installed.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.traverse_util import unflatten_dict

from jaxlrp.demo import checkpoint, packages

PAD = 0
LAYERS = 2
DIRECTIONS = {"forward": "", "backward": "_reverse"}  # and how PyTorch's names of weights end
GATES = "ifgo"  # input, forget, cell, output, in the order of PyTorch's rows; Flax names them so


class LanguageIdentifier(nn.Module):
    """Character ids (n, T), padded with 0 -> logits (n, 20): of a sentence, the sum over its characters."""

    @nn.compact
    def __call__(self, ids: jax.Array) -> jax.Array:
        real = ids != PAD
        x = nn.Embed(682, 150, name="characters")(ids)
        for layer in range(LAYERS):
            forward, backward = (nn.RNN(nn.OptimizedLSTMCell(150, name=f"{name}{layer}")) for name in DIRECTIONS)
            x = nn.Bidirectional(forward, backward)(x, seq_lengths=real.sum(1))
        return (nn.Dense(20, name="languages")(x) * real[..., None]).sum(1)


def load() -> tuple[LanguageIdentifier, dict[str, Any], Callable, list[str]]:
    """(model, variables, encode, names of the languages), encode(sentences) = ids int32 (n, T).

    ImportError if the package that holds them is not installed.
    """
    found = checkpoint.load(packages.folder("LanguageIdentifier", "text") / "LID_mixed_model.pkl")
    index = found["char_to_idx"]
    unknown = len(index)

    def encode(sentences: Sequence[str]) -> np.ndarray:
        ids = np.full((len(sentences), max(map(len, sentences))), PAD, np.int32)
        for row, sentence in zip(ids, sentences, strict=True):
            row[: len(sentence)] = [index.get(character, unknown) for character in sentence]
        return ids

    names = sorted(found["lang_to_idx"], key=found["lang_to_idx"].__getitem__)
    return LanguageIdentifier(), {"params": convert(found["model_state_dict"])}, encode, names


def convert(state: dict[str, np.ndarray]) -> dict[str, Any]:
    """PyTorch's state dict, kernels (out, in) with the four gates below one another -> params, float32."""
    params = {
        "characters/embedding": state["char_embeddings.weight"],
        "languages/kernel": state["hidden2lang.weight"].T,
        "languages/bias": state["hidden2lang.bias"],
    }
    for layer in range(LAYERS):
        for name, end in DIRECTIONS.items():
            kernels = {part: np.split(state[f"lstm.weight_{part}h_l{layer}{end}"].T, 4, 1) for part in "ih"}
            # PyTorch has a bias for the input and one for the state, which are only ever summed
            bias = np.split(sum(state[f"lstm.bias_{part}h_l{layer}{end}"] for part in "ih"), 4)
            for i, gate in enumerate(GATES):
                params[f"{name}{layer}/i{gate}/kernel"] = kernels["i"][i]
                params[f"{name}{layer}/h{gate}/kernel"] = kernels["h"][i]
                params[f"{name}{layer}/h{gate}/bias"] = bias[i]
    return unflatten_dict({name: jnp.asarray(array) for name, array in params.items()}, sep="/")
