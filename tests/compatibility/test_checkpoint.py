"""Checkpoints that version 0.3.0 wrote are resumed, and give the adapter that 0.3.0 gives."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from aclora_core.adapter import build_metadata, to_state_dict
from aclora_core.config import CheckpointConfig
from aclora_core.training import Result
from tests.support.toy import HELD_OUT, toy, train

pytestmark = pytest.mark.usefixtures("one_thread")

FILES = Path(__file__).parent / "files"
EXPECTED: dict[str, Any] = json.loads((FILES / "resumed.json").read_text(encoding="utf-8"))
DEFAULTS = replace(HELD_OUT, layers="attention and feed-forward")  # of 0.3.0, where they were others
FIRST_STEP = {"first_pass": 10, "refit": 24 + 11}  # the step after the checkpoint, counted over both passes


def probe() -> dict[str, Tensor]:
    """Arithmetic like that of a training. A machine that rounds it otherwise also trains to other last bits."""
    generator = torch.Generator().manual_seed(5)
    x, w = torch.randn(8, 16, generator=generator), torch.randn(16, 16, generator=generator)
    return {
        "draws": torch.randn(37, generator=generator, dtype=torch.float64),
        "product": x @ w.T,
        "gram": x.double().T @ x.double(),
        "eigenvalues": torch.linalg.eigvalsh(w.double().T @ w.double()),
        "functions": torch.cat([x.exp().sum(0), x.square().sum(0).sqrt(), x.sigmoid().mean(0)]),
    }


def rounds_as_the_machine_of_the_files() -> bool:
    expected = load_file(FILES / "probe.safetensors")
    return all(torch.equal(tensor, expected[name]) for name, tensor in probe().items())


def resumed(folder: Path, steps: list[int], **settings: Any) -> Result:
    """The end of the training in a folder; the numbers of the steps that it took go into `steps`."""
    config = replace(DEFAULTS, **EXPECTED["settings"] | settings)
    return train(toy(16), config, lambda p: steps.append(p.done), checkpoints=CheckpointConfig(folder))


@pytest.fixture(params=FIRST_STEP)
def stage(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def folder(stage: str, tmp_path: Path) -> Path:
    """A copy of a checkpoint folder, since a training deletes the older checkpoints in it."""
    return Path(shutil.copytree(FILES / stage, tmp_path / stage))


def test_training_continues_to_the_adapter_of_0_3_0(stage: str, folder: Path) -> None:
    steps: list[int] = []
    result = resumed(folder, steps)
    assert steps[0] == FIRST_STEP[stage]
    written = json.loads(build_metadata(result.adapter, "ink", result.report)["aclora.settings"])
    assert written.items() >= EXPECTED["facts"].items()
    expected, found = load_file(FILES / "resumed.safetensors"), to_state_dict(result.adapter)
    assert found.keys() == expected.keys()
    rtol, atol = (0.0, 0.0) if rounds_as_the_machine_of_the_files() else (1e-3, 1e-4)
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=rtol, atol=atol)


def test_losses_continue_as_in_0_3_0(folder: Path) -> None:
    report = resumed(folder, []).report
    tolerance = 0.0 if rounds_as_the_machine_of_the_files() else 1e-3
    assert report.losses == pytest.approx(EXPECTED["losses"], rel=tolerance, abs=0)
    assert [step for step, _ in report.validation] == [step for step, _ in EXPECTED["validation"]]
    expected = [loss for _, loss in EXPECTED["validation"]]
    assert [loss for _, loss in report.validation] == pytest.approx(expected, rel=tolerance, abs=0)


def test_another_setting_is_named_as_it_was_saved(folder: Path) -> None:
    """The names of settings are keys of the file."""
    with pytest.raises(ValueError, match=r"restart_every was 2 and is 3"):
        resumed(folder, [], restart_every=3)
