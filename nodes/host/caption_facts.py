"""What the dataset node recorded about captions, for the names and the metadata of files."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from ...aclora_core.dataset import split_tags
from .private_keys import CAPTION_KEY, DATASET, TRIGGER, VARIANT_KEY

_LONGEST_TAG = 200  # characters; a whole caption is a tag where it has no comma


def trigger_word(conditioning: Sequence[Any]) -> str:
    """Return the trigger word of the dataset; "" if there is none, or the conditioning has another source."""
    return _recorded(conditioning, TRIGGER)


def dataset_name(conditioning: Sequence[Any]) -> str:
    """Return the name of the dataset's folder; "" if the conditioning has another source."""
    return _recorded(conditioning, DATASET)


def tag_counts(latents: Sequence[dict[str, Any]], conditioning: Sequence[Any]) -> dict[str, int]:
    """Return the number of style images whose captions have a tag, by tag, the commonest first.

    Tags are what commas outside brackets separate, much as in kohya's ss_tag_frequency. Repeats of an image count; its
    variants do not.

    Args:
        latents: LATENTs of one image each, with what the dataset node recorded.
        conditioning: of each of them.
    """
    tags_of: dict[Any, set[str]] = {}
    for number, (latent, entries) in enumerate(zip(latents, conditioning, strict=False)):
        variant = latent.get(VARIANT_KEY, {})
        if "regularisation" not in variant:
            image = variant.get("picture", ("single", number))
            tags_of.setdefault(image, set()).update(_tags(entries[0][1].get(CAPTION_KEY, "")))
    return dict(Counter(tag for tags in tags_of.values() for tag in sorted(tags)).most_common())


def _recorded(conditioning: Sequence[Any], key: str) -> str:
    return next(filter(None, (more.get(key, "") for entries in conditioning for _, more in entries)), "")


def _tags(caption: str) -> list[str]:
    return [tag if len(tag) <= _LONGEST_TAG else f"{tag[:_LONGEST_TAG]}…" for tag in split_tags(caption)]
