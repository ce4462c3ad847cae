"""A LoRA as data: file formats, metadata, ranks, truncation, the rank report."""

from .adapter import Adapter, Layer, with_dtype
from .key_formats import PAIRS, group_by_base, host_names
from .layer_names import block_kind, natural_order, place_of
from .lora_file import from_state_dict, load, save, to_state_dict
from .metadata import build_metadata, describe, thumbnail_url
from .rank_report import CutLoss, RankReport, Restart, Setting, check_report, left_out, own_report, recent_loss
from .resizing import ResizeConfig, resize
from .truncation import BalancedLayer, LayerCut, balance, cut_to_ranks, ranks_by_rule, total_energy_kept

__all__ = [
    "Adapter",
    "BalancedLayer",
    "CutLoss",
    "Layer",
    "LayerCut",
    "PAIRS",
    "RankReport",
    "ResizeConfig",
    "Restart",
    "Setting",
    "balance",
    "block_kind",
    "build_metadata",
    "check_report",
    "cut_to_ranks",
    "describe",
    "from_state_dict",
    "group_by_base",
    "host_names",
    "left_out",
    "load",
    "natural_order",
    "own_report",
    "place_of",
    "ranks_by_rule",
    "recent_loss",
    "resize",
    "save",
    "thumbnail_url",
    "to_state_dict",
    "total_energy_kept",
    "with_dtype",
]
