"""What is asked of a training while it runs: images and a file of the step, without an effect on its result."""

from __future__ import annotations

import threading
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from aclora_core.config import TrainConfig
from aclora_core.training import Candidates, PreviewFiles, Previews, Requests, Result, open_candidate_store
from aclora_core.training.progress import Progress
from tests.support.toy import HELD_OUT, toy, train

pytestmark = pytest.mark.usefixtures("one_thread")

CONFIG = TrainConfig(steps=12, learning_rate=0.01, batch_size=4, max_rank=4, mode="off", held_out=0.0, smallest=False)


def refuse(result: Result) -> str:
    raise AssertionError("nothing was to be saved")


def asking(requests: Requests, kind: str, after: int, answers: list[Future[str]]):
    """Return an on_step that asks once, after a step, from another thread."""

    def on_step(progress: Progress) -> None:
        if progress.step == after:
            thread = threading.Thread(target=lambda: answers.append(requests.ask(kind)))
            thread.start()
            thread.join()

    return on_step


def test_the_adapter_that_is_saved_is_that_of_a_training_of_this_length() -> None:
    saved, answers = list[Result](), list[Future[str]]()
    requests = Requests(lambda result: saved.append(result) or "Saved as ink.")
    whole = train(toy(16), CONFIG, asking(requests, "save", 4, answers), requests=requests)
    shorter = train(toy(16), TrainConfig(**{**vars(CONFIG), "steps": 5}))
    (now,) = saved
    assert answers[0].result(0) == "Saved as ink." and whole.report.facts.notes == "Saved as ink."
    assert torch.equal(now.adapter.layers["toy.attn"].lora_up, shorter.adapter.layers["toy.attn"].lora_up)
    assert now.report.facts.chosen_step == 5 and now.report.losses == shorter.report.losses
    plain = train(toy(16), CONFIG)
    assert torch.equal(plain.adapter.layers["toy.attn"].lora_up, whole.adapter.layers["toy.attn"].lora_up)


@pytest.mark.parametrize("held_out", [False, True])
def test_it_is_truncated_to_its_used_ranks_where_no_image_is_held_out(held_out: bool) -> None:
    settings = {**vars(HELD_OUT if held_out else CONFIG), "steps": 30, "learning_rate": 0.1, "max_rank": 8}
    settings |= {"smallest": True, "mode": "off", "batch_size": 8, "stop_early": False}
    saved, answers = list[Result](), list[Future[str]]()
    requests = Requests(lambda result: saved.append(result) or "")
    train(toy(16), TrainConfig(**settings), asking(requests, "save", 20, answers), requests=requests)
    rank, facts = saved[0].adapter.layers["toy.attn"].rank, saved[0].report.facts
    assert (rank == 8) is held_out and (facts.rank_after is None) is held_out
    assert held_out or facts.rank_after == rank


def test_a_file_that_cannot_be_saved_does_not_end_the_training(caplog: pytest.LogCaptureFixture) -> None:
    def fail(result: Result) -> str:
        raise OSError(28, "No space left on device")

    answers: list[Future[str]] = []
    requests = Requests(fail)
    result = train(toy(8), CONFIG, asking(requests, "save", 2, answers), requests=requests)
    told = "Step 3 could not be saved ([Errno 28] No space left on device); training goes on."
    assert answers[0].result(0) == told and result.report.facts.notes == told and told in caplog.text
    assert len(result.report.losses) == 12


def test_previews_that_are_asked_for_are_a_set_like_any_other_and_its_step_can_be_chosen(tmp_path: Path) -> None:
    model, answers, requests = toy(16), list[Future[str]](), Requests(refuse)
    store = open_candidate_store(tmp_path / "store", model, model, CONFIG)
    files = PreviewFiles(tmp_path / "aclora", "ink", ["a cat"])
    previews = Previews(1000, lambda step: [torch.full((8, 8, 3), step / 20)], files=files)
    on_step = asking(requests, "sample", 6, answers)
    train(model, CONFIG, on_step, previews=previews, candidates=Candidates(store, 12), requests=requests)
    assert answers[0].result(0) == "Previews of step 7 were drawn, and kept in aclora/ink_00001."
    assert [each.step for each in files.sets()] == [0, 2, 4, 6, 7, 8, 10, 12] and 7 in store.steps()


def test_previews_without_candidates_and_without_prompts() -> None:
    drawn, answers, requests = list[int](), list[Future[str]](), Requests(refuse)

    def draw(step: int) -> list[torch.Tensor]:
        drawn.append(step)
        return [torch.zeros(4, 4, 3)]

    train(toy(8), CONFIG, asking(requests, "sample", 2, answers), previews=Previews(1000, draw), requests=requests)
    assert drawn == [3] and answers.pop().result(0) == "Previews of step 3 were drawn."
    requests = Requests(refuse)
    train(toy(8), CONFIG, asking(requests, "sample", 2, answers), requests=requests)
    assert answers.pop().result(0) == "This training has no prompts to draw."


def test_previews_that_fail_are_told() -> None:
    def draw(step: int) -> list[torch.Tensor]:
        raise RuntimeError("out of memory")

    answers, requests = list[Future[str]](), Requests(refuse)
    on_step = asking(requests, "sample", 2, answers)
    result = train(toy(8), CONFIG, on_step, previews=Previews(1000, draw), requests=requests)
    assert answers[0].result(0).startswith("No previews of step 3 could be drawn")
    assert "out of memory" in result.report.facts.notes


def test_many_threads_that_ask_at_once_get_one_answer() -> None:
    requests = Requests(refuse)
    with ThreadPoolExecutor(16) as pool:
        futures = list(pool.map(lambda _: requests.ask("sample"), range(64)))
    assert len(set(map(id, futures))) == 1 and requests.is_open("sample") and not requests.is_open("save")
    requests.answer("sample", "Drawn.")
    assert futures[0].result(0) == "Drawn." and not requests.is_open("sample")
    assert requests.ask("sample") is not futures[0]


def test_what_is_asked_after_the_last_step_is_answered_at_once() -> None:
    requests = Requests(refuse)
    train(toy(8), CONFIG, requests=requests)
    assert requests.ask("save").result(0) == "The training has taken its last step; its result follows."


def test_after_the_end_everything_is_answered() -> None:
    requests = Requests(refuse)
    before = requests.ask("save")
    requests.end("Too late.")
    assert before.result(0) == requests.ask("save").result(0) == requests.ask("sample").result(0) == "Too late."
