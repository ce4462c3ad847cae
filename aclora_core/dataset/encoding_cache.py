"""A cache of encoded images and captions on disk, keyed by a hash of everything they depend on.

A value consists of tensors, scalars, strings, lists, tuples and dicts, as a host's conditioning does. Its tensors are
stored in a safetensors file and its structure as JSON in the file's metadata, with a hash over key and value; no file
can run code.
"""

from __future__ import annotations

import json
import logging
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from ..storage import UnhashableError, clear_partial_files, content_hash, write_advice, write_atomically

log = logging.getLogger("aclora")

LIMIT = 2 << 30  # bytes
SUFFIX = ".safetensors"
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
    """A value that cannot be restored exactly from a file."""


class EncodingCache:
    """A folder of encoded values; open a new one for each run.

    The least recently used files are removed first, but never those that this run has used: a dataset larger than the
    limit would otherwise evict its own beginning, and find nothing the next time.

    Args:
        folder: created with the first value.
        limit: size of all files together, in bytes.
    """

    def __init__(self, folder: Path, limit: int = LIMIT) -> None:
        self.folder = folder
        self.limit = limit
        self.problem = ""  # why nothing more is stored, as a sentence
        self._used: set[Path] = set()
        self._sizes: dict[Path, int] | None = None  # of all files, least recently used first; None: not yet read

    def get(self, key: str) -> Any | None:
        """Return the value stored under a key, or None; a damaged file counts as missing, so it is written again.

        So does the file of another key that was given this one's name.
        """
        path = self._path(key)
        try:
            value = _unpack(key, path.read_bytes())
        except (FileNotFoundError, NotADirectoryError):
            return None
        except MemoryError:
            raise
        except Exception:  # a damaged file may hold anything
            log.info("AC-LoRA: a damaged file of encoded images and captions is ignored and written again.")
            return None
        self._used.add(path)
        with suppress(OSError):  # affects only the order of removal
            os.utime(path)
        return value

    def put(self, key: str, value: Any) -> bool:
        """Store a value, removing old ones to make room.

        Returns:
            Whether it was stored. Once the disk or the cache is full nothing more is stored, and `problem` says why.
        """
        if self.problem:
            return False
        try:
            blob = _pack(key, value)
        except UnstorableError:
            return False
        path = self._path(key)
        if not self._make_room(path, len(blob)):
            self.problem = (
                f"The encoded images and captions take more than the {self.limit / 2**30:.3g} GB reserved for them, so "
                "some are encoded again each time. Use fewer variants or resolutions to avoid that."
            )
            return False
        try:
            write_atomically(path, [blob])
        except OSError as error:
            reason = os.strerror(error.errno) if error.errno else "the folder cannot be written to"
            self.problem = (
                f"The encoded images and captions cannot be stored for next time ({reason}); training is not "
                f"affected. {write_advice(error)}, or turn cache off."
            )
            return False
        self._used.add(path)
        self._files()[path] = len(blob)
        return True

    def _path(self, key: str) -> Path:
        return self.folder / f"{key}{SUFFIX}"

    def _make_room(self, path: Path, wanted: int) -> bool:
        """Remove the least recently used files until `wanted` more bytes fit; False if they cannot."""
        files = self._files()
        total = sum(files.values()) - files.get(path, 0) + wanted
        removable = [old for old in files if old not in self._used and old != path]
        if total - sum(files[old] for old in removable) > self.limit:
            return False
        for old in removable:
            if total <= self.limit:
                break
            with suppress(OSError):  # in use by another program, or gone: the next run looks again
                old.unlink()
            total -= files.pop(old)
        return True

    def _files(self) -> dict[Path, int]:
        """Sizes of all files, least recently used first."""
        if self._sizes is None:
            clear_partial_files(self.folder)
            found = []
            with suppress(OSError), os.scandir(self.folder) as items:
                for item in items:
                    with suppress(OSError):
                        found.append((item.stat().st_mtime_ns, item.stat().st_size, Path(item.path)))
            self._sizes = {path: size for _, size, path in sorted(found) if path.suffix == SUFFIX}
        return self._sizes


def _pack(key: str, value: Any) -> bytes:
    """Encode a value as a safetensors file with a checksum over key and value. Raises UnstorableError."""
    try:
        checksum = content_hash(key, value)
    except UnhashableError as error:
        raise UnstorableError(str(error)) from error
    tensors: dict[str, Tensor] = {}
    structure = _encode_structure(value, tensors)
    return safetensors.torch.save(tensors, {"structure": json.dumps(structure), "checksum": checksum})


def _unpack(key: str, blob: bytes) -> Any:
    """Decode the file of a key. A damaged one raises ValueError, or whatever its content leads to."""
    tensors = safetensors.torch.load(blob)
    length = int.from_bytes(blob[:8], "little")
    metadata = json.loads(blob[8 : 8 + length])["__metadata__"]
    value = _decode_structure(json.loads(metadata["structure"]), tensors)
    if content_hash(key, value) != metadata["checksum"]:
        raise ValueError("the checksum differs")
    return value


def _encode_structure(value: Any, tensors: dict[str, Tensor]) -> Any:
    """Encode a value as JSON: scalars as they are, anything else as {type: content}; tensors go into `tensors`.

    Unlike storage.take_tensors it keeps lists and tuples apart, and refuses every type that it cannot restore exactly.
    """
    if type(value) in _SCALARS:
        return value
    if type(value) is list or type(value) is tuple:
        return {type(value).__name__: [_encode_structure(item, tensors) for item in value]}
    if type(value) is dict and all(type(key) is str for key in value):
        return {"dict": {key: _encode_structure(item, tensors) for key, item in value.items()}}
    if type(value) is Tensor and value.dtype in _DTYPES:
        name = str(len(tensors))
        tensors[name] = value.detach().cpu().clone(memory_format=torch.contiguous_format)
        return {"tensor": [name, str(value.device)]}
    raise UnstorableError(f"a {type(value).__qualname__} cannot be stored exactly")


def _decode_structure(structure: Any, tensors: dict[str, Tensor]) -> Any:
    """Decode what `_encode_structure` encoded."""
    if not isinstance(structure, dict):
        return structure
    ((kind, content),) = structure.items()
    if kind == "tensor":
        name, device = content
        return tensors[name].to(device)
    if kind == "dict":
        return {key: _decode_structure(item, tensors) for key, item in content.items()}
    items = [_decode_structure(item, tensors) for item in content]
    return tuple(items) if kind == "tuple" else items
