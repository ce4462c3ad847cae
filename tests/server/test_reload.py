"""A MODEL with streamed weights from a loader without a reload function, in the real server."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.support.host_server import HostServer
from tests.support.server_runs import adapter
from tests.support.trouble import TRAIN, drawing, held, let_go, prompt, same_bits

LOADER = "loader"


@pytest.fixture
def streaming(probed: HostServer, gpu: bool) -> HostServer:
    """A server that streams weights, without models in memory."""
    if not gpu:
        pytest.skip("ComfyUI streams weights only on a GPU: run pytest with --gpu")
    let_go(probed)
    return probed


def loaded_without_word(server: HostServer, base: dict[str, Any], node: str) -> dict[str, Any]:
    """Return the prompt with the MODEL of this node from such a loader."""
    base[node]["inputs"]["model"] = [LOADER, 0]
    return {**base, LOADER: server.node("LoadWithoutWord", model=["base", 0])}


def drawn(server: HostServer, name: str) -> np.ndarray:
    history = server.run(loaded_without_word(server, drawing(server, name), "draw"))
    if history["outputs"][LOADER]["text"] != ["streamed"]:
        pytest.skip("this ComfyUI does not stream weights: comfy-aimdo does not work here")
    (path,) = server.images(history)
    with Image.open(path) as image:
        return np.asarray(image)


def test_a_streamed_model_without_a_reload_function_is_trained_and_unchanged(streaming: HostServer) -> None:
    before = drawn(streaming, "streamed_before")
    (network,) = held(streaming)["networks"]
    streaming.run(loaded_without_word(streaming, prompt(streaming, "streamed", seed=6), TRAIN))
    assert held(streaming)["networks"] == [network]
    let_go(streaming)
    assert np.array_equal(drawn(streaming, "streamed_after"), before)
    streaming.run(prompt(streaming, "with_word", seed=6))
    assert same_bits(adapter(streaming, "streamed"), adapter(streaming, "with_word"))
