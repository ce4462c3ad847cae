"""What is tried: one training of the tiny base on images of the quickstart's style, drawn in one way or more."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.no_search.images import in_random_order
from tools.tiny_base import icons
from tools.tiny_base.example_pictures import CONCEPTS, KEPT_BACK, STYLE

VERDICT = 96  # things that are drawn and judged
_SKIPPED = 48  # things in front of them, which other benchmarks learn from
FEW = CONCEPTS[:16]


@dataclass(frozen=True)
class Drawing:
    """How the trained adapter draws."""

    strength: float = 1.0
    guidance: float = 1.0  # 1 for none

    def __str__(self) -> str:
        words = [f"strength {self.strength:g}"] if self.strength != 1 else []
        return ", ".join([*words, *([f"guidance {self.guidance:g}"] if self.guidance != 1 else [])])


@dataclass(frozen=True)
class Trial:
    """A training; caption: of an image and of a prompt, around the words for the thing."""

    name: str
    caption: str = "{thing}"
    concepts: Sequence[str] = CONCEPTS
    settings: dict[str, Any] = field(default_factory=dict)  # of TrainConfig, where they differ from the defaults
    drawings: Sequence[Drawing] = (Drawing(),)

    def captions(self, concepts: Sequence[str]) -> list[str]:
        """Return the captions of concepts: "owl" -> "fluent style, an owl"."""
        return [self.caption.format(thing=icons.caption(concept, "").rsplit(",", 1)[0]) for concept in concepts]


TRIALS = (
    Trial("16 images, no style word", concepts=FEW, drawings=(Drawing(), Drawing(guidance=2))),
    Trial("16 images, style word", "{thing}, fluent style", FEW, drawings=(Drawing(), Drawing(guidance=3))),
    Trial("24 images, style word", "{thing}, fluent style", drawings=(Drawing(), Drawing(strength=1.2))),
)


def verdict_concepts(cache: Path) -> list[str]:
    """Return the things to draw: a random choice of those that the base knows, none of which any trial learns.

    cache: the folder of the icon sets.
    """
    drawn, known = icons.load_set(cache, STYLE), icons.load_set(cache, icons.REFERENCE)
    order = in_random_order([concept for concept in drawn if concept in known], seed=0)[_SKIPPED:]
    learned = {concept for trial in TRIALS for concept in trial.concepts}
    return [concept for concept in order if concept not in learned][:VERDICT]


def shown_concepts() -> list[str]:
    """Return the things of the workflows' prompts, which no trial learns either."""
    return list(KEPT_BACK)
