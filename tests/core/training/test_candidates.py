"""Candidates: the adapters of several steps, kept as the training would have given them, bounded, never in its way."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from aclora_core.adapter import Adapter, with_dtype
from aclora_core.config import CheckpointConfig, TrainConfig
from aclora_core.storage import write_atomically
from aclora_core.training import CandidateStore, PreviewFiles, Previews, choose, nearest_step, open_candidate_store
from aclora_core.training.candidates import Candidates, candidate_steps
from aclora_core.training.compression import USED_RANKS, truncated
from aclora_core.training.progress import Progress, Result
from tests.support.toy import HELD_OUT, Toy, planted, toy, train

pytestmark = pytest.mark.usefixtures("one_thread")

PLAIN = TrainConfig(steps=16, learning_rate=0.01, batch_size=4, max_rank=4, mode="off", held_out=0.0, smallest=False)
HELD = replace(HELD_OUT, steps=24, learning_rate=0.05, batch_size=8, max_rank=4, restart_every=2, stop_early=False)


def store_of(root: Path, config: TrainConfig, model: Toy | None = None, identity: str = "") -> CandidateStore:
    model = model or toy(16)
    return open_candidate_store(root, model, model, config, identity)


def run(root: Path, config: TrainConfig, *more, wanted: tuple[int, ...] = (), **named) -> tuple[CandidateStore, Result]:
    store = store_of(root, config)
    return store, train(toy(16), config, *more, candidates=Candidates(store, config.steps, wanted), **named)


def chosen(store: CandidateStore, step: int, config: TrainConfig) -> Result:
    kept = store.read_result()
    assert kept is not None
    return choose(store, kept, step, config)


def assert_same(adapter: Adapter, other: Adapter) -> None:
    assert adapter.layers.keys() == other.layers.keys()
    for name, layer in adapter.layers.items():
        assert torch.equal(layer.lora_down, other.layers[name].lora_down)
        assert torch.equal(layer.lora_up, other.layers[name].lora_up)


def as_kept(adapter: Adapter) -> Adapter:
    return with_dtype(with_dtype(adapter, torch.float16), torch.float32)


def failing_write(*arguments: object) -> None:
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize(
    ("planned", "steps"),
    [(600, [75, 150, 225, 300, 375, 450, 525, 600]), (100, [13, 26, 39, 52, 65, 78, 91]), (3, [1, 2, 3]), (1, [1])],
)
def test_candidates_are_evenly_spaced(planned: int, steps: list[int]) -> None:
    assert candidate_steps(planned) == steps


@pytest.mark.parametrize("config", [PLAIN, replace(PLAIN, ema_decay=0.5)], ids=["plain", "EMA"])
def test_a_candidate_is_what_a_training_of_its_length_returns(tmp_path: Path, config: TrainConfig) -> None:
    store, result = run(tmp_path, config, wanted=(5,))
    assert store.steps() == [2, 4, 5, 6, 8, 10, 12, 14, 16]
    for step in (2, 5):
        shorter = train(toy(16), replace(config, steps=step))
        found = chosen(store, step, config)
        assert_same(found.adapter, as_kept(shorter.adapter))
        assert found.report.losses == shorter.report.losses and found.report.facts.chosen_step == step
        assert found.report.facts.epochs is None and found.report.signal == shorter.report.signal
    assert_same(result.adapter, train(toy(16), config).adapter)


def test_the_automatic_step_is_given_exactly(tmp_path: Path) -> None:
    store, result = run(tmp_path, HELD)
    kept = store.read_result()
    assert kept is not None and kept.step == result.report.facts.best_step and kept.truncation.name == "rank 2"
    for step in (0, kept.step):
        again = chosen(store, step, HELD)
        assert_same(again.adapter, result.adapter)
        assert again.report == result.report and again.report.facts.chosen_step is None


def test_candidates_are_truncated_as_the_result_is(tmp_path: Path) -> None:
    store, result = run(tmp_path, HELD)
    kept = store.read_result()
    assert kept is not None
    step = kept.steps[-1]
    whole, _ = store.read_step(step)
    found = chosen(store, step, HELD).adapter
    assert step > kept.step and whole.layers["toy.attn"].rank == 4
    assert found.layers["toy.attn"].rank == result.adapter.layers["toy.attn"].rank == 2
    assert_same(found, truncated(whole, kept.truncation))


def test_a_candidate_of_a_training_without_held_out_images_has_ranks_of_its_own(tmp_path: Path) -> None:
    config = replace(PLAIN, steps=64, batch_size=16, learning_rate=0.1, max_rank=8, smallest=True)
    model = toy(16, error=planted(8))
    store = store_of(tmp_path, config, model)
    result = train(model, config, candidates=Candidates(store, config.steps))
    kept = store.read_result()
    assert kept is not None and kept.truncation == USED_RANKS and kept.step == 64
    ranks = []
    for step in kept.steps[:-1]:
        found = chosen(store, step, config)
        assert_same(found.adapter, truncated(store.read_step(step)[0], USED_RANKS))
        ranks.append(found.adapter.layers["toy.attn"].rank)
        assert found.report.facts.rank_after == ranks[-1] and found.report.facts.rank_before == 8
    assert result.report.facts.rank_after == result.adapter.layers["toy.attn"].rank != ranks[0]


def test_the_second_pass_replaces_the_steps_of_the_first(tmp_path: Path) -> None:
    store, result = run(tmp_path / "both", HELD)
    first, _ = run(tmp_path / "first", replace(HELD, refit=False))
    assert store.steps() == [3, 6, 9, 12, 15, 18, 21, 24]
    best = result.report.facts.best_step
    assert best is not None and 3 < best < 24
    for step in (3, 24):
        (own, trajectory), (before, _) = store.read_step(step), first.read_step(step)
        same = torch.equal(own.layers["toy.attn"].lora_up, before.layers["toy.attn"].lora_up)
        assert same is (step > best)
        assert trajectory.stage == ("training on all" if step <= best else "training")


def test_the_last_and_the_returned_step_are_kept_besides(tmp_path: Path) -> None:
    config = replace(HELD, steps=1000, stop_early=True, learning_rate=0.2, refit=False)
    store, result = run(tmp_path, config)
    steps, last = store.steps(), len(result.report.losses)
    best = result.report.facts.best_step
    assert {best, last} <= set(steps) and len(steps) <= 10 and last < 1000


def test_a_cancelled_training_keeps_its_candidates(tmp_path: Path) -> None:
    seen: list[int] = []
    store, result = run(tmp_path, PLAIN, lambda progress: seen.append(progress.done), lambda: seen[-1:] == [7])
    assert result.report.facts.cancelled == "training" and store.steps() == [2, 4, 6, 7]
    assert_same(chosen(store, 7, PLAIN).adapter, result.adapter)
    found = chosen(store, 4, PLAIN)
    assert_same(found.adapter, as_kept(train(toy(16), replace(PLAIN, steps=4)).adapter))
    assert found.report.facts.cancelled is None


def test_a_resumed_training_keeps_those_before(tmp_path: Path) -> None:
    seen: list[int] = []
    checkpoints = CheckpointConfig(tmp_path / "checkpoints")
    root, whole = tmp_path / "resumed", run(tmp_path / "whole", HELD)[0]
    run(root, HELD, lambda p: seen.append(p.done), lambda: seen[-1:] == [10], checkpoints=checkpoints)
    assert store_of(root, HELD).steps()[:3] == [3, 6, 9]
    store, _ = run(root, HELD, checkpoints=checkpoints)
    assert store.steps() == sorted({*whole.steps(), 10})
    for step in whole.steps():
        assert_same(store.read_step(step)[0], whole.read_step(step)[0])


def test_a_training_that_starts_anew_has_none_yet(tmp_path: Path) -> None:
    run(tmp_path, PLAIN, wanted=(5,))
    store, _ = run(tmp_path, PLAIN)
    assert 5 not in store.steps()


def test_the_nearest_step_is_taken(tmp_path: Path) -> None:
    store, _ = run(tmp_path, PLAIN)
    kept = store.read_result()
    assert kept is not None
    assert [nearest_step(kept, step) for step in (0, 1, 3, 6, 1000)] == [16, 2, 2, 6, 16]
    assert chosen(store, 9, PLAIN).report.facts.chosen_step == 8


def test_only_what_is_learned_counts_for_the_key(tmp_path: Path) -> None:
    same = store_of(tmp_path, PLAIN)
    assert store_of(tmp_path, replace(PLAIN, graph=False, checkpointing="all")).folder == same.folder
    others = [store_of(tmp_path, replace(PLAIN, seed=1)), store_of(tmp_path, PLAIN, identity="another model")]
    others += [store_of(tmp_path, PLAIN, toy(15)), store_of(tmp_path, PLAIN, toy(16, error=torch.zeros(16, 16)))]
    assert len({store.folder for store in [same, *others]}) == 5


def test_only_the_last_trainings_are_kept(tmp_path: Path) -> None:
    stores = []
    for seed in range(5):
        store, _ = run(tmp_path, replace(PLAIN, seed=seed, steps=4))
        stores.append(store)
    assert [store.folder.is_dir() for store in stores] == [False, False, True, True, True]


def test_the_bytes_of_all_trainings_are_bounded(tmp_path: Path) -> None:
    result = train(toy(16), PLAIN)
    size = write_steps(CandidateStore(tmp_path / "one", "a"), result, 1)
    first = CandidateStore(tmp_path / "all", "a", max_bytes=5 * size)
    second = CandidateStore(tmp_path / "all", "b", max_bytes=5 * size)
    write_steps(first, result, 3)
    write_steps(second, result, 2)
    assert first.steps() == [1, 2, 3] and second.steps() == [1, 2]
    write_steps(second, result, 3)
    assert not first.folder.exists() and second.steps() == [1, 2, 3]
    write_steps(second, result, 7)
    assert second.steps() == [3, 4, 5, 6, 7]


def test_only_steps_that_are_there_can_be_chosen(tmp_path: Path) -> None:
    """The file of the result itself may take the place of a step."""
    result = train(toy(16), PLAIN)
    size = write_steps(CandidateStore(tmp_path / "one", "a"), result, 1)
    store = CandidateStore(tmp_path / "all", "a", max_bytes=5 * size)
    write_steps(store, result, 5)
    store.write_result(result, 5, USED_RANKS)
    kept = store.read_result()
    assert kept is not None and kept.steps == store.steps() and len(kept.steps) < 5


def write_steps(store: CandidateStore, result: Result, count: int) -> int:
    """Keep the adapter as steps 1 to `count`, and return the bytes of all files."""
    for step in range(1, count + 1):
        store.write_step(step, result.adapter, Progress(0).state_dict())
    return sum(path.stat().st_size for path in store.folder.iterdir())


def test_candidates_that_cannot_be_kept_do_not_end_the_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("aclora_core.training.candidate_store.write_atomically", failing_write)
    store, result = run(tmp_path, HELD)
    assert_same(result.adapter, train(toy(16), HELD).adapter)
    told = "Not all steps could be kept to choose from ([Errno 28] No space left on device); training goes on."
    assert result.report.facts.notes == told and caplog.text.count("Not all steps could be kept") == 1
    assert store.read_result() is None and store.steps() == []


def test_a_last_step_that_cannot_be_kept_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full_at_the_end(path: Path, chunks: Sequence[bytes]) -> None:
        if path.name == "step_0000016.safetensors":
            failing_write()
        write_atomically(path, chunks)

    monkeypatch.setattr("aclora_core.training.candidate_store.write_atomically", full_at_the_end)
    store, result = run(tmp_path, PLAIN)
    assert "Not all steps could be kept to choose from ([Errno 28]" in result.report.facts.notes
    assert store.read_result() is None and store.steps()


def test_a_step_can_be_shown_while_it_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    allowed = threading.Event()

    def slow(path: Path, chunks: Sequence[bytes]) -> None:
        assert allowed.wait(20)
        write_atomically(path, chunks)

    monkeypatch.setattr("aclora_core.training.candidate_store.write_atomically", slow)
    store = store_of(tmp_path, PLAIN)
    candidates = Candidates(store, 16)
    candidates.begin(resumed=False)
    candidates.keep(4, Adapter({}), Progress(16))
    assert store.steps_to_show() == {4} and store.steps() == []
    allowed.set()
    candidates.wait()
    assert store.steps_to_show() == {4} == set(store.steps()) and not store.coming


def test_damaged_and_missing_files_are_reported(tmp_path: Path) -> None:
    store, _ = run(tmp_path, PLAIN)
    kept = store.read_result()
    assert kept is not None
    (store.folder / "step_0000004.safetensors").write_bytes(b"damaged")
    with pytest.raises(ValueError, match="step_0000004.safetensors is not a safetensors file"):
        choose(store, kept, 4, PLAIN)
    (store.folder / "step_0000004.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="step_0000004.safetensors was not found"):
        choose(store, kept, 4, PLAIN)
    (store.folder / "result.safetensors").write_bytes(b"damaged")
    with pytest.raises(ValueError, match="result.safetensors"):
        store.read_result()


@pytest.mark.parametrize("place", [-1, 400])
def test_one_changed_bit_of_a_kept_step_is_found(tmp_path: Path, place: int) -> None:
    """The last byte belongs to the numbers, the other to the trajectory."""
    store, _ = run(tmp_path, PLAIN)
    for name, read in (("step_0000004", lambda: store.read_step(4)), ("result", store.read_result)):
        path = store.folder / f"{name}.safetensors"
        blob = bytearray(path.read_bytes())
        blob[place] ^= 1
        path.write_bytes(blob)
        with pytest.raises(ValueError, match="damaged"):
            read()


def test_images_are_drawn_before_the_training_and_with_every_candidate(tmp_path: Path) -> None:
    model = toy(16)
    plain = model.network["attn"](torch.eye(16))

    def draw(step: int) -> list[torch.Tensor]:
        assert not torch.is_grad_enabled()
        change = (model.network["attn"](torch.eye(16)) - plain).abs().max()
        return [torch.full((4, 4, 3), float(change.clamp(0, 1)))] * 2

    store = store_of(tmp_path, PLAIN)
    files = PreviewFiles(tmp_path / "previews", "ink", ["a cat", "a dog"])
    previews = Previews(1000, draw, share=0.01, files=files)
    train(model, PLAIN, previews=previews, candidates=Candidates(store, PLAIN.steps))
    drawn = files.sets()
    assert [each.step for each in drawn] == [0, *store.steps()] and previews.left_out == 0
    brightness = [float(each.images[0].mean()) for each in drawn]
    assert brightness[0] == 0 and brightness == sorted(brightness) and brightness[-1] > 0.1


def test_images_that_cannot_be_drawn_leave_the_candidates(tmp_path: Path) -> None:
    def draw(step: int) -> list[torch.Tensor]:
        raise RuntimeError("out of memory")

    store, result = run(tmp_path, PLAIN, previews=Previews(1000, draw))
    assert store.steps()[-1] == 16
    assert "no preview could be drawn (out of memory)" in result.report.facts.notes
