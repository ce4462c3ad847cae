"""An image tensor as an image of Pillow, which is what gets drawn and saved."""

from __future__ import annotations

from PIL import Image
from torch import Tensor


def to_pil(image: Tensor) -> Image.Image:
    """Return an RGB image with 8 bits for each colour.

    Args:
        image: (height, width, channels), 0 to 1; values outside are clamped, and those that are not finite become 0.
            One or two channels are grey, without and with alpha. Alpha is ignored.
    """
    colors = image[..., :3] if image.shape[-1] >= 3 else image[..., :1].expand(-1, -1, 3)
    finite = colors.detach().cpu().float().nan_to_num(0.0, posinf=0.0, neginf=0.0)
    return Image.fromarray((finite.clamp(0, 1) * 255).round().byte().numpy())
