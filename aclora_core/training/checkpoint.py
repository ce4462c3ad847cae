"""Checkpoints: the whole state of a training on disk, from which it resumes as if nothing had happened.

Each is one safetensors file: the tensors, and everything else as JSON in its metadata, with a hash over both. A file is
complete or not there. One that is damaged is passed over, and the one before it is taken.
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from ..config import CheckpointConfig, TrainConfig
from ..storage import (
    clear_partial_files,
    content_hash,
    put_tensors,
    read_safetensors,
    reserved,
    take_tensors,
    write_advice,
    write_atomically,
)
from ..text import count_noun, error_reason
from .fingerprint import Fingerprint, differences, with_noise_levels

log = logging.getLogger("aclora")

STAGES = ("first", "refit")  # the passes of a training, in their order
CHANGEABLE = ("steps", "stop_early", "refit", "smallest")  # settings that may change where a training gets more steps
_FORMAT = "aclora checkpoint 3"
_UNHASHED = "aclora checkpoint 2"  # as 0.3.0 wrote them
_NAME = re.compile(rf"({'|'.join(STAGES)})_(\d+)\.safetensors")


class DamagedCheckpointError(Exception):
    """The state of a checkpoint cannot be restored."""


@contextmanager
def restoring() -> Iterator[None]:
    """Turn whatever a state of the wrong shape leads to into a DamagedCheckpointError.

    No hash covers the checkpoints of 0.3.0, so that their damage may only show when their parts are put into place.
    """
    try:
        yield
    except (MemoryError, torch.OutOfMemoryError):  # the file is not to blame
        raise
    except Exception as error:
        raise DamagedCheckpointError(error_reason(error)) from error


class CheckpointStore:
    """The checkpoints of one training.

    Args:
        settings: where they are, and whether to resume.
        now: what this training depends on.

    Attributes:
        notes: sentences for the user on checkpoints that were passed over.
    """

    def __init__(self, settings: CheckpointConfig, now: Fingerprint) -> None:
        self.settings, self.now, self._own = settings, now, now
        self.notes: list[str] = []
        self._written: list[Path] = []  # by this run, or resumed from
        self._damaged: set[Path] = set()

    @contextmanager
    def reserved(self) -> Iterator[None]:
        """Keep other servers out of the folder while the context lasts.

        Raises:
            ValueError: a training on another server uses it.
        """
        with reserved(self.settings.folder) as ours:
            if not ours:
                raise ValueError(
                    "Another training, on another ComfyUI server, is writing its checkpoints to "
                    f"'{self.settings.folder.name}' right now. Choose another checkpoint name for this one, or wait "
                    "until the other has finished."
                )
            yield

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
            content = self._read(path)
            if content is None:
                continue
            readable = True
            before, state = content
            more = self._wants_more(before)
            if more and path.name.startswith("refit"):  # a refit cannot go on: its number of steps was found before it
                continue
            self._check(before, CHANGEABLE if more else ())
            self.now = with_noise_levels(self._own, before)
            self._written = paths[: paths.index(path) + 1]
            return state
        if paths and not readable:
            raise ValueError(
                f"None of the {count_noun(len(paths), 'checkpoint')} of '{self.settings.folder.name}' can be read: "
                "they are damaged, or of another version of AC-LoRA. Choose another checkpoint name, or set resume to "
                "'never' to start over and replace them."
            )
        return None

    def config(self, config: TrainConfig) -> TrainConfig:
        """Return the settings of a training that goes on from what `find` returned.

        Noise levels are drawn as they were at its start, also where a later version would draw others.
        """
        if self.now == self._own:
            return config
        sampling, odds = self.now.noise_levels
        return replace(config, timesteps=sampling, timestep_shift=odds)

    def pass_over_latest(self, reason: str) -> None:
        """Leave out the checkpoint that `find` has returned, so that it returns the one before it."""
        self._pass_over(self._written.pop(), reason)

    def write(self, stage: str, step: int, state: Mapping[str, Any]) -> str:
        """Write a checkpoint and delete older ones. Return a sentence where that failed; no half file is left."""
        path = self.settings.folder / f"{stage}_{step:07}.safetensors"
        tensors: dict[str, Tensor] = {}
        content = {"fingerprint": self.now.state_dict(), "state": take_tensors(state, "", tensors)}
        text = json.dumps(content, separators=(",", ":"))
        metadata = {"format": _FORMAT, "content": text, "hash": content_hash(text, tensors)}
        try:
            write_atomically(path, [safetensors.torch.save(tensors, metadata)])
        except OSError as error:
            log.warning("AC-LoRA: step %d: no checkpoint, as %s.", step, error.strerror or error)
            reason = os.strerror(error.errno) if error.errno else str(error)
            advice = write_advice(error)
            return f"Some checkpoints could not be saved: {reason}. {advice}; training goes on and tries again."
        if path not in self._written:
            self._written.append(path)
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
                f"The checkpoint '{self.settings.folder.name}' belongs to another training: {'; '.join(found)}. Set "
                "this back to continue it, choose another checkpoint name, or set resume to 'never' to start over and "
                "replace it. For a longer training, choose 'for more steps'."
            )

    def _paths(self) -> list[Path]:
        """Return the checkpoints that are there, in the order of the training."""
        return _checkpoints(self.settings.folder)

    def _read(self, path: Path) -> tuple[Fingerprint, dict[str, Any]] | None:
        """Return what a checkpoint depends on and its state; None where it is damaged, which is noted.

        Raises:
            OSError: it cannot be read, which says nothing about what it holds.
        """
        if path in self._damaged:
            return None
        try:
            return _content(path)
        except (FileNotFoundError, IsADirectoryError):
            self._pass_over(path, "it is no file")
        except OSError as error:
            raise OSError(
                error.errno,
                f"The checkpoint {path.name} cannot be read ({error.strerror or error}). Check that its drive is "
                "connected and try again, or set resume to 'never' to start over and replace it",
            ) from error
        except MemoryError:
            raise
        except Exception as error:  # a damaged file may hold anything
            self._pass_over(path, error_reason(error))
        return None

    def _pass_over(self, path: Path, reason: str) -> None:
        log.warning("AC-LoRA: checkpoint %s is damaged (%s); the one before it is looked at.", path.name, reason)
        self._damaged.add(path)
        self.notes.append(f"The checkpoint {path.name} was damaged, so training went on from the one before it.")

    def _prune(self) -> None:
        """Delete all but the last of this run, those of another training, and what a crash left half written."""
        first = [path for path in self._written if path.name.startswith("first")]
        kept = {*self._written[-self.settings.keep :], *first[-1:]}  # more steps go on from the end of the first pass
        self._written = [path for path in self._written if path in kept]
        for path in self._paths():
            if path not in kept:
                with suppress(OSError):  # a folder, or a file that somebody has open: it is tried again
                    path.unlink(missing_ok=True)
        for stage in STAGES:
            clear_partial_files(self.settings.folder, f"{stage}_*")


def last_checkpoint(folder: Path) -> int | None:
    """Return the step of its pass at which the last checkpoint in a folder was written; None where there is none."""
    paths = _checkpoints(folder)
    return int(paths[-1].stem.rpartition("_")[2]) if paths else None


def _checkpoints(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    named = [(match, path) for path in folder.iterdir() if (match := _NAME.fullmatch(path.name))]
    return [path for _, path in sorted(named, key=lambda pair: (STAGES.index(pair[0][1]), int(pair[0][2])))]


def _content(path: Path) -> tuple[Fingerprint, dict[str, Any]]:
    """Return what a checkpoint depends on and its state.

    Raises:
        OSError: it cannot be read.
        Exception: it is damaged; no other error tells more than that.
    """
    tensors, metadata = read_safetensors(path)
    kind, text = metadata.get("format"), metadata["content"]
    if kind not in (_FORMAT, _UNHASHED):
        raise ValueError(f"its format is '{kind}', not '{_FORMAT}'")
    if (kind == _FORMAT or "hash" in metadata) and metadata["hash"] != content_hash(text, tensors):
        raise ValueError("its content does not match its hash")
    content = put_tensors(json.loads(text), tensors)
    return Fingerprint(**content["fingerprint"]).checked(), dict(content["state"])
