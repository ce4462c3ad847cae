"""What processes beside ComfyUI's server need of it: GPUs, its arguments, and the nodes before a training."""

from __future__ import annotations

import gc
import pickle
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import comfy.cli_args
import comfy.model_management
import folder_paths
import torch
from comfy_api.latest import io

# Arguments of the server that its processes do without: its own port and files, other packs, and which GPUs it sees.
_OTHER = {
    "auto_launch": False,
    "cuda_device": None,
    "database_url": "sqlite:///:memory:",
    "default_device": None,
    "disable_all_custom_nodes": True,
    "disable_api_nodes": True,
    "enable_assets": False,
    "enable_manager": False,
    "quick_test_for_ci": False,
}


def gpu_count() -> int:
    """Return the number of GPUs that a training can use; 0 where ComfyUI computes on the CPU."""
    device = comfy.model_management.get_torch_device()
    if device.type == "cpu":
        return 0
    return torch.cuda.device_count() if device.type == "cuda" else 1


def free_gpu_memory() -> None:
    """Take all models off the GPU."""
    comfy.model_management.unload_all_models()
    gc.collect()
    comfy.model_management.soft_empty_cache()


def comfyui_folder() -> Path:
    """Return the folder of ComfyUI's main.py."""
    return Path(folder_paths.__file__).resolve().parent


def arguments_with(packs: Iterable[str]) -> bytes:
    """Return the arguments of this ComfyUI for one beside it, with these packs alone; pickled, by name."""
    names = sorted(packs)
    arguments = {**vars(comfy.cli_args.args), **_OTHER}
    if isinstance(arguments["verbose"], list):  # two processes cannot write to one file
        arguments["verbose"] = [(level, file) for level, file in arguments["verbose"] if file is None]
    arguments["whitelist_custom_nodes"] = [*names, *(f"{name}.py" for name in names)]
    return pickle.dumps(arguments)


def packs_of(kinds: Iterable[str]) -> set[str]:
    """Return the names of the packs that nodes come from, by their classes' names; ComfyUI's own need none."""
    modules = (getattr(_classes()[kind], "RELATIVE_PYTHON_MODULE", "nodes") for kind in kinds)
    return {module.partition(".")[2] for module in modules if module.startswith("custom_nodes.")}


def hidden_prompt(cls: type[io.ComfyNode]) -> Mapping[str, Any]:
    """Return the prompt of the running node, in API form; empty outside one."""
    return getattr(getattr(cls, "hidden", None), "prompt", None) or {}


def add_last_node(name: str, inputs: Mapping[str, str], work: Callable[..., None]) -> None:
    """Add a node to this ComfyUI that ends a prompt.

    Args:
        name: of its class.
        inputs: their types, by name; a prompt may leave all of them out.
        work: is given the inputs.
    """

    class LastNode:
        RETURN_TYPES = ()
        FUNCTION = "work"
        OUTPUT_NODE = True
        CATEGORY = ""

        @classmethod
        def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802
            return {"optional": {each: (kind,) for each, kind in inputs.items()}}

        def work(self, **given: Any) -> tuple[()]:
            work(**given)
            return ()

    _classes()[name] = LastNode


def interrupt() -> None:
    """Cancel what runs in this process, as the user's Cancel does."""
    comfy.model_management.interrupt_current_processing(True)


def _classes() -> dict[str, Any]:
    """Return the classes of ComfyUI's nodes, by name."""
    found: dict[str, Any] = sys.modules["nodes"].NODE_CLASS_MAPPINGS
    return found
