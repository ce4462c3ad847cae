"""Safetensors files written atomically, content hashes, tensors in nested values, and tensors as images."""

from .data_hash import data_sha256
from .hashing import UnhashableError, content_hash, weights_hash
from .nested import (
    as_parameter,
    component_tensors,
    map_components,
    map_tensors,
    put_tensors,
    take_tensors,
    tensors_in,
    to_device,
)
from .partial_files import clear_partial_files, reserved
from .pictures import to_pil
from .safetensors_file import (
    SAFETENSORS_SUFFIXES,
    read_safetensors,
    safetensors_size,
    write_advice,
    write_atomically,
    write_safetensors,
)

__all__ = [
    "as_parameter",
    "SAFETENSORS_SUFFIXES",
    "UnhashableError",
    "clear_partial_files",
    "component_tensors",
    "content_hash",
    "data_sha256",
    "map_components",
    "map_tensors",
    "put_tensors",
    "read_safetensors",
    "reserved",
    "safetensors_size",
    "take_tensors",
    "tensors_in",
    "to_device",
    "to_pil",
    "weights_hash",
    "write_advice",
    "write_atomically",
    "write_safetensors",
]
