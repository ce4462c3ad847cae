"""tools.tiny_base.derived_styles: the looks that are made of the icon sets' images, and their words."""

import itertools

import pytest
import torch

from tools.tiny_base import derived_styles
from tools.tiny_base.derived_styles import DERIVED, style_words
from tools.tiny_base.icon_sets import ALL_STYLES


@pytest.fixture(scope="module")
def images():
    """A red square with a dark blue one in it on white, and a yellow bar; (2, 3, 64, 64)."""
    made = torch.ones(2, 3, 64, 64)
    made[0, :, 12:52, 12:52] = torch.tensor([0.9, 0.1, 0.1])[:, None, None]
    made[0, :, 26:38, 26:38] = torch.tensor([0.1, 0.1, 0.4])[:, None, None]
    made[1, :, 8:56, 24:40] = torch.tensor([1.0, 0.8, 0.2])[:, None, None]
    return made


@pytest.mark.parametrize("name", DERIVED)
def test_every_style_gives_images_of_the_same_shape_and_range_and_leaves_its_input_alone(images, name):
    before = images.clone()
    drawn = DERIVED[name](images)
    assert drawn.shape == images.shape and torch.isfinite(drawn).all()
    assert drawn.min() >= 0 and drawn.max() <= 1
    assert torch.equal(images, before)


def test_no_two_styles_look_the_same(images):
    drawn = {"as it is": images} | {name: derive(images) for name, derive in DERIVED.items()}
    for (one, first), (other, second) in itertools.combinations(drawn.items(), 2):
        assert (first - second).abs().mean() > 0.01, (one, other)


def test_lines_are_where_colours_meet(images):
    drawn = derived_styles.outline(images)[0]
    assert drawn[:, 12, 30].max() < 0.1 and drawn[:, 26, 30].max() < 0.1  # the borders of both squares
    assert drawn[:, 4, 4].min() == 1 and drawn[:, 18, 18].min() == 1 and drawn[:, 32, 32].min() == 1


def test_ink_keeps_the_dark_part_of_a_shape_and_its_contour(images):
    drawn = derived_styles.ink(images)[0]
    assert drawn[:, 32, 32].max() < 0.1 and drawn[:, 12, 30].max() < 0.1
    assert drawn[:, 18, 18].min() > 0.9 and drawn[:, 4, 4].min() == 1


def test_a_silhouette_knows_no_inner_lines(images):
    drawn = derived_styles.silhouette(images)
    assert drawn[0, :, 14:50, 14:50].max() == 0 and drawn[1, :, 10:54, 26:38].max() == 0
    assert drawn[:, :, :8].min() == 1


def test_words_are_single_and_name_no_icon_set():
    taken = {style.word for style in ALL_STYLES.values()} | set(ALL_STYLES)
    assert all(name.isalpha() for name in DERIVED) and not taken & set(DERIVED)
    assert style_words("noto", "outline") == "noto outline"
