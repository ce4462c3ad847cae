"""Read LoRA files in every key format that ComfyUI reads, and write them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from ..storage import data_sha256, read_safetensors, write_safetensors
from .adapter import Adapter, is_finite, with_dtype
from .file_formats import FILE_FORMAT, FILE_NAMES, FormatChoice, in_comfyui_names, in_format
from .file_layers import read_layers
from .header_alpha import PEFT_SETTINGS
from .metadata import OURS, alphas_of_the_layers
from .names import BASE_MODEL, base_model_of
from .peft_header import peft_header
from .state_dict import LoraStateDict, metadata_of, remarks_on, to_file_tensors

_HASHES = ("sshs_model_hash", "modelspec.hash_sha256")

_CHANGED = (
    "Its numbers do not match the SHA-256 in its header: another program changed it after it was made, or it is "
    "damaged."
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
            f"{path.name} is damaged: its numbers do not match the SHA-256 in its header. Copy it again, or save it "
            "again."
        )
    return LoraStateDict(tensors, metadata, (_CHANGED,))


def save(adapter: Adapter, path: str | Path, metadata: Mapping[str, str]) -> None:
    """Write a LoRA file under the names that the layers have, atomically, each tensor in the type it has.

    Args:
        metadata: of the file, in place of adapter.metadata; two hashes of the tensors are added.

    Raises:
        ValueError: the adapter is empty or holds NaN or infinity, or the metadata does not fit into 1 MiB.
        OSError: the file cannot be written; the old file is unchanged.
    """
    state_dict = to_file_tensors(adapter)
    if not state_dict:
        raise ValueError("The LoRA has no layers, so there is nothing to save. Connect a trained LoRA.")
    _check_finite(state_dict)
    write_safetensors(path, state_dict, metadata)


def save_in_format(
    adapter: Adapter,
    path: str | Path,
    metadata: Mapping[str, str],
    file_format: FormatChoice = "automatic",
    dtype: torch.dtype | None = None,
) -> tuple[Adapter, str]:
    """Write a LoRA file in a format, as `save` does.

    Args:
        metadata: of the file, as build_metadata makes it of the adapter.
        file_format: "automatic" takes that of the file which the adapter was loaded from, else the one that most
            programs read for its model (docs/formats.md).
        dtype: of the factors in the file; None for the type they have.

    Returns:
        The adapter as the file has it, and a sentence for the user or "".

    Raises:
        ValueError: as `save`; or a layer has no name in the format, or does not fit into dtype. Nothing is written.
        OSError: the file cannot be written; the old file is unchanged.
    """
    written, remark = in_format(adapter, file_format, base_model_of(metadata, (*adapter.layers, *adapter.other)))
    if dtype is not None:
        written = with_dtype(written, dtype)
    save(written, path, file_metadata(written, metadata))
    return written, remark


def file_metadata(written: Adapter, metadata: Mapping[str, str]) -> dict[str, str]:
    """Return the metadata of a file, with what belongs to its format.

    Args:
        written: the adapter in the format (in_format).
        metadata: of the file without that.
    """
    facts = {key: written.metadata[key] for key in (FILE_FORMAT, BASE_MODEL, FILE_NAMES) if key in written.metadata}
    header = peft_header(written) if facts.get(FILE_FORMAT) == "diffusers" else {}
    return {**metadata, **facts, **alphas_of_the_layers(written), **header}


def from_state_dict(state_dict: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> Adapter:
    """Build an adapter from the tensors of a LoRA in any key format; they are not copied.

    A layer without an alpha takes that of the file's header; without one in the header it has the scale 1, as in
    ComfyUI. What cannot be used is left out and named in the adapter.

    Args:
        metadata: of the file; what travels with the tensors (LoraStateDict) if None.

    Raises:
        ValueError: there is no LoRA or no layer that can be used, or a tensor holds NaN or infinity.
    """
    metadata = dict(metadata_of(state_dict) if metadata is None else metadata)
    _check_finite(state_dict)
    if metadata.get(FILE_FORMAT, "ComfyUI") == "ComfyUI":
        return read_layers(state_dict, metadata, remarks_on(state_dict))
    metadata.pop(PEFT_SETTINGS, None)  # of a file of this package, whose scale is always 1 there
    adapter = read_layers(state_dict, metadata, remarks_on(state_dict))
    return in_comfyui_names(adapter)


def _check_finite(tensors: Mapping[str, Tensor]) -> None:
    for key, tensor in tensors.items():
        if not is_finite(tensor):
            raise ValueError(
                f"'{key}' holds NaN or infinity, so the LoRA would spoil every image."
                " Use another file, or train again with a lower learning rate."
            )
