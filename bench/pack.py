"""The pack in a process of its own, with ComfyUI's modules at hand, for measurements without a server."""

from __future__ import annotations

import asyncio
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import torch

ROOT = Path(__file__).resolve().parents[1]


def load(host: Path) -> ModuleType:
    """The pack as ComfyUI loads it from its folder; its modules are pack.nodes.train and so on."""
    sys.path.insert(0, str(host.resolve()))
    import comfy.cli_args

    comfy.cli_args.args.cpu = not torch.cuda.is_available()
    spec = importlib.util.spec_from_file_location(
        "aclora_pack", ROOT / "__init__.py", submodule_search_locations=[str(ROOT)]
    )
    assert spec is not None and spec.loader is not None
    pack = importlib.util.module_from_spec(spec)
    sys.modules["aclora_pack"] = pack
    spec.loader.exec_module(pack)
    asyncio.run(pack.comfy_entrypoint())
    return pack
