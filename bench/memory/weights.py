"""Write the diffusion model of a case with random weights, as ComfyUI's Load Diffusion Model reads it.

python -m bench.memory.weights --host path/to/ComfyUI flux_fp8 FOLDER/flux.safetensors
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file

from bench.memory.cases import case_of
from bench.step_time.models import Case, build_model
from launcher.environment import ROOT
from launcher.inprocess import open_host

TINY = ROOT / "assets" / "tiny_base" / "denoiser.safetensors"


def write(case: Case, path: Path) -> None:
    """Write the weights in the case's dtype; the tiny base has a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if not case.config:
        shutil.copy(TINY, path)
        return
    with torch.inference_mode():
        network = build_model(case, disable_dynamic=True).model.diffusion_model
        save_file({name: weight.cpu().contiguous() for name, weight in network.state_dict().items()}, path)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.memory.weights", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--host", type=Path, default=ROOT / ".runtime" / "ComfyUI")
    parser.add_argument("case")
    parser.add_argument("file", type=Path)
    args = parser.parse_args()
    open_host(args.host)
    write(case_of(args.case), args.file)
    print(f"written: {args.file}, {args.file.stat().st_size / 1e9:.1f} GB")


if __name__ == "__main__":
    main()
