"""Candidates on disk: the adapters of several steps of a training, and the result of the training.

Each training has a folder of its own below one root. A file is complete or not there. Only the last few trainings and
a total of bytes are kept.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from ..adapter import Adapter, RankReport, Truncation, from_state_dict, to_state_dict, with_dtype
from ..storage import content_hash, read_safetensors, write_atomically
from .progress import Progress, Result

TRAININGS = 3  # that are kept
MAX_BYTES = 4 * 10**9  # of all trainings together

_FORMAT = "aclora candidate 2"
_STEP = re.compile(r"step_(\d+)\.safetensors")
_RESULT = "result.safetensors"


@dataclass(frozen=True, eq=False)
class KeptResult:
    """What a training returned by itself."""

    result: Result
    step: int  # that its adapter is of
    truncation: Truncation  # of its adapter
    steps: list[int]  # whose adapters were kept


class CandidateStore:
    """The candidates of one training.

    Args:
        root: folder of all trainings. Nobody else may write to it.
        key: of the training: a folder name that follows from all that its result depends on.
        trainings: how many trainings are kept.
        max_bytes: of all trainings together.
    """

    def __init__(self, root: Path, key: str, trainings: int = TRAININGS, max_bytes: int = MAX_BYTES) -> None:
        self.folder, self._root = root / key, root
        self._trainings, self._max_bytes = trainings, max_bytes
        self.coming: set[int] = set()  # steps whose files are being written

    def clear(self) -> None:
        """Delete what is kept of this training."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def steps(self) -> list[int]:
        """Return the steps whose adapters are there, sorted."""
        matches = (_STEP.fullmatch(path.name) for path in self._files(self.folder))
        return sorted(int(match[1]) for match in matches if match)

    def steps_to_show(self) -> set[int]:
        """Return the steps that can be chosen, or can as soon as their files are written."""
        return {*self.steps(), *self.coming}

    def write_step(self, step: int, adapter: Adapter, progress: Mapping[str, Any]) -> None:
        """Keep the adapter of a step, with the state of the progress that led to it.

        Raises:
            OSError: the file cannot be written.
        """
        self._write(f"step_{step:07}.safetensors", to_state_dict(adapter), {"progress": progress})

    def read_step(self, step: int) -> tuple[Adapter, Progress]:
        """Return the adapter of a step in float32, and the trajectory that led to it.

        Raises:
            FileNotFoundError: it is not there.
            ValueError: the file is damaged.
        """
        tensors, content = self._read(f"step_{step:07}.safetensors")
        progress = Progress(0)
        progress.load_state_dict(content["progress"])
        return with_dtype(from_state_dict(tensors), torch.float32), progress

    def write_result(self, result: Result, step: int, truncation: Truncation) -> None:
        """Keep what the training returns, exactly. step: that its adapter is of.

        Raises:
            ValueError, OSError: it cannot be written.
        """
        content = {
            "step": step,
            "truncation": {"kind": truncation.kind, "value": truncation.value},
            "report": result.report.to_json(),
        }
        tensors = to_state_dict(result.adapter)
        self._write(_RESULT, tensors, {**content, "steps": (steps := self.steps())})
        if steps != self.steps():  # where the result took the place of some
            self._write(_RESULT, tensors, {**content, "steps": self.steps()})

    def read_result(self) -> KeptResult | None:
        """Return what the training returned; None where it is not known.

        Raises:
            ValueError: the file is damaged.
        """
        if not (self.folder / _RESULT).is_file():
            return None
        tensors, content = self._read(_RESULT)
        result = Result(from_state_dict(tensors), RankReport.from_json(content["report"]))
        return KeptResult(result, content["step"], Truncation(**content["truncation"]), content["steps"])

    def _write(self, name: str, tensors: Mapping[str, Tensor], content: Mapping[str, Any]) -> None:
        stored = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
        text = json.dumps(content, separators=(",", ":"))
        metadata = {"format": _FORMAT, "content": text, "hash": content_hash(text, stored)}
        write_atomically(self.folder / name, [safetensors.torch.save(stored, metadata)])
        with suppress(OSError):  # a file that somebody has open; it is tried again at the next one
            self._prune(self.folder / name)

    def _read(self, name: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors, metadata = read_safetensors(self.folder / name)
        if metadata.get("format") != _FORMAT:
            raise ValueError(f"{name} is damaged: its format is '{metadata.get('format')}', not '{_FORMAT}'.")
        if metadata.get("hash") != content_hash(metadata.get("content", ""), tensors):
            raise ValueError(f"{name} is damaged: its content does not match its hash.")
        return tensors, json.loads(metadata["content"])

    def _prune(self, newest: Path) -> None:
        """Delete the oldest trainings; where this one alone takes too many bytes, its first steps."""
        others = [folder for folder in self._root.iterdir() if folder.is_dir() and folder != self.folder]
        others.sort(key=lambda folder: folder.stat().st_mtime)
        while others and (len(others) >= self._trainings or self._bytes() > self._max_bytes):
            shutil.rmtree(others.pop(0), ignore_errors=True)
        for path in sorted(self._files(self.folder)):
            if self._bytes() <= self._max_bytes:
                return
            if _STEP.fullmatch(path.name) and path != newest:
                path.unlink()

    def _bytes(self) -> int:
        return sum(path.stat().st_size for folder in self._root.iterdir() for path in self._files(folder))

    @staticmethod
    def _files(folder: Path) -> Iterator[Path]:
        return (path for path in folder.iterdir() if path.is_file()) if folder.is_dir() else iter(())
