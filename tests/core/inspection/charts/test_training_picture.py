"""The picture of a training: all of its parts are there, in the colours that were asked for."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image, ImageColor, ImageFont

from aclora_core.adapter import RankReport
from aclora_core.inspection.charts.canvas import DARK, LIGHT
from aclora_core.inspection.charts.training_picture import CHART_HEIGHT, WIDTH, training_picture

REPORT = RankReport({}, [0.9, 0.6, 0.4], [], [], {}, {})
RED, BLUE = torch.tensor([1.0, 0.0, 0.0]), torch.tensor([0.0, 0.0, 1.0])


def shares(picture: Image.Image, colour: tuple[int, int, int]) -> np.ndarray:
    """Return the share of each row that has a colour."""
    return (np.asarray(picture) == colour).all(-1).mean(1)


@pytest.mark.parametrize("dark", [False, True])
def test_a_live_picture_is_the_chart_alone_in_its_theme(dark: bool) -> None:
    picture = training_picture(REPORT, 10, dark=dark)
    assert picture.size == (WIDTH, CHART_HEIGHT)
    theme = DARK if dark else LIGHT
    assert picture.getpixel((0, 0)) == ImageColor.getrgb(theme.background)


def test_the_summary_stands_above_and_the_images_below_the_chart() -> None:
    chart = training_picture(REPORT, 10)
    told = training_picture(REPORT, 10, summary="It learned nothing. " * 8)
    above = told.height - chart.height
    assert above > 60 and np.array_equal(np.asarray(told)[above:], np.asarray(chart))
    images = [RED.expand(8, 8, 3), BLUE.expand(8, 16, 3)]
    drawn = training_picture(REPORT, 10, images, ["a red thing", "a blue thing"], "Drawn at step 3")
    assert np.array_equal(np.asarray(drawn)[: chart.height], np.asarray(chart))
    for colour in ((255, 0, 0), (0, 0, 255)):
        rows = shares(drawn, colour)
        assert rows[: chart.height].max() == 0 and rows.max() > 0.45


def test_eight_images_stand_in_two_rows_of_four() -> None:
    picture = training_picture(REPORT, 10, [RED.expand(8, 8, 3)] * 8, ["a"] * 8)
    filled = shares(picture, (255, 0, 0)) > 0.9
    assert int(np.diff(filled.astype(int)).clip(0).sum()) == 2
    assert training_picture(REPORT, 10, [RED.expand(8, 8, 3)], ["a"]).height < picture.height + WIDTH // 4


def test_the_font_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    words = {"captions": ["a cat"], "title": "Drawn at step 3", "summary": "It learned nothing."}
    first = training_picture(REPORT, 10, [RED.expand(8, 8, 3)], **words)
    monkeypatch.setattr(ImageFont, "truetype", None)
    assert training_picture(REPORT, 10, [RED.expand(8, 8, 3)], **words).tobytes() == first.tobytes()


def test_a_long_summary_is_cut_and_a_missing_caption_refused() -> None:
    assert training_picture(REPORT, 10, summary="word " * 2000).height < 2.2 * CHART_HEIGHT
    with pytest.raises(ValueError, match="a caption for each image: 1 and 0"):
        training_picture(REPORT, 10, [RED.expand(8, 8, 3)])
