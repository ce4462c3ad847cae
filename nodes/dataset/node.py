"""The dataset node: a folder of pictures and captions becomes latents and conditionings."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import torch
from comfy_api.latest import io, ui

from ...aclora_core.dataset import parse_resolutions
from ...aclora_core.inspection import contact_sheet
from .. import host
from ..host.encoding_keys import KnownEncodings
from .encode import MaskSource, encode_captions, encode_images
from .folders import dataset_folders, first_example
from .inputs import advanced_inputs
from .messages import remarks, summaries
from .plan import NONE, entries, fingerprint, plan, scan_folders

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
                *advanced_inputs(folders),
            ],
            outputs=[
                io.Latent.Output(
                    display_name="latents",
                    is_output_list=True,
                    tooltip="One latent for each picture, as the VAE gives it, with its mask if it has one. A picture "
                    "in a subfolder named 10_name comes 10 times.",
                ),
                io.Conditioning.Output(
                    display_name="conditioning",
                    is_output_list=True,
                    tooltip="The encoded caption of each picture, in the order of the latents.",
                ),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def validate_inputs(
        cls, folder: str | None, regularisation: str | None = NONE, more_resolutions: str | None = ""
    ) -> bool | str:
        # Naming these alone keeps the host's checks of the other inputs. A linked one is not known yet. The host shows
        # the same sentence at each of them, so it begins with the one that it is about.
        at = "more_resolutions"
        try:
            parse_resolutions(more_resolutions or "")
            if folder is not None:
                at = "folder"
                scan_folders(folder)
            if folder is not None and regularisation not in (None, NONE):
                at = "regularisation"
                scan_folders(folder, regularisation)
        except ValueError as error:
            return f"{at}: {error}"
        return True

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
    ) -> io.NodeOutput:
        _require(vae, clip)
        looks = {"flip": flip, "shuffles": shuffles, "kept_tags": kept_tags, "dropout": caption_dropout}
        sizes = resolution, parse_resolutions(more_resolutions), vae.spacial_compression_encode()
        plans = [plan(scan, *sizes, looks) for scan in scan_folders(folder, regularisation, trigger_word)]
        captions = list(dict.fromkeys(look.caption for each in plans for own in each.looks.values() for look in own))
        sides = (False, True) if flip else (False,)
        views = sum(len(own) for each in plans for own in each.sizes.values()) * len(sides)
        bar = host.Bar(views + len(captions))
        with torch.no_grad():
            known = KnownEncodings(vae, clip, cache)
            encoded = [encode_images(vae, each.sizes, sides, masks, known, bar.advance) for each in plans]
            conditionings = encode_captions(clip, captions, known, bar.advance)
        known.log()
        latents, conditioning = entries(plans, encoded, conditionings, regularisation_weight)
        problems = [*(line for each in plans for line in each.scan.problems), *(p for e in encoded for p in e.problems)]
        if problems:
            logger.warning("AC-LoRA: %d of the dataset's pictures left out. %s", len(problems), " ".join(problems))
        notes = [*summaries(encoded, regularisation_weight), *problems, *remarks(plans, encoded), *known.problems]
        shown = encoded[0].previews
        shown_now = _shown(contact_sheet(list(shown.values()), [picture.caption for picture in shown]), notes)
        host.send_text(shown_now["text"][0], host.hidden_node_id(cls))
        return io.NodeOutput(latents, conditioning, ui=shown_now)


def _shown(sheet: torch.Tensor, notes: list[str]) -> dict[str, Any]:
    """What the node shows. The picture is a file: where it cannot be written, what was encoded is worth more."""
    try:
        pictures = ui.PreviewImage(sheet[None]).as_dict()
    except OSError as error:
        notes = [*notes, f"The pictures cannot be shown here ({error.strerror or error}). Free some space."]
        pictures = {}
    return {**pictures, "text": ("\n".join(notes),)}


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
