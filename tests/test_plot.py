"""Heat maps: colours are checked as numbers on `rgb`, figures by what their Axes hold and by the files they save."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlrp import composites
from jaxlrp.errors import InputError
from jaxlrp.evaluate import conservation

matplotlib = pytest.importorskip("matplotlib")
Image = pytest.importorskip("PIL.Image")

from jaxlrp import plot  # noqa: E402

RNG = np.random.default_rng(0)
MAP = RNG.normal(size=(6, 8))
WHITE, RED, BLUE = (np.array(plot.RELEVANCE(i, bytes=True)[:3]).astype(int) for i in (256, 512, 0))


def drawn(ax):
    """The pixels that an Axes shows."""
    return np.asarray(ax.images[0].get_array())


def oklab(rgb):
    """sRGB in [0, 1] -> Oklab, the direction that plot.py does not use, with Ottosson's published matrices."""
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    to_lms = [[0.4122214708, 0.5363325363, 0.0514459929], [0.2119034982, 0.6806995451, 0.1073969566]]
    to_lms.append([0.0883024619, 0.2817188376, 0.6299787005])
    to_lab = [[0.2104542553, 0.7936177850, -0.0040720468], [1.9779984951, -2.4285922050, 0.4505937099]]
    to_lab.append([0.0259040371, 0.7827717662, -0.8086757660])
    return np.cbrt(linear @ np.transpose(to_lms)) @ np.transpose(to_lab)


# ---- colours


def test_zero_is_exactly_white_alone_and_among_others():
    assert (plot.rgb(np.zeros((3, 4))) == 255).all()
    assert (plot.rgb(np.zeros((3, 4)), percentile=99) == 255).all()
    pixels = plot.rgb([[0.0, 7.0, -0.001]])
    assert pixels.dtype == np.uint8 and pixels.shape == (1, 3, 3)
    assert (pixels[0, 0] == 255).all() and (WHITE == 255).all()


def test_the_ends_are_red_for_positive_and_blue_for_negative():
    pixels = plot.rgb([[5.0, -5.0]]).astype(int)
    assert (pixels[0, 0] == RED).all() and RED[0] > 2 * RED[2]
    assert (pixels[0, 1] == BLUE).all() and BLUE[2] > 2 * BLUE[0]


@pytest.mark.parametrize("cmap", [plot.RELEVANCE, "RdBu_r", "berlin"])
def test_signs_are_mirrored_around_the_middle_entry(cmap):
    table = matplotlib.colormaps.get_cmap(cmap)
    entries = table(np.arange(table.N), bytes=True)[:, :3]
    middle = table.N // 2
    for step in (0, 1, 40, 100):
        v = step / ((table.N - 1) // 2)
        plus, minus = plot.rgb([[v, -v]], scale=1, cmap=cmap)[0].astype(int)
        # bytes=True truncates where rgb rounds: at most one level apart
        assert np.abs(plus - entries[middle + step]).max() <= 1
        assert np.abs(minus - entries[middle - step]).max() <= 1


def test_the_colour_map_is_perceptually_uniform_and_equally_strong_on_both_sides():
    lab = oklab(np.array(plot.RELEVANCE.colors))
    lightness, chroma = lab[:, 0], np.hypot(lab[:, 1], lab[:, 2])
    np.testing.assert_allclose(lightness, lightness[::-1], atol=0.006)  # 8 bits per channel allow no better
    np.testing.assert_allclose(chroma, chroma[::-1], atol=0.01)
    steps = np.linalg.norm(np.diff(lab[::32], axis=0), axis=-1)
    assert steps.max() / steps.min() < 1.15


def test_colours_depend_on_relevance_over_its_maximum_only():
    np.testing.assert_array_equal(plot.rgb(MAP), plot.rgb(MAP * 1e-12))
    np.testing.assert_array_equal(plot.rgb(MAP), plot.rgb(MAP, scale=np.abs(MAP).max()))
    assert (plot.rgb(MAP, scale=1e6) == 255).all()  # every |v| here is less than half a step of colour


def test_beyond_the_scale_colours_saturate():
    pixels = plot.rgb([[1.0, 2.0, -2.0, 1e300]], scale=1).astype(int)[0]
    assert (pixels[[0, 1, 3]] == RED).all() and (pixels[2] == BLUE).all()
    outlier = np.full((10, 10), 0.5)
    outlier[0, 0] = 1000
    assert (plot.rgb(outlier, percentile=99)[5, 5] == RED).all()
    assert (plot.rgb(outlier)[5, 5] == 255).all()


def test_a_percentile_of_zero_falls_back_to_the_maximum():
    sparse = np.zeros((20, 20))
    sparse[3, 3], sparse[4, 4] = 2, 1
    np.testing.assert_array_equal(plot.rgb(sparse, percentile=50), plot.rgb(sparse))


def test_channels_are_summed():
    channels = RNG.normal(size=(6, 8, 3))
    np.testing.assert_array_equal(plot.rgb(channels), plot.rgb(channels.sum(-1)))
    np.testing.assert_array_equal(plot.rgb(MAP[..., None]), plot.rgb(MAP))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16, jnp.int32])
def test_jax_arrays_of_every_real_dtype(dtype):
    relevance = jnp.array([[0, 4, -4]], dtype)
    np.testing.assert_array_equal(plot.rgb(relevance), [[WHITE, RED, BLUE]])


# ---- the image beneath


def test_overlay_shows_the_image_where_relevance_is_zero_and_hides_it_where_it_is_strongest():
    image = np.array([[0.0, 0.25, 1.0, 0.0, 1.0]])
    relevance = np.array([[0.0, 0.0, 0.0, 3.0, -3.0]])
    pixels = plot.rgb(relevance, image=image, overlay=1)
    np.testing.assert_array_equal(pixels[0, :3], [[0] * 3, [64] * 3, [255] * 3])
    np.testing.assert_array_equal(pixels[0, 3:], [RED, BLUE])
    half = plot.rgb(relevance, image=image, overlay=0.5)
    np.testing.assert_array_equal(half[0, :3, 0], [128, 159, 255])
    np.testing.assert_array_equal(plot.rgb(relevance, image=image, overlay=0), plot.rgb(relevance))


def test_overlay_mixes_in_proportion_to_relevance():
    """colour = cmap(v) + overlay (1 - |v|) (grey - white), written out."""
    v = np.linspace(-1, 1, 9)[None]
    plain = plot.rgb(v).astype(float)
    want = np.clip(plain + 0.5 * (1 - np.abs(v))[..., None] * (0.2 - 1) * 255, 0, 255)
    assert np.abs(plot.rgb(v, image=np.full(v.shape, 0.2)) - want).max() <= 1


def test_images_of_bytes_of_unit_floats_and_of_any_range():
    grey = np.array([[0.0, 0.5, 1.0]])
    zero = np.zeros(grey.shape)
    unit = plot.rgb(zero, image=grey, overlay=1)
    np.testing.assert_array_equal(plot.rgb(zero, image=grey * 6 - 3, overlay=1), unit)
    np.testing.assert_array_equal(
        plot.rgb(zero, image=jnp.array([[0, 51, 102]], jnp.uint8), overlay=1)[0, :, 0], [0, 51, 102]
    )
    np.testing.assert_array_equal(plot.rgb(zero, image=grey / 2, overlay=1)[0, :, 0], [0, 64, 128])  # not stretched
    assert (plot.rgb(zero, image=zero + 9, overlay=1) == 0).all()  # a constant has no range


def test_a_colour_image_lies_beneath_in_grey():
    image = np.zeros((1, 3, 3))
    image[0, [0, 1, 2], [0, 1, 2]] = 1
    pixels = plot.rgb(np.zeros((1, 3)), image=image, overlay=1)
    np.testing.assert_array_equal(pixels[0], np.rint(255 * np.array([[0.2126] * 3, [0.7152] * 3, [0.0722] * 3])))


# ---- figures


def test_heatmap_draws_what_rgb_gives_and_saves_a_png(tmp_path):
    path = tmp_path / "map.png"
    ax = plot.heatmap(MAP, title="a title", save=path)
    np.testing.assert_array_equal(drawn(ax), plot.rgb(MAP))
    assert ax.get_title() == "a title" and len(ax.get_xticks()) == len(ax.get_yticks()) == 0
    with Image.open(path) as png:
        assert png.format == "PNG" and min(png.size) > 100
        pixels = np.asarray(png.convert("RGB")).reshape(-1, 3)
    for pixel in (np.unravel_index(MAP.argmax(), MAP.shape), np.unravel_index(MAP.argmin(), MAP.shape)):
        assert (pixels == plot.rgb(MAP)[pixel]).all(-1).any()  # the strongest colours arrive in the file


def test_heatmap_draws_on_given_axes_and_keeps_their_title():
    ax = matplotlib.figure.Figure().subfigures(1, 2)[0].add_subplot(title="mine")
    assert plot.heatmap(MAP, ax=ax) is ax
    assert ax.get_title() == "mine" and len(ax.images) == 1


def test_saving_from_a_subfigure_saves_the_whole_figure(tmp_path):
    ax = matplotlib.figure.Figure().subfigures(1, 2)[0].add_subplot()
    plot.heatmap(MAP, ax=ax, save=tmp_path / "map.pdf")
    assert (tmp_path / "map.pdf").read_bytes().startswith(b"%PDF")


def test_a_colorbar_is_symmetric_and_names_the_limits():
    ax = plot.heatmap(MAP, colorbar=True, scale=2.5)
    bar = ax.figure.axes[1]
    assert [text.get_text() for text in bar.get_yticklabels()] == ["-2.5", "0", "2.5"]
    assert bar.get_ylim() == (-2.5, 2.5) and bar.get_ylabel() == "relevance"


def test_grid_has_one_axes_for_each_map_and_its_labels(tmp_path):
    maps, images = RNG.normal(size=(2, 3, 6, 8, 3)), RNG.uniform(size=(2, 6, 8, 3))
    path = tmp_path / "grid.png"
    labels = {"row_labels": ["cat", "dog"], "column_labels": ["epsilon", "gamma", "zplus"]}
    figure = plot.grid(jnp.array(maps), images=images, **labels, title="all", save=path)
    assert len(figure.axes) == 2 * (1 + 3)
    assert [ax.get_title() for ax in figure.axes[:4]] == ["input", "epsilon", "gamma", "zplus"]
    assert [figure.axes[i].get_ylabel() for i in (0, 4)] == ["cat", "dog"]
    assert figure.get_suptitle() == "all"
    np.testing.assert_allclose(drawn(figure.axes[4]), images[1])
    np.testing.assert_array_equal(drawn(figure.axes[6]), plot.rgb(maps[1, 1]))
    with Image.open(path) as png:
        assert png.format == "PNG" and png.width > png.height > 100


def test_labels_do_not_overlap():
    names = ["epsilon_alpha2_beta1_flat", "epsilon_plus_flat_and_more", "W" * 12]
    figure = plot.grid(RNG.normal(size=(1, 3, 8, 8)), column_labels=names, row_labels=["a label of some length"])
    figure.draw_without_rendering()
    boxes = [ax.title.get_window_extent() for ax in figure.axes]
    assert all(left.x1 < right.x0 for left, right in zip(boxes, boxes[1:], strict=False))


@pytest.mark.parametrize(
    ("shared", "limits"),
    [
        (False, [[1, 2], [4, 8]]),
        ("row", [[2, 2], [8, 8]]),
        ("column", [[4, 8], [4, 8]]),
        ("all", [[8, 8], [8, 8]]),
        (True, [[8, 8], [8, 8]]),
    ],
)
def test_scales_are_own_or_shared(shared, limits):
    base = MAP / np.abs(MAP).max()
    maps = [[base * 1, base * 2], [base * 4, base * 8]]
    figure = plot.grid(maps, shared_scale=shared)
    for ax, signed, limit in zip(figure.axes, sum(maps, []), sum(limits, []), strict=True):
        np.testing.assert_array_equal(drawn(ax), plot.rgb(signed, scale=limit))


def test_a_zero_map_neither_fails_nor_sets_the_shared_scale():
    small = MAP * 1e-6
    figure = plot.grid([[small, np.zeros((6, 8))]], shared_scale="row", colorbar=True)
    np.testing.assert_array_equal(drawn(figure.axes[0]), plot.rgb(small))
    assert (drawn(figure.axes[1]) == 255).all()
    assert (drawn(plot.grid([[np.zeros((6, 8))]], shared_scale="all", colorbar=True).axes[0]) == 255).all()


def test_a_grid_colorbar_has_units_only_where_one_scale_holds():
    maps = [[MAP, 2 * MAP]]
    one, many = (plot.grid(maps, shared_scale=shared, colorbar=True).axes[2] for shared in (True, False))
    assert one.get_ylabel() == "relevance" and one.get_ylim()[1] == pytest.approx(2 * np.abs(MAP).max())
    assert many.get_ylabel() == "relevance / scale" and many.get_ylim() == (-1, 1)


def test_grid_lays_images_beneath_on_request():
    image = RNG.uniform(size=(6, 8))
    plain, over = (plot.grid([[MAP]], images=[image], overlay=overlay).axes[1] for overlay in (0, 0.7))
    np.testing.assert_array_equal(drawn(plain), plot.rgb(MAP))
    np.testing.assert_array_equal(drawn(over), plot.rgb(MAP, image=image, overlay=0.7))


# ---- errors


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: plot.rgb(np.zeros(3)), r"relevance has shape \(3,\)"),
        (lambda: plot.heatmap(np.zeros((2, 4, 4, 3))), r"shape \(2, 4, 4, 3\).*relevance\[0\]"),
        (lambda: plot.rgb(np.zeros((0, 4))), r"\(0, 4\).*not empty"),
        (lambda: plot.rgb([[np.nan, np.inf, 1.0]]), r"relevance, \(1, 3\), has 2 NaN or infinite.*nan_to_num"),
        (lambda: plot.rgb([[1j]]), "real numbers"),
        (lambda: plot.rgb([["a"]]), "real numbers"),
        (lambda: plot.rgb([[1.0], [1.0, 2.0]]), "real numbers"),
        (lambda: plot.rgb(None), "real numbers, got NoneType"),
        (lambda: plot.rgb(MAP, image=np.zeros((8, 6))), r"image has shape \(8, 6\).*\(6, 8\) or \(6, 8, 3\)"),
        (lambda: plot.rgb(MAP, image=np.zeros((6, 8, 4))), r"image has shape \(6, 8, 4\)"),
        (lambda: plot.rgb(MAP, image=np.full((6, 8), np.nan)), "image.*48 NaN"),
        (lambda: plot.rgb(MAP, percentile=0), "percentile is 0"),
        (lambda: plot.rgb(MAP, percentile=100.5), "percentile is 100.5"),
        (lambda: plot.rgb(MAP, percentile=float("nan")), "percentile is nan"),
        (lambda: plot.rgb(MAP, scale=0), "scale is 0"),
        (lambda: plot.heatmap(MAP, scale=-1), "scale is -1"),
        (lambda: plot.rgb(MAP, scale=np.inf), "scale is inf"),
        (lambda: plot.rgb(MAP, overlay=2), "overlay is 2"),
        (lambda: plot.grid([]), r"rows of \[\] maps"),
        (lambda: plot.grid([[], []]), r"rows of \[0, 0\] maps"),
        (lambda: plot.grid([[MAP], [MAP, MAP]]), r"rows of \[1, 2\] maps"),
        (lambda: plot.grid([[MAP, MAP[0]]]), r"relevances\[0\]\[1\] has shape \(8,\)"),
        (lambda: plot.grid(np.zeros((2, 6, 8, 3))), r"relevances\[0\] has shape \(6, 8, 3\).*relevances\[:, None\]"),
        (lambda: plot.grid([[MAP]], images=np.zeros((2, 6, 8))), "images has 2 items.*write 1"),
        (lambda: plot.grid([[MAP]], images=[MAP[1:]]), r"images\[0\] has shape \(5, 8\)"),
        (lambda: plot.grid([[MAP]], row_labels=["a", "b"]), "row_labels has 2"),
        (lambda: plot.grid([[MAP, MAP]], column_labels=["a"]), "column_labels has 1.*write 2"),
        (lambda: plot.grid([[MAP]], shared_scale="rows"), "shared_scale is 'rows'"),
    ],
)
def test_bad_input_names_itself_and_the_way_out(call, says):
    with pytest.raises(InputError, match=says):
        call()


def test_an_unknown_colour_map_is_an_error():
    with pytest.raises(ValueError, match="no_such_map"):
        plot.rgb(MAP, cmap="no_such_map")


# ---- the ledger


def test_ledger_shows_what_each_layer_kept(tmp_path):
    """One bar per layer and kind of loss, in units of the start; the lengths are the ledger's own numbers."""
    w, b = np.asarray([[1.0, -2.0], [0.5, 1.0]]), np.asarray([0.5, -0.25])
    f = lambda x: jax.nn.relu(x @ w + b) @ w
    audit = conservation(f, composites.epsilon(0.1), target=0)(np.asarray([[1.0, 2.0], [3.0, 0.5]]))
    for example in (None, 1):
        pick = (lambda v: v.mean()) if example is None else (lambda v: v[1])
        figure = plot.ledger(audit, example=example, title="mine", save=tmp_path / "ledger.png")
        (ax,) = figure.axes
        drawn = {group.get_label(): [bar.get_width() for bar in group] for group in ax.containers}
        rows, unit = list(audit)[::-1], abs(pick(audit.start))
        assert [t.get_text() for t in ax.get_yticklabels()] == [f"{r.name} ({r.rule})" for r in rows] + [
            "explained input"
        ]
        for column in ("bias", "stabiliser", "dropped", "ended"):
            right = [pick(getattr(r, column)) / unit for r in rows]
            np.testing.assert_allclose(drawn[column][:-1], right, atol=1e-12)
        np.testing.assert_allclose(drawn["received"], pick(audit.received) / unit)
        total = sum(sum(drawn[c]) for c in drawn)
        np.testing.assert_allclose(total, pick(audit.start) / unit, rtol=1e-5)
    assert (tmp_path / "ledger.png").stat().st_size > 1000
    with pytest.raises(InputError, match="example=2.*2 examples"):
        plot.ledger(audit, example=2)


# ---- the house


def in_a_new_process(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)


def test_pyplot_is_never_imported():
    code = "import sys, jaxlrp.plot as p; p.grid([[[[1.0, -2.0]]]], colorbar=True).draw_without_rendering()"
    code += "; p.text(['a'], [1.0], colorbar=True).figure.draw_without_rendering()"
    done = in_a_new_process(code + "; sys.exit('matplotlib.pyplot' in sys.modules)")
    assert done.returncode == 0, done.stderr


def test_without_matplotlib_the_error_names_the_extra():
    done = in_a_new_process("import sys; sys.modules['matplotlib'] = None; import jaxlrp.plot")
    assert done.returncode == 1 and 'pip install "jaxlrp[plot]"' in done.stderr
