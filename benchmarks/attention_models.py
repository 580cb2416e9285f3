"""A vision transformer and a GPT-2-like decoder in linen, from their published descriptions.

Blocks are written one after the other, or as one block in a scan over stacked parameters (`scanned`).
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp


class Block(nn.Module):
    """Pre-norm: x + attention(norm(x)), then x + MLP(norm(x))."""

    heads: int
    mlp: int
    causal: bool

    @nn.compact
    def __call__(self, x: jax.Array, _: Any = None) -> tuple[jax.Array, None]:
        length, width = x.shape[-2:]
        mask = jnp.tril(jnp.ones((1, 1, length, length), bool)) if self.causal else None
        x = x + nn.MultiHeadDotProductAttention(self.heads, name="attention")(nn.LayerNorm(name="norm1")(x), mask=mask)
        y = nn.gelu(nn.Dense(self.mlp, name="up")(nn.LayerNorm(name="norm2")(x)))
        return x + nn.Dense(width, name="down")(y), None


class Stack(nn.Module):
    depth: int
    heads: int
    mlp: int
    causal: bool = False
    scanned: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        if self.scanned:
            blocks = nn.scan(Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=self.depth)
            return blocks(self.heads, self.mlp, self.causal, name="blocks")(x, None)[0]
        for i in range(self.depth):
            x, _ = Block(self.heads, self.mlp, self.causal, name=f"block{i}")(x)
        return x


class ViT(nn.Module):
    """Dosovitskiy et al. 2021; the defaults are ViT-B/16. (N, H, W, 3) -> (N, classes)."""

    depth: int = 12
    width: int = 768
    heads: int = 12
    mlp: int = 3072
    patch: int = 16
    classes: int = 1000
    scanned: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.Conv(self.width, (self.patch, self.patch), (self.patch, self.patch), name="patches")(x)
        x = x.reshape(len(x), -1, self.width)
        token = self.param("token", nn.initializers.normal(0.02), (1, 1, self.width))
        x = jnp.concatenate([jnp.broadcast_to(token, (len(x), 1, self.width)), x], 1)
        x = x + self.param("positions", nn.initializers.normal(0.02), (1, *x.shape[1:]))
        x = Stack(self.depth, self.heads, self.mlp, scanned=self.scanned, name="stack")(x)
        return nn.Dense(self.classes, name="head")(nn.LayerNorm(name="norm")(x)[:, 0])


class Decoder(nn.Module):
    """Radford et al. 2019; the defaults are GPT-2's smallest. Ids (N, T), or rows of the table (N, T, width) in their
    place -> logits after the last (N, vocabulary).
    """

    depth: int = 12
    width: int = 768
    heads: int = 12
    vocabulary: int = 50257
    length: int = 1024
    scanned: bool = False

    @nn.compact
    def __call__(self, ids: jax.Array) -> jax.Array:
        embed = nn.Embed(self.vocabulary, self.width, name="tokens")
        rows = embed(ids) if jnp.issubdtype(ids.dtype, jnp.integer) else ids
        x = rows + nn.Embed(self.length, self.width, name="positions")(jnp.arange(ids.shape[1]))
        x = Stack(self.depth, self.heads, 4 * self.width, causal=True, scanned=self.scanned, name="stack")(x)
        return embed.attend(nn.LayerNorm(name="norm")(x)[:, -1])
