"""Captions and labels: broken into lines, and written in a font that has their characters."""

from __future__ import annotations

from bisect import bisect
from collections.abc import Iterable, Iterator
from contextlib import suppress
from functools import cache
from itertools import groupby, islice
from pathlib import Path
from typing import TYPE_CHECKING, cast

from PIL import ImageDraw, ImageFont

if TYPE_CHECKING:
    from matplotlib.ft2font import FT2Font

Font = ImageFont.FreeTypeFont

# Fonts with Chinese, Japanese or Korean characters; Pillow finds them in the system's folders.
_SYSTEM_FONTS = (
    "msyh.ttc",  # Windows
    "YuGothM.ttc",
    "malgun.ttf",
    "Hiragino Sans GB.ttc",  # macOS
    "AppleSDGothicNeo.ttc",
    "NotoSansCJK-Regular.ttc",  # Linux
    "wqy-microhei.ttc",
    "wqy-zenhei.ttc",
    "DroidSansFallbackFull.ttf",
)


def wrap(text: str, width: int, size: int) -> Iterator[str]:
    """Split a text at spaces into lines that fit; a word that is too wide is broken.

    Args:
        text: of any length, as only the lines that are asked for are measured.
        width: in pixels.
        size: of the font in pixels.
    """
    line = ""
    for word in text.split():
        longer = f"{line} {word}" if line else word
        if _fits(longer, width, size):
            line = longer
            continue
        if line:
            yield line
        while not _fits(word, width, size):
            end = _longest_start(word, width, size)
            yield word[:end]
            word = word[end:]
        line = word
    if line:
        yield line


def shorten(lines: Iterable[str], count: int) -> list[str]:
    """Return the first lines; the last one ends in "…" if some are missing."""
    first = list(islice(lines, count + 1))
    return first if len(first) <= count else [*first[: count - 1], first[count - 1][:-2] + "…"]


def write(draw: ImageDraw.ImageDraw, place: tuple[int, int], line: str, ink: str, size: int) -> None:
    """Write a line. place: left and top in pixels; size: of the font in pixels."""
    left, top = float(place[0]), place[1]
    baseline = top + _own_font(size).getmetrics()[0]  # which the fonts of a line share
    for font, part in _parts(line, size):
        draw.text((left, baseline), part, fill=ink, font=font, anchor="ls")
        left += font.getlength(part)


def _longest_start(word: str, width: int, size: int) -> int:
    """Return how many characters of a word that does not fit into a line do, one at least."""
    return max(1, bisect(range(1, len(word)), False, key=lambda end: not _fits(word[:end], width, size)))


def _fits(text: str, width: int, size: int) -> bool:
    # A character is a pixel wide or more, so a text of more characters need not be measured.
    return len(text) <= width and sum(font.getlength(part) for font, part in _parts(text, size)) <= width


def _parts(text: str, size: int) -> Iterator[tuple[Font, str]]:
    """Split a text into parts of one font each."""
    for font, characters in groupby(text, lambda character: _font_of(character, size)):
        yield font, "".join(characters)


@cache
def _font_of(character: str, size: int) -> Font:
    """Return DejaVu, or the first font of the system that has a character which DejaVu lacks, if there is one."""
    own = _own_font(size)
    if _has(own, character):
        return own
    return next((font for font in _system_fonts(size) if _has(font, character)), own)


@cache
def _own_font(size: int) -> Font:
    """Load DejaVu from matplotlib, which has Greek, Cyrillic and more, unlike Pillow's own font."""
    import matplotlib

    path = Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")
    return ImageFont.truetype(str(path), size) if path.is_file() else cast(Font, ImageFont.load_default(size))


@cache
def _system_fonts(size: int) -> list[Font]:
    found = []
    for name in _SYSTEM_FONTS:
        with suppress(OSError, RuntimeError):  # it is not there, or cannot be read
            font = ImageFont.truetype(name, size)
            _glyphs(str(font.path))
            found.append(font)
    return found


def _has(font: Font, character: str) -> bool:
    # Pillow's own font has no path, and is used for what no other font has.
    return isinstance(font.path, str) and _glyphs(font.path).get_char_index(ord(character)) != 0


@cache
def _glyphs(path: str) -> FT2Font:
    """Open a font file with matplotlib, which tells what characters it has, as Pillow does not."""
    from matplotlib.ft2font import FT2Font

    return FT2Font(path)
