"""Inspections, restarts and truncations as text: tables for people and screen readers, JSON, and CSV."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from typing import Any

from ..adapter import FILE_FORMAT, RankReport, TruncationLoss, TruncationStats, total_energy_kept
from ..text import count_noun, mean_and_range, name_list, size_change, size_text, text_table
from .measure import FileFacts, Inspection, LayerFacts

_HEADER = (
    "layer",
    "type",
    "shape",
    "rank",
    "signal",
    "alpha",
    "scale",
    "norm",
    "sigma 1",
    "sigma k",
    "ratio",
    "stable rank",
    "effective rank",
    "for 90 %",
    "for 95 %",
    "for 99 %",
    "dead",
)


_LEGEND = """\
norm: how much the layer changes its weight. sigma 1, sigma k: its largest and its smallest singular value.
stable rank, effective rank: how much of its rank it uses. for 90 %: rank that holds 90 % of the energy (sigma squared).
dead: singular values of 0. signal: rank that the training found to be signal, not noise."""


_TRUNCATIONS_TITLE = (
    "Truncated at the end of the training, measured on validation images (standard error: of the difference from the "
    "best):"
)


def inspection_table(inspection: Inspection) -> str:
    """Return all measurements as text: the file, a line per layer, and of the training restarts and truncations."""
    parts = [file_table(inspection.file)]
    if inspection.layers:
        rows = [_row(layer) for layer in inspection.layers]
        known = any(layer.signal is not None for layer in inspection.layers)
        keep = [column for column, title in enumerate(_HEADER) if known or title != "signal"]
        table = text_table([_HEADER[i] for i in keep], [[row[i] for i in keep] for row in rows])
        parts.append(f"{table}\n\n{_LEGEND if known else _LEGEND.partition(' signal:')[0]}")
    if inspection.report is not None:
        parts.append(f"Restarts, mean over the layers (smallest to largest):\n{trajectory_table(inspection.report)}")
        if inspection.report.truncations:
            parts.append(f"{_TRUNCATIONS_TITLE}\n{truncation_loss_table(inspection.report.truncations)}")
    return "\n\n".join(parts)


def file_rows(facts: FileFacts) -> list[tuple[str, str]]:
    """Return the measurements of a LoRA file as rows of name and text."""
    return [
        ("name", facts.name),
        ("size", f"{size_text(facts.size)}, {facts.parameters:,} numbers"),
        ("layers", f"{sum(facts.ranks.values())} plain LoRA layers in {facts.blocks} blocks"),
        *_format_rows(facts.metadata),
        ("keys", _listed(facts.key_formats)),
        ("prefixes", _listed(facts.prefixes)),
        ("parts", _listed(facts.parts)),
        ("types", _listed(facts.kinds)),
        ("ranks", ", ".join(f"{rank} ({count_noun(count, 'layer')})" for rank, count in facts.ranks.items()) or "none"),
        ("numbers", _listed(facts.dtypes)),
        ("norm", f"{facts.norm:.4g} over all layers, effective rank {facts.effective_rank:.1f} (mean by energy)"),
        *_unusual_rows(facts),
        *((key, " ".join(value.split())) for key, value in facts.metadata.items()),
    ]


def summary_rows(facts: FileFacts) -> list[tuple[str, str]]:
    """Return the few measurements of a LoRA file that a user looks for first, as rows of name and text."""
    ranks = [rank for rank, count in facts.ranks.items() for _ in range(count)]
    spread = mean_and_range(ranks) if len(facts.ranks) > 1 else "".join(map(str, facts.ranks)) or "none"
    return [
        ("name", facts.name),
        ("size", size_text(facts.size)),
        ("layers", f"{len(ranks)} plain LoRA layers in {facts.blocks} blocks, rank {spread}"),
        *_unusual_rows(facts),
    ]


def _unusual_rows(facts: FileFacts) -> list[tuple[str, str]]:
    """Return rows on what is no plain LoRA, what changes nothing in ComfyUI, and how the file was read."""
    return [
        *((f"no plain LoRA: {kind}", name_list(names)) for kind, names in _by_kind(facts.other).items()),
        *(("left out", line) for line in facts.left_out),
        *(("note", remark) for remark in facts.remarks),
    ]


def _format_rows(metadata: Mapping[str, str]) -> list[tuple[str, str]]:
    """Return a row on the format of a file of this package."""
    file_format = metadata.get(FILE_FORMAT)
    if file_format is None:
        return []
    names = "" if file_format == "ComfyUI" else ", shown by ComfyUI's names"
    return [("format", f"{file_format}{names}")]


def file_table(facts: FileFacts) -> str:
    """Return the measurements of a LoRA file, one line each."""
    return text_table(None, file_rows(facts), "left")


def inspection_json(inspection: Inspection) -> str:
    """Return all measurements as strict JSON, spectra included; an infinite ratio becomes null."""
    report = inspection.report
    data = {
        "file": {**asdict(inspection.file), "ranks": {str(k): v for k, v in inspection.file.ranks.items()}},
        "layers": [_plain(layer) for layer in inspection.layers],
        "training": json.loads(report.compact_json()) if report is not None else None,
    }
    return json.dumps(data, ensure_ascii=False, allow_nan=False)


def inspection_csv(inspection: Inspection) -> str:
    """Return a line per layer for spreadsheets, without the spectra."""
    names = [field.name for field in fields(LayerFacts) if field.name != "spectrum"]
    text = io.StringIO()
    writer = csv.DictWriter(text, names, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    for layer in inspection.layers:
        writer.writerow({**_plain(layer), "shape": "x".join(map(str, layer.shape))})
    return text.getvalue()


def truncation_table(
    stats: Mapping[str, TruncationStats],
    sizes: tuple[int, int],
    other: Mapping[str, str] | None = None,
    notes: Sequence[str] = (),
) -> str:
    """Return what a truncation did: some lines for the whole LoRA, then a line per layer.

    Args:
        stats: by base name, as from truncate_to_ranks.
        sizes: bytes of the file before and after.
        other: the layers of other kinds, which are not truncated (Adapter.other).
        notes: lines on the file, added to those for the whole LoRA.
    """
    if not stats:
        return "There is no plain LoRA layer to truncate."
    layers = stats.values()
    rank_before, rank_after = sum(layer.rank_before for layer in layers), sum(layer.rank_after for layer in layers)
    dropped = sum(layer.rank_after == 0 for layer in layers)
    kept = total_energy_kept(stats)
    lines = [
        f"Layers: {len(stats)}, dropped: {dropped}. Sum of ranks: {rank_before:,} -> {rank_after:,}.",
        f"Size of the file: {size_change(*sizes)}.",
        f"Kept of all layers' energy: {kept:.2%}. Error of the whole change: {math.sqrt(1.0 - kept):.1%} of its norm.",
    ]
    for kind, names in _by_kind(other or {}).items():
        lines.append(f"Not truncated, as it is no plain LoRA: {kind}, {name_list(names)}.")
    lines += notes
    header = ["layer", "rank before", "after", "energy kept", "norm kept", "sum kept", "kB before", "after"]
    rows = [
        [
            name,
            str(layer.rank_before),
            str(layer.rank_after) if layer.rank_after else "dropped",
            f"{layer.energy_kept:.2%}",
            f"{math.sqrt(layer.energy_kept):.2%}",
            f"{layer.sum_kept:.2%}",
            f"{layer.bytes_before / 1e3:.1f}",
            f"{layer.bytes_after / 1e3:.1f}",
        ]
        for name, layer in stats.items()
    ]
    return "\n".join(lines) + "\n\n" + text_table(header, rows)


def _row(layer: LayerFacts) -> list[str]:
    return [
        layer.name,
        layer.kind,
        " x ".join(map(str, layer.shape[:2])),
        str(layer.rank),
        "?" if layer.signal is None else str(layer.signal),
        f"{layer.alpha:.4g}",
        f"{layer.scale:.4g}",
        f"{layer.norm:.4g}",
        f"{layer.sigma_first:.3g}",
        f"{layer.sigma_last:.3g}",
        f"{layer.ratio:.3g}" if math.isfinite(layer.ratio) else "infinite",
        f"{layer.stable_rank:.1f}",
        f"{layer.effective_rank:.1f}",
        str(layer.rank_90),
        str(layer.rank_95),
        str(layer.rank_99),
        str(layer.dead),
    ]


def _plain(layer: LayerFacts) -> dict[str, Any]:
    values = asdict(layer)
    return {**values, "ratio": layer.ratio if math.isfinite(layer.ratio) else None}


def _listed(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} ({count})" for name, count in counts.items()) or "none"


def _by_kind(other: Mapping[str, str]) -> dict[str, list[str]]:
    kinds: dict[str, list[str]] = {}
    for name, kind in other.items():
        kinds.setdefault(kind, []).append(name)
    return kinds


def trajectory_table(report: RankReport) -> str:
    """Return a line per restart: components kept (mean and range over the layers), energy kept, and jump of the delta.

    The jump is the mean of ‖new delta - old delta‖ / ‖old delta‖ over the layers. A sentence if there was no restart.
    """
    if not report.restarts:
        if report.settings.get("mode") == "off":
            return "No restart: restarts were off."
        return "No restart: the training was shorter than two restart intervals."
    header = ["step", "epoch", "loss", "threshold", "kept in delta", "in lora_down", "in lora_up"]
    header += ["energy kept", "jump of delta"]
    rows = []
    for restart in report.restarts:
        ranks = list(restart.layers.values())
        kept_delta = mean_and_range([rank.kept_delta for rank in ranks])
        kept_down = mean_and_range([rank.kept_down for rank in ranks])
        kept_up = mean_and_range([rank.kept_up for rank in ranks])
        energy = math.fsum(rank.energy for rank in ranks) / max(1, len(ranks))
        jump = restart.mean_jump()
        threshold = restart.threshold if isinstance(restart.threshold, str) else f"{restart.threshold:.3f}"
        row = [str(restart.step), str(restart.epoch), f"{restart.loss:.4f}", threshold]
        row += [kept_delta, kept_down, kept_up, f"{energy:.1%}", "-" if jump is None else f"{jump:.1%}"]
        rows.append(row)
    return text_table(header, rows)


NO_TRUNCATIONS = (
    "No truncation was tried: the training had no validation images, or is too old to have recorded it. To have some "
    "tried, connect AC-LoRA Validation Options to Train AC-LoRA, with validation_images above 0 and 8 images or more."
)


def truncation_loss_table(truncations: Sequence[TruncationLoss]) -> str:
    """Return a line per truncation, in their order. A sentence if there was none."""
    if not truncations:
        return NO_TRUNCATIONS
    losses = [tried.loss for tried in truncations if math.isfinite(tried.loss)]
    best = min(losses, default=math.nan)
    header = ["truncation", "mean rank", "size", "validation loss", "above the best", "standard error", "given"]
    rows = [
        [
            tried.name,
            _number(tried.mean_rank, ".1f"),
            size_text(tried.size),
            _number(tried.loss, ".4f"),
            _number(tried.loss - best, ".4f"),
            _number(tried.error, ".4f"),
            "yes" if tried.chosen else "no",
        ]
        for tried in truncations
    ]
    return text_table(header, rows)


def _number(value: float, form: str) -> str:
    return format(value, form) if math.isfinite(value) else "unknown"
