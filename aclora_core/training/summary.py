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
    settings = report.settings
    lines = [_CANCELLED[str(settings["cancelled"])].format(done=len(report.losses))] if "cancelled" in settings else []
    lines += [_steps(report), *_best(report)]
    chosen = next((cut for cut in report.cuts if cut.chosen), None)
    if chosen is not None and chosen.name != "whole":
        lines.append(f"Cut to {chosen.name}, {chosen.size / 1e6:.1f} MB, as good as the whole.")
    ranks = list(report.signal.values())
    restarts = count_noun(len(report.restarts), "restart")
    lines.append(f"{count_noun(len(ranks), 'layer')}, signal rank {mean_and_range(ranks)}, {restarts}.")
    if skipped := skipped_steps(report.losses):
        lines.append(f"Steps left out, as their loss was not finite: {skipped}.")
    lines += [*_previews(report), *filter(None, [str(settings.get("notes", ""))])]
    return " ".join(lines)


def _steps(report: RankReport) -> str:
    """How many there were, and of what; those of both passes where there were two."""
    settings = report.settings
    steps, last = int(settings.get("steps_run", len(report.losses))), len(report.losses)
    others = settings.get("regularisation_images")
    more = f" and {others} regularisation pictures" if others else ""
    both = last < steps and "cancelled" not in settings
    twice = f": {steps - last} to find the best, {last} with all" if both else ""
    return f"{count_noun(steps, 'step')} over {count_noun(int(settings['images']), 'picture')}{more}{twice}."


def _best(report: RankReport) -> list[str]:
    """Which step the adapter is of, where pictures were set aside to tell."""
    settings = report.settings
    if not report.validation or "best_step" not in settings:
        return []
    given, aside = settings["best_step"], f"the {settings['held_out_images']} pictures set aside"
    measured = [loss for step, loss in report.validation if step == given]
    if measured:
        return [f"Best at step {given}: loss {measured[0]:.3f} on {aside}."]
    return [f"What is given is step {given}, which was not measured on {aside}."]  # as it was stopped in between


def _previews(report: RankReport) -> list[str]:
    settings = report.settings
    if not settings.get("preview_seconds"):
        return []
    saved = settings.get("previews_left_out")
    fewer = f"; {saved} sets were left out, to take no more of the time" if saved else ""
    return [f"Previews took {settings['preview_seconds']:.0f} of {settings['seconds_run']:.0f} seconds{fewer}."]
