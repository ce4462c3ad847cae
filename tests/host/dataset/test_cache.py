"""The dataset node's cache in the real ComfyUI: encoded images and captions are counted, never timed."""

from __future__ import annotations

import errno
import os
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from PIL import Image

from launcher.host import link_pack
from tests.support.dataset_calls import Calls, assert_same, draw
from tests.support.host_server import running


def test_a_restart_encodes_nothing_and_gives_the_same(
    pack: ModuleType, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = Calls(pack, monkeypatch)
    before = first.run()
    assert (first.images, first.captions) == (3, 2)
    again = Calls(pack, monkeypatch)
    after = again.run()
    assert (again.images, again.captions) == (0, 0)
    assert_same(after.result, before.result)
    assert after.result[1][1] is after.result[1][2]  # one caption, as before
    assert after.ui["text"] == before.ui["text"]
    with open_sheet(before) as one, open_sheet(after) as other:
        assert one.tobytes() == other.tobytes()


def open_sheet(output: Any) -> Image.Image:
    import folder_paths

    (shown,) = output.ui["images"]
    return Image.open(Path(folder_paths.get_temp_directory(), shown["subfolder"], shown["filename"]))


def test_only_what_changed_is_encoded(pack: ModuleType, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = Calls(pack, monkeypatch)
    assert calls.encoded() == (3, 2)
    assert calls.encoded() == (0, 0)  # the same VAE and CLIP, which are loaded by now
    status = (folder / "0.png").stat()
    draw(folder / "0.png", 7)
    os.utime(folder / "0.png", ns=(status.st_atime_ns, status.st_mtime_ns))
    assert calls.encoded() == (1, 0)
    (folder / "0.txt").write_text("a red rocket")
    assert calls.encoded() == (0, 1)
    (folder / "1.png").rename(folder / "renamed.png")
    (folder / "1.txt").rename(folder / "renamed.txt")
    assert calls.encoded() == (0, 0)
    assert calls.encoded(resolution=96) == (3, 0)
    assert calls.encoded(trigger="tusche") == (0, 2)
    assert calls.encoded() == (0, 0)


def test_another_vae_or_clip_is_noticed(pack: ModuleType, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Calls(pack, monkeypatch).run()
    calls = Calls(pack, monkeypatch)
    with torch.no_grad():
        last = [p for p in calls.vae.first_stage_model.parameters() if p.ndim == 4][-1]
        last.view(-1)[len(last) // 2] += 1e-3  # a single number
    assert calls.encoded() == (3, 0)
    calls = Calls(pack, monkeypatch)
    with torch.no_grad():
        last = [p for p in calls.clip.cond_stage_model.parameters() if p.ndim == 2][-1]
        last[0, 0] += 1e-3
    assert calls.encoded() == (0, 2)
    calls = Calls(pack, monkeypatch)
    skipping = calls.clip.clone()
    skipping.clip_layer(-2)
    calls.use(skipping)
    assert calls.encoded() == (0, 2)
    assert Calls(pack, monkeypatch).encoded() == (0, 0)


def lora_on(clip: Any, seed: int, strength: float) -> Any:
    """A clone of the CLIP with a LoRA on one of its layers, as LoraLoader makes it."""
    import comfy.sd

    generator = torch.Generator().manual_seed(seed)
    weights = clip.patcher.model.state_dict()
    name = next(name for name in weights if name.endswith("mlp.fc1.weight"))
    rows, columns = weights[name].shape
    layer = "lora_te_" + name.split("transformer.")[1].removesuffix(".weight").replace(".", "_")
    lora = {
        f"{layer}.lora_up.weight": torch.randn(rows, 2, generator=generator),
        f"{layer}.lora_down.weight": torch.randn(2, columns, generator=generator),
        f"{layer}.alpha": torch.tensor(2.0),
    }
    patched = comfy.sd.load_lora_for_models(None, clip, lora, 0.0, strength)[1]
    assert patched.patcher.patches
    return patched


def test_a_lora_on_the_clip_counts(pack: ModuleType, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = Calls(pack, monkeypatch)
    without = plain.run().result[1]
    patched = Calls(pack, monkeypatch)
    patched.use(lora_on(plain.clip, seed=0, strength=1.0))
    with_lora = patched.run().result[1]
    assert (patched.images, patched.captions) == (0, 2)
    assert not torch.equal(with_lora[0][0][0], without[0][0][0])
    # The LoRA is now in the weights that both share; the plain CLIP is known all the same, and so is the other.
    assert plain.encoded() == (0, 0)
    assert_same(plain.run().result[1], without)
    assert patched.encoded() == (0, 0)
    fresh = Calls(pack, monkeypatch)
    base = fresh.clip
    for seed, strength, expected in ((0, 1.0, 0), (0, 0.5, 2), (1, 1.0, 2), (0, 0.5, 0)):
        fresh.use(lora_on(base, seed, strength))
        assert fresh.encoded() == (0, expected), (seed, strength)


def test_a_clip_with_unknown_functions_is_encoded_each_time(
    pack: ModuleType, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = Calls(pack, monkeypatch)
    wrapped = calls.clip.clone()
    wrapped.patcher.add_wrapper("any", lambda *_: None)
    calls.use(wrapped)
    assert calls.encoded() == (3, 2)
    assert calls.encoded() == (0, 2)


def test_hashing_the_weights_changes_and_moves_nothing(pack: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = Calls(pack, monkeypatch)
    models = (calls.vae.patcher.model, calls.clip.patcher.model)

    def facts() -> list[Any]:
        return [
            (name, id(tensor), tensor.data_ptr(), tensor.dtype, str(tensor.device), tensor._version)
            for model in models
            for name, tensor in (*model.named_parameters(), *model.named_buffers())
        ]

    before, settings = facts(), [sorted(vars(model)) for model in models]
    known = pack.nodes.host.encoding_keys.KnownEncodings(calls.vae, calls.clip)
    assert known.caption_key({"l": [[(1, 1.0)]]}) is not None
    assert facts() == before and [sorted(vars(model)) for model in models] == settings


def test_without_cache_nothing_is_read_or_written(
    pack: ModuleType, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = pack.nodes.host.encoding_keys.cache_folder()
    calls = Calls(pack, monkeypatch)
    assert calls.encoded(cache=False) == (3, 2)
    assert not kept.exists()
    assert calls.encoded() == (3, 2)
    assert calls.encoded(cache=False) == (3, 2)
    assert len(list(kept.iterdir())) == 5


def test_damaged_files_are_written_again(pack: ModuleType, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = Calls(pack, monkeypatch)
    before = calls.run().result
    for file in pack.nodes.host.encoding_keys.cache_folder().iterdir():
        file.write_bytes(file.read_bytes()[:-1])
    after = calls.run().result
    assert (calls.images, calls.captions) == (3, 2)
    assert_same(after, before)
    assert calls.encoded() == (0, 0)


def test_a_full_disk_is_reported_on_the_node(pack: ModuleType, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    calls = Calls(pack, monkeypatch)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        output = calls.run()
    assert len(output.result[0]) == 3
    assert "cannot be stored for next time (No space left on device)" in output.ui["text"][0]
    assert "cannot be stored" not in calls.run().ui["text"][0]
    assert calls.encoded() == (0, 0)


def test_a_file_replaced_while_it_is_read_is_not_cached_as_the_old_one(
    pack: ModuleType, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = Calls(pack, monkeypatch)
    encode = pack.nodes.dataset.encode
    load, old = encode.load_image, (folder / "0.png").read_bytes()

    def replaced(image: Any, bucket: Any) -> Any:
        if image.name == "0.png":
            draw(folder / "0.png", 9)
        return load(image, bucket)

    with monkeypatch.context() as patch:
        patch.setattr(encode, "load_image", replaced)
        other = calls.run().result[0][0]["samples"]
    (folder / "0.png").write_bytes(old)
    restored = calls.run().result[0][0]["samples"]
    assert calls.images == 1
    assert not torch.equal(restored, other)


@pytest.mark.slow
def test_a_new_server_starts_at_once(host: Path, tmp_path: Path) -> None:
    link_pack(tmp_path / "custom_nodes")
    (tmp_path / "input" / "kept").mkdir(parents=True)
    for number in range(3):
        draw(tmp_path / "input" / "kept" / f"{number}.png", number)
    widgets = {"folder": "kept", "resolution": 64, "trigger_word": "ink"}  # without cache, as an old workflow
    prompt = {
        "1": {"class_type": "ACLoRATinyBase", "inputs": {}},
        "2": {"class_type": "ACLoRADataset", "inputs": {**widgets, "vae": ["1", 2], "clip": ["1", 1]}},
        "3": {"class_type": "PreviewAny", "inputs": {"source": ["2", 0]}},
        "4": {"class_type": "PreviewAny", "inputs": {"source": ["2", 1]}},
    }
    said, shown = [], []
    for name in ("first", "second"):
        with running(host, tmp_path, name) as server:
            history = server.run(prompt)
        said += [
            re.findall(r"(\d+) encodings of images and captions were reused, (\d+) are new", server.log.read_text())
        ]
        shown += [[history["outputs"][node]["text"] for node in ("3", "4")]]
    assert said == [[], [("4", "0")]]
    assert shown[0] == shown[1]
