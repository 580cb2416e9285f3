"""Curves of pixel flipping, and the ranking that they give: the part of `jaxlrp.plot` that draws measurements."""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure

from .errors import InputError
from .evaluate import Curves, Sweep

_COLOURS = colormaps["tab10"].colors  # type: ignore[attr-defined]
_DASHES = ("-", "--", ":", "-.")  # ten colours each: forty lines can be told apart


def curves(
    measured: Any, *, labels: Mapping[str, str] | None = None, title: str | None = None,
    save: str | PathLike | None = None,
) -> Figure:  # fmt: skip
    """Draws the mean score against the part replaced, with a band of one standard error, and returns the Figure.

    measured: a `Sweep`, with a row of panels per order, a column per fill, and a line per explainer and variant; or
    `Curves`, or {name: Curves}, in one panel. labels: {name: what the legend says}, names as "gamma" or, of a variant,
    "gamma 3". `save` writes the Figure in the format of the file's suffix (.png, .pdf, .svg).

    InputError for anything else, an empty dictionary, or a sweep without images.
    """
    panels: dict[tuple[str, str], dict[str, Any]] = {}
    if isinstance(measured, Sweep):
        rows = measured.means("scores").to_pylist()
        for row, name in zip(rows, _names(rows), strict=True):
            line = (measured.fractions, np.array(row["mean"]), np.array(row["error"]))
            panels.setdefault((row["order"], row["fill"]), {})[name] = line
    else:
        given = {"": measured} if isinstance(measured, Curves) else measured
        if not isinstance(given, Mapping) or not given or not all(isinstance(c, Curves) for c in given.values()):
            raise InputError(f"curves({measured!r}): write a Sweep, Curves, or a dictionary from names to Curves")
        panels["", ""] = {name: _line(c) for name, c in given.items()}
    orders, fills = (list(dict.fromkeys(place[i] for place in panels)) for i in (0, 1))
    figure = Figure(figsize=(3.6 * len(fills) + 0.6, 2.8 * len(orders) + 0.4), layout="compressed")
    axes = figure.subplots(len(orders), len(fills), squeeze=False, sharex=True, sharey=True)
    for (order, fill), lines in panels.items():
        ax = axes[orders.index(order), fills.index(fill)]
        for i, (name, (fractions, mean, error)) in enumerate(lines.items()):
            style = {"color": _COLOURS[i % 10], "linestyle": _DASHES[i // 10 % 4]}
            ax.plot(fractions, mean, label=(labels or {}).get(name, name), linewidth=1.2, **style)
            ax.fill_between(fractions, mean - error, mean + error, color=style["color"], alpha=0.2, linewidth=0)
        ax.set_title(", ".join(v for v in (order, f"fill: {fill}" if fill else "") if v), fontsize=9)
        ax.spines[["top", "right"]].set_visible(False)
    for ax in axes[-1]:
        ax.set_xlabel("part replaced", fontsize=9)
    for ax in axes[:, 0]:
        ax.set_ylabel("score", fontsize=9)
    if any(name for lines in panels.values() for name in lines):
        axes[0, -1].legend(fontsize=7, frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    return _finished(figure, title, save)


def ranking(
    sweep: Sweep, measure: str = "srg", *, order: str = "morf", labels: Mapping[str, str] | None = None,
    title: str | None = None, save: str | PathLike | None = None,
) -> Figure:  # fmt: skip
    """Draws a bar per explainer and variant, sorted, one panel per fill, and returns the Figure.

    A bar is the mean over the images, its whisker one standard error. measure: as in `Sweep.means`, of numbers: "srg",
    or of one `order` "auc" or "aopc". The best is on top: the lowest for the "auc" of "morf" and the "aopc" of "lerf",
    else the highest. labels and `save` as in `curves`. InputError as `Sweep.means`, and for an order it does not have.
    """
    if measure not in ("srg", "auc", "aopc"):
        raise InputError(f'measure={measure!r}; write "srg", "auc" or "aopc"')
    rows = sweep.means(measure).to_pylist()
    if measure != "srg" and order not in sweep.manifest["orders"]:
        raise InputError(f"order={order!r}: the sweep has {sweep.manifest['orders']}")
    named = [
        {**row, "name": name} for row, name in zip(rows, _names(rows), strict=True) if row.get("order", order) == order
    ]
    fills = list(dict.fromkeys(row["fill"] for row in named))
    lowest = (measure, order) in (("auc", "morf"), ("aopc", "lerf"))
    count = len(named) // len(fills)
    figure = Figure(figsize=(3.4 * len(fills) + 0.6, 0.24 * count + 1.1), layout="compressed")
    axes = figure.subplots(1, len(fills), squeeze=False)[0]
    for ax, fill in zip(axes, fills, strict=True):
        bars = [row for row in named if row["fill"] == fill]
        bars.sort(key=lambda row: row["mean"] if lowest else -row["mean"])
        names = [(labels or {}).get(row["name"], row["name"]) for row in bars]
        ax.barh(range(count), [row["mean"] for row in bars], xerr=[row["error"] for row in bars], color="#7a6fbd")
        ax.set_yticks(range(count), labels=names, fontsize=7)
        ax.invert_yaxis()
        ax.axvline(0, color="0.6", linewidth=0.5)
        ax.set_title(f"fill: {fill}", fontsize=9)
        ax.set_xlabel("symmetric relevance gain" if measure == "srg" else f"{measure.upper()}, {order}", fontsize=9)
        ax.spines[["top", "right"]].set_visible(False)
    return _finished(figure, title, save)


def _names(rows: list[dict[str, Any]]) -> list[str]:
    """ "gamma 3": explainers, with the variant where there are several."""
    several = {row["explainer"] for row in rows if row["variant"]}
    return [f"{row['explainer']} {row['variant']}" if row["explainer"] in several else row["explainer"] for row in rows]


def _line(found: Curves) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    scores = np.asarray(found.scores, np.float64)
    error = scores.std(0, ddof=1) / np.sqrt(len(scores)) if len(scores) > 1 else np.zeros(scores.shape[1])
    return np.asarray(found.fractions), scores.mean(0), error


def _finished(figure: Figure, title: str | None, save: str | PathLike | None) -> Figure:
    figure.suptitle(title or "", fontsize=11)
    if save is not None:
        figure.savefig(save, dpi=200, bbox_inches="tight")
    return figure
