"""tools.tiny_base.icons and the shipped example, tested on small icon sets made here."""

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from aclora_core.dataset import folder as images
from tests.support.icon_packs import pack
from tools.tiny_base import example_pictures, icons

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "workflows" / "example_pictures" / "fluent-emoji-high-contrast"
UNSEEN = EXAMPLE.with_name("fluent-emoji-high-contrast-unseen")
EXAMPLES = {EXAMPLE: example_pictures.CONCEPTS, UNSEEN: example_pictures.KEPT_BACK}
CACHE = ROOT / ".runtime" / "icons"


@pytest.mark.parametrize(
    ("entry", "corner"),
    [
        ({}, "top left"),
        ({"hFlip": True}, "top right"),
        ({"vFlip": True}, "bottom left"),
        ({"rotate": 1}, "top right"),
        ({"rotate": 2}, "bottom right"),
        ({"hFlip": True, "rotate": 1}, "bottom right"),  # first the mirror, then the turn
    ],
)
def test_icons_are_mirrored_and_rotated(entry: dict, corner: str) -> None:
    pytest.importorskip("resvg_py")
    image = icons.render(icons.compose_svg({"body": '<path d="M0 0h8v8H0z"/>', **entry}, 16, 16), 16)
    rows = slice(0, 8) if "top" in corner else slice(8, 16)
    columns = slice(0, 8) if "left" in corner else slice(8, 16)
    assert image[rows, columns].max() == 0
    assert image.sum() == 255 * 3 * (256 - 64)  # and everything else is white


def test_a_mirrored_alias_is_a_separate_image(tmp_path: Path) -> None:
    pytest.importorskip("resvg_py")
    pack(tmp_path, "noto", ["hand-left"], {"hand-right": {"parent": "hand-left", "hFlip": True}})
    images = {words: icons.render(svg, 16) for words, svg in icons.load_set(tmp_path, "noto").items()}
    np.testing.assert_array_equal(images["hand right"], images["hand left"][:, ::-1])
    assert images["hand left"][:, :8].max() == 0 and images["hand left"][:, 8:].min() == 255


def test_a_non_square_image_is_centred_on_white() -> None:
    pytest.importorskip("resvg_py")
    svg = icons.compose_svg({"body": '<path d="M0 0h32v16H0z"/>', "width": 32, "height": 16}, 99, 99)
    image = icons.render(svg, 32)
    assert image.shape == (32, 32, 3) and image.dtype == np.uint8
    assert image[8:24].max() == 0
    assert image[:8].min() == 255 and image[24:].min() == 255


def test_masks_gradients_and_transparency_are_rendered() -> None:
    pytest.importorskip("resvg_py")
    body = (
        '<defs><mask id="m"><path fill="#fff" d="M0 0h8v16H0z"/></mask><linearGradient id="g" x2="0" y2="1">'
        '<stop stop-color="#f00"/><stop offset="1" stop-color="#00f"/></linearGradient></defs>'
        '<g mask="url(#m)"><path fill="url(#g)" d="M0 0h16v16H0z"/></g>'
        '<path fill="#000" opacity=".5" d="M12 0h4v16h-4z"/>'
    )
    image = icons.render(icons.compose_svg({"body": body}, 16, 16), 16).astype(int)
    assert image[0, 0, 0] > 230 and image[15, 0, 2] > 230  # red above, blue below
    assert (image[:, 8:12] == 255).all()  # masked away
    assert abs(image[:, 12:] - 127).max() <= 1


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")  # Python 3.12 says so where torch has threads
def test_processes_render_in_order() -> None:
    pytest.importorskip("resvg_py")
    bodies = [f'<path d="M0 0h{n % 16 + 1}v16H0z"/>' for n in range(70)]
    svgs = [icons.compose_svg({"body": body}, 16, 16) for body in bodies]
    images = icons.render_many(svgs, 16)
    assert images.shape == (70, 16, 16, 3)
    assert [int((image[0, :, 0] == 0).sum()) for image in images] == [n % 16 + 1 for n in range(70)]
    assert icons.render_many([], 16).shape == (0, 16, 16, 3)


def test_base_images_keep_image_concept_and_style_together(tmp_path: Path) -> None:
    pytest.importorskip("resvg_py")
    thin = {"body": '<path d="M0 0h1v16H0z"/>'}
    for style in icons.BASE_STYLES:
        pack(tmp_path, style, ["owl", "rocket"], **{"owl": thin})
    images, words, styles = icons.base_images(tmp_path, 16)
    assert images.shape == (8, 16, 16, 3)
    assert words == ["owl", "rocket"] * 4
    assert styles == ["noto"] * 2 + ["twemoji"] * 2 + ["emojione"] * 2 + ["fluent"] * 2
    assert [(image[0, :, 0] == 0).sum() for image in images] == [1, 8] * 4


def test_an_icon_is_rendered_on_white_in_the_requested_size() -> None:
    pytest.importorskip("resvg_py")
    svg = icons.compose_svg({"body": '<circle cx="8" cy="8" r="4" fill="#00f"/>'}, 16, 16)
    for size in (32, 128):
        image = icons.render(svg, size)
        assert image.shape == (size, size, 3)
        assert (image[0] == 255).all() and (image[:, 0] == 255).all()
        assert image[size // 2, size // 2].tolist() == [0, 0, 255]


@pytest.mark.parametrize(
    ("icon", "box"),
    [({}, "0 0 16 16"), ({"width": 32}, "0 -8 32 32"), ({"height": 40, "left": 2, "top": -4}, "-10 -4 40 40")],
)
def test_the_view_box_is_the_square_around_the_icon(icon: dict, box: str) -> None:
    svg = icons.compose_svg({"body": "<g/>", **icon}, 16, 16)
    side = box.split()[-1]
    assert f'viewBox="{box}" width="{side}" height="{side}"' in svg
    assert svg.endswith("><g/></svg>") and "transform" not in svg


def test_held_out_images_accept_held_out_styles_only(tmp_path: Path) -> None:
    pytest.importorskip("resvg_py")
    pack(tmp_path, "noto", ["owl"])
    pack(tmp_path, "openmoji", ["owl"])
    images, words = icons.held_out_images(tmp_path, "openmoji", 16)
    assert images.shape == (1, 16, 16, 3) and words == ["owl"]
    with pytest.raises(KeyError, match="'noto' is no held-out style"):
        icons.held_out_images(tmp_path, "noto")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("rocket", "a rocket, noto style"),
        ("owl", "an owl, noto style"),
        ("hourglass done", "an hourglass done, noto style"),
        ("unicorn", "a unicorn, noto style"),
        ("umbrella", "an umbrella, noto style"),
        ("house", "a house, noto style"),
        ("euro banknote", "a euro banknote, noto style"),
    ],
)
def test_captions(words: str, expected: str) -> None:
    assert icons.caption(words, "noto") == expected


def test_four_styles_are_for_the_base_and_eight_are_held_out() -> None:
    held_out = "openmoji fluent-emoji noto-v1 emojione-v1 fxemoji streamline-emojis fluent-emoji-high-contrast"
    assert set(icons.HELD_OUT_STYLES) == {*held_out.split(), "emojione-monotone"}
    assert set(icons.BASE_STYLES) == {"noto", "twemoji", "emojione", "fluent"}
    styles = icons.ALL_STYLES.values()
    assert len({style.word for style in styles}) == len({style.package for style in styles}) == 12
    assert len({style.sha256 for style in styles}) == 12 and all(len(style.sha256) == 64 for style in styles)
    assert {style.licence for style in styles} == {"Apache-2.0", "CC-BY-4.0", "CC-BY-SA-4.0", "MIT"}


def test_a_missing_package_error_names_the_command_that_fetches_it(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"noto-1\.2\.9\.tgz is missing: .*python -m tools\.tiny_base\.icons"):
        icons.load_set(tmp_path, "noto")


def test_an_unknown_style_error_lists_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(KeyError, match="no icon style is called 'emoji'.*fxemoji"):
        icons.fetch(tmp_path, ["emoji"])


def test_a_missing_npm_is_named_in_the_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(RuntimeError, match="npm is needed to fetch @iconify-json/noto@1.2.9"):
        icons.fetch(tmp_path, ["noto"])


@pytest.mark.skipif(os.name == "nt", reason="the stand-in for npm is a shell script")
@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("echo no such package >&2; exit 1", r"failed \(1\): no such package"),
        ("exit 0", r"failed \(0\)"),
        ("echo other > iconify-json-noto-1.2.9.tgz", "SHA-256 .* and is not @iconify-json/noto@1.2.9"),
    ],
)
def test_a_failed_fetch_leaves_no_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, message: str
) -> None:
    tools, cache = tmp_path / "tools", tmp_path / "cache"
    tools.mkdir()
    (tools / "npm").write_text(f"#!/bin/sh\n{script}\n")
    (tools / "npm").chmod(0o755)
    monkeypatch.setenv("PATH", str(tools))
    with pytest.raises(RuntimeError, match=message):
        icons.fetch(cache, ["noto"])
    assert list(cache.iterdir()) == []


def test_a_damaged_package_in_the_cache_is_named_in_the_error(tmp_path: Path) -> None:
    path = tmp_path / icons.BASE_STYLES["noto"].archive
    path.write_bytes(b"half a download")
    with pytest.raises(RuntimeError, match="noto-1.2.9.tgz has SHA-256 .* delete it"):
        icons.fetch(tmp_path, ["noto"])


def test_the_examples_share_no_concept() -> None:
    assert len(example_pictures.CONCEPTS) == 24 and len(example_pictures.KEPT_BACK) == 12
    assert not set(example_pictures.CONCEPTS) & set(example_pictures.KEPT_BACK)


@pytest.mark.parametrize("folder", EXAMPLES, ids=lambda path: path.name)
def test_the_shipped_examples_are_captioned_images(folder: Path) -> None:
    files = {path.name for path in folder.iterdir()}
    stems = {words.replace(" ", "_"): words for words in EXAMPLES[folder]}
    assert files == {"LICENSE"} | {f"{stem}.{ending}" for stem in stems for ending in ("png", "txt")}
    for stem, words in stems.items():
        image = np.asarray(Image.open(folder / f"{stem}.png"))
        assert image.shape == (128, 128, 3)
        assert (image == image[:, :, :1]).all()  # ink has no colour
        assert image[0, 0].min() == 255 and 0.05 < (image < 128).mean() < 0.7
        article = "" if words in ("cherries", "thumbs up") else "an " if words[0] in "aeiou" else "a "
        assert (folder / f"{stem}.txt").read_text(encoding="utf-8") == f"{article}{words}\n"
    licence = (folder / "LICENSE").read_text(encoding="utf-8")
    assert "MIT License" in licence and "Copyright (c) Microsoft Corporation" in licence


@pytest.mark.parametrize("folder", EXAMPLES, ids=lambda path: path.name)
def test_the_shipped_examples_are_scanned_without_problems(folder: Path) -> None:
    scan = images.scan_folder(folder, "inkstyle")
    assert scan.problems == () and len(scan.images) == len(EXAMPLES[folder])
    expected = {"inkstyle, a turtle", "inkstyle, an elephant"} if folder == EXAMPLE else {"inkstyle, an owl"}
    assert expected <= {image.caption for image in scan.images}


@pytest.mark.parametrize("folder", EXAMPLES, ids=lambda path: path.name)
def test_the_shipped_examples_equal_what_the_tool_makes(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("resvg_py")
    needed = (*icons.BASE_STYLES, example_pictures.STYLE)
    missing = [name for name in needed if not (CACHE / icons.ALL_STYLES[name].archive).is_file()]
    if missing:
        pytest.skip(f"needs the icon sets {', '.join(missing)}: python -m tools.tiny_base.icons {CACHE}")
    example_pictures.write_example(CACHE, tmp_path, concepts=EXAMPLES[folder])
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in folder.iterdir()}
    for made in tmp_path.iterdir():
        shipped = folder / made.name
        if made.suffix == ".png":  # by pixels: the packing of a PNG depends on the zlib at hand
            np.testing.assert_array_equal(np.asarray(Image.open(made)), np.asarray(Image.open(shipped)))
        else:
            assert made.read_bytes() == shipped.read_bytes(), made.name
    for style in icons.BASE_STYLES:
        assert set(example_pictures.CONCEPTS + example_pictures.KEPT_BACK) <= set(icons.load_set(CACHE, style)), style


def test_the_example_is_reproducible_and_a_missing_icon_is_named(tmp_path: Path) -> None:
    pytest.importorskip("resvg_py")
    names = [words.replace(" ", "-") for words in example_pictures.CONCEPTS]
    one = tmp_path / "one"
    one.mkdir()
    pack(one, "noto", names)
    pack(one, example_pictures.STYLE, names)
    made = [example_pictures.write_example(one, tmp_path / folder, 16) for folder in ("first", "second")]
    assert [path.read_bytes() for path in made[0]] == [path.read_bytes() for path in made[1]]
    two = tmp_path / "two"
    two.mkdir()
    pack(two, "noto", names)
    pack(two, example_pictures.STYLE, names[1:])
    with pytest.raises(KeyError, match="has no image of: elephant"):
        example_pictures.write_example(two, tmp_path / "third", 16)
