"""Train an adapter: find the best step and the smallest size on held-out images, then train on all of them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from typing import Any

from torch import Tensor

from ..adapter import Adapter, Truncation, TruncationLoss
from ..config import CheckpointConfig, TrainConfig
from ..diffusion import DiffusionModel, TrainingSet
from ..distributed import ALONE, Processes
from ..optim import check_installed
from .activity import OnActivity, ignore
from .candidates import Candidates
from .checkpoint import CheckpointStore, DamagedCheckpointError, restoring
from .checks import check_inputs
from .compression import USED_RANKS, WHOLE, smallest_truncation, truncated, used_ranks_facts
from .early_stopping import EarlyStopping
from .fingerprint import training_fingerprint
from .first_pass import FirstPass
from .fit import FitStopping, measured_images
from .fixed_noise import FixedNoiseImages
from .held_out import MIN_IMAGES, hold_out
from .learned_style import add_learned_style
from .loop import run_pass
from .previews import Previews
from .progress import Progress, Result
from .report import make_report
from .requests import Requests
from .resume import restore_facts, resume_pass
from .run import Callbacks, TrainingRun
from .sampler import captioned_indices, style_indices
from .trainer import Trainer
from .verdict import nothing_learned

log = logging.getLogger("aclora")


def train(
    model: DiffusionModel,
    images: TrainingSet,
    config: TrainConfig,
    on_step: Callable[[Progress], None] = lambda progress: None,
    should_stop: Callable[[], bool] = lambda: False,
    indices: Sequence[int] | None = None,
    checkpoints: CheckpointConfig | None = None,
    previews: Previews | None = None,
    candidates: Candidates | None = None,
    processes: Processes = ALONE,
    on_activity: OnActivity = ignore,
    requests: Requests | None = None,
) -> Result:
    """Train a LoRA with AC-LoRA's restarts, and return it with its report.

    It ends when the adapter fits its images well enough (fit.py), and its layers are truncated to the ranks that they
    use. Where images are held out, their loss decides on both instead. A training that is stopped returns what it has.
    The same seed gives the same adapter on the same device, also when the training was killed in between and resumed.

    Args:
        model: the frozen model.
        images: latents and conditionings.
        config: the settings.
        on_step: called after every step.
        should_stop: asked after every step, and while images are measured.
        indices: of the images to learn from, with their captions; None for all.
        checkpoints: where to save the state of the training, and whether to resume.
        previews: images drawn while it trains.
        candidates: keeps the adapter at several steps, to choose another than the returned one.
        processes: that train together, each with all of these arguments. Each takes a batch of its own of every step,
            so that a step has as many times batch_size images. Only the first needs candidates, and only it writes
            checkpoints. Previews draw where the first does; their `draw` may call the others for help.
        on_activity: called before what takes longer than a step, with what it is.
        requests: asked for from other threads while it runs: previews of a step, or its adapter.

    Raises:
        ValueError: a setting does not fit the model, the images or the checkpoint; nothing has been trained then.
        ModuleNotFoundError: the optimizer's library is not installed.
        FloatingPointError: no step had a finite loss, so nothing was learned.
        OtherProcessError: another process has failed or ended.
    """
    with processes.failing_together():
        if indices is None:
            indices = captioned_indices(images)
        config = replace(config, batch_size=config.batch_size * processes.size)
        check_inputs(images, config, indices)
        check_installed(config.optimizer)
        callbacks = Callbacks(on_step, should_stop, previews, candidates, on_activity, requests)
        if checkpoints is None:
            return _train(TrainingRun(model, images, config, indices, callbacks, None, processes), None)
        on_activity("checkpoint")
        store = CheckpointStore(checkpoints, training_fingerprint(model, images, config, indices))
        with store.reserved() if processes.is_first else nullcontext():
            while True:
                changed, saved = processes.from_first(_state_to_resume(store, config) if processes.is_first else None)
                own = store if processes.is_first else None
                run = TrainingRun(model, images, TrainConfig(**changed), indices, callbacks, own, processes)
                try:
                    return _train(run, saved)
                except DamagedCheckpointError as error:
                    if own:
                        own.pass_over_latest(str(error))


def _state_to_resume(store: CheckpointStore, config: TrainConfig) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """Return the settings of a training, by name, and the state to resume from, if there is one."""
    saved = store.find()
    return asdict(store.config(config)), saved


def _train(run: TrainingRun, saved: Mapping[str, Any] | None) -> Result:
    """Train, from a checkpoint where there is one.

    Raises:
        DamagedCheckpointError: it cannot be restored; nothing has been trained then.
    """
    config, images, candidates = run.config, run.images, run.callbacks.candidates
    learned, held_out = hold_out(images, run.indices, config.held_out, config.seed)
    if config.held_out and not held_out:
        log.info("AC-LoRA: with fewer than %d different images none is held out.", MIN_IMAGES)
    if candidates:
        candidates.begin(resumed=saved is not None)
    if saved is not None:
        restore_facts(run, saved)
    run.begin_previews(resumed=saved is not None)
    in_refit = saved is not None and "found" in saved
    first = _saved_first_pass(run, saved) if saved and in_refit else _first_pass(run, learned, held_out, saved)
    refitted = None
    if held_out and config.refit and first.improves and not run.stopped:
        refitted = _refit(run, first, saved if in_refit else None)
    if run.callbacks.requests:
        run.callbacks.requests.end("The training has taken its last step; its result follows.")
    adapter, trained_on = (first.adapter, learned) if refitted is None else (refitted, run.indices)
    if images.prompts:
        add_learned_style(run, adapter, trained_on, images.prompts)
    else:  # after a refit the held-out captions are not unseen any more: then the first pass stands for it
        add_learned_style(run, first.adapter, learned, held_out)
    run.callbacks.on_activity("report")
    if candidates and not candidates.failed:
        with run.sparing_candidates(candidates):
            candidates.wait()
    facts = run.final_facts(len(held_out), len(trained_on))
    result = Result(adapter, make_report(config, facts, run.progress, adapter, first.losses))
    if problem := nothing_learned(result.report):
        log.warning("AC-LoRA: %s", problem)
    if candidates and not candidates.failed:
        with run.sparing_candidates(candidates):
            candidates.finish(result, first.steps, first.truncation)
    return result


def _first_pass(
    run: TrainingRun, learned: list[int], held_out: list[int], saved: Mapping[str, Any] | None
) -> FirstPass:
    """Train on all but the held-out images; find the best step and the truncation."""
    config, progress = run.config, run.progress
    trainer = Trainer(run.model, run.images, config, learned, progress, config.steps, run.processes)
    with trainer.ready(run.callbacks.on_activity), run.helping_to_draw(trainer):
        early_stopping = _early_stopping(run, trainer, held_out) if held_out else None
        measurements = early_stopping or _fit_stopping(run, trainer, learned)
        if saved is not None:
            resume_pass(run, saved, trainer, measurements)
        run.expect_refit(early_stopping)
        run_pass(run, trainer, config.steps, measurements)
        if early_stopping is None:
            return _fitted(run, trainer.adapted.adapter())
        best = early_stopping.restore_best(progress.last_finite_step)
        run.facts = replace(run.facts, best_step=best)
        run.keep_candidate(trainer, best)
        adapter = trainer.adapted.adapter()
        truncation, losses = _compress(run, trainer, early_stopping, adapter)
        return FirstPass(truncated(adapter, truncation), truncation, losses, best, progress)


def _fitted(run: TrainingRun, adapter: Adapter) -> FirstPass:
    """Return the result of a pass without held-out images: its last step, truncated to the ranks that it uses."""
    truncation = WHOLE
    if run.config.smallest:
        run.callbacks.on_activity("truncating")
        with run.spare("The LoRA could not be truncated to the ranks it uses", "it is returned whole"):
            whole, adapter = adapter, truncated(adapter, USED_RANKS)
            truncation = USED_RANKS
            run.facts = used_ranks_facts(run.facts, whole, adapter)
    return FirstPass(adapter, truncation, [], run.progress.last_finite_step, run.progress)


def _fit_stopping(run: TrainingRun, trainer: Trainer, learned: list[int]) -> FitStopping:
    indices = measured_images(run.images, style_indices(run.images, learned), run.config.seed)
    fit = FitStopping(_at_fixed_noise(run, trainer, indices), trainer.images_per_step, run.unit)
    run.progress.fit = fit.history
    return fit


def _early_stopping(run: TrainingRun, trainer: Trainer, held_out: list[int]) -> EarlyStopping:
    images = _at_fixed_noise(run, trainer, held_out)
    early_stopping = EarlyStopping(images, trainer.adapted.parameters, trainer.images_per_step, run.unit)
    run.progress.validation = early_stopping.history
    return early_stopping


def _at_fixed_noise(run: TrainingRun, trainer: Trainer, indices: list[int]) -> FixedNoiseImages:
    config = run.config
    return FixedNoiseImages(
        run.model,
        run.images,
        indices,
        config.seed,
        run.rows,
        trainer.adapted.graphs,
        config.mask_floor,
        run.processes,
    )


def _compress(
    run: TrainingRun, trainer: Trainer, early_stopping: EarlyStopping, adapter: Adapter
) -> tuple[Truncation, list[TruncationLoss]]:
    """Find the smallest truncation that is as good on held-out images, and what others lose."""
    if not run.config.smallest or run.stopped or not early_stopping.improves:
        return WHOLE, []
    run.progress.stage = "cutting"

    def losses_of(candidate: Adapter) -> Tensor:
        trainer.adapted.parameters.load(candidate.layers)
        return early_stopping.images.losses() / run.unit

    def asked_to_stop() -> bool:
        run.callbacks.on_step(run.progress)
        return run.asked_to_stop()

    together = run.processes.failing_together()
    with run.spare("The LoRA could not be truncated to its smallest size", "it is returned whole"), together:
        return smallest_truncation(adapter, losses_of, asked_to_stop)
    return WHOLE, []


def _saved_first_pass(run: TrainingRun, saved: Mapping[str, Any]) -> FirstPass:
    """Return what a checkpoint of the refit knows of the first pass."""
    with restoring():
        run.progress.load_state_dict(saved["first_progress"])
        return FirstPass.from_state_dict(saved["found"], run.progress)


def _refit(run: TrainingRun, first: FirstPass, saved: Mapping[str, Any] | None) -> Adapter | None:
    """Train on all images up to the step that was best without the held-out ones, and truncate in the same way.

    Returns None where it does not come to its end: the adapter of the first pass is better than half of this one.
    """
    steps, before = first.steps, first.progress
    log.info("AC-LoRA: step %d was best; training up to it again, on all %d images.", steps, len(run.indices))
    run.progress = Progress(
        before.done + steps,
        before.done,
        stage="training on all",
        validation=before.validation,
        resumed_at=before.resumed_at,
        notes=before.notes,
    )
    together = run.processes.failing_together()
    with run.spare("Training on all images failed", "the result of the first pass is returned"), together:
        trainer = Trainer(run.model, run.images, run.config, run.indices, run.progress, steps, run.processes)
        with trainer.ready(run.callbacks.on_activity), run.helping_to_draw(trainer):
            if saved is not None:
                resume_pass(run, saved, trainer, None)
            run_pass(run, trainer, steps, first=first)
            if not run.stopped:
                return truncated(trainer.adapted.adapter(), first.truncation)
    before.done = run.progress.done
    run.progress = before
    return None
