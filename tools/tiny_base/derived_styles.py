"""More drawing styles for the tiny base: each of its images once more as an outline, in grey, in ink, inverted, ...

A base that has seen the same concepts in many styles can learn another one from few images without bending their
shapes. Every derived style has a word of its own, which captions put behind the word of the icon set: "a rocket,
noto outline style". The words of the held-out styles do not occur, nor do their images.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Derivation = Callable[[Tensor], Tensor]  # images (n, 3, h, w) in 0..1, on white, to images of the same shape

_LUMINANCE = (0.299, 0.587, 0.114)  # of R, G and B, as in ITU-R BT.601


def luminance(images: Tensor) -> Tensor:
    """Return the luminance (n, 1, h, w)."""
    return (images * images.new_tensor(_LUMINANCE)[:, None, None]).sum(1, keepdim=True)


def edges(images: Tensor, width: int = 3) -> Tensor:
    """Return how much the colour changes within a square of `width` pixels, (n, 1, h, w) in 0..1."""
    return (_highest(images, width) - _lowest(images, width)).amax(1, keepdim=True)


def _highest(images: Tensor, width: int) -> Tensor:
    return F.max_pool2d(images, width, stride=1, padding=width // 2)


def _lowest(images: Tensor, width: int) -> Tensor:
    return -_highest(-images, width)


def _lines(images: Tensor, width: int = 3) -> Tensor:
    """Return 1 on the lines of a drawing and 0 elsewhere, with soft borders."""
    return ((edges(images, width) - 0.08) * 5).clamp(0, 1)


def _shape(images: Tensor) -> Tensor:
    """Return 1 on the drawn shape and 0 on the white around it, (n, 1, h, w)."""
    return ((0.97 - images.amin(1, keepdim=True)) * 12).clamp(0, 1)


def _tinted(grey: Tensor, dark: tuple[float, float, float], light: tuple[float, float, float]) -> Tensor:
    """Map grey (n, 1, h, w) to colours between a dark and a light one."""
    low, high = (grey.new_tensor(colour)[:, None, None] for colour in (dark, light))
    return low + grey * (high - low)


def grey(images: Tensor) -> Tensor:
    """Without colour."""
    return luminance(images).expand_as(images)


def inverted(images: Tensor) -> Tensor:
    """As a negative."""
    return 1 - images


def outline(images: Tensor) -> Tensor:
    """Black lines on white."""
    return (1 - _lines(images)).expand_as(images)


def bold(images: Tensor) -> Tensor:
    """Thick black lines on white."""
    return (1 - _lines(images, 5)).expand_as(images)


def ink(images: Tensor) -> Tensor:
    """Black areas on white where the shape is darker than its own mean, with its contour."""
    shape, light = _shape(images), luminance(images)
    mean = (light * shape).sum((2, 3), keepdim=True) / shape.sum((2, 3), keepdim=True).clamp_min(1)
    dark = ((mean - light) * 20).clamp(0, 1) * shape
    return (1 - torch.maximum(dark, _lines(shape))).expand_as(images)


def silhouette(images: Tensor) -> Tensor:
    """The whole shape in black."""
    return (1 - _shape(images)).expand_as(images)


def stencil(images: Tensor) -> Tensor:
    """The shape in black, with its lines left white."""
    return 1 - (_shape(images) * (1 - _lines(images))).expand_as(images)


def comic(images: Tensor) -> Tensor:
    """Coloured, with black lines."""
    return images * (1 - _lines(images))


def coloring(images: Tensor) -> Tensor:
    """Pale, with dark lines."""
    return (0.65 + 0.35 * images) * (1 - 0.8 * _lines(images))


def blueprint(images: Tensor) -> Tensor:
    """White lines on blue."""
    return _tinted(_lines(images), (0.1, 0.25, 0.6), (0.95, 0.97, 1.0))


def neon(images: Tensor) -> Tensor:
    """Lines of the images' own colours, glowing on black."""
    saturated = _lowest(images, 3)
    bright = saturated / saturated.amax(1, keepdim=True).clamp_min(0.25)
    return _lines(images) * bright


def sepia(images: Tensor) -> Tensor:
    """Brown on cream, as an old photograph."""
    return _tinted(luminance(images), (0.25, 0.14, 0.06), (1.0, 0.96, 0.86))


def poster(images: Tensor) -> Tensor:
    """With three levels of each primary colour."""
    return (images * 2).round() / 2


def pastel(images: Tensor) -> Tensor:
    """In pale colours."""
    return 0.55 + 0.45 * images


def swapped(images: Tensor) -> Tensor:
    """In other hues: green takes the place of red, blue of green, red of blue."""
    return images[:, [1, 2, 0]]


def turned(images: Tensor) -> Tensor:
    """In other hues, the other way round."""
    return images[:, [2, 0, 1]]


def shaded(images: Tensor) -> Tensor:
    """Lit from above, with a soft shadow at the bottom."""
    height = torch.linspace(1.15, 0.6, images.shape[2], device=images.device, dtype=images.dtype)
    lit = (images * height[:, None]).clamp(0, 1)
    return torch.lerp(images, lit, _shape(images))


def mosaic(images: Tensor) -> Tensor:
    """Of squares of 6 pixels, at 128 x 128."""
    small = F.interpolate(images, scale_factor=1 / 6, mode="area")
    return F.interpolate(small, images.shape[2:], mode="nearest")


DERIVED: dict[str, Derivation] = {
    style.__name__: style
    for style in (
        grey,
        inverted,
        outline,
        bold,
        ink,
        silhouette,
        stencil,
        comic,
        coloring,
        blueprint,
        neon,
        sepia,
        poster,
        pastel,
        swapped,
        turned,
        shaded,
        mosaic,
    )
}


def style_words(word: str, derived: str) -> str:
    """Return the style that a caption names: "noto", "outline" -> "noto outline"."""
    return f"{word} {derived}"
