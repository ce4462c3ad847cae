"""Encoded pictures and captions in files, by the hash of all that they depend on.

A value is made of tensors, numbers, texts, lists, tuples and dicts, as a host's conditioning is. Its tensors become
those of a safetensors file, its structure JSON in the file's metadata; nothing in a file is ever run.
"""

from __future__ import annotations

import json
import logging
import os
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from ..storage import UnhashableError, content_hash, write_atomically

log = logging.getLogger("aclora")

LIMIT = 2 << 30  # bytes


SUFFIX = ".safetensors"


_LEFTOVER_AGE = 3600.0  # seconds; a half-written file that old belongs to a program that has died


_SCALARS = (bool, int, float, str, type(None))


_DTYPES = frozenset(
    (
        torch.float64,
        torch.float32,
        torch.float16,
        torch.bfloat16,
        torch.int64,
        torch.int32,
        torch.int16,
        torch.int8,
        torch.uint8,
        torch.bool,
    )
)


class UnstorableError(TypeError):
    """A value that a file could not give back exactly."""


class EncodingCache:
    """A folder of encoded values; open one for each run.

    What was used longest ago is removed first. What this run has used stays: a data set larger than the limit would
    otherwise push out its own beginning, and find nothing the next time.
    """

    def __init__(self, folder: Path, limit: int = LIMIT) -> None:
        self.folder, self.limit = folder, limit
        self.problem = ""  # why no more is stored, as a sentence
        self._used: set[Path] = set()
        self._sizes: dict[Path, int] | None = None  # of all files, those used longest ago first; None: not yet looked

    def get(self, key: str) -> Any | None:
        """The value stored under this key, or None; a damaged file counts as none, so that it is written again."""
        path = self._path(key)
        try:
            blob = path.read_bytes()
            value = _unpacked(blob)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError):
            log.info("AC-LoRA: a damaged file of encoded pictures and captions is ignored and made anew.")
            return None
        self._used.add(path)
        with suppress(OSError):  # only the order of removal suffers
            os.utime(path)
        return value

    def put(self, key: str, value: Any) -> bool:
        """Stores a value, removing old ones for it; whether it did. A full disk is told once, in `problem`."""
        if self.problem:
            return False
        try:
            blob = _packed(value)
        except UnstorableError:
            return False
        path = self._path(key)
        if not self._make_room(path, len(blob)):
            self.problem = (
                f"The encoded pictures and captions take more than the {self.limit / 2**30:.3g} GB kept for them, so "
                "some are encoded anew each time."
            )
            return False
        try:
            write_atomically(path, [blob])
        except OSError as error:
            reason = os.strerror(error.errno) if error.errno else "the folder cannot be written to"
            self.problem = (
                f"The encoded pictures and captions cannot be kept for the next time ({reason}), which changes nothing "
                "else. Free some space, or turn cache off."
            )
            return False
        self._used.add(path)
        self._files()[path] = len(blob)
        return True

    def _path(self, key: str) -> Path:
        return self.folder / f"{key}{SUFFIX}"

    def _make_room(self, path: Path, wanted: int) -> bool:
        """Removes files used longest ago until so many bytes more fit."""
        files = self._files()
        total = sum(files.values()) - files.get(path, 0) + wanted
        removable = [old for old in files if old not in self._used and old != path]
        if total - sum(files[old] for old in removable) > self.limit:
            return False
        for old in removable:
            if total <= self.limit:
                break
            with suppress(OSError):  # in use by another program, or gone: it is looked at again in the next run
                old.unlink()
            total -= files.pop(old)
        return True

    def _files(self) -> dict[Path, int]:
        if self._sizes is None:
            found = []
            with suppress(OSError), os.scandir(self.folder) as items:
                for item in items:
                    with suppress(OSError):
                        found.append((item.stat().st_mtime_ns, item.stat().st_size, Path(item.path)))
            _remove_leftovers(found)
            self._sizes = {path: size for _, size, path in sorted(found) if path.suffix == SUFFIX}
        return self._sizes


def _remove_leftovers(found: list[tuple[int, int, Path]]) -> None:
    for changed, _, path in found:
        if path.suffix == ".partial" and changed / 1e9 < time.time() - _LEFTOVER_AGE:
            with suppress(OSError):
                path.unlink()


def _packed(value: Any) -> bytes:
    """A safetensors file with a checksum. Raises CannotStore."""
    try:
        checksum = content_hash(value)
    except UnhashableError as error:
        raise UnstorableError(str(error)) from error
    tensors: dict[str, Tensor] = {}
    structure = _structure(value, tensors)
    return safetensors.torch.save(tensors, {"structure": json.dumps(structure), "checksum": checksum})


def _unpacked(blob: bytes) -> Any:
    """The value of a file. Raises ValueError, KeyError, TypeError, RuntimeError or SafetensorError: it is damaged."""
    tensors = safetensors.torch.load(blob)
    length = int.from_bytes(blob[:8], "little")
    metadata = json.loads(blob[8 : 8 + length])["__metadata__"]
    value = _value(json.loads(metadata["structure"]), tensors)
    if content_hash(value) != metadata["checksum"]:
        raise ValueError("the checksum differs")
    return value


def _structure(value: Any, tensors: dict[str, Tensor]) -> Any:
    """The value as JSON: scalars as they are, everything else as {kind: content}; tensors are put into `tensors`."""
    if type(value) in _SCALARS:
        return value
    if type(value) is list or type(value) is tuple:
        return {type(value).__name__: [_structure(item, tensors) for item in value]}
    if type(value) is dict and all(type(key) is str for key in value):
        return {"dict": {key: _structure(item, tensors) for key, item in value.items()}}
    if type(value) is Tensor and value.dtype in _DTYPES:
        name = str(len(tensors))
        tensors[name] = value.detach().cpu().clone(memory_format=torch.contiguous_format)
        return {"tensor": [name, str(value.device)]}
    raise UnstorableError(f"a {type(value).__qualname__} cannot be stored exactly")


def _value(structure: Any, tensors: dict[str, Tensor]) -> Any:
    if not isinstance(structure, dict):
        return structure
    ((kind, content),) = structure.items()
    if kind == "tensor":
        name, device = content
        return tensors[name].to(device)
    if kind == "dict":
        return {key: _value(item, tensors) for key, item in content.items()}
    items = [_value(item, tensors) for item in content]
    return tuple(items) if kind == "tuple" else items
