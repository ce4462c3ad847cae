"""The AC-LoRA method (arXiv 2504.02231), mathematics alone. Start with ac_lora.py, the paper on one screen.

restart.py applies it to all layers at once, noise_floor.py is our rule for what is signal, and spectrum.py and
rank_rules.py read ranks from trained adapters.
"""

from .ac_lora import dynamic_threshold, restart_layer, restart_matrix, signal_count
from .rank_rules import Rule, RuleName, rank_by_energy, rank_rule
from .restart import LayerRank, LayerRestart, Mode, restart_adapter
from .spectrum import delta_singular_values, effective_rank, energy, energy_kept, stable_rank, sum_kept, truncate
from .thresholds import Measure, SignalThreshold, is_restart_epoch, scheduled_threshold

__all__ = [
    "LayerRank",
    "LayerRestart",
    "Measure",
    "Mode",
    "Rule",
    "RuleName",
    "SignalThreshold",
    "delta_singular_values",
    "dynamic_threshold",
    "effective_rank",
    "energy",
    "energy_kept",
    "is_restart_epoch",
    "rank_by_energy",
    "rank_rule",
    "restart_adapter",
    "restart_layer",
    "restart_matrix",
    "scheduled_threshold",
    "signal_count",
    "stable_rank",
    "sum_kept",
    "truncate",
]
