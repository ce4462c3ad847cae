"""A model whose weights fit, while no step fits beside them, is streamed; what does not fit then either is refused."""

import importlib

import pytest

from tests.support.tiny_base import model, parts, pictures, trained  # noqa: F401


@pytest.fixture
def tries(pack, monkeypatch):
    """Whether the weights were streamed, at each plan; whole weights leave too little memory."""
    memory = importlib.import_module(f"{pack.__name__}.aclora_core.training.memory")
    found: list[bool] = []

    def make(plan):
        found.append(plan.adapted.model.weight_stream is not None)
        if not found[-1] or refused:
            raise memory.TooLittleMemoryError(10**9, plan.adapted)

    refused: list[bool] = []
    monkeypatch.setattr(pack.nodes.host.loading, "fits", lambda patcher, limits: not limits.stream)
    monkeypatch.setattr(memory.MemoryPlan, "make", make)
    return found, refused


def test_weights_are_streamed_where_no_step_fits_beside_them(pack, model, pictures, tries):  # noqa: F811
    found, _ = tries
    losses = trained(pack, model, *pictures)[2]["loss"]
    assert found == [False, True]
    assert len(losses) == 3


def test_what_does_not_fit_streamed_either_is_refused(pack, model, pictures, tries):  # noqa: F811
    found, refused = tries
    refused.append(True)
    with pytest.raises(ValueError, match=r"every block recomputed and all weights streamed: at least 1\.0 GB"):
        trained(pack, model, *pictures)
    assert found == [False, True]
