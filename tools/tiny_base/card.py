"""Write the tiny base's model card and its grid of images."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from einops import rearrange
from PIL import Image
from safetensors import safe_open
from torch import Tensor

from tools.tiny_base import icons

CARD = """# Model card: the tiny base of AC-LoRA

A text-to-image model of {megabytes:.1f} MB that generates icons at 128 × 128. It ships with the pack so that the \
quickstart, the tests
and the measurements run anywhere without a download. \
It knows {concepts} concepts in four styles and nothing else.{derived}

![Eight concepts in the base styles, one style a row: {rows}](grid.png)

## How to use it

The node "Load AC-LoRA Tiny Base" (ACLoRATinyBase) outputs MODEL, CLIP and VAE. A prompt is a concept and a style, \
such as "a rocket, noto style".
The style words are {rows}. 128 × 128 pixels, 20 steps, Euler, guidance 4, and an empty negative prompt work well.

## Parts

| part | kind | parameters | file |
| --- | --- | --- | --- |
{parts}

All parts are ComfyUI's own modules, stored in float16: an SD3-type MMDiT \
(rectified flow, patch 2, 16 latent channels), a CLIP-type
text encoder with its own vocabulary (tokenizer/), and an autoencoder of TAESD's architecture.

## Training data

{images} images, drawn from SVG on white. Nothing else: no photographs, no people's art.

| style word | set | version | licence | by |
| --- | --- | --- | --- | --- |
{sources}

Eight more sets are held out, so that they can be trained as new styles: {held_out}.

## Evaluation

A classifier trained on the real images, applied to {prompts} images generated for base concepts \
(`python -m tools.tiny_base` makes
and measures all of this; verdict.json holds the numbers):

| images | concept first | concept in the first five | style |
| --- | --- | --- | --- |
| generated | {generated} |
| real | {real} |

The autoencoder reconstructs base images at {psnr:.1f} dB PSNR. On held-out styles, in dB: {held_out_psnr}.

Training: {autoencoder_steps} steps of the autoencoder, {denoiser_steps} steps of {batch} \
of the denoiser and text encoder, seed {seed}{before}.

## Licence

The weights are under the pack's licence, Apache-2.0. The training images keep theirs; \
see the table above and the
file NOTICE.
"""


def save_grid(images: Tensor, columns: int, path: Path) -> None:
    """Save images (n, 3, h, w) in 0..1 as a grid, row by row."""
    grid = rearrange(images, "(r c) k h w -> (r h) (c w) k", c=columns)
    Image.fromarray((grid.float().cpu().numpy() * 255).round().astype(np.uint8)).save(path, optimize=True)


def _parameters(path: Path) -> int:
    with safe_open(path, "pt") as file:
        return sum(int(np.prod(file.get_slice(key).get_shape())) for key in file.keys())


def _shares(verdict: dict[str, float]) -> str:
    return " | ".join(f"{verdict[key]:.0%}" for key in ("concept_first", "concept_in_five", "style"))


def _derived(words: list[str]) -> str:
    """Return the sentence about the derived styles, or nothing where there are none."""
    if not words:
        return ""
    example = f'"a rocket, noto {words[0]} style"'
    return f"\nEach of them it also draws in {len(words)} derived styles, as in {example}: {', '.join(words)}."


def _before(arguments: dict | None) -> str:
    """Return the clause about the base that the training went on from."""
    return f", after {arguments['denoiser_steps']} on the four styles alone" if arguments else ""


def write(out: Path, report: dict) -> None:
    """Write out/MODEL_CARD.md from the report and the model files in out."""
    names = {"denoiser": "MMDiT, depth 5, width 320", "text_encoder": "CLIP text model", "autoencoder": "TAESD shape"}
    files = {name: out / f"{name}.safetensors" for name in names}
    parts = [
        f"| {n.replace('_', ' ')} | {kind} | {_parameters(files[n]) / 1e6:.1f} M | {files[n].name} |"
        for n, kind in names.items()
    ]
    sources = [
        f"| {s.word} | {s.package} | {s.version} | {s.licence} | {s.author}, {s.url} |"
        for s in icons.BASE_STYLES.values()
    ]
    card = CARD.format(
        megabytes=sum(path.stat().st_size for path in files.values()) / 1e6,
        concepts=report["concepts"],
        images=report["pictures"],
        derived=_derived(report.get("derived", [])),
        rows=", ".join(sorted(s.word for s in icons.BASE_STYLES.values())),
        parts="\n".join(parts),
        sources="\n".join(sources),
        held_out=", ".join(icons.HELD_OUT_STYLES),
        prompts=report["prompts"],
        generated=_shares(report["generated"]),
        real=_shares(report["real"]),
        psnr=report["autoencoder_psnr"],
        held_out_psnr=", ".join(f"{key} {value}" for key, value in report["held_out_psnr"].items()) or "not measured",
        **report["arguments"] | {"before": _before(report["arguments"].get("before"))},
    )
    (out / "MODEL_CARD.md").write_text(card, encoding="utf-8")
