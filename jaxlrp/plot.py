"""Heat maps of relevance, on images and on text. With `plot_curves`, all of jaxlrp that imports matplotlib.

    colour value = R / scale,    scale = max|R|    (or a percentile of |R|, or a given number: colours saturate beyond)

White is zero, red speaks for the explained output and blue against it, on one scale: no colour changes its meaning.
Where all of R is zero, all is white. Figures are made without pyplot: no backend is chosen, no global state touched.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike

from . import words
from .errors import InputError

try:
    from matplotlib import colormaps
    from matplotlib.axes import Axes
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Colormap, ListedColormap, Normalize
    from matplotlib.figure import Figure
    from matplotlib.font_manager import FontProperties
    from matplotlib.patches import Rectangle
    from matplotlib.textpath import text_to_path
except ImportError as error:
    raise ImportError('jaxlrp.plot draws with matplotlib, which is missing: pip install "jaxlrp[plot]"') from error

from .plot_curves import curves, ranking

__all__ = ["RELEVANCE", "Text", "curves", "grid", "heatmap", "ledger", "ranking", "rgb", "text"]


def _diverging() -> ListedColormap:
    # Two straight lines in Oklab (Ottosson 2020), where distance is seen difference: from white to a red and to a blue
    # of one lightness and one chroma. So equal steps of relevance look equal, and -R looks as strong as R; bwr and RdBu
    # give neither. Lightness .45 with chroma .18 is nearly the most that sRGB has for both hues.
    value = np.linspace(-1, 1, 513)
    t, hue = np.abs(value), np.deg2rad(np.where(value > 0, 25, 262))
    oklab = np.stack([1 - 0.55 * t, 0.18 * t * np.cos(hue), 0.18 * t * np.sin(hue)], axis=-1)
    lms = oklab @ [[1, 1, 1], [0.39633778, -0.10556135, -0.08948418], [0.21580376, -0.06385417, -1.29148555]]
    to_rgb = [[4.076742, -1.268438, -0.004196], [-3.307712, 2.609757, -0.703419], [0.23097, -0.341319, 1.707615]]
    linear = np.clip(lms**3 @ to_rgb, 0, 1)
    srgb = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    return ListedColormap(np.rint(255 * srgb) / 255, name="relevance")


RELEVANCE = _diverging()


def _real(value: Any, name: str) -> np.ndarray:
    """(H, W) or (H, W, C) of any real dtype -> float64 (H, W, C)."""
    real = _numbers(value, name)
    if real.ndim not in (2, 3) or not real.size:
        raise InputError(f"{name} has shape {real.shape}: write (H, W) or (H, W, C), not empty; of a batch, {name}[0]")
    return real if real.ndim == 3 else real[..., None]


def _numbers(value: Any, name: str) -> np.ndarray:
    try:
        real = np.asarray(value).astype(np.float64, casting="same_kind")
    except (TypeError, ValueError) as error:
        raise InputError(f"{name} must be an array of real numbers, got {type(value).__name__}: {error}") from error
    if bad := np.count_nonzero(~np.isfinite(real)):
        raise InputError(f"{name}, {real.shape}, has {bad} NaN or infinite values: draw it with jnp.nan_to_num({name})")
    return real


def _picture(image: Any, shape: tuple[int, ...], name: str = "image") -> np.ndarray:
    """An image of a heat map's (H, W) -> float64 (H, W, 3) within [0, 1]."""
    real = _real(image, name)
    if real.shape[:2] != shape or real.shape[2] not in (1, 3):
        raise InputError(f"{name} has shape {np.shape(image)}: as its map is {shape}, write {shape} or {(*shape, 3)}")
    if np.asarray(image).dtype == np.uint8:
        real = real / 255
    elif real.min() < 0 or real.max() > 1:
        real = (real - real.min()) / (np.ptp(real) or 1)
    return np.broadcast_to(real, (*shape, 3))


def _scale(signed: np.ndarray, scale: float | None, percentile: float) -> float:
    if not 0 < percentile <= 100:
        raise InputError(f"percentile is {percentile}: write a number above 0 and up to 100, such as 99")
    if scale is not None and not 0 < scale < np.inf:
        raise InputError(f"scale is {scale}: write a positive finite number, or None for max|R|")
    # "lower": the outliers left out must not be mixed in again. The maximum: a sparse map's percentile may be zero.
    size = np.abs(signed)
    return float(scale or np.percentile(size, percentile, method="lower") or size.max())


# The signatures below are laid out by hand: a line for what is drawn, one for its colours, one for where it goes.
def rgb(
    relevance: ArrayLike, *, image: ArrayLike | None = None, overlay: float = 0.5,
    scale: float | None = None, percentile: float = 100, cmap: str | Colormap = RELEVANCE,
) -> np.ndarray:  # fmt: skip
    """The heat map as pixels, without a figure: uint8 (H, W, 3).

    v = R / scale, cut to [-1, 1], is looked up in `cmap`, whose middle entry is exactly v = 0. R is `relevance`, of any
    real dtype, NumPy or JAX: (H, W), or (H, W, C) summed over C. `scale` is a positive number, or None for the
    `percentile` of |R|: 100 is max|R|, 99 lets the largest hundredth saturate.

    `image`, (H, W), (H, W, 1) or (H, W, 3), lies beneath in grey: colour = cmap(v) + overlay (1 - |v|) (grey - cmap(0))
    shows it where R = 0 and hides it where |v| = 1; `overlay`, from 0 to 1, is its contrast. uint8 counts as 0..255,
    other dtypes within [0, 1] count as they are, and all else is rescaled from its own minimum and maximum.

    `jaxlrp.errors.InputError`, a ValueError, names what is wrong: a shape, NaN or infinity, a number out of its range.
    """
    signed, colours = _real(relevance, "relevance").sum(axis=-1), colormaps.get_cmap(cmap)
    if not 0 <= overlay <= 1:
        raise InputError(f"overlay is {overlay}: write a number from 0 (no image) to 1 (the image at full contrast)")
    limit = _scale(signed, scale, percentile) or 1.0  # R = 0 stays 0, not 0 / 0
    value = np.clip(signed, -limit, limit) / limit  # in this order nothing overflows
    # Integers index a Colormap directly; counting from the middle keeps both signs symmetric, for an even N too.
    middle, steps = colours.N // 2, (colours.N - 1) // 2
    pixels = colours(middle + np.rint(value * steps).astype(int))[..., :3]
    if image is not None:  # in grey, as its own colours would compete with red and blue
        grey = _picture(image, signed.shape) @ np.array([[0.2126], [0.7152], [0.0722]])
        pixels = pixels + overlay * (1 - np.abs(value))[..., None] * (grey - np.array(colours(middle)[:3]))
    return np.rint(255 * np.clip(pixels, 0, 1)).astype(np.uint8)


def _show(ax: Axes, pixels: np.ndarray) -> None:
    ax.imshow(pixels)
    ax.set(xticks=[], yticks=[])
    ax.spines[:].set(linewidth=0.5, color="0.6")  # white is a value, and the page is white too


def _finish(figure: Any, axes: Any, colorbar: bool, limit: float, label: str, cmap: Any, save: Any) -> None:
    if colorbar:
        _bar(figure, limit, label, cmap, ax=axes, fraction=0.05)
    if save is not None:
        figure.figure.savefig(save, dpi=200, bbox_inches="tight")  # .figure, as `figure` may be a SubFigure


def _bar(figure: Any, limit: float, label: str, cmap: Any, **where: Any) -> None:
    drawn = figure.colorbar(ScalarMappable(Normalize(-limit, limit), cmap), label=label, **where)
    drawn.set_ticks([-limit, 0, limit], labels=[f"{-limit:.3g}", "0", f"{limit:.3g}"], fontsize=9)


def heatmap(
    relevance: ArrayLike, *, image: ArrayLike | None = None, overlay: float = 0.5,
    scale: float | None = None, percentile: float = 100, cmap: str | Colormap = RELEVANCE,
    ax: Axes | None = None, title: str | None = None, colorbar: bool = False, save: str | PathLike | None = None,
) -> Axes:  # fmt: skip
    """Draws one heat map, colour value = R / max|R|, on `ax` or on a new Figure, and returns its Axes.

    `relevance` is (H, W) or (H, W, C), summed over C. Up to `cmap`, arguments, dtypes and errors are those of `rgb`.
    `save` writes the whole Figure, in the format of the file's suffix (.png, .pdf, .svg).
    """
    limit = _scale(_real(relevance, "relevance").sum(axis=-1), scale, percentile) or 1.0
    pixels = rgb(relevance, image=image, overlay=overlay, scale=limit, cmap=cmap)
    ax = Figure(figsize=(3.2, 3.2), layout="compressed").add_subplot() if ax is None else ax
    _show(ax, pixels)
    ax.set_title(ax.get_title() if title is None else title)
    _finish(ax.figure, ax, colorbar, limit, "relevance", cmap, save)
    return ax


def grid(
    relevances: Any, *, images: Any = None, overlay: float = 0,
    row_labels: Sequence[str] | None = None, column_labels: Sequence[str] | None = None,
    shared_scale: bool | Literal["row", "column", "all"] = False,
    scale: float | None = None, percentile: float = 100, cmap: str | Colormap = RELEVANCE,
    title: str | None = None, colorbar: bool = False, save: str | PathLike | None = None,
) -> Figure:  # fmt: skip
    """Draws rows and columns of heat maps, colour value = R / max|R|, and returns the Figure.

    `relevances` is (rows, columns, H, W[, C]), or nested sequences of (H, W[, C]); for a batch (N, H, W, C) of one map
    each write `relevances[:, None]`. `images`, one per row, make a first column; with `overlay` > 0 also lie beneath.
    max|R| (or the `percentile`) is each map's own; with `shared_scale` it is the largest one in its "row", its "column"
    or "all" (also True), so that sizes can be compared. One label per row, and per column of maps. The rest is as in
    `heatmap`; InputError also for a grid that is empty or not rectangular, and for images or labels that do not fit it.
    """
    rows: list[list[np.ndarray]] = []
    for i, row in enumerate(relevances):
        if getattr(row, "shape", ())[2:] in ((1,), (3,)):  # its columns would be slices (W, C) of one map
            raise InputError(f"relevances[{i}] has shape {row.shape}, one map (H, W, C): write relevances[:, None]")
        rows.append([_real(cell, f"relevances[{i}][{j}]").sum(axis=-1) for j, cell in enumerate(row)])
    lengths = [len(row) for row in rows]
    if not lengths or min(lengths) < max(lengths) or max(lengths) == 0:
        raise InputError(f"relevances has rows of {lengths} maps: write at least one row, all of one length, not empty")
    height, width, first = len(rows), lengths[0], int(images is not None)
    given = {"images": (images, height), "row_labels": (row_labels, height), "column_labels": (column_labels, width)}
    for name, (items, count) in given.items():
        if items is not None and len(items) != count:
            raise InputError(f"{name} has {len(items)} items for {height} rows of {width} maps: write {count}")
    across = {False: (), "row": (1,), "column": (0,), "all": (0, 1), True: (0, 1)}
    if shared_scale not in across:
        raise InputError(f'shared_scale is {shared_scale!r}: write False, "row", "column" or "all"')
    own = np.array([[_scale(signed, scale, percentile) for signed in row] for row in rows])
    limits = np.maximum(own, own.max(axis=across[shared_scale], keepdims=True))
    tops = [] if column_labels is None else ["input"] * first + list(column_labels)
    sides = [] if row_labels is None else list(row_labels)
    # Inches: .08 is a letter's width. A cell is as wide as the longest label above it; margins are added, not taken.
    cell, ratio = max(1.6, 0.08 * max(map(len, tops), default=0)), min(max(np.divide(*rows[0][0].shape), 0.1), 10.0)
    wide = cell * (width + first) + 0.08 * max(map(len, sides), default=0) + 0.8 * colorbar
    figure = Figure(figsize=(wide, cell * ratio * height + 0.3), layout="compressed")
    axes = figure.subplots(height, width + first, squeeze=False)
    for i, row in enumerate(rows):
        image = None if images is None else images[i]
        if image is not None:
            _show(axes[i, 0], _picture(image, row[0].shape, f"images[{i}]"))
        for ax, signed, limit in zip(axes[i, first:], row, limits[i], strict=True):  # a limit of 0: all of R is 0
            heatmap(signed, image=image, overlay=overlay, scale=limit or None, cmap=cmap, ax=ax)
    for ax, label in zip(axes[0], tops, strict=False):
        ax.set_title(label, fontsize=9)
    for ax, label in zip(axes[:, 0], sides, strict=False):
        ax.set_ylabel(label, fontsize=9, rotation=0, ha="right", va="center")
    figure.suptitle(title or "", fontsize=11)
    limit, label = (limits[0, 0] or 1.0, "relevance") if np.ptp(limits) == 0 else (1.0, "relevance / scale")
    _finish(figure, axes, colorbar, limit, label, cmap, save)
    return figure


@dataclasses.dataclass(frozen=True)
class Text:
    """Coloured words: `html`, which a notebook shows, and `figure`, drawn when it is asked for."""

    html: str
    draw: Callable[[], Figure] = dataclasses.field(repr=False)

    @functools.cached_property
    def figure(self) -> Figure:
        return self.draw()

    def _repr_html_(self) -> str:
        return self.html


def text(
    tokens: Any, relevance: Any, *, pieces: Literal["join", "sum", "show"] = "join",
    row_labels: Sequence[str] | None = None, shared_scale: bool = False,
    scale: float | None = None, percentile: float = 100, cmap: str | Colormap = RELEVANCE,
    title: str | None = None, colorbar: bool = False, width: float = 6, save: str | PathLike | None = None,
) -> Text:  # fmt: skip
    """Writes tokens on their colours, colour value = R / max|R|, as HTML and as a Figure.

    `tokens` is a sequence of strings and `relevance` their (n,), or (n, features), summed over features; or both are
    sequences of those, one row for each. max|R| is each row's own, or with `shared_scale` the largest of all. What is
    written is black or white, whichever contrasts more with its colour.

    `pieces` says what becomes of the parts of words that tokenizers make. "join": they read as text, each on its own
    colour, without space between them and without the marks: "##" of WordPiece; "▁" of SentencePiece, "Ġ" of byte-level
    BPE and " " of decoded tokens, which stand for the space before a word. "sum": one colour for each word, by the sum
    of its pieces' relevance. "show": every token as it is, apart. [CLS], <s> and line breaks always stand alone.

    A notebook shows the Text that is returned; its `html` is a string, its `figure` a Figure, with lines of `width`
    inches. `save` writes one of them: a page if the suffix is .html, else an image in the format of the suffix (.png,
    .pdf, .svg). For scripts that matplotlib's own font lacks, name one that has them in rcParams["font.family"].

    InputError for tokens that are no strings, relevance that does not fit them or is NaN, and as in `heatmap`.
    """
    if pieces not in ("join", "sum", "show"):
        raise InputError(f'pieces is {pieces!r}: write "join", "sum" or "show"')
    if not 0 < width < np.inf:
        raise InputError(f"width is {width}: write the length of a line in inches, such as 6")
    rows = words.pieces(*_sentences(tokens, relevance), pieces)
    if row_labels is not None and len(row_labels) != len(rows):
        raise InputError(f"row_labels has {len(row_labels)} items for {len(rows)} rows of text: write {len(rows)}")
    labels = [""] * len(rows) if row_labels is None else list(row_labels)
    signed = [np.array([[piece.value for piece in row]]) for row in rows]
    limits = [_scale(values, scale, percentile) for values in signed]
    limits = [max(limits)] * len(rows) if shared_scale else limits
    pixels = [rgb(v, scale=limit or None, cmap=cmap)[0] for v, limit in zip(signed, limits, strict=True)]
    rows = [words.coloured(row, colours) for row, colours in zip(rows, pixels, strict=True)]
    limit, name = (limits[0] or 1.0, "relevance") if np.ptp(limits) == 0 else (1.0, "relevance / scale")
    legend = words.legend(limit, name, rgb([np.linspace(-1, 1, 33)], cmap=cmap)[0]) if colorbar else ""
    bar = functools.partial(_bar, limit=limit, label=name, cmap=cmap) if colorbar else None
    made = Text(words.page(rows, labels, title, legend), lambda: _page(rows, labels, title, bar, 72 * width))
    if save is not None and Path(save).suffix.lower() in (".html", ".htm"):
        Path(save).write_text(words.document(made.html, title), encoding="utf-8")
    elif save is not None:
        made.figure.savefig(save, dpi=200, bbox_inches="tight")
    return made


def _sentences(tokens: Any, relevance: Any) -> tuple[list[list[str]], list[np.ndarray]]:
    """The rows of tokens, and a number for each token."""
    if isinstance(tokens, str) or not np.iterable(tokens):
        raise InputError(f"tokens is {tokens!r}: write a list of strings, such as sentence.split(), or a list of lists")
    rows = list(tokens)
    one = all(isinstance(token, str) for token in rows)
    rows, given = ([rows], [relevance]) if one else (rows, list(relevance) if np.iterable(relevance) else [])
    if len(given) != len(rows):
        raise InputError(f"relevance has {len(given)} rows for {len(rows)} rows of tokens: write one for each")
    values = []
    for i, (row, numbers) in enumerate(zip(rows, given, strict=True)):
        place = "" if one else f"[{i}]"
        listed = np.iterable(row) and not isinstance(row, str) and all(isinstance(token, str) for token in row)
        if not listed or not len(row):
            raise InputError(f"tokens{place} is {row!r}: write a list of strings, not empty")
        n = len(row)
        real = _numbers(numbers, f"relevance{place}")
        if real.ndim not in (1, 2) or len(real) != n:
            raise InputError(f"relevance{place} has shape {real.shape}: for {n} tokens write ({n},) or ({n}, features)")
        values.append(real.reshape(n, -1).sum(axis=-1))
    return rows, values


def _page(rows: list[list[words.Piece]], labels: list[str], title: str | None, bar: Any, width: float) -> Figure:
    """Rows of words on a Figure. All lengths are in points, from the upper left corner."""
    font, small, bold = FontProperties(size=11), FontProperties(size=9), FontProperties(size=11, weight="bold")
    line, pad, gap, margin = 19.0, 1.0, 3.5, 6.0
    figure = Figure()
    ax = figure.add_axes((0, 0, 1, 1))

    def wide(text: str, font: FontProperties) -> float:
        return text_to_path.get_text_width_height_descent(text.replace(" ", "n"), font, False)[0]

    def write(x: float, y: float, text: str, font: FontProperties, colour: str = "black") -> None:
        ax.text(x, y + 0.7 * line, text, fontproperties=font, color=colour, parse_math=False, usetex=False)

    left = margin + max(wide(label, small) for label in labels) + 2 * margin * any(labels)
    y, right = margin, margin + wide(title or "", bold)
    if title:
        write(margin, y, title, bold)
        y += 1.3 * line
    for row, label in zip(rows, labels, strict=True):
        x = left
        write(margin, y, label, small, "0.4")
        sizes = [wide(piece.text or " ", font) + 2 * pad for piece in row]
        for i, (piece, size) in enumerate(zip(row, sizes, strict=True)):
            after = next((j for j in range(i + 1, len(row)) if not row[j].glued), len(row))
            word = size if piece.glued else sum(sizes[i:after])  # a word is broken only where no line can hold it
            if i and (row[i - 1].text.endswith(words.BREAK) or x > left and x + word > left + width):
                x, y = left, y + line
            ax.add_patch(Rectangle((x, y + 1), size, line - 3, color=piece.paper, linewidth=0))
            write(x + pad, y, piece.text, font, piece.ink)
            right = max(right, x + size)
            x += size + gap * (after == i + 1)
        y += 1.4 * line
    if bar is not None:
        where = ax.inset_axes((left, y + 6, 144, 7), transform=ax.transData)
        bar(figure, cax=where, orientation="horizontal")
        where.xaxis.label.set_fontsize(9)
        y, right = y + 2.1 * line, max(right, left + 144 + 2 * margin)
    figure.set_size_inches((right + margin) / 72, (y + margin) / 72)
    ax.set(xlim=(0, right + margin), ylim=(y + margin, 0))
    ax.set_axis_off()
    return figure


_KEPT = {"bias": "#c98500", "stabiliser": "#7a6fbd", "dropped": "#8a8a8a", "ended": "#2b8a7e", "created": "#b3261e"}


def ledger(
    ledger: Any, *, example: int | None = None, title: str | None = None, save: str | PathLike | None = None
) -> Figure:
    """Draws where relevance went, one bar per layer, from the output (top) to the input, and returns the Figure.

    `ledger` is what `jaxlrp.evaluate.conservation(f, composite)(*args)` returned. Bars show what each layer kept (bias,
    stabiliser, dropped, ended), in units of |start|; `created` points the other way. The last bar is what reached the
    explained input. Means over the examples, or one `example`. InputError for an example that does not exist.
    """
    count = len(ledger.start)
    if example is not None and not -count <= example < count:
        raise InputError(f"example={example!r}: the ledger has {count} examples, 0 to {count - 1}")

    def number(values: Any) -> float:
        return float(np.mean(values) if example is None else values[example])

    rows = list(ledger)[::-1]
    names = [f"{r.name} ({r.rule})" if r.rule else r.name for r in rows] + ["explained input"]
    unit = abs(number(ledger.start)) or 1.0
    figure = Figure(figsize=(7, 0.22 * len(names) + 1.2), layout="compressed")
    ax = figure.add_subplot()
    ends = np.zeros((2, len(names)))  # where the bars have come to, to the right and to the left
    for column, colour in _KEPT.items():
        sign = -1 if column == "created" else 1
        values = np.array([sign * number(getattr(r, column)) / unit for r in rows] + [0.0])
        left = np.where(values >= 0, ends[0], ends[1])
        ax.barh(range(len(names)), values, left=left, color=colour, label=column)
        ends += np.stack([np.maximum(values, 0), np.minimum(values, 0)])
    ax.barh(len(names) - 1, number(ledger.received) / unit, color="0.2", label="received")
    ax.set_yticks(range(len(names)), labels=names, fontsize=7)
    ax.invert_yaxis()
    ax.axvline(0, color="0.6", linewidth=0.5)
    ax.set(xlabel="share of the start relevance", title=title or "")
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(fontsize=7, frameon=False)
    if save is not None:
        figure.savefig(save, dpi=200, bbox_inches="tight")
    return figure
