"""One process alone: nothing is sent, and everything stays as it is."""

from __future__ import annotations

import pytest
import torch

from aclora_core.distributed import ALONE, Processes, join


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"RANK": "1", "WORLD_SIZE": "2"},  # as other programs set it
        {"RANK": "0", "WORLD_SIZE": "1", "TORCHELASTIC_RUN_ID": "none"},
    ],
)
def test_without_torchrun_a_process_is_alone(environment: dict[str, str]) -> None:
    assert join(environment) is ALONE and ALONE.size == 1 and ALONE.is_first


def test_alone_everything_stays_as_it_is() -> None:
    tensor = torch.tensor([1.0, torch.nan])
    before = tensor.clone()
    ALONE.sum_(tensor)
    ALONE.copy_from_first_(tensor)
    ALONE.call_for_help(None)
    assert torch.equal(tensor.nan_to_num(), before.nan_to_num())
    value = object()
    assert ALONE.from_first(value) is value and ALONE.told_by_first(value) is value and ALONE.gather(value) == [value]
    assert ALONE.any(True) and not ALONE.any(False)
    items = [1, 2, 3]
    assert ALONE.share(items) == items
    with pytest.raises(ValueError, match="mine"), ALONE.failing_together():
        raise ValueError("mine")


@pytest.mark.parametrize("size", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("count", [0, 1, 2, 5, 8])
def test_shares_follow_each_other_and_differ_by_one_at_most(size: int, count: int) -> None:
    shares = [Processes(rank, size).share(range(count)) for rank in range(size)]
    assert [item for share in shares for item in share] == list(range(count))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
