import math
import os
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from aclora_core.dataset.decoding import cropped_fraction, upscale_factor, load_image, upright_size
from aclora_core.dataset.folder import MIN_SIDE, folder_fingerprint, scan_folder
from aclora_core.dataset.image import CaptionedImage
from aclora_core.dataset.masks import load_mask


def save(path: Path, size: tuple[int, int] = (64, 64), color: str | tuple[int, ...] = "red", **options: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, color).save(path, **options)
    return path


def two_halves(width: int = 80, height: int = 40) -> Image.Image:
    """Left half red, right half blue."""
    image = Image.new("RGB", (width, height), "red")
    image.paste("blue", (width // 2, 0, width, height))
    return image


def picture(path: Path) -> CaptionedImage:
    (found,) = (item for item in scan_folder(path.parent).pictures if item.path == path)
    return found


def names(folder: Path) -> list[str]:
    return [item.name for item in scan_folder(folder).pictures]


def test_pictures_come_in_natural_order_whatever_their_kind(tmp_path: Path) -> None:
    for name in ("b10.png", "b9.JPG", "B1.webp", "a.bmp", "notes.md"):
        if name.endswith("md"):
            (tmp_path / name).write_text("no picture")
        else:
            save(tmp_path / name)
    assert names(tmp_path) == ["a.bmp", "B1.webp", "b9.JPG", "b10.png"]


def test_subfolders_count_as_often_as_their_name_says(tmp_path: Path) -> None:
    save(tmp_path / "z.png")
    save(tmp_path / "10_cat" / "a.png")
    save(tmp_path / "2_dog" / "a.png")
    save(tmp_path / "other" / "a.png")
    save(tmp_path / "0_left out" / "a.png")
    save(tmp_path / "other" / "deeper" / "a.png")
    save(tmp_path / ".hidden" / "a.png")
    save(tmp_path / "other" / "._a.png")
    found = [(item.name, item.repeats) for item in scan_folder(tmp_path).pictures]
    assert found == [("z.png", 1), ("2_dog/a.png", 2), ("10_cat/a.png", 10), ("other/a.png", 1)]


def test_a_year_as_folder_name_is_not_taken_for_repeats(tmp_path: Path) -> None:
    save(tmp_path / "2024_spring" / "a.png")
    with pytest.raises(ValueError, match='"2024_spring" asks for 2024 repeats'):
        scan_folder(tmp_path)


@pytest.mark.parametrize(
    ("written", "trigger", "expected"),
    [
        (None, "inkstyle", "inkstyle"),
        ("", "inkstyle", "inkstyle"),
        (" \n ", "inkstyle", "inkstyle"),
        (None, "", ""),
        ("a rocket", "", "a rocket"),
        ("a rocket", "inkstyle", "inkstyle, a rocket"),
        ("a rocket, InkStyle", "inkstyle", "a rocket, InkStyle"),
        ("three inkstyles", "inkstyle", "inkstyle, three inkstyles"),
        ("a\r\nrocket\t of  tin\n", " ink  style ", "ink style, a rocket of tin"),
        ("c++ (cover)", "c++", "c++ (cover)"),
    ],
)
def test_captions_carry_the_trigger_word(tmp_path: Path, written: str | None, trigger: str, expected: str) -> None:
    save(tmp_path / "a.png")
    if written is not None:
        (tmp_path / "a.txt").write_bytes(written.encode())
    assert scan_folder(tmp_path, trigger).pictures[0].caption == expected


def test_captions_are_found_beside_their_picture(tmp_path: Path) -> None:
    folder = tmp_path / "my.png"  # a folder whose name contains the suffix
    for name in ("a.png", "b.v2.png", "c.png", "d.png"):
        save(folder / name)
    (folder / "a.txt").write_bytes("\ufeffwith a mark, é".encode())
    (folder / "a.caption").write_text("not this one")
    (folder / "b.v2.TXT").write_text("two dots")
    (folder / "c.caption").write_text("other suffix")
    assert [item.caption for item in scan_folder(folder).pictures] == ["with a mark, é", "two dots", "other suffix", ""]


@pytest.mark.parametrize("encoding", ["latin-1", "utf-16", "utf-16-le"])
def test_a_caption_that_is_not_utf8_is_an_error_with_its_name(tmp_path: Path, encoding: str) -> None:
    save(tmp_path / "cafe.png")
    (tmp_path / "cafe.txt").write_bytes("un café".encode(encoding))
    with pytest.raises(ValueError, match=r"cafe\.txt of cafe\.png is not UTF-8 text: open"):
        scan_folder(tmp_path)


def test_an_empty_or_missing_folder_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match='"empty" has no pictures'):
        scan_folder(tmp_path / "empty")
    with pytest.raises(ValueError, match='"gone" cannot be read: No such file'):
        scan_folder(tmp_path / "gone")


def test_broken_pictures_are_named_without_their_path_and_the_rest_is_used(tmp_path: Path) -> None:
    save(tmp_path / "good.png")
    (tmp_path / "text.png").write_text("I am text")
    (tmp_path / "zero.jpg").write_bytes(b"")
    (tmp_path / "ghost.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n")
    result = scan_folder(tmp_path)
    assert [item.name for item in result.pictures] == ["good.png"]
    assert [problem.split()[0] for problem in result.problems] == ["ghost.png", "text.png", "zero.jpg"]
    assert str(tmp_path) not in "".join(result.problems)


def test_a_folder_of_broken_pictures_only_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_text("I am text")
    with pytest.raises(ValueError, match=r"None of the 1 pictures in .* can be used\. a\.png"):
        scan_folder(tmp_path)


def test_a_picture_cut_off_in_the_middle_is_an_error_with_its_name(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    for suffix in ("png", "jpg", "webp"):
        path = tmp_path / f"cut.{suffix}"
        Image.fromarray(noise).save(path)
        path.write_bytes(path.read_bytes()[:-1500])
        with pytest.raises(ValueError, match=rf"cut\.{suffix} was left out: it cannot be read"):
            load_image(CaptionedImage(path, path.name, "", 64, 64), (64, 64))


def test_a_tiny_picture_is_an_error_that_says_the_minimum(tmp_path: Path) -> None:
    save(tmp_path / "dot.png", (1, 1))
    save(tmp_path / "good.png", (MIN_SIDE, MIN_SIDE))
    with pytest.raises(ValueError, match=r"dot\.png is 1 × 1 pixels.* at least 32\."):
        scan_folder(tmp_path)


def test_all_faults_are_told_at_once(tmp_path: Path) -> None:
    for number in range(7):
        save(tmp_path / f"dot{number}.png", (1, 1))
    with pytest.raises(ValueError, match=r"(?s)dot0.*\n.*dot4.*\n\(and 2 more\)"):
        scan_folder(tmp_path)


def fake_png(width: int, height: int) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    row = b"\0" * (1 + (width + 7) // 8)
    packer = zlib.compressobj(1)
    body = b"".join(packer.compress(row) for _ in range(height)) + packer.flush()
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def test_a_100_megapixel_picture_loads_without_a_warning(tmp_path: Path) -> None:
    path = tmp_path / "huge.png"
    path.write_bytes(fake_png(10_000, 10_000))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = load_image(picture(path), (64, 64))
    assert loaded.shape == (64, 64, 3)
    assert loaded.max() == 0


def test_a_decompression_bomb_is_left_out_with_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "bomb.png").write_bytes(fake_png(200_000, 1)[:16] + struct.pack(">II", 60_000, 60_000))
    data = fake_png(64, 64)
    header = b"IHDR" + struct.pack(">IIBBBBB", 60_000, 60_000, 1, 0, 0, 0, 0)
    bomb = data[:12] + header + struct.pack(">I", zlib.crc32(header)) + data[33:]
    (tmp_path / "bomb.png").write_bytes(bomb)
    save(tmp_path / "good.png")
    result = scan_folder(tmp_path)
    assert len(result.pictures) == 1
    assert result.problems == ("bomb.png was left out: it has more than 178 megapixels. Make it smaller.",)


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tiff"])
def test_exif_rotation_is_honoured(tmp_path: Path, suffix: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: the left side of the file is the top
    path = tmp_path / f"turned.{suffix}"
    two_halves(160, 80).save(path, exif=exif, **({"lossless": True} if suffix == "webp" else {}))
    found = picture(path)
    assert found.size == (80, 160)
    loaded = load_image(found, (80, 160))
    assert loaded.shape == (160, 80, 3)
    top, bottom = loaded[40, 40], loaded[120, 40]
    torch.testing.assert_close(top, torch.tensor([1.0, 0.0, 0.0]), atol=0.02, rtol=0)
    torch.testing.assert_close(bottom, torch.tensor([0.0, 0.0, 1.0]), atol=0.02, rtol=0)


def loaded_pixel(path: Path) -> list[float]:
    loaded = load_image(picture(path), (64, 64))
    assert loaded.dtype == torch.float32 and loaded.shape == (64, 64, 3)
    return [round(value, 2) for value in loaded[32, 32].tolist()]


def test_transparency_goes_onto_white(tmp_path: Path) -> None:
    Image.new("RGBA", (64, 64), (255, 0, 0, 128)).save(tmp_path / "rgba.png")
    Image.new("LA", (64, 64), (0, 0)).save(tmp_path / "la.png")
    Image.new("RGB", (64, 64), (1, 2, 3)).save(tmp_path / "key.png", transparency=(1, 2, 3))
    palette = Image.new("P", (64, 64), 1)
    palette.putpalette([0, 0, 0, 0, 255, 0])
    palette.save(tmp_path / "p.png", transparency=1)
    palette.save(tmp_path / "p.gif")
    assert loaded_pixel(tmp_path / "rgba.png") == [1.0, 0.5, 0.5]
    assert loaded_pixel(tmp_path / "la.png") == [1.0, 1.0, 1.0]
    assert loaded_pixel(tmp_path / "key.png") == [1.0, 1.0, 1.0]
    assert loaded_pixel(tmp_path / "p.png") == [1.0, 1.0, 1.0]
    assert loaded_pixel(tmp_path / "p.gif") == [0.0, 1.0, 0.0]


def test_deep_grey_and_print_colours_become_rgb(tmp_path: Path) -> None:
    half = np.full((64, 64), 32768, dtype=np.uint16)
    Image.fromarray(half).save(tmp_path / "deep.png")
    Image.fromarray(half).save(tmp_path / "deep.tif")
    Image.fromarray(half.astype(np.int32)).save(tmp_path / "int.tif")
    Image.fromarray(np.full((64, 64), 0.25, dtype=np.float32)).save(tmp_path / "float.tif")
    Image.new("L", (64, 64), 51).save(tmp_path / "grey.png")
    Image.new("1", (64, 64), 1).save(tmp_path / "bit.png")
    Image.new("CMYK", (64, 64), (0, 255, 255, 0)).save(tmp_path / "print.jpg")
    assert loaded_pixel(tmp_path / "deep.png") == [0.5, 0.5, 0.5]
    assert loaded_pixel(tmp_path / "deep.tif") == [0.5, 0.5, 0.5]
    assert loaded_pixel(tmp_path / "int.tif") == [0.5, 0.5, 0.5]
    assert loaded_pixel(tmp_path / "float.tif") == [0.25, 0.25, 0.25]
    assert loaded_pixel(tmp_path / "grey.png") == [0.2, 0.2, 0.2]
    assert loaded_pixel(tmp_path / "bit.png") == [1.0, 1.0, 1.0]
    red, green, blue = loaded_pixel(tmp_path / "print.jpg")
    assert red > 0.9 and green < 0.1 and blue < 0.1


def test_a_picture_is_scaled_to_cover_and_cropped_evenly(tmp_path: Path) -> None:
    stripes = Image.new("RGB", (300, 100), "white")
    stripes.paste("black", (100, 0, 200, 100))  # the middle third
    stripes.save(tmp_path / "wide.png")
    found = picture(tmp_path / "wide.png")
    loaded = load_image(found, (64, 64))
    assert loaded[:, 2:-2].max() < 0.02  # only the middle is left
    assert math.isclose(cropped_fraction(found, (64, 64)), 2 / 3)
    assert math.isclose(upscale_factor(found, (64, 64)), 0.64)
    assert math.isclose(upscale_factor(found, (64, 200)), 2.0)


def test_a_picture_of_the_buckets_size_is_unchanged(tmp_path: Path) -> None:
    pixels = np.random.default_rng(1).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    loaded = load_image(picture(tmp_path / "a.png"), (64, 48))
    torch.testing.assert_close(loaded, torch.from_numpy(pixels).float() / 255, atol=0, rtol=0)


def test_a_large_photograph_read_at_reduced_size_looks_the_same(tmp_path: Path) -> None:
    wave = np.add.outer(np.sin(np.arange(900) / 90), np.cos(np.arange(1200) / 70))
    photo = Image.fromarray(((wave + 2) * 63).astype(np.uint8)).convert("RGB")
    photo.save(tmp_path / "photo.jpg", quality=95)
    photo.save(tmp_path / "photo.png")
    small = [load_image(picture(tmp_path / name), (64, 48)) for name in ("photo.jpg", "photo.png")]
    torch.testing.assert_close(small[0], small[1], atol=0.02, rtol=0)


def test_the_fingerprint_sees_edits_of_pictures_and_captions(tmp_path: Path) -> None:
    path = save(tmp_path / "a.png")
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
    save(tmp_path / "3_more" / "b.png")
    changed()
    (tmp_path / "3_more").rename(tmp_path / "4_more")
    changed()


def test_reading_leaves_no_file_open(tmp_path: Path) -> None:
    path = save(tmp_path / "a.png")
    with warnings.catch_warnings():
        warnings.simplefilter("error", ResourceWarning)
        load_image(picture(path), (64, 64))
        with pytest.raises(ValueError):
            upright_size(Path(__file__), "test.py")


def test_a_mask_is_no_picture_and_is_cropped_and_scaled_as_its_picture(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 2, (12, 10), dtype=np.uint8).repeat(16, 0).repeat(16, 1) * 255
    grey = Image.fromarray(pixels)
    grey.convert("RGB").save(tmp_path / "a.png")
    grey.resize((80, 96), Image.Resampling.NEAREST).save(save(tmp_path / "masks" / "a.png"))
    grey.save(tmp_path / "b-masklabel.png")
    save(tmp_path / "b.jpg", (160, 192))
    save(tmp_path / "c.png")
    save(tmp_path / "4_more" / "d.png")
    save(tmp_path / "4_more" / "masks" / "d.webp", color="white")
    found = scan_folder(tmp_path)
    assert [item.name for item in found.pictures] == ["a.png", "b.jpg", "c.png", "4_more/d.png"]
    assert [item.mask is not None for item in found.pictures] == [True, True, False, True] and not found.spare_masks
    for size in ((64, 64), (96, 32), (160, 192)):
        seen = load_image(picture(tmp_path / "a.png"), size)[..., 0]
        for name in ("a.png", "b.jpg"):
            mask = load_mask(picture(tmp_path / name), size)
            assert mask.shape == seen.shape and float((mask - seen).abs().mean()) < 0.06
    assert load_mask(picture(tmp_path / "c.png"), (64, 64)) is None
    before = folder_fingerprint(tmp_path)
    os.utime(tmp_path / "masks" / "a.png", ns=(1, 1))
    assert folder_fingerprint(tmp_path) != before


def test_what_is_transparent_can_be_the_mask(tmp_path: Path) -> None:
    half = two_halves(64, 64).convert("RGBA")
    half.putalpha(Image.fromarray(np.repeat(np.uint8([[0] * 32 + [255] * 32]), 64, 0)))
    half.save(tmp_path / "a.png")
    two_halves(64, 64).convert("RGBA").save(tmp_path / "b.png")  # a channel that hides nothing
    mask = load_mask(picture(tmp_path / "a.png"), (32, 32), alpha=True)
    assert not mask[:, :16].any() and (mask[:, 16:] == 1).all()
    assert load_mask(picture(tmp_path / "a.png"), (32, 32)) is None
    assert load_mask(picture(tmp_path / "b.png"), (32, 32), alpha=True) is None
    save(tmp_path / "a-masklabel.png", color="white")
    assert (load_mask(picture(tmp_path / "a.png"), (32, 32), alpha=True) == 1).all()  # the file goes first


def test_a_mask_painted_on_nothing_is_black_where_nothing_is(tmp_path: Path) -> None:
    save(tmp_path / "a.png")
    painted = Image.new("RGBA", (64, 64), (255, 255, 255, 0))
    painted.paste("white", (0, 0, 64, 32))
    painted.save(tmp_path / "a-masklabel.png")
    mask = load_mask(picture(tmp_path / "a.png"), (64, 64))
    assert (mask[:32] == 1).all() and not mask[32:].any()


def test_a_mask_of_another_shape_or_of_nothing_is_an_error_that_names_the_picture(tmp_path: Path) -> None:
    save(tmp_path / "a.png")
    save(tmp_path / "masks" / "a.png", (64, 48), "white")
    with pytest.raises(ValueError, match=r"The mask of a\.png is 64 × 48 pixels, but the picture 64 × 64"):
        load_mask(picture(tmp_path / "a.png"), (64, 64))
    (tmp_path / "masks" / "a.png").write_text("no picture")
    with pytest.raises(ValueError, match=r"The mask a\.png of a\.png cannot be read"):
        load_mask(picture(tmp_path / "a.png"), (64, 64))


def test_a_subfolder_can_be_left_out(tmp_path: Path) -> None:
    save(tmp_path / "a.png")
    save(tmp_path / "plain" / "b.png")
    assert [item.name for item in scan_folder(tmp_path, without=tmp_path / "plain").pictures] == ["a.png"]
