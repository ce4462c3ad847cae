"""Images shown on a node, which are a convenience: where they cannot be written, the node still gives its result."""

from __future__ import annotations

import logging
from typing import Any

from comfy_api.latest import io, ui
from torch import Tensor

from ..aclora_core.text import error_reason

log = logging.getLogger("aclora")


def images_on_node(images: Tensor, cls: type[io.ComfyNode]) -> tuple[dict[str, Any], str]:
    """Write images for a node into ComfyUI's temporary folder.

    Args:
        images: (batch, height, width, 3) in 0 to 1.
        cls: the node.

    Returns:
        What the node shows, and "" or a sentence that says why it shows none.
    """
    try:
        return ui.PreviewImage(images, cls=cls).as_dict(), ""
    except OSError as error:
        reason = error.strerror or error_reason(error)
        problem = f"The images cannot be shown here: ComfyUI's temporary folder cannot be written to ({reason})."
        log.warning("AC-LoRA: %s", problem)
        return {}, problem
