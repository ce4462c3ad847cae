"""Small icon packages in npm's format, for the tests of tools.tiny_base.icons."""

import io
import json
import tarfile
from pathlib import Path

from tools.tiny_base import icons

BLACK_SQUARE = '<path fill="currentColor" d="M0 0h8v16H0z"/>'  # the left half


def pack(cache: Path, style: str, names: list[str], aliases: dict | None = None, **extra: dict) -> None:
    """Write a package in npm's format; every icon is a square with a black left half."""
    data = {
        "width": 16,
        "height": 16,
        "icons": {name: {"body": BLACK_SQUARE, **extra.get(name, {})} for name in names},
        "aliases": aliases or {},
    }
    content = json.dumps(data).encode()
    with tarfile.open(cache / icons.ALL_STYLES[style].archive, "w:gz") as archive:
        member = tarfile.TarInfo("package/icons.json")
        member.size = len(content)
        archive.addfile(member, io.BytesIO(content))
