"""A LoRA as data: file formats, metadata, ranks, truncation, the rank report."""

from .adapter import Adapter, Layer, with_dtype
from .key_formats import PAIRS, group_by_base, host_names
from .layer_names import block_kind, natural_order, place_of
from .lora_file import from_state_dict, load, save, to_state_dict
from .metadata import build_metadata, describe, thumbnail_url
from .rank_report import (
    RankReport,
    Restart,
    check_report,
    own_report,
    recent_loss,
    skipped_steps,
)
from .resizing import ResizeConfig, resize
from .training_facts import Setting, Stage, TrainingFacts
from .truncation import SvdLayer, TruncationStats, decompose, ranks_by_rule, total_energy_kept, truncate_to_ranks
from .truncation_loss import Truncation, TruncationKind, TruncationLoss

__all__ = [
    "Adapter",
    "Layer",
    "PAIRS",
    "RankReport",
    "ResizeConfig",
    "Restart",
    "Setting",
    "Stage",
    "SvdLayer",
    "TrainingFacts",
    "Truncation",
    "TruncationKind",
    "TruncationLoss",
    "TruncationStats",
    "block_kind",
    "build_metadata",
    "check_report",
    "decompose",
    "describe",
    "from_state_dict",
    "group_by_base",
    "host_names",
    "load",
    "natural_order",
    "own_report",
    "place_of",
    "ranks_by_rule",
    "recent_loss",
    "resize",
    "save",
    "skipped_steps",
    "thumbnail_url",
    "to_state_dict",
    "total_energy_kept",
    "truncate_to_ranks",
    "with_dtype",
]
