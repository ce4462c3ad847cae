"""The advanced inputs of the dataset node."""

from __future__ import annotations

from typing import Any, get_args

from comfy_api.latest import io

from .encode import MaskSource
from .plan import NONE


def advanced_inputs(folders: list[str]) -> list[Any]:
    """Optional, so that a workflow from before they existed stays valid."""
    return [
        io.Boolean.Input(
            "cache",
            default=True,
            optional=True,
            advanced=True,
            tooltip="Keeps what the VAE and the CLIP give on the drive, up to 2 GB, so that the same folder is ready "
            "at once the next time. What has changed is noticed. Off: everything is encoded anew.",
        ),
        io.Boolean.Input(
            "flip",
            default=False,
            optional=True,
            advanced=True,
            tooltip="Shows each picture mirrored too, which makes more of few pictures. Off for writing, faces with a "
            "parting, and whatever else has a left and a right.",
        ),
        io.Int.Input(
            "shuffles",
            default=0,
            min=0,
            max=32,
            optional=True,
            advanced=True,
            tooltip="Further orders of each caption's tags, so that no tag depends on its place. For captions made of "
            "tags with commas in between; 0 for sentences. More takes longer to encode.",
        ),
        io.Int.Input(
            "kept_tags",
            default=1,
            min=0,
            max=32,
            optional=True,
            advanced=True,
            tooltip="So many tags at the start of a caption stay where they are when the others are shuffled; 1 keeps "
            "the trigger word in front.",
        ),
        io.Float.Input(
            "caption_dropout",
            default=0.0,
            min=0.0,
            max=0.5,
            step=0.01,
            optional=True,
            advanced=True,
            tooltip="Share of the time that a picture is shown without its caption, so that the style also comes "
            "without words. 0.05 to 0.1 is usual; larger ties the style less to the trigger word.",
        ),
        io.Combo.Input(
            "masks",
            options=list(get_args(MaskSource)),
            default="files",
            optional=True,
            advanced=True,
            tooltip="What of a picture is learned: white in its mask in full, black not at all. files: rocket.png has "
            "its mask in rocket-masklabel.png, or under its own name in the subfolder masks. files or alpha: what is "
            "transparent in a picture without such a file counts as black too. off: masks are passed over.",
        ),
        io.Combo.Input(
            "regularisation",
            options=[NONE, *folders],
            default=NONE,
            optional=True,
            advanced=True,
            tooltip="A folder of pictures of the same kind of things that are not in the style, best drawn by the "
            "model itself. They keep it from forgetting what things look like without the style. Their captions get "
            "no trigger word.",
        ),
        io.Float.Input(
            "regularisation_weight",
            default=1.0,
            min=0.01,
            max=10.0,
            step=0.05,
            optional=True,
            advanced=True,
            tooltip="What each regularisation picture counts, compared with a picture of the style. Larger keeps more "
            "of the model and learns less of the style.",
        ),
        io.String.Input(
            "more_resolutions",
            default="",
            optional=True,
            advanced=True,
            tooltip="Further sizes beside resolution, such as 768, 1024: each time that a picture comes it has one of "
            "them, so that the style is learned for all. No picture is drawn larger than it is for them. Each size "
            "takes longer to encode. Empty: resolution alone.",
        ),
    ]
