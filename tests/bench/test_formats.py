"""bench.formats on the CPU: a format trains with about the loss of the unquantised weights, and a failure is a row."""

import pytest
import torch

from bench import formats


@pytest.fixture(scope="module")
def rows(pack):
    names = [formats.UNQUANTISED, "int8 row"]
    return list(formats.measured_rows(pack, torch.device("cpu"), names, steps=2))


def test_a_format_has_about_the_loss_of_the_unquantised_weights(rows):
    plain, quantised = rows
    assert not plain.failure and not quantised.failure
    assert quantised.loss == pytest.approx(plain.loss, rel=0.02) and quantised.loss != plain.loss
    assert len(plain.milliseconds) == 2


def test_a_failure_stands_in_the_table(rows, pack, monkeypatch):
    def fail(*_):
        raise ValueError("no such format")

    monkeypatch.setattr(formats, "train", fail)
    failed = formats.measured_rows(pack, torch.device("cpu"), [formats.UNQUANTISED], steps=2)
    assert "no such format" in formats.table([rows[0], *failed])
