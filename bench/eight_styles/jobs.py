"""The jobs of the study: what is drawn and measured."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from bench.pool import Row

Kind = Literal["base", "real", "vae", "training", "library"]


@dataclass(frozen=True)
class Job:
    """One style, one seed, and what draws it.

    kind: "base" draws without an adapter; "real" measures the real images, and "vae" the same through the autoencoder;
    "training" trains with the pack, "library" with a method of bench/eight_styles/libraries.py.
    """

    kind: Kind
    name: str  # its line in the tables, without the step
    style: str
    seed: int = 0
    settings: dict[str, Any] = field(default_factory=dict)  # of TrainConfig, or of the library's training
    marks: tuple[int, ...] = ()  # steps at which images are drawn; the adapter that is returned is drawn in any case
    images: int = 16  # training images
    mirrored: bool = False  # whether mirrored images are learned too
    strengths: tuple[float, ...] = ()  # of the returned adapter, besides 1
    truncations: tuple[str, ...] = ()  # of the returned adapter, as rank rules: "energy 0.9", "noise_floor"
    watched: bool = False  # whether the candidates for a stop are measured at the marks

    def row(self) -> Row:
        """Return the part of the job's row that is known before it runs."""
        row = {"kind": self.kind, "name": self.name, "style": self.style, "seed": self.seed, "settings": self.settings}
        return row if self.images == 16 else {**row, "images": self.images}
