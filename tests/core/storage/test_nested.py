"""Tensors in nested values: found in order, replaced in place, split off and put back."""

from __future__ import annotations

import json
from collections import namedtuple
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from aclora_core.storage.nested import map_tensors, put_tensors, take_tensors, tensors_in, to_device

Point = namedtuple("Point", "x y")


@dataclass(frozen=True)
class Pair:
    first: Any
    name: str


def scalar(number: float) -> Tensor:
    return torch.tensor(float(number))


def nested() -> dict[str, Any]:
    return {
        "list": [scalar(0), 5, "text"],
        "tuple": (scalar(1), None),
        "named": Point(scalar(2), 7),
        "pair": Pair({"deep": scalar(3)}, "name"),
        "shape": torch.Size([2, 3]),
        "type": Pair,
    }


def test_tensors_are_found_in_order() -> None:
    assert [int(tensor) for tensor in tensors_in(nested())] == [0, 1, 2, 3]
    assert list(tensors_in("text")) == []


def test_mapping_keeps_the_containers_and_all_else() -> None:
    before = nested()
    after = map_tensors(before, lambda tensor: tensor + 10)
    assert [int(tensor) for tensor in tensors_in(after)] == [10, 11, 12, 13]
    assert [int(tensor) for tensor in tensors_in(before)] == [0, 1, 2, 3]
    assert after["list"][1:] == [5, "text"] and after["tuple"][1] is None and after["named"].y == 7
    assert type(after["tuple"]) is tuple and type(after["named"]) is Point and type(after["shape"]) is torch.Size
    assert after["pair"].name == "name" and after["shape"] == torch.Size([2, 3]) and after["type"] is Pair


def test_every_tensor_moves_to_the_device() -> None:
    assert all(tensor.is_meta for tensor in tensors_in(to_device(nested(), torch.device("meta"))))


def test_split_off_tensors_are_named_by_their_path_and_put_back_after_json() -> None:
    weight = torch.arange(6.0).reshape(2, 3)
    state = {"optimizer": [{"exp_avg": weight.t(), "step": 3}], "shape": (2, 3), "none": None, "whole": weight}
    tensors: dict[str, Tensor] = {}
    structure = take_tensors(state, "", tensors)
    assert structure["optimizer"] == [{"exp_avg": {"tensor of the file": "/optimizer/0/exp_avg"}, "step": 3}]
    assert list(tensors) == ["/optimizer/0/exp_avg", "/whole"]
    assert all(tensor.is_contiguous() and tensor.data_ptr() != weight.data_ptr() for tensor in tensors.values())
    found = put_tensors(json.loads(json.dumps(structure)), tensors)
    assert found["shape"] == [2, 3] and found["none"] is None and found["optimizer"][0]["step"] == 3
    assert torch.equal(found["optimizer"][0]["exp_avg"], weight.t()) and torch.equal(found["whole"], weight)


def test_a_missing_tensor_is_an_error() -> None:
    with pytest.raises(KeyError, match="gone"):
        put_tensors([{"tensor of the file": "gone"}], {})
