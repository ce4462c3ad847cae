"""The chart that a node shows of a LoRA: what its bars stand for, and odd LoRAs."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import ImageColor

from aclora_core.inspection import inspect_lora, overview_chart
from aclora_core.inspection.charts.canvas import LIGHT
from aclora_core.inspection.charts.overview import rank_chart


def lora(ranks: dict[str, tuple[int, int]]) -> dict[str, torch.Tensor]:
    """Layers by name: components that count, and the rank in the file, whose rest is next to nothing."""
    found = {}
    for name, (used, rank) in ranks.items():
        sizes = torch.tensor([1.0] * used + [1e-3] * (rank - used))
        found[f"{name}.lora_up.weight"] = torch.eye(40, rank) * sizes
        found[f"{name}.lora_down.weight"] = torch.eye(rank, 40)
        found[f"{name}.alpha"] = torch.tensor(float(rank))
    return found


def heights(ranks: dict[str, tuple[int, int]], colour: str) -> list[int]:
    """Pixels of this colour in the middle of each block's bar, without the legend."""
    chart = np.asarray(overview_chart(inspect_lora(lora(ranks))), dtype=int)[96:]
    same = np.abs(chart - ImageColor.getrgb(colour)).max(-1) <= 8
    left, right = 56, 496  # of the axes, whose bars are one wide, with 0.1 to spare at either side
    wide = (right - left) / (len(ranks) + 0.2)
    return [int(same[:, round(left + wide * (place + 0.6))].sum()) for place in range(len(ranks))]


def test_a_bar_is_the_used_rank_before_the_rank_in_the_file() -> None:
    ranks = {f"diffusion_model.joint_blocks.{n}.attn.qkv": (used, 16) for n, used in enumerate((4, 8, 16))}
    used, rest = heights(ranks, LIGHT.first), heights(ranks, LIGHT.grid)
    assert used[1] == pytest.approx(2 * used[0], abs=3) and used[2] == pytest.approx(4 * used[0], abs=4)
    assert used[0] + rest[0] == pytest.approx(used[2], abs=4)


def test_a_block_is_the_mean_of_its_layers() -> None:
    blocks = {"joint_blocks.0.a": (2, 16), "joint_blocks.0.b": (14, 16), "joint_blocks.1.a": (8, 16)}
    chart = heights({f"diffusion_model.{name}": ranks for name, ranks in blocks.items()}, LIGHT.first)
    assert len({chart[0], chart[2]} - {0}) == 1  # two blocks, so the outer thirds are the two bars


def test_many_blocks_and_layers_outside_blocks_are_drawn() -> None:
    many = {f"diffusion_model.input_blocks.{n}.1.proj_in": (3, 8) for n in range(90)}
    for ranks in (many, {"somewhere": (1, 1)}):
        assert overview_chart(inspect_lora(lora(ranks)), dark=True).size == (512, 320)


def test_without_plain_layers_it_says_what_there_is() -> None:
    other = {"x.hada_w1_a": torch.ones(4, 2), "x.hada_w1_b": torch.ones(2, 4)}
    other |= {"x.hada_w2_a": torch.ones(4, 2), "x.hada_w2_b": torch.ones(2, 4), "x.alpha": torch.tensor(2.0)}
    assert np.asarray(overview_chart(inspect_lora(other))).min() < 100
    with pytest.raises(ValueError, match="no plain LoRA layer"):
        rank_chart([])
