"""Load ComfyUI's modules and the pack in this process, for tests, measurements and tools.

Unlike the rest of this package it needs ComfyUI's Python, with torch.
"""

from __future__ import annotations

import asyncio
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

from launcher.environment import ROOT

PACK_NAME = "aclora_pack"


def open_host(folder: Path, cpu: bool | None = None, base_directory: Path | None = None) -> None:
    """Make ComfyUI's modules importable.

    Args:
        folder: holds ComfyUI's main.py.
        cpu: whether ComfyUI computes on the CPU; None uses a GPU if there is one.
        base_directory: holds models, input and output, instead of ComfyUI's own folder.
    """
    import torch

    # First in the path, since the pack too has a module `nodes`.
    sys.path.insert(0, str(folder.resolve()))
    import comfy.cli_args

    # Before another module of ComfyUI reads these.
    comfy.cli_args.args.cpu = not torch.cuda.is_available() if cpu is None else cpu
    if base_directory is not None:
        comfy.cli_args.args.base_directory = str(base_directory)


def load_pack(folder: Path = ROOT) -> ModuleType:
    """Load the pack as ComfyUI does and return it; its modules are pack.nodes.tiny_base and so on.

    Call open_host first. folder: another checkout of the pack, where that is meant.
    """
    spec = importlib.util.spec_from_file_location(
        PACK_NAME, folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    assert spec is not None and spec.loader is not None
    pack = importlib.util.module_from_spec(spec)
    sys.modules[PACK_NAME] = pack
    spec.loader.exec_module(pack)
    asyncio.run(pack.comfy_entrypoint())
    return pack
