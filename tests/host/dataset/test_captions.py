"""Captions in the real ComfyUI: as text or as prompts, one of several in each epoch, and what the node says of them."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tests.support.dataset_calls import Calls, assert_same, draw

TEXTS = [
    "a cat (left) and a dog",
    "saber_(fate), ((very)) (big:1.3)",
    "open ( and ) closed ) (",
    "a path C:\\dir\\ and a \\ backslash",
    "embedding:style, a cat embedding:style (embedding:style:0.5)",
    "[a|b] {a|b} <lora:x:1>",
]


@pytest.fixture
def calls(pack: ModuleType, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Calls:
    return Calls(pack, monkeypatch)


def said(calls: Calls, **options: Any) -> list[str]:
    """The remarks on the node, without the summary."""
    return calls.run(**options).ui["text"][0].split("\n")[1:]


def recorded(conditioning: list[Any]) -> list[str]:
    return [entries[0][1]["aclora_caption"] for entries in conditioning]


def plain_tokens(tokenizer: Any, text: str) -> list[int]:
    """The tokens of a text from the tokenizer that ComfyUI's is made of."""
    return [token for token in tokenizer.tokenizer(text)["input_ids"] if token != tokenizer.end_token]


@pytest.mark.parametrize("text", TEXTS)
def test_a_text_has_the_tokens_of_its_letters(pack: ModuleType, calls: Calls, tmp_path: Path, text: str) -> None:
    from comfy.sd1_clip import SDTokenizer
    from comfy.text_encoders.sd3_clip import T5XXLTokenizer

    save_file({"emb_params": torch.randn(2, 768)}, tmp_path / "style.safetensors")
    for kind in (SDTokenizer, T5XXLTokenizer):
        ours = kind(embedding_directory=str(tmp_path))
        found = pack.nodes.host.tokens._plain_tokenizer(ours).tokenize_with_weights(text)
        tokens = [token for chunk in found for token, _ in chunk]
        assert all(weight == 1.0 for chunk in found for _, weight in chunk)
        expected = plain_tokens(ours, text)
        assert tokens[: len(expected)] == expected
        assert set(tokens[len(expected) :]) <= {ours.end_token, ours.pad_token}
        prompt = ours.tokenize_with_weights("a (b:1.3)")
        assert any(weight == 1.3 for chunk in prompt for _, weight in chunk)  # the original is as it was


def test_captions_are_text_unless_asked_otherwise(calls: Calls, folder: Path) -> None:
    (folder / "0.txt").write_text("a cat (left) and a dog")
    text, prompt = calls.run().result[1][0], calls.run(prompt_syntax=True).result[1][0]
    with torch.inference_mode():
        for found, written in ((text, r"ink, a cat \(left\) and a dog"), (prompt, "ink, a cat (left) and a dog")):
            expected = calls.clip.encode_from_tokens_scheduled(calls.clip.tokenize(written))
            torch.testing.assert_close(found[0][0], expected[0][0])
    assert not torch.allclose(text[0][0], prompt[0][0])
    assert recorded([text, prompt]) == ["ink, a cat (left) and a dog"] * 2
    assert text[0][1]["aclora_is_text"] and "aclora_is_text" not in prompt[0][1]


def test_escaped_brackets_are_learned_as_brackets(calls: Calls, folder: Path) -> None:
    (folder / "0.txt").write_text("saber_(fate)")
    (folder / "1.txt").write_text(r"saber_\(fate\)")
    conditioning = calls.run().result[1]
    assert_same(conditioning[0], conditioning[1])


def test_the_text_encoder_learns_captions_as_they_were_encoded(pack: ModuleType, calls: Calls, folder: Path) -> None:
    (folder / "0.txt").write_text("a (big:1.5) cat")
    for prompt_syntax in (False, True):
        conditioning = calls.run(cache=False, prompt_syntax=prompt_syntax).result[1]
        patcher = calls.clip.patcher.clone()
        encoder = pack.nodes.host.text_encoder.TextEncoder(calls.clip, patcher, conditioning)
        with torch.inference_mode():
            for own, caption in zip(conditioning, encoder.captions, strict=True):
                torch.testing.assert_close(encoder.encode(caption)[0][0], own[0][0], atol=1e-4, rtol=1e-4)


def test_each_line_is_a_variant(calls: Calls, folder: Path) -> None:
    (folder / "0.txt").write_text("a tabby cat\n1cat, tabby, ink\n")
    output = calls.run()
    latents, conditioning = output.result
    assert recorded(conditioning) == ["ink, a tabby cat", "ink, 1cat, tabby", "ink, a cat", "ink, a cat"]
    assert [each["aclora"] for each in latents[:2]] == [{"picture": 0, "variant": number} for number in range(2)]
    assert latents[0]["samples"] is latents[1]["samples"]
    remark = "1 image with captions on several lines, of which each epoch shows one: 0.png."
    assert output.ui["text"][0].split("\n")[1:] == [remark]
    joined = calls.run(caption_lines="joined")
    assert recorded(joined.result[1])[0] == "ink, a tabby cat 1cat, tabby" and len(joined.result[0]) == 3
    assert "several lines" not in joined.ui["text"][0]


def test_missing_captions_are_named_with_and_without_a_trigger_word(calls: Calls, folder: Path) -> None:
    (folder / "1.txt").unlink()
    assert said(calls) == ["1 image without a caption, so learned as the trigger word alone: 1.png."]
    assert said(calls, trigger="") == ["1 image without a caption; write one or set a trigger word: 1.png."]
    for name in "02":
        (folder / f"{name}.txt").write_text(" \n")
    assert said(calls) == ["No image has a caption, so all are learned as the trigger word alone."]


def test_what_looks_like_a_choice_or_a_prompt_is_named(calls: Calls, folder: Path) -> None:
    (folder / "0.txt").write_text("a {red|blue} cat")
    (folder / "1.txt").write_text("a (big:1.3) cat")
    (folder / "2.txt").write_text("a cat (at 10:30) in embedding:style")
    assert said(calls) == [
        "1 image with a choice such as {a|b} in the caption, learned literally; write one caption per line instead: "
        "0.png.",
        "2 images with (word:1.3) or embedding:name in the caption, learned as text; prompt_syntax would change that: "
        "1.png, 2.png.",
    ]
    assert len(said(calls, prompt_syntax=True)) == 1


def test_folders_that_look_like_repeats_are_named(calls: Calls, folder: Path) -> None:
    for name in ("10 dogs/d.png", "3_cats/c.png"):
        draw(folder / name, 4)
        (folder / name).with_suffix(".txt").write_text("a dog")
    output = calls.run()
    assert len(output.result[0]) == 3 + 1 + 3
    remark = 'The subfolder "10 dogs" counts once. To repeat it 10 times, name it 10_name.'
    assert output.ui["text"][0].split("\n")[1:] == [remark]


def test_conditionings_carry_the_trigger_word(calls: Calls, folder: Path) -> None:
    assert [own[0][1].get("aclora_trigger") for own in calls.run(trigger=" ink  style ").result[1]] == ["ink style"] * 3
    assert "aclora_trigger" not in calls.run(trigger="").result[1][0][0][1]


def test_encoding_a_long_caption_can_be_cancelled(calls: Calls, folder: Path) -> None:
    import comfy.model_management as management

    (folder / "0.txt").write_text("word " * 1900)
    layers = [each for each in calls.clip.cond_stage_model.modules() if isinstance(each, torch.nn.ModuleList)][0]
    ran = []
    cancel = layers[0].register_forward_hook(lambda *_: management.interrupt_current_processing(True))
    later = layers[1].register_forward_hook(lambda *_: ran.append(1))
    with pytest.raises(management.InterruptProcessingException):
        calls.run(cache=False)
    cancel.remove(), later.remove()
    assert not ran and not management.processing_interrupted()
    assert not any(module._forward_pre_hooks for module in calls.clip.cond_stage_model.modules())


def test_a_file_that_is_no_caption_is_refused_before_any_work(calls: Calls, folder: Path) -> None:
    (folder / "0.txt").write_text("word " * 3000)
    with pytest.raises(ValueError, match=r"0\.txt of 0\.png is longer than 10,000 characters"):
        calls.run()
    assert (calls.images, calls.captions) == (0, 0)
