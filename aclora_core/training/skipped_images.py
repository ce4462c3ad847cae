"""Images whose steps are all skipped, so that they teach nothing although the others do."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from ..diffusion import TrainingSet
from ..text import name_list

_LEAST = 8  # showings: by then an image is hardly ever with one that spoils its steps by chance alone


class SkippedImages:
    """Counts in how many steps each image was, and in how many that were not skipped.

    Args:
        images: of the training.
        indices: of the images to learn from; numbers in messages are positions in them, from 1.
    """

    def __init__(self, images: TrainingSet, indices: Sequence[int]) -> None:
        self._numbers: dict[int, int] = {}
        for number, index in enumerate(indices, start=1):
            for variant in images.variants.get(index, [index]):
                self._numbers[variant] = number
                if variant in images.without_caption:
                    self._numbers[images.without_caption[variant]] = number
        self._shown: Counter[int] = Counter()
        self._counted: set[int] = set()

    def record(self, indices: Iterable[int], counted: bool) -> None:
        """Take a step into account. indices: of its images. counted: whether its loss was finite."""
        numbers = {self._numbers[index] for index in indices if index in self._numbers}
        self._shown.update(numbers)
        if counted:
            self._counted |= numbers

    @property
    def sentence(self) -> str:
        """A sentence that names these images; empty if there are none."""
        left_out = sorted(it for it, shown in self._shown.items() if shown >= _LEAST and it not in self._counted)
        if not left_out or not self._counted:
            return ""
        names = f"Image {left_out[0]} and its caption" if len(left_out) == 1 else f"Images {name_list(left_out, 5)}"
        return (
            f"{names} could not be learned: every step with them was skipped, as its loss was not finite. Look at the "
            "image and its caption, or load the model in bf16 or fp32."
        )
