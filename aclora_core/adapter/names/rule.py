"""Names of one layer in the three formats of LoRA files, and how the rows of its up factor are spread."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache

COMFYUI_MODEL = "diffusion_model."
COMFYUI_TEXT = "text_encoders."
KOHYA_MODEL = "lora_unet_"


@dataclass(frozen=True)
class NameRule:
    """The names of one kind of layer, with its prefix. "*" stands for a number that all names share."""

    comfyui: str
    kohya: str
    diffusers: tuple[str, ...] = ()  # several where one layer of ComfyUI is a stack of diffusers'; () if it has no name
    shares: tuple[int, ...] = (1,)  # of the rows of lora_up that go to each of them
    swapped: bool = False  # whether the two halves of the rows change places in diffusers


@dataclass(frozen=True)
class Match:
    """A rule that fits a name."""

    rule: NameRule
    numbers: tuple[str, ...]  # for the stars
    index: int = 0  # which of the rule's names for diffusers it is

    def fill(self, pattern: str) -> str:
        """Return a pattern of the rule with the numbers in place of its stars."""
        return pattern.replace("*", "{}").format(*self.numbers)


class Names:
    """A lookup from names to rules.

    Args:
        patterns: each with its rule, and its index among the rule's names.
    """

    def __init__(self, patterns: Iterable[tuple[str, NameRule, int]]) -> None:
        # By the name with every number starred, so that few expressions are tried for each name.
        self._found: dict[str, list[tuple[re.Pattern[str], NameRule, int]]] = {}
        for pattern, rule, index in patterns:
            expression = re.compile(re.escape(pattern).replace(r"\*", r"(\d+)"))
            self._found.setdefault(_starred(pattern), []).append((expression, rule, index))

    def find(self, name: str) -> Match | None:
        """Return the rule for a name, or None."""
        for expression, rule, index in self._found.get(_starred(name), ()):
            if match := expression.fullmatch(name):
                return Match(rule, match.groups(), index)
        return None


def _starred(name: str) -> str:
    return re.sub(r"\d+", "*", name)


def kohya_name(comfyui: str) -> str:
    """Return kohya's name of a layer of the diffusion model: ComfyUI's with underscores."""
    return KOHYA_MODEL + comfyui.removeprefix(COMFYUI_MODEL).replace(".", "_")


def cached_names(select: Callable[[NameRule], Iterable[str]]) -> Callable[[tuple[NameRule, ...]], Names]:
    """Return a function from rules to the lookup of the names that `select` takes from each, built once."""

    @cache
    def names(rules: tuple[NameRule, ...]) -> Names:
        return Names((name, rule, index) for rule in rules for index, name in enumerate(select(rule)))

    return names


by_comfyui = cached_names(lambda rule: (rule.comfyui,))
by_kohya = cached_names(lambda rule: (rule.kohya,))
by_diffusers = cached_names(lambda rule: rule.diffusers)
