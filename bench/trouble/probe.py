"""A node pack that reports what a running ComfyUI holds in memory; copied into custom_nodes for tests and benchmarks.

GET /held collects garbage, waits until the server has freed unused models (which it does in another thread) and returns
the memory. POST /unload_at_once unloads every model immediately, as some node packs do; ComfyUI's own route waits until
nothing runs. The node LoadWithoutWord returns a MODEL that cannot be reloaded, like some packs' loaders.
"""

from __future__ import annotations

import asyncio
import ctypes
import gc
import hashlib
import sys
import threading
from pathlib import Path
from typing import Any

import comfy.model_base
import comfy.model_management
import folder_paths
import psutil
import torch
from aiohttp import web
from server import PromptServer

_SETTLED = 2_000_000  # bytes; a smaller fall between two readings counts as settled
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class LoadWithoutWord:
    """Return the MODEL without its reload function, and show whether its weights are streamed."""

    RETURN_TYPES = ("MODEL",)
    FUNCTION = "load"
    CATEGORY = "probe"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"model": ("MODEL",)}}

    def load(self, model: Any) -> dict[str, Any]:
        found = model.clone()
        found.cached_patcher_init = None
        return {"ui": {"text": ("streamed" if found.is_dynamic() else "whole",)}, "result": (found,)}


# Without a literal key, so that programs that list the nodes of packs do not take it for one of this pack's.
NODE_CLASS_MAPPINGS = {node.__name__: node for node in (LoadWithoutWord,)}


@PromptServer.instance.routes.get("/held")
async def held(request: web.Request) -> web.Response:
    """Return the memory, threads and files, and the state of every diffusion model in memory."""
    process = psutil.Process()
    memory = await _settled_memory(process)
    objects = gc.get_objects()
    # type(), as reading __class__ of some lazy objects runs code.
    networks = [each for each in objects if issubclass(type(each), comfy.model_base.BaseModel)]
    temp = Path(folder_paths.get_temp_directory())
    return web.json_response(
        {
            "memory": memory,
            "gpu": torch.cuda.memory_allocated() if torch.cuda.is_available() else 0,
            "tensors": sum(issubclass(type(each), torch.Tensor) for each in objects),
            "threads": process.num_threads(),
            "python_threads": sorted(thread.name for thread in threading.enumerate()),
            "files": sorted(file.path for file in process.open_files()),
            "temporary": sorted(path.name for path in temp.rglob("*") if _is_stray(path)) if temp.is_dir() else [],
            "networks": [_state(network) for network in networks],
        }
    )


def _is_stray(path: Path) -> bool:
    """Whether a file in the temp folder is none of the candidates of the last trainings, which are kept on purpose."""
    return path.is_file() and "aclora_candidates" not in path.parts


@PromptServer.instance.routes.post("/unload_at_once")
async def unload_at_once(request: web.Request) -> web.Response:
    """Unload every model, even while a workflow runs."""
    comfy.model_management.unload_all_models()
    return web.json_response({"loaded": len(comfy.model_management.current_loaded_models)})


async def _settled_memory(process: psutil.Process) -> int:
    """Return the resident memory in bytes once it no longer falls."""
    memory = _memory(process)
    for _ in range(10):
        await asyncio.sleep(0.4)
        before, memory = memory, _memory(process)
        if before - memory < _SETTLED:
            break
    return memory


def _memory(process: psutil.Process) -> int:
    gc.collect()
    if sys.platform == "linux":
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # otherwise the C library keeps freed memory
    return int(process.memory_info().rss)


def _state(network: Any) -> dict[str, Any]:
    modules = list(network.modules())
    parameters = list(network.parameters())
    digest = hashlib.blake2b()
    for name, tensor in sorted(network.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return {
        "weights": digest.hexdigest(),
        "hooks": sum(len(getattr(module, kind)) for module in modules for kind in _HOOKS),
        "own_forwards": sum("forward" in vars(module) for module in modules),
        "with_gradient": sum(p.requires_grad or p.grad is not None for p in parameters),
        "training": sum(module.training for module in modules),
    }
