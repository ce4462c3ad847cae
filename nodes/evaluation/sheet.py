"""The image of the nearest pairs: each drawn image beside the images that it resembles most."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ...aclora_core.evaluation import Nearest
from ...aclora_core.inspection import contact_sheet

ROWS = 12  # at most


def nearest_sheet(
    nearest: Sequence[Nearest], drawn: Sequence[Tensor], references: Sequence[Tensor], training: Sequence[Tensor] | None
) -> Tensor:
    """Draw the first rows: a drawn image, its nearest training image if there are any, and its nearest reference.

    Args:
        nearest: sorted, with indices of the images.
        drawn: (height, width, 3), and so the others.
        references: real images.
        training: what the LoRA was trained on; None if it is not known.

    Returns:
        (height, width, 3), 0 to 1.
    """
    images: list[Tensor] = []
    captions: list[str] = []
    for each in nearest[:ROWS]:
        images.append(drawn[each.drawn])
        captions.append(f"drawn {each.drawn + 1}" + (", a copy?" if each.copied else ""))
        if each.training and training:
            images.append(training[each.training.index])
            captions.append(f"training {each.training.index + 1}: {each.training.cosine:.3f}")
        images.append(references[each.reference.index])
        captions.append(f"reference {each.reference.index + 1}: {each.reference.cosine:.3f}")
    return contact_sheet(images, captions, columns=3 if training else 2)
