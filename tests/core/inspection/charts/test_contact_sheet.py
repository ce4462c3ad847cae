import pytest
import torch
from PIL import ImageFont

from aclora_core.inspection.charts.contact_sheet import (
    CELL_SIZE,
    COLUMNS,
    GAP,
    LINE_HEIGHT,
    cell_side,
    contact_sheet,
    extend,
)

BLUE = torch.tensor([0.0, 0.0, 1.0])
WIDTH = GAP + COLUMNS * (CELL_SIZE + GAP)


def test_the_sheet_shows_each_image_in_its_cell() -> None:
    images = [torch.zeros(64, 128, 3), BLUE.expand(CELL_SIZE, CELL_SIZE, 3)] + [torch.ones(32, 32, 3)] * 3
    sheet = contact_sheet(images, ["a", "b", "c", "d", "e"])
    assert sheet.dtype == torch.float32
    assert sheet.shape[1] == WIDTH
    middle = GAP + CELL_SIZE // 2
    torch.testing.assert_close(sheet[middle, middle], torch.zeros(3))
    torch.testing.assert_close(sheet[middle, middle + CELL_SIZE + GAP], BLUE)


@pytest.mark.parametrize("channels", [1, 2, 4])
def test_an_image_of_any_number_of_channels_is_shown_and_what_is_not_finite_is_black(channels: int) -> None:
    image = torch.ones(CELL_SIZE, CELL_SIZE, channels)
    image[: CELL_SIZE // 2] = torch.nan
    sheet = contact_sheet([image] * 4, ["a"] * 4)
    assert sheet[GAP + 20, GAP + 20].max() == 0 and sheet[GAP + CELL_SIZE - 20, GAP + 20].min() == 1


@pytest.mark.parametrize("count", [1, 2, 3])
def test_few_images_fill_the_width(count: int) -> None:
    sheet = contact_sheet([BLUE.expand(8, 8, 3)] * count, ["a"] * count)
    assert sheet.shape[1] == WIDTH
    blue = (sheet - BLUE).abs().amax(-1)[GAP + 20] < 0.01
    assert blue.sum() > WIDTH - (count + 1) * (GAP + 4) and blue[GAP + 2] and blue[-GAP - 4]


def test_rows_of_three_fill_the_width_too() -> None:
    images = [BLUE.expand(8, 8, 3)] * 3 + [torch.zeros(8, 8, 3)] * 3
    sheet = contact_sheet(images, ["a"] * 6, columns=3)
    assert sheet.shape[1] == WIDTH
    blue, black = ((sheet - colour).abs().amax(-1) < 0.01 for colour in (BLUE, torch.zeros(3)))
    rows = blue.sum(1) > WIDTH - 4 * (GAP + 4), black.sum(1) > WIDTH - 4 * (GAP + 4)
    assert rows[0].any() and rows[1].any()
    assert rows[0].nonzero().max() < rows[1].nonzero().min()


def test_captions_are_written_below() -> None:
    four = [torch.ones(64, 64, 3)] * 4
    plain = contact_sheet(four, [""] * 4)
    assert plain[GAP + CELL_SIZE + 2 :].min() == 1
    captioned = contact_sheet(four, ["ракета " * 50] + [""] * 3)
    assert captioned.shape == plain.shape  # a long caption is shortened
    assert captioned[GAP + CELL_SIZE + 2 :].min() < 0.5
    assert captioned[GAP + CELL_SIZE + 2 :, GAP + CELL_SIZE + 4 :].min() == 1


def test_notes_stand_below_the_captions_and_make_room_for_themselves() -> None:
    four = [torch.ones(64, 64, 3)] * 4
    plain, short, long = (contact_sheet(four, ["a"] * 4, notes=notes) for notes in ([], ["b"] * 4, ["b " * 40] * 4))
    assert plain.shape[0] < short.shape[0] < long.shape[0]
    below = slice(GAP + CELL_SIZE + LINE_HEIGHT + 4, GAP + CELL_SIZE + 2 * LINE_HEIGHT)
    assert plain[below].min() == 1 and short[below].min() < 0.7


def test_a_word_wider_than_its_cell_is_broken() -> None:
    sheet = contact_sheet([torch.ones(64, 64, 3)], ["w" * 500])
    assert sheet[:, -GAP:].min() == 1


@pytest.mark.parametrize("columns", [1, 4])
def test_no_more_of_a_long_caption_is_measured_than_is_shown(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[int] = []
    real = ImageFont.FreeTypeFont.getlength

    def getlength(font: ImageFont.FreeTypeFont, text: str) -> float:
        measured.append(len(text))
        return real(font, text)

    monkeypatch.setattr(ImageFont.FreeTypeFont, "getlength", getlength)
    caption = "一只黑猫坐在窗台上" * 223  # some 2000 characters without a space
    contact_sheet([torch.ones(8, 8, 3)] * columns, [caption] * columns)
    assert len(measured) < 50 * columns and sum(measured) < 10_000


def test_missing_captions_are_an_error() -> None:
    with pytest.raises(ValueError, match="2 and 1 given"):
        contact_sheet([torch.ones(8, 8, 3)] * 2, ["a"])


def test_a_dark_sheet_has_the_same_places_with_light_letters() -> None:
    two = [BLUE.expand(8, 8, 3)] * 2, ["a"] * 2
    light, dark = (contact_sheet(*two, notes=["b"] * 2, dark=dark) for dark in (False, True))
    assert light.shape == dark.shape
    assert light[0, 0].min() == 1 and dark[0, 0].max() < 0.2
    below = slice(GAP + cell_side(2) + 2, None)
    assert light[below].mean() > 0.9 and dark[below].mean() < 0.2 and dark[below].max() > 0.7


def test_an_extended_sheet_goes_on_in_its_background() -> None:
    for dark in (False, True):
        sheet = contact_sheet([BLUE.expand(8, 8, 3)], ["a"], dark=dark)
        longer = extend(sheet, len(sheet) + 50)
        assert len(longer) == len(sheet) + 50 and (longer[len(sheet) :] == sheet[0, 0]).all()
