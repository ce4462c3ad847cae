"""Sentences and columns for messages, tables and charts: plurals, lists of names, sizes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

_UNITS = ((9, "GB"), (6, "MB"), (3, "kB"))  # powers of ten


def count_noun(number: int, noun: str) -> str:
    """Return a count with its noun, in the plural unless it is one: "1 image", "2 images"."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def name_list(names: Sequence[object], limit: int = 3) -> str:
    """Return the first `limit` names and the number of the others: "a, b, c and 2 more"."""
    shown = ", ".join(str(name) for name in names[:limit])
    more = len(names) - limit
    return f"{shown} and {more} more" if more > 0 else shown


def error_reason(error: Exception) -> str:
    """Return the first line of an error's message, or its type if it has none."""
    return str(error).split("\n")[0] or type(error).__name__


def text_table(
    header: Sequence[str] | None,
    rows: Sequence[Sequence[str]],
    align: Literal["left", "right"] = "right",
    widths: Sequence[int] | None = None,
) -> str:
    """Lay out rows of text in columns, two spaces apart, without trailing spaces.

    Args:
        header: the first line, or None.
        rows: one text for each column.
        align: of every column but the first, which is on the left: "right" suits numbers, "left" text.
        widths: of the columns, so that several tables line up; the widest cell of each (column_widths) if None.

    Returns:
        The lines, without a line break at the end.
    """
    lines = [*([header] if header is not None else []), *rows]
    if widths is None:
        widths = column_widths(lines)
    return "\n".join(_table_line(line, widths, align) for line in lines)


def column_widths(rows: Sequence[Sequence[str]]) -> list[int]:
    """Return the number of characters of the longest text in each column."""
    return [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]


def mean_and_range(counts: Sequence[int]) -> str:
    """Return the mean and the extremes of counts: "4.5 (2 to 8)", or "none" if there are none."""
    if not counts:
        return "none"
    return f"{sum(counts) / len(counts):.1f} ({min(counts)} to {max(counts)})"


def size_text(size: int) -> str:
    """Return a number of bytes with three digits and a decimal unit: "846 kB", "1.84 MB"."""
    for power, unit in _UNITS:
        if size >= 0.9995 * 10**power:  # from here on three digits round up to the next unit
            value = size / 10**power
            return f"{value:.{_decimals(value)}f} {unit}"
    return f"{size:.0f} B"


def size_change(before: int, after: int) -> str:
    """Return two numbers of bytes and the share that is left: "1.84 MB -> 920 kB (50%)"."""
    return f"{size_text(before)} -> {size_text(after)} ({after / before:.0%})"


def percent_text(share: float, decimals: int = 0) -> str:
    """Return a share in percent: "18 %", "98.6 %"."""
    return f"{100 * share:.{decimals}f} %"


def _decimals(value: float) -> int:
    """How many decimals a number has when it is rounded to three digits."""
    if value >= 99.95:
        return 0
    return 1 if value >= 9.995 else 2


def _table_line(cells: Sequence[str], widths: Sequence[int], align: Literal["left", "right"]) -> str:
    padded = [cells[0].ljust(widths[0])]
    for cell, width in zip(cells[1:], widths[1:], strict=True):
        padded.append(cell.ljust(width) if align == "left" else cell.rjust(width))
    return "  ".join(padded).rstrip()
