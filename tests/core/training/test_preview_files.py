"""Previews as files: each set in its step's file, found again by a resumed training, bounded, and never another's."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from aclora_core.config import CheckpointConfig, TrainConfig
from aclora_core.training import PreviewFiles, Previews
from aclora_core.training.preview_files import MOST
from tests.support.toy import HELD_OUT, toy, train

pytestmark = pytest.mark.usefixtures("one_thread")

CONFIG = TrainConfig(steps=12, learning_rate=0.01, batch_size=4, max_rank=4, mode="off", held_out=0.0, smallest=False)
PROMPTS = ["a cat", "ein Bär „im Wald“"]


def images(level: float, *sizes: tuple[int, int]) -> list[torch.Tensor]:
    """Two images, the second darker. sizes: of each, height and width."""
    shapes = sizes or ((8, 6), (8, 6))
    return [torch.full((*shape, 3), level / (1 + place)) for place, shape in enumerate(shapes)]


def opened(root: Path, training: float, resumed: bool = False, **named) -> PreviewFiles:
    files = PreviewFiles(root, "ink", PROMPTS, **named)
    files.begin(training, resumed)
    return files


def names(files: PreviewFiles) -> list[str]:
    assert files.folder is not None
    return sorted(path.name for path in files.folder.iterdir())


def previews(files: PreviewFiles, every: int = 3) -> Previews:
    return Previews(every, lambda step: images(step / 100), files=files)


def test_a_set_comes_back_as_it_was_written(tmp_path: Path) -> None:
    files = opened(tmp_path, 1.5)
    files.write(50, images(1.0, (8, 6), (4, 10)))
    files.write(0, images(0.4))
    assert files.folder == tmp_path / "ink_00001" and names(files) == ["step_000000.png", "step_000050.png"]
    first, last = files.sets()
    assert (first.step, last.step) == (0, 50) and last.prompts == PROMPTS
    assert [tuple(image.shape) for image in last.images] == [(8, 6, 3), (4, 10, 3)]
    for found, wanted in zip(last.images + first.images, images(1.0, (8, 6), (4, 10)) + images(0.4), strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=0.51 / 255)


def test_large_images_are_read_small_and_kept_whole(tmp_path: Path) -> None:
    files = opened(tmp_path, 1.5)
    files.write(1, images(0.5, (300, 600), (300, 40)))
    (found,) = files.sets()
    assert [tuple(image.shape) for image in found.images] == [(128, 256, 3), (256, 34, 3)]
    with Image.open(tmp_path / "ink_00001" / "step_000001.png") as strip:
        assert strip.size == (640, 300)


def test_an_incomplete_set_is_left_out(tmp_path: Path) -> None:
    files = opened(tmp_path, 1.5)
    files.write(50, images(1.0)[:1])
    files.write(50, [])
    assert files.folder is None and not list(tmp_path.iterdir())


def test_a_training_goes_on_in_its_own_folder_and_a_new_one_gets_the_next(tmp_path: Path) -> None:
    for training in (1.5, 2.5):
        opened(tmp_path, training).write(1, images(training / 3))
    (tmp_path / "ink_00009").mkdir()
    (tmp_path / "inks_00020").mkdir()
    anew = opened(tmp_path, 1.5)  # the same settings, but not resumed
    anew.write(1, images(0.1))
    assert anew.folder == tmp_path / "ink_00010"
    resumed = opened(tmp_path, 2.5, resumed=True)
    resumed.write(2, images(0.2))
    assert resumed.folder == tmp_path / "ink_00002" and [each.step for each in resumed.sets()] == [1, 2]
    assert opened(tmp_path, 7.5, resumed=True).folder is None


def test_what_a_killed_server_left_half_written_is_cleared(tmp_path: Path) -> None:
    opened(tmp_path, 1.5).write(1, images(0.1))
    half = tmp_path / "ink_00001" / ".step_000002.png.17-abcd.partial"
    half.write_bytes(b"half")
    os.utime(half, (0, 0))
    assert names(opened(tmp_path, 1.5, resumed=True)) == ["step_000001.png"]


def test_a_folder_that_another_training_took_meanwhile_is_not_written_into(tmp_path: Path) -> None:
    first, second = opened(tmp_path, 1.5), opened(tmp_path, 2.5)
    first.write(1, images(0.1))
    second.write(1, images(0.2))
    assert (first.folder, second.folder) == (tmp_path / "ink_00001", tmp_path / "ink_00002")


def test_sets_are_thinned_evenly_and_the_first_last_and_protected_stay(tmp_path: Path) -> None:
    protected = {30, 330, 770}
    files = opened(tmp_path, 1.5, protected=lambda: protected)
    for step in range(0, 1010, 10):
        files.write(step, images(0.5))
    steps = [each.step for each in files.sets()]
    assert len(steps) == MOST == 24 and steps[0] == 0 and steps[-1] == 1000 and protected <= set(steps)
    gaps = [after - before for before, after in zip(steps, steps[1:], strict=False)]
    assert max(gaps) <= 4 * 1000 / MOST


def test_protected_sets_are_bounded_too(tmp_path: Path) -> None:
    files = opened(tmp_path, 1.5, protected=lambda: range(1000))
    for step in range(60):
        files.write(step, images(0.5))
    assert len(names(files)) == MOST and names(files)[-1] == "step_000059.png"


def test_damaged_and_foreign_files_are_left_out(tmp_path: Path) -> None:
    files = opened(tmp_path, 1.5)
    for step in (1, 2, 3):
        files.write(step, images(0.5))
    folder = tmp_path / "ink_00001"
    blob = (folder / "step_000002.png").read_bytes()
    (folder / "step_000002.png").write_bytes(blob[: len(blob) // 2])
    (folder / "step_000004.png").write_bytes(b"no image")
    (folder / "sheet.png").write_bytes(blob)
    assert [each.step for each in files.sets()] == [1, 3]


def test_sets_with_other_prompts_are_not_shown_together(tmp_path: Path) -> None:
    opened(tmp_path, 1.5).write(1, images(0.5))
    later = PreviewFiles(tmp_path, "ink", ["a dog"])
    later.begin(1.5, resumed=True)
    later.write(2, images(0.5)[:1])
    assert [each.step for each in later.sets()] == [2] and later.sets()[0].prompts == ["a dog"]


def test_a_full_disk_costs_the_set_and_not_the_training(tmp_path: Path, monkeypatch, caplog) -> None:
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("aclora_core.training.preview_files.write_atomically", fail)
    drawn = previews(PreviewFiles(tmp_path, "ink", PROMPTS))
    result = train(toy(8), CONFIG, previews=drawn)
    assert len(result.report.losses) == 12 and not drawn.failed and caplog.text.count("No space left") == 4
    told = "Some previews could not be saved: Free some space; training goes on and tries again."
    assert result.report.facts.notes == told


def test_a_cancelled_training_that_is_resumed_has_the_sets_from_before(tmp_path: Path) -> None:
    seen: list[int] = []
    checkpoints = CheckpointConfig(tmp_path / "checkpoints")
    first = previews(PreviewFiles(tmp_path, "ink", PROMPTS))
    train(
        toy(8), CONFIG, lambda p: seen.append(p.done), lambda: seen[-1:] == [7], checkpoints=checkpoints, previews=first
    )
    files = PreviewFiles(tmp_path, "ink", PROMPTS)
    more = replace(checkpoints, resume="for more steps")
    train(toy(8), replace(CONFIG, steps=15), checkpoints=more, previews=previews(files))
    assert [each.step for each in files.sets()] == [3, 6, 9, 12, 15]
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith("ink")] == ["ink_00001"]


def test_a_second_pass_replaces_the_sets_of_the_first(tmp_path: Path) -> None:
    config = replace(
        HELD_OUT, steps=24, learning_rate=0.05, batch_size=8, max_rank=4, restart_every=2, stop_early=False
    )
    files, drawn = PreviewFiles(tmp_path, "ink", PROMPTS), list[int]()

    def draw(step: int) -> list[torch.Tensor]:
        drawn.append(step)
        return images(len(drawn) / 100)

    result = train(toy(16), config, previews=Previews(4, draw, files=files))
    best = result.report.facts.best_step
    assert best is not None and 4 <= best < 24
    sets = files.sets()
    assert [each.step for each in sets] == [4, 8, 12, 16, 20, 24]
    order = [round(float(each.images[0].mean()) * 100) for each in sets]
    assert order == [6 + each.step // 4 if each.step <= best else each.step // 4 for each in sets]
