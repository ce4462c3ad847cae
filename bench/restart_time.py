"""Measure the time of one restart of a whole SDXL adapter, in every mode, for both kinds of threshold.

    python -m bench.restart_time --host path/to/ComfyUI [--layers 100] [--ranks 16]

The layers are those of ComfyUI's SDXL, linear and convolutional, with random weights and a decaying spectrum.
Runs on the GPU if there is one. Writes bench/results/restart_time_DEVICE.json.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import statistics
import time
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

from aclora_core.lora.targets import preset_layers
from aclora_core.method import Mode, SignalThreshold, restart_adapter
from launcher.environment import ROOT
from launcher.inprocess import open_host

RANKS = 16, 64  # the default, and a generous one
THRESHOLDS: tuple[SignalThreshold, ...] = "noise floor", 0.7  # the default, and a share of the energy
# The settings by which ComfyUI knows SDXL's UNet.
SDXL: dict[str, Any] = {
    "image_size": 32,
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 320,
    "num_res_blocks": [2, 2, 2],
    "channel_mult": [1, 2, 4],
    "transformer_depth": [0, 0, 2, 2, 10, 10],
    "transformer_depth_middle": 10,
    "transformer_depth_output": [0, 0, 0, 2, 2, 2, 10, 10, 10],
    "context_dim": 2048,
    "adm_in_channels": 2816,
    "num_classes": "sequential",
    "use_linear_in_transformer": True,
    "use_spatial_transformer": True,
    "num_head_channels": 64,
    "num_heads": -1,
    "legacy": False,
}


def sizes() -> list[tuple[int, int]]:
    """Return (out, in · kh · kw) of every SDXL layer that can be adapted."""
    import comfy.ops
    from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel

    network = UNetModel(**SDXL, device="meta", dtype=torch.float32, operations=comfy.ops.disable_weight_init)
    weights = [module.weight for module in preset_layers(network, "all").values()]
    return [(weight.shape[0], math.prod(weight.shape[1:])) for weight in weights]  # type: ignore[union-attr]


def adapter(shapes: list[tuple[int, int]], most: int, device: str) -> dict[str, tuple[Tensor, Tensor, float]]:
    """Make random factors with a decaying spectrum, as a trained adapter has."""
    generator = torch.Generator(device).manual_seed(0)
    layers = {}
    for number, (outputs, inputs) in enumerate(shapes):
        rank = min(most, outputs, inputs)
        falling = 0.9 ** torch.arange(rank, device=device)
        down = torch.randn(rank, inputs, device=device, generator=generator)
        up = torch.randn(outputs, rank, device=device, generator=generator) * falling
        layers[str(number)] = (down, up, 1.0)
    return layers


def timed(
    layers: dict[str, tuple[Tensor, Tensor, float]], threshold: SignalThreshold, mode: Any, device: str, repeats: int
) -> list[float]:
    """Return the seconds of each restart, on a GPU after one warm-up."""
    generator = torch.Generator(device).manual_seed(1)
    seconds = []
    for _ in range(repeats + (device == "cuda")):
        began = time.perf_counter()
        restart_adapter(layers, threshold, generator, mode)
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    return seconds[-repeats:]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.restart_time", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--host", type=Path, default=Path(".runtime/ComfyUI"))
    parser.add_argument("--layers", type=int, help="use only this many layers, evenly spaced")
    parser.add_argument("--ranks", type=int, nargs="+", default=RANKS)
    parser.add_argument("--repeats", type=int, help="restarts per setting (default: 5 on a GPU, 1 on a CPU)")
    args = parser.parse_args()
    open_host(args.host)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    repeats = args.repeats or (5 if device == "cuda" else 1)
    shapes = sizes()
    if args.layers:
        shapes = shapes[:: max(1, len(shapes) // args.layers)][: args.layers]
    name = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"\nOne restart of {len(shapes)} layers on {name}, median of {repeats}")
    timed(adapter(shapes[::20], 4, device), "noise floor", "paper", device, 1)  # warm-up: loads the libraries
    rows = []
    for rank, threshold, mode in itertools.product(args.ranks, THRESHOLDS, get_args(Mode)):
        seconds = timed(adapter(shapes, rank, device), threshold, mode, device, repeats)
        share = threshold if threshold == "noise floor" else f"share {threshold}"
        rows.append({"rank": rank, "threshold": share, "mode": mode, "seconds": seconds})
        print(f"rank {rank:<4}{share:14}{mode:16}{statistics.median(seconds):8.3f} s", flush=True)
    result = {"device": name, "torch": torch.__version__, "layers": len(shapes), "rows": rows}
    path = ROOT / "bench" / "results" / f"restart_time_{device}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
