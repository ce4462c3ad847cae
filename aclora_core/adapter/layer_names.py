"""Where a layer sits in its model: prefix, block and module, read from its name in any of the key formats."""

from __future__ import annotations

import re
from dataclasses import dataclass

_PREFIX = re.compile(
    r"(?:unet\.base_model\.model|base_model\.model|diffusion_model|transformer|unet|text_encoder(?:_\d+)?"
    r"|text_encoders\.[^.]+(?:\.transformer)?)\."
    r"|(?:lora_unet|lora_transformer|lora_prior_unet|lora_te\d*|lycoris)_"
)


_TEXT_ENCODER = re.compile(r"(?:lora_)?(te\d*)_$|text_encoders?\.([^.]+)|(text_encoder(?:_\d+)?)\.$")


# What holds numbered blocks. A numbered part of a module, as in "ff.net.0" or "in_layers.2", is no block.
_CONTAINER = re.compile(
    r"(?!(?:in|out|emb|skip)_layers)(?:\w*_)?(?:blocks?|layers?|attentions|resnets|upsamplers|downsamplers|refiner)"
)


@dataclass(frozen=True)
class Place:
    """Where a layer sits."""

    prefix: str  # "diffusion_model.", "lora_unet_", …; "" where the name has none that is known
    block: str  # "joint_blocks.3", "input_blocks.7.2" (third transformer of block 7), "te1 layers.0"; "" outside blocks
    module: str  # "x_block.attn.qkv"; the whole name without its prefix outside of blocks

    @property
    def label(self) -> str:
        """Block and module, for a chart."""
        return f"{self.block} {self.module}".strip()

    @property
    def part(self) -> str:
        """The name of the text encoder, or "" for a layer of the diffusion model."""
        match = _TEXT_ENCODER.match(self.prefix)
        return next(filter(None, match.groups())) if match else ""


def place_of(name: str) -> Place:
    """The place of a layer by its base name.

    A block is the outermost numbered container with its number, followed by the numbers of the containers directly in
    it, so that the layers of one depth come together: "down_blocks.1.attentions.1.transformer_blocks.3.attn1.to_q" is
    to_q in "down_blocks.1.1.3". Zeros at the end are left out.
    """
    match = _PREFIX.match(name)
    prefix = match[0] if match else ""
    rest = name.removeprefix(prefix)
    if "." not in rest:  # names of kohya's kind: input_blocks_4_1_proj_in
        rest = re.sub(r"(\.\d+)_", r"\1.", re.sub(r"_(\d+)(?=_|$)", r".\1", rest))
    words = rest.split(".")
    head, numbers, start = "", [], 0
    for at, (word, number) in enumerate(zip(words, words[1:], strict=False)):
        # Inside a block, only what follows directly is a container: the rest belongs to the module.
        if number.isdecimal() and _CONTAINER.fullmatch(word) and (not head or at == start):
            head = head or ".".join(words[: at + 1])
            numbers.append(int(number))
            start = at + 2
            while start < len(words) - 1 and words[start].isdecimal():
                start += 1
    while len(numbers) > 1 and numbers[-1] == 0:
        numbers.pop()
    head = re.sub(r"^text_model[._]encoder[._]", "", head)
    block = ".".join([head, *map(str, numbers)]) if head else ""
    place = Place(prefix, block, ".".join(words[start:]) or words[-1])
    return Place(prefix, f"{place.part} {block}", place.module) if place.part and block else place


def natural_order(name: str) -> tuple[object, ...]:
    """A key for sorting: the diffusion model before text encoders, blocks by their number, then what is in no block."""
    place = place_of(name)
    return (place.part, place.prefix, not place.block, _natural(place.block), _natural(place.module))


def block_kind(block: str) -> str:
    """A block's name without its numbers: "joint_blocks"."""
    return re.sub(r"(?:\.\d+)+$", "", block)


def _natural(text: str) -> tuple[tuple[int, str], ...]:
    return tuple((int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", text))
