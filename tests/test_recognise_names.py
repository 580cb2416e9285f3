"""Names of recognised layers: those of their parameters, else the name stack's, else the position."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

import models
from models import batch_norm, conv, dense
from nets import quick_compilation  # noqa: F401
from recognition import names


def test_names_of_layers_that_share_weights():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            shared, other = nn.Conv(3, (3, 3)), nn.Conv(3, (3, 3))
            return nn.relu(shared(nn.relu(other(nn.relu(shared(x))))))

    x = models.images()
    params = Net().init(jax.random.key(0), x)["params"]
    got = names(lambda x, params: Net().apply({"params": params}, x), x, params)
    assert got == ["Conv_0", "Conv_1", "Conv_0#2"]
    assert names(lambda x, p: dense(jnp.tanh(dense(jnp.tanh(dense(x, p)), p)), p), np.ones(3), {
        "kernel": np.ones((3, 3)), "bias": np.ones(3),
    }) == ["kernel", "kernel#2", "kernel#3"]  # fmt: skip


def test_names_from_parameters():
    x, w = np.ones((2, 3)), np.ones((3, 3))
    assert names(lambda x, p: x @ p["encoder"]["layer_0"]["kernel"], x, {"encoder": {"layer_0": {"kernel": w}}}) == [
        "encoder/layer_0"
    ]
    assert names(lambda x, w: x @ w, x, w) == ["w"]
    assert names(lambda x, layers: (x @ layers[0]["w"]) @ layers[1]["w"], x, [{"w": w}, {"w": w}]) == ["0", "1"]
    # an argument's name is prefixed only where two arguments have the same path
    two = lambda x, first, second: (x @ first["a"]["w"]) @ second["a"]["w"] @ second["b"]["w"]
    assert names(two, x, {"a": {"w": w}}, {"a": {"w": w}, "b": {"w": w}}) == ["first/a", "second/a", "b"]


def test_names_come_from_the_kernel():
    """And not from the bias, nor from the norm that was folded into it."""
    function = lambda x, p: batch_norm(p["later"]["bias"] + conv(x, p["stem"]["kernel"]), p["norm"])
    p = {"later": {"bias": np.zeros(4)}, "stem": models.numbers()["stem"], "norm": models.numbers()["norm"]}
    assert names(function, models.images(), p) == ["stem"]


def test_names_where_parameters_are_closed_over():
    """The name stack, where the model leaves one; else the position."""
    linen, _, plain = models.cnns()
    x = models.images()
    assert names(lambda x: linen.apply(x, linen.parameters), x) == ["LinenCNN/stem", "LinenCNN/block", "LinenCNN/head"]
    assert names(lambda x: plain.apply(x, plain.parameters), x) == ["conv[0]", "conv[1]", "dense[0]"]
    w = np.ones((3, 3))

    def scoped(x):
        with jax.named_scope("first"):
            x = jnp.tanh(x @ w)
        return x @ w

    assert names(scoped, np.ones(3)) == ["first", "dense[1]"]
