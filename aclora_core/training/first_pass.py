"""What the pass with held-out images found out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..adapter import Adapter, Layer, Truncation, TruncationLoss
from .progress import Progress


@dataclass(frozen=True, eq=False)
class FirstPass:
    """The result of the pass with held-out images."""

    adapter: Adapter  # of the best step, truncated
    truncation: Truncation
    losses: list[TruncationLoss]  # of every truncation that was tried
    steps: int  # that the adapter has trained for
    progress: Progress

    @property
    def improves(self) -> bool:
        """Whether its step is better on the held-out images than the model alone, as far as both were measured."""
        measured = dict(self.progress.validation)
        return not (0 in measured and self.steps in measured) or measured[self.steps] < measured[0]

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint keeps of it; the progress is kept beside it."""
        rule = None if self.truncation.kind == "whole" else self.truncation.kind
        return {
            "layers": {name: _layer_state(layer) for name, layer in self.adapter.layers.items()},
            "cut": {"name": self.truncation.name, "rule": rule, "value": self.truncation.value},
            "cuts": [losses.to_dict() for losses in self.losses],
            "steps": self.steps,
        }

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any], progress: Progress) -> FirstPass:
        """Read what state_dict returned."""
        layers = {name: Layer(**layer) for name, layer in state["layers"].items()}
        rule = state["cut"]["rule"]
        return cls(
            adapter=Adapter(layers),
            truncation=Truncation("whole") if rule is None else Truncation(rule, state["cut"]["value"]),
            losses=[TruncationLoss.from_dict(losses) for losses in state["cuts"]],
            steps=state["steps"],
            progress=progress,
        )


def _layer_state(layer: Layer) -> dict[str, Tensor | float]:
    return {"lora_down": layer.lora_down, "lora_up": layer.lora_up, "alpha": layer.alpha}
