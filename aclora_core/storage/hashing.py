"""Hashes of nested values and of a network's weights: equal content gives equal text in every process."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from .nested import component_tensors

RUN = 1 << 20  # numbers of a weight that are looked at together


SIDE = 1024  # of the rows in which they are summed up, in words of eight bytes


_SCALARS = (type(None), bool, int, float, str, bytes, torch.dtype, torch.device)


class UnhashableError(TypeError):
    """The content of a value cannot be told, such as a function's."""


def content_hash(*values: Any) -> str:
    """32 hexadecimal digits of numbers, texts, tensors, and lists, tuples, sets and dicts of them.

    Kinds count too: 1, 1.0 and True differ, as do a list and a tuple. The order of a dict or a set does not.

    Raises:
        CannotHash: anything else is among them.
    """
    digest = hashlib.blake2b(digest_size=16)
    _feed(digest, values)
    return digest.hexdigest()


def weights_hash(weights: Iterable[tuple[str, Tensor, torch.dtype | None]]) -> str:
    """A hash of a network's weights: names, shapes, kinds of number, and every value.

    weights: name, tensor, and the kind of number it is used as, which a host may convert it to at any time; None leaves
    it as stored. Of large tensors sums are hashed, made where the tensor lies; a gigabyte takes a fraction of a second.
    No tensor is moved or changed.

    Raises:
        CannotHash: a tensor has no values, as on the meta device.
    """
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor, dtype in sorted(weights, key=lambda weight: weight[0]):
        for part in _with_numbers(tensor):
            # Widening is exact, so a weight hashes alike before and after the host has widened it.
            used = dtype if dtype is not None and part is tensor else part.dtype
            _write(digest, f"{name} {used} {tuple(part.shape)}")
            numbers = part.detach().reshape(-1)
            _feed_bytes(digest, torch.cat([_sums(run.to(used)) for run in numbers.split(RUN)]))
    return digest.hexdigest()


def _feed(digest: Any, value: Any) -> None:
    _write(digest, type(value).__qualname__)
    if isinstance(value, _SCALARS):
        _write(digest, repr(value))
    elif isinstance(value, Tensor):
        for part in _with_numbers(value):
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
        raise UnhashableError(f"the content of a {type(value).__qualname__} cannot be told")


def _write(digest: Any, text: str) -> None:
    """With its length in front, so that no two rows of texts look alike."""
    data = text.encode("utf-8", "surrogatepass")
    digest.update(len(data).to_bytes(8, "little") + data)


def _feed_bytes(digest: Any, tensor: Tensor) -> None:
    digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())


def _with_numbers(tensor: Tensor) -> Iterator[Tensor]:
    for part in component_tensors(tensor):
        if part.is_meta or part.layout != torch.strided or part.is_quantized or part.is_complex():
            raise UnhashableError(f"a tensor of {part.dtype} on {part.device} has no plain numbers")
        yield part


def _sums(numbers: Tensor) -> Tensor:
    """The bits of a row of numbers as words of eight bytes, summed up along the rows and the columns of a rectangle.

    A number that changes changes two sums, two that change places at least two. What does not fill a row of the
    rectangle is given as it is. Sums of whole numbers are the same on every device.
    """
    words = _words(numbers)
    filled = len(words) // SIDE * SIDE
    rectangle = words[:filled].view(-1, SIDE)
    return torch.cat([rectangle.sum(0), rectangle.sum(1), words[filled:]]) if filled else words


def _words(numbers: Tensor) -> Tensor:
    """The bits of a row of numbers as whole numbers of eight bytes, with zeros after the last."""
    data = numbers.view(torch.uint8)
    missing = -len(data) % 8
    if missing or data.storage_offset() % 8 or data.data_ptr() % 8:
        data = torch.cat([data, data.new_zeros(missing)])
    return data.view(torch.int64)
