"""The hash by which programs recognise a LoRA file."""

from __future__ import annotations

import hashlib
from pathlib import Path


def data_sha256(path: str | Path) -> str:
    """Return the SHA-256 of all bytes after the header of a safetensors file, in hexadecimal digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        file.seek(8 + int.from_bytes(file.read(8), "little"))
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
