"""Safetensors files: checked before anything is allocated, and written atomically."""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .partial_files import clear_partial_files, lock, partial_path

log = logging.getLogger("aclora")

HEADER_LIMIT = 1 << 20  # bytes; ComfyUI's model library shows no metadata of a file with a longer header
READ_LIMIT = 100_000_000  # bytes; the safetensors format allows no longer header
OPTIONAL_KEYS = ("modelspec.thumbnail", "aclora.trajectory")  # dropped in this order if the header gets too long
SAFETENSORS_SUFFIXES = (".safetensors", ".sft")


def read_safetensors(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read the tensors and the metadata of a safetensors file.

    The tensors are copied into memory, so the file may be replaced while they are in use.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file is empty, truncated, or not a safetensors file.
    """
    path = Path(path)
    _check_header(path)
    try:
        with safe_open(path, framework="pt") as file:
            # A mapped tensor would keep the file open, and Windows cannot replace an open file.
            tensors = {key: file.get_tensor(key).clone() for key in file.keys()}
            metadata = dict(file.metadata() or {})
    except SafetensorError as error:
        raise ValueError(f"{path.name} is damaged or truncated ({error}). Copy or download the file again.") from error
    return tensors, metadata


def _check_header(path: Path) -> None:
    if not path.is_file():
        raise FileNotFoundError(f"{path.name} was not found. Choose a file that exists.")
    size = path.stat().st_size
    if size == 0:
        raise ValueError(f"{path.name} is an empty file (0 bytes). Copy or download the file again.")
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        first = file.read(1)
    if size < 9 or length > min(size - 8, READ_LIMIT) or first != b"{":
        raise ValueError(
            f"{path.name} is not a safetensors file, or is truncated: its header should take {length:,} bytes and the"
            f" whole file has {size:,}. Choose a LoRA saved as .safetensors, or download the file again."
        )


def write_safetensors(path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file atomically; missing folders are created, and what died writers left is cleared.

    Adds `sshs_model_hash` and `modelspec.hash_sha256` to the metadata: the SHA-256 of all bytes after the header, by
    which other programs recognise a LoRA. If the header exceeds 1 MiB, OPTIONAL_KEYS are dropped first.

    Raises:
        ValueError: a metadata value is so long that the header still exceeds 1 MiB.
        TypeError: a metadata key or value is not a string.
        OSError: the file cannot be written; an existing file is unchanged.
    """
    path = Path(path)
    for key, value in metadata.items():
        if not isinstance(key, str) or not isinstance(value, str):
            raise TypeError(f"Metadata must be text, but {key!r} is {type(value).__name__}. Convert it with str().")
    blob = safetensors.torch.save({key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()})
    length = int.from_bytes(blob[:8], "little")
    table = json.loads(blob[8 : 8 + length])
    data = memoryview(blob)[8 + length :]
    digest = hashlib.sha256(data).hexdigest()
    hashes = {"sshs_model_hash": digest, "modelspec.hash_sha256": f"0x{digest}"}
    header = _fitting_header(table, {"format": "pt", **metadata, **hashes})
    write_atomically(path, [len(header).to_bytes(8, "little"), header, data])
    clear_partial_files(path.parent)


def safetensors_size(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> int:
    """Return the bytes of the file that write_safetensors writes. The tensors may be on the meta device."""
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].itemsize, item[0]))  # as safetensors does
    table: dict[str, object] = {}
    end = 0
    for key, tensor in ordered:
        start, end = end, end + tensor.nbytes
        name = _TYPE_NAMES.get(tensor.dtype, "F8_E4M3")
        table[key] = {"dtype": name, "shape": list(tensor.shape), "data_offsets": [start, end]}
    hashes = {"sshs_model_hash": "0" * 64, "modelspec.hash_sha256": "0x" + "0" * 64}
    return 8 + len(_fitting_header(table, {"format": "pt", **metadata, **hashes})) + end


_TYPE_NAMES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.float64: "F64"}


def _fitting_header(table: dict[str, object], metadata: dict[str, str]) -> bytes:
    header = _header(table, metadata)
    for key in OPTIONAL_KEYS:
        if len(header) > HEADER_LIMIT and key in metadata:
            log.warning("AC-LoRA: the file's header would exceed 1 MiB, so '%s' is left out.", key)
            metadata = {other: value for other, value in metadata.items() if other != key}
            header = _header(table, metadata)
    # The names of thousands of layers fill a header by themselves; then the metadata is not to blame.
    if len(header) > HEADER_LIMIT >= len(_header(table, {})):
        longest = max(metadata, key=lambda key: len(metadata[key]))
        raise ValueError(
            f"The metadata makes the file's header {len(header):,} bytes long, and ComfyUI reads at most"
            f" {HEADER_LIMIT:,}. Shorten '{longest}' ({len(metadata[longest]):,} characters)."
        )
    return header


def _header(table: dict[str, object], metadata: dict[str, str]) -> bytes:
    text = json.dumps({"__metadata__": metadata, **table}, ensure_ascii=False, separators=(",", ":")).encode()
    return text + b" " * (-len(text) % 8)  # the tensors have to start at a multiple of 8 bytes


def write_atomically(path: Path, chunks: Sequence[bytes | memoryview]) -> None:
    """Write a file beside its target, then rename it over the target; missing folders are created.

    Raises:
        OSError: the file cannot be written; an existing file is unchanged, and no partial file is left.
    """
    partial = partial_path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(partial, "wb") as file:
                with suppress(OSError):  # a drive without locks
                    lock(file)  # so that nobody takes it for the rest of a dead process
                for chunk in chunks:
                    file.write(chunk)
                file.flush()
                os.fsync(file.fileno())  # without it a power cut can leave an empty file under the final name
            os.replace(partial, path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise OSError(
            error.errno,
            f"{path.name} could not be written: {error.strerror or error}. An existing file is unchanged."
            f" {write_advice(error)}",
        ) from error


_ADVICE = {
    errno.ENOSPC: "Free some space",
    errno.EDQUOT: "Free some space",
    errno.EFBIG: "Free some space, or choose a drive that holds larger files",
    errno.ENAMETOOLONG: "Choose a shorter name",
    errno.EILSEQ: "Choose a name of letters and digits",
    errno.EINVAL: "Choose a name of letters and digits",
    errno.EIO: "Look whether the drive is connected and sound",
    errno.EMFILE: "Close other programs, or start ComfyUI again",
    errno.ENFILE: "Close other programs, or start ComfyUI again",
}


def write_advice(error: OSError) -> str:
    """Return what to do about a file that cannot be written, as a sentence without its full stop."""
    return _ADVICE.get(error.errno or 0, "Look whether its folder may be written to, or choose another one")
