"""An inspection, or a cut, as text: a table for people and screen readers, JSON, and CSV."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from typing import Any

from ..adapter import RankReport, TruncationLoss, TruncationStats, total_energy_kept
from ..text import mean_and_range, size_text, text_table
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
norm: how much the layer changes its weight. sigma 1, sigma k: sizes of its largest and its smallest component.
stable rank, effective rank: how many components carry the weight. for 90 %: components for 90 % of the energy.
dead: components that do nothing. signal: components that the training found to be signal."""


_CUTS = "Cut at the end of the training, on pictures held out (standard error: of the difference to the best):"


def inspection_table(inspection: Inspection) -> str:
    """The facts of the file, a line for each layer, and of the training what is known: restarts, and what cuts lose."""
    parts = [file_table(inspection.file)]
    if inspection.layers:
        rows = [_row(layer) for layer in inspection.layers]
        known = any(layer.signal is not None for layer in inspection.layers)
        keep = [place for place, title in enumerate(_HEADER) if known or title != "signal"]
        table = text_table([_HEADER[i] for i in keep], [[row[i] for i in keep] for row in rows])
        parts.append(f"{table}\n\n{_LEGEND if known else _LEGEND.partition(' signal:')[0]}")
    if inspection.report is not None:
        parts.append(f"Restarts, mean over the layers (smallest to largest):\n{trajectory_table(inspection.report)}")
        if inspection.report.cuts:
            parts.append(f"{_CUTS}\n{cuts_table(inspection.report.cuts)}")
    return "\n\n".join(parts)


def file_rows(facts: FileFacts) -> list[tuple[str, str]]:
    """The facts of a LoRA file by name."""
    return [
        ("name", facts.name),
        ("size", f"{facts.size / 1e6:.2f} MB, {facts.parameters:,} numbers"),
        ("layers", f"{sum(facts.ranks.values())} plain LoRA layers in {facts.blocks} blocks"),
        ("keys", _listed(facts.key_formats)),
        ("prefixes", _listed(facts.prefixes)),
        ("parts", _listed(facts.parts)),
        ("types", _listed(facts.kinds)),
        ("ranks", ", ".join(f"{rank} ({count} layers)" for rank, count in facts.ranks.items()) or "none"),
        ("numbers", _listed(facts.dtypes)),
        ("norm", f"{facts.norm:.4g} over all layers, effective rank {facts.effective_rank:.1f} (mean by energy)"),
        *((f"no plain LoRA: {kind}", _named(names)) for kind, names in _by_kind(facts.other).items()),
        *((key, " ".join(value.split())) for key, value in facts.metadata.items()),
    ]


def file_table(facts: FileFacts) -> str:
    """One line for each fact of a LoRA file."""
    rows = file_rows(facts)
    width = max(len(key) for key, _ in rows)
    return "\n".join(f"{key:<{width}}  {value}" for key, value in rows)


def inspection_json(inspection: Inspection) -> str:
    """Everything, with the spectra, as strict JSON: an infinite ratio is null."""
    report = inspection.report
    data = {
        "file": {**asdict(inspection.file), "ranks": {str(k): v for k, v in inspection.file.ranks.items()}},
        "layers": [_plain(layer) for layer in inspection.layers],
        "training": json.loads(report.compact_json()) if report is not None else None,
    }
    return json.dumps(data, ensure_ascii=False, allow_nan=False)


def inspection_csv(inspection: Inspection) -> str:
    """A line for each layer, as a spreadsheet reads it; without the spectra."""
    names = [field.name for field in fields(LayerFacts) if field.name != "spectrum"]
    text = io.StringIO()
    writer = csv.DictWriter(text, names, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    for layer in inspection.layers:
        writer.writerow({**_plain(layer), "shape": "x".join(map(str, layer.shape))})
    return text.getvalue()


def cut_table(cuts: Mapping[str, TruncationStats], other: Mapping[str, str] | None = None) -> str:
    """What a cut did: some lines for the whole, then a line for each layer. other: what stays as it is (Adapter)."""
    if not cuts:
        return "There is no plain LoRA layer to cut."
    before, after = (sum(getattr(cut, f"bytes_{when}") for cut in cuts.values()) for when in ("before", "after"))
    kept = total_energy_kept(cuts)
    dropped = sum(cut.rank_after == 0 for cut in cuts.values())
    ranks = " -> ".join(f"{sum(getattr(c, f'rank_{w}') for c in cuts.values()):,}" for w in ("before", "after"))
    lines = [
        f"Layers: {len(cuts)}, dropped: {dropped}. Sum of ranks: {ranks}.",
        f"Size of the layers: {before / 1e6:.2f} MB -> {after / 1e6:.2f} MB ({after / before:.0%}).",
        f"Kept of all layers' energy: {kept:.2%}. Error of the whole change: {math.sqrt(1.0 - kept):.1%} of its norm.",
        *(f"Not cut, as it is no plain LoRA: {kind}, {_named(each)}." for kind, each in _by_kind(other or {}).items()),
    ]
    header = ["layer", "rank before", "after", "energy kept", "norm kept", "sum kept", "kB before", "after"]
    rows = [
        [
            name,
            str(cut.rank_before),
            str(cut.rank_after) if cut.rank_after else "dropped",
            f"{cut.energy_kept:.2%}",
            f"{math.sqrt(cut.energy_kept):.2%}",
            f"{cut.sum_kept:.2%}",
            f"{cut.bytes_before / 1e3:.1f}",
            f"{cut.bytes_after / 1e3:.1f}",
        ]
        for name, cut in cuts.items()
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


def _named(names: list[str], shown: int = 3) -> str:
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return f"{', '.join(names[:shown])}{more}"


def trajectory_table(report: RankReport) -> str:
    """One line for each restart: what was kept, as mean and range over the layers, and how far the delta jumped.

    The jump is the mean of ‖new delta - old delta‖ / ‖old delta‖ over the layers. A sentence where no restart was.
    """
    if not report.restarts:
        return "No restart: the training was shorter than two restart intervals."
    header = ["step", "epoch", "loss", "threshold", "kept in delta", "in lora_down", "in lora_up"]
    header += ["energy kept", "jump of delta"]
    rows = []
    for restart in report.restarts:
        ranks = list(restart.layers.values())
        kept = [[getattr(rank, part) for rank in ranks] for part in ("kept_delta", "kept_down", "kept_up")]
        energy = math.fsum(rank.energy for rank in ranks) / max(1, len(ranks))
        jump = restart.mean_jump()
        threshold = "noise floor" if restart.threshold is None else f"{restart.threshold:.3f}"
        start = [str(restart.step), str(restart.epoch), f"{restart.loss:.4f}", threshold]
        rows.append([*start, *map(mean_and_range, kept), f"{energy:.1%}", "-" if jump is None else f"{jump:.1%}"])
    return text_table(header, rows)


NO_CUTS = (
    "No cut was tried on held-out pictures: the training held none out, or it is older than this table."
    " Train AC-LoRA does so with 8 pictures or more."
)


def cuts_table(cuts: Sequence[TruncationLoss]) -> str:
    """One line for each cut, in the order in which they were tried. A sentence where there was none."""
    if not cuts:
        return NO_CUTS
    losses = [cut.loss for cut in cuts if math.isfinite(cut.loss)]
    best = min(losses, default=math.nan)
    header = ["cut", "mean rank", "size", "held-out loss", "above the best", "standard error", "given"]
    rows = [
        [
            cut.name,
            _number(cut.mean_rank, ".1f"),
            size_text(cut.size),
            _number(cut.loss, ".4f"),
            _number(cut.loss - best, ".4f"),
            _number(cut.error, ".4f"),
            "yes" if cut.chosen else "no",
        ]
        for cut in cuts
    ]
    return text_table(header, rows)


def _number(value: float, form: str) -> str:
    return format(value, form) if math.isfinite(value) else "unknown"
