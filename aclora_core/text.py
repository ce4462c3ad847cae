"""What sentences for the user are made of."""

from __future__ import annotations

from collections.abc import Sequence


def counted(number: int, noun: str) -> str:
    """A number of things: 1 picture, 2 pictures."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def some(names: Sequence[object], most: int = 3) -> str:
    """The first names of many, and how many more there are."""
    return ", ".join(map(str, names[:most])) + (f" and {len(names) - most} more" if len(names) > most else "")


def reason(error: Exception) -> str:
    """The first line of an error, or its kind where it has no words."""
    return str(error).split("\n")[0] or type(error).__name__


def text_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns side by side: the first to the left, the others, numbers for the most part, to the right."""
    columns = list(zip(header, *rows, strict=True))
    widths = [max(map(len, column)) for column in columns]
    lines = []
    for row in (header, *rows):
        cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def mean_and_range(counts: Sequence[int]) -> str:
    """In a few words."""
    return f"{sum(counts) / len(counts):.1f} ({min(counts)} to {max(counts)})" if counts else "none"


_UNITS = ((9, "GB"), (6, "MB"), (3, "kB"))  # powers of ten


def size_text(size: int) -> str:
    """Bytes in the unit that suits, with three digits: "846 kB", "1.84 MB"."""
    power, unit = next((each for each in _UNITS if size >= 0.9995 * 10 ** each[0]), (0, "B"))
    value = size / 10**power
    digits = 0 if value >= 99.95 or power == 0 else 1 if value >= 9.995 else 2
    return f"{value:.{digits}f} {unit}"
