"""Scanning a folder: order, repeats, problems and the fingerprint."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from PIL import Image

from aclora_core.dataset import listing
from aclora_core.dataset.folder import MIN_SIDE, folder_fingerprint, scan_folder
from tests.support.image_files import png_bytes, save_image


def names(folder: Path) -> list[str]:
    return [item.name for item in scan_folder(folder).images]


def test_images_come_in_natural_order_whatever_their_format(tmp_path: Path) -> None:
    for name in ("b10.png", "b9.JPG", "B1.webp", "a.bmp", "notes.md"):
        if name.endswith("md"):
            (tmp_path / name).write_text("not an image")
        else:
            save_image(tmp_path / name)
    assert names(tmp_path) == ["a.bmp", "B1.webp", "b9.JPG", "b10.png"]


def test_subfolders_are_repeated_as_often_as_their_name_says(tmp_path: Path) -> None:
    save_image(tmp_path / "z.png")
    save_image(tmp_path / "10_cat" / "a.png")
    save_image(tmp_path / "2_dog" / "a.png")
    save_image(tmp_path / "other" / "a.png")
    save_image(tmp_path / "0_skipped" / "a.png")
    save_image(tmp_path / "other" / "deeper" / "a.png")
    save_image(tmp_path / ".hidden" / "a.png")
    save_image(tmp_path / "other" / "._a.png")
    found = [(item.name, item.repeats) for item in scan_folder(tmp_path).images]
    assert found == [("z.png", 1), ("2_dog/a.png", 2), ("10_cat/a.png", 10), ("other/a.png", 1)]


def test_a_year_as_folder_name_is_not_a_number_of_repeats(tmp_path: Path) -> None:
    save_image(tmp_path / "2024_spring" / "a.png")
    with pytest.raises(ValueError, match='"2024_spring" asks for 2024 repeats'):
        scan_folder(tmp_path)


def test_an_empty_or_missing_folder_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match='"empty" has no images'):
        scan_folder(tmp_path / "empty")
    with pytest.raises(ValueError, match='"gone" cannot be read: No such file'):
        scan_folder(tmp_path / "gone")


def test_broken_images_are_skipped_and_named_without_their_path(tmp_path: Path) -> None:
    save_image(tmp_path / "good.png")
    (tmp_path / "text.png").write_text("I am text")
    (tmp_path / "zero.jpg").write_bytes(b"")
    (tmp_path / "ghost.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n")
    result = scan_folder(tmp_path)
    assert [item.name for item in result.images] == ["good.png"]
    assert [problem.split()[0] for problem in result.problems] == ["ghost.png", "text.png", "zero.jpg"]
    assert str(tmp_path) not in "".join(result.problems)


def test_a_folder_of_only_broken_images_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_text("I am text")
    with pytest.raises(ValueError, match=r"None of the 1 images in .* can be used\. a\.png"):
        scan_folder(tmp_path)


def test_a_tiny_image_is_an_error_that_says_the_minimum(tmp_path: Path) -> None:
    save_image(tmp_path / "dot.png", (1, 1))
    save_image(tmp_path / "good.png", (MIN_SIDE, MIN_SIDE))
    with pytest.raises(ValueError, match=r"dot\.png is 1 × 1 pixels.* at least 32\."):
        scan_folder(tmp_path)


def test_all_errors_are_reported_at_once(tmp_path: Path) -> None:
    for number in range(7):
        save_image(tmp_path / f"dot{number}.png", (1, 1))
    with pytest.raises(ValueError, match=r"(?s)dot0.*\n.*dot4.*\n\(and 2 more\)"):
        scan_folder(tmp_path)


def test_the_fingerprint_changes_with_images_and_captions(tmp_path: Path) -> None:
    path = save_image(tmp_path / "a.png")
    seen = [folder_fingerprint(tmp_path)]
    assert folder_fingerprint(tmp_path) == seen[0]
    (tmp_path / "notes.md").write_text("not read, not seen")
    assert folder_fingerprint(tmp_path) == seen[0]

    def changed() -> None:
        seen.append(folder_fingerprint(tmp_path))
        assert len(set(seen)) == len(seen)

    os.utime(path, ns=(1, 1))
    changed()
    (tmp_path / "a.txt").write_text("one")
    changed()
    (tmp_path / "a.txt").write_text("three")
    changed()
    save_image(tmp_path / "3_more" / "b.png")
    changed()
    (tmp_path / "3_more").rename(tmp_path / "4_more")
    changed()


def test_a_subfolder_can_be_left_out(tmp_path: Path) -> None:
    save_image(tmp_path / "a.png")
    save_image(tmp_path / "plain" / "b.png")
    assert [item.name for item in scan_folder(tmp_path, without=tmp_path / "plain").images] == ["a.png"]


@pytest.mark.parametrize("suffix", ["jfif", "JPE", "jif", "apng", "dib"])
def test_rarer_names_of_known_formats_are_read(tmp_path: Path, suffix: str) -> None:
    kind = {"apng": "PNG", "dib": "BMP"}.get(suffix, "JPEG")
    Image.new("RGB", (64, 64)).save(tmp_path / f"a.{suffix}", kind)
    assert names(tmp_path) == [f"a.{suffix}"]


def test_the_content_decides_not_the_suffix(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(png_bytes(Image.new("RGB", (64, 64))))
    assert names(tmp_path) == ["a.jpg"]


def test_whatever_is_not_used_is_named(tmp_path: Path) -> None:
    for name in ("a.png", "cat/b.png", "cat/deep/c.png", "0_off/d.png", "masks/old/a.png"):
        save_image(tmp_path / name)
    for name in (
        "a.txt",
        "7.txt",
        "notes.md",
        "cat/b.caption",
        "cat/8.caption",
        "scan.psd",
        "masks/about",
        "masks/a.png",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("text")
    for name in ("Thumbs.db", "LICENSE", "README.txt", "desktop.ini", ".DS_Store", "cat/.hidden"):
        (tmp_path / name).touch()
    found = scan_folder(tmp_path)
    assert [image.name for image in found.images] == ["a.png", "cat/b.png"]
    assert found.unused == (
        "Not used, as neither images nor captions: masks/about, notes.md, scan.psd.",
        "Captions without an image, not used: 7.txt, cat/8.caption.",
        "Folders deeper than one level, not read: cat/deep, masks/old. Move their images up.",
    )


def test_the_list_of_what_is_not_used_is_short(tmp_path: Path) -> None:
    save_image(tmp_path / "a.png")
    for number in range(2000):
        (tmp_path / f"{number}.npz").touch()
    (sentence,) = scan_folder(tmp_path).unused
    assert sentence.endswith("and 1995 more.") and len(sentence) < 150


def test_a_folder_without_images_names_what_it_holds(tmp_path: Path) -> None:
    save_image(tmp_path / "style" / "more" / "a.png")
    (tmp_path / "scan.psd").touch()
    with pytest.raises(ValueError, match=r"(?s)has no images: add some.*captions: scan\.psd\..*: style/more\."):
        scan_folder(tmp_path)


needs_links = pytest.mark.skipif(sys.platform == "win32", reason="links need a privilege on Windows")


@needs_links
def test_links_that_lead_nowhere_are_named(tmp_path: Path) -> None:
    save_image(tmp_path / "a.png")
    (tmp_path / "gone.png").symlink_to(tmp_path / "nothing.png")
    (tmp_path / "loop.png").symlink_to(tmp_path / "loop.png")
    (tmp_path / "one").symlink_to(tmp_path / "two")
    (tmp_path / "two").symlink_to(tmp_path / "one")
    found = scan_folder(tmp_path)
    assert [image.name for image in found.images] == ["a.png"]
    assert found.unused == ("Links that lead nowhere, not used: gone.png, loop.png, one, two.",)
    folder_fingerprint(tmp_path)


@needs_links
def test_links_out_of_the_allowed_folders_are_left_out(tmp_path: Path) -> None:
    root, secret = tmp_path / "input", tmp_path / "secret"
    image = save_image(root / "style" / "a.png")
    save_image(secret / "b.png")
    (secret / "words.txt").write_text("not yours")
    (image.parent / "a.txt").symlink_to(secret / "words.txt")
    (image.parent / "b.png").symlink_to(secret / "b.png")
    (image.parent / "more").symlink_to(secret)
    (image.parent / "masks").symlink_to(secret)
    (image.parent / "cat").mkdir()
    (image.parent / "cat" / "b.png").symlink_to(secret / "b.png")
    (image.parent / "cat" / "a.png").symlink_to(image)
    found = scan_folder(image.parent, allowed=[root])
    assert [(each.name, each.caption) for each in found.images] == [("a.png", ""), ("cat/a.png", "")]
    (sentence,) = found.unused
    assert "Links out of the allowed folders, not used: a.txt, b.png, cat/b.png, masks, more." in sentence
    before = folder_fingerprint(image.parent, [root])
    (secret / "words.txt").write_text("still not yours")
    assert folder_fingerprint(image.parent, [root]) == before
    (image.parent / "masks").unlink()
    everything = scan_folder(image.parent)  # a script may read what it likes
    assert everything.images[0].caption == "still not yours" and len(everything.images) == 5
    assert scan_folder(image.parent, allowed=[root, secret]).images == everything.images


@pytest.mark.skipif(sys.platform != "linux", reason="other systems allow no such names")
def test_a_name_that_is_no_text_is_left_out(tmp_path: Path) -> None:
    save_image(tmp_path / "a.png")
    odd = os.fsencode(tmp_path) + b"/caf\xe9.png"
    with open(odd, "wb") as file:
        file.write(png_bytes(Image.new("RGB", (64, 64))))
    os.mkdir(os.fsencode(tmp_path) + b"/\xff")
    found = scan_folder(tmp_path)
    assert [image.name for image in found.images] == ["a.png"]
    assert found.unused == ("Names that are not valid text, not used: ?, caf?.png. Rename them.",)
    folder_fingerprint(tmp_path)


def test_a_subfolder_that_may_not_be_read_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a.png", "closed/b.png", "masks/a.png"):
        save_image(tmp_path / name)
    scandir = os.scandir

    def refuse(folder: Path) -> object:
        if os.path.basename(folder) in ("closed", "masks"):
            raise PermissionError(13, "Permission denied")
        return scandir(folder)

    monkeypatch.setattr(listing.os, "scandir", refuse)
    found = scan_folder(tmp_path)
    assert [image.name for image in found.images] == ["a.png"]
    assert found.unused == ("Not used, since they may not be read: closed/, masks/. Change their permissions.",)
    folder_fingerprint(tmp_path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="a system without pipes")
def test_a_pipe_is_not_opened(tmp_path: Path) -> None:
    save_image(tmp_path / "a.png")
    os.mkfifo(tmp_path / "b.png")
    assert names(tmp_path) == ["a.png"] and "b.png" in scan_folder(tmp_path).unused[0]


def test_the_fingerprint_survives_a_file_that_vanishes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_image(tmp_path / "a.png")
    before, stat = folder_fingerprint(tmp_path), Path.stat

    def vanished(path: Path, **options: bool) -> os.stat_result:
        if path.name == "a.png":
            raise FileNotFoundError(2, "No such file")
        return stat(path, **options)

    monkeypatch.setattr(Path, "stat", vanished)
    assert folder_fingerprint(tmp_path) != before


def test_moving_images_and_pages_are_told(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (64, 64), color) for color in ("red", "blue")]
    for suffix in ("gif", "webp", "png", "tif", "avif"):
        frames[0].save(tmp_path / f"{suffix}.{suffix}", save_all=True, append_images=frames[1:])
        frames[0].save(tmp_path / f"{suffix}1.{suffix}")
    frames[0].save(tmp_path / "views.mpo", "MPO", save_all=True, append_images=frames[1:])
    moving = {image.name for image in scan_folder(tmp_path).images if image.moving}
    assert moving == {"gif.gif", "webp.webp", "png.png", "tif.tif", "avif.avif"}
