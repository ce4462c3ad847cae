"""Measure what the tiny base would lose in a smaller file.

    python -m tools.tiny_base.smaller --host path/to/ComfyUI        # some minutes on a CPU

For each format the weights are rounded to it and back to float16, and compared with the shipped ones: the size of the
weights in a zip file, the autoencoder's PSNR on the example images, and how far images drawn from the same noise are
from those of the shipped weights. A sheet with a row of drawn images per format is saved.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from launcher.inprocess import load_pack, open_host

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = ROOT / "assets" / "tiny_base"
EXAMPLES = ROOT / "workflows" / "example_pictures"
PARTS = ("denoiser", "text_encoder", "autoencoder")
FORMATS = {"float16": 16, "int8": 8, "int6": 6, "int4": 4}  # bits of a weight
CONCEPTS = ("rocket", "guitar", "house", "dog face", "bicycle", "cactus", "castle", "octopus")
STYLES = ("noto", "twemoji", "emojione", "fluent")


def rounded(weight: Tensor, bits: int) -> tuple[Tensor, bytes]:
    """Round a weight to integers with one scale per output; return it in float16, and the bytes that a file holds."""
    if bits == 16 or weight.ndim < 2:
        return weight, weight.numpy().tobytes()
    rows = weight.float().flatten(1)
    limit = 2 ** (bits - 1) - 1
    scale = (rows.abs().amax(1, keepdim=True) / limit).half().float().clamp(min=1e-8)
    whole = (rows / scale).round().clamp(-limit, limit)
    packed = np.packbits(_bits_of(whole, bits)).tobytes() + scale.half().numpy().tobytes()
    return (whole * scale).reshape(weight.shape).half(), packed


def _bits_of(whole: Tensor, bits: int) -> np.ndarray:
    """Return the lowest bits of whole numbers, one bit an element."""
    values = whole.to(torch.int64).numpy().reshape(-1, 1) & (2**bits - 1)
    return ((values >> np.arange(bits)) & 1).astype(np.uint8)


def write(bits: int, folder: Path) -> int:
    """Write the tiny base, rounded to some bits, and return how many bytes its weights need in a zip file."""
    shutil.copytree(SHIPPED, folder, dirs_exist_ok=True)
    size = 0
    for part in PARTS:
        weights = {name: rounded(weight, bits) for name, weight in load_file(SHIPPED / f"{part}.safetensors").items()}
        save_file({name: weight for name, (weight, _) in weights.items()}, folder / f"{part}.safetensors")
        size += len(zlib.compress(b"".join(packed for _, packed in weights.values()), 6))
    return size


def examples() -> Iterator[Tensor]:
    """Yield the example images, (1, height, width, 3) in 0 to 1."""
    for path in sorted(EXAMPLES.rglob("*.png")):
        with Image.open(path) as image:
            yield torch.from_numpy(np.asarray(image.convert("RGB").resize((128, 128)), dtype=np.float32))[None] / 255


def psnr(found: Tensor, wanted: Tensor) -> float:
    """Return the peak signal-to-noise ratio of images in 0 to 1, in dB."""
    return float(-10 * (found - wanted).square().mean().clamp(min=1e-12).log10())


def draw(pack: ModuleType, folder: Path) -> Tensor:
    """Draw every concept in one of the styles, (concepts, height, width, 3) in 0 to 1."""
    import nodes  # ComfyUI's

    host = pack.nodes.host
    model, clip = host.load_tiny_denoiser(folder), host.load_tiny_text_encoder(folder)
    vae = host.load_tiny_autoencoder(folder)
    negative, images = encode(clip, ""), []
    for number, concept in enumerate(CONCEPTS):
        positive = encode(clip, f"a {concept}, {STYLES[number % len(STYLES)]} style")
        empty = {"samples": torch.zeros(1, 16, 16, 16)}
        (drawn,) = nodes.common_ksampler(model, number, 20, 4.0, "euler", "simple", positive, negative, empty)
        images.append(vae.decode(drawn["samples"]))
    return torch.cat(images)


def encode(clip, words: str):
    """Return ComfyUI's conditioning of a text."""
    return clip.encode_from_tokens_scheduled(clip.tokenize(words))


def reconstructed(pack: ModuleType, folder: Path) -> float:
    """Return the autoencoder's PSNR on the example images, in dB, as their average."""
    vae = pack.nodes.host.load_tiny_autoencoder(folder)
    return float(np.mean([psnr(vae.decode(vae.encode(image)), image) for image in examples()]))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.tiny_base.smaller", description=__doc__.split("\n")[0])
    parser.add_argument("--host", type=Path, required=True, help="folder of ComfyUI")
    parser.add_argument("--sheet", type=Path, default=Path(".runtime/tiny_base_smaller.png"))
    args = parser.parse_args()
    open_host(args.host)
    pack, rows = load_pack(), []
    with torch.inference_mode():
        for name, bits in FORMATS.items():
            with tempfile.TemporaryDirectory() as folder:
                size = write(bits, Path(folder))
                images, quality = draw(pack, Path(folder)), reconstructed(pack, Path(folder))
            rows.append(images)
            distances = [psnr(image, wanted) for image, wanted in zip(images, rows[0], strict=True)]
            drawn = (
                "the reference" if len(rows) == 1 else f"{np.mean(distances):.1f} dB ({min(distances):.1f} at worst)"
            )
            print(f"{name:8} {size / 1e6:5.1f} MB   autoencoder {quality:.1f} dB   drawn images: {drawn}", flush=True)
    sheet = torch.cat([torch.cat(list(images), dim=1) for images in rows])
    Image.fromarray((sheet.numpy() * 255).round().astype(np.uint8)).save(args.sheet)
    print(args.sheet)


if __name__ == "__main__":
    main()
