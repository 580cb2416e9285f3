"""Networks in linen, from their published descriptions: small, with random parameters, one logit vector per example."""

from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from nets import draw

IDS = np.array([[3, 0, 5, 5, 1], [1, 6, 2, 4, 0]])


class Entry(NamedTuple):
    """apply(variables, x): a network; x: what is explained of it."""

    apply: Callable
    variables: object
    x: np.ndarray | jax.Array


def entry(model: nn.Module, x, apply: Callable | None = None) -> Entry:
    """With parameters drawn from seeds of their own, variances positive."""
    leaves, tree = jax.tree_util.tree_flatten_with_path(model.init(jax.random.key(0), x))
    drawn = [
        draw(50 + i, *v.shape) / np.sqrt(max(v.shape[0], 1) if v.ndim > 1 else 1) for i, (_, v) in enumerate(leaves)
    ]
    drawn = [1 + v**2 if "var" in jax.tree_util.keystr(p) else v for v, (p, _) in zip(drawn, leaves, strict=True)]
    return Entry(apply or model.apply, jax.tree.unflatten(tree, drawn), x)


class CNN(nn.Module):
    """LeCun et al. 1998, with ReLUs."""

    @nn.compact
    def __call__(self, x):
        for width in (4, 5):
            x = nn.max_pool(nn.relu(nn.Conv(width, (3, 3))(x)), (2, 2), (2, 2))
        return nn.Dense(3)(nn.relu(nn.Dense(6)(x.reshape(len(x), -1))))


class ResNet(nn.Module):
    """He et al. 2016, two blocks, the second with a projection."""

    @nn.compact
    def __call__(self, x):
        norm = lambda x: nn.BatchNorm(use_running_average=True)(x)
        x = nn.relu(norm(nn.Conv(4, (3, 3))(x)))
        for width in (4, 6):
            y = nn.relu(norm(nn.Conv(width, (3, 3))(x)))
            y = norm(nn.Conv(width, (3, 3))(y))
            x = x if width == x.shape[-1] else norm(nn.Conv(width, (1, 1))(x))
            x = nn.relu(x + y)
        return nn.Dense(3)(x.mean((1, 2)))


class DenseBlock(nn.Module):
    """Huang et al. 2017: BatchNorm and ReLU before each convolution, everything before concatenated."""

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(3, (3, 3))(x)
        for _ in range(2):
            y = nn.relu(nn.BatchNorm(use_running_average=True)(x))
            x = jnp.concatenate([x, nn.Conv(2, (3, 3))(y)], -1)
        return nn.Dense(3)(nn.avg_pool(x, (2, 2), (2, 2)).mean((1, 2)))


class UNet(nn.Module):
    """Ronneberger et al. 2015: transposed convolutions and skips by concatenation, and one step up by a resize."""

    @nn.compact
    def __call__(self, x):
        skips = []
        for width in (4, 5):
            x = nn.relu(nn.Conv(width, (3, 3))(x))
            skips.append(x)
            x = nn.max_pool(x, (2, 2), (2, 2))
        x = nn.relu(nn.Conv(6, (3, 3))(x))
        up = nn.ConvTranspose(5, (2, 2), (2, 2))(x)
        x = nn.relu(nn.Conv(5, (3, 3))(jnp.concatenate([up, skips.pop()], -1)))
        up = jax.image.resize(x, (len(x), 8, 8, 5), "bilinear")
        x = nn.relu(nn.Conv(4, (3, 3))(jnp.concatenate([up, skips.pop()], -1)))
        return nn.Conv(2, (1, 1))(x)


class Translator(nn.Module):
    """Sutskever et al. 2014: an LSTM reads, another writes; teacher-forced, the last position's logits."""

    @nn.compact
    def __call__(self, ids, said=IDS[:, :3]):
        embed = nn.Embed(7, 4)
        state, _ = nn.RNN(nn.OptimizedLSTMCell(5, param_dtype=jnp.float64), return_carry=True)(embed(ids))
        said = embed(jnp.broadcast_to(said[:1], (len(ids), 3)))
        return nn.Dense(7)(nn.RNN(nn.OptimizedLSTMCell(5, param_dtype=jnp.float64))(said, initial_carry=state))[:, -1]


class LanguageModel(nn.Module):
    """Vaswani et al. 2017, a causal decoder: post-norm, sinusoidal positions, tied weights."""

    @nn.compact
    def __call__(self, ids):
        embed = nn.Embed(7, 6)
        angle = np.arange(ids.shape[1])[:, None] / 100 ** (np.arange(3) / 3)
        x = embed(ids) * np.sqrt(6) + np.concatenate([np.sin(angle), np.cos(angle)], -1)
        mask = nn.make_causal_mask(jnp.ones(ids.shape))
        for _ in range(2):
            x = nn.LayerNorm()(x + nn.MultiHeadDotProductAttention(2)(x, mask=mask))
            x = nn.LayerNorm()(x + nn.Dense(6)(nn.gelu(nn.Dense(8)(x))))
        return embed.attend(x)[:, -1]


class VAE(nn.Module):
    """Kingma and Welling 2014: mean and variance, a sample with its noise as a parameter, the decoder's logits."""

    @nn.compact
    def __call__(self, x):
        h = nn.relu(nn.Dense(8)(x))
        mean, logvar = nn.Dense(3)(h), nn.Dense(3)(h)
        noise = jax.random.normal(jax.random.key(1), mean.shape[1:])
        z = mean + jnp.exp(0.5 * logvar) * noise
        return nn.Dense(x.shape[-1])(nn.relu(nn.Dense(8)(z)))


class Mixture(nn.Module):
    """A mixture of experts (Shazeer et al. 2017): each token to the two best of four, weighted by a softmax."""

    @nn.compact
    def __call__(self, x):
        gates, chosen = lax.top_k(nn.Dense(4)(x), 2)
        experts = self.param("experts", nn.initializers.normal(), (4, x.shape[-1], 5))
        outputs = nn.relu(jnp.einsum("ntd,edf->ntef", x, experts))
        picked = jnp.take_along_axis(outputs, chosen[..., None], 2)
        return nn.Dense(3)((jax.nn.softmax(gates)[..., None] * picked).sum(2).mean(1))


class GraphNet(nn.Module):
    """Message passing (Gilmer et al. 2017): gather along edges, a dense layer, segment sums at the nodes."""

    @nn.compact
    def __call__(self, nodes):
        sender, receiver = np.array([0, 1, 2, 3, 3, 1]), np.array([1, 2, 3, 0, 1, 0])

        def one(nodes):
            for layer in layers:
                messages = nn.relu(layer(nodes[sender]))
                nodes = nodes + jax.ops.segment_sum(messages, receiver, len(nodes))
            return nodes.sum(0)

        layers = [nn.Dense(nodes.shape[-1]) for _ in range(2)]
        return nn.Dense(3)(jnp.stack([one(n) for n in nodes]))


def zoo() -> dict[str, Entry]:
    images = draw(20, 2, 8, 8, 3)
    return {
        "CNN": entry(CNN(), images),
        "ResNet": entry(ResNet(), images),
        "DenseNet": entry(DenseBlock(), images),
        "U-Net": entry(UNet(), images, lambda v, x: UNet().apply(v, x)[:, 3, 4]),
        "LSTM seq2seq": entry(Translator(), IDS),
        "Transformer LM": entry(LanguageModel(), IDS),
        "VAE": entry(VAE(), draw(21, 2, 6)),
        "mixture of experts": entry(Mixture(), draw(22, 2, 4, 5)),
        "message passing": entry(GraphNet(), draw(23, 2, 4, 5)),
    }
