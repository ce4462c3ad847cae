"""Prefix, block and module of a layer, parsed from its name in any key format."""

from __future__ import annotations

import re
from dataclasses import dataclass

_PREFIX = re.compile(
    r"(?:unet\.base_model\.model|base_model\.model|diffusion_model|transformer|unet|text_encoder(?:_\d+)?"
    r"|text_encoders\.[^.]+(?:\.transformer)?)\."
    r"|(?:lora_unet|lora_transformer|lora_prior_unet|lora_te\d*|lycoris)_"
)


_TEXT_ENCODER = re.compile(r"(?:lora_)?(te\d*)_$|text_encoders?\.([^.]+)|(text_encoder(?:_\d+)?)\.$")


# Names of lists of blocks. A numbered part of a module, as in "ff.net.0" or "in_layers.2", is no block.
_BLOCK_CONTAINER = re.compile(
    r"(?!(?:in|out|emb|skip)_layers)(?:\w*_)?(?:blocks?|layers?|attentions|resnets|upsamplers|downsamplers|refiner)"
)


@dataclass(frozen=True)
class LayerName:
    """The parsed name of a layer."""

    prefix: str  # "diffusion_model.", "lora_unet_", …; "" if none is known
    block: str  # "joint_blocks.3", "input_blocks.7.2" (third transformer of block 7), "te1 layers.0"; "" outside blocks
    module: str  # "x_block.attn.qkv"; outside blocks the whole name without its prefix

    @property
    def label(self) -> str:
        """Block and module, for charts."""
        return f"{self.block} {self.module}".strip()

    @property
    def text_encoder(self) -> str:
        """The text encoder's name, such as "te1", or "" for a layer of the diffusion model."""
        match = _TEXT_ENCODER.match(self.prefix)
        return next(filter(None, match.groups())) if match else ""


def parse_layer_name(name: str) -> LayerName:
    """Parse the base name of a layer.

    A block is the outermost numbered container with its number, followed by the numbers of the containers directly
    inside it, so that layers at one depth share a block: "down_blocks.1.attentions.1.transformer_blocks.3.attn1.to_q"
    is to_q in "down_blocks.1.1.3". Trailing zeros are dropped.
    """
    match = _PREFIX.match(name)
    prefix = match[0] if match else ""
    words = _with_dots(name.removeprefix(prefix)).split(".")
    container, numbers, module_start = _find_block(words)
    module = ".".join(words[module_start:]) or words[-1]
    block = ".".join([container, *map(str, numbers)]) if container else ""
    parsed = LayerName(prefix, block, module)
    if parsed.text_encoder and block:
        return LayerName(prefix, f"{parsed.text_encoder} {block}", module)
    return parsed


def layer_sort_key(name: str) -> tuple[object, ...]:
    """Return a sort key: diffusion model before text encoders, blocks by number, then layers outside blocks."""
    parsed = parse_layer_name(name)
    return (
        parsed.text_encoder,
        parsed.prefix,
        not parsed.block,
        _number_aware_key(parsed.block),
        _number_aware_key(parsed.module),
    )


def block_kind(block: str) -> str:
    """Return a block's name without its numbers, such as "joint_blocks"."""
    return re.sub(r"(?:\.\d+)+$", "", block)


def _with_dots(name: str) -> str:
    """Put dots around the numbers of a kohya name: input_blocks_4_1_proj_in to input_blocks.4.1.proj_in."""
    if "." in name:
        return name
    return re.sub(r"(\.\d+)_", r"\1.", re.sub(r"_(\d+)(?=_|$)", r".\1", name))


def _find_block(words: list[str]) -> tuple[str, list[int], int]:
    """Return the outermost container ("" if none), the block's numbers, and the index of the module's first word."""
    container, numbers, module_start = "", list[int](), 0
    for index, (word, number) in enumerate(zip(words, words[1:], strict=False)):
        if not (number.isdecimal() and _BLOCK_CONTAINER.fullmatch(word)):
            continue
        if container and index != module_start:  # only containers that follow directly belong to the block
            continue
        container = container or ".".join(words[: index + 1])
        numbers.append(int(number))
        module_start = index + 2
        while module_start < len(words) - 1 and words[module_start].isdecimal():
            module_start += 1
    while len(numbers) > 1 and numbers[-1] == 0:
        numbers.pop()
    return re.sub(r"^text_model[._]encoder[._]", "", container), numbers, module_start


def _number_aware_key(text: str) -> tuple[tuple[int, str], ...]:
    return tuple((int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", text))
