"""Time ComfyUI's own training node with little free GPU memory, with the dynamic loader as its server starts it.

    python -m bench.memory.native --case sdxl --free 8 6 --host path/to/ComfyUI --out rows.json

A process of its own, as the dynamic loader must be started before PyTorch. bench.memory runs it.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

# Gradient checkpointing is on by default.
MODES: dict[str, dict[str, Any]] = {
    "native, offloading": {"offloading": True},
    "native, offloading, bypass mode": {"offloading": True, "bypass_mode": True},
    "native, defaults": {},
}
_WARM_UP = 2  # steps; the node compiles nothing


def start_dynamic_loader(host: Path) -> bool:
    """Start ComfyUI's dynamic loader as its main.py does, and return whether it works."""
    sys.path.insert(0, str(host.resolve()))
    import comfy_aimdo.control as control

    control.init()
    import comfy.memory_management
    import comfy.model_management
    import comfy.model_patcher

    devices = [(device.index or 0, 0) for device in comfy.model_management.get_all_torch_devices()]
    if not control.init_devices(devices):
        return False
    comfy.model_patcher.CoreModelPatcher = comfy.model_patcher.ModelPatcherDynamic
    comfy.memory_management.aimdo_enabled = True
    return True


def model_in_main_memory(case: Any, dynamic: bool) -> Any:
    """Return the MODEL of a case in main memory; it is the one that the node's reloading finds as well."""
    import comfy.model_patcher
    import torch

    from bench.step_time.models import build_model

    base = build_model(case, disable_dynamic=True).model
    base.to("cpu")
    base.device = torch.device("cpu")

    def reload(disable_dynamic: bool = False) -> Any:
        kind = comfy.model_patcher.CoreModelPatcher if dynamic else comfy.model_patcher.ModelPatcher
        kind = comfy.model_patcher.ModelPatcher if disable_dynamic else kind
        patcher = kind(base, comfy.model_management.get_torch_device(), torch.device("cpu"))
        patcher.cached_patcher_init = (reload, ())
        return patcher

    return reload()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.memory.native", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--host", type=Path, default=Path(".runtime/ComfyUI"))
    parser.add_argument("--case", required=True)
    parser.add_argument("--free", type=float, nargs="+", required=True, help="GiB")
    parser.add_argument("--steps", type=int, default=5, help="timed steps")
    parser.add_argument("--max-seconds", type=float, default=30.0, help="of one row, if it has three steps by then")
    parser.add_argument("--modes", nargs="+", choices=list(MODES), default=list(MODES)[:1])
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    dynamic = start_dynamic_loader(args.host)

    import torch

    from bench.memory.ballast import left_free
    from bench.memory.cases import case_of
    from bench.step_time.clock import Clock, Measured, measure
    from bench.step_time.native_node import training

    case = case_of(args.case)
    with torch.inference_mode():
        model = model_in_main_memory(case, dynamic)
    rows = []
    for gib in args.free:
        for mode in args.modes:
            row = Measured(case.name, 1, "native", f"{mode}, {gib:g} GiB free")
            row.said.append("dynamic loader" if dynamic else "without the dynamic loader")
            clock = Clock(torch.device("cuda"), warm_up=_WARM_UP, steps=args.steps, max_seconds=args.max_seconds)
            began = time.perf_counter()
            with left_free(gib):
                measure(row, clock, training(case, 1, MODES[mode], model))
            print(f"{time.perf_counter() - began:6.1f} s {case.name}, {row.variant}: {row.failure or row.median}")
            rows.append(asdict(row))
            args.out.write_text(json.dumps(rows), encoding="utf-8")


if __name__ == "__main__":
    main()
