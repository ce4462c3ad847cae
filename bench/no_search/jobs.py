"""What is to be trained: one job for each style, seed and fixed rank or setting."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

Row = dict[str, Any]  # what came of a job, as it goes into the JSON
Kind = Literal["base", "grid", "setting"]


@dataclass(frozen=True)
class Job:
    """One measurement: the base as it is, or a training and what its adapter is worth."""

    kind: Kind
    name: str  # "base", "rank 8", or the setting's name
    style: str
    seed: int
    settings: dict[str, Any]  # of TrainConfig, where they differ from its defaults
    marks: tuple[int, ...] = ()  # steps at which the verdict is measured while it trains

    def row(self) -> Row:
        """What the results say of it before it has run."""
        return {
            "kind": self.kind,
            "name": self.name,
            "style": self.style,
            "seed": self.seed,
            "settings": self.settings,
        }


def marks_up_to(marks: Iterable[int], last: int) -> tuple[int, ...]:
    """The marks before the last step, and the last step."""
    return (*(mark for mark in sorted(marks) if mark < last), last)


def grid_job(
    style: str, seed: int, rank: int, common: Mapping[str, Any], marks: tuple[int, ...], alpha_is_rank: bool = False
) -> Job:
    """A plain LoRA of a fixed rank on all images, without restarts and without validation."""
    settings = {**common, "mode": "off", "held_out": 0.0, "max_rank": rank, "steps": marks[-1], "seed": seed}
    if alpha_is_rank:
        settings["alpha"] = float(rank)
    return Job("grid", f"rank {rank}", style, seed, settings, marks)


def setting_job(style: str, seed: int, name: str, setting: Mapping[str, Any], common: Mapping[str, Any]) -> Job:
    """AC-LoRA with one of the settings; `common` holds where the setting says nothing."""
    return Job("setting", name, style, seed, {**common, **setting, "seed": seed})


def ordered(
    styles: Sequence[str],
    seeds: Sequence[int],
    ranks: Sequence[int],
    settings: Mapping[str, Mapping[str, Any]],
    common: Mapping[str, Any],
    marks: tuple[int, ...],
    alpha_is_rank: bool = False,
) -> list[Job]:
    """All jobs, so that a run that is cut short has whole seeds: the base, then seed by seed the grid and the settings.

    In the grid the large ranks go first: all its jobs take as many steps, and these are the longest.
    """
    jobs = [Job("base", "base", style, 0, {}) for style in styles]
    for seed in seeds:
        largest_first = sorted(ranks)[::-1]
        jobs += [grid_job(it, seed, rank, common, marks, alpha_is_rank) for rank in largest_first for it in styles]
        jobs += [setting_job(style, seed, name, settings[name], common) for name in settings for style in styles]
    return jobs
