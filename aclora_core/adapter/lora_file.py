"""Read LoRA files in every key format that ComfyUI reads, and write them in ComfyUI's own."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from ..storage import data_sha256, read_safetensors, write_safetensors
from .adapter import Adapter, is_finite
from .file_layers import read_layers
from .metadata import OURS
from .state_dict import LoraStateDict, metadata_of, remarks_on, to_state_dict

_HASHES = ("sshs_model_hash", "modelspec.hash_sha256")

_CHANGED = (
    "Its numbers are not those of the SHA-256 in its own header: another program changed it after it was made, or it is"
    " damaged."
)


def load(path: str | Path) -> Adapter:
    """Read a LoRA file in any key format.

    Raises:
        FileNotFoundError, ValueError: the file is not usable, or holds no layer that is; the message names it.
    """
    try:
        return from_state_dict(read_lora(path))
    except ValueError as error:
        name = Path(path).name
        raise ValueError(str(error) if name in str(error) else f"{name}: {error}") from error


def read_lora(path: str | Path) -> LoraStateDict:
    """Read the tensors of a LoRA file under the keys that they have in it, with its metadata.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: it is not a safetensors file, or is damaged. A file of this package is damaged where its numbers do
            not have the SHA-256 in its header; for a file of another program that is a remark.
    """
    path = Path(path)
    tensors, metadata = read_safetensors(path)
    hashes = {metadata[key].lower().removeprefix("0x") for key in _HASHES if key in metadata}
    if not hashes or data_sha256(path) in hashes:
        return LoraStateDict(tensors, metadata)
    if OURS in metadata:
        raise ValueError(
            f"{path.name} is damaged: its numbers are not those that were saved, as the SHA-256 in its header shows."
            " Copy it from another place, or save it again."
        )
    return LoraStateDict(tensors, metadata, (_CHANGED,))


def save(adapter: Adapter, path: str | Path, metadata: Mapping[str, str]) -> None:
    """Write a LoRA file in ComfyUI's key format, atomically, each tensor in the type it has.

    Args:
        metadata: of the file, in place of adapter.metadata; two hashes of the tensors are added.

    Raises:
        ValueError: the adapter is empty or holds NaN or infinity, or the metadata does not fit into 1 MiB.
        OSError: the file cannot be written; the old file is unchanged.
    """
    state_dict = to_state_dict(adapter)
    if not state_dict:
        raise ValueError("The LoRA has no layers, so there is nothing to save. Connect a trained LoRA.")
    _check_finite(state_dict)
    write_safetensors(path, state_dict, metadata)


def from_state_dict(state_dict: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> Adapter:
    """Build an adapter from the tensors of a LoRA in any key format; they are not copied.

    A layer without an alpha takes that of the file's header; without one in the header it has the scale 1, as in
    ComfyUI. What cannot be used is left out and named in the adapter.

    Args:
        metadata: of the file; what travels with the tensors (LoraStateDict) if None.

    Raises:
        ValueError: there is no LoRA or no layer that can be used, or a tensor holds NaN or infinity.
    """
    if metadata is None:
        metadata = metadata_of(state_dict)
    _check_finite(state_dict)
    return read_layers(state_dict, dict(metadata), remarks_on(state_dict))


def _check_finite(tensors: Mapping[str, Tensor]) -> None:
    for key, tensor in tensors.items():
        if not is_finite(tensor):
            raise ValueError(
                f"'{key}' holds NaN or infinity, so the LoRA would spoil every image."
                " Use another file, or train again with a lower learning rate."
            )
