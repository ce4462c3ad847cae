"""Models that are unloaded during a step, as routes and threads of other node packs may do."""

from __future__ import annotations

import threading

import pytest
import torch

from tests.host.host.test_text_encoder import LEARNING
from tests.host.host.test_text_encoder import pictures as text_pictures
from tests.support import tiny_base as tiny
from tests.support.tiny_base import trained, untouched

parts, model, pictures = tiny.parts, tiny.model, text_pictures


@pytest.fixture
def unloading(pack, monkeypatch):
    """Unload every model from another thread before and after each forward pass; counts the unloads."""
    import comfy.model_management

    calls = []
    frozen = pack.nodes.host.model.HostModel
    real = frozen.denoise

    def unload():
        thread = threading.Thread(target=comfy.model_management.unload_all_models)
        thread.start()
        thread.join()
        calls.append(thread)

    def denoise(*inputs):
        unload()
        answer = real(*inputs)
        unload()
        return answer

    return calls, lambda: monkeypatch.setattr(frozen, "denoise", denoise)


def test_models_unloaded_during_a_step_stay_until_the_training_ends(pack, parts, pictures, unloading):
    import comfy.model_management

    calls, begin = unloading
    # With an adapter on them, which unloading would remove.
    with_adapter = trained(pack, parts[0], *pictures, clip=parts[1], **LEARNING)
    model, clip = with_adapter[0], with_adapter[4]
    alone = trained(pack, model, *pictures, clip=clip, **LEARNING)[1]
    begin()
    with untouched(model):
        disturbed = trained(pack, model, *pictures, clip=clip, **LEARNING)[1]
    assert len(calls) >= 2 * LEARNING["steps"] and alone.keys() == disturbed.keys()
    assert all(torch.equal(tensor, disturbed[key]) for key, tensor in alone.items())
    comfy.model_management.unload_all_models()
    assert not comfy.model_management.current_loaded_models
