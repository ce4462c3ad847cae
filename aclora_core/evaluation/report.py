"""An evaluation in words, as a table and as JSON."""

from __future__ import annotations

import json
from dataclasses import asdict

from ..text import count_noun, text_table
from .estimate import Estimate
from .evaluate import COPIES, MATCH, PAIRED, SIMILARITY, SPREAD, Evaluation, Row

_SURE = 2.0  # standard errors
_MUCH_LESS = 0.8  # of the references' spread


def verdict(found: Evaluation) -> str:
    """Return what the measures say, in a few sentences for an artist."""
    return " ".join(filter(None, (_closeness(found), _content(found), _copying(found), _variety(found))))


def evaluation_table(found: Evaluation, source: str) -> str:
    """Lay out the verdict and all measures as text.

    Args:
        found: the evaluation.
        source: what gave the features.
    """
    header = ("measure", "drawn", "base", "references", "better")
    rows = [_cells(row) for row in found.rows if not row.missing]
    missing = [f"{row.name}: {row.missing}." for row in found.rows if row.missing]
    images = ", ".join(f"{count} {name}" for name, count in found.counts.items())
    notes = [*missing, f"± is one standard error over the images ({images}).", f"Features: {source}."]
    return "\n".join([verdict(found), "", text_table(header, rows, "left"), "", *notes])


def evaluation_lines(found: Evaluation) -> str:
    """Return the verdict, and a line for each measure that has a number, for a display without columns."""
    return "\n".join([verdict(found), *(_line(row) for row in found.rows if not row.missing)])


def evaluation_json(found: Evaluation, source: str) -> str:
    """Return everything as JSON, for programs; source: what gave the features."""
    content = {"verdict": verdict(found), "features": source, "images": found.counts}
    measures = [asdict(row) for row in found.rows]
    nearest = [asdict(each) for each in found.nearest]
    return json.dumps({**content, "measures": measures, "nearest": nearest}, indent=1)


# --- sentences ---


def _closeness(found: Evaluation) -> str:
    row = found.row(PAIRED) or found.row(SIMILARITY)
    if row is None or row.drawn is None:
        return ""
    aim = "the real images of the same things" if row.name == PAIRED else "the style"
    if row.base is None or row.gain is None:
        real = row.references
        among = f"; these have {real.value:.2f} among themselves" if real else ""
        return (
            f"Similarity to {'their own references' if row.name == PAIRED else 'the references'}: "
            f"{_number(row.drawn, 2)}{among}. Connect the base model's images for the same prompts to see what the "
            "LoRA has changed."
        )
    numbers = f"{_two_decimals(row.drawn, row.base)}"
    gain = row.gain
    if gain.error is None:
        side = "Closer to" if gain.value > 0 else "Not closer to"
        return f"{side} {aim} than the base: {numbers}, but 3 images or more are needed to be sure."
    if abs(gain.value) <= _SURE * gain.error:
        return (
            f"No clear difference from the base: similarity to {aim} {numbers}, "
            f"a gain of {gain.value:+.3f} ± {gain.error:.3f}. More images would tell."
        )
    return f"{'Closer to' if gain.value > 0 else 'Further from'} {aim} than the base: {numbers}."


def _two_decimals(drawn: Estimate, base: Estimate) -> str:
    """Two numbers with as many decimals as they need to differ."""
    digits = 2 if abs(drawn.value - base.value) >= 0.01 else 3
    return f"{drawn.value:.{digits}f} against {base.value:.{digits}f}"


def _content(found: Evaluation) -> str:
    row = found.row(MATCH)
    if row is None or row.drawn is None:
        return ""
    count = found.counts["drawn"]
    right = f"{round(row.drawn.value * count)} of {count_noun(count, 'image')}"
    base = f" (of the base's: {round(row.base.value * count)})" if row.base else ""
    return f"Its own reference is the nearest for {right}{base}."


def _copying(found: Evaluation) -> str:
    row = found.row(COPIES)
    if row is None or row.missing:
        return "Not checked for copies: " + (row.missing if row else "no training images") + "."
    copied = sum(each.copied for each in found.nearest)
    images = count_noun(len(found.nearest), "image")
    if not copied:
        return f"No copies of training images among {images}."
    base = f" (of the base's: {round(row.base.value * found.counts['base'])})" if row.base else ""
    return f"{copied} of {images} may be copies of training images{base}: look at the nearest ones."


def _variety(found: Evaluation) -> str:
    row = found.row(SPREAD)
    if row is None or row.drawn is None or row.references is None:
        return ""
    drawn, real = row.drawn, row.references
    if drawn.error is None or real.error is None:
        return ""
    if drawn.value > _MUCH_LESS * real.value or real.value - drawn.value < _SURE * (drawn.error + real.error):
        return ""
    return f"They resemble each other more than the references do: spread {drawn.value:.2f} against {real.value:.2f}."


# --- cells ---


def _cells(row: Row) -> tuple[str, ...]:
    return (row.name, _number(row.drawn), _number(row.base), _number(row.references), row.better)


def _line(row: Row) -> str:
    others = [(name, each) for name, each in (("base", row.base), ("references", row.references)) if each]
    beside = ", ".join(f"{name} {_number(each)}" for name, each in others)
    return f"{row.name}: {_number(row.drawn)}" + (f" ({beside})" if beside else "")


def _number(found: Estimate | None, digits: int = 3) -> str:
    if found is None:
        return "-"
    error = f" ± {found.error:.{digits}f}" if found.error is not None else ""
    return f"{found.value:.{digits}f}{error}"
