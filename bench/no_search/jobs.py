"""The jobs of the benchmark: one for each style, seed and fixed rank or setting."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from bench.pool import Row

Kind = Literal["base", "grid", "setting"]


@dataclass(frozen=True)
class Job:
    """One measurement: of the base model, or of an adapter that is trained first."""

    kind: Kind
    name: str  # "base", "rank 8", or the setting's name
    style: str
    seed: int
    settings: dict[str, Any]  # settings of TrainConfig that differ from its defaults
    marks: tuple[int, ...] = ()  # steps of the training at which the test loss is measured

    def row(self) -> Row:
        """Return the part of the job's row that is known before it runs."""
        return {
            "kind": self.kind,
            "name": self.name,
            "style": self.style,
            "seed": self.seed,
            "settings": self.settings,
        }


def marks_up_to(marks: Iterable[int], last: int) -> tuple[int, ...]:
    """Return the marks before the last step, and the last step."""
    return (*(mark for mark in sorted(marks) if mark < last), last)


def grid_job(
    style: str, seed: int, rank: int, common: Mapping[str, Any], marks: tuple[int, ...], alpha_is_rank: bool = False
) -> Job:
    """Return the job of a plain LoRA of a fixed rank on all images, with all of its steps, whole."""
    whole = {"mode": "off", "held_out": 0.0, "stop_early": False, "smallest": False}
    settings = {**common, **whole, "max_rank": rank, "steps": marks[-1], "seed": seed}
    if alpha_is_rank:
        settings["alpha"] = float(rank)
    return Job("grid", f"rank {rank}", style, seed, settings, marks)


def setting_job(style: str, seed: int, name: str, setting: Mapping[str, Any], common: Mapping[str, Any]) -> Job:
    """Return the job of AC-LoRA with one of the settings; they override `common`."""
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
    """Return all jobs: the base, then the grid and the settings seed by seed, so an interrupted run has whole seeds.

    In the grid the large ranks come first, as they take longest.
    """
    jobs = [Job("base", "base", style, 0, {}) for style in styles]
    for seed in seeds:
        largest_first = sorted(ranks)[::-1]
        for rank in largest_first:
            jobs += [grid_job(style, seed, rank, common, marks, alpha_is_rank) for style in styles]
        for name, setting in settings.items():
            jobs += [setting_job(style, seed, name, setting, common) for style in styles]
    return jobs
