"""Truncations that a training tried, and their validation losses."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

TruncationKind = Literal["whole", "fixed", "energy", "signal", "other"]


@dataclass(frozen=True)
class Truncation:
    """Rule by which an adapter was truncated."""

    kind: TruncationKind  # "fixed": the same rank in every layer; "other": a name from a file that no rule is known for
    value: float = 0.0  # the rank of "fixed", the share from 0 to 1 of "energy"; the other kinds have none
    label: str = ""  # the name of "other"

    @property
    def name(self) -> str:
        """Name for the user and spelling in files: "whole", "rank 4", "energy 95%"."""
        if self.kind == "fixed":
            return f"rank {int(self.value)}"
        if self.kind == "energy":
            return f"energy {100 * self.value:g}%"
        return self.label if self.kind == "other" else self.kind

    @classmethod
    def from_name(cls, name: str) -> Truncation:
        """Read the spelling of a file; a name without a known rule becomes "other" and keeps its spelling."""
        if name == "whole":
            return cls("whole")
        if name == "signal":
            return cls("signal")
        if match := re.fullmatch(r"rank (\d{1,9})", name):
            return cls("fixed", int(match[1]))
        if match := re.fullmatch(r"energy (\d{1,3}(?:\.\d+)?)%", name):
            return cls("energy", float(match[1]) / 100)
        return cls("other", label=name)


@dataclass(frozen=True)
class TruncationLoss:
    """Validation loss of an adapter after one truncation, measured at the end of a training."""

    truncation: Truncation
    mean_rank: float  # over the layers
    size: int  # bytes of all matrices
    loss: float  # on held-out images, relative to predicting the mean target
    error: float  # standard error of the difference to the best truncation; 0 for the best itself
    chosen: bool  # whether the training gave this one

    @property
    def name(self) -> str:
        """Name of the truncation for the user."""
        return self.truncation.name

    def to_dict(self) -> dict[str, Any]:
        """Return the layout of files and checkpoints, in which the rule is spelled as its name."""
        return {
            "name": self.name,
            "mean_rank": self.mean_rank,
            "size": self.size,
            "loss": self.loss,
            "error": self.error,
            "chosen": self.chosen,
        }

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any]) -> TruncationLoss:
        """Read the layout of to_dict; null stands for NaN.

        Raises:
            KeyError, TypeError, ValueError: an entry is missing, of the wrong type, or no number of bytes.
        """
        size = int(stored["size"])
        if not 0 <= size < 2**63:
            raise ValueError("the size of a truncated adapter is no number of bytes")
        return cls(
            truncation=Truncation.from_name(str(stored["name"])),
            mean_rank=_number(stored["mean_rank"]),
            size=size,
            loss=_number(stored["loss"]),
            error=_number(stored["error"]),
            chosen=bool(stored["chosen"]),
        )


def _number(value: Any) -> float:
    return math.nan if value is None else float(value)
