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
MORE = (  # images than the quickstart has
    "princess",
    "blue book",
    "fire",
    "stop sign",
    "ear of corn",
    "pig face",
)
FIRST = CONCEPTS[:16]
# Half of them swapped for what they lack: a person, a sign, a hand, clothes, things in strong colours.
SWAPPED = (*CONCEPTS[:8], *CONCEPTS[16:])


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
    concepts: Sequence[str] = FIRST
    settings: dict[str, Any] = field(default_factory=dict)  # of TrainConfig, where they differ from the defaults
    drawings: Sequence[Drawing] = (Drawing(),)

    def captions(self, concepts: Sequence[str]) -> list[str]:
        """Return the captions of concepts: "owl" -> "fluent style, an owl"."""
        return [self.caption.format(thing=icons.caption(concept, "").rsplit(",", 1)[0]) for concept in concepts]


FLUENT = "fluent style, {thing}"  # the words of the set in the base that is nearest, as the workflow's trigger word
_DRAWINGS = (Drawing(), Drawing(strength=0.8), Drawing(strength=0.9), Drawing(strength=1.2), Drawing(guidance=1.5))
_SETTINGS: dict[str, dict[str, Any]] = {
    "360 steps": {"steps": 360, "stop_early": False},
    "800 steps": {"steps": 800, "stop_early": False},
    "caption dropout 0.1": {"caption_dropout": 0.1},
    "prior 0.02": {"prior_weight": 0.02},
    "rank 8": {"max_rank": 8},
    "rank 64": {"max_rank": 64},
    "learning rate 3e-4": {"learning_rate": 3e-4},
    "learning rate 1e-3": {"learning_rate": 1e-3},
    "batch size 8": {"batch_size": 8},
    "odds of noise x 4": {"timesteps": "uniform", "timestep_shift": 4.0},
    "EMA 0.99": {"ema_decay": 0.99},
    "attention": {"layers": "attention"},
    "attention and feed-forward": {"layers": "attention and feed-forward"},
}
TRIALS = (
    Trial("16 images"),
    Trial("16 images, fluent", FLUENT),
    Trial("16 other images, fluent", FLUENT, SWAPPED),
    Trial("24 images", concepts=CONCEPTS),
    Trial("24 images, fluent", FLUENT, CONCEPTS, drawings=_DRAWINGS),
    Trial("24 images, fluent behind", "{thing}, fluent style", CONCEPTS, drawings=_DRAWINGS),
    Trial("24 images, a new word", "ink style, {thing}", CONCEPTS),
    Trial("24 images, fluent and a new word", "fluent ink style, {thing}", CONCEPTS),
    Trial("24 images, noto", "noto style, {thing}", CONCEPTS),
    Trial("30 images, fluent", FLUENT, CONCEPTS + MORE),
    *(Trial(f"24 images, fluent, {name}", FLUENT, CONCEPTS, settings) for name, settings in _SETTINGS.items()),
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
