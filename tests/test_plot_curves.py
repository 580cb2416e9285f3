"""Curves and rankings: what the Axes hold is what was measured."""

import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("matplotlib")
arrow = pytest.importorskip("pyarrow")

from jaxlrp import plot  # noqa: E402
from jaxlrp.errors import InputError  # noqa: E402
from jaxlrp.evaluate import Curves, Sweep  # noqa: E402
from jaxlrp.evaluate.results import LABEL, labels_of, rows  # noqa: E402
from jaxlrp.evaluate.stream import Layout  # noqa: E402

RNG = np.random.default_rng(0)
FRACTIONS = (0.0, 0.5, 1.0)


def swept(explainers, orders=("morf", "lerf"), fills=("mean", "zero"), images=4):
    """A Sweep of random numbers, without sweeping."""
    manifest = {"explainers": {k: {"variants": v} for k, v in explainers.items()}, "orders": orders, "fills": fills}
    labels = list(labels_of(manifest))
    found = {k: RNG.normal(size=(images, len(labels))) for k in ("score", "auc", "aopc")}
    found["scores"] = RNG.normal(size=(images, len(labels), 3))
    table = rows(0, np.zeros(images, int), found, labels)
    return Sweep(table, [], manifest, Layout((8,), "float32", images, 3, FRACTIONS))


def wanted(sweep, column, **label):
    return np.array([r[column] for r in sweep.table.to_pylist() if all(r[k] == v for k, v in label.items())])


def test_curves_of_a_sweep(tmp_path):
    sweep = swept({"epsilon": 1, "gamma": 2})
    figure = plot.curves(sweep, labels={"gamma 1": "strong"}, title="All", save=tmp_path / "curves.png")
    titles = [f"{o}, fill: {f}" for o in ("lerf", "morf") for f in ("mean", "zero")]
    assert [ax.get_title() for ax in figure.axes] == titles and figure.get_suptitle() == "All"
    for ax, (order, fill) in zip(figure.axes, [t.split(", fill: ") for t in titles], strict=True):
        assert [line.get_label() for line in ax.lines] == ["epsilon", "gamma 0", "strong"]
        for line, (name, variant) in zip(ax.lines, [("epsilon", 0), ("gamma", 0), ("gamma", 1)], strict=True):
            scores = wanted(sweep, "scores", **dict(zip(LABEL, (name, variant, order, fill), strict=True)))
            np.testing.assert_allclose(line.get_xdata(), FRACTIONS)
            np.testing.assert_allclose(line.get_ydata(), scores.mean(0))
    error = wanted(sweep, "scores", explainer="epsilon", order="lerf", fill="mean").std(0, ddof=1) / 2
    band = figure.axes[0].collections[0].get_paths()[0].vertices
    heights = [np.ptp(band[band[:, 0] == x, 1]) for x in FRACTIONS]
    np.testing.assert_allclose(heights, 2 * error)
    assert (tmp_path / "curves.png").stat().st_size > 10_000


def test_curves_without_a_sweep():
    one = Curves(jnp.array([[3.0, 2.0, 0.0], [1.0, 0.0, 0.0]]), jnp.array(FRACTIONS))
    (ax,) = plot.curves(one).axes
    np.testing.assert_allclose(ax.lines[0].get_ydata(), [2, 1, 0])
    assert ax.get_legend() is None
    several = {f"map {i}": Curves(one.scores[:1] + i, one.fractions) for i in range(12)}
    (ax,) = plot.curves(several).axes
    assert [t.get_text() for t in ax.get_legend().get_texts()] == list(several)
    assert len({(line.get_color(), line.get_linestyle()) for line in ax.lines}) == 12
    for wrong in ({}, 3, {"a": 3}):
        with pytest.raises(InputError, match="write a Sweep, Curves, or a dictionary"):
            plot.curves(wrong)


@pytest.mark.parametrize("measure, order, best", [("srg", "", max), ("auc", "morf", min), ("auc", "lerf", max)])
@pytest.mark.parametrize("images", [1, 4])
def test_ranking(tmp_path, measure, order, best, images):
    sweep = swept({"epsilon": 1, "gamma": 3}, images=images)
    figure = plot.ranking(
        sweep, measure, save=tmp_path / "r.pdf", labels={"epsilon": "e"}, **{"order": order} if order else {}
    )
    assert [ax.get_title() for ax in figure.axes] == ["fill: mean", "fill: zero"]
    for ax, fill in zip(figure.axes, ("mean", "zero"), strict=True):
        means = {}
        for name, variant in [("epsilon", 0), *(("gamma", k) for k in range(3))]:
            of = {"explainer": name, "variant": variant, "fill": fill}
            aucs = {o: wanted(sweep, "auc", order=o, **of) for o in ("lerf", "morf")}
            values = aucs[order] if order else aucs["lerf"] - aucs["morf"]
            means["e" if name == "epsilon" else f"{name} {variant}"] = values.mean()
        told = [t.get_text() for t in ax.get_yticklabels()]
        np.testing.assert_allclose([bar.get_width() for bar in ax.patches], [means[name] for name in told])
        assert means[told[0]] == best(means.values()) and ax.yaxis_inverted()
    assert (tmp_path / "r.pdf").exists()


def test_rankings_that_cannot_be():
    sweep = swept({"epsilon": 1})
    with pytest.raises(InputError, match="measure='scores'; write"):
        plot.ranking(sweep, "scores")
    with pytest.raises(InputError, match="order='random': the sweep has"):
        plot.ranking(sweep, "auc", order="random")
