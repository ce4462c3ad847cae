"""Checkpoints: the whole state of a training on disk, from which it resumes as if nothing had happened.

Each is one safetensors file: the tensors, and everything else as JSON in its metadata. A file is complete or not there.
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor

from ..config import CheckpointConfig
from ..storage import put_tensors, read_safetensors, take_tensors, write_atomically
from .fingerprint import Fingerprint, differences

log = logging.getLogger("aclora")

STAGES = ("first", "refit")  # the passes of a training, in their order
CHANGEABLE = ("steps", "stop_early", "refit", "smallest")  # settings that may change where a training gets more steps
_FORMAT = "aclora checkpoint 2"
_NAME = re.compile(rf"({'|'.join(STAGES)})_(\d+)\.safetensors")


class CheckpointStore:
    """The checkpoints of one training. now: what this training depends on."""

    def __init__(self, settings: CheckpointConfig, now: Fingerprint) -> None:
        self.settings, self.now = settings, now
        self._written: list[Path] = []  # by this run, or resumed from

    def find(self) -> dict[str, Any] | None:
        """Return the state to resume from; None where there is none, or where resuming is off.

        Raises:
            ValueError: the checkpoint belongs to another training (the message names every difference), or none of
                those that are there can be read.
            OSError: the drive does not answer; checkpoints that may be there must not be taken for missing.
        """
        if self.settings.resume == "never":
            return None
        paths, readable = self._paths(), False
        for path in reversed(paths):
            state = _read(path)
            if state is None:
                continue
            readable = True
            before = Fingerprint(**state["fingerprint"])
            more = self._wants_more(before)
            if more and path.name.startswith("refit"):  # a refit cannot go on: its number of steps was found before it
                continue
            self._check(before, CHANGEABLE if more else ())
            self._written = paths[: paths.index(path) + 1]
            return dict(state["state"])
        if paths and not readable:
            raise ValueError(
                f"None of the {len(paths)} checkpoints of '{self.settings.folder.name}' can be read: they are damaged, "
                "or of another version of AC-LoRA. Give another checkpoint name, or set resume to 'never', which "
                "starts anew and replaces them."
            )
        return None

    def write(self, stage: str, step: int, state: Mapping[str, Any]) -> str:
        """Write a checkpoint and delete older ones. Return a sentence where that failed; no half file is left."""
        path = self.settings.folder / f"{stage}_{step:07}.safetensors"
        tensors: dict[str, Tensor] = {}
        content = {"fingerprint": self.now.state_dict(), "state": take_tensors(state, "", tensors)}
        metadata = {"format": _FORMAT, "content": json.dumps(content, separators=(",", ":"))}
        try:
            write_atomically(path, [safetensors.torch.save(tensors, metadata)])
        except OSError as error:
            log.warning("AC-LoRA: step %d: no checkpoint, as %s.", step, error.strerror or error)
            reason = os.strerror(error.errno) if error.errno else str(error)
            return f"At times there was no checkpoint: {reason}. Free some space; training goes on and tries again."
        if path not in self._written:
            self._written.append(path)
        with suppress(OSError):  # a file that somebody has open; it is tried again at the next one
            self._prune()
        return ""

    def has(self, stage: str, step: int) -> bool:
        """Return whether this run has a checkpoint of this step."""
        return any(path.name == f"{stage}_{step:07}.safetensors" for path in self._written)

    def _wants_more(self, before: Fingerprint) -> bool:
        planned, wanted = before.settings["steps"], self.now.settings["steps"]
        if self.settings.resume == "for more steps" and wanted < planned:
            raise ValueError(f"This training was planned for {planned} steps; set steps to more, not to {wanted}.")
        return self.settings.resume == "for more steps" and wanted > planned

    def _check(self, before: Fingerprint, free: tuple[str, ...]) -> None:
        found = differences(before, self.now, free)
        if found:
            raise ValueError(
                f"The checkpoint '{self.settings.folder.name}' is that of another training: {'; '.join(found)}. Set "
                "this back to go on with it, or give another checkpoint name, or set resume to 'never', which starts "
                "anew and replaces it. For a longer training choose 'for more steps'."
            )

    def _paths(self) -> list[Path]:
        """Return the checkpoints that are there, in the order of the training."""
        if not self.settings.folder.is_dir():
            return []
        named = [(match, path) for path in self.settings.folder.iterdir() if (match := _NAME.fullmatch(path.name))]
        return [path for _, path in sorted(named, key=lambda pair: (STAGES.index(pair[0][1]), int(pair[0][2])))]

    def _prune(self) -> None:
        """Delete all but the last of this run, those of another training, and what a crash left half written."""
        first = [path for path in self._written if path.name.startswith("first")]
        kept = {*self._written[-self.settings.keep :], *first[-1:]}  # more steps go on from the end of the first pass
        self._written = [path for path in self._written if path in kept]
        halves = [half for stage in STAGES for half in self.settings.folder.glob(f".{stage}_*.safetensors.*.partial")]
        for path in [*self._paths(), *halves]:
            if path not in kept:
                path.unlink(missing_ok=True)


def _read(path: Path) -> dict[str, Any] | None:
    """Return the content of a checkpoint; None, and a line in the log, where it is damaged.

    Raises:
        OSError: it cannot be read, which says nothing about what it holds.
    """
    try:
        tensors, metadata = read_safetensors(path)
        if metadata.get("format") != _FORMAT:
            raise ValueError(f"its format is '{metadata.get('format')}', not '{_FORMAT}'")
        return dict(put_tensors(json.loads(metadata["content"]), tensors))
    except OSError as error:
        raise OSError(
            error.errno,
            f"The checkpoint {path.name} cannot be read ({error.strerror or error}). Look whether its drive is there "
            "and try again, or set resume to 'never', which starts anew and replaces it",
        ) from error
    except (ValueError, KeyError) as error:
        log.warning("AC-LoRA: checkpoint %s is damaged (%s); the one before it is looked at.", path.name, error)
        return None
