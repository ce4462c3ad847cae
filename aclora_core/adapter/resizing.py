"""Resize a LoRA: choose the rank of each layer by a rule, by the training's report, or for a file size."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch

from ..method import RuleName, rank_rule
from .adapter import Adapter, with_dtype
from .metadata import build_metadata, rank_text, with_comment
from .rank_report import RankReport, check_report, embedded_report
from .truncation import SvdLayer, TruncationStats, ranks_by_rule, ranks_for_size, truncate_to_ranks

ResizeRule = Literal[RuleName, "signal", "file size"]


_TITLE_RESERVE = "t" * 200  # stands for the file's name in its metadata, which is not known yet
_COMMENT_RESERVE = "c" * 200  # stands for the comment on the ranks, which are not known yet


@dataclass(frozen=True)
class ResizeConfig:
    """Rule and limits of a resize. Raises ValueError for a value out of its range."""

    rule: ResizeRule = "energy"  # a rule of method.rank_rule, the signal of the training, or a file size
    value: float = 0.98  # the rule's parameter; for "file size" megabytes; unused by signal, knee, noise_floor
    max_rank: int = 0  # no layer gets more; 0 for no limit
    dtype: torch.dtype | None = None  # of the result's factors; None for the type they have
    drop_layers: bool = False  # whether "file size" may drop layers

    def __post_init__(self) -> None:
        rules = [*get_args(RuleName), "signal", "file size"]
        if self.rule not in rules:
            raise ValueError(f"The rank rule must be one of {', '.join(rules)}, but is '{self.rule}'.")
        if self.rule == "file size" and not math.isfinite(self.value):
            raise ValueError(f"The file's size must be a number of megabytes, but is {self.value}.")
        if self.max_rank < 0:
            raise ValueError(f"The largest rank must be 0 (no limit) or more, but is {self.max_rank}.")


def resize(
    adapter: Adapter, decomposed: Mapping[str, SvdLayer], config: ResizeConfig, report: RankReport | None = None
) -> tuple[Adapter, dict[str, TruncationStats]]:
    """Truncate the layers of an adapter by the rule of `config`. Layers of other kinds stay whole.

    Args:
        decomposed: the adapter's layers (decompose).
        report: of the training, for the rule "signal"; the one in the adapter's metadata if None. The rule "file size"
            counts it as part of the file.

    Returns:
        The truncated adapter, and for each layer what it lost.

    Raises:
        ValueError: there is no layer to truncate, the report is missing or from another training, the size is too
            small, or the rule refuses its parameter.
    """
    if not decomposed:
        kinds = ", ".join(sorted(set(adapter.other.values())))
        raise ValueError(f"There is no plain LoRA layer to truncate, only {kinds}. Choose another LoRA.")
    if report is not None:
        check_report(adapter, report)
    if config.dtype is not None:  # tensors of other kinds too, so that the file's size is known
        adapter = replace(adapter, extra=with_dtype(replace(adapter, layers={}), config.dtype).extra)
    limit = config.max_rank or None
    if config.rule == "signal":
        ranks = _ranks_by_signal(decomposed, report or embedded_report(adapter), limit)
    elif config.rule == "file size":
        ranks = _ranks_by_file_size(adapter, decomposed, config, report)
    else:
        ranks = ranks_by_rule(decomposed, rank_rule(config.rule, config.value), limit)
    truncated, stats = truncate_to_ranks(adapter, decomposed, ranks, config.dtype)
    if not truncated.layers:
        raise ValueError("No layer would be left. Choose a larger size, or do not drop layers.")
    comment = f"truncated by AC-LoRA from {rank_text(adapter)} to {rank_text(truncated)}, rule '{config.rule}'"
    return replace(truncated, metadata=with_comment(adapter.metadata, comment)), stats


def _ranks_by_signal(
    decomposed: Mapping[str, SvdLayer], report: RankReport | None, limit: int | None
) -> dict[str, int]:
    if report is None:
        raise ValueError("The rule 'signal' needs the report of the training. Connect rank_report, or take 'energy'.")
    missing = next((name for name in decomposed if name not in report.signal), None)
    if missing is not None:
        raise ValueError(
            f"The rank report has no signal rank of the layer '{missing}'. Connect the report of the node that"
            " made this LoRA, or take the rule 'energy'."
        )
    return {
        name: max(1, min(report.signal[name], len(layer.singular_values), limit or report.signal[name]))
        for name, layer in decomposed.items()
    }


def _ranks_by_file_size(
    adapter: Adapter, decomposed: Mapping[str, SvdLayer], config: ResizeConfig, report: RankReport | None
) -> dict[str, int]:
    """Return the ranks with the most energy for the file size, with the metadata that saving adds."""
    limit = config.max_rank or None
    offered = {
        name: replace(layer, singular_values=layer.singular_values[:limit]) for name, layer in decomposed.items()
    }
    commented = replace(adapter, metadata=with_comment(adapter.metadata, _COMMENT_RESERVE))
    metadata = build_metadata(commented, _TITLE_RESERVE, report)
    size = round(config.value * 1e6)
    return ranks_for_size(commented, offered, size, config.dtype, metadata, 0 if config.drop_layers else 1)
