"""A LoRA as data: file formats, metadata, ranks, truncation, the rank report."""

from .adapter import Adapter, Layer, is_finite, with_dtype
from .file_formats import FILE_FORMAT, FILE_NAMES, FormatChoice
from .file_size import file_size
from .key_formats import KEY_FORMATS, KeyFormat, find_key_format, suffixes_by_base, to_comfyui_keys
from .layer_names import block_kind, layer_sort_key, parse_layer_name
from .left_out import left_out_lines
from .lora_file import from_state_dict, load, read_lora, save, save_in_format
from .metadata import build_metadata, describe_layers, thumbnail_url
from .names import BASE_MODEL, FileFormat
from .rank_report import (
    RankReport,
    Restart,
    check_report,
    embedded_report,
    fit_share,
    recent_loss,
    skipped_steps,
)
from .resizing import ResizeConfig, resize
from .state_dict import LoraStateDict, to_state_dict
from .training_facts import Setting, Stage, TrainingFacts
from .truncation import SvdLayer, TruncationStats, decompose, ranks_by_rule, total_energy_kept, truncate_to_ranks
from .truncation_loss import Truncation, TruncationKind, TruncationLoss

__all__ = [
    "Adapter",
    "BASE_MODEL",
    "FILE_FORMAT",
    "FILE_NAMES",
    "FileFormat",
    "FormatChoice",
    "KEY_FORMATS",
    "KeyFormat",
    "Layer",
    "LoraStateDict",
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
    "describe_layers",
    "embedded_report",
    "file_size",
    "find_key_format",
    "fit_share",
    "from_state_dict",
    "is_finite",
    "layer_sort_key",
    "left_out_lines",
    "load",
    "parse_layer_name",
    "ranks_by_rule",
    "read_lora",
    "recent_loss",
    "resize",
    "save",
    "save_in_format",
    "skipped_steps",
    "suffixes_by_base",
    "thumbnail_url",
    "to_comfyui_keys",
    "to_state_dict",
    "total_energy_kept",
    "truncate_to_ranks",
    "with_dtype",
]
