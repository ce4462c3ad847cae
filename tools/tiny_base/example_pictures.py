"""Make the example datasets of the pack: captioned images of a style that the tiny base was not trained on.

    python -m tools.tiny_base.example_pictures CACHE OUT            # the 24 images to train on
    python -m tools.tiny_base.example_pictures CACHE OUT --unseen   # 12 others, to judge what was learned

The base model knows these concepts in each of its four styles. The captions name the concept and not the style, for
which a training has its trigger word. The concepts in KEPT_BACK are generated before and after a training; their real
images are the unseen ones.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from tools.tiny_base import icons

STYLE = "fluent-emoji-high-contrast"
CONCEPTS = (
    "elephant",
    "turtle",
    "penguin",
    "butterfly",
    "hamburger",
    "strawberry",
    "birthday cake",
    "sailboat",
    "locomotive",
    "helicopter",
    "christmas tree",
    "sunflower",
    "camera",
    "light bulb",
    "church",
    "smiling face with sunglasses",
    "construction worker",
    "down arrow",
    "thumbs up",
    "hammer",
    "cherries",
    "tropical fish",
    "t shirt",
    "wrapped gift",
)
KEPT_BACK = (
    "rocket",
    "guitar",
    "house",
    "dog face",
    "cat face",
    "owl",
    "bicycle",
    "cactus",
    "mushroom",
    "castle",
    "octopus",
    "hot beverage",
)
WITHOUT_ARTICLE = ("cherries", "thumbs up")
LICENCE = """\
The pictures in this folder are from Microsoft's Fluent Emoji, style "High Contrast",
{url}, taken from the npm package
{package} {version} and drawn at {size} x {size} pixels, black on white.
They are used under the MIT License:

    MIT License

    Copyright (c) Microsoft Corporation.

    Permission is hereby granted, free of charge, to any person obtaining a copy
    of this software and associated documentation files (the "Software"), to deal
    in the Software without restriction, including without limitation the rights
    to use, copy, modify, merge, publish, distribute, sublicense, and/or sell
    copies of the Software, and to permit persons to whom the Software is
    furnished to do so, subject to the following conditions:

    The above copyright notice and this permission notice shall be included in all
    copies or substantial portions of the Software.

    THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR
    IMPLIED, INCLUDING BUT NOT LIMITED TO THE WARRANTIES OF MERCHANTABILITY,
    FITNESS FOR A PARTICULAR PURPOSE AND NONINFRINGEMENT. IN NO EVENT SHALL THE
    AUTHORS OR COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM, DAMAGES OR OTHER
    LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR OTHERWISE, ARISING FROM,
    OUT OF OR IN CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE
    SOFTWARE.
"""


def plain_caption(words: str) -> str:
    """Return the caption without the style: "cat" -> "a cat"."""
    if words in WITHOUT_ARTICLE:
        return words
    return icons.caption(words, icons.HELD_OUT_STYLES[STYLE].word).rsplit(",", 1)[0]


def write_example(cache: Path, out: Path, size: int = 128, concepts: Sequence[str] = CONCEPTS) -> list[Path]:
    """Write a PNG and a .txt caption for every concept, and the licence, into out, reproducibly."""
    out.mkdir(parents=True, exist_ok=True)
    style = icons.HELD_OUT_STYLES[STYLE]
    drawn = icons.load_set(cache, STYLE)
    missing = [words for words in concepts if words not in drawn]
    if missing:
        raise KeyError(f"{style.package}@{style.version} has no image of: {', '.join(missing)}")
    written = []
    for words in concepts:
        path = out / f"{words.replace(' ', '_')}.png"
        Image.fromarray(icons.render(drawn[words], size)).convert("L").convert("RGB").save(path, optimize=True)
        path.with_suffix(".txt").write_text(plain_caption(words) + "\n", encoding="utf-8", newline="\n")
        written.append(path)
    licence = LICENCE.format(url=style.url, package=style.package, version=style.version, size=size)
    (out / "LICENSE").write_text(licence, encoding="utf-8", newline="\n")
    return written


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw the example dataset.")
    parser.add_argument("cache", type=Path, help="folder of the icon packages")
    parser.add_argument("out", type=Path, help="folder for the images and captions")
    parser.add_argument("--unseen", action="store_true", help="draw the concepts that are kept back")
    args = parser.parse_args()
    icons.fetch(args.cache, (icons.REFERENCE, STYLE))
    concepts = KEPT_BACK if args.unseen else CONCEPTS
    print(f"{len(write_example(args.cache, args.out, concepts=concepts))} images in {args.out}")


if __name__ == "__main__":
    main()
