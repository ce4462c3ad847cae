"""Sets of previews as files: a PNG for each step, in a folder of the training's own, also after it is resumed."""

from __future__ import annotations

import io
import json
import logging
import re
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from ..storage import clear_partial_files, to_pil, write_atomically

MOST = 24  # sets of a training that stay
READ_SIDE = 256  # pixels at most of the images that are read again, which are for a sheet

_KEY = "aclora_previews"  # of the text in a PNG that tells which training, prompts and sizes it has
_STEP = re.compile(r"step_(\d+)\.png")

log = logging.getLogger("aclora")


@dataclass(frozen=True, eq=False)
class PreviewSet:
    """Images that were drawn with the adapter of a step; step 0 is the model without it."""

    step: int
    prompts: list[str]
    images: list[Tensor]  # of each prompt: (height, width, 3), float32, 0 to 1, READ_SIDE at most


class PreviewFiles:
    """The sets of previews of a training: ROOT/NAME_00001/step_000050.png and so on.

    A file holds the images of a set side by side. Each training has a folder of its own with the next number; one that
    is resumed goes on in its folder. Of more than MOST sets some are deleted, so that those which stay are evenly
    spaced; the first, the last and the protected ones are the last to go.

    Args:
        root: of all folders; made when it is needed, as is the folder of the training.
        name: of the folder, without its number.
        prompts: of the images of each set.
        protected: returns the steps whose sets should stay.
    """

    def __init__(
        self, root: Path, name: str, prompts: Sequence[str] = (), protected: Callable[[], Collection[int]] = tuple
    ) -> None:
        self.folder: Path | None = None  # of this training, once it has one
        self._root, self._name, self._prompts, self._protected = root, name, list(prompts), protected
        self._training = 0.0

    def begin(self, training: float, resumed: bool) -> None:
        """Begin a training, or open the folder of one that is resumed or over.

        training: when it was started first, in seconds since 1970, which tells it from others.
        """
        self._training = training
        self.folder = self._folder_of(training) if resumed else None
        if self.folder:
            clear_partial_files(self.folder, suffix=".png")

    def write(self, step: int, images: Sequence[Tensor]) -> None:
        """Write the images of a step; a set that is incomplete, as after a cancel, is left out.

        Args:
            step: that the adapter is of; 0 without it.
            images: one for each prompt, (height, width, 3), floating point, 0 to 1.

        Raises:
            OSError: the file cannot be written.
        """
        if not images or len(images) != len(self._prompts):
            return
        self.folder = self.folder or self._new_folder()
        facts = {"training": self._training, "step": step, "prompts": self._prompts}
        write_atomically(self.folder / f"step_{step:06}.png", [_png(images, facts)])
        self._thin(step)

    def sets(self) -> list[PreviewSet]:
        """Return the sets that are there, by step: those with the prompts of the last one, without damaged files."""
        found = [found for _, path in self._files() if (found := _read(path))]
        return [each for each in found if each.prompts == found[-1].prompts]

    def _thin(self, newest: int) -> None:
        """Delete sets until few enough are left: first those whose neighbours are nearest to each other."""
        files = dict(self._files())
        protected = {newest, *self._protected()}
        while len(files) > MOST:
            steps = list(files)
            gaps = {step: after - before for before, step, after in zip(steps, steps[1:], steps[2:], strict=False)}
            step = min(gaps, key=lambda step: (step in protected, gaps[step], step))
            with suppress(OSError):  # somebody has it open; it is tried again after the next set
                files[step].unlink()
            del files[step]

    def _files(self) -> list[tuple[int, Path]]:
        """Return the steps with their files, in their order."""
        return _files(self.folder) if self.folder else []

    def _folder_of(self, training: float) -> Path | None:
        for folder in reversed(self._folders()):
            facts = next((_facts(path) for _, path in _files(folder)), None)
            if facts is not None and facts.get("training") == training:
                return folder
        return None

    def _folders(self) -> list[Path]:
        """Return the folders of this name, by their numbers."""
        pattern = re.compile(rf"{re.escape(self._name)}_(\d+)", re.IGNORECASE)
        paths = self._root.iterdir() if self._root.is_dir() else ()
        matches = [(int(match[1]), path) for path in paths if (match := pattern.fullmatch(path.name))]
        return [path for _, path in sorted(matches)]

    def _new_folder(self) -> Path:
        self._root.mkdir(parents=True, exist_ok=True)
        last = self._folders()[-1:]
        number = int(last[0].name.rpartition("_")[2]) if last else 0
        while True:
            number += 1
            folder = self._root / f"{self._name}_{number:05}"
            with suppress(FileExistsError):  # another server has just taken it
                folder.mkdir()
                return folder


def _files(folder: Path) -> list[tuple[int, Path]]:
    paths = folder.iterdir() if folder.is_dir() else ()
    return sorted((int(match[1]), path) for path in paths if (match := _STEP.fullmatch(path.name)))


def _png(images: Sequence[Tensor], facts: dict[str, Any]) -> bytes:
    pictures = [to_pil(image) for image in images]
    strip = Image.new("RGB", (sum(each.width for each in pictures), max(each.height for each in pictures)))
    left = 0
    for each in pictures:
        strip.paste(each, (left, 0))
        left += each.width
    text = PngInfo()
    text.add_text(_KEY, json.dumps({**facts, "sizes": [each.size for each in pictures]}))
    file = io.BytesIO()
    strip.save(file, "PNG", pnginfo=text, compress_level=4)
    return file.getvalue()


def _facts(path: Path) -> dict[str, Any] | None:
    """Return what a file tells of itself; None if it is damaged or none of ours."""
    try:
        with Image.open(path) as strip:
            return dict(json.loads(strip.info[_KEY]))
    except Exception:  # a damaged file may raise anything
        return None


def _read(path: Path) -> PreviewSet | None:
    """Return the set of a file; None if it is damaged or none of ours."""
    facts = _facts(path)
    if facts is None:
        return None
    try:
        images, left = [], 0
        with Image.open(path) as strip:
            for width, height in facts["sizes"]:
                image = strip.crop((left, 0, left + width, height))
                image.thumbnail((READ_SIDE, READ_SIDE), Image.Resampling.LANCZOS)
                images.append(torch.from_numpy(np.asarray(image.convert("RGB"), dtype=np.float32) / 255))
                left += width
        return PreviewSet(facts["step"], facts["prompts"], images)
    except Exception as error:  # as above
        log.warning("AC-LoRA: %s is damaged (%s) and left out of the sheet.", path.name, type(error).__name__)
        return None
