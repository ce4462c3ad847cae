"""The layers of a LoRA file: which keys form one, which are of other kinds, and which are left out."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..text import count_noun
from .adapter import Adapter, Layer
from .header_alpha import HeaderAlphas
from .key_formats import (
    ADDON_KINDS,
    ALPHA,
    DORA_SCALE,
    INCOMPLETE,
    KEY_FORMATS,
    KINDS,
    PLAIN_SUFFIXES,
    KeyFormat,
    find_key_format,
    find_kinds,
    missing_half,
    suffixes_by_base,
    to_comfyui_keys,
)
from .left_out import (
    HALF_PAIR,
    MAGNITUDES,
    NO_FLOATS,
    RANK_0,
    SECOND_SPELLING,
    STRAY_ALPHA,
    STRAY_PART,
    UNFIT_ALPHA,
    UNFIT_PAIR,
    UnusableLayerError,
    reason_of_key,
)


def read_layers(state_dict: Mapping[str, Tensor], metadata: dict[str, str], remarks: tuple[str, ...] = ()) -> Adapter:
    """Build an adapter from the tensors of a LoRA in any key format; they are not copied.

    Args:
        remarks: on the file, to which those on its layers are added.

    Raises:
        ValueError: there is no LoRA, or no layer that can be used.
    """
    tensors = to_comfyui_keys(state_dict)
    found, unknown = suffixes_by_base(tensors)
    if not found:
        example = f"; its first key is '{next(iter(tensors))}'" if tensors else ""
        raise ValueError(f"There is no LoRA in it: {len(tensors)} tensors{example}. Choose a LoRA file.")
    reader = _Reader(tensors, HeaderAlphas.from_metadata(metadata))
    for base, suffixes in found.items():
        reader.read(base, suffixes)
    if not reader.layers and not reader.other:
        raise ValueError(reader.problems[0])
    reader.keep_foreign(unknown)
    return Adapter(reader.layers, metadata, reader.other, reader.extra, reader.left_out, (*remarks, *reader.remarks()))


class _Reader:
    """Sorts the layers of a file into those that are used and those that are left out."""

    def __init__(self, tensors: Mapping[str, Tensor], header: HeaderAlphas) -> None:
        self.layers: dict[str, Layer] = {}
        self.other: dict[str, str] = {}
        self.extra: dict[str, Tensor] = {}
        self.left_out: dict[str, str] = {}
        self.problems: list[str] = []  # a sentence for each layer that is left out
        self._tensors = tensors
        self._header = header
        self._header_scales: list[float] = []  # of the layers whose alpha is the header's
        self._unused_alphas: set[float] = set()
        self._flat_scales = 0  # DoRA scales that are given their second dimension

    def read(self, base: str, suffixes: set[str]) -> None:
        """Add a layer, or name it as left out."""
        try:
            self._add(base, self._without_unpaired(base, suffixes))
        except UnusableLayerError as error:
            self.left_out[base] = error.reason
            self.problems.append(str(error))

    def keep_foreign(self, keys: list[str]) -> None:
        """Keep the tensors that belong to no layer, and name them as left out."""
        for key in keys:
            self.extra[key] = self._tensors[key]
            self.left_out[key] = reason_of_key(key)

    def remarks(self) -> list[str]:
        """Return sentences on how the layers were read."""
        remarks = []
        if self._flat_scales:
            scales = count_noun(self._flat_scales, "layer")
            remarks.append(f"The DoRA scale of {scales} has one dimension, and is read as one number for each output.")
        if self._header_scales:
            low, high = min(self._header_scales), max(self._header_scales)
            scales = f"scale {low:.4g}" if low == high else f"scales {low:.4g} to {high:.4g}"
            layers = count_noun(len(self._header_scales), "layer")
            remarks.append(f"The alpha of {layers} is that in the file's header, which gives the {scales}.")
        for alpha in sorted(self._unused_alphas):
            remarks.append(
                f"The header's alpha of {alpha:g} is not used, as the matrices of a file with these keys hold it"
                " already: its layers have the scale 1, as in ComfyUI."
            )
        return remarks

    def _without_unpaired(self, base: str, suffixes: set[str]) -> set[str]:
        """Return a layer's endings without those that nothing belongs to, which are named as left out.

        Raises:
            UnusableLayerError: no matrices are left.
        """
        form = find_key_format(suffixes)
        unpaired = (suffixes & PLAIN_SUFFIXES) - ({form.up, form.down} if form else set())
        rest = suffixes - unpaired
        if form is None and {KINDS[suffix] for suffix in rest - {ALPHA}} <= ADDON_KINDS:
            if unpaired:
                missing, present = missing_half(suffixes)
                message = f"'{base}{missing}' is missing beside '{base}{present}'. {INCOMPLETE}"
                raise UnusableLayerError(HALF_PAIR, message)
            reason = STRAY_ALPHA if rest == {ALPHA} else STRAY_PART
            message = f"'{base}{min(suffixes)}' has no lora_up and lora_down beside it. {INCOMPLETE}"
            raise UnusableLayerError(reason, message)
        for suffix in sorted(unpaired):
            whole = any({pair.up, pair.down} <= suffixes for pair in KEY_FORMATS if suffix in (pair.up, pair.down))
            self.left_out[base + suffix] = SECOND_SPELLING if whole else HALF_PAIR
        return rest

    def _add(self, base: str, suffixes: set[str]) -> None:
        form = find_key_format(suffixes)
        kinds = find_kinds(base, suffixes, self._tensors)
        self._check_alpha(base)
        # Built for layers of other kinds too, as ComfyUI applies their matrices in the same way.
        layer = self._layer(base, form) if form else None
        if kinds:
            self.other[base] = ", ".join(sorted(kinds))
        if layer is not None and kinds <= {"bias difference"}:
            self.layers[base] = layer
            suffixes = suffixes & KINDS.keys()
        elif layer is not None and ALPHA not in suffixes and layer.scale != 1.0:
            self.extra[base + ALPHA] = torch.tensor(layer.alpha, dtype=torch.float32)
        for suffix in sorted(suffixes):
            self.extra[base + suffix] = self._tensors[base + suffix]
            if KINDS.get(suffix) == "DoRA of PEFT":
                self.left_out[base + suffix] = MAGNITUDES
        scale = self.extra.get(base + DORA_SCALE)
        if layer is not None and scale is not None and scale.shape == (layer.lora_up.shape[0],):
            self.extra[base + DORA_SCALE] = scale.reshape(-1, *[1] * (layer.lora_down.ndim - 1))
            self._flat_scales += 1

    def _layer(self, base: str, form: KeyFormat) -> Layer:
        up, down = self._tensors[base + form.up], self._tensors[base + form.down]
        if not (up.is_floating_point() and down.is_floating_point()):
            message = f"Layer '{base}' holds {up.dtype} and {down.dtype}; a LoRA needs floating-point numbers."
            raise UnusableLayerError(NO_FLOATS, message)
        try:
            layer = Layer(down, up, 1.0)
        except ValueError as error:
            is_empty = up.ndim >= 2 and down.ndim >= 2 and up.shape[1] == down.shape[0] == 0
            raise UnusableLayerError(RANK_0 if is_empty else UNFIT_PAIR, f"Layer '{base}': {error}.") from error
        return Layer(down, up, self._alpha(base, layer.rank, form is KEY_FORMATS[0]))

    def _check_alpha(self, base: str) -> None:
        alpha = self._tensors.get(base + ALPHA)
        if alpha is not None and (alpha.numel() != 1 or alpha.is_complex()):
            message = f"'{base}{ALPHA}' must be one number, but has the shape {tuple(alpha.shape)} and {alpha.dtype}."
            raise UnusableLayerError(UNFIT_ALPHA, message)

    def _alpha(self, base: str, rank: int, in_kohya_spelling: bool) -> float:
        """Return a layer's alpha: its own, else the header's, else the rank, for the scale 1."""
        if base + ALPHA in self._tensors:
            return float(self._tensors[base + ALPHA].item())
        alpha = self._header.of_layer(base, rank, in_kohya_spelling)
        if alpha is not None:
            self._header_scales.append(alpha / rank)
            return alpha
        unused = self._header.unused_alpha(rank, in_kohya_spelling)
        self._unused_alphas |= {unused} if unused is not None else set()
        return float(rank)
