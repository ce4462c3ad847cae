"""AC-LoRA (arXiv 2504.02231), mathematics alone: singular values, thresholds, the restart, the noise floor."""

from .rank_rules import Rule, RuleName, rank_by_energy, rank_rule
from .resampling import restart_matrix
from .restart import LayerRank, LayerRestart, Mode, restart_adapter
from .spectrum import delta_singular_values, effective_rank, energy, energy_kept, stable_rank, sum_kept, truncate
from .thresholds import Measure, dynamic_threshold, is_restart_epoch, signal_count

__all__ = [
    "LayerRank",
    "LayerRestart",
    "Measure",
    "Mode",
    "Rule",
    "RuleName",
    "delta_singular_values",
    "dynamic_threshold",
    "effective_rank",
    "energy",
    "energy_kept",
    "is_restart_epoch",
    "rank_by_energy",
    "rank_rule",
    "restart_adapter",
    "restart_matrix",
    "signal_count",
    "stable_rank",
    "sum_kept",
    "truncate",
]
