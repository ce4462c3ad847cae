"""Fetch icon sets from npm and render them as captioned images: the same concepts in several styles.

    python -m tools.tiny_base.icons CACHE      # fetches all sets into the folder CACHE and prints a table

Each set is an npm package @iconify-json/<set> with one icons.json: icons {name: {body, width, height}}, aliases
{name: {parent, hFlip, ...}} and a size for the whole set. icon_sets.py lists the sets, icon_names.py maps names to
concepts. Rendering 64 images or more starts processes: such a script needs the guard `if __name__ == "__main__"`.
"""

import argparse
import functools
import hashlib
import io
import json
import shutil
import subprocess
import tarfile
import tempfile
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tools.tiny_base.icon_names import concept, is_junk, renamed, vocabulary
from tools.tiny_base.icon_sets import ALL_STYLES, BASE_STYLES, HELD_OUT_STYLES, REFERENCE, Style, known_style

_TRANSFORMS = ("hFlip", "vFlip", "rotate")  # of an alias, applied to the image of its parent


def fetch(cache: Path, styles: Iterable[str] | None = None) -> list[Path]:
    """Fetch the packages of the styles (all twelve by default) into cache with `npm pack`, unless they are there.

    Raises:
        RuntimeError: npm is missing or fails, or a package has another SHA-256.
    """
    cache.mkdir(parents=True, exist_ok=True)
    paths = []
    for style in map(known_style, ALL_STYLES if styles is None else styles):
        path = cache / style.archive
        if path.is_file():
            _check(style, path)
        else:
            _npm_pack(style, path)
        paths.append(path)
    return paths


def _check(style: Style, path: Path) -> None:
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != style.sha256:
        wanted = f"{style.package}@{style.version} with {style.sha256}"
        raise RuntimeError(f"{path} has SHA-256 {found} and is not {wanted}: delete it, then fetch again")


def _npm_pack(style: Style, path: Path) -> None:
    wanted = f"{style.package}@{style.version}"
    npm = shutil.which("npm")
    if npm is None:
        raise RuntimeError(f"npm is needed to fetch {wanted}: install Node.js, or put {path.name} into {path.parent}")
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        done = subprocess.run([npm, "pack", "--silent", wanted], cwd=folder, capture_output=True, text=True)
        packed = Path(folder) / path.name
        if done.returncode != 0 or not packed.is_file():
            raise RuntimeError(f"`npm pack {wanted}` failed ({done.returncode}): {done.stderr.strip()[-500:]}")
        _check(style, packed)
        packed.replace(path)


@functools.cache
def _icons_json(cache: Path, style: str) -> dict[str, Any]:
    path = cache / known_style(style).archive
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: fetch it with `python -m tools.tiny_base.icons {cache}`")
    with tarfile.open(path) as archive:
        member = archive.extractfile("package/icons.json")
        assert member is not None  # extractfile gives None for folders and links only
        return json.load(member)


def _split_aliases(data: dict[str, Any]) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """Return all different icons, including transformed aliases, and the plain aliases {alias: icon}."""
    icons = {name: icon for name, icon in data["icons"].items() if not icon.get("hidden")}
    plain: dict[str, str] = {}
    for alias, entry in data.get("aliases", {}).items():
        parent = entry["parent"]
        if entry.get("hidden") or parent not in icons:
            continue
        if any(entry.get(turn) for turn in _TRANSFORMS):
            icons[alias] = {**icons[parent], **entry}
        else:
            plain[alias] = parent
    return icons, plain


def compose_svg(icon: dict[str, Any], width: float, height: float) -> str:
    """Return the <svg> of an icon in a square viewBox. width and height: the set's default size."""
    width, height = icon.get("width", width), icon.get("height", height)
    left, top = icon.get("left", 0), icon.get("top", 0)
    middle_x, middle_y, side = left + width / 2, top + height / 2, max(width, height)
    body = icon["body"]
    if any(icon.get(turn) for turn in _TRANSFORMS):
        mirror = f"{-1 if icon.get('hFlip') else 1} {-1 if icon.get('vFlip') else 1}"
        turn = f"rotate({90 * icon.get('rotate', 0)}) scale({mirror})"
        body = f'<g transform="translate({middle_x} {middle_y}) {turn} translate({-middle_x} {-middle_y})">{body}</g>'
    box = f"{middle_x - side / 2:g} {middle_y - side / 2:g} {side:g} {side:g}"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="{box}" width="{side:g}" height="{side:g}" color="#000000">{body}</svg>'
    )


def load_set(cache: Path, style: str) -> dict[str, str]:
    """Return {concept: svg} of a style, sorted by concept. Reads the reference set (noto) too, for its names."""
    known = vocabulary(*_split_aliases(_icons_json(cache, REFERENCE)))
    data = _icons_json(cache, style)
    icons, plain = _split_aliases(data)
    second_names: dict[str, list[str]] = {}
    for alias, parent in plain.items():
        second_names.setdefault(parent, []).append(alias)
    names = frozenset(icons)
    found: dict[str, str] = {}
    # Icons whose own name is the concept go first, so that a variant never takes their place.
    order = sorted(icons, key=lambda name: (concept(style, name, (), known) != name.replace("-", " "), name))
    for name in order:
        words = concept(style, name, second_names.get(name, ()), known)
        own = renamed(style, name)
        if not words or words in found or is_junk(own, names, known) or is_junk(words.replace(" ", "-"), names, known):
            continue
        found[words] = compose_svg(icons[name], data.get("width", 16), data.get("height", 16))
    return dict(sorted(found.items()))


def render(svg: str, size: int = 128) -> np.ndarray:
    """Render an SVG as uint8 (size, size, 3) on white."""
    import resvg_py  # imported here, as captions and tables do not need it

    png = resvg_py.svg_to_bytes(svg_string=svg, width=size, height=size, background="#ffffff", skip_system_fonts=True)
    return np.asarray(Image.open(io.BytesIO(bytes(png))).convert("RGB"))


def render_many(svgs: list[str], size: int = 128) -> np.ndarray:
    """Render SVGs as uint8 (len(svgs), size, size, 3), in processes, as resvg holds the GIL."""
    if len(svgs) < 64:  # starting processes would take longer
        images = [render(svg, size) for svg in svgs]
    else:
        with ProcessPoolExecutor() as pool:
            images = list(pool.map(functools.partial(render, size=size), svgs, chunksize=32))
    return np.stack(images) if images else np.zeros((0, size, size, 3), np.uint8)


def base_images(cache: Path, size: int = 128) -> tuple[np.ndarray, list[str], list[str]]:
    """Return the base model's training data: images uint8 (N, size, size, 3), their concepts, their style words."""
    rows = [(svg, words, style) for style in BASE_STYLES for words, svg in load_set(cache, style).items()]
    images = render_many([svg for svg, _, _ in rows], size)
    return images, [words for _, words, _ in rows], [BASE_STYLES[style].word for _, _, style in rows]


def held_out_images(cache: Path, style: str, size: int = 128) -> tuple[np.ndarray, list[str]]:
    """Return the images uint8 (N, size, size, 3) and concepts of a held-out style."""
    if style not in HELD_OUT_STYLES:
        raise KeyError(f"{style!r} is no held-out style; these are: {', '.join(HELD_OUT_STYLES)}")
    icons = load_set(cache, style)
    return render_many(list(icons.values()), size), list(icons)


def caption(words: str, style: str) -> str:
    """Return a caption: "rocket", "noto" -> "a rocket, noto style". The style is a Style.word."""
    silent = words.startswith(("hour", "honest", "heir"))
    spoken_you = words.startswith(("uni", "use", "ufo", "euro", "one", "uk"))
    an = silent or (words[:1] in "aeiou" and not spoken_you)
    return f"{'an' if an else 'a'} {words}, {style} style"


def table(cache: Path) -> str:
    """Return a table of the concepts in each style, and how many of them noto and the base styles have."""
    concepts = {style: set(load_set(cache, style)) for style in ALL_STYLES}
    base = set().union(*(concepts[style] for style in BASE_STYLES))
    lines = [f"{'style':28}{'word':14}{'licence':14}{'concepts':>9}{'in noto':>9}{'in base':>9}"]
    for key, style in ALL_STYLES.items():
        own = concepts[key]
        lines.append(
            f"{key:28}{style.word:14}{style.licence:14}{len(own):9}{len(own & concepts[REFERENCE]):9}"
            f"{len(own & base):9}"
        )
    shared = Counter(words for style in BASE_STYLES for words in concepts[style])
    counts = Counter(shared.values())
    parts = ", ".join(f"{counts[n]} in {n}" for n in sorted(counts, reverse=True))
    lines.append(f"base: {sum(shared.values())} images of {len(shared)} concepts; by number of base styles: {parts}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="Fetch the icon sets and count their concepts.")
    parser.add_argument("cache", type=Path, help="folder for the packages")
    cache = parser.parse_args().cache
    fetch(cache)
    print(table(cache))


if __name__ == "__main__":
    main()
