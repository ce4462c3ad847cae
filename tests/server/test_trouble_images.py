"""Many images, a very large one, broken ones, and a cancel during encoding, in the real server."""

from __future__ import annotations

import re
import time
import uuid

import psutil
from PIL import Image

from tests.support.host_server import HostServer
from tests.support.server_runs import adapter, until, was_cached
from tests.support.trouble import DATASET, Browser, noise_images, prompt, says

MANY = 200
HUGE = (10_000, 10_000)


def encoded(server: HostServer) -> tuple[int, int]:
    """Return the numbers of cached and of newly encoded images and captions of the last dataset."""
    found = re.findall(
        r"(\d+) encodings of images and captions were reused, (\d+) are new", server.log.read_text("utf-8")
    )
    return int(found[-1][0]), int(found[-1][1])


def test_a_cancel_during_encoding_keeps_the_encoded_images(probed: HostServer) -> None:
    noise_images(probed.base / "input" / "many", MANY)
    client, queued = uuid.uuid4().hex, prompt(probed, "many", "many", 64, steps=4)
    with Browser(probed, client) as browser:
        running = str(probed.post_json("/prompt", {"prompt": queued, "client_id": client})["prompt_id"])
        until(lambda: any(node == DATASET and value >= 8 for node, value in browser.progress), "the first pictures")
        probed.post_json("/interrupt", {"prompt_id": running})
        history = probed.wait(running)
        until(lambda: "execution_interrupted" in browser.kinds, "the word of the cancel")
    assert history["status"]["status_str"] == "error" and not history["outputs"]
    probed.run(queued)
    known, anew = encoded(probed)
    assert known >= 8 and anew >= 1 and known + anew == MANY + 7
    assert adapter(probed, "many")


def test_many_images_come_from_the_cache_the_next_time(probed: HostServer) -> None:
    began = time.monotonic()
    probed.run(prompt(probed, "many", "many", 64, steps=4, seed=2))
    assert time.monotonic() - began < 30
    again = probed.run(prompt(probed, "many", "many", 64, steps=4, seed=2))
    assert was_cached(again, DATASET)


def test_an_image_of_100_megapixels_takes_little_memory(probed: HostServer) -> None:
    folder = noise_images(probed.base / "input" / "huge", 1)
    Image.new("RGB", HUGE, "#c04020").save(folder / "huge.png", compress_level=1)
    assert probed.server.process is not None
    process = psutil.Process(probed.server.process.pid)
    highest = before = process.memory_info().rss
    running = probed.submit(prompt(probed, "huge", "huge", 64, steps=2))
    while running not in probed.get_json(f"/history/{running}"):
        highest = max(highest, process.memory_info().rss)
        time.sleep(0.02)
    history = probed.wait(running)
    assert history["status"]["status_str"] == "success" and says(history, DATASET).startswith("2 images")
    assert highest - before < 700e6  # the image itself takes 400 MB: Pillow uses four bytes a pixel


def test_broken_truncated_and_oversized_images_are_named_and_skipped(probed: HostServer) -> None:
    folder = noise_images(probed.base / "input" / "broken", 3)
    (folder / "text.png").write_text("no picture", encoding="utf-8")
    whole = (folder / "0.png").read_bytes()
    (folder / "cut.png").write_bytes(whole[: len(whole) // 2])
    Image.new("1", (14_000, 14_000)).save(folder / "bomb.png")
    history = probed.run(prompt(probed, "broken", "broken", 64, steps=2))
    told = says(history, DATASET)
    assert told.startswith("3 images: all at 64 × 64.")
    for name in ("text.png", "cut.png"):
        assert f"{name} was skipped: it cannot be read as an image" in told
    assert "bomb.png was skipped: it has more than 178 megapixels" in told
    assert str(folder) not in told and adapter(probed, "broken")
