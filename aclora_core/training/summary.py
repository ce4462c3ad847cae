"""What a training did, in a few sentences for the user."""

from __future__ import annotations

from ..adapter import RankReport, skipped_steps
from ..text import count_noun, mean_and_range

# By the stage at which a training was cancelled.
_CANCELLED = {
    "training": "Cancelled at step {done}: this is what was learned so far.",
    "cutting": "Cancelled while the smallest size was looked for: this is the whole.",
    "training on all": "Cancelled while training once more with all pictures: this is the result from before.",
}


def training_summary(report: RankReport) -> str:
    """The sentences in one line."""
    facts = report.facts
    lines = [] if facts.cancelled is None else [_CANCELLED[facts.cancelled].format(done=len(report.losses))]
    lines += [_steps(report), *_best(report)]
    chosen = next((cut for cut in report.truncations if cut.chosen), None)
    if chosen is not None and chosen.truncation.kind != "whole":
        lines.append(f"Cut to {chosen.name}, {chosen.size / 1e6:.1f} MB, as good as the whole.")
    ranks = list(report.signal.values())
    restarts = count_noun(len(report.restarts), "restart")
    lines.append(f"{count_noun(len(ranks), 'layer')}, signal rank {mean_and_range(ranks)}, {restarts}.")
    if skipped := skipped_steps(report.losses):
        lines.append(f"Steps left out, as their loss was not finite: {skipped}.")
    lines += [*_previews(report), *filter(None, [facts.notes])]
    return " ".join(lines)


def _steps(report: RankReport) -> str:
    """How many there were, and of what; those of both passes where there were two."""
    facts, last = report.facts, len(report.losses)
    steps = last if facts.steps_run is None else facts.steps_run
    others = facts.regularisation_images
    more = f" and {others} regularisation pictures" if others else ""
    both = last < steps and facts.cancelled is None
    twice = f": {steps - last} to find the best, {last} with all" if both else ""
    return f"{count_noun(steps, 'step')} over {count_noun(facts.images or 0, 'picture')}{more}{twice}."


def _best(report: RankReport) -> list[str]:
    """Which step the adapter is of, where pictures were set aside to tell."""
    given, aside = report.facts.best_step, f"the {report.facts.held_out_images} pictures set aside"
    if not report.validation or given is None:
        return []
    measured = [loss for step, loss in report.validation if step == given]
    if measured:
        return [f"Best at step {given}: loss {measured[0]:.3f} on {aside}."]
    return [f"What is given is step {given}, which was not measured on {aside}."]  # as it was stopped in between


def _previews(report: RankReport) -> list[str]:
    facts = report.facts
    if not facts.preview_seconds or facts.seconds_run is None:
        return []
    saved = facts.previews_left_out
    fewer = f"; {saved} sets were left out, to take no more of the time" if saved else ""
    return [f"Previews took {facts.preview_seconds:.0f} of {facts.seconds_run:.0f} seconds{fewer}."]
