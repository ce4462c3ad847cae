"""Settings for all tests: few threads, and the same random examples in every run."""

import os
from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings

torch.set_num_threads(min(2, os.cpu_count() or 1))

# Deadlines measure the machine, not the code; derandomize lets a failure be seen again.
settings.register_profile("aclora", deadline=None, derandomize=True, max_examples=50, database=None)
settings.load_profile("aclora")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--gpu", action="store_true", help="have the ComfyUI servers of the tests compute on the GPU")


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """For matrices so small that a second thread only costs time."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
