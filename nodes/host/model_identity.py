"""What tells two MODELs apart besides their weights: options, wrappers and other patches."""

from __future__ import annotations

from typing import Any
from uuid import uuid4
from weakref import WeakKeyDictionary

from ...aclora_core.storage import UnhashableError, content_hash
from .encoding_keys import PATCHER_STATE, plain_patches

_names: WeakKeyDictionary[Any, str] = WeakKeyDictionary()


def model_identity(model: Any) -> str:
    """Return a text that is the same for two MODELs that compute alike with the same weights.

    Patches that are functions cannot be compared, so a MODEL with such patches is only like itself.
    """
    try:
        return content_hash([plain_patches(getattr(model, name, None)) for name in PATCHER_STATE])
    except UnhashableError:
        return _names.setdefault(model, uuid4().hex)
