"""The end of a training in the real ComfyUI: errors, bad input, cancel; and the display during training."""

import logging
import math

import pytest
import torch

from tests.support import tiny_base as tiny
from tests.support.tiny_base import first_step, progress, trained, untouched
from tests.support.train_node import run_node

# Fixtures: the tiny base, two images, ComfyUI's Cancel.
parts, model, pictures, interrupt = tiny.parts, tiny.model, tiny.pictures, tiny.interrupt
MEASURED = 4  # calls of the network before the first step: both images together, at each of four noise levels


def test_an_error_during_training_leaves_the_model_unchanged(pack, model, pictures):
    def fail(value, total, preview):
        raise RuntimeError("the browser went away")

    with untouched(model), progress(fail), pytest.raises(RuntimeError, match="the browser went away"):
        trained(pack, model, *pictures)


def test_a_non_finite_loss_ends_with_a_message_and_an_unchanged_model(pack, model, pictures):
    broken = model.clone()
    spoiled = {"samples": torch.full((1, 16, 16, 16), 1e38)}
    with untouched(model), pytest.raises(FloatingPointError, match="10 steps, up to step 10"):
        trained(pack, broken, [spoiled, spoiled], pictures[1], steps=20)


def test_the_loss_map_has_finite_losses_only_and_comfyuis_graph_node_accepts_it(pack, model, pictures, monkeypatch):
    from comfy_extras.nodes_train import LossGraphNode

    real = pack.nodes.training.training.train

    def with_a_step_left_out(*given, **named):
        result = real(*given, **named)
        result.report.losses[1] = math.nan
        return result

    monkeypatch.setattr(pack.nodes.training.training, "train", with_a_step_left_out)
    _, _, loss_map, report, *_ = trained(pack, model, *pictures)
    assert len(report.losses) == 3 and loss_map["loss"] == [report.losses[0], report.losses[2]]
    with pytest.raises(ValueError, match="NaN"):
        LossGraphNode.execute({"loss": report.losses}, "loss")
    assert LossGraphNode.execute(loss_map, "loss").ui


def test_progress_is_reported_at_every_step_sometimes_with_an_image(pack, model, pictures):
    seen = []
    with progress(lambda value, total, preview: seen.append((value, total, preview))):
        trained(pack, model, *pictures)
    assert seen[0][:2] == (1, 3) and seen[-1][:2] == (3, 3)
    assert seen[0][2][0] == "JPEG" and seen[-1][2][1].width > 100


def test_a_cancel_before_the_first_step_gives_one_step_and_is_cleared(pack, model, pictures, interrupt):
    import comfy.model_management

    def refuse(value, total, preview):  # as ComfyUI's own hook does
        comfy.model_management.throw_exception_if_processing_interrupted()

    with untouched(model), progress(refuse):
        interrupt()
        _, lora_model, loss_map, report, *_ = trained(pack, model, *pictures)
    assert len(loss_map["loss"]) == len(report.losses) == 1
    assert any(tensor.any() for key, tensor in lora_model.items() if "lora_up" in key)
    assert not comfy.model_management.processing_interrupted()


def test_a_cancel_during_a_step_finishes_and_keeps_the_step(pack, model, pictures, interrupt, monkeypatch):
    """ComfyUI checks for a cancel in every layer and would discard everything."""
    import comfy.model_management

    calls = []
    final = model.model.diffusion_model.final_layer
    forward = final.forward

    def press_cancel(*inputs, **named):
        calls.append(1)
        if len(calls) == 1 + MEASURED + 2:  # after a trial run, in the second step
            interrupt()
        return forward(*inputs, **named)

    with untouched(model):
        monkeypatch.setattr(final, "forward", press_cancel)
        _, lora_model, loss_map, *_ = trained(pack, model, *pictures, steps=40)
        monkeypatch.undo()
    assert len(loss_map["loss"]) == 2 and len(calls) == 1 + MEASURED + 2 and all(map(math.isfinite, loss_map["loss"]))
    assert not comfy.model_management.processing_interrupted()
    whole = trained(pack, model, *pictures, steps=2)
    assert whole[2] == loss_map
    for key, tensor in lora_model.items():
        assert torch.equal(tensor, whole[1][key]), key


def test_a_cancel_during_recomputation_in_the_backward_pass_keeps_the_step(
    pack, model, pictures, interrupt, monkeypatch
):
    import comfy.model_management

    calls = []
    block, *_ = pack.aclora_core.acceleration.activation_checkpointing.find_blocks(model.model.diffusion_model)
    settings = {"steps": 40, "checkpointing": "all"}
    inner = next(part for part in block.modules() if isinstance(part, torch.nn.Linear))
    forward = inner.forward

    def press_cancel(*inputs, **named):
        calls.append(torch._C._current_graph_task_id())
        if len(calls) == 2 + MEASURED + 2:  # forward and backward pass of the trial run and of the first step
            interrupt()
        return forward(*inputs, **named)

    with untouched(model):
        monkeypatch.setattr(inner, "forward", press_cancel)
        _, _, loss_map, *_ = trained(pack, model, *pictures, **settings)
        monkeypatch.undo()
    in_backward = [task >= 0 for task in calls]
    assert len(loss_map["loss"]) == 1 and in_backward == [False, True, *[False] * MEASURED, False, True]
    assert not comfy.model_management.processing_interrupted()


def test_a_cancel_before_the_first_validation_is_reported(pack, model, pictures, interrupt, tmp_path):
    latents, captions = pictures
    many = [{"samples": latents[0]["samples"] + 0.01 * number} for number in range(9)]
    with untouched(model), progress(lambda value, total, preview: interrupt()):
        report = trained(pack, model, many, captions[:1] * 9, steps=40, held_out=0.2)[3]
    status, checkpoints = pack.nodes.training.status, pack.aclora_core.config.CheckpointConfig
    summary = status.training_summary(report)
    assert len(report.losses) == 1 and "The LoRA is that of step 1, whose loss on" in summary
    assert status.result_text(report, checkpoints(tmp_path)).endswith(" Run again to resume.")
    for without in (None, checkpoints(tmp_path, resume="never")):
        assert status.result_text(report, without).endswith(" Run again to train from the start.")


def test_a_cancel_during_training_keeps_the_adapter(pack, model, pictures, interrupt, caplog):
    import comfy.model_management

    steps = []

    def press_cancel(value, total, preview):
        comfy.model_management.throw_exception_if_processing_interrupted()
        steps.append(value)
        if value >= 2 and len(steps) == 2:
            interrupt()

    with untouched(model), progress(press_cancel), caplog.at_level(logging.INFO, logger="aclora"):
        changed, _, loss_map, *_ = trained(pack, model, *pictures, steps=40)
    assert len(loss_map["loss"]) == steps[-1] < 40 and f"stopped at step {steps[-1]} of 40" in caplog.text
    assert not comfy.model_management.processing_interrupted()
    assert (first_step(changed, pictures[1][0]) - first_step(model, pictures[1][0])).abs().max() > 0


def test_a_training_in_which_no_step_counted_is_an_error(pack, model, pictures):
    spoiled = {"samples": torch.full((1, 16, 16, 16), 1e38)}
    with untouched(model), pytest.raises(FloatingPointError, match="Nothing was learned: in .* Load the model in bf16"):
        trained(pack, model, [spoiled, spoiled], pictures[1], steps=1)


def test_a_training_that_made_the_model_worse_is_told_as_a_failure(pack, model, pictures, caplog):
    settings = {"steps": 3, "learning_rate": 0.1, "batch_size": 2, "max_rank": 4}
    told = run_node(pack, model, *pictures, settings).ui["text"][0]
    assert told.startswith("It learned nothing: its training images are predicted worse than without the LoRA")
    assert "Lower learning_rate" in told and "It learned nothing" in caplog.text


def replaced(latents, samples):
    return [{"samples": samples}, *latents[1:]]


def spoiled(caption, value=math.nan, **more):
    """The conditioning with one number that is not finite, in what was encoded or in what comes with it."""
    ((encoded, others),) = caption
    broken = encoded.clone()
    broken.flatten()[5] = value
    return [[broken, {**others, **more}]]


def resized(caption, *shape):
    return [[torch.zeros(shape), caption[0][1]]]


BAD = {
    "more latents than captions": (lambda m, x, c: (m, x, c[:1]), {}, "2 latents but 1 conditionings"),
    "no images": (lambda m, x, c: (m, [], []), {}, "no images to learn from"),
    "wrong channels": (
        lambda m, x, c: (m, replaced(x, torch.zeros(1, 4, 16, 16)), c),
        {},
        r"Latent 1 .*\(1, 4, 16, 16\).*16 channels",
    ),
    "a video": (lambda m, x, c: (m, replaced(x, torch.zeros(1, 16, 2, 16, 16)), c), {}, r"Latent 1 has the shape"),
    "many images in one latent": (
        lambda m, x, c: (m, replaced(x, torch.zeros(3, 16, 16, 16)), c),
        {},
        "Latent 1 holds 3 images",
    ),
    "NaN": (lambda m, x, c: (m, replaced(x, torch.full((1, 16, 16, 16), torch.nan)), c), {}, "Latent 1 holds NaN"),
    "a NaN caption": (
        lambda m, x, c: (m, x, [c[0], spoiled(c[1], aclora_caption="a blue ball")]),
        {},
        r'Caption 2 \("a blue ball"\) holds NaN or infinity.*--fp32-text-enc',
    ),
    "an infinite caption": (lambda m, x, c: (m, x, [spoiled(c[0], math.inf), c[1]]), {}, "Caption 1 holds NaN or inf"),
    "a NaN beside a caption": (
        lambda m, x, c: (m, x, [[[c[0][0][0], {"pooled_output": torch.full((1, 4), math.nan)}]], c[1]]),
        {},
        "Caption 1 holds NaN",
    ),
    "an empty caption": (lambda m, x, c: (m, x, [resized(c[0], 1, 0, 64), c[1]]), {}, "Caption 1 is empty"),
    "no caption": (lambda m, x, c: (m, x, [None, c[1]]), {}, "Caption 1 is not a conditioning"),
    "a list of numbers as caption": (lambda m, x, c: (m, x, [[1, 2], c[1]]), {}, "Caption 1 is not a conditioning"),
    "an empty latent": (lambda m, x, c: (m, replaced(x, torch.zeros(1, 16, 0, 16)), c), {}, "Latent 1 is empty"),
    "no latent": (lambda m, x, c: (m, [{}, x[1]], c), {}, "Latent 1 holds no image"),
    "no model": (lambda m, x, c: (None, x, c), {}, "not a diffusion model"),
    "a combined caption": (lambda m, x, c: (m, x, [c[0] + c[1], c[1]]), {}, "Caption 1 is made of 2 conditionings"),
    "rank too high": (lambda m, x, c: (m, x, c), {"max_rank": 321}, "largest layer can only have rank 320"),
    "a setting out of range": (lambda m, x, c: (m, x, c), {"learning_rate": math.inf}, "learning_rate must be above 0"),
}


def test_the_caption_of_another_text_encoder_is_named_with_what_to_do(pack, model, pictures):
    latents, captions = pictures
    with untouched(model), pytest.raises((RuntimeError, ValueError), match="CLIP that belong"):
        trained(pack, model, latents, [resized(captions[0], 1, 77, 123), captions[1]])


def test_an_unconditional_that_is_not_finite_is_refused(pack, model, pictures):
    settings = {"caption_dropout": 0.5, "unconditional": spoiled(pictures[1][0])}
    with untouched(model), pytest.raises(ValueError, match="The unconditional holds NaN or infinity"):
        trained(pack, model, *pictures, **settings)


@pytest.mark.parametrize("what", BAD)
def test_bad_input_is_refused_with_a_message_and_an_unchanged_model(pack, model, pictures, what):
    change, settings, sentence = BAD[what]
    with untouched(model), pytest.raises(ValueError, match=sentence):
        trained(pack, *change(model, *pictures), **settings)


def test_the_node_shows_loss_learning_rate_skipped_steps_and_remaining_time(pack, monkeypatch):
    display, status = pack.nodes.training.display, pack.nodes.training.status
    clock = [0.0]
    monkeypatch.setattr(pack.nodes.host.progress.time, "monotonic", lambda: clock[0])
    bar = pack.nodes.host.ProgressBar(10)
    show = display.TrainingDisplay(bar, display.LivePreviews(None), lambda text: None)
    show._last_chart = clock[0] = 60.0  # no chart now
    first = display.Progress(10, 1, losses=[0.5], learning_rate=1.234e-4, remaining=10)
    assert status.status_text(first, bar) == "training, loss 0.500, learning rate 0.00012"  # much is prepared in it
    show._last_chart = clock[0] = 120.0
    progress = display.Progress(10, 4, losses=[0.5, math.nan], learning_rate=1.234e-4, remaining=10)
    show(progress)
    assert bar.total == 20
    assert status.status_text(progress, bar) == (
        "training, loss 0.500, learning rate 0.00012, skipped steps: 1, up to 5:20 left"
    )
    show(display.Progress(10, 4, losses=[0.5, 0.5], learning_rate=5e-4))
    assert bar.total == 10
    progress = display.Progress(10, 4, losses=[0.5, 0.5], learning_rate=5e-4)
    assert status.status_text(progress, bar) == "training, loss 0.500, learning rate 0.0005, 2:00 left"
    clock[0] = 60.0 + 3 * 3700.0
    assert status.status_text(progress, bar).endswith("6 h 10 min left")
    clock[0] = 120.0
    progress.fit += [(0, 0.5), (4, 0.17)]
    told = "training, loss 0.500, training images at 34 % of the base model's loss, learning rate 0.0005, 2:00 left"
    assert status.status_text(progress, bar) == told


def test_the_expected_memory_and_the_latest_note_are_shown_below_the_loss(pack):
    status = pack.nodes.training.status
    progress = status.Progress(10, 1, losses=[0.5], memory="3 GB of 8", notes=["older", "newer"])
    first, *others = status.status_text(progress, pack.nodes.host.ProgressBar(10)).split("\n")
    assert first.startswith("training, loss 0.500") and others == ["3 GB of 8", "newer"]
