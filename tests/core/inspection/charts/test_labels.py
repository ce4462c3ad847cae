"""Text in sheets: lines that fit, and characters that DejaVu lacks."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageDraw, ImageFont

from aclora_core.inspection.charts import labels
from aclora_core.inspection.charts.labels import wrap, write

SIZE, WIDTH = 15, 192
CAT = "猫"


def width(text: str) -> float:
    return labels._own_font(SIZE).getlength(text)


@pytest.fixture
def square_font(tmp_path: Path) -> Path:
    """A font with one character, a cat, which fills its width from the baseline up."""
    pen = TTGlyphPen(None)
    pen.moveTo((0, 0))
    for corner in ((0, 800), (1000, 800), (1000, 0)):
        pen.lineTo(corner)
    pen.closePath()
    font = FontBuilder(1000)
    font.setupGlyphOrder([".notdef", "cat"])
    font.setupCharacterMap({ord(CAT): "cat"})
    font.setupGlyf({".notdef": TTGlyphPen(None).glyph(), "cat": pen.glyph()})
    font.setupHorizontalMetrics({".notdef": (1000, 0), "cat": (1000, 0)})
    font.setupHorizontalHeader(ascent=800, descent=-200)
    font.setupNameTable({"familyName": "Square", "styleName": "Regular"})
    font.setupPost()
    path = tmp_path / "square.ttf"
    font.save(path)
    return path


@pytest.fixture
def system_fonts(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The names of the fonts that are looked for, which a test fills."""
    names: list[str] = []
    monkeypatch.setattr(labels, "_SYSTEM_FONTS", names)
    caches = labels._font_of, labels._system_fonts
    for cache in caches:
        cache.cache_clear()
    yield names
    for cache in caches:
        cache.cache_clear()


def drawn(line: str) -> Image.Image:
    image = Image.new("L", (WIDTH, 20))
    write(ImageDraw.Draw(image), (0, 0), line, "white", SIZE)
    return image


@given(st.text(st.sampled_from("iWжé "), max_size=120), st.integers(20, 200))
def test_lines_fit_and_are_as_long_as_possible(text: str, room: int) -> None:
    lines = list(wrap(text, room, SIZE))
    assert "".join(lines).replace(" ", "") == text.replace(" ", "")
    words = text.split()
    for line, following in zip(lines, lines[1:], strict=False):
        broken = not any(word.startswith(following.split()[0]) for word in words)
        assert width(line) <= room < width(line + (following[0] if broken else " " + following.split()[0]))
    assert not lines or width(lines[-1]) <= room


def test_a_character_wider_than_the_line_stands_alone() -> None:
    assert list(wrap("WW W", 5, SIZE)) == ["W", "W", "W"]


def test_what_dejavu_lacks_is_drawn_with_a_font_of_the_system(system_fonts: list[str], square_font: Path) -> None:
    system_fonts += ["no-such-font.ttf", str(square_font)]
    found = drawn(f"a{CAT}b")
    after = round(width("a")) + SIZE
    square = found.crop((after - SIZE + 1, 0, after - 1, 20))
    baseline = labels._own_font(SIZE).getmetrics()[0]
    assert square.getbbox() == (0, baseline - 12, SIZE - 2, baseline) and min(square.crop(square.getbbox()).tobytes())
    assert found.crop((0, 0, after - SIZE, 20)).tobytes() == drawn("a").crop((0, 0, after - SIZE, 20)).tobytes()
    assert found.crop((after + 1, 0, WIDTH, 20)).getbbox()
    assert list(wrap(CAT * 5, 2 * SIZE, SIZE)) == [CAT * 2, CAT * 2, CAT]


def test_without_such_a_font_it_is_a_box_as_any_missing_character(
    system_fonts: list[str], square_font: Path, tmp_path: Path
) -> None:
    damaged = tmp_path / "damaged.ttf"
    damaged.write_bytes(square_font.read_bytes()[:200])
    system_fonts += ["no-such-font.ttf", str(damaged), str(square_font)]
    font = ImageFont.truetype(str(labels._own_font(SIZE).path), SIZE)
    expected = Image.new("L", (WIDTH, 20))
    ImageDraw.Draw(expected).text((0, 0), "犬 Größe ракета", fill="white", font=font)
    assert drawn("犬 Größe ракета").tobytes() == expected.tobytes()
