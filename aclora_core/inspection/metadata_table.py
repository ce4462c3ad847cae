"""Readable table of a LoRA file: what it holds, how it was trained, and its other metadata."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone

from ..adapter import (
    BASE_MODEL,
    FILE_FORMAT,
    FILE_NAMES,
    Adapter,
    RankReport,
    TruncationStats,
    describe_layers,
    embedded_report,
    file_size,
    fit_share,
    left_out_lines,
    total_energy_kept,
)
from ..text import percent_text, size_change, text_table

MAX_VALUE_LENGTH = 200  # characters; longer values are shortened


Rows = list[tuple[str, str]]  # name and text of each line


def metadata_table(name: str, adapter: Adapter, loading: Sequence[tuple[str, str]] = ()) -> str:
    """Return the content and the metadata of a LoRA file as aligned lines, in sections.

    Args:
        name: of the file.
        adapter: as it is in the file.
        loading: rows on what loading did: what it cut off (truncation_rows), and what did not fit the model.
    """
    settings = _setting_rows(adapter.metadata)
    report = embedded_report(adapter)
    training = [*settings, *(_result_rows(report) if report is not None else [])]
    # Metadata that other rows tell in words is not repeated as JSON.
    hidden = {FILE_FORMAT, BASE_MODEL, FILE_NAMES}
    if settings:
        hidden |= {"aclora.settings", "aclora.ranks"}
    if report is not None:
        hidden |= {"aclora.trajectory"}
    metadata = [(key, _value(key, value)) for key, value in sorted(adapter.metadata.items()) if key not in hidden]
    return _sections({"": [*_content_rows(name, adapter), *loading], "Training": training, "Metadata": metadata})


def truncation_rows(name: str, before: Adapter, after: Adapter, stats: Mapping[str, TruncationStats]) -> Rows:
    """Return rows on what a truncation did to a whole LoRA: ranks, energy and size.

    Args:
        name: of the truncation, such as "to rank 4".
        stats: of each layer, as from truncate_to_ranks.
    """
    kept = total_energy_kept(stats)
    error = math.sqrt(1.0 - kept)
    return [
        ("truncated", name),
        ("ranks", f"{_rank_range(_ranks(before))} -> {_rank_range(_ranks(after))}"),
        ("energy kept", f"{kept:.2%}, so the change differs by {error:.1%} of its size"),
        ("size of the file", size_change(file_size(before, dtype=None), file_size(after, dtype=None))),
    ]


def _content_rows(name: str, adapter: Adapter) -> Rows:
    dtypes = sorted({str(layer.lora_up.dtype).removeprefix("torch.") for layer in adapter.layers.values()})
    kinds = Counter(adapter.other.values())
    rows = [("file", name), ("layers", f"{describe_layers(adapter)}, {' and '.join(dtypes)}".rstrip(", "))]
    if FILE_FORMAT in adapter.metadata:
        rows.append(("format", adapter.metadata[FILE_FORMAT]))
    rows += [("also", f"{count} x {kind}") for kind, count in sorted(kinds.items())]
    return rows + reading_rows(adapter)


def reading_rows(adapter: Adapter) -> Rows:
    """Return rows on what changes nothing in ComfyUI, and on how the file was read."""
    left_out = [("left out", line) for line in left_out_lines(adapter.left_out)]
    return left_out + [("note", remark) for remark in adapter.remarks]


def _setting_rows(metadata: Mapping[str, str]) -> Rows:
    """Return the settings and facts of a training by this package; no rows for other files."""
    try:
        found = json.loads(metadata["aclora.settings"])
    except (KeyError, ValueError, RecursionError):
        return []
    if not isinstance(found, dict):
        return []
    return [(str(key), _value(str(key), str(value))) for key, value in sorted(found.items())]


def _result_rows(report: RankReport) -> Rows:
    rows = []
    if report.signal:
        rows.append(("signal ranks", _rank_range(list(report.signal.values()))))
    held_out = [(loss, step) for step, loss in report.validation if step > 0 and math.isfinite(loss)]
    if held_out:
        loss, step = min(held_out)
        rows.append(("validation loss", f"{loss:.4f} at step {step}, the lowest of {len(held_out)}"))
    share = fit_share(report.fit)
    if share is not None:
        step, loss = report.fit[-1]
        rows.append(("training images", f"loss {loss:.4f} at step {step}, {percent_text(share)} of the base model's"))
    count = len(report.truncations)
    for tried in report.truncations:
        if tried.chosen:
            rows.append(("given", f"{tried.name}, of {count} truncations that were tried"))
    return rows


def _ranks(adapter: Adapter) -> list[int]:
    return [layer.rank for layer in adapter.layers.values()]


def _rank_range(ranks: Sequence[int]) -> str:
    if not ranks:
        return "none"
    if min(ranks) == max(ranks):
        return f"{ranks[0]} in every layer"
    return f"{min(ranks)} to {max(ranks)}, mean {sum(ranks) / len(ranks):.1f}"


def _value(key: str, value: str) -> str:
    """Return a metadata value in one line: images and long texts shortened, times as a date."""
    if value.startswith("data:image/"):
        return f"an image, {len(value):,} characters"
    if key.endswith("_at"):
        try:
            return datetime.fromtimestamp(float(value), timezone.utc).strftime("%Y-%m-%d %H:%M:%S UTC")
        except (ValueError, OverflowError, OSError):  # no time: shown as it is
            pass
    line = " ".join(value.split())
    return line if len(line) <= MAX_VALUE_LENGTH else f"{line[:MAX_VALUE_LENGTH]}… ({len(line):,} characters)"


def _sections(sections: Mapping[str, Rows]) -> str:
    """Lay out the sections that have rows, each below its heading; the columns of all line up."""
    width = max(len(name) for rows in sections.values() for name, _ in rows)
    parts = []
    for heading, rows in sections.items():
        if rows:
            lines = text_table(None, rows, "left", (width, 0))  # the last column needs no width
            parts.append(f"{heading}\n{lines}" if heading else lines)
    return "\n\n".join(parts)
