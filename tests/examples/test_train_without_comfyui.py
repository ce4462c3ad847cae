"""The example of a training without ComfyUI, run as a user runs it."""

import os
import re
import subprocess
import sys
from pathlib import Path

from aclora_core import load
from launcher.environment import ROOT

SCRIPT = ROOT / "docs" / "examples" / "train_without_comfyui.py"


def test_it_lowers_the_loss_and_saves_a_lora_with_every_layer(tmp_path: Path) -> None:
    path = tmp_path / "style.safetensors"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "utf-8", "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [sys.executable, str(SCRIPT), str(path)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        encoding="utf-8",
        timeout=300,
    )
    assert run.returncode == 0, run.stderr
    (losses,) = re.findall(r"([\d.]+) before, ([\d.]+) after", run.stdout)
    before, after = map(float, losses)
    assert after < 0.5 * before
    assert str(path) in run.stdout
    layers = load(path).layers
    assert list(layers) == ["diffusion_model.0", "diffusion_model.2", "diffusion_model.4"]
    assert all(layer.lora_up.any() for layer in layers.values())


def test_it_fits_on_a_page() -> None:
    assert len(SCRIPT.read_text(encoding="utf-8").splitlines()) <= 60
