"""The summary of a training: a few sentences for the user."""

from __future__ import annotations

from ..adapter import RankReport, fit_share, skipped_steps
from ..text import count_noun, mean_and_range, percent_text, size_text
from .fit import LEVEL
from .verdict import nothing_learned

# By the stage in which a training was cancelled.
_CANCELLED = {
    "training": "Cancelled at step {done}: the LoRA is what was learned so far.",
    "cutting": "Cancelled during the search for the smallest size: the LoRA is not truncated.",
    "training on all": "Cancelled during the second pass, on all images: the LoRA is that of the first pass.",
}
_COPIES = 0.2  # share of drawings that copy a training image, from which on the user is told


def training_summary(report: RankReport) -> str:
    """Return what a training did, as sentences in one line."""
    facts = report.facts
    sentences = []
    if facts.cancelled is not None:
        sentences.append(_CANCELLED[facts.cancelled].format(done=len(report.losses)))
    problem = nothing_learned(report)
    if problem:
        sentences.append(problem)
    if facts.chosen_step is None:
        sentences += [_steps(report), *_best_step(report)]
    else:
        sentences.append(f"The LoRA is that of step {facts.chosen_step}, as chosen.")
    if not problem:
        sentences += _fit(report)
    sentences += _used_ranks(report)
    chosen = next((tried for tried in report.truncations if tried.chosen), None)
    if chosen is not None and chosen.truncation.kind != "whole":
        size = size_text(facts.file_size or chosen.size)
        sentences.append(f"Truncated to {chosen.name}, {size}, as good as the full LoRA.")
    sentences += _learned_style(report)
    sentences += _restarts(report)
    if skipped := skipped_steps(report.losses):
        sentences.append(f"Steps skipped because their loss was not finite: {skipped}.")
    if facts.chosen_step is None:
        sentences += _previews(report)
    if facts.notes:
        sentences.append(facts.notes)
    return " ".join(sentences)


def _steps(report: RankReport) -> str:
    """Say how many steps there were, in each pass, and on how many images."""
    facts = report.facts
    last_pass = len(report.losses)
    steps = last_pass if facts.steps_run is None else facts.steps_run
    images = count_noun(facts.images or 0, "image")
    if facts.regularisation_images:
        images += f" and {count_noun(facts.regularisation_images, 'regularisation image')}"
    passes = ""
    if last_pass < steps and facts.cancelled is None:
        passes = f": {steps - last_pass} to find the best step, {last_pass} on all images"
    return f"{count_noun(steps, 'step')} on {images}{passes}."


def _best_step(report: RankReport) -> list[str]:
    """Say which step the adapter is of, if there was a validation."""
    step = report.facts.best_step
    if not report.validation or step is None:
        return []
    held_out = count_noun(report.facts.held_out_images or 0, "validation image")
    measured = [loss for measured_step, loss in report.validation if measured_step == step]
    if not measured:  # stopped between two validations
        return [f"The LoRA is that of step {step}, whose loss on the {held_out} was not measured."]
    return [f"Best at step {step}: loss {measured[0]:.3f} on {held_out}."]


def _learned_style(report: RankReport) -> list[str]:
    """Say what captions that it has not learned gain, and what is wrong with that."""
    facts = report.facts
    if facts.style_gained is None or facts.content_kept is None:
        return []
    prompts = count_noun(facts.unseen_prompts or 0, "unseen prompt")
    measures = f"style 0.00 → {facts.style_gained:.2f}, content kept {facts.content_kept:.2f}"
    sentences = [f"On {prompts}: {measures}."]
    if facts.style_gained <= 0:
        sentences.append("Its images are no closer to the style than without it: lower learning_rate.")
    if (facts.copied_share or 0.0) >= _COPIES:
        sentences.append("It is starting to copy its training images: stop earlier or add images.")
    return sentences


def _fit(report: RankReport) -> list[str]:
    """Say how well the adapter fits its own images, if they were measured."""
    share = fit_share(report.fit)
    if share is None:
        return []
    level, step = percent_text(share), report.fit[-1][0]
    whole = report.facts.cancelled is None and report.facts.chosen_step is None
    steps = len(report.losses)
    if whole and share <= LEVEL and step == steps < _planned_steps(report):
        return [f"Stopped by itself: the loss of its training images fell to {level} of the base model's."]
    if whole and steps == _planned_steps(report):
        return [f"It ran to its last step: the loss of its training images fell to {level} of the base model's."]
    return [f"At step {step} the loss of its training images was {level} of the base model's."]


def _planned_steps(report: RankReport) -> int:
    return int(report.settings.get("steps", 0))


def _used_ranks(report: RankReport) -> list[str]:
    """Say to what the adapter was truncated, if it was truncated to the ranks that it uses."""
    facts = report.facts
    if facts.rank_before is None or facts.rank_after is None or facts.truncated_size is None:
        return []
    ranks = f"rank {facts.rank_after:.1f} of {facts.rank_before:.4g}"
    return [f"Truncated to {ranks} on average, {size_text(facts.file_size or facts.truncated_size)}."]


def _restarts(report: RankReport) -> list[str]:
    """Say what the restarts found, if there were any."""
    if not report.restarts:
        return []
    restarts, ranks = count_noun(len(report.restarts), "restart"), list(report.signal.values())
    return [f"{restarts}; signal rank {mean_and_range(ranks)} over {count_noun(len(ranks), 'layer')}."]


def _previews(report: RankReport) -> list[str]:
    facts = report.facts
    if not facts.preview_seconds or facts.seconds_run is None:
        return []
    skipped = ""
    if facts.previews_left_out:
        skipped = f"; {count_noun(facts.previews_left_out, 'set')} skipped to stay within preview_share"
    return [f"Previews took {facts.preview_seconds:.0f} of {facts.seconds_run:.0f} seconds{skipped}."]
