"""What the server hands over to the processes of a training, and what it gets back: by files, in ComfyUI's temp folder.

A file is mapped into memory by all of them, so that it is there once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ....aclora_core.adapter import RankReport, from_state_dict, to_state_dict
from ....aclora_core.config import CheckpointConfig, TrainConfig
from ....aclora_core.text import error_reason
from ....aclora_core.training import Result
from ..options.options import Options, PreviewSettings
from .graph import Link

_TASK, _RESULT = "task.pt", "result.pt"


@dataclass(frozen=True)
class Task:
    """A training, for other processes."""

    nodes: dict[str, dict[str, Any]]  # that load the model, as a prompt
    links: dict[str, Link]  # of model, clip and vae
    latents: Sequence[dict[str, Any]]
    conditioning: Sequence[Any]
    config: TrainConfig
    chosen: Options  # without its CLIP and its VAE
    step: int  # that is asked for; 0 for the automatic one
    candidates: Path  # folder of all trainings' candidates
    identity: str  # of the MODEL
    dark: bool  # whether pictures are dark


@dataclass(frozen=True, eq=False)
class Ended:
    """A training that has come to its end in other processes."""

    result: Result
    key: str  # of the training among the candidates
    base_model: str
    resolution: str
    previews: list[Tensor]  # the last ones
    drawn_at: int  # step of these


def write_task(task: Task, folder: Path) -> None:
    """Write a task as plain values: the pack's classes may have other names in other processes.

    Raises:
        ValueError: it holds what cannot be written.
        OSError: the disk is full.
    """
    content = {field.name: getattr(task, field.name) for field in fields(task)}
    content["config"] = asdict(task.config)
    content["candidates"] = str(task.candidates)
    content["chosen"] = _plain_options(task.chosen)
    try:
        _save(content, folder / _TASK)
    except OSError:
        raise
    except Exception as error:  # whatever another pack's node has put beside a caption
        raise ValueError(
            "The captions or latents of this training hold what cannot be handed over to other processes "
            f"({error_reason(error)}). Set gpus on AC-LoRA Speed Options to 1."
        ) from error


def read_task(folder: Path) -> Task:
    """Return the task in a folder; its tensors stay in the file until they are used."""
    content = torch.load(folder / _TASK, mmap=True, map_location="cpu", weights_only=False)  # our own file
    content["config"] = TrainConfig(**content["config"])
    content["candidates"] = Path(content["candidates"])
    content["chosen"] = _options(content["chosen"])
    return Task(**content)


def write_result(ended: Ended, folder: Path) -> None:
    """Write the end of a training.

    Raises:
        OSError: the disk is full.
    """
    content = {field.name: getattr(ended, field.name) for field in fields(ended)}
    content["result"] = to_state_dict(ended.result.adapter), ended.result.report.to_json()
    _save(content, folder / _RESULT)


def read_result(folder: Path) -> Ended:
    """Return the end of a training."""
    content = torch.load(folder / _RESULT, weights_only=False)
    factors, report = content["result"]
    return Ended(**{**content, "result": Result(from_state_dict(factors), RankReport.from_json(report))})


def _save(content: dict[str, Any], path: Path) -> None:
    """Write nested values. PyTorch reports a full disk in words of its own; the error of the file is raised instead."""
    try:
        with path.open("wb") as file:
            torch.save(content, file)
    except RuntimeError as error:
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise


def _plain_options(chosen: Options) -> dict[str, Any]:
    checkpoints, previews = chosen.checkpoints, chosen.previews
    return {
        "checkpoints": checkpoints and {**vars(checkpoints), "folder": str(checkpoints.folder)},
        "previews": previews and {**vars(previews), "vae": None},
        "unconditional": chosen.unconditional,
    }


def _options(plain: Mapping[str, Any]) -> Options:
    checkpoints, previews = plain["checkpoints"], plain["previews"]
    return Options(
        checkpoints=checkpoints and CheckpointConfig(**{**checkpoints, "folder": Path(checkpoints["folder"])}),
        previews=previews and PreviewSettings(**previews),
        unconditional=plain["unconditional"],
    )
