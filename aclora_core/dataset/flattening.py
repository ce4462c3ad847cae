"""Flattening: pixels of any mode become 8-bit RGB on a background."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from .color import ColorConversion

_STRIP_HEIGHT = 512  # rows
_WHITE_IS_ZERO = 0  # value of a TIFF's tag
_PHOTOMETRIC = 262


def flatten(image: Image.Image, background: str, to_srgb: ColorConversion | None = None) -> Image.Image:
    """Convert an image of any mode to RGB; transparent parts show the background.

    Args:
        image: decoded pixels.
        background: name of a colour.
        to_srgb: the conversion from the image's colour profile, if it has one.

    Raises:
        ValueError: no number of a float image is finite.
    """
    if image.mode == "RGB" and not image.has_transparency_data and to_srgb is None:
        return image
    grey = _DeepGrey(image) if _is_deep(image) else None
    flat = Image.new("RGB", image.size)
    for top, strip in _strips(image):
        flat.paste(_flatten_strip(strip if grey is None else grey.to_8_bits(strip), background, to_srgb), (0, top))
    return flat


def alpha_channel(image: Image.Image) -> Image.Image:
    """Return the alpha channel of an image with transparency, in 8 bits."""
    if _is_deep(image):
        image = _DeepGrey(image).to_8_bits(image)
    return image.convert("RGBA").getchannel("A")


def _strips(image: Image.Image) -> Iterator[tuple[int, Image.Image]]:
    """Yield horizontal strips with their top rows: converting a large image at once takes several times its memory."""
    for top in range(0, image.height, _STRIP_HEIGHT):
        yield top, image.crop((0, top, image.width, min(top + _STRIP_HEIGHT, image.height)))


def _flatten_strip(image: Image.Image, background: str, to_srgb: ColorConversion | None) -> Image.Image:
    colors = image.convert("RGB") if to_srgb is None else to_srgb.apply(image.convert(to_srgb.mode))
    if not image.has_transparency_data:
        return colors
    flat = Image.new("RGB", image.size, background)
    flat.paste(colors, mask=alpha_channel(image))
    return flat


def _is_deep(image: Image.Image) -> bool:
    return image.mode.startswith(("I", "F"))


class _DeepGrey:
    """The conversion of grey in 16 bits, 32 bits or floats to 8 bits; Pillow's own would clip instead of scale.

    Files do not say which value is white, so it is found in the values of the whole image.
    """

    def __init__(self, image: Image.Image) -> None:
        self._white = _white_point(image)
        self._inverted = getattr(image, "tag_v2", {}).get(_PHOTOMETRIC) == _WHITE_IS_ZERO

    def to_8_bits(self, strip: Image.Image) -> Image.Image:
        """Convert a strip; the value that is transparent, if there is one, becomes an alpha channel."""
        values = np.asarray(strip)
        scaled = np.nan_to_num(values.astype(np.float32) / np.float32(self._white), posinf=1.0).clip(0.0, 1.0)
        bytes_of = ((1.0 - scaled if self._inverted else scaled) * 255.0).round().astype(np.uint8)
        grey = Image.fromarray(bytes_of)
        key = strip.info.get("transparency")
        if key is None:
            return grey
        alpha = Image.fromarray(np.where(values == key, 0, 255).astype(np.uint8))
        return Image.merge("LA", (grey, alpha))


def _white_point(image: Image.Image) -> float:
    """The value of white in deep grey."""
    if image.mode.startswith("I;16"):
        return 65535.0
    values = [_finite(np.asarray(strip)) for _, strip in _strips(image)]
    largest = max((float(each.max()) for each in values if each.size), default=None)
    if largest is None:
        raise ValueError("none of its values is a finite number")
    if image.mode == "I":
        return max(largest, 65535.0)
    # By convention values are 0 to 1. A few that are larger are highlights; if most are, the scale is another.
    count = sum(each.size for each in values)
    above = sum(int(np.count_nonzero(each > 1.0)) for each in values)
    if 2 * above <= count:
        return 1.0
    return next((white for white in (255.0, 65535.0) if largest <= white), largest)


def _finite(values: NDArray[np.generic]) -> NDArray[np.generic]:
    return values[np.isfinite(values)]
