"""Facts about a training run: counts, times and notes that stand beside its settings in files."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args

Setting = str | int | float | bool
Stage = Literal["training", "cutting", "training on all", "comparing"]  # of a training; the spelling in files


@dataclass(frozen=True)
class TrainingFacts:
    """Facts about a training run. None and "" mean unknown; files leave such facts out.

    Times of day are in seconds since 1970 (UTC).
    """

    images: int | None = None  # style images
    regularisation_images: int | None = None
    held_out_images: int | None = None  # style images used for validation only
    steps_run: int | None = None  # optimizer steps of both passes
    best_step: int | None = None  # step with the lowest validation loss
    chosen_step: int | None = None  # step that the user chose in place of the automatic one
    rank_before: float | None = None  # mean over the layers, before they were truncated to the ranks that they use
    rank_after: float | None = None  # mean after that
    truncated_size: int | None = None  # bytes of all matrices after that, two for each number
    file_size: int | None = None  # bytes of the file, as it is saved by default
    epochs: int | None = None  # of the pass that gave the adapter, begun ones included
    cancelled: Stage | None = None  # stage in which the user cancelled the training
    notes: str = ""  # sentences for the user
    started_at: float | None = None
    finished_at: float | None = None
    seconds_run: float | None = None  # of this run; a resumed training does not count the runs before
    validation_seconds: float | None = None
    checkpoint_seconds: float | None = None
    preview_seconds: float | None = None
    previews_left_out: int | None = None  # sets of previews skipped to save time
    unseen_prompts: int | None = None  # captions that were drawn and not learned from, for the next three
    style_gained: float | None = None  # 0 as without the adapter, 1 as the training images
    content_kept: float | None = None  # likeness to what the model draws without the adapter
    copied_share: float | None = None  # share of drawings that copy a training image, less the model's own
    base_model: str = ""  # ComfyUI's class of the model, such as "SDXL"
    resolution: str = ""  # such as "1024x1024"
    trigger: str = ""  # word that calls the style

    def to_dict(self) -> dict[str, Setting]:
        """Return the known facts by name, in the layout of files and checkpoints."""
        return {name: value for name, value in asdict(self).items() if value not in (None, "")}

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any]) -> TrainingFacts:
        """Read facts from a stored mapping; other keys and null values are ignored.

        Raises:
            ValueError, TypeError: a value has the wrong type.
        """
        known = {name: stored[name] for name in FACT_NAMES if stored.get(name) is not None}
        return cls(**{name: _READERS[name](value) for name, value in known.items()})


def _read_stage(value: object) -> Stage:
    for stage in get_args(Stage):
        if value == stage:
            return stage
    raise ValueError(f"'{value}' is no stage of a training")


_BY_TYPE: dict[str, Callable[[Any], Any]] = {
    "int | None": int,
    "float | None": float,
    "Stage | None": _read_stage,
    "str": str,
}


_READERS = {field.name: _BY_TYPE[str(field.type)] for field in fields(TrainingFacts)}


FACT_NAMES = tuple(_READERS)
