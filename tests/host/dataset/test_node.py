"""ACLoRADataset in the real ComfyUI, with a VAE and a CLIP of the host's own classes and random weights."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.support.dataset_calls import checked
from tests.support.host_server import HostServer


@pytest.fixture(scope="module")
def vae(pack: ModuleType) -> Any:
    import comfy.sd
    from comfy.taesd.taesd import TAESD

    model = randomized(TAESD(latent_channels=4))
    encoder = {f"taesd_encoder.{key}": value for key, value in model.taesd_encoder.state_dict().items()}
    decoder = {f"taesd_decoder.{key}": value for key, value in model.taesd_decoder.state_dict().items()}
    return comfy.sd.VAE(sd={**encoder, **decoder})


@pytest.fixture(scope="module")
def clip(pack: ModuleType) -> Any:
    import comfy.sd
    from comfy.sd1_clip import SD1ClipModel, SD1Tokenizer

    class Target:
        params: dict[str, Any] = {}
        clip = SD1ClipModel
        tokenizer = SD1Tokenizer

    size = {"num_hidden_layers": 1, "hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 2}
    tiny = comfy.sd.CLIP(Target, model_options={"clip_l_model_config": size})
    randomized(tiny.cond_stage_model)
    return tiny


def randomized(module: torch.nn.Module) -> Any:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.ndim:  # the autoencoder's scale and shift stay
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / math.sqrt(parameter[0].numel()))
    return module


@pytest.fixture
def folder(pack: ModuleType) -> Iterator[Path]:
    """An empty folder in ComfyUI's input."""
    import folder_paths

    path = Path(folder_paths.get_input_directory(), "images")
    path.mkdir(parents=True)
    yield path
    for file in sorted(path.rglob("*"), reverse=True):
        file.rmdir() if file.is_dir() else file.unlink()
    path.rmdir()


def draw(path: Path, size: tuple[int, int] = (64, 64), seed: int = 0, caption: str | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    if caption is not None:
        path.with_suffix(".txt").write_text(caption, encoding="utf-8")
    return path


def run(pack: ModuleType, vae: Any, clip: Any, folder: str = "images", trigger: str = "inkstyle") -> Any:
    with torch.inference_mode():  # as the host runs nodes
        return pack.nodes.dataset.node.ACLoRADataset.execute(folder, vae, clip, 64, trigger)


def test_each_latent_comes_with_its_own_caption(pack: ModuleType, vae: Any, clip: Any, folder: Path) -> None:
    for number in range(7):  # two shapes, mixed, more than one batch of a shape
        draw(folder / f"p{number}.png", (64, 64) if number % 3 else (64, 32), number, f"image {number}, inkstyle")
    latents, conditioning = run(pack, vae, clip).result
    assert len(latents) == len(conditioning) == 7
    for number, (latent, cond) in enumerate(zip(latents, conditioning, strict=True)):
        pixels = torch.from_numpy(np.asarray(Image.open(folder / f"p{number}.png"), dtype=np.float32) / 255)
        if number % 3:
            torch.testing.assert_close(latent["samples"], vae.encode(pixels[None]), atol=1e-5, rtol=1e-5)
        else:
            assert latent["samples"].shape == (1, 4, 6, 12)
        expected = clip.encode_from_tokens_scheduled(clip.tokenize(f"inkstyle, image {number}"))
        torch.testing.assert_close(cond[0][0], expected[0][0])
        torch.testing.assert_close(cond[0][1]["pooled_output"], expected[0][1]["pooled_output"])


def test_the_result_equals_that_of_the_hosts_own_dataset_node(
    pack: ModuleType, vae: Any, clip: Any, folder: Path
) -> None:
    from comfy_extras.nodes_dataset import MakeTrainingDataset

    image = draw(folder / "a.png", caption="inkstyle a rocket")
    pixels = torch.from_numpy(np.asarray(Image.open(image), dtype=np.float32) / 255)[None]
    ours = run(pack, vae, clip).result
    theirs = MakeTrainingDataset.execute([pixels], [vae], [clip], ["inkstyle a rocket"]).result
    torch.testing.assert_close(ours[0], theirs[0])
    torch.testing.assert_close(ours[1][0][0][0], theirs[1][0][0][0])
    recorded = {"aclora_caption": "inkstyle a rocket", "aclora_is_text": True, "aclora_trigger": "inkstyle"}
    recorded["aclora_dataset"] = folder.name
    assert ours[1][0][0][1].keys() == theirs[1][0][0][1].keys() | recorded.keys()
    assert recorded.items() <= ours[1][0][0][1].items()


def test_repeats_are_the_same_latent(pack: ModuleType, vae: Any, clip: Any, folder: Path) -> None:
    draw(folder / "a.png", caption="a cat")
    draw(folder / "3_more" / "b.png", seed=1)
    output = run(pack, vae, clip)
    latents, conditioning = output.result
    assert len(latents) == len(conditioning) == 4
    assert latents[1] is latents[2] is latents[3] is not latents[0]
    assert conditioning[1] is conditioning[3] is not conditioning[0]
    assert output.ui["text"][0].startswith("2 images, 4 with repeats: all at 64 × 64.")


def test_equal_captions_are_encoded_once(pack: ModuleType, vae: Any, clip: Any, folder: Path) -> None:
    for number in range(3):
        draw(folder / f"{number}.png", seed=number)
    latents, conditioning = run(pack, vae, clip).result
    assert conditioning[0] is conditioning[1] is conditioning[2]
    assert not torch.equal(latents[0]["samples"], latents[1]["samples"])


def test_broken_images_are_named_and_the_others_are_used(
    pack: ModuleType, vae: Any, clip: Any, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (folder / "a.png").parent.mkdir(exist_ok=True)
    (folder / "a.png").write_text("not an image")
    draw(folder / "b.png", caption="the good one")
    cut = draw(folder / "c.png", seed=1, caption="cut off")
    cut.write_bytes(cut.read_bytes()[:-3000])  # the header is whole: only the decoder sees it
    with caplog.at_level(logging.WARNING, "aclora"):
        output = run(pack, vae, clip)
    latents, conditioning = output.result
    assert len(latents) == len(conditioning) == 1
    expected = clip.encode_from_tokens_scheduled(clip.tokenize("inkstyle, the good one"))
    torch.testing.assert_close(conditioning[0][0][0], expected[0][0])
    (text,) = output.ui["text"]
    for said in (text, caplog.text):
        assert "a.png was skipped" in said and "c.png was skipped" in said
        assert str(folder) not in said
    cut.rename(folder / "b.png")
    with pytest.raises(ValueError, match=r"No image of this folder can be read\. b\.png was skipped"):
        run(pack, vae, clip)


def test_the_node_shows_a_contact_sheet_and_remarks(pack: ModuleType, vae: Any, clip: Any, folder: Path) -> None:
    import folder_paths

    draw(folder / "long.png", (400, 40))
    output = run(pack, vae, clip, trigger="")
    (preview,) = output.ui["images"]
    with Image.open(Path(folder_paths.get_temp_directory(), preview["subfolder"], preview["filename"])) as sheet:
        assert sheet.width > 600
    assert output.ui["text"][0].split("\n")[1:] == [
        "1 image so elongated that more than a third was cropped: long.png.",
        "1 image without a caption; write one or set a trigger word: long.png.",
    ]


def test_a_missing_vae_or_clip_is_an_error(pack: ModuleType, vae: Any, clip: Any, folder: Path) -> None:
    import comfy.sd

    draw(folder / "a.png")
    with pytest.raises(ValueError, match="no VAE in the vae input"):
        run(pack, None, clip)
    with pytest.raises(ValueError, match="no VAE in the vae input"):
        run(pack, comfy.sd.VAE(sd={}), clip)  # what the host gives for a checkpoint without one
    with pytest.raises(ValueError, match="no CLIP in the clip input"):
        run(pack, vae, None)


def test_bad_folders_are_refused_before_any_work(pack: ModuleType, folder: Path, tmp_path: Path) -> None:
    import folder_paths

    check = checked(pack)
    assert '"images" has no images' in check("images")
    draw(folder / "a.png")
    assert check("images") is True
    assert check(None) is True  # a linked folder is not known yet
    draw(folder / "dot.png", (1, 1))
    assert "dot.png is 1 × 1 pixels" in check("images")
    (folder / "dot.png").unlink()
    (folder / "a.txt").write_bytes("café".encode("latin-1"))
    assert "a.txt of a.png is not UTF-8" in check("images")
    outside = draw(tmp_path / "secret" / "a.png").parent
    names = ["../secret", "..", ".", "", str(outside), "images/../..", "datasets: ../input", "example: ..", "a\0b"]
    for name in names:
        assert "leads outside the allowed folders" in check(name), name
    assert "does not exist" in check("nowhere")
    link = Path(folder_paths.get_input_directory(), "link")
    link.symlink_to(outside, target_is_directory=True)
    try:
        assert "leads outside the allowed folders" in check("link")
        assert "link" not in pack.nodes.dataset.folders.dataset_folders()
    finally:
        link.unlink()


def test_registered_folders_and_examples_can_be_chosen(
    pack: ModuleType, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import folder_paths

    draw(folder / "10_cat" / "a.png")
    draw(tmp_path / "styles" / "ink" / "a.png")
    (tmp_path / "styles" / ".cache").mkdir()
    registered = [str(tmp_path / "gone"), str(tmp_path)]
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "datasets", (registered, set()))
    draw(tmp_path / "examples" / "bold" / "a.png")
    monkeypatch.setattr(pack.nodes.dataset.folders, "EXAMPLES", tmp_path / "examples")
    schema = pack.nodes.dataset.node.ACLoRADataset.define_schema()
    options = schema.inputs[0].options
    assert options[:2] == ["images", "images/10_cat"]
    assert {"datasets: styles", "datasets: styles/ink", "example: bold"} <= set(options)
    assert not any(".cache" in option for option in options)
    assert schema.inputs[0].default == "example: bold"
    for option in ("images", "images/10_cat", "datasets: styles", "datasets: styles/ink", "example: bold"):
        assert checked(pack)(option) is True


def test_editing_an_image_or_a_caption_changes_the_fingerprint(pack: ModuleType, folder: Path) -> None:
    def fingerprint(name: str | None = "images") -> Any:
        return pack.nodes.dataset.node.ACLoRADataset.fingerprint_inputs(name, None, None, 64, "inkstyle")

    image = draw(folder / "a.png", caption="one")
    first = fingerprint()
    assert fingerprint() == first
    (folder / "a.txt").write_text("three")
    second = fingerprint()
    os.utime(image, ns=(1, 1))
    assert len({first, second, fingerprint()}) == 3
    assert math.isnan(fingerprint(None))


def test_cancelling_stops_the_node(pack: ModuleType, vae: Any, clip: Any, folder: Path) -> None:
    import comfy.model_management as management

    draw(folder / "a.png")
    management.interrupt_current_processing(True)
    with pytest.raises(management.InterruptProcessingException):
        run(pack, vae, clip)
    assert not management.processing_interrupted()


def test_the_server_runs_the_node_again_only_after_an_edit(server: HostServer) -> None:
    images = server.base / "input" / "served"
    draw(images / "a.png", caption="one")
    prompt = {
        "base": {"class_type": "ACLoRATinyBase", "inputs": {}},
        "data": {
            "class_type": "ACLoRADataset",
            "inputs": {
                "folder": "served",
                "vae": ["base", 2],
                "clip": ["base", 1],
                "resolution": 64,
                "trigger_word": "ink",
            },
        },
        "see": {"class_type": "PreviewAny", "inputs": {"source": ["data", 0]}},
    }

    def ran() -> bool:
        messages = dict(server.run(prompt)["status"]["messages"])
        return "data" not in messages["execution_cached"]["nodes"]

    assert ran()
    assert not ran()
    (images / "a.txt").write_text("three")
    assert ran()
    assert not ran()
    draw(images / "b.png", seed=1)
    assert ran()
    prompt["data"]["inputs"]["folder"] = "../.."
    with pytest.raises(AssertionError, match="leads outside the allowed folders"):
        server.submit(prompt)
