"""Charts: sizes, themes, odd input, and that the pixels show the numbers."""

import ast
import math
import sys
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageColor

from aclora_core.adapter.rank_report import RankReport, Restart
from aclora_core.inspection.charts.canvas import DARK, LIGHT, notice, shorten, tick_indices, to_batch
from aclora_core.inspection.charts.layers import layer_map, spectrum_chart
from aclora_core.inspection.charts.training import training_chart, trajectory_chart
from aclora_core.method.restart import LayerRank

CORE = Path(__file__).parents[4] / "aclora_core"
NAMES = [f"diffusion_model.joint_blocks.{block}.x_block.{module}" for block in range(6) for module in ("attn", "mlp")]
NODE, SMALL = (512, 320), (256, 160)


def restart(step, kept=(8, 4), threshold=0.5, loss=0.4, jump=math.nan):
    layers = {name: LayerRank(9, 7, kept[place % len(kept)], 0.8, jump) for place, name in enumerate(NAMES)}
    return Restart(step, step // 10, loss, threshold, layers)


def report(restarts):
    return RankReport({}, [0.5] * 100, [], list(restarts), {name: [2.0, 1.0] for name in NAMES}, {})


def spectra(count, rank=16):
    names = [f"diffusion_model.input_blocks.{place // 10}.1.attn{place % 10}.to_q" for place in range(count)]
    return {name: [2.0 ** -(i + place % 3) for i in range(rank)] for place, name in enumerate(names)}


def pixels(chart, colour, tolerance=40):
    """Where a chart has a colour: (height, width), bool."""
    distance = np.abs(np.asarray(chart, dtype=int) - ImageColor.getrgb(colour)).max(-1)
    return distance <= tolerance


def all_charts(size, dark):
    return [
        training_chart([0.9, 0.5, 0.4], 10, [restart(1), restart(2)], [(2, 0.5)], size, dark),
        trajectory_chart(report([restart(10), restart(20)]), size, dark),
        spectrum_chart(spectra(5), None, size, dark),
        spectrum_chart(spectra(40), dict.fromkeys(spectra(40), 3), size, dark),
        layer_map(dict.fromkeys(NAMES, 3), "Signal rank", size, dark),
        notice("Nothing to draw.", size, dark),
    ]


cached_charts = cache(all_charts)


@pytest.mark.parametrize("size", [NODE, (257, 161)])
def test_every_chart_has_exactly_the_size_that_was_asked_for(size):
    for chart in cached_charts(size, False):
        assert chart.size == size and chart.mode == "RGB"


@pytest.mark.parametrize(("dark", "theme"), [(False, LIGHT), (True, DARK)])
def test_every_chart_is_on_the_theme_s_background_with_letters_of_its_ink(dark, theme):
    for chart in cached_charts(NODE, dark):
        assert chart.getpixel((1, 1)) == ImageColor.getrgb(theme.background)
        assert pixels(chart, theme.ink).sum() > 30


def test_nothing_is_cut_off_at_the_chart_s_edge():
    for chart in cached_charts(NODE, False):
        array = np.asarray(chart)
        edges = np.concatenate([array[0], array[-1], array[:, 0], array[:, -1]])
        assert (edges == 255).all()


def test_charts_leave_matplotlib_s_global_state_alone():
    import matplotlib

    before = matplotlib.rcParams.copy()
    all_charts(SMALL, True)
    assert matplotlib.rcParams.copy() == before
    assert "matplotlib.pyplot" not in sys.modules, "it holds every figure, and picks a window system"


def test_matplotlib_is_imported_by_the_first_chart_and_not_before():
    for path in CORE.glob("*.py"):
        body = ast.parse(path.read_text(encoding="utf-8")).body
        imports = [ast.unparse(node) for node in body if isinstance(node, ast.Import | ast.ImportFrom)]
        assert not [line for line in imports if "matplotlib" in line], path.name


def test_the_same_input_gives_the_same_chart():
    first, second = cached_charts(NODE, True), all_charts(NODE, True)
    assert all(a.tobytes() == b.tobytes() for a, b in zip(first, second, strict=True))


def test_a_chart_that_is_too_small_to_read_is_refused():
    with pytest.raises(ValueError, match="256 x 160 pixels or more, but 100 x 100"):
        training_chart([0.5], 1, size=(100, 100))


@pytest.mark.parametrize("losses", [[], [0.5], [math.nan] * 5, [0.1, math.inf, math.nan, 0.2], [0.0] * 50, [1e-9, 1e9]])
def test_the_live_chart_takes_any_losses(losses):
    assert training_chart(losses, 100, size=SMALL).size == SMALL


def test_the_live_chart_shows_the_course_of_the_loss():
    falling = training_chart([1.0 - step / 200 for step in range(200)], 200)
    rows, columns = np.nonzero(pixels(falling, LIGHT.first))
    left, right = rows[columns < 150].mean(), rows[columns > 400].mean()
    assert right > left + 100


@pytest.mark.parametrize("theme", [LIGHT, DARK])
def test_the_fit_of_the_own_images_is_drawn_where_it_was_measured(theme):
    losses, fit = [0.5] * 200, [(0, 0.6), (100, 0.4), (200, 0.1)]
    dark = theme is DARK
    without, chart = training_chart(losses, 200, dark=dark), training_chart(losses, 200, dark=dark, fit=fit)
    rows, columns = np.nonzero(pixels(chart, theme.third))
    below = rows > 25  # the legend is above
    assert not pixels(without, theme.third).any() and (rows < 20).any()
    assert rows[below & (columns > 450)].mean() > rows[below & (columns < 100)].mean() + 100


def test_a_fit_before_the_first_step_and_one_that_is_no_number_are_drawn():
    assert training_chart([], 100, size=SMALL, fit=[(0, 0.5)]).size == SMALL
    assert training_chart([0.5] * 80, 100, size=SMALL, fit=[(0, 0.5), (80, math.nan)]).size == SMALL


def test_a_single_spike_does_not_flatten_the_curve():
    spiked = [1.0 - step / 400 for step in range(300)]
    spiked[150] = 50.0
    rows, columns = np.nonzero(pixels(training_chart(spiked, 300), LIGHT.first))
    # The mean carries the spike for a while; before and after it the fall can still be seen.
    assert rows[columns > 450].mean() > rows[columns < 150].mean() + 100


def test_ranks_come_below_the_loss_after_the_first_restart():
    losses = [0.5 - step / 1000 for step in range(100)]
    before, after = training_chart(losses, 100), training_chart(losses, 100, [restart(30), restart(60)])
    assert not pixels(before, LIGHT.second).any()
    rows = np.nonzero(pixels(after, LIGHT.second))[0]
    assert rows.min() > 0.5 * NODE[1]


def test_a_long_training_is_drawn_too():
    losses = [1.0 / (1 + step / 1000) for step in range(30_000)]
    chart = training_chart(losses, 40_000, [restart(step) for step in range(100, 30_000, 100)])
    assert pixels(chart, LIGHT.first).sum() > 300


def test_the_trajectory_takes_one_restart_and_a_noise_floor_and_refuses_none():
    assert trajectory_chart(report([restart(10, threshold="noise floor")])).size == NODE
    with pytest.raises(ValueError, match="no restart"):
        trajectory_chart(report([]))


def test_the_trajectory_falls_where_fewer_components_are_kept():
    chart = trajectory_chart(report([restart(20, (16, 16)), restart(90, (2, 2))]))
    upper = pixels(chart, LIGHT.second)[60:176]  # below the legend
    rows, columns = np.nonzero(upper)
    assert rows[columns > 400].mean() > rows[columns < 120].mean() + 40


def test_the_jump_of_the_delta_is_drawn_where_it_was_measured():
    def rows(*jumps):
        chart = trajectory_chart(report([restart(20 + 30 * place, jump=jump) for place, jump in enumerate(jumps)]))
        return np.nonzero(pixels(chart, LIGHT.mark)[188:])  # below the heading and its legend

    assert not len(rows(math.nan, math.nan)[0])
    found, columns = rows(0.9, math.nan, 0.2, 0.1)
    assert found[columns < 150].mean() < found[columns > 350].mean() - 30
    # A jump beyond the size of the delta itself stays in the chart.
    assert len(rows(3.0, 2.9)[0]) > 50


@pytest.mark.parametrize("count", [1, 5, 8, 9, 800])
def test_spectra_of_any_number_of_layers(count):
    values = spectra(count)
    assert spectrum_chart(values, dict.fromkeys(values, 4)).size == NODE


@pytest.mark.parametrize(
    "values",
    [
        {"a": [0.0, 0.0]},
        {name: [0.0] for name in NAMES},
        {name: [1.0] * (1 + place) for place, name in enumerate(NAMES)},
        {name: [1e-30, 0.0] for name in NAMES},
        {"$x$ \\alpha": [1.0, 0.5], "_y": [1.0, 0.2]},
    ],
    ids=["zero", "all zero", "different ranks", "tiny", "odd names"],
)
def test_odd_spectra_are_drawn(values):
    assert spectrum_chart(values).size == NODE


def test_the_end_of_the_signal_is_marked_in_both_kinds_of_spectra():
    for count in (4, 40):
        values = spectra(count)
        plain = pixels(spectrum_chart(values), LIGHT.mark).sum()
        assert pixels(spectrum_chart(values, dict.fromkeys(values, 4)), LIGHT.mark).sum() > plain + 100


def test_charts_without_layers_are_refused():
    with pytest.raises(ValueError, match="no plain LoRA layer"):
        spectrum_chart({})
    with pytest.raises(ValueError, match="no plain LoRA layer"):
        spectrum_chart({"a": []})
    with pytest.raises(ValueError, match="no plain LoRA layer"):
        layer_map({}, "Signal rank")


def cell_colours(values, title="Norm"):
    """The commonest colours within the map, most frequent first."""
    chart = layer_map(values, title).crop((160, 40, 440, 260))
    return [colour for _, colour in sorted(chart.getcolors(100_000), reverse=True)]


def test_a_map_gives_equal_layers_one_colour_and_others_another():
    assert cell_colours(dict.fromkeys(NAMES, 0.5))[0] == cell_colours(dict.fromkeys(NAMES, 2.5))[0]
    first, second = cell_colours({name: 0.5 + 2 * place for place, name in enumerate(NAMES[:2])})[:2]
    assert first != second


@pytest.mark.parametrize("value", [0, 0.0, 1e-30, 1e30])
def test_a_map_of_any_size_of_numbers(value):
    assert layer_map(dict.fromkeys(NAMES, value), "Norm").size == NODE


@pytest.mark.parametrize("count", [1, 3, 90])
def test_a_map_of_layers_without_blocks(count):
    assert layer_map({f"diffusion_model.layer_{place}_x": 2 for place in range(count)}, "Rank").size == NODE


def test_labels_fit():
    assert shorten("joint_blocks.0 attn.qkv", 60.0) == "… attn.qkv"
    assert shorten("short", 60.0) == "short"
    assert tick_indices(10, 100.0, 10.0) == list(range(10))
    assert tick_indices(10, 100.0, 25.0) == [0, 3, 6, 9]
    assert tick_indices(0, 100.0, 10.0) == []


def test_images_become_a_batch():
    batch = to_batch([Image.new("RGB", (4, 3), "#ff0000"), Image.new("RGB", (4, 3), "#0000ff")])
    assert batch.shape == (2, 3, 4, 3) and batch.dtype == torch.float32
    assert batch[0, 0, 0].tolist() == [1.0, 0.0, 0.0] and batch[1, 2, 3].tolist() == [0.0, 0.0, 1.0]
