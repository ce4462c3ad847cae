"""The image of the nearest pairs: each drawn image beside the images that it resembles most."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...aclora_core.evaluation import Nearest
from ...aclora_core.inspection import contact_sheet, extend

SHOWN = 12  # drawn images, at most


def nearest_sheet(
    nearest: Sequence[Nearest],
    drawn: Sequence[Tensor],
    references: Sequence[Tensor],
    training: Sequence[Tensor] | None,
    dark: bool,
) -> Tensor:
    """Draw the first images, each with its nearest training image, if there are any, and its nearest reference.

    Two stand side by side, the nearest at the upper left.

    Args:
        nearest: sorted, with indices of the images.
        drawn: (height, width, 3), and so the others.
        references: real images.
        training: what the LoRA was trained on; None if it is not known.
        dark: light letters on a dark background.

    Returns:
        (height, width, 3), 0 to 1.
    """
    shown = nearest[:SHOWN]
    columns = [shown[side::2] for side in range(2 if len(shown) > 1 else 1)]
    sheets = [_column(each, drawn, references, training, dark) for each in columns]
    return torch.cat([extend(sheet, sheets[0].shape[0]) for sheet in sheets], 1)


def _column(
    nearest: Sequence[Nearest],
    drawn: Sequence[Tensor],
    references: Sequence[Tensor],
    training: Sequence[Tensor] | None,
    dark: bool,
) -> Tensor:
    images: list[Tensor] = []
    captions: list[str] = []
    for each in nearest:
        images.append(drawn[each.drawn])
        captions.append(f"drawn {each.drawn + 1}" + (", a copy?" if each.copied else ""))
        if each.training and training:
            images.append(training[each.training.index])
            captions.append(f"training {each.training.index + 1}: {each.training.cosine:.3f}")
        images.append(references[each.reference.index])
        captions.append(f"reference {each.reference.index + 1}: {each.reference.cosine:.3f}")
    return contact_sheet(images, captions, columns=3 if training else 2, dark=dark)
