"""Result files of the study: read, joined, and made small enough to be kept."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bench.eight_styles.jobs import Job
from bench.pool import Row

Results = dict[str, Any]  # facts of the run, and its rows
_DIGITS = 5  # significant ones of a measure; the errors of the measures are far larger


def read(paths: Sequence[Path]) -> Results:
    """Read the result files and join them.

    Raises:
        ValueError: a file has no rows, or the files were measured on different images.
    """
    found = []
    for path in paths:
        results = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(results, dict) or not {"data", "rows"} <= set(results):
            raise ValueError(f"{path} is no result file of bench.eight_styles: it has no 'data' or no 'rows'.")
        found.append(results)
    return join(found)


def join(files: Sequence[Results]) -> Results:
    """Join results: of two rows with the same name, style, seed and steps, the later one counts.

    Returns:
        The rows, and the facts; a fact that differs between the files has all of its values, separated by commas.

    Raises:
        ValueError: the files were measured on different images, so their numbers cannot be compared.
    """
    digests = sorted({str(results["data"]) for results in files})
    if len(digests) > 1:
        raise ValueError(f"The results are of different images ('data': {', '.join(digests)}). Join those of one only.")
    rows: dict[tuple[Any, ...], Row] = {}
    for row in [row for results in files for row in results["rows"]]:
        rows.pop(_key(row), None)  # so that the row goes to the end
        rows[_key(row)] = row
    names = dict.fromkeys(name for results in files for name in results if name != "rows")
    return {**{name: _fact(files, name) for name in names}, "rows": list(rows.values())}


def missing(jobs: Sequence[Job], paths: Sequence[Path]) -> list[Job]:
    """Return the jobs whose row is in none of the result files, or is there with an error only."""
    known = {_key(row) for row in read(paths)["rows"] if "error" not in row}
    return [job for job in jobs if _key(job.row()) not in known]


def without_images(results: Results, shown: Callable[[Row, str], bool] = lambda row, step: False) -> Results:
    """Return results without the drawn images, with measures of five significant digits.

    shown: whether the images of a row's cell stay, by the row and the cell's name.
    """
    rows = []
    for row in results["rows"]:
        small = _small(row)
        for step, cell in row.get("cells", {}).items():
            if "images" in cell and shown(row, step):
                small["cells"][step]["images"] = cell["images"]
        rows.append(small)
    return {**results, "rows": rows}


def _key(row: Row) -> tuple[Any, ...]:
    """Return what makes a row unique. A line may have several trainings, as the longest of the grid are run apart."""
    return row["name"], row["style"], row["seed"], row["settings"].get("steps")


def _fact(files: Sequence[Results], name: str) -> Any:
    values = list({json.dumps(results[name]): results[name] for results in files if name in results}.values())
    return values[0] if len(values) == 1 else ", ".join(map(str, values))


def _small(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _small(item) for name, item in value.items() if not _is_strip(name, item)}
    if isinstance(value, list):
        return [_small(item) for item in value]
    return float(f"{value:.{_DIGITS}g}") if isinstance(value, float) else value


def _is_strip(name: str, value: Any) -> bool:
    return name == "images" and isinstance(value, str)  # of a row it is the number of training images
