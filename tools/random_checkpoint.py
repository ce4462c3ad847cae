"""Write a checkpoint with the true shapes of SD1.5 or SDXL and random weights, to run workflows without the real one.

    python -m tools.random_checkpoint --host path/to/ComfyUI sd15 FOLDER/v1-5-pruned-emaonly-fp16.safetensors

In float16, like most such files: 2.1 GB for sd15, 6.9 GB for sdxl, which needs three times as much main memory. The
model generates noise; shapes, sizes, dtypes and speed are those of the real files.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

from bench.step_time.models import CASES, randomise
from launcher.inprocess import open_host

VAE: dict[str, Any] = {
    "double_z": True,
    "z_channels": 4,
    "resolution": 256,
    "in_channels": 3,
    "out_ch": 3,
    "ch": 128,
    "ch_mult": [1, 2, 4, 4],
    "num_res_blocks": 2,
    "attn_resolutions": [],
    "dropout": 0.0,
}


def write(name: str, path: Path) -> None:
    """Write the checkpoint of a case of bench.step_time."""
    import comfy.model_patcher
    import comfy.sd
    import comfy.supported_models
    from comfy.ldm.models.autoencoder import AutoencoderKL

    cpu, half = torch.device("cpu"), torch.float16
    config = getattr(comfy.supported_models, CASES[name].config)(CASES[name].network)
    config.set_inference_dtype(half, None, device=cpu)
    with torch.inference_mode():
        base = config.get_model({}, "", device=cpu)
        autoencoder = AutoencoderKL(embed_dim=4, ddconfig=VAE)
        clip = comfy.sd.CLIP(config.clip_target(), embedding_directory=None)
        for part in (base.diffusion_model, autoencoder, clip.cond_stage_model):
            randomise(part.to("cuda" if torch.cuda.is_available() else cpu))
            part.to(cpu)
        vae = comfy.sd.VAE(sd=autoencoder.state_dict())
        model = comfy.model_patcher.ModelPatcher(base, load_device=cpu, offload_device=cpu)
        for part in (clip.cond_stage_model, vae.first_stage_model):
            part.half()
        path.parent.mkdir(parents=True, exist_ok=True)
        comfy.sd.save_checkpoint(str(path), model, clip, vae)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tools.random_checkpoint",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--host", type=Path, default=Path(".runtime/ComfyUI"))
    parser.add_argument("model", choices=["sd15", "sdxl"])
    parser.add_argument("file", type=Path)
    args = parser.parse_args()
    open_host(args.host)
    write(args.model, args.file.resolve())
    print(f"written: {args.file}, {args.file.stat().st_size / 1e9:.1f} GB")


if __name__ == "__main__":
    main()
