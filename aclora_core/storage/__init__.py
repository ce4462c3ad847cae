"""Safetensors files written atomically, content hashes, and tensors in nested values."""

from .hashing import UnhashableError, content_hash, weights_hash
from .nested import component_tensors, map_tensors, put_tensors, take_tensors, tensors_in, to_device
from .safetensors_file import SAFETENSORS_SUFFIXES, data_sha256, read_safetensors, write_atomically, write_safetensors

__all__ = [
    "SAFETENSORS_SUFFIXES",
    "UnhashableError",
    "component_tensors",
    "content_hash",
    "data_sha256",
    "map_tensors",
    "put_tensors",
    "read_safetensors",
    "take_tensors",
    "tensors_in",
    "to_device",
    "weights_hash",
    "write_atomically",
    "write_safetensors",
]
