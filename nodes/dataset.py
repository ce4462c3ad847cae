"""The dataset node: a folder of pictures and captions becomes latents and conditionings."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from comfy_api.latest import io, ui

from ..aclora_core import images
from ..aclora_core.contact_sheet import contact_sheet
from . import host
from .folders import dataset_folders, first_example, resolve_folder

if TYPE_CHECKING:
    from comfy.sd import CLIP, VAE

BATCH = 4  # pictures encoded at once
SHOWN = 12  # pictures on the contact sheet

logger = logging.getLogger("aclora")


class ACLoRADataset(io.ComfyNode):
    """Folder, VAE and CLIP -> one latent and one conditioning for each picture."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        folders = dataset_folders()
        return io.Schema(
            node_id="ACLoRADataset",
            display_name="Load AC-LoRA Dataset",
            category="AC-LoRA",
            description="Reads a folder of pictures and their captions and prepares both for training.",
            search_aliases=["training images", "image folder", "captions", "load dataset", "make training dataset"],
            is_experimental=True,
            inputs=[
                io.Combo.Input(
                    "folder",
                    options=folders,
                    default=first_example(folders),
                    tooltip="The folder with the pictures: a subfolder of ComfyUI's input folder, of a folder "
                    "registered as datasets in extra_model_paths.yaml, or an example that came with AC-LoRA. 10 to 30 "
                    "pictures suit a style. Press R to see a folder that you just made.",
                ),
                io.Vae.Input("vae", tooltip="The VAE of the model you train; it turns pictures into latents."),
                io.Clip.Input("clip", tooltip="The CLIP of the model you train; it turns captions into conditionings."),
                io.Int.Input(
                    "resolution",
                    default=512,
                    min=64,
                    max=4096,
                    step=16,
                    tooltip="Side in pixels of a square picture; other shapes get the same area. Use the size the "
                    "model was made for: 512 suits SD1.5, 1024 SDXL and Flux, 128 the tiny base. Larger values show "
                    "more detail and make training slower.",
                ),
                io.String.Input(
                    "trigger_word",
                    default="",
                    tooltip="A word that will call the style. It is put in front of every caption that lacks it and "
                    "stands for a missing caption. Empty: captions stay as they are.",
                ),
            ],
            outputs=[
                io.Latent.Output(
                    display_name="latents",
                    is_output_list=True,
                    tooltip="One latent for each picture, as the VAE gives it. A picture in a subfolder named 10_name "
                    "comes 10 times.",
                ),
                io.Conditioning.Output(
                    display_name="conditioning",
                    is_output_list=True,
                    tooltip="The encoded caption of each picture, in the order of the latents.",
                ),
            ],
        )

    @classmethod
    def validate_inputs(cls, folder: str | None) -> bool | str:
        # Naming `folder` alone keeps the host's checks of the other inputs. A linked folder is not known yet.
        if folder is None:
            return True
        try:
            images.scan(resolve_folder(folder))
        except ValueError as error:
            return str(error)
        return True

    @classmethod
    def fingerprint_inputs(
        cls, folder: str | None, vae: None, clip: None, resolution: int | None, trigger_word: str | None
    ) -> str | float:
        return float("nan") if folder is None else images.fingerprint(resolve_folder(folder))  # NaN: always run

    @classmethod
    def execute(cls, folder: str, vae: VAE, clip: CLIP, resolution: int, trigger_word: str) -> io.NodeOutput:
        _require(vae, clip)
        scan = images.scan(resolve_folder(folder), trigger_word)
        captions = dict.fromkeys(picture.caption for picture in scan.pictures)
        bar = host.Bar(len(scan.pictures) + len(captions))
        with torch.no_grad():
            encoded = _encode_pictures(vae, scan, resolution, bar.advance)
            conditionings = _encode_captions(clip, list(captions), bar.advance)
        latents, conditioning = [], []
        for picture, latent in encoded.latents.items():
            latents += [{"samples": latent}] * picture.repeats
            conditioning += [conditionings[picture.caption]] * picture.repeats
        problems = [*scan.problems, *encoded.problems]
        if problems:
            logger.warning("AC-LoRA: %d of the dataset's pictures left out. %s", len(problems), " ".join(problems))
        notes = [_summary(encoded), *problems, *_remarks(encoded)]
        shown = [picture for picture in encoded.latents if picture in encoded.previews]
        sheet = contact_sheet([encoded.previews[picture] for picture in shown], [p.caption for p in shown], notes)
        return io.NodeOutput(
            latents,
            conditioning,
            ui={**ui.PreviewImage(sheet[None]).as_dict(), "text": ("\n".join(notes),)},
        )


@dataclass
class _Encoded:
    """What became of the pictures. Latents are in the order of the scan."""

    latents: dict[images.Picture, torch.Tensor] = field(default_factory=dict)  # (1, channels, ...) each
    buckets: dict[images.Picture, tuple[int, int]] = field(default_factory=dict)
    previews: dict[images.Picture, torch.Tensor] = field(default_factory=dict)  # (height, width, 3)
    problems: list[str] = field(default_factory=list)


def _require(vae: VAE | None, clip: CLIP | None) -> None:
    # A checkpoint without a VAE gives a VAE object that holds nothing.
    if vae is None or getattr(vae, "first_stage_model", True) is None:
        raise ValueError(
            "There is no VAE in the vae input: the loaded checkpoint has none. Connect a Load VAE node with the VAE "
            "that belongs to the model."
        )
    if clip is None:
        raise ValueError(
            "There is no CLIP in the clip input: the loaded checkpoint has no text encoder. Connect a Load CLIP node "
            "with the one that belongs to the model."
        )


def _encode_pictures(vae: VAE, scan: images.Scan, resolution: int, advance: Callable[[int], None]) -> _Encoded:
    """Encode picture by picture, those of one bucket in small batches; unreadable ones become problems."""
    encoded = _Encoded()
    step = images.bucket_step(resolution, vae.spacial_compression_encode())
    # A video VAE would take a batch for the frames of one clip.
    batch = BATCH if getattr(vae, "latent_dim", 2) == 2 else 1
    first = set(scan.pictures[:SHOWN])
    buckets = {p: images.bucket_for(p.width, p.height, resolution, step) for p in scan.pictures}
    latents: dict[images.Picture, torch.Tensor] = {}
    for chunk in _chunks(buckets, batch):
        host.raise_if_cancelled()
        loaded: dict[images.Picture, torch.Tensor] = {}
        for picture in chunk:
            try:
                loaded[picture] = images.load(picture, buckets[picture])
            except ValueError as error:
                encoded.problems.append(str(error))
        if loaded:
            samples = vae.encode(torch.stack(list(loaded.values())))
            # A clone, since a view would keep and save the whole batch.
            latents.update({picture: sample.clone() for picture, sample in zip(loaded, samples.split(1), strict=True)})
        encoded.previews.update({picture: pixels for picture, pixels in loaded.items() if picture in first})
        advance(len(chunk))
    if not latents:
        raise ValueError(f"None of the {len(scan.pictures)} pictures can be read. {encoded.problems[0]}")
    encoded.latents = {picture: latents[picture] for picture in scan.pictures if picture in latents}
    encoded.buckets = {picture: buckets[picture] for picture in encoded.latents}
    return encoded


def _chunks(buckets: dict[images.Picture, tuple[int, int]], size: int) -> list[list[images.Picture]]:
    """Pictures of one bucket, at most `size` at a time."""
    groups: dict[tuple[int, int], list[images.Picture]] = {}
    for picture, bucket in buckets.items():
        groups.setdefault(bucket, []).append(picture)
    return [group[start : start + size] for group in groups.values() for start in range(0, len(group), size)]


def _encode_captions(clip: CLIP, captions: list[str], advance: Callable[[int], None]) -> dict[str, list]:
    conditionings = {}
    for caption in captions:
        host.raise_if_cancelled()
        conditionings[caption] = clip.encode_from_tokens_scheduled(clip.tokenize(caption))
        advance(1)
    return conditionings


def _summary(encoded: _Encoded) -> str:
    counts: dict[tuple[int, int], int] = {}
    for bucket in encoded.buckets.values():
        counts[bucket] = counts.get(bucket, 0) + 1
    sizes = ", ".join(f"{number} at {width} × {height}" for (width, height), number in sorted(counts.items()))
    total = sum(picture.repeats for picture in encoded.latents)
    repeated = f", {total} with repeats" if total != len(encoded.latents) else ""
    return f"{_count(len(encoded.latents), 'picture')}{repeated}: {sizes}."


def _remarks(encoded: _Encoded) -> list[str]:
    """What the user may want to mend, though training can go on."""
    enlarged = [p.name for p, bucket in encoded.buckets.items() if images.enlargement(p, bucket) > 1]
    cropped = [p.name for p, bucket in encoded.buckets.items() if images.cropped_share(p, bucket) > 1 / 3]
    silent = [p.name for p in encoded.buckets if not p.caption]
    remarks = [
        (enlarged, "smaller than the resolution and drawn larger, which may look soft"),
        (cropped, "so long that more than a third was cut off"),
        (silent, "without a caption; write one or set a trigger word"),
    ]
    return [f"{_count(len(names), 'picture')} {text}: {_some(names)}." for names, text in remarks if names]


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
