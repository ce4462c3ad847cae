"""bench.eight_styles: the figure shows the right images, and nothing in it overlaps."""

from __future__ import annotations

import base64
import io
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from bench.eight_styles import figures
from bench.eight_styles.reports import rows, write_figure
from bench.eight_styles.scores import RETURNED, Cell
from bench.no_search import images
from bench.no_search.images import Part, Style
from bench.pool import Row

SIDE = 96
LINES = (Cell("real images"), Cell("rank 16", "640"), Cell("the default", RETURNED))
LONG = Cell(
    "restarts every 320, dynamic, uniform timesteps, caption dropout 0.25, incomprehensibilitiesandmore" * 2, "640"
)


def strip(colours: list[tuple[int, int, int]]) -> str:
    """Return images of one colour each, as a result file has them."""
    pixels = np.concatenate([np.full((SIDE, SIDE, 3), colour, np.uint8) for colour in colours], 1)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "WEBP", lossless=True)
    return base64.b64encode(buffer.getvalue()).decode()


def drawn_row(cell: Cell, style: str, shade: int, count: int = 12) -> Row:
    cells = {cell.step: {"images": strip([(shade, 20 * number, 0) for number in range(count)])}, "other": {}}
    return {"kind": "training", "name": cell.name, "style": style, "seed": 0, "settings": {}, "cells": cells}


def drawn(*cells: Cell, styles: tuple[str, ...] = ("one", "two")) -> Any:
    numbered = list(itertools.product(styles, cells))
    return figures.strips(drawn_row(cell, style, 10 * number) for number, (style, cell) in enumerate(numbered))


def overlap(a: tuple[int, ...], b: tuple[int, ...]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def test_nothing_overlaps_and_everything_is_inside() -> None:
    prompts = {"one": ["a face", "an unbelievably long prompt of very many words"] * 4, "two": []}
    found = figures.layout(drawn(*LINES, LONG), ["one", "two"], [*LINES, LONG], prompts)
    boxes = [text.box for text in found.texts]
    boxes += [(left, top, left + image.width, top + image.height) for image, (left, top) in found.images]
    assert len(found.images) == 2 * 4 * figures.COLUMNS and len(found.texts) == 2 * (1 + 4) + 8
    assert not [pair for pair in itertools.combinations(boxes, 2) if overlap(*pair)]
    assert all(
        0 <= left and 0 <= top and right <= found.size[0] and bottom <= found.size[1]
        for left, top, right, bottom in boxes
    )


def test_texts_fit_into_their_boxes() -> None:
    prompts = {"one": ["incomprehensibilities of a face"] * 8}
    for text in figures.layout(drawn(*LINES, LONG), ["one"], [*LINES, LONG], prompts).texts:
        left, top, right, bottom = text.box
        font = figures._font(text.size)
        assert all(font.getlength(line) <= right - left for line in text.lines)
        assert sum(font.getbbox(line)[3] - font.getbbox(line)[1] for line in text.lines) <= bottom - top


def test_rows_show_the_images_of_their_line_in_its_order() -> None:
    found = figures.layout(drawn(*LINES), ["two"], [LINES[2], LINES[0]], columns=3)
    assert [image.getpixel((5, 5)) for image, _ in found.images] == [
        (shade, 20 * number, 0) for shade in (50, 30) for number in range(3)
    ]
    assert [text.lines for text in found.texts] == [("two",), ("the default",), ("real images",)]
    page = figures.comparison(drawn(*LINES), ["two"], [LINES[2], LINES[0]], columns=3)
    image, position = found.images[4]
    assert page.size == found.size and page.getpixel(position) == image.getpixel((0, 0))


def test_a_line_without_images_in_a_style_has_no_row_there() -> None:
    known = drawn(*LINES[:1], styles=("one",)) | drawn(*LINES[:2], styles=("two",))
    found = figures.layout(known, ["one", "two"], LINES)
    assert [text.lines[0] for text in found.texts] == [
        "one",
        "real images",
        "two",
        "real images",
        "rank 16, 640 steps",
    ]
    with pytest.raises(ValueError, match=r"Lines: the default\. Styles: one; there are: one, two\."):
        figures.layout(known, ["one"], [LINES[2]])


def test_a_file_without_images_is_refused() -> None:
    with pytest.raises(ValueError, match="no images"):
        figures.strips(
            [{**drawn_row(LINES[0], "one", 0), "cells": {"": {"style": 1.0}}}, {"name": "failed", "error": "x"}]
        )


def test_the_lines_of_a_figure_come_in_the_order_of_the_patterns() -> None:
    known = drawn(Cell("rank 16", "160"), Cell("other", "640"), Cell("rank 16", "640"), Cell("real images"))
    assert [str(cell) for cell in rows(known, ["rank 16, 640 *", "rank *"])] == [
        "rank 16, 640 steps",
        "rank 16, 160 steps",
    ]
    assert [str(cell) for cell in rows(known, None)] == ["real images", "rank 16, 160 steps", "rank 16, 640 steps"]


def test_the_figure_is_written_from_result_files_below_700_kb(tmp_path: Path) -> None:
    part = Part(np.zeros((1, 4, 4, 3), np.uint8), ["a face"])
    images.write(tmp_path / "data.zip", {"openmoji": Style(part, part)})
    result = {"data": "x", "rows": [drawn_row(cell, "openmoji", 30) for cell in LINES]}
    (tmp_path / "results.json").write_text(json.dumps(result), encoding="utf-8")
    heights = []
    for data in ("data.zip", "missing.zip"):
        write_figure(tmp_path / "out.webp", [tmp_path / "results.json"], tmp_path / data, None, None)
        with Image.open(tmp_path / "out.webp") as image:
            assert image.width > 8 * SIDE and image.height > 3 * SIDE
            heights.append(image.height)
        assert (tmp_path / "out.webp").stat().st_size < figures.MOST_BYTES
    assert heights[0] > heights[1]  # with the prompts


def test_a_figure_that_is_too_large_is_refused_and_not_left_behind(tmp_path: Path) -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (600, 600, 3), dtype=np.uint8))
    with pytest.raises(ValueError, match=r"Choose fewer styles or lines, or the suffix \.webp"):
        figures.save(noise, tmp_path / "noise.png")
    assert not list(tmp_path.iterdir())
    figures.save(noise, tmp_path / "noise.webp")
    assert (tmp_path / "noise.webp").stat().st_size <= figures.MOST_BYTES


def test_the_number_of_steps_stays_on_one_line_and_every_letter_has_a_glyph() -> None:
    cell = Cell("restarts every 320, dynamic, cut", "640")
    lines = [text.lines for text in figures.layout(drawn(cell), ["one"], [cell]).texts][1]
    assert lines == ("restarts every 320, dynamic, cut,", "640 steps") and "\xa0" not in "".join(lines)
