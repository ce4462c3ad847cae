"""The folder that the tests of the dataset node read."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from tests.support.dataset_calls import draw


@pytest.fixture
def folder(pack: ModuleType) -> Iterator[Path]:
    """Three images with two captions, and an empty cache."""
    import folder_paths

    shutil.rmtree(pack.nodes.host.encoding_keys.cache_folder(), ignore_errors=True)
    path = Path(folder_paths.get_input_directory(), "kept")
    path.mkdir(parents=True)
    for number, caption in enumerate(("a rocket", "a cat", "a cat")):
        draw(path / f"{number}.png", number)
        (path / f"{number}.txt").write_text(caption)
    yield path
    shutil.rmtree(path)
