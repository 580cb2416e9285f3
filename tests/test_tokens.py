"""Integer inputs: the relevance of an id is the sum over what it selects, however it is looked up."""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax

from jaxlrp import Composite, composites, lrp, plan, rewrite, rules, select, value_and_lrp
from jaxlrp.errors import InputError, UnknownPrimitiveError
from jaxlrp.evaluate import conservation
from nets import close, draw, quick_compilation  # noqa: F401

IDS = np.array([[3, 0, 5, 5], [1, 6, 2, 4]])
TABLE, W = draw(1, 7, 4), draw(2, 4, 3)
EPSILON = Composite([(select.kind("dense", "scale", "add", "reduce"), rules.Zero())])
EMBED = nn.Embed(7, 4)


def head(rows: jax.Array) -> jax.Array:
    """What follows the embedding: order matters, so that no two positions have the same relevance."""
    weights = jnp.arange(1.0, rows.shape[-2] + 1)[:, None]
    return jnp.tanh((rows * weights).sum(-2) @ W)


def looped(ids: jax.Array) -> jax.Array:
    """Rows looked up one by one, in a scan whose carry is the last id."""
    step = lambda last, i: (i, TABLE[i] + 0.0 * TABLE[last])
    return jax.vmap(lambda row: lax.scan(step, 0, row)[1])(ids)


LOOKUPS: dict[str, Callable] = {
    "index": lambda ids: TABLE[ids],
    "take": lambda ids: jnp.take(TABLE, ids, axis=0),
    "take, clipped": lambda ids: jnp.take(TABLE, ids, axis=0, mode="clip"),
    "take along the last axis": lambda ids: jnp.moveaxis(jnp.take(TABLE.T, ids, axis=1), 0, -1),
    "negative ids": lambda ids: TABLE[ids - 7],
    "clamped": lambda ids: TABLE[jnp.clip(ids, 0, 6)],
    "narrow": lambda ids: TABLE[ids.astype(jnp.int8)],
    "one-hot": lambda ids: jax.nn.one_hot(ids, 7) @ TABLE,
    "one-hot by hand": lambda ids: (ids[..., None] == jnp.arange(7)).astype(float) @ TABLE,
    "linen": lambda ids: EMBED.apply({"params": {"embedding": TABLE}}, ids),
    "nnx": lambda ids: _nnx()(ids),
    "vmap": lambda ids: jax.vmap(jax.vmap(lambda i: TABLE[i]))(ids),
    "dynamic slice": lambda ids: jnp.stack([lax.dynamic_slice(TABLE, (i, 0), (1, 4)) for i in ids.ravel()]).reshape(
        *ids.shape, 4
    ),
    "jit": jax.jit(lambda ids: TABLE[ids]),
    "remat": jax.checkpoint(lambda ids: TABLE[ids]),
    "cond": lambda ids: lax.cond(ids.sum() > 0, lambda i: TABLE[i], lambda i: TABLE[i] * 2, ids),
    "scan": lambda ids: lax.scan(lambda c, i: (c, TABLE[i]), 0, ids.T)[1].swapaxes(0, 1),
    "scan with ids in the carry": looped,
    "cut and joined": lambda ids: TABLE[jnp.concatenate([ids[:, :2], ids[:, 2:]], 1)],
    "masked by bits": lambda ids: TABLE[ids & 7],
    "one-hot by where": lambda ids: jnp.where(ids[..., None] == jnp.arange(7), 1.0, 0.0) @ TABLE,
    "padded": lambda ids: TABLE[jnp.pad(ids, ((0, 0), (1, 0)))][:, 1:],
    "updated": lambda ids: TABLE[jnp.zeros((2, 5), int).at[:, 1:].set(ids)][:, 1:],
    "chosen": lambda ids: TABLE[jnp.where(ids == 100, 0, ids)],
    "split": lambda ids: jnp.concatenate([TABLE[i] for i in jnp.split(ids, 2, 1)], 1),
}  # fmt: skip


def _nnx() -> nnx.Embed:
    embed = nnx.Embed(7, 4, dtype=jnp.float64, param_dtype=jnp.float64, rngs=nnx.Rngs(0))
    embed.embedding.set_value(TABLE)
    return embed


@pytest.mark.parametrize("name", LOOKUPS)
def test_relevance_is_that_of_the_rows(name):
    f = lambda ids: head(LOOKUPS[name](ids))
    expected = lrp(head, EPSILON, target=1)(jnp.asarray(TABLE[IDS])).sum(-1)
    value, relevance = value_and_lrp(f, EPSILON, target=1)(IDS)
    close(value, f(IDS))
    assert relevance.shape == IDS.shape and jnp.issubdtype(relevance.dtype, jnp.floating)
    close(relevance, expected, 1e-12)
    close(jax.jit(lrp(f, EPSILON, target=1))(IDS), expected, 1e-12)
    close(jax.vmap(lrp(lambda i: f(i[None])[0], EPSILON, target=1))(IDS), expected, 1e-12)


def test_masks_and_positions_made_of_ids_carry_nothing():
    """Padding masks are comparisons, positions counts of them: all relevance is at the words."""

    def f(table, ids):
        mask = ids != 0
        positions = jnp.cumsum(mask, -1) * mask
        rows = table[ids] + draw(3, 5, 4)[positions]
        return head(rows * mask[..., None])

    kept = (IDS != 0)[..., None]
    positions = draw(3, 5, 4)[np.cumsum(IDS != 0, -1) * (IDS != 0)]
    expected = lrp(lambda rows: head((rows + positions) * kept), EPSILON)(jnp.asarray(TABLE[IDS])).sum(-1)
    close(lrp(f, EPSILON, 1)(TABLE, IDS), expected, 1e-12)
    assert expected[0, 1] == 0


@pytest.mark.parametrize("where", [False, True])
def test_a_mask_beside_the_ids_has_none(where):
    """However it is applied; a leaf that selects nothing is no error where another one does."""
    batch = {"ids": IDS, "mask": (IDS != 0).astype(int)}

    def f(batch):
        rows, mask = TABLE[batch["ids"]], batch["mask"][..., None]
        return head(jnp.where(mask > 0, rows, 0) if where else rows * mask)

    relevance = lrp(f, EPSILON)(batch)
    expected = lrp(lambda rows: head(rows * (IDS != 0)[..., None]), EPSILON)(jnp.asarray(TABLE[IDS])).sum(-1)
    close(relevance["ids"], expected, 1e-12)
    assert not relevance["mask"].any()


def test_several_arguments_ids_among_them():
    def f(ids, x, flag=True):
        return head(TABLE[ids["left"]] + x) + head(TABLE[ids["right"]])

    ids, x = {"left": IDS, "right": IDS[::-1]}, draw(4, 2, 4, 4)
    relevance = lrp(f, EPSILON, argnums=(0, 1))(ids, x)
    assert [r.shape for r in jax.tree.leaves(relevance)] == [(2, 4), (2, 4), (2, 4, 4)]
    rows = lambda left, right, x: head(left + x) + head(right)
    left, right, expected = lrp(rows, EPSILON, (0, 1, 2))(TABLE[ids["left"]], TABLE[ids["right"]], x)
    close(relevance[0]["left"], left.sum(-1), 1e-12)
    close(relevance[0]["right"], right.sum(-1), 1e-12)
    close(relevance[1], expected, 1e-12)


def test_ids_in_two_tables_have_the_sum_of_both():
    other = draw(5, 7, 4)
    f = lambda ids: head(TABLE[ids] * 2) + head(other[ids])
    parts = [lrp(g, EPSILON)(IDS) for g in (lambda i: head(TABLE[i] * 2), lambda i: head(other[i]))]
    close(lrp(f, EPSILON)(IDS), parts[0] + parts[1], 1e-9)


@pytest.mark.smoke
def test_a_model_with_its_plan_ledger_and_layers():
    class Classifier(nn.Module):
        @nn.compact
        def __call__(self, ids):
            x = nn.Embed(7, 4)(ids) + self.param("positions", nn.initializers.normal(1.0), (4, 4))
            x = nn.relu(nn.Dense(6)(nn.LayerNorm()(x)))
            return nn.Dense(3)(x.mean(1))

    model = Classifier()
    params = jax.tree.map(lambda v: draw(6, *v.shape), model.init(jax.random.key(0), IDS))
    rows = plan(model.apply, EPSILON, argnums=1)(params, IDS)
    assert [(r.name, r.kind) for r in rows][0] == ("params/Embed_0", "embedding")
    assert not rows[0].to_dict()["source"].startswith("<")
    ledger = conservation(model.apply, EPSILON, argnums=1, target=np.array([0, 2]))(params, IDS)
    size = max(r.size.max() for r in ledger)
    assert max(np.abs(r.gap).max() for r in ledger) < 1e-12 * size and np.abs(ledger.gap).max() < 1e-12 * size
    _, relevance, layers = value_and_lrp(
        model.apply, EPSILON, argnums=1, target=0, layers=select.kind("embedding")
    )(params, IDS)  # fmt: skip
    close(relevance, layers["params/Embed_0"].sum(-1), 1e-12)
    everything = value_and_lrp(model.apply, composites.guided_backprop(), argnums=1, target=0)(params, IDS)[1]
    assert np.abs(everything).max() > 0


def test_ids_that_select_nothing_are_an_error():
    with pytest.raises(InputError, match=r"0 \(ids\) has dtype int64 and selects nothing.*gt \(test_tokens.py"):
        lrp(lambda ids: (ids > 2).astype(float), EPSILON)(IDS)
    with pytest.raises(InputError, match="floating-point"):
        rewrite(lambda ids: TABLE[ids], EPSILON)(IDS)


def test_an_index_of_several_ids_is_an_error():
    with pytest.raises(UnknownPrimitiveError, match="gather.*several indices"):
        lrp(lambda i, j: TABLE[i, j], EPSILON, argnums=(0, 1))(IDS, IDS % 4)
    close(lrp(lambda i: TABLE[i, IDS % 4], EPSILON)(IDS), TABLE[IDS, IDS % 4], 1e-12)


def test_constant_ids_have_a_row_in_the_ledger():
    """A start token that the model puts before the ids."""
    f = lambda ids: head(TABLE[jnp.concatenate([jnp.full((len(ids), 1), 2), ids[:, :-1]], 1)])
    ledger = conservation(f, EPSILON, target=1)(IDS)
    (row,) = [row for row in ledger if row.name == "constant ids"]
    rows = lrp(head, EPSILON, target=1)(jnp.asarray(TABLE[np.concatenate([[[2], [2]], IDS[:, :-1]], 1)]))
    close(row.ended, rows.sum(-1)[:, 0], 1e-10)
    assert np.abs(ledger.gap).max() < 1e-12 * np.abs(ledger.start).max()
    assert "constant ids" not in [row.name for row in conservation(lambda ids: head(TABLE[ids]), EPSILON)(IDS)]
