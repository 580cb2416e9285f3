"""Coloured words: the HTML is read back by a parser, the figure by its rectangles and the files it saves."""

import warnings
from dataclasses import dataclass
from html.parser import HTMLParser

import jax.numpy as jnp
import numpy as np
import pytest

from jaxlrp.errors import InputError

matplotlib = pytest.importorskip("matplotlib")
Image = pytest.importorskip("PIL.Image")

from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: E402
from matplotlib.colors import to_hex  # noqa: E402
from matplotlib.patches import Rectangle  # noqa: E402

from jaxlrp import plot  # noqa: E402

WORDS = ["the", "film", "is", "a", "gem", "!"]
R = np.array([0.0, 0.5, -0.25, 0.1, 2.0, -2.0])


@dataclass
class Span:
    text: str
    style: dict[str, str]
    title: str


class Reader(HTMLParser):
    """The coloured spans, the lines of text, and every tag."""

    def __init__(self, html):
        super().__init__()
        self.spans, self.tags, self.written, self.inside = [], [], "", False
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.tags.append(tag)
        self.inside = tag == "span" and "title" in attributes
        if self.inside:
            style = dict(part.split(":", 1) for part in attributes["style"].split(";"))
            self.spans.append(Span("", style, attributes["title"]))
        self.written += "\n" * (tag in ("br", "div"))

    def handle_endtag(self, tag):
        self.inside = False

    def handle_data(self, data):
        self.written += data
        if self.inside:
            self.spans[-1].text += data

    @property
    def lines(self):
        return [line.strip() for line in self.written.splitlines() if line.strip()]


def spans(*args, **options):
    return Reader(plot.text(*args, **options).html).spans


def papers(*args, **options):
    return [span.style["background"] for span in spans(*args, **options)]


def colours(values, scale=None):
    return [to_hex(pixel / 255) for pixel in plot.rgb([values], scale=scale)[0]]


def boxes(figure):
    """[(written, rectangle, text)] in the order of the tokens."""
    (ax,) = [ax for ax in figure.axes if ax.patches]
    rectangles = [p for p in ax.patches if isinstance(p, Rectangle)]
    texts = [t for t in ax.texts if t.get_fontsize() == 11 and t.get_fontweight() != "bold"]
    assert len(rectangles) == len(texts)
    return [(t.get_text(), r, t) for r, t in zip(rectangles, texts, strict=True)]


# ---- colours


def test_words_have_the_colours_of_a_heatmap():
    found = spans(WORDS, R)
    assert [span.text for span in found] == WORDS
    assert [span.style["background"] for span in found] == colours(R)
    assert [float(span.title) for span in found] == list(R)
    assert found[0].style["background"] == "#ffffff"


def test_figure_and_html_have_the_same_words_and_colours():
    made = plot.text(WORDS, R)
    drawn = boxes(made.figure)
    assert [text for text, _, _ in drawn] == WORDS
    assert [to_hex(r.get_facecolor()) for _, r, _ in drawn] == colours(R)
    assert [to_hex(t.get_color()) for _, _, t in drawn] == [s.style["color"] for s in Reader(made.html).spans]


def test_ink_is_the_one_of_more_contrast():
    """By the ratio of WCAG 2, for every colour of the map; it is never below 4.5, what WCAG asks of text."""
    values = np.linspace(-1, 1, 401)
    found = spans(["a"] * 401, values, scale=1)
    light = lambda c: c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4

    def luminance(colour):
        red, green, blue = (light(int(colour[i : i + 2], 16) / 255) for i in (1, 3, 5))
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    for span in found:
        paper = luminance(span.style["background"])
        contrast = {"#000000": (paper + 0.05) / 0.05, "#ffffff": 1.05 / (paper + 0.05)}
        assert contrast[span.style["color"]] == max(contrast.values()) > 4.5
    assert found[0].style["color"] == found[-1].style["color"] == "#ffffff"
    assert found[200].style["color"] == "#000000"


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.int32])
def test_jax_arrays_of_every_real_dtype_and_features_summed(dtype):
    features = jnp.array([[1, 2, 1], [-4, 0, 0]], dtype)
    assert papers(["a", "b"], features) == papers(["a", "b"], features.sum(-1)) == colours([1.0, -1.0])


def test_options_of_the_scale():
    assert papers(WORDS, R, scale=0.5) == colours(R, 0.5)
    assert papers(WORDS, R, percentile=50) == colours(R, 0.25)
    assert papers(WORDS, R, cmap="RdBu_r") != papers(WORDS, R)


def test_rows_have_their_own_scale_or_share_the_largest():
    rows, values = [["a", "b"], ["c"], ["d", "e", "f"]], [[1.0, -0.5], [0.0], np.array([8.0, 4.0, -2.0])]
    own = colours(values[0]) + ["#ffffff"] + colours(values[2])
    assert papers(rows, values) == own
    assert papers(rows, values, shared_scale=True) == colours(np.concatenate(values))
    assert papers([["a"], ["b"]], jnp.array([[1.0], [2.0]])) == colours([1.0, 1.0])
    assert papers([["a"], ["b"]], np.ones((2, 1, 3)), shared_scale=True) == colours([1.0, 1.0])


# ---- pieces of words

TOKENIZED = {
    "WordPiece": ["[CLS]", "un", "##bel", "##ievable", "film", ",", "##", "[SEP]"],
    "SentencePiece": ["<s>", "▁un", "bel", "ievable", "▁film", ",", "▁##", "</s>"],
    "byte-level BPE": ["<s>", "un", "bel", "ievable", "Ġfilm", ",", "Ġ##", "</s>"],
    "decoded": ["<|endoftext|>", "un", "bel", "ievable", " film", ",", " ##", "<|endoftext|>"],
}


@pytest.mark.parametrize("name", TOKENIZED)
def test_pieces_read_as_text_and_keep_their_own_colours(name):
    tokens, values = TOKENIZED[name], np.arange(1.0, 9.0)
    made = plot.text(tokens, values)
    (line,) = Reader(made.html).lines
    comma = " ," if name == "WordPiece" else ","  # which has no mark for it
    assert line == f"{tokens[0]} unbelievable film{comma} ## {tokens[-1]}"
    assert papers(tokens, values) == colours(values)
    drawn = boxes(made.figure)
    between = [b.get_x() - a.get_x() - a.get_width() for (_, a, _), (_, b, _) in zip(drawn, drawn[1:], strict=False)]
    np.testing.assert_allclose(between[1:3], 0, atol=1e-9)
    assert min(between[0], between[3], between[5], between[6]) > 2


@pytest.mark.parametrize("name", TOKENIZED)
def test_pieces_summed(name):
    """A word has the sum of its pieces' relevance, and the scale is that of the sums."""
    values = np.array([1.0, 2.0, -3.0, 6.0, 1.0, 1.0, -1.0, 4.0])
    found = spans(TOKENIZED[name], values, pieces="sum")
    glued = [[0], [1, 2, 3], [4], [5], [6], [7]] if name == "WordPiece" else [[0], [1, 2, 3], [4, 5], [6], [7]]
    sums = [values[i].sum() for i in glued]
    assert [float(span.title) for span in found] == sums
    assert [span.style["background"] for span in found] == colours(sums)
    assert found[1].text == "unbelievable"


@pytest.mark.parametrize("name", TOKENIZED)
def test_pieces_shown_as_they_are(name):
    tokens = TOKENIZED[name]
    found = spans(tokens, np.ones(8), pieces="show")
    assert [span.text for span in found] == tokens


def test_marks_are_understood_across_rows():
    """What the tokenizer marks in one row tells how another, without a mark, is to be read."""
    (_, second) = Reader(plot.text([["a", "Ġb"], ["un", "seen"]], [[1, 2], [3, 4]]).html).lines
    assert second == "unseen"
    assert Reader(plot.text(["un", "seen"], [3, 4]).html).lines == ["un seen"]


def test_what_has_no_letters_is_seen_all_the_same():
    """A piece that is only a mark, or empty, or white space, still shows its colour."""
    made = plot.text(["▁", "20", "", "\t", "▁x"], [1.0, 2.0, 3.0, 4.0, 5.0])
    assert papers(["▁", "20", "", "\t", "▁x"], np.arange(1.0, 6.0)) == colours(np.arange(1.0, 6.0))
    assert "&nbsp;</span>" in made.html
    assert all(r.get_width() > 4 for _, r, _ in boxes(made.figure))


@pytest.mark.parametrize("how", ["join", "sum"])
@pytest.mark.parametrize("end", ["\n", "Ċ", "\r\n"])
def test_line_breaks_are_shown_and_break_the_line(end, how):
    made = plot.text(["Ġa", "b", end, "Ġc"], np.arange(4.0), pieces=how)
    assert Reader(made.html).lines == ["ab ↵", "c"]
    heights = {text: r.get_y() for text, r, _ in boxes(made.figure)}
    first = "ab" if how == "sum" else "a"
    assert heights[first] == heights["↵"] < heights["c"]


# ---- HTML


def test_everything_is_escaped():
    nasty = ["<script>alert(1)</script>", '"><img src=x>', "&amp;", "a'b", "</div>"]
    labels = ["<b>label</b>"]
    made = plot.text(nasty, np.arange(5.0), title="<i>title</i> & more", row_labels=labels)
    read = Reader(made.html)
    assert [span.text for span in read.spans] == nasty
    assert set(read.tags) == {"div", "span"}
    assert read.lines[0] == "<i>title</i> & more" and read.lines[1] == labels[0]


def test_a_notebook_shows_the_html():
    made = plot.text(WORDS, R)
    assert made._repr_html_() == made.html


def test_titles_labels_and_legend():
    rows, values = [WORDS, WORDS], [R, 2 * R]
    for shared, limit, name in ((False, "1", "relevance / scale"), (True, "4", "relevance")):
        made = plot.text(rows, values, title="mine", row_labels=["first", "second"], shared_scale=shared, colorbar=True)
        sentence = " ".join(WORDS)
        lines = Reader(made.html).lines
        assert lines == ["mine", "first", sentence, "second", sentence, f"-{limit}  {limit} {name}"]
        (ax,) = made.figure.axes
        assert {"mine", "first", "second"} <= {t.get_text() for t in ax.texts}
        (bar,) = ax.child_axes
        assert [t.get_text() for t in bar.get_xticklabels()] == [f"-{limit}", "0", limit]
        assert bar.get_xlabel() == name


# ---- the figure


def extent(figure, artist):
    return artist.get_window_extent(figure.canvas.get_renderer())


def test_lines_are_wrapped_between_words_and_nothing_overlaps():
    rng = np.random.default_rng(0)
    tokens = [t for _ in range(40) for t in ("word", "##piece", "iiii", "WWW", "$x^2$", "\\alpha_{")]
    made = plot.text(tokens, rng.normal(size=len(tokens)), width=3, row_labels=["a label"], title="a title")
    figure = made.figure
    FigureCanvasAgg(figure)
    figure.draw_without_rendering()
    drawn = boxes(figure)
    assert [text for text, _, _ in drawn][:6] == ["word", "piece", "iiii", "WWW", "$x^2$", "\\alpha_{"]  # no formulas
    page = figure.bbox
    for _, r, t in drawn:
        paper, letters = extent(figure, r), extent(figure, t)
        assert paper.x0 - 1 <= letters.x0 and letters.x1 <= paper.x1 + 1
        assert paper.y0 - 1 <= letters.y0 and letters.y1 <= paper.y1 + 1
        assert page.x0 <= paper.x0 and paper.x1 <= page.x1 and page.y0 <= paper.y0 and paper.y1 <= page.y1
    left = min(r.get_x() for _, r, _ in drawn)
    assert max(r.get_x() + r.get_width() for _, r, _ in drawn) <= left + 3 * 72
    lines = sorted({r.get_y() for _, r, _ in drawn})
    assert len(lines) > 10
    for (_, a, _), (text, b, _) in zip(drawn, drawn[1:], strict=False):
        same_line = a.get_y() == b.get_y()
        assert b.get_x() >= a.get_x() + a.get_width() - 1e-9 if same_line else b.get_x() == left
        assert same_line or text != "piece"  # a word that fits on a line is not broken


def test_what_no_line_can_hold_is_broken_between_pieces_or_widens_the_page():
    tokens = ["▁a"] + ["bcd"] * 60
    drawn = boxes(plot.text(tokens, np.ones(61), width=2).figure)
    assert len({r.get_y() for _, r, _ in drawn}) > 5
    assert max(r.get_x() + r.get_width() for _, r, _ in drawn) <= min(r.get_x() for _, r, _ in drawn) + 144
    figure = plot.text(["x" * 100], [1.0], width=2).figure
    ((_, r, _),) = boxes(figure)
    assert r.get_x() + r.get_width() <= 72 * figure.get_figwidth()


def test_a_formula_is_no_formula_where_tex_is_on():
    with matplotlib.rc_context({"text.usetex": True}):
        plot.text(["$\\frac", "_{"], [1.0, 2.0], title="100 %").figure.draw_without_rendering()


def test_html_needs_no_font():
    """The figure is drawn when it is asked for: a script that matplotlib's font lacks is no concern of a notebook."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        made = plot.text(["▁很", "好"], [1.0, 2.0])
    assert Reader(made.html).lines == ["很好"]
    with pytest.warns(UserWarning, match="Glyph"):
        first = made.figure
    assert made.figure is first


# ---- files


def test_the_suffix_decides_what_is_saved(tmp_path):
    for name in ("text.html", "text.HTM", "text.png", "text.pdf", "text.svg"):
        made = plot.text(WORDS, R, title="café ↵", save=tmp_path / name)
    for name in ("text.html", "text.HTM"):
        page = (tmp_path / name).read_text(encoding="utf-8")
        assert page.startswith("<!DOCTYPE html>") and '<meta charset="utf-8">' in page and made.html in page
    assert (tmp_path / "text.pdf").read_bytes().startswith(b"%PDF")
    assert b"<svg" in (tmp_path / "text.svg").read_bytes()
    with Image.open(tmp_path / "text.png") as png:
        assert png.format == "PNG"
        pixels = {tuple(pixel) for pixel in np.asarray(png.convert("RGB")).reshape(-1, 3)}
    assert {tuple(pixel) for pixel in plot.rgb([R])[0]} <= pixels


# ---- errors


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: plot.text("the film", [1.0, 2.0]), r"tokens is 'the film'.*sentence\.split\(\)"),
        (lambda: plot.text(None, [1.0]), "tokens is None: write a list of strings"),
        (lambda: plot.text([], []), r"tokens is \[\]: .*not empty"),
        (lambda: plot.text([["a"], []], [[1.0], []]), r"tokens\[1\] is \[\]: .*not empty"),
        (lambda: plot.text([101, 102], [1.0, 2.0]), r"tokens\[0\] is 101: write a list of strings"),
        (lambda: plot.text([[101]], [[1.0]]), r"tokens\[0\] is \[101\]: write a list of strings"),
        (lambda: plot.text([["a"], "b"], [[1.0], [2.0]]), r"tokens\[1\] is 'b': write a list of strings"),
        (lambda: plot.text(WORDS, R[:5]), r"relevance has shape \(5,\): for 6 tokens write \(6,\) or \(6, features\)"),
        (lambda: plot.text(WORDS, R[None]), r"relevance has shape \(1, 6\): for 6 tokens"),
        (lambda: plot.text(WORDS, np.ones((6, 2, 2))), r"relevance has shape \(6, 2, 2\)"),
        (lambda: plot.text(["a"], 3.0), r"relevance has shape \(\): for 1 tokens"),
        (lambda: plot.text([WORDS, WORDS], [R, R[1:]]), r"relevance\[1\] has shape \(5,\): for 6 tokens"),
        (lambda: plot.text([WORDS, WORDS], [R]), "relevance has 1 rows for 2 rows of tokens"),
        (lambda: plot.text([WORDS], 3.0), "relevance has 0 rows for 1 rows of tokens"),
        (lambda: plot.text(WORDS, R * np.nan), r"relevance, \(6,\), has 6 NaN or infinite"),
        (lambda: plot.text([["a"]], [[np.inf]]), r"relevance\[0\], \(1,\), has 1 NaN or infinite"),
        (lambda: plot.text(["a"], ["b"]), "relevance must be an array of real numbers"),
        (lambda: plot.text(WORDS, R, row_labels=["a", "b"]), "row_labels has 2 items for 1 rows of text: write 1"),
        (lambda: plot.text(WORDS, R, pieces="apart"), 'pieces is \'apart\': write "join", "sum" or "show"'),
        (lambda: plot.text(WORDS, R, width=0), "width is 0: .*inches"),
        (lambda: plot.text(WORDS, R, scale=-1), "scale is -1"),
        (lambda: plot.text(WORDS, R, percentile=0), "percentile is 0"),
    ],
)
def test_bad_input_names_itself_and_the_way_out(call, says):
    with pytest.raises(InputError, match=says):
        call()


def test_nothing_is_saved_where_the_format_is_unknown(tmp_path):
    with pytest.raises(ValueError, match="docx"):
        plot.text(WORDS, R, save=tmp_path / "text.docx")
    assert not list(tmp_path.iterdir())


def test_generators_are_read_once():
    assert papers((word for word in WORDS), R) == colours(R)
    rows, values = ([word] for word in WORDS), ([r] for r in R)
    assert papers(rows, values, shared_scale=True) == colours(R)
