"""What the command line makes of result files: tables, figures, a small copy. Nothing is trained."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from bench.eight_styles import figures, tables
from bench.eight_styles.libraries import METHODS
from bench.eight_styles.result_files import read, without_images
from bench.eight_styles.scores import Cell, Scores
from bench.eight_styles.step_chart import write_chart
from bench.eight_styles.stop_rules import stop_table
from bench.eight_styles.verdict import DEFAULT
from bench.no_search import images
from bench.pool import Row
from bench.result_file import write

# What a figure shows unless --styles and --lines say otherwise.
STYLES_SHOWN = 3
ROWS_SHOWN = (
    "real images",
    "the base",
    "rank 2, 640 steps",
    *(f"{name}, {steps} steps" for name in ("rank 16", "plain") for steps in (160, 640, 2400)),
    "rank 64, 640 steps",
    *(f"{method}, 640 steps" for method in METHODS),
    "restarts *, 640 steps",
    "AC-LoRA*, 640 steps",
    "0.3.0's default",
    DEFAULT.name,
)


def report(args: argparse.Namespace) -> None:
    """Do what the options of the command line ask for.

    Raises:
        ValueError: an option does not suit the files.
    """
    if args.table:
        print_tables(args.table, args.reference, args.default)
    if args.stop:
        print_stop_rules(args.stop, args.reference)
    if args.figure:
        write_figure(*_split(args.figure), args.data, args.styles, args.lines)
    if args.chart:
        write_step_chart(*_split(args.chart), args.reference, args.lines)
    if args.without_images:
        write_small(*_split(args.without_images), args.styles, args.lines)


def print_tables(files: Sequence[Path], reference: Sequence[str] | None, default: Sequence[str] | None) -> None:
    """Print the tables of result files."""
    results = read(files)
    candidate = Cell(*default) if default else DEFAULT
    print(tables.report(Scores(results["rows"], _cell(reference)), results, candidate))


def print_stop_rules(files: Sequence[Path], reference: Sequence[str] | None) -> None:
    """Print the regrets of the rules for the stop."""
    print(stop_table(Scores(read(files)["rows"], _cell(reference))))


def write_figure(
    out: Path, files: Sequence[Path], data: Path, styles: Sequence[str] | None, patterns: Sequence[str] | None
) -> None:
    """Write the figure; the prompts are written above the images if the file with the images is there."""
    drawn = figures.strips(read(files)["rows"])
    styles = styles or sorted({style for style, _ in drawn})[:STYLES_SHOWN]
    prompts = {name: style.verdict.captions for name, style in images.read(data).items()} if data.is_file() else None
    figures.save(figures.comparison(drawn, styles, rows(drawn, patterns), prompts), out)


def write_small(out: Path, files: Sequence[Path], styles: Sequence[str] | None, patterns: Sequence[str] | None) -> None:
    """Write the joined results with only the images that a figure of the lines in the styles shows."""
    results = read(files)
    cells = set(rows(figures.strips(results["rows"]), patterns)) if styles else set()

    def shown(row: Row, step: str) -> bool:
        return row["style"] in (styles or ()) and Cell(row["name"], step) in cells

    write(out, without_images(results, shown))


def rows(drawn: Iterable[tuple[str, Cell]], patterns: Sequence[str] | None) -> list[Cell]:
    """Return the cells of a figure whose label matches a pattern, in the order of the patterns."""
    cells = list(dict.fromkeys(cell for _, cell in drawn))
    found = [cell for pattern in patterns or ROWS_SHOWN for cell in cells if fnmatchcase(str(cell), pattern)]
    return list(dict.fromkeys(found))


def write_step_chart(
    out: Path, files: Sequence[Path], reference: Sequence[str] | None, names: Sequence[str] | None
) -> None:
    """Write the chart over steps."""
    write_chart(Scores(read(files)["rows"], _cell(reference)), out, names)


def _cell(words: Sequence[str] | None) -> Cell | None:
    return Cell(*words) if words else None


def _split(paths: Sequence[Path]) -> tuple[Path, Sequence[Path]]:
    if len(paths) < 2:
        raise ValueError(f"OUT and one FILE or more are needed, but only {paths[0]} was named.")
    return paths[0], paths[1:]
