import pytest
import torch

from aclora_core.contact_sheet import CELL, COLUMNS, GAP, LINE, contact_sheet

BLUE = torch.tensor([0.0, 0.0, 1.0])


def test_the_sheet_shows_each_picture_in_its_cell() -> None:
    pictures = [torch.zeros(64, 128, 3), BLUE.expand(CELL, CELL, 3)] + [torch.ones(32, 32, 3)] * 3
    sheet = contact_sheet(pictures, ["a", "b", "c", "d", "e"], [])
    assert sheet.dtype == torch.float32
    assert sheet.shape[1] == GAP + COLUMNS * (CELL + GAP)
    middle = GAP + CELL // 2
    torch.testing.assert_close(sheet[middle, middle], torch.zeros(3))
    torch.testing.assert_close(sheet[middle, middle + CELL + GAP], BLUE)


def test_captions_and_notes_are_written_below() -> None:
    plain = contact_sheet([torch.ones(64, 64, 3)], [""], [])
    assert plain[GAP + CELL + 2 :].min() == 1
    captioned = contact_sheet([torch.ones(64, 64, 3)], ["ракета " * 50], [])
    assert captioned.shape == plain.shape  # a long caption is cut, not spilled
    assert captioned[GAP + CELL + 2 :].min() < 0.5
    assert captioned[:, GAP + CELL + 4 :].min() == 1
    noted = contact_sheet([torch.ones(64, 64, 3)], [""], ["1 picture", "word " * 300])
    assert noted.shape[0] > plain.shape[0] + 3 * LINE


def test_a_word_wider_than_its_cell_is_broken() -> None:
    sheet = contact_sheet([torch.ones(64, 64, 3)], ["w" * 500], ["w" * 500])
    assert sheet[:, -GAP:].min() == 1


def test_missing_captions_are_an_error() -> None:
    with pytest.raises(ValueError, match="2 and 1 given"):
        contact_sheet([torch.ones(8, 8, 3)] * 2, ["a"], [])
