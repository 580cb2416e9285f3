"""The Flax models of Hugging Face transformers, each small and with random numbers; nothing is downloaded.

Text goes in as token ids, images and sound as floats; out come logits.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import transformers

VOCABULARY, EXAMPLES, LENGTH, CLASSES = 40, 2, 6, 5
START, PAD, END = 0, 1, 2

# One meaning, many names: each configuration takes those that it knows.
WIDTH = ("hidden_size", "d_model", "n_embd", "dim", "embedding_size", "word_embed_proj_dim", "projection_dim")
WIDE = ("intermediate_size", "ffn_dim", "d_ff", "hidden_dim", "encoder_ffn_dim", "decoder_ffn_dim", "n_inner")
DEPTH = ("num_hidden_layers", "num_layers", "n_layer", "n_layers", "encoder_layers", "decoder_layers")
HEADS = (
    "num_attention_heads", "num_heads", "n_head", "n_heads", "attention_heads", "encoder_attention_heads",
    "decoder_attention_heads", "num_key_value_heads",
)  # fmt: skip
HEAD = ("d_kv", "head_dim")
SMALL = {
    **dict.fromkeys(WIDTH, 16),
    **dict.fromkeys(WIDE, 24),
    **dict.fromkeys(DEPTH, 2),
    **dict.fromkeys(HEADS, 2),
    **dict.fromkeys(HEAD, 8),
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 16,
    "n_positions": 16,
    "image_size": 16,
    "patch_size": 8,
    "bos_token_id": START,
    "decoder_start_token_id": START,
    "pad_token_id": PAD,
    "eos_token_id": END,
    "forced_eos_token_id": None,
}


def config_of(name: str, **options: Any) -> Any:
    cls = getattr(transformers, f"{name}Config")
    known = inspect.signature(cls).parameters
    return cls(**{**{k: v for k, v in SMALL.items() if k in known}, "num_labels": CLASSES, **options})


def tokens(seed: int = 0, examples: int = EXAMPLES, length: int = LENGTH) -> np.ndarray:
    """Random ids, no padding among them; every example ends in the end token."""
    ids = np.random.default_rng(seed).integers(END + 1, VOCABULARY, (examples, length), np.int32)
    ids[:, -1] = END
    return ids


def floats(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(EXAMPLES, *shape)).astype(np.float32)


@dataclasses.dataclass(frozen=True)
class Model:
    """A class of transformers (`Flax...`), its configuration, what is explained, and what of its output counts.

    batched: the examples, along the leading axes of inputs and logits, do not see each other.
    """

    cls: str
    config: Any
    inputs: dict[str, np.ndarray]
    output: Callable = lambda out: out.logits
    batched: bool = True


@dataclasses.dataclass(frozen=True)
class Case:
    """fun(params, *inputs) -> logits; every input is explained."""

    fun: Callable
    params: Any
    inputs: tuple[jax.Array, ...]
    argnums: tuple[int, ...]
    batched: bool


def build(name: str, dtype: Any = jnp.float32) -> Case:
    """The model of that name in MODELS, parameters and computation in `dtype`."""
    wanted = MODELS[name]
    held = []

    def init() -> Any:
        held.append(getattr(transformers, f"Flax{wanted.cls}")(wanted.config, dtype=dtype))
        return held[0].params

    def fun(params: Any, *inputs: jax.Array) -> jax.Array:
        with old_clip():
            return wanted.output(held[0](**dict(zip(wanted.inputs, inputs, strict=True)), params=params))

    with old_clip():
        shapes = jax.eval_shape(init)  # the model's own numbers are traced only: others are drawn
    inputs = tuple(map(jnp.asarray, wanted.inputs.values()))
    return Case(fun, parameters(shapes, dtype), inputs, tuple(range(1, 1 + len(inputs))), wanted.batched)


def parameters(shapes: Any, dtype: Any) -> Any:
    """Numbers that no model begins with: no bias or mean is 0, no scale is 1, and attention has its preferences."""
    rng = np.random.default_rng(0)

    def draw(path: Any, leaf: Any) -> jax.Array:
        name = path[-1].key
        if name in ("scale", "weight", "var", "weight_g", "lambda1"):
            numbers = rng.uniform(0.5, 1.5, leaf.shape)
        elif leaf.ndim < 2:
            numbers = 0.3 * rng.normal(size=leaf.shape)
        else:
            fan = 1 if name == "embedding" else np.prod(leaf.shape[:-1])
            numbers = 1.5 / np.sqrt(fan) * rng.normal(size=leaf.shape)
        return jnp.asarray(numbers, dtype)

    return jax.tree_util.tree_map_with_path(draw, shapes)


def old_clip() -> Any:
    """`jnp.clip` with the names of its arguments that JAX took away and T5 and LongT5 still write."""
    clip = jnp.clip
    return mock.patch.object(jnp, "clip", lambda x, a_min=None, a_max=None: clip(x, a_min, a_max))


# ---------------------------------------------------------------------------------------------------- the families


def last(out: Any) -> jax.Array:
    """The logits of the next token."""
    return out.logits[:, -1]


def classifier(name: str, length: int = LENGTH, **options: Any) -> Model:
    """Token ids in, a class out."""
    config = config_of(name, **options)
    return Model(f"{name}ForSequenceClassification", config, {"input_ids": tokens(length=length)})


def generator(name: str, head: str = "ForCausalLM", **options: Any) -> Model:
    """Token ids in, the next token out."""
    return Model(name + head, config_of(name, **options), {"input_ids": tokens()}, last)


DECODED = {"decoder_input_ids": tokens(1, length=4)}


def translator(name: str, head: str = "ForConditionalGeneration", **options: Any) -> Model:
    """Token ids into the encoder and into the decoder, the next token out."""
    return Model(name + head, config_of(name, **options), {"input_ids": tokens(), **DECODED}, last)


PIXELS = {"pixel_values": floats(3, 16, 16)}


def vision(name: str, **options: Any) -> Model:
    """Pixels in, a class out."""
    return Model(f"{name}ForImageClassification", config_of(name, **options), PIXELS)


CONVOLUTIONS = {"embedding_size": 8, "hidden_sizes": [8, 8], "depths": [1, 2]}


def image_against_text(cls: str, config: Any) -> Model:
    """Zero-shot classification: two images, three prompts."""
    inputs = {**PIXELS, "input_ids": tokens(examples=3)}
    return Model(cls, config, inputs, lambda out: out.logits_per_image, batched=False)


CLIP = transformers.CLIPConfig(
    config_of("CLIPText").to_dict(), config_of("CLIPVision").to_dict(), projection_dim=SMALL["projection_dim"]
)
VISION_TEXT = transformers.VisionTextDualEncoderConfig.from_vision_text_configs(
    config_of("ViT"), config_of("Bert"), projection_dim=SMALL["projection_dim"]
)

WAVE = floats(64)
WAV2VEC2 = config_of(
    "Wav2Vec2", conv_dim=(8, 8), conv_stride=(4, 2), conv_kernel=(8, 3), num_conv_pos_embeddings=4,
    num_conv_pos_embedding_groups=2, feat_extract_norm="layer", do_stable_layer_norm=True,
)  # fmt: skip
WHISPER = config_of(
    "Whisper", num_mel_bins=4, max_source_positions=8, max_target_positions=8, begin_suppress_tokens=None
)
MEL = {"input_features": floats(4, 16)}


def joined(cls: str, encoder: Any, inputs: dict[str, np.ndarray]) -> Model:
    """An encoder and a GPT-2 that attends to it."""
    decoder = config_of("GPT2", is_decoder=True, add_cross_attention=True, n_positions=128)
    config = getattr(transformers, f"{cls}Config").from_encoder_decoder_configs(encoder, decoder)
    return Model(f"{cls}Model", config, {**inputs, **DECODED}, last)


# ---------------------------------------------------------------------------------------------------- the table

REQUIRED = {
    "resnet": vision("ResNet", **CONVOLUTIONS),
    "vit": vision("ViT"),
    "clip": image_against_text("CLIPModel", CLIP),
    "bert": classifier("Bert"),
    "roberta": classifier("Roberta"),
    "distilbert": classifier("DistilBert"),
    "gpt2": generator("GPT2", "LMHeadModel"),
    "llama": generator("Llama"),
    "bart": translator("Bart"),
    "whisper": Model("WhisperForConditionalGeneration", WHISPER, {**MEL, **DECODED}, last),
}
OTHERS = {
    "albert": classifier("Albert"),
    "bart-classifier": Model("BartForSequenceClassification", config_of("Bart"), {"input_ids": tokens()}),
    "beit": vision("Beit", use_relative_position_bias=True),
    "bert-masked": Model("BertForMaskedLM", config_of("Bert"), {"input_ids": tokens()}, last),
    "big_bird": classifier("BigBird", attention_type="original_full"),
    "big_bird-sparse": classifier("BigBird", 16, attention_type="block_sparse", block_size=2, num_random_blocks=1),
    "blenderbot": translator("Blenderbot"),
    "blenderbot_small": translator("BlenderbotSmall"),
    "bloom": generator("Bloom"),
    "dinov2": vision("Dinov2"),
    "electra": classifier("Electra"),
    "encoder_decoder": joined("EncoderDecoder", config_of("Bert"), {"input_ids": tokens()}),
    "gemma": generator("Gemma"),
    "gpt_neo": generator("GPTNeo", attention_types=[[["global", "local"], 1]], window_size=3),
    "gptj": generator("GPTJ", rotary_dim=4),
    "llama-grouped": generator("Llama", num_key_value_heads=1),
    "longt5": translator("LongT5", local_radius=2),
    "longt5-global": translator(
        "LongT5", local_radius=2, global_block_size=2, encoder_attention_type="transient-global"
    ),
    "marian": translator("Marian", "MTModel"),
    "mbart": translator("MBart"),
    "mistral": generator("Mistral", sliding_window=3),
    "mt5": translator("MT5"),
    "opt": generator("OPT"),
    "pegasus": translator("Pegasus"),
    "regnet": vision("RegNet", **CONVOLUTIONS, groups_width=4),
    "resnet-basic": vision("ResNet", **CONVOLUTIONS, layer_type="basic"),
    "roberta_prelayernorm": classifier("RobertaPreLayerNorm"),
    "roformer": classifier("RoFormer"),
    "speech_encoder_decoder": joined("SpeechEncoderDecoder", WAV2VEC2, {"inputs": WAVE}),
    "t5": translator("T5"),
    "vision_encoder_decoder": joined("VisionEncoderDecoder", config_of("ViT"), PIXELS),
    "vision_text_dual_encoder": image_against_text("VisionTextDualEncoderModel", VISION_TEXT),
    "wav2vec2": Model("Wav2Vec2ForCTC", WAV2VEC2, {"input_values": WAVE}, last),
    "whisper-classifier": Model("WhisperForAudioClassification", WHISPER, MEL),
    "xglm": generator("XGLM"),
    "xlm_roberta": classifier("XLMRoberta"),
}
MODELS = REQUIRED | OTHERS
