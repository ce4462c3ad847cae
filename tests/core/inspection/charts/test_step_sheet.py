"""The sheet of several steps: each image in its row and column, and the marked row standing out."""

from __future__ import annotations

import pytest
import torch

from aclora_core.inspection import SheetRow, step_sheet
from aclora_core.inspection.charts.contact_sheet import GAP

RED, GREEN, BLUE = torch.eye(3)


def filled(colour: torch.Tensor, side: int = 128) -> torch.Tensor:
    return colour.expand(side, side, 3)


def place(sheet: torch.Tensor, colour: torch.Tensor) -> tuple[int, int, int, int]:
    """Return the box of a colour: top, left, bottom, right."""
    found = ((sheet - colour).abs().amax(-1) < 0.02).nonzero()
    (top, left), (bottom, right) = found.amin(0).tolist(), found.amax(0).tolist()
    return top, left, bottom, right


def test_a_row_for_each_step_and_a_column_for_each_prompt() -> None:
    rows = [SheetRow("step 1", [filled(RED), filled(GREEN)]), SheetRow("step 2", [filled(BLUE), filled(RED * 0)])]
    sheet = step_sheet(rows, ["a cat", "a dog"])
    assert sheet.dtype == torch.float32 and 0 <= sheet.min() and sheet.max() <= 1
    red, green, blue = (place(sheet, colour) for colour in (RED, GREEN, BLUE))
    assert red[0] == green[0] and red[1] == blue[1]
    assert red[3] < green[1] and red[2] < blue[0]
    assert green[1] - red[1] == blue[0] - red[0] == 128 + GAP


def test_many_rows_fill_blocks_side_by_side() -> None:
    rows = [SheetRow(f"step {step}", [filled(RED * step / 9)]) for step in range(10)]
    rows[9] = SheetRow("step 9", [filled(BLUE)], "automatic", strong=True)
    sheet = step_sheet(rows, ["a cat"])
    single = step_sheet(rows[:1], ["a cat"])
    height, width, _ = sheet.shape
    assert width == 2 * single.shape[1] and height == single.shape[0] + 4 * (128 + GAP)
    top, left, bottom, right = place(sheet, BLUE)
    assert left > width // 2 and bottom > height - 128
    assert torch.equal(sheet[bottom, width // 2 - 2], torch.ones(3)) and sheet[bottom, width // 2 + 2].min() < 0.95


@pytest.mark.parametrize(("side", "cell"), [(16, 128), (200, 200), (768, 256)])
def test_cells_are_as_large_as_the_images_within_limits(side: int, cell: int) -> None:
    sheet = step_sheet([SheetRow("step 1", [filled(BLUE, side)])], ["a cat"])
    top, left, bottom, right = place(sheet, BLUE)
    assert bottom - top == right - left == cell - 3  # a frame of one pixel


def test_rows_with_a_remark_have_dark_labels_and_strong_ones_another_background() -> None:
    rows = [SheetRow("step 1", [filled(BLUE)], *more) for more in (("",), ("can be chosen",), ("automatic", True))]
    plain, remarked, strong = (step_sheet([row], ["a cat"]) for row in rows)
    assert plain.shape == remarked.shape == strong.shape
    bottom_left = (-GAP, 2)
    assert torch.equal(plain[bottom_left], torch.ones(3)) and torch.equal(remarked[bottom_left], torch.ones(3))
    assert strong[bottom_left].min() < 0.95
    label = (slice(GAP + 24, GAP + 44), slice(0, 100))
    assert plain[label].min() > 0.4 and remarked[label].min() < 0.2


def test_a_row_without_images_says_so() -> None:
    row = SheetRow("step 1", [filled(BLUE)])
    sheet = step_sheet([row, SheetRow("step 2", [])], ["a cat"])
    below = sheet[place(sheet, BLUE)[2] + GAP // 2 :, 136:]
    assert (below < 0.5).any()


def test_a_wrong_number_of_images_is_refused() -> None:
    with pytest.raises(ValueError, match="Row 'step 1' has 1 images for 2 prompts"):
        step_sheet([SheetRow("step 1", [filled(BLUE)])], ["a cat", "a dog"])
    with pytest.raises(ValueError, match="needs images"):
        step_sheet([SheetRow("step 1", [])], ["a cat"])


def test_a_dark_sheet_has_the_same_places_and_a_marked_row_stands_out_in_it_too() -> None:
    rows = [SheetRow("step 1", [filled(BLUE)]), SheetRow("step 2", [filled(BLUE)], "automatic", strong=True)]
    light, dark = (step_sheet(rows, ["a cat"], dark) for dark in (False, True))
    assert light.shape == dark.shape and place(light, BLUE) == place(dark, BLUE)
    assert dark[0, 0].max() < 0.2 and dark.amax((0, 1)).min() > 0.6  # the letters
    assert (dark[-GAP, 2] - dark[0, 0]).abs().max() > 0.05
