"""The browser of a dataset: what its panel in the front end asks for, and how a caption is saved from there."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from ...aclora_core.dataset import (
    MAX_RESOLUTION,
    MIN_RESOLUTION,
    BrowsedImage,
    CaptionChangedError,
    CaptionedImage,
    CaptionLines,
    ImageFiles,
    browse_folder,
    browse_image,
    bucket_sizes,
    find_image,
    load_image,
    read_caption,
    read_header,
    save_caption,
)
from ...aclora_core.storage import to_pil
from ...aclora_core.text import count_noun, name_list
from .. import host
from .caption_messages import repeat_remarks
from .folders import allowed_folders, is_editable, resolve_folder, writable_folders
from .sheets import image_remarks

_SIDE = 320  # pixels of a thumbnail, at most
_MULTIPLE = 8  # pixels for each position of a latent, as of most VAEs; which one is connected is not known here
_CONFLICT = 409
_READ_ONLY = "These example images are read-only. Copy the folder into ComfyUI's input folder to edit its captions."


def add_routes() -> None:
    """Add what the panel asks for to ComfyUI's web server."""
    host.add_route("GET", "/aclora/dataset", listing)
    host.add_route("GET", "/aclora/dataset/thumbnail", thumbnail)
    host.add_route("POST", "/aclora/dataset/caption", change_caption)


def listing(query: Mapping[str, Any]) -> dict[str, Any]:
    """Return all images of a folder, also those that the node would skip or refuse, with captions and remarks.

    Args:
        query: folder, as in the node's list, resolution, trigger_word and caption_lines.

    Raises:
        ValueError: the folder cannot be used.
    """
    folder = _folder(query)
    resolution = _resolution(query)
    browsed = browse_folder(folder, *_caption_settings(query), allowed_folders())
    return {
        "images": [_image_facts(each, resolution) for each in browsed.images],
        "remarks": [*_mask_remarks(browsed.unmatched_masks), *browsed.unused, *_repeat_remarks(browsed.images)],
        "read_only": "" if is_editable(str(query["folder"])) else _READ_ONLY,
    }


def thumbnail(query: Mapping[str, Any]) -> bytes:
    """Return an image of a folder as it is learned, cropped and small, in WebP.

    Args:
        query: folder, image (its name in the listing) and resolution.

    Raises:
        ValueError: there is no such image, or it cannot be read.
    """
    files = find_image(_folder(query), str(query.get("image")), allowed_folders())
    image = CaptionedImage(files.path, files.name, "", *read_header(files.path, files.name)[:2])
    width, height = _learned_size(image, _resolution(query))
    scale = min(1.0, _SIDE / max(width, height))
    pixels = load_image(image, (round(width * scale), round(height * scale)))
    file = io.BytesIO()
    to_pil(pixels).save(file, "WEBP", quality=85, method=0)
    return file.getvalue()


def change_caption(sent: Mapping[str, Any]) -> dict[str, Any]:
    """Save the caption of one image, and return the facts of the image as `listing` does.

    Args:
        sent: folder, image, text, version (of the listing), and resolution, trigger_word and caption_lines.

    Raises:
        ValueError: it cannot be saved; where the file has changed meanwhile, with the status 409.
    """
    folder = _folder(sent)
    if not is_editable(sent["folder"]):
        raise ValueError(_READ_ONLY)
    text, version = sent.get("text"), sent.get("version")
    if not isinstance(text, str) or not isinstance(version, str):
        raise ValueError("The caption and the version of its file have to be texts.")
    files = find_image(folder, str(sent.get("image")), allowed_folders())
    try:
        save_caption(files, text, version, writable_folders())
    except CaptionChangedError as error:
        error.status = _CONFLICT  # type: ignore[attr-defined]
        raise
    files = find_image(folder, files.name, allowed_folders())  # again, with a caption file that is new
    return _image_facts(browse_image(files, *_caption_settings(sent)), _resolution(sent))


def _image_facts(browsed: BrowsedImage, resolution: int) -> dict[str, Any]:
    caption = read_caption(browsed.files)
    facts: dict[str, Any] = {
        "name": browsed.files.name,
        "file": _caption_name(browsed.files),
        "text": caption.text,
        "version": caption.version,
        "problem": caption.problem or browsed.problem,
        "remarks": [],
    }
    if browsed.header:
        facts["size"] = browsed.header[:2]
        facts["changed"] = str(browsed.files.path.stat().st_mtime_ns)  # longer than JavaScript's numbers
    if browsed.image:
        learned = _learned_size(browsed.image, resolution)
        facts |= {"learned_size": learned, "remarks": image_remarks(browsed.image, learned)}
        facts["learned_as"] = [browsed.image.caption, *browsed.image.other_captions]
    return facts


def _caption_name(files: ImageFiles) -> str:
    """The caption file's path inside the folder; empty if there is none."""
    return str(PurePosixPath(files.name).with_name(files.caption.name)) if files.caption else ""


def _learned_size(image: CaptionedImage, resolution: int) -> tuple[int, int]:
    return bucket_sizes(image, resolution, (), _MULTIPLE)[0][0]


def _mask_remarks(names: tuple[str, ...]) -> list[str]:
    return [f"{count_noun(len(names), 'mask')} without an image of the same name: {name_list(names)}."] if names else []


def _repeat_remarks(images: tuple[BrowsedImage, ...]) -> list[str]:
    return repeat_remarks(each.image for each in images if each.image)


def _folder(values: Mapping[str, Any]) -> Path:
    folder = values.get("folder")
    if not isinstance(folder, str):
        raise ValueError("No folder is chosen. Choose one in the node's list.")
    return resolve_folder(folder)


def _caption_settings(values: Mapping[str, Any]) -> tuple[str, CaptionLines]:
    """The trigger word, and what the lines of a caption file are."""
    joined = values.get("caption_lines") == "joined"
    return str(values.get("trigger_word", "")), "joined" if joined else "one per epoch"


def _resolution(values: Mapping[str, Any]) -> int:
    try:
        resolution = int(values.get("resolution", 512))
    except (TypeError, ValueError) as error:
        raise ValueError("resolution has to be a whole number.") from error
    if not MIN_RESOLUTION <= resolution <= MAX_RESOLUTION:
        raise ValueError(f"resolution has to be {MIN_RESOLUTION} to {MAX_RESOLUTION}, but is {resolution}.")
    return resolution
