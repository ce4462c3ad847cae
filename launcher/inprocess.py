"""ComfyUI's modules, and the pack as ComfyUI loads it, in this process: for tests, measurements and tools.

Unlike the rest of this folder it needs ComfyUI's Python, with torch.
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
    """Makes ComfyUI's modules importable. cpu: whether it computes on the CPU; None asks for a GPU first.

    base_directory: where its models, input and output are, if not in its own folder.
    """
    import torch

    # First: a ComfyUI module must not be taken from the pack, which has a `nodes` too.
    sys.path.insert(0, str(folder.resolve()))
    import comfy.cli_args

    # Before any other module of ComfyUI's looks for a GPU or a folder.
    comfy.cli_args.args.cpu = not torch.cuda.is_available() if cpu is None else cpu
    if base_directory is not None:
        comfy.cli_args.args.base_directory = str(base_directory)


def load_pack(folder: Path = ROOT) -> ModuleType:
    """The pack, loaded as ComfyUI loads it; its modules are pack.nodes.tiny_base and so on. open_host comes first."""
    spec = importlib.util.spec_from_file_location(
        PACK_NAME, folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    assert spec is not None and spec.loader is not None
    pack = importlib.util.module_from_spec(spec)
    sys.modules[PACK_NAME] = pack
    spec.loader.exec_module(pack)
    asyncio.run(pack.comfy_entrypoint())
    return pack
