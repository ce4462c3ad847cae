"""The dataset node: a folder of pictures and captions becomes latents and conditionings."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import torch
from comfy_api.latest import io, ui

from ..aclora_core import images
from ..aclora_core.contact_sheet import contact_sheet
from ..aclora_core.variants import Variant, variants
from . import host
from .encoding import Encoded, encode_captions, encode_pictures
from .folders import dataset_folders, first_example, resolve_folder
from .host.known_encodings import KnownEncodings

if TYPE_CHECKING:
    from comfy.sd import CLIP, VAE

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
                *_advanced(),
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
        cls,
        folder: str | None,
        vae: None,
        clip: None,
        resolution: int | None,
        trigger_word: str | None,
        **advanced: bool | int | float | None,
    ) -> str | float:
        return float("nan") if folder is None else images.fingerprint(resolve_folder(folder))  # NaN: always run

    @classmethod
    def execute(
        cls,
        folder: str,
        vae: VAE,
        clip: CLIP,
        resolution: int,
        trigger_word: str,
        cache: bool = True,
        flip: bool = False,
        shuffles: int = 0,
        kept_tags: int = 1,
        caption_dropout: float = 0.0,
    ) -> io.NodeOutput:
        _require(vae, clip)
        scan = images.scan(resolve_folder(folder), trigger_word)
        looks = {p: variants(p.caption, flip, shuffles, kept_tags, caption_dropout) for p in scan.pictures}
        captions = list(dict.fromkeys(look.caption for picture in scan.pictures for look in looks[picture]))
        sides = (False, True) if flip else (False,)
        bar = host.Bar(len(scan.pictures) * len(sides) + len(captions))
        with torch.no_grad():
            known = KnownEncodings(vae, clip, cache)
            encoded = encode_pictures(vae, scan, resolution, sides, known, bar.advance)
            conditionings = encode_captions(clip, captions, known, bar.advance)
        known.log()
        latents, conditioning = _entries(encoded, looks, conditionings)
        problems = [*scan.problems, *encoded.problems]
        if problems:
            logger.warning("AC-LoRA: %d of the dataset's pictures left out. %s", len(problems), " ".join(problems))
        notes = [_summary(encoded), *problems, *_remarks(encoded), *known.problems]
        shown = [picture for picture in encoded.latents if picture in encoded.previews]
        sheet = contact_sheet([encoded.previews[picture] for picture in shown], [p.caption for p in shown], notes)
        return io.NodeOutput(
            latents,
            conditioning,
            ui={**ui.PreviewImage(sheet[None]).as_dict(), "text": ("\n".join(notes),)},
        )


def _advanced() -> list[Any]:
    """Optional, so that a workflow from before they existed stays valid."""
    return [
        io.Boolean.Input(
            "cache", default=True, optional=True, advanced=True,
            tooltip="Keeps what the VAE and the CLIP give on the drive, up to 2 GB, so that the same folder is ready "
            "at once the next time. What has changed is noticed. Off: everything is encoded anew.",
        ),
        io.Boolean.Input(
            "flip", default=False, optional=True, advanced=True,
            tooltip="Shows each picture mirrored too, which makes more of few pictures. Off for writing, faces with a "
            "parting, and whatever else has a left and a right.",
        ),
        io.Int.Input(
            "shuffles", default=0, min=0, max=32, optional=True, advanced=True,
            tooltip="Further orders of each caption's tags, so that no tag depends on its place. For captions made of "
            "tags with commas in between; 0 for sentences. More takes longer to encode.",
        ),
        io.Int.Input(
            "kept_tags", default=1, min=0, max=32, optional=True, advanced=True,
            tooltip="So many tags at the start of a caption stay where they are when the others are shuffled; 1 keeps "
            "the trigger word in front.",
        ),
        io.Float.Input(
            "caption_dropout", default=0.0, min=0.0, max=0.5, step=0.01, optional=True, advanced=True,
            tooltip="Share of the time that a picture is shown without its caption, so that the style also comes "
            "without words. 0.05 to 0.1 is usual; larger ties the style less to the trigger word.",
        ),
    ]  # fmt: skip


def _entries(
    encoded: Encoded, looks: dict[images.Picture, list[Variant]], conditionings: dict[str, list]
) -> tuple[list[dict], list[list]]:
    """A latent and a conditioning for each variant of each picture, repeats included; training picks among variants."""
    latents, conditioning, number = [], [], 0
    for picture, sides in encoded.latents.items():
        plain = {"samples": sides[0]}
        for _ in range(picture.repeats):
            for place, look in enumerate(looks[picture]):
                entry = {"samples": sides[look.mirrored], "aclora": {"picture": number, "variant": place}}
                latents.append(entry if len(looks[picture]) > 1 else plain)
                conditioning.append(conditionings[look.caption])
            number += 1
    return latents, conditioning


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


def _summary(encoded: Encoded) -> str:
    counts: dict[tuple[int, int], int] = {}
    for bucket in encoded.buckets.values():
        counts[bucket] = counts.get(bucket, 0) + 1
    sizes = ", ".join(f"{number} at {width} × {height}" for (width, height), number in sorted(counts.items()))
    total = sum(picture.repeats for picture in encoded.latents)
    repeated = f", {total} with repeats" if total != len(encoded.latents) else ""
    return f"{_count(len(encoded.latents), 'picture')}{repeated}: {sizes}."


def _remarks(encoded: Encoded) -> list[str]:
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
