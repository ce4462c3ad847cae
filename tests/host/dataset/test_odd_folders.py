"""Folders as people bring them, in the real ComfyUI: what is not used is named, and the server stays responsive."""

from __future__ import annotations

import asyncio
import gc
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from types import ModuleType

import pytest
from PIL import Image

from tests.support.dataset_calls import Calls, checked, draw


@pytest.fixture
def calls(pack: ModuleType, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Calls:
    return Calls(pack, monkeypatch)


def shown(calls: Calls) -> str:
    return calls.run().ui["text"][0]


def test_what_is_not_used_is_named_on_the_node(calls: Calls, folder: Path) -> None:
    Image.open(folder / "0.png").save(folder / "3.jfif", "JPEG")
    (folder / "4.heic").write_bytes(b"\0\0\0\x18ftypheic" + bytes(64))
    (folder / "4.txt").write_text("a fish")
    (folder / "7.txt").write_text("nobody's")
    (folder / "scan.psd").touch()
    draw(folder / "cat" / "deep" / "a.png", 9)
    text = shown(calls)
    assert text.startswith("4 images: ")
    assert "4.heic was skipped" in text and "pillow-heif" in text
    assert "not used: 7.txt." in text and "nor captions: scan.psd." in text and "not read: cat/deep." in text


def test_a_moving_image_is_told_on_the_node(calls: Calls, folder: Path) -> None:
    frames = [Image.new("RGBA", (96, 64), color) for color in ((0, 0, 0, 0), (0, 160, 0, 255))]
    frames[0].save(folder / "fades in.gif", save_all=True, append_images=frames[1:], disposal=2)
    told = "1 image with several frames or pages, of which only the first is learned: fades in.gif."
    assert told in shown(calls)


def test_many_unreadable_images_are_counted(calls: Calls, folder: Path) -> None:
    for number in range(30):
        (folder / f"broken{number}.png").write_text("no image")
    text = shown(calls)
    assert "broken0.png" in text and "broken29.png" not in text and "10 more images skipped." in text


@pytest.mark.skipif(sys.platform == "win32", reason="links need a privilege on Windows")
def test_links_lead_to_allowed_folders_only(
    calls: Calls, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import folder_paths

    draw(tmp_path / "b.png", 9)
    (tmp_path / "words.txt").write_text("not yours")
    (folder / "0.txt").unlink()
    (folder / "0.txt").symlink_to(tmp_path / "words.txt")
    (folder / "b.png").symlink_to(tmp_path / "b.png")
    output = calls.run()
    assert len(output.result[0]) == 3 and output.result[1][0][0][1]["aclora_caption"] == "ink"
    assert "Links out of the allowed folders, not used: 0.txt, b.png." in output.ui["text"][0]
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "datasets", ([str(tmp_path)], set()))
    output = calls.run()
    assert len(output.result[0]) == 4 and "Links" not in output.ui["text"][0]


def test_a_name_cannot_put_a_link_on_the_node(calls: Calls, folder: Path) -> None:
    (folder / "[[click|https:example.com]].psd").touch()
    text = shown(calls)
    assert "click" in text and "[[" not in text


@pytest.mark.parametrize(
    "value", [7, ["kept"], {"a": 1}, True, "a" * 5000, "\ud800", "kept\0", "~nobody/x", "a/" * 3000]
)
def test_any_value_for_a_folder_is_refused_in_a_sentence(pack: ModuleType, folder: Path, value: object) -> None:
    assert isinstance(checked(pack)(value), str)
    with pytest.raises(ValueError, match="^regularisation: "):
        pack.nodes.dataset.plan.scan_folders("kept", value)


def test_a_folder_that_was_not_chosen_is_an_error(pack: ModuleType) -> None:
    with pytest.raises(ValueError, match="No folder is chosen"):
        pack.nodes.dataset.plan.scan_folders(None)


@pytest.mark.skipif(sys.platform != "linux", reason="other systems allow no such names")
def test_odd_entries_do_not_empty_the_list_of_folders(pack: ModuleType, folder: Path) -> None:
    loop, odd = folder / "loop", folder / "caf\udce9"
    loop.symlink_to(loop)
    odd.mkdir()
    (folder / "fine").mkdir()
    options = pack.nodes.dataset.folders.dataset_folders()
    assert "kept/fine" in options and not any("loop" in option or "caf" in option for option in options)


@asynccontextmanager
async def longest_pause() -> AsyncIterator[list[float]]:
    """Measure how long the event loop was busy at most, in seconds."""
    pauses = [0.0]

    async def beat() -> None:
        while True:
            begun = time.perf_counter()
            await asyncio.sleep(0.005)
            pauses[0] = max(pauses[0], time.perf_counter() - begun)

    beats = asyncio.create_task(beat())
    await asyncio.sleep(0.05)
    gc.disable()  # one collection of the host's whole heap takes longer than what is measured
    try:
        yield pauses
    finally:
        gc.enable()
        beats.cancel()


def test_checking_three_thousand_images_leaves_the_server_responsive(pack: ModuleType, folder: Path) -> None:
    draw(folder / "many" / "0.png", 0)
    data = (folder / "many" / "0.png").read_bytes()
    for number in range(3000):
        (folder / "many" / f"{number}.png").write_bytes(data)
        (folder / "many" / f"{number}.txt").write_text("a cat")
    check = pack.nodes.dataset.node.ACLoRADataset.validate_inputs

    async def measured() -> float:
        async with longest_pause() as pauses:
            assert await check("kept/many") is True
        return pauses[0]

    assert min(asyncio.run(measured()) for _ in range(3)) < 0.2  # the machine may be busy with other things
