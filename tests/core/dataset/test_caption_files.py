"""Captions that are looked at and edited."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest
from PIL import Image

from aclora_core.dataset import (
    CaptionChangedError,
    browse_folder,
    find_image,
    folder_fingerprint,
    read_caption,
    save_caption,
    scan_folder,
)
from aclora_core.dataset.captions import MAX_CAPTIONS, MAX_FILE_SIZE, MAX_LENGTH


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "style"
    path.mkdir()
    image(path / "rocket.png")
    (path / "rocket.txt").write_text("a rocket", encoding="utf-8")
    return path


def image(path: Path, size: tuple[int, int] = (64, 48)) -> None:
    path.parent.mkdir(exist_ok=True)
    Image.new("RGB", size, "red").save(path)


def save(folder: Path, text: str, name: str = "rocket.png", version: str | None = None) -> str:
    files = find_image(folder, name)
    shown = read_caption(files).version if version is None else version
    return save_caption(files, text, shown, [folder]).version


def test_a_saved_caption_is_learned_and_changes_the_fingerprint(folder: Path) -> None:
    before = folder_fingerprint(folder)
    save(folder, "une fusée à l’aube")
    assert (folder / "rocket.txt").read_bytes() == "une fusée à l’aube\n".encode()
    assert scan_folder(folder).images[0].caption == "une fusée à l’aube"
    assert folder_fingerprint(folder) != before


def test_the_first_text_is_kept_and_never_replaced(folder: Path) -> None:
    save(folder, "a red rocket")
    save(folder, "a red rocket at dawn")
    assert (folder / "rocket.txt.bak").read_text(encoding="utf-8") == "a rocket"
    assert (folder / "rocket.txt").read_text(encoding="utf-8") == "a red rocket at dawn\n"


def test_what_was_kept_is_no_caption_and_is_not_complained_about(folder: Path) -> None:
    save(folder, "a red rocket")
    (folder / "rocket.txt").unlink()
    scan = scan_folder(folder)
    assert not scan.images[0].has_caption and scan.unused == ()


def test_an_image_without_a_caption_gets_a_file(folder: Path) -> None:
    image(folder / "2_more" / "cat.v2.jpg")
    assert read_caption(find_image(folder, "2_more/cat.v2.jpg")).version == ""
    save(folder, "a cat", "2_more/cat.v2.jpg")
    assert (folder / "2_more" / "cat.v2.txt").read_text(encoding="utf-8") == "a cat\n"
    assert not (folder / "2_more" / "cat.v2.txt.bak").exists()
    assert {each.name: each.caption for each in scan_folder(folder).images}["2_more/cat.v2.jpg"] == "a cat"


@pytest.mark.parametrize("name", ["rocket.caption", "rocket.png.txt", "ROCKET.TXT"])
def test_the_file_that_holds_the_caption_is_the_one_that_is_written(tmp_path: Path, name: str) -> None:
    image(tmp_path / "rocket.png")
    (tmp_path / name).write_text("old", encoding="utf-8")
    save(tmp_path, "new")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["rocket.png", name, f"{name}.bak"])
    assert scan_folder(tmp_path).images[0].caption == "new" and scan_folder(tmp_path).unused == ()


def test_a_file_that_changed_meanwhile_is_left_alone(folder: Path) -> None:
    shown = read_caption(find_image(folder, "rocket.png")).version
    (folder / "rocket.txt").write_text("somebody else's", encoding="utf-8")
    with pytest.raises(CaptionChangedError, match="rocket.txt has changed since it was shown"):
        save(folder, "mine", version=shown)
    with pytest.raises(CaptionChangedError):  # deleted
        (folder / "rocket.txt").unlink()
        save(folder, "mine", version=shown)
    assert sorted(path.name for path in folder.iterdir()) == ["rocket.png"]


def test_of_two_who_save_at_once_one_is_told(folder: Path) -> None:
    shown = read_caption(find_image(folder, "rocket.png")).version
    results: list[str] = []

    def run(text: str) -> None:
        try:
            save(folder, text, version=shown)
            results.append(text)
        except CaptionChangedError:
            results.append("told")

    threads = [threading.Thread(target=run, args=(text,)) for text in ("one", "two")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert "told" in results and len(set(results)) == 2
    assert (folder / "rocket.txt").read_text(encoding="utf-8").strip() in results


def test_a_text_that_cannot_be_read_can_be_replaced(folder: Path) -> None:
    old = "Füße".encode("latin-1")
    (folder / "rocket.txt").write_bytes(old)
    shown = read_caption(find_image(folder, "rocket.png"))
    assert shown.text == "" and "is not UTF-8" in shown.problem
    save(folder, "Füße")
    assert (folder / "rocket.txt").read_text(encoding="utf-8") == "Füße\n"
    assert (folder / "rocket.txt.bak").read_bytes() == old


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("x" * (MAX_LENGTH + 1), "is longer than 10,000 characters"),
        ("x\n" * (MAX_CAPTIONS + 1), "has 101 lines"),
        ("\ud800", "half of a character"),
        ("a\0b", "an invalid character"),
        ("\n".join(["x" * 9000] * 9), f"larger than {MAX_FILE_SIZE >> 10} KB"),
    ],
)
def test_what_the_dataset_would_refuse_is_not_written(folder: Path, text: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        save(folder, text)
    assert (folder / "rocket.txt").read_text(encoding="utf-8") == "a rocket"
    assert not (folder / "rocket.txt.bak").exists()


def test_an_empty_caption_is_none(folder: Path) -> None:
    save(folder, " \n ")
    assert (folder / "rocket.txt").read_bytes() == b"" and not scan_folder(folder).images[0].has_caption


@pytest.mark.skipif(os.name == "nt", reason="links need a privilege on Windows")
def test_links_are_followed_inside_the_folders_and_never_out_of_them(folder: Path, tmp_path: Path) -> None:
    (folder / "texts").mkdir()
    (folder / "texts" / "real.txt").write_text("a rocket", encoding="utf-8")
    outside = tmp_path / "outside.txt"
    outside.write_text("private", encoding="utf-8")
    (folder / "rocket.txt").unlink()
    (folder / "rocket.txt").symlink_to(folder / "texts" / "real.txt")
    save(folder, "new")
    assert (folder / "rocket.txt").is_symlink() and (folder / "texts" / "real.txt").read_text() == "new\n"
    (folder / "rocket.txt").unlink()
    (folder / "rocket.txt").symlink_to(outside)
    with pytest.raises(
        ValueError, match="rocket.txt cannot be changed: it is a link that leads outside the dataset folders"
    ):
        save(folder, "new")
    assert outside.read_text() == "private" and sorted(tmp_path.glob("outside*")) == [outside]


def test_a_file_that_cannot_be_written_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(ValueError, match="rocket.txt.bak could not be written: No space left .* Free some space"):
        save(folder, "new")
    assert (folder / "rocket.txt").read_text(encoding="utf-8") == "a rocket"
    assert len(list(folder.iterdir())) == 2


def test_browsing_shows_what_scanning_refuses(folder: Path) -> None:
    (folder / "broken.png").write_text("no image")
    image(folder / "small.png", (8, 8))
    (folder / "notes.doc").touch()
    found = browse_folder(folder, trigger="ink")
    assert [each.files.name for each in found.images] == ["broken.png", "rocket.png", "small.png"]
    broken, rocket, small = found.images
    assert broken.header is None and broken.problem.startswith("broken.png was skipped")
    assert rocket.image is not None and rocket.image.caption == "ink, a rocket" and not rocket.problem
    assert small.image is None and "too small to learn from" in small.problem
    assert found.unused == ("Not used, as neither images nor captions: notes.doc.",)


def test_an_image_that_is_gone_is_told(folder: Path) -> None:
    for name in ("cat.png", "../style/rocket.png", "rocket.txt", ""):
        with pytest.raises(ValueError, match="no longer in the folder"):
            find_image(folder, name)
