"""A LoRA file's metadata as a table to read: what it holds, how it was trained, and the rest as the file has it."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone

from ..adapter import Adapter, RankReport, TruncationStats, describe, own_report, total_energy_kept
from ..text import size_text

SHOWN = 200  # characters of a value that the table shows


Rows = list[tuple[str, str]]


def metadata_table(name: str, adapter: Adapter, cut: Sequence[tuple[str, str]] = ()) -> str:
    """What a LoRA file holds and says about itself, one line a fact, in two columns that line up.

    adapter: as it is in the file. cut: what was cut off while loading (cut_rows), told beside what was there.
    """
    dtypes = sorted({str(layer.lora_up.dtype).removeprefix("torch.") for layer in adapter.layers.values()})
    kinds = Counter(adapter.other.values())
    rows = [("file", name), ("layers", f"{describe(adapter)}, {' and '.join(dtypes)}".rstrip(", "))]
    rows += [("also", f"{count} x {kind}") for kind, count in sorted(kinds.items())]
    settings, report = _setting_rows(adapter.metadata), own_report(adapter)
    training = [*settings, *(_result_rows(report) if report is not None else [])]
    # What is told in words need not come again as JSON.
    told = {*(["aclora.settings", "aclora.ranks"] if settings else []), *(["aclora.trajectory"] if report else [])}
    raw = [(key, _value(key, value)) for key, value in sorted(adapter.metadata.items()) if key not in told]
    return _sections({"": [*rows, *cut], "Training": training, "Metadata": raw})


def cut_rows(name: str, before: Adapter, after: Adapter, cuts: Mapping[str, TruncationStats]) -> Rows:
    """What a cut by that name did to the whole LoRA: ranks, energy and size."""
    sizes = [sum(getattr(cut, f"bytes_{when}") for cut in cuts.values()) for when in ("before", "after")]
    ranks = [_spread([layer.rank for layer in adapter.layers.values()]) for adapter in (before, after)]
    kept = total_energy_kept(cuts)
    return [
        ("cut", name),
        ("ranks", " -> ".join(ranks)),
        ("energy kept", f"{kept:.2%}, so the change differs by {math.sqrt(max(0.0, 1.0 - kept)):.1%} of its size"),
        ("size of layers", f"{size_text(sizes[0])} -> {size_text(sizes[1])} ({sizes[1] / sizes[0]:.0%})"),
    ]


def _setting_rows(metadata: Mapping[str, str]) -> Rows:
    """The settings of a training by this pack; nothing for other files."""
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
        rows.append(("signal ranks", _spread(list(report.signal.values()))))
    held_out = [(loss, step) for step, loss in report.validation if step > 0 and math.isfinite(loss)]
    if held_out:
        loss, step = min(held_out)
        rows.append(("held-out loss", f"{loss:.4f} at step {step}, the lowest of {len(held_out)}"))
    for cut in report.cuts:
        if cut.chosen:
            rows.append(("given", f"{cut.name}, {size_text(cut.size)}, of {len(report.cuts)} cuts that were tried"))
    return rows


def _spread(ranks: Sequence[int]) -> str:
    if not ranks:
        return "none"
    if min(ranks) == max(ranks):
        return f"{ranks[0]} in every layer"
    return f"{min(ranks)} to {max(ranks)}, mean {sum(ranks) / len(ranks):.1f}"


def _value(key: str, value: str) -> str:
    """A value in one line: pictures and long texts shortened, times as a date."""
    if value.startswith("data:image/"):
        return f"a picture, {len(value):,} characters"
    if key.endswith("_at"):
        try:
            return datetime.fromtimestamp(float(value), timezone.utc).strftime("%Y-%m-%d %H:%M:%S UTC")
        except (ValueError, OverflowError, OSError):  # no time: as it is
            pass
    line = " ".join(value.split())
    return line if len(line) <= SHOWN else f"{line[:SHOWN]}… ({len(line):,} characters)"


def _sections(sections: Mapping[str, Rows]) -> str:
    """The sections that have rows, with a heading each; the second column begins at the same place in all."""
    width = max(len(key) for rows in sections.values() for key, _ in rows)
    parts = []
    for heading, rows in sections.items():
        lines = [f"{key:<{width}}  {value}".rstrip() for key, value in rows]
        if lines:
            parts.append("\n".join([*([heading] if heading else []), *lines]))
    return "\n\n".join(parts)
