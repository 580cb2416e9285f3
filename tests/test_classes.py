"""Many targets share a forward pass, and each is explained as alone."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlrp import Composite, composites, lrp, per_target, rules, select
from nets import close, draw


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.BatchNorm(use_running_average=True)(nn.Conv(4, (3, 3))(x)))
        return nn.Dense(5)(nn.relu(nn.Conv(4, (3, 3))(x)).reshape(len(x), -1))


X = draw(1, 2, 4, 4, 3)
PARAMS = Net().init(jax.random.key(0), X)
BOX = composites.epsilon_gamma_box(-3.0, 3.0)


@pytest.mark.parametrize(
    "composite, targets, batch_size",
    [
        (composites.epsilon_plus(), None, None),
        (BOX, None, 2),
        (composites.epsilon_alpha2_beta1_flat(), [3, 0, 3], 2),
        (BOX, [[0, 1], [4, 2]], None),
        (composites.epsilon(), [[0, 1], [4, 2]], 1),
    ],
)
def test_each_target_is_explained_as_alone(composite, targets, batch_size):
    each = jax.jit(per_target(Net().apply, composite, 1, targets, batch_size=batch_size))(PARAMS, X)
    alone = [
        jax.jit(lrp(Net().apply, composite, 1, np.asarray(t)))(PARAMS, X)
        for t in (range(5) if targets is None else targets)
    ]
    close(each, jnp.stack(alone), 1e-10)


def test_one_forward_pass_and_one_of_each_denominator():
    """Five targets take the convolutions that one takes, the transposed ones on five times as many images."""
    composite = Composite([(select.kind("conv"), rules.ZPlus())]) + composites.epsilon()

    def count(explain):
        return jax.jit(explain).lower(PARAMS, X).compile().as_text().count(" convolution(")

    each = per_target(Net().apply, composite, 1, range(5))
    assert count(each) == count(lrp(Net().apply, composite, 1, 0)) > 0


def test_several_arguments_ids_and_one_example():
    f = lambda a, b: jnp.stack([a @ b, (a * a).sum()])
    a, b = draw(2, 3), draw(3, 3)
    found = per_target(f, composites.epsilon(), (0, 1))(a, b)
    alone = [lrp(f, composites.epsilon(), (0, 1), t)(a, b) for t in (0, 1)]
    close(found, jax.tree.map(lambda *v: jnp.stack(v), *alone))
    table = draw(4, 7, 3)
    ids = jnp.asarray([[1, 2, 2]])
    g = lambda ids: table[ids].sum(1)
    close(per_target(g, composites.epsilon())(ids)[1], lrp(g, composites.epsilon(), target=1)(ids))


def test_traced_targets():
    explain = jax.jit(lambda t: per_target(Net().apply, BOX, 1, t)(PARAMS, X))
    close(explain(jnp.asarray([1, 2])), per_target(Net().apply, BOX, 1, [1, 2])(PARAMS, X), 1e-10)
