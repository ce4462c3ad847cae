"""Words and prompts that cannot be encoded or saved are refused with a sentence, before any work."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest
import torch

BAD = {"x\ud800": "holds half of a character", "x" * 10_001: "has 10,001 characters, but at most 10,000"}


@pytest.mark.parametrize(("text", "told"), BAD.items(), ids=["half", "long"])
def test_a_text_that_cannot_be_used_is_refused(
    pack: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, text: str, told: str
) -> None:
    import folder_paths

    monkeypatch.setitem(folder_paths.folder_names_and_paths, "loras", ([str(tmp_path)], {".safetensors"}))
    lora = {"x.lora_up.weight": torch.ones(4, 2), "x.lora_down.weight": torch.ones(2, 4)}
    with pytest.raises(ValueError, match=f"^trigger {told}"):
        pack.nodes.adapter.save.ACLoRASave.execute(lora, "ink", trigger=text)
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match=f"^trigger_word {told}"):
        pack.nodes.dataset.node.ACLoRADataset.execute("any", object(), object(), 64, text)
    previews = pack.nodes.training.options.previews.ACLoRAPreviewOptions
    assert previews.validate_inputs(text).startswith(f"preview_prompts {told}")
    with pytest.raises(ValueError, match=f"^prompts {told}"):
        pack.nodes.evaluation.images.read_prompts([text], 1)


def test_usual_texts_are_let_through(pack: ModuleType) -> None:
    for text in ("", "墨 ink", "a\nb", "🖋" * 10_000):
        pack.nodes.texts.check_text("trigger", text)


def test_messages_show_names_short_and_printable(pack: ModuleType) -> None:
    name = "x\ud800\n" + "x" * 5000
    with pytest.raises(ValueError, match="leads outside") as told:
        pack.nodes.dataset.folders.resolve_folder(name)
    sentences = [str(told.value), pack.nodes.adapter.files.check_lora_exists(f"aclora/ink_{name}")]
    sentences.append(pack.nodes.adapter.source.read_source({}, name).remark)
    assert all(each.isprintable() and len(each) < 300 for each in sentences)
