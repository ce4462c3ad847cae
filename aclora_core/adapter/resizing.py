"""Which rank each layer of a LoRA gets when it is resized: by the training's report, by a rule, or by a file size."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch

from ..method import RuleName, rank_rule
from .adapter import Adapter, with_dtype
from .metadata import build_metadata
from .rank_report import RankReport, check_report, own_report
from .truncation import SvdLayer, TruncationStats, ranks_by_rule, ranks_for_size, truncate_to_ranks

ResizeRule = Literal[RuleName, "signal", "file size"]


_LONGEST_TITLE = "t" * 200  # the file is named in its metadata; the name is not known yet


@dataclass(frozen=True)
class ResizeConfig:
    """How to resize."""

    rule: ResizeRule = "energy"  # a rule of cutting.rank_rule, the signal of the training, or a file size
    value: float = 0.98  # the rule's parameter; for "file size" millions of bytes; unused by signal, knee, noise_floor
    max_rank: int = 0  # no layer gets more; 0 for no limit
    dtype: torch.dtype | None = None  # of the result's matrices; None for the type they have
    drop_layers: bool = False  # whether "file size" may leave layers out

    def __post_init__(self) -> None:
        rules = [*get_args(RuleName), "signal", "file size"]
        if self.rule not in rules:
            raise ValueError(f"The rank rule must be one of {', '.join(rules)}, but is '{self.rule}'.")
        if self.max_rank < 0:
            raise ValueError(f"The largest rank must be 0 (no limit) or more, but is {self.max_rank}.")


def resize(
    adapter: Adapter, balanced: Mapping[str, SvdLayer], config: ResizeConfig, report: RankReport | None = None
) -> tuple[Adapter, dict[str, TruncationStats]]:
    """The cut adapter, and what each layer lost; what is no plain LoRA stays whole.

    balanced: the adapter's layers in their singular components (cutting.balance). report: of the training, for
    the rule "signal" (else the one in the file's metadata); the rule "file size" counts it as part of the file.

    Raises:
        ValueError: no layer can be cut, the report is missing or from another training, the size is too small, or the
            rule refuses its parameter.
    """
    if not balanced:
        kinds = ", ".join(sorted(set(adapter.other.values())))
        raise ValueError(f"There is no plain LoRA layer to cut, only {kinds}. Choose another LoRA.")
    if report is not None:
        check_report(adapter, report)
    if config.dtype is not None:  # all of the file's numbers, so that its size is known
        adapter = replace(adapter, extra=with_dtype(replace(adapter, layers={}), config.dtype).extra)
    limit = config.max_rank or None
    if config.rule == "signal":
        ranks = _ranks_of_signal(balanced, report or own_report(adapter), limit)
    elif config.rule == "file size":
        ranks = _ranks_for_file(adapter, balanced, config, report)
    else:
        ranks = ranks_by_rule(balanced, rank_rule(config.rule, config.value), limit)
    cut, cuts = truncate_to_ranks(adapter, balanced, ranks, config.dtype)
    if not cut.layers:
        raise ValueError("No layer would be left. Choose a larger size, or do not drop layers.")
    return cut, cuts


def _ranks_of_signal(balanced: Mapping[str, SvdLayer], report: RankReport | None, limit: int | None) -> dict[str, int]:
    if report is None:
        raise ValueError("The rule 'signal' needs the report of the training. Connect rank_report, or take 'energy'.")
    missing = next((name for name in balanced if name not in report.signal), None)
    if missing is not None:
        raise ValueError(
            f"The rank report does not tell the signal of the layer '{missing}'. Connect the report of the node that"
            " made this LoRA, or take the rule 'energy'."
        )
    return {
        name: max(1, min(report.signal[name], len(layer.singular_values), limit or report.signal[name]))
        for name, layer in balanced.items()
    }


def _ranks_for_file(
    adapter: Adapter, balanced: Mapping[str, SvdLayer], config: ResizeConfig, report: RankReport | None
) -> dict[str, int]:
    """The most energy for the size, with the metadata that saving adds."""
    limit = config.max_rank or None
    offered = {name: replace(layer, singular_values=layer.singular_values[:limit]) for name, layer in balanced.items()}
    metadata = build_metadata(adapter, _LONGEST_TITLE, report)
    size = round(config.value * 1e6)
    return ranks_for_size(adapter, offered, size, config.dtype, metadata, 0 if config.drop_layers else 1)
