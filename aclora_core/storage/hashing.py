"""Content hashes of nested values and of a network's weights, equal in every process."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from .nested import component_tensors

CHUNK = 1 << 20  # elements of a weight that are hashed together
COLUMNS = 1024  # 8-byte words in a row of the rectangle whose row and column sums are hashed

_SCALARS = (type(None), bool, int, float, str, bytes, torch.dtype, torch.device)


class UnhashableError(TypeError):
    """A value without hashable content, such as a function or a tensor on the meta device."""


def content_hash(*values: Any) -> str:
    """Hash nested values by content.

    Types count: 1, 1.0 and True differ, as do a list and a tuple. The order of a dict or a set does not.

    Args:
        values: scalars, strings, bytes, dtypes, devices, tensors, and lists, tuples, sets and dicts of them.

    Returns:
        32 hexadecimal digits.

    Raises:
        UnhashableError: a value of any other type is among them.
    """
    digest = hashlib.blake2b(digest_size=16)
    _feed(digest, values)
    return digest.hexdigest()


def weights_hash(weights: Iterable[tuple[str, Tensor, torch.dtype | None]]) -> str:
    """Hash a network's weights: names, shapes, dtypes and all values, whatever their order.

    Large tensors are reduced to sums on their own device, so a gigabyte takes a fraction of a second. No tensor is
    moved or changed.

    Args:
        weights: (name, tensor, dtype) of each weight. The dtype is the one it is used in, to which the host may convert
            it at any time; None stands for the dtype in which it is stored.

    Returns:
        32 hexadecimal digits.

    Raises:
        UnhashableError: a tensor has no plain values, for example on the meta device.
    """
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor, dtype in sorted(weights, key=lambda weight: weight[0]):
        for part in _plain_components(tensor):
            # Widening is exact, so a weight has the same hash before and after the host widens it.
            used = dtype if dtype is not None and part is tensor else part.dtype
            _write(digest, f"{name} {used} {tuple(part.shape)}")
            elements = part.detach().reshape(-1)
            _feed_bytes(digest, torch.cat([_checksums(chunk.to(used)) for chunk in elements.split(CHUNK)]))
    return digest.hexdigest()


def _feed(digest: Any, value: Any) -> None:
    _write(digest, type(value).__qualname__)
    if isinstance(value, _SCALARS):
        _write(digest, repr(value))
    elif isinstance(value, Tensor):
        for part in _plain_components(value):
            _write(digest, f"{part.dtype} {tuple(part.shape)}")
            _feed_bytes(digest, part)
    elif isinstance(value, list | tuple):
        _write(digest, str(len(value)))
        for item in value:
            _feed(digest, item)
    elif isinstance(value, set | frozenset):
        _feed(digest, sorted(content_hash(item) for item in value))
    elif isinstance(value, Mapping):
        _feed(digest, sorted((content_hash(key), content_hash(item)) for key, item in value.items()))
    else:
        raise UnhashableError(f"a {type(value).__qualname__} cannot be hashed by content")


def _write(digest: Any, text: str) -> None:
    """Hash a string after its length, so that ("ab", "c") and ("a", "bc") differ."""
    data = text.encode("utf-8", "surrogatepass")
    digest.update(len(data).to_bytes(8, "little") + data)


def _feed_bytes(digest: Any, tensor: Tensor) -> None:
    digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())


def _plain_components(tensor: Tensor) -> Iterator[Tensor]:
    """The strided, real tensors that a tensor is made of."""
    for part in component_tensors(tensor):
        if part.is_meta or part.layout != torch.strided or part.is_quantized or part.is_complex():
            raise UnhashableError(f"a tensor of {part.dtype} on {part.device} has no plain values")
        yield part


def _checksums(elements: Tensor) -> Tensor:
    """Row and column sums of the elements' bits, arranged as a rectangle of 8-byte words.

    A changed element changes two sums; two elements that swap places change at least two. Words that do not fill a row
    are returned as they are. Integer sums are the same on every device.
    """
    words = _words(elements)
    filled = len(words) // COLUMNS * COLUMNS
    rectangle = words[:filled].view(-1, COLUMNS)
    return torch.cat([rectangle.sum(0), rectangle.sum(1), words[filled:]]) if filled else words


def _words(elements: Tensor) -> Tensor:
    """The bits of a 1-D tensor as int64, padded with zeros."""
    data = elements.view(torch.uint8)
    missing = -len(data) % 8
    if missing or data.storage_offset() % 8 or data.data_ptr() % 8:
        data = torch.cat([data, data.new_zeros(missing)])
    return data.view(torch.int64)
