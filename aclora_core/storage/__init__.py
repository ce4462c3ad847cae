"""Safetensors files written safely, hashes of tensors, and tensors in nested values."""

from .hashing import CannotHash, content_hash, weights_hash
from .nested import map_tensors, moved, plain_parts, put_tensors, take_tensors, tensors_in
from .safetensors_file import SUFFIXES, read_safetensors, write_atomically, write_safetensors

__all__ = [
    "CannotHash",
    "SUFFIXES",
    "content_hash",
    "map_tensors",
    "moved",
    "plain_parts",
    "put_tensors",
    "read_safetensors",
    "take_tensors",
    "tensors_in",
    "weights_hash",
    "write_atomically",
    "write_safetensors",
]
