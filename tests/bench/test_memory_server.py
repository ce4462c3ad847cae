"""bench.memory.server: the prompts of both nodes, the time of a step, and rows that stay in the file."""

import pytest

from bench.memory import prompts
from bench.memory.server import OURS, Row, median_step, read, reported_step, save, table, times_of_steps
from bench.step_time.models import CASES

DEFINITIONS = {
    "ACLoRATrain": {"input": {"required": {"model": ["MODEL", {}], "steps": ["INT", {"default": 1000}]}}},
    "TrainLoraNode": {
        "input": {"required": {"model": ["MODEL"]}, "optional": {"offloading": ["BOOLEAN", {"default": False}]}}
    },
}


def test_both_nodes_get_the_same_model_and_images():
    ours = prompts.ours(DEFINITIONS, "file.safetensors", CASES["flux"], 30)
    native = prompts.native(DEFINITIONS, "file.safetensors", CASES["flux"], 10, {"offloading": True})
    assert ours["1"] == native["1"] and ours["2"] == native["2"]
    assert ours["2"]["inputs"]["pooled_width"] == 768
    trainer, other = ours["3"]["inputs"], native["3"]["inputs"]
    assert (trainer["steps"], trainer["batch_size"], trainer["max_rank"]) == (30, 1, 16)
    assert (other["steps"], other["rank"], other["offloading"]) == (10, 16, True)


def test_rows_that_are_not_measured_anew_stay(tmp_path):
    file = tmp_path / "rows.json"
    save([Row("sdxl", OURS, 8.0, ms=80.0), Row("sdxl", "native", 8.0, failure="out of memory")], file)
    save([Row("sdxl", OURS, 8.0, ms=70.0)], file)
    assert {(row.trainer, row.ms) for row in read(file)} == {(OURS, 70.0), ("native", None)}
    assert "out of memory" in table(read(file)) and "| 70 |" in table(read(file))


def test_without_a_file_there_are_no_rows(tmp_path):
    assert read(tmp_path / "missing.json") == []
    assert prompts.defaults(DEFINITIONS, "ACLoRATrain") == {"steps": 1000}
    with pytest.raises(KeyError):
        prompts.defaults(DEFINITIONS, "Unknown")


def test_the_time_of_a_step_is_the_median_after_the_warm_up():
    each = {2: 900, 3: 100, 4: 110, 5: 500}
    assert median_step(each, 2) == 110 and median_step(each, 4) == 500
    assert median_step(each, 5) is None and median_step({}, 0) is None


def test_steps_between_two_that_are_reported_have_equal_parts() -> None:
    assert times_of_steps({1: 10.0, 2: 10.5, 5: 11.1, 6: 12.0}) == {2: 500, 3: 200, 4: 200, 5: 200, 6: 900}
    assert times_of_steps({3: 1.0}) == times_of_steps({}) == {}


def test_the_time_of_our_steps_is_what_the_node_says() -> None:
    plan = "a step takes some 1.6 GB of 1.7 GB free, 0 of 88 blocks recomputed, about 76 ms a step."
    assert reported_step([plan, "77 ms a step."]) == 77
    assert reported_step([plan, "2.4 s a step.", "Out of memory: images go through one at a time."]) == 2400
    assert reported_step([plan]) is None
