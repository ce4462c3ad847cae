"""What a trained adapter does to images that it has not learned: the style they gain, the content they keep, copies.

Captions that the adapter has not seen are drawn with and without it, from the same noise. The frozen network itself
judges them: what a block in its middle makes of a latent with little noise tells style and content better than the
latent does. No other network is needed, and the measures of two trainings of one model can be compared.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..adapter import Adapter
from ..diffusion import TrainingSet, draw_latents
from ..distributed import ALONE, Processes
from ..storage import tensors_in, to_device
from .adapted_model import AdaptedModel
from .held_out import different_images
from .run import TrainingRun
from .sampler import group_by_key, images_per_step, style_indices

log = logging.getLogger("aclora")

STEPS = 10  # of a drawing
NOISE_FRACTION = 0.2  # at which features are taken
MIN_DRAWN, MAX_DRAWN = 3, 8  # drawings
MAX_LEARNED = 16  # training images that they are compared with
COPY_DISTANCE = 0.5  # of the distance between neighbouring training images, below which a drawing is a copy

_SHARE = 0.05  # of the forward passes of a training that this takes, except where it would draw too few
_STEP_COST = 2.5  # of an image in a training step, in forward passes
_SEED = 77_000  # the same for every training, so that their measures can be compared


@dataclass(frozen=True)
class LearnedStyle:
    """Measures of drawings of captions that were not learned."""

    prompts: int  # different captions
    style: float  # -1 to 1: share of the way from the model's own drawings to the training images; 0 without adapter
    content: float  # -1 to 1: likeness to the model's own drawings; 1 without an adapter
    copies: float | None  # -1 to 1: share of copies, less the model's own share; None where nobody can tell


class _StoppedError(Exception):
    """Somebody asked to stop."""


def add_learned_style(run: TrainingRun, adapter: Adapter, learned: Sequence[int], unseen: Sequence[int]) -> None:
    """Measure what an adapter does to captions that it has not learned, and add it to the facts of the training.

    Nothing is measured after a cancel or a divergence, nor without such captions. A failure is no more than a note.
    Several processes share the drawings, and the first one measures them.

    Args:
        run: the training, whose passes are over.
        adapter: as the training found it.
        learned: indices of the images that it has learned from.
        unseen: indices of captions that it has not learned from.
    """
    if run.stopped or not unseen:
        return
    with run.spare("Images of unseen prompts could not be measured", "the LoRA is the same without it"):
        run.progress.stage = "comparing"
        run.callbacks.on_step(run.progress)
        adapted = AdaptedModel(run.model, run.config, torch.Generator())
        adapted.parameters.load(adapter.layers)
        taken = images_per_step(len(learned), run.config.batch_size, run.config.accumulate)
        passes = _STEP_COST * run.progress.done * taken
        drawn = _repeated(unseen, _drawings(passes))
        different = different_images(run.images, style_indices(run.images, learned))
        shown = _spread([copies[0] for copies in different], MAX_LEARNED)
        with adapted.injected():
            found = measure(adapted, run.images, drawn, shown, run.rows, run.callbacks.should_stop, run.processes)
        if found is not None:
            run.facts = replace(
                run.facts,
                unseen_prompts=found.prompts,
                style_gained=round(found.style, 4),
                content_kept=round(found.content, 4),
                copied_share=None if found.copies is None else round(found.copies, 4),
            )


def measure(
    adapted: AdaptedModel,
    images: TrainingSet,
    unseen: Sequence[int],
    learned: Sequence[int],
    batch_size: int,
    should_stop: Callable[[], bool] = lambda: False,
    processes: Processes = ALONE,
) -> LearnedStyle | None:
    """Draw captions with and without the adapter, and compare both with the training images.

    Args:
        adapted: the model with the adapter injected.
        images: of the training.
        unseen: indices of the captions to draw, one for each drawing; a caption may come several times.
        learned: indices of the training images to compare with.
        batch_size: rows of a forward pass, at most.
        should_stop: asked before every micro-batch.
        processes: that draw together, each with all of these arguments.

    Returns:
        The measures; None where it was stopped, where the network has no blocks, and in other processes than the first.

    Raises:
        ValueError: a block gives nothing that belongs to the image, or numbers that are not finite.
    """
    blocks = adapted.checkpointing.blocks
    if not blocks:
        log.info("AC-LoRA: this network has no blocks, so what unseen prompts gain is not measured.")
        return None
    work = _Work(adapted, images, batch_size, should_stop, processes)
    try:
        with torch.no_grad():
            drawn = work.draw(unseen)
            with adapted.parameters.switched_off():
                base = work.draw(unseen)
                if not processes.is_first:
                    return None
                block = blocks[len(blocks) // 2]
                ours, own = work.features(block, unseen, drawn), work.features(block, unseen, base)
                theirs = work.features(block, learned, [images.latents[index] for index in learned])
    except _StoppedError:
        return None
    return compare(ours, own, theirs, len(set(unseen)))


@dataclass(frozen=True)
class _Work:
    """Forward passes over micro-batches of one batch key."""

    adapted: AdaptedModel
    images: TrainingSet
    batch_size: int
    should_stop: Callable[[], bool]
    processes: Processes

    def draw(self, rows: Sequence[int]) -> list[Tensor]:
        """Return a drawing of each caption, (1, channels, ...), from noise that follows from its position alone."""
        own: list[Tensor] | None = None  # where somebody asks this process to stop
        with self.processes.failing_together(), suppress(_StoppedError):
            own = self._draw(rows, self.processes.share(range(len(rows))))
        shares = self.processes.gather(own)
        if any(share is None for share in shares):
            raise _StoppedError
        return [drawing for share in shares for drawing in share]

    def _draw(self, rows: Sequence[int], positions: Sequence[int]) -> list[Tensor]:
        model = self.adapted.model
        drawn: dict[int, Tensor] = {}
        for group, conditioning in self._groups(rows, positions):
            noise = torch.cat([self._noise(rows[position], position) for position in group])
            drawn |= zip(group, draw_latents(model, noise, conditioning, STEPS).cpu().split(1), strict=True)
        return [drawn[position] for position in positions]

    def features(self, block: nn.Module, rows: Sequence[int], latents: Sequence[Tensor]) -> list[Tensor]:
        """Return what a block makes of each latent with its row's caption, (positions, width), float32, on the CPU."""
        model = self.adapted.model
        found: dict[int, Tensor] = {}
        for group, conditioning in self._groups(rows, range(len(rows))):
            clean = torch.cat([latents[position] for position in group]).to(model.device, torch.float32)
            noise = self._noise(rows[group[0]], 0).to(model.device).expand_as(clean)  # the same for all
            sigma = torch.full((len(group),), model.objective.sigma_at(NOISE_FRACTION), device=model.device)
            with outputs_of(block) as outputs:
                model.denoise(model.objective.add_noise(sigma, noise, clean), sigma, conditioning)
            if not outputs:
                raise ValueError(f"the network does not call its block {type(block).__name__}")
            found |= zip(group, image_tokens(outputs[-1], clean).float().cpu(), strict=True)
        return [found[position] for position in range(len(rows))]

    def _groups(self, rows: Sequence[int], positions: Sequence[int]) -> Iterator[tuple[list[int], Any]]:
        """Yield those of the positions in `rows` that share a forward pass, with their captions on the device."""
        keys = [self.images.batch_keys[row] for row in rows]
        for group in group_by_key(positions, keys, self.batch_size):
            if self.should_stop():
                raise _StoppedError
            conditioning = self.images.conditioning([rows[position] for position in group])
            yield group, to_device(conditioning, self.adapted.model.device)

    def _noise(self, row: int, number: int) -> Tensor:
        generator = torch.Generator().manual_seed(_SEED + number)
        return torch.randn(self.images.latents[row].shape, generator=generator)


@contextmanager
def outputs_of(block: nn.Module) -> Iterator[list[Any]]:
    """Collect what a block returns while the context lasts."""
    outputs: list[Any] = []
    hook = block.register_forward_hook(lambda module, inputs, output: outputs.append(output))
    try:
        yield outputs
    finally:
        hook.remove()


def image_tokens(output: Any, latents: Tensor) -> Tensor:
    """Return the part of a block's output that belongs to the image, as tokens (n, positions, width).

    Blocks return one tensor, or several of which one belongs to the caption: (n, tokens, width), (n, channels, h, w) or
    (n, h, w, channels), with any number of sides. That of the image has a position for each patch of the latent. In
    blocks that take caption and image as one sequence, the tokens of the caption are among those returned.

    Args:
        output: of the block, tensors in nested tuples, lists or dictionaries.
        latents: (n, channels, ...), that the network was called with.

    Raises:
        ValueError: nothing in the output has a row for each image and more than one position.
    """
    rows, area = len(latents), math.prod(latents.shape[2:])
    sequences = [
        _as_tokens(tensor, area) for tensor in tensors_in(output) if tensor.ndim > 2 and tensor.shape[0] == rows
    ]
    sequences = [tokens for tokens in sequences if tokens.shape[1] > 1]
    if not sequences:
        raise ValueError("a block of the network gives no tokens of the image")
    return max(sequences, key=lambda tokens: (_is_patches(tokens.shape[1], area), tokens.shape[1]))


def _as_tokens(tensor: Tensor, area: int) -> Tensor:
    if tensor.ndim == 3:
        return tensor
    channels_last = _is_patches(math.prod(tensor.shape[1:-1]), area)
    if channels_last and not _is_patches(math.prod(tensor.shape[2:]), area):
        return tensor.flatten(1, -2)
    return tensor.flatten(2).transpose(1, 2)


def _is_patches(positions: int, area: int) -> bool:
    """Whether so many positions can be equal patches of a latent."""
    return positions > 0 and area % positions == 0


def compare(drawn: Sequence[Tensor], base: Sequence[Tensor], learned: Sequence[Tensor], prompts: int) -> LearnedStyle:
    """Compare what was drawn with an adapter with what the model draws itself, and with the training images.

    Style: with the mean and the standard deviation of an image's features over its positions, averaged over images, d
    is the distance of the drawings to the training images, and style = 1 - d / d(base). Images that differ in what they
    show keep it below 1.

    Content: the cosine of the features to those of the model's own drawing, position by position. A new style lowers it
    as well, so it is to be read beside the style, and compared between trainings.

    Copies: a drawing is taken for a copy of a training image where the distance of their means and standard deviations
    is below half of that between neighbouring training images (the median distance of one to its nearest). This sees
    whole images that come back, moved or mirrored too, and not a single figure in a new image. With fewer than three
    training images, or where half of them are copies of each other, nobody can tell.

    Args:
        drawn: features of each drawing, (positions, width).
        base: the same of the model's own drawings, in their order.
        learned: the same of the training images.
        prompts: how many captions the drawings are of.

    Raises:
        ValueError: features are not finite.
    """
    ours, own, theirs = (torch.stack([_statistics(each) for each in group]) for group in (drawn, base, learned))
    before = float((own.mean(0) - theirs.mean(0)).norm())
    now = float((ours.mean(0) - theirs.mean(0)).norm())
    content = sum(float(F.cosine_similarity(a, b, dim=-1).mean()) for a, b in zip(drawn, base, strict=True))
    if not math.isfinite(before + now + content):
        raise ValueError("the network's features are not finite")
    style = 1 - now / before if before > 0 else 0.0
    near = COPY_DISTANCE * _neighbour_distance(theirs) if len(learned) > 2 else 0.0
    copies = _copied_share(ours, theirs, near) - _copied_share(own, theirs, near) if near > 0 else None
    return LearnedStyle(prompts, max(-1.0, min(1.0, style)), content / len(drawn), copies)


def _statistics(features: Tensor) -> Tensor:
    """Return mean and standard deviation of an image's features over its positions, (2 · width,)."""
    return torch.cat([features.mean(0), features.std(0)])


def _neighbour_distance(learned: Tensor) -> float:
    """Return the median distance of a training image to its nearest."""
    return float(torch.cdist(learned, learned).fill_diagonal_(math.inf).amin(1).median())


def _copied_share(drawn: Tensor, learned: Tensor, near: float) -> float:
    """Return the share of drawings that lie nearer than this to a training image."""
    return float((torch.cdist(drawn, learned).amin(1) < near).float().mean())


def _drawings(passes: float) -> int:
    """Return how many drawings a training of so many forward passes can bear."""
    each = 2 * STEPS + 2  # drawn and looked at, with and without the adapter
    return max(MIN_DRAWN, min(MAX_DRAWN, int((_SHARE * passes - MAX_LEARNED) / each)))


def _repeated(indices: Sequence[int], count: int) -> list[int]:
    """Return so many indices, each as often as the others if possible."""
    return [indices[number % len(indices)] for number in range(count)]


def _spread(indices: Sequence[int], most: int) -> list[int]:
    """Return at most so many of the indices, evenly spread."""
    count = min(most, len(indices))
    return [indices[number * len(indices) // count] for number in range(count)]
