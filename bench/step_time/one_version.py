"""Time the training steps of one checkout of the pack, in this process.

    python -m bench.step_time.one_version --checkout FOLDER --case sd15 --out FILE

bench.step_time --against runs it. The models and the measuring come from this checkout, the pack from FOLDER.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import torch

from bench.step_time import aclora as ours
from bench.step_time.clock import Clock, Measured, measure
from bench.step_time.models import CASES, case_named
from launcher.environment import ROOT
from launcher.inprocess import load_pack, open_host


def parse_options(words: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.step_time.one_version", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--checkout", type=Path, default=ROOT, help="the folder of the pack")
    parser.add_argument("--host", type=Path, default=Path(".runtime/ComfyUI"), help="ComfyUI's folder")
    parser.add_argument("--case", choices=list(CASES), default="sd15")
    parser.add_argument("--batch", type=int, default=1, help="images in a step")
    parser.add_argument("--warm-up", type=int, default=10, help="steps before the timed ones")
    parser.add_argument("--steps", type=int, default=100, help="timed steps")
    parser.add_argument("--tiny", action="store_true", help="a miniature of the model, to try the script")
    parser.add_argument("--out", type=Path, required=True, help="the JSON file")
    return parser.parse_args(words)


def main() -> None:
    args = parse_options()
    open_host(args.host)
    pack = load_pack(args.checkout)
    import comfy.model_management

    device = comfy.model_management.get_torch_device()
    memory = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else 0
    case = case_named(args.case, args.tiny, memory)
    row = Measured(args.case, args.batch, "ours", str(args.checkout))
    clock = Clock(device, args.warm_up, args.steps)
    measure(row, clock, ours.training(pack, case, args.batch, {}))
    found = {"failure": row.failure, "milliseconds": row.milliseconds, "last_loss": clock.last_loss, "log": row.said}
    args.out.write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main()
