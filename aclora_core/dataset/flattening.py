"""Flattening: pixels of any mode become 8-bit RGB on a background."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from .color import ColorConversion

_STRIP_HEIGHT = 512  # rows
_BITS, _PHOTOMETRIC, _SAMPLE_FORMAT = 258, 262, 339  # tags of a TIFF
_WHITE_IS_ZERO, _UNSIGNED = 0, 1  # values of the last two
_BRIGHTEST_HIGHLIGHT = 16.0  # in float images with white at 1; on a scale to 255 this would be nearly black


def flatten(image: Image.Image, background: str, to_srgb: ColorConversion | None = None) -> Image.Image:
    """Convert an image of any mode to RGB; transparent parts show the background.

    Args:
        image: decoded, as its file was opened.
        background: name of a colour.
        to_srgb: the conversion from the image's colour profile, if it has one.

    Raises:
        ValueError: none of its values is a finite number.
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

    Args:
        image: as its file was opened, so that the tags of a TIFF are known.

    Raises:
        ValueError: none of its values is a finite number.
    """

    def __init__(self, image: Image.Image) -> None:
        tags: Mapping[int, Any] = getattr(image, "tag_v2", {})
        (bits, *_) = tags.get(_BITS, (32 if image.mode == "F" else 16,))
        (sample_format, *_) = tags.get(_SAMPLE_FORMAT, (_UNSIGNED,))
        self._inverted = tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO
        # Pillow has no unsigned numbers of 32 bits, so the upper half comes as negative ones.
        self._unsigned = image.mode == "I" and bits == 32 and sample_format == _UNSIGNED
        self._white = self._white_point(image, bits, sample_format == _UNSIGNED)

    def to_8_bits(self, strip: Image.Image) -> Image.Image:
        """Convert a strip; the value that is transparent, if there is one, becomes an alpha channel."""
        values = self._values(strip)
        scaled = np.nan_to_num(values.astype(np.float32) / np.float32(self._white), posinf=1.0).clip(0.0, 1.0)
        light = 1.0 - scaled if self._inverted else scaled
        grey = Image.fromarray((light * 255.0).round().astype(np.uint8))
        key = strip.info.get("transparency")
        if key is None:
            return grey
        alpha = Image.fromarray(np.where(values == key, 0, 255).astype(np.uint8))
        return Image.merge("LA", (grey, alpha))

    def _values(self, strip: Image.Image) -> NDArray[Any]:
        values = np.asarray(strip)
        return values.view(np.uint32) if self._unsigned else values

    def _white_point(self, image: Image.Image, bits: int, unsigned: bool) -> float:
        """The value of white; where the file does not say, the smallest common one that no value exceeds."""
        if bits <= 16:
            return 65535.0 if unsigned else 32767.0
        largest, above, count = -np.inf, 0, 0
        for _, strip in _strips(image):
            values = self._values(strip)
            finite = values[np.isfinite(values)]
            if finite.size:
                largest = max(largest, float(finite.max()))
            above += int(np.count_nonzero(finite > 1))
            count += finite.size
        if count == 0:
            raise ValueError("none of its values is a finite number")
        if image.mode == "F" and (largest <= _BRIGHTEST_HIGHLIGHT or 2 * above <= count):
            return 1.0
        return next((white for white in (255.0, 65535.0, 2.0**31 - 1, 2.0**32 - 1) if largest <= white), largest)
