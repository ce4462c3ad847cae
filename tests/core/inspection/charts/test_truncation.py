"""Chart and table of truncation losses: that they show the numbers, and odd input."""

import math
from dataclasses import replace

import numpy as np
import pytest
from PIL import ImageColor

from aclora_core.adapter.truncation_loss import Truncation, TruncationLoss
from aclora_core.inspection.charts.canvas import DARK, LIGHT
from aclora_core.inspection.charts.truncation import truncation_chart
from aclora_core.inspection.tables import truncation_loss_table
from aclora_core.text import size_text

TRUNCATIONS = [
    TruncationLoss(Truncation.from_name("rank 1"), 1.0, 187_000, 0.56, 0.006, False),
    TruncationLoss(Truncation.from_name("rank 4"), 4.0, 750_000, 0.4525, 0.0035, True),
    TruncationLoss(Truncation.from_name("energy 95%"), 6.5, 1_210_000, 0.451, 0.002, False),
    TruncationLoss(Truncation.from_name("rank 8"), 8.0, 1_500_000, 0.4495, 0.0, False),
    TruncationLoss(Truncation.from_name("whole"), 16.0, 3_000_000, 0.452, 0.004, False),
]
NODE, FULL = (512, 320), (1024, 640)


def pixels(chart, colour, tolerance=40):
    """Where a chart has a colour: (height, width), bool."""
    distance = np.abs(np.asarray(chart, dtype=int) - ImageColor.getrgb(colour)).max(-1)
    return distance <= tolerance


def ring(truncations, size=NODE):
    """The middle of the ring: the pixels of its colour below the heading and the sizes."""
    rows, columns = np.nonzero(pixels(truncation_chart(truncations, size), LIGHT.mark)[45:])
    return (rows.min() + rows.max()) / 2 + 45, (columns.min() + columns.max()) / 2


def with_chosen(place):
    return [replace(tried, chosen=number == place) for number, tried in enumerate(TRUNCATIONS)]


@pytest.mark.parametrize(("dark", "theme"), [(False, LIGHT), (True, DARK)])
@pytest.mark.parametrize("size", [NODE, FULL, (256, 160)])
def test_the_chart_has_its_size_and_theme_and_cuts_nothing_off(size, dark, theme):
    chart = truncation_chart(TRUNCATIONS, size, dark)
    assert chart.size == size and chart.mode == "RGB"
    array = np.asarray(chart)
    edges = np.concatenate([array[0], array[-1], array[:, 0], array[:, -1]])
    assert (edges == ImageColor.getrgb(theme.background)).all()
    for colour in (theme.ink, theme.first, theme.second, theme.third, theme.mark):
        assert pixels(chart, colour).sum() > 8


def test_the_ring_is_where_the_chosen_truncation_is():
    places = [ring(with_chosen(number)) for number in range(len(TRUNCATIONS))]
    heights, across = [row for row, _ in places], [column for _, column in places]
    assert across == sorted(across) and across[-1] - across[0] > 300
    order = sorted(range(len(TRUNCATIONS)), key=lambda number: -TRUNCATIONS[number].loss)
    assert heights[order[0]] < heights[order[1]] - 100 and heights[order[-1]] >= max(heights) - 1


def test_doubling_the_rank_is_one_step_to_the_right():
    ranks = (1.0, 2.0, 4.0, 16.0)
    truncations = [
        TruncationLoss(Truncation.from_name(f"rank {rank:g}"), rank, 1000, 0.5, 0.0, False) for rank in ranks
    ]
    columns = [ring([replace(tried, chosen=tried.mean_rank == rank) for tried in truncations])[1] for rank in ranks]
    step = columns[1] - columns[0]
    assert columns[2] - columns[1] == pytest.approx(step, abs=1.5)
    assert columns[3] - columns[2] == pytest.approx(2 * step, abs=1.5)


def test_a_larger_error_makes_a_longer_bar():
    def height(error):
        truncations = [
            TruncationLoss(Truncation.from_name("rank 2"), 2.0, 1000, 0.5, error, False),
            TruncationLoss(Truncation.from_name("whole"), 8.0, 4000, 0.4, 0.0, False),
        ]
        chart = pixels(
            truncation_chart([*truncations, replace(truncations[1], truncation=Truncation("signal"), loss=0.7)]),
            LIGHT.first,
            90,
        )
        # Within the column of the truncation, left of the legend.
        return chart[45:, :300].any(1).sum()

    assert height(0.09) > height(0.03) + 20 > height(0.0) + 30


def test_without_a_chosen_cut_there_is_no_ring():
    assert not pixels(truncation_chart([replace(tried, chosen=False) for tried in TRUNCATIONS]), LIGHT.mark).any()


def test_the_chosen_size_is_written_where_there_is_no_room_for_all():
    crowded = [
        TruncationLoss(Truncation.from_name(f"rank {r}"), 8 + r / 100, r * 10**6, 0.5, 0.0, r == 13)
        for r in range(1, 30)
    ]
    band = pixels(truncation_chart(crowded), LIGHT.mark)[20:40]
    assert band.sum() > 15


@pytest.mark.parametrize(
    "truncations",
    [
        [replace(tried, loss=0.5, error=0.0) for tried in TRUNCATIONS],
        [replace(TRUNCATIONS[-1], mean_rank=6.4, chosen=True)],
        [replace(tried, loss=0.0, error=0.0) for tried in TRUNCATIONS],
        [replace(tried, error=math.nan) for tried in TRUNCATIONS],
        [
            *TRUNCATIONS,
            TruncationLoss(Truncation.from_name("whole"), 2.0, 1, math.nan, math.nan, False),
            TruncationLoss(Truncation.from_name("rank 3"), 3.0, 1, math.inf, 0.0, False),
        ],
        [
            *TRUNCATIONS,
            TruncationLoss(Truncation.from_name("none"), 0.0, 0, 0.9, 0.0, False),
            TruncationLoss(Truncation.from_name("odd"), math.nan, 0, 0.9, 0.0, False),
        ],
        [
            *TRUNCATIONS,
            TruncationLoss(Truncation.from_name("$x$ \\alpha"), 1e-3, 2**62, -0.5, 1e300, False),
            TruncationLoss(Truncation.from_name("rank 9"), 1e300, 1, 0.4, 0.1, False),
        ],
        [
            TruncationLoss(Truncation.from_name(f"rank {rank}"), rank, rank * 10**6, 1 / rank, 0.001, rank == 40)
            for rank in range(1, 129)
        ],
        [replace(tried, mean_rank=0.4) for tried in TRUNCATIONS],
    ],
    ids=["equal", "one", "zero", "no errors", "no numbers", "rank 0", "hostile", "many", "below one"],
)
@pytest.mark.parametrize("size", [NODE, (256, 160)])
def test_odd_truncations_are_drawn(truncations, size):
    chart = truncation_chart(truncations, size)
    assert chart.size == size and pixels(chart, LIGHT.ink).sum() > 30


def test_cuts_that_cannot_be_drawn_are_counted_in_the_heading():
    lost = TruncationLoss(Truncation.from_name("rank 2"), 2.0, 375_000, math.nan, 0.0, False)
    whole, less = (
        np.asarray(truncation_chart(truncations))[:22, :280] for truncations in (TRUNCATIONS, [*TRUNCATIONS, lost])
    )
    assert pixels(less, LIGHT.ink).sum() > pixels(whole, LIGHT.ink).sum() + 20


def test_truncations_without_any_loss_get_a_sentence_in_the_chart_and_none_at_all_an_error():
    chart = truncation_chart([replace(tried, loss=math.nan) for tried in TRUNCATIONS])
    assert pixels(chart, LIGHT.ink).any() and not pixels(chart, LIGHT.first).any()
    with pytest.raises(ValueError, match="There is nothing to draw. No truncation was tried"):
        truncation_chart([])


def test_the_table_has_a_line_for_each_truncation_in_its_order():
    lines = truncation_loss_table(TRUNCATIONS).splitlines()
    assert [line.split("  ")[0] for line in lines] == ["truncation", *(tried.name for tried in TRUNCATIONS)]
    assert lines[2].split() == ["rank", "4", "4.0", "750", "kB", "0.4525", "0.0030", "0.0035", "yes"]
    assert lines[4].split()[-3:] == ["0.0000", "0.0000", "no"]
    assert len({len(line) for line in lines}) == 1


def test_the_table_shows_unknown_for_nan_and_a_sentence_without_truncations():
    rows = truncation_loss_table([replace(TRUNCATIONS[0], loss=math.nan, error=math.inf), TRUNCATIONS[1]]).splitlines()
    assert rows[1].count("unknown") == 3 and rows[2].split()[5:7] == ["0.4525", "0.0000"]
    assert "unknown" in truncation_loss_table([replace(TRUNCATIONS[0], loss=math.nan)])
    assert truncation_loss_table([]).startswith("No truncation was tried") and "\n" not in truncation_loss_table([])


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.00 kB"),
        (9_996, "10.0 kB"),
        (99_960, "100 kB"),
        (846_000, "846 kB"),
        (999_600, "1.00 MB"),
        (1_840_000, "1.84 MB"),
        (34_100_000, "34.1 MB"),
        (182_000_000, "182 MB"),
        (6_400_000_000, "6.40 GB"),
    ],
)
def test_sizes_have_three_digits(size, text):
    assert size_text(size) == text
