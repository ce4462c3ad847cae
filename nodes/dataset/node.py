"""The dataset node: a folder of images and captions becomes latents and conditionings."""

from __future__ import annotations

import asyncio
import errno
import logging
from typing import TYPE_CHECKING, Any

import torch
from comfy_api.latest import io, ui

from ...aclora_core.dataset import (
    MAX_RESOLUTION,
    MIN_RESOLUTION,
    CaptionLines,
    clean_trigger,
    parse_resolutions,
)
from .. import host
from ..host import KnownEncodings
from ..texts import check_text
from .encode import MaskSource, encode_captions, encode_images
from .folders import dataset_folders, first_example, resolve_folder
from .inputs import advanced_inputs
from .messages import not_shown, remarks, skipped_images, summaries
from .plan import (
    NONE,
    FolderPlan,
    VariantOptions,
    captions_of,
    fingerprint,
    output_lists,
    plan_folder,
    scan_folders,
)
from .sheets import MAX_SHOWN, contact_sheets

if TYPE_CHECKING:
    from comfy.sd import CLIP, VAE

log = logging.getLogger("aclora")


class ACLoRADataset(io.ComfyNode):
    """Folder, VAE and CLIP -> a latent and a conditioning for each image."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        folders = dataset_folders()
        return io.Schema(
            node_id="ACLoRADataset",
            display_name="Load AC-LoRA Dataset",
            category="AC-LoRA",
            description="Reads a folder of images with captions and prepares both for training.",
            search_aliases=["training images", "image folder", "captions", "load dataset", "make training dataset"],
            inputs=[
                io.Combo.Input(
                    "folder",
                    options=folders,
                    default=first_example(folders),
                    tooltip="The folder with the images: a subfolder of ComfyUI's input folder, a folder registered "
                    "as datasets in extra_model_paths.yaml or a subfolder of it, or an example that came with "
                    "AC-LoRA. 10 to 30 images are usual for a style. Press R to see a folder that you just created.",
                ),
                io.Vae.Input("vae", tooltip="The VAE of the model you train; it turns images into latents."),
                io.Clip.Input("clip", tooltip="The CLIP of the model you train; it turns captions into conditionings."),
                io.Int.Input(
                    "resolution",
                    default=512,
                    min=MIN_RESOLUTION,
                    max=MAX_RESOLUTION,
                    step=16,
                    tooltip="Side of a square image in pixels; other aspect ratios get the same area. Use the size the "
                    "model was trained at: 512 suits SD1.5, 1024 SDXL and Flux, 128 the tiny base. Larger values show "
                    "more detail and make training slower.",
                ),
                io.String.Input(
                    "trigger_word",
                    default="",
                    tooltip="A word that will invoke the style. It is put in front of every caption that lacks it, "
                    "and serves as the caption of images without one. Empty: captions stay as they are.",
                ),
                *advanced_inputs(folders),
            ],
            outputs=[
                io.Latent.Output(
                    display_name="latents",
                    is_output_list=True,
                    tooltip="One latent for each image, with its mask if it has one. An image in a subfolder named "
                    "10_name is repeated 10 times.",
                ),
                io.Conditioning.Output(
                    display_name="conditioning",
                    is_output_list=True,
                    tooltip="The encoded caption of each image, in the order of the latents.",
                ),
            ],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,  # so that it can be run alone, to look at the images before a training
        )

    @classmethod
    async def validate_inputs(cls, folder: str | None = None) -> bool | str:
        # Only this one is named, since the host repeats the sentence at every named input; the others are checked when
        # the node runs, before any work. In a thread, since the host calls this in the server's event loop, and a
        # folder may hold thousands of images.
        return host.tell_refusal(await asyncio.to_thread(_check_folder, folder))

    @classmethod
    def fingerprint_inputs(
        cls,
        folder: str | None,
        vae: None,
        clip: None,
        resolution: int | None,
        trigger_word: str | None,
        regularisation: str | None = NONE,
        **advanced: bool | int | float | str | None,
    ) -> str | float:
        return float("nan") if folder is None or regularisation is None else fingerprint(folder, regularisation)

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
        masks: MaskSource = "files",
        regularisation: str = NONE,
        regularisation_weight: float = 1.0,
        more_resolutions: str = "",
        caption_lines: CaptionLines = "one per epoch",
        prompt_syntax: bool = False,
    ) -> io.NodeOutput:
        _check_connected(vae, clip)
        check_text("trigger_word", trigger_word)
        scans = scan_folders(folder, regularisation, trigger_word, caption_lines)
        further = parse_resolutions(more_resolutions)
        options = VariantOptions(flip, shuffles, kept_tags, caption_dropout, trigger_word)
        multiple = vae.spacial_compression_encode()
        plans = [plan_folder(scan, resolution, further, multiple, options) for scan in scans]
        captions = captions_of(plans)
        count = _view_count(plans, flip) + len(captions)
        bar = host.ProgressBar(count + min(MAX_SHOWN, len(scans[0].images)))
        host.send_text(f"Encoding {count} images and captions …", host.hidden_node_id(cls))
        with torch.no_grad(), host.processes().failing_together():
            known = KnownEncodings(vae, clip, cache)
            folders = [encode_images(vae, plan.sizes, flip, masks, known, bar.advance) for plan in plans]
            trigger, name = clean_trigger(trigger_word), resolve_folder(folder).name
            conditionings = encode_captions(clip, captions, known, bar.advance, not prompt_syntax, trigger, name)
        known.log_counts()
        latents, conditioning = output_lists(plans, folders, conditionings, regularisation_weight)
        skipped = skipped_images(plans, folders)
        if skipped:
            log.warning("AC-LoRA: images of the dataset were skipped. %s", " ".join(skipped))
        notes = [
            *summaries(folders, regularisation_weight),
            *skipped,
            *remarks(plans, folders, prompt_syntax),
            *known.problems,
            *not_shown(folders[0]),
        ]
        shown = _shown(contact_sheets(folders[0], bar.advance, host.dark_theme()), notes)
        host.send_text(shown["text"][0], host.hidden_node_id(cls))
        return io.NodeOutput(latents, conditioning, ui=shown)


def _check_folder(folder: str | None) -> bool | str:
    """Return True, or a sentence that says what is wrong. A linked input is None, since it is not known yet."""
    try:
        if folder is not None:
            scan_folders(folder)
    except ValueError as error:
        return str(error)
    return True


def _view_count(plans: list[FolderPlan], flip: bool) -> int:
    sizes = sum(len(own) for plan in plans for own in plan.sizes.values())
    return 2 * sizes if flip else sizes


def _shown(sheets: torch.Tensor | None, notes: list[str]) -> dict[str, Any]:
    """What the node shows: contact sheets and notes. If a sheet cannot be written, the result is still returned."""
    images: dict[str, Any] = {}
    try:
        images = {} if sheets is None else ui.PreviewImage(sheets).as_dict()
    except OSError as error:
        advice = " Free some space." if error.errno == errno.ENOSPC else ""
        notes = [*notes, f"The images cannot be shown here ({error.strerror or error}).{advice}"]
    text = "\n".join(notes).replace("[[", "[\u2060[")  # the front end would show a name with [[ and ]] as a link
    return {**images, "text": (text,)}


def _check_connected(vae: VAE | None, clip: CLIP | None) -> None:
    # For a checkpoint without a VAE the host hands over an empty VAE object.
    if vae is None or getattr(vae, "first_stage_model", True) is None:
        raise ValueError(
            "There is no VAE in the vae input: the loaded checkpoint has none. Connect a Load VAE node with the VAE "
            "that belongs to the model."
        )
    if clip is None:
        raise ValueError(
            "There is no CLIP in the clip input: the loaded checkpoint has no text encoder. Connect a Load CLIP node "
            "with the text encoder that belongs to the model."
        )
