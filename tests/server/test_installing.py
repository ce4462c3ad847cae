"""The archive of the registry in the real ComfyUI, and a ComfyUI that is too old for the pack."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from launcher.environment import RUNTIME
from tests.server.test_several_gpus import shared
from tests.support.host_server import HostServer, running
from tests.support.published import install_published, write_archive
from tests.support.server_runs import adapter
from tests.support.trouble import prompt, says
from tools.workflow_files import FILES

pytestmark = pytest.mark.slow
LARGEST = 48_000_000  # bytes of the archive
OLDER = "0.20.1"
SENTENCE = (
    f"AC-LoRA needs ComfyUI 0.24.0 or newer, and this is {OLDER}: its nodes and templates are not loaded. Update "
    "ComfyUI and start it again."
)


def test_the_archive_is_small_enough(tmp_path: Path) -> None:
    write_archive(tmp_path / "pack.zip")
    assert (tmp_path / "pack.zip").stat().st_size <= LARGEST


def test_the_archive_has_all_that_the_pack_needs(host: Path, tmp_path: Path) -> None:
    install_published(tmp_path / "custom_nodes" / "aclora")
    with running(host, tmp_path, "published") as server:
        assert len([name for name in server.get_json("/object_info") if name.startswith("ACLoRA")]) == 16
        assert server.get_json("/workflow_templates")["aclora"][0] == FILES["quickstart"]
        history = server.run(
            {
                "base": {"class_type": "ACLoRATinyBase", "inputs": {}},
                "text": server.node("CLIPTextEncode", clip=["base", 1], text="a rocket, noto style"),
                "data": server.node("ACLoRADataset", clip=["base", 1], vae=["base", 2], resolution=128)
                | {"_meta": {"title": "the example images"}},
                "latent": server.node("EmptySD3LatentImage", width=128, height=128),
                "draw": server.node(
                    "KSampler",
                    model=["base", 0],
                    positive=["text", 0],
                    negative=["text", 0],
                    latent_image=["latent", 0],
                    steps=1,
                    sampler_name="euler",
                    scheduler="simple",
                ),
                "image": server.node("VAEDecode", samples=["draw", 0], vae=["base", 2]),
                "save": server.node("SaveImage", images=["image", 0], filename_prefix="rocket"),
            }
        )
        assert len(server.images(history)) == 1
        trained = server.run(shared(server, prompt(server, "installed", steps=2)), 300)
        assert "Trained on 2 processes on the CPU" in says(trained) and adapter(server, "installed")


@pytest.fixture(scope="module")
def older(host: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[HostServer]:
    """A server of this ComfyUI that says it is an older one."""
    base = tmp_path_factory.mktemp("older")
    folder = base / "ComfyUI"
    folder.mkdir()
    for entry in host.iterdir():
        if entry.name == "main.py":  # a copy, as Python looks for modules beside the file that a link leads to
            (folder / entry.name).write_bytes(entry.read_bytes())
        elif entry.name not in ("comfyui_version.py", "__pycache__"):
            (folder / entry.name).symlink_to(entry)
    (folder / "comfyui_version.py").write_text(f'__version__ = "{OLDER}"\n', encoding="utf-8")
    with running(folder, base, "older") as server:
        yield server


def test_a_comfyui_that_is_too_old_says_so_once(older: HostServer) -> None:
    log = older.log.read_text(encoding="utf-8")
    assert log.count("AC-LoRA needs") == 1
    assert SENTENCE in log
    assert not [line for line in log.splitlines() if re.search("aclora|AC-LoRA", line) and "Traceback" in line]


def test_it_gets_no_node_and_no_template(older: HostServer) -> None:
    assert not [name for name in older.get_json("/object_info") if name.startswith("ACLoRA")]
    assert older.pack_folder not in older.get_json("/workflow_templates")
    assert older.pack_folder not in older.get_json("/api/workflow_templates")


def test_it_is_told_in_the_browser(older: HostServer) -> None:
    pytest.importorskip("playwright", reason="playwright is not installed: pip install -r tests/requirements.txt")
    from tests.support.browser import MISSING, find_browser, open_front_end

    if find_browser() is None:
        pytest.skip(f"the front end is not tested, as {MISSING}")
    with open_front_end(older.server.address) as page:
        toast = page.locator(".p-toast-message", has_text="AC-LoRA needs")
        toast.wait_for()
        (RUNTIME / "screenshots").mkdir(exist_ok=True)
        page.screenshot(path=RUNTIME / "screenshots" / "too_old.png")
        assert SENTENCE in toast.inner_text().replace("\n", " ")
