"""Evaluate AC-LoRA in the real ComfyUI, with small networks of random weights and with the tiny base's denoiser."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.support.shapes import BLACK, COLOURED, shapes
from tests.support.vision_models import VISION, WIDTH, clip_vision, text_tower

pytestmark = pytest.mark.usefixtures("one_thread")

Evaluate = Callable[..., tuple[dict[str, Any], Any]]
SIMILARITY, PAIRED = "similarity to the references", "similarity to its own reference"
NEAREST, COPIES, SPREAD = "similarity to the nearest training image", "copies of training images", "spread"
CLIP_T = "CLIP-T, similarity to the prompt"


@pytest.fixture(scope="module")
def evaluate(pack: ModuleType) -> Evaluate:
    """Run the node as ComfyUI does, with a list for each input; return its JSON and its output."""

    def run(drawn: Any, reference: Any, **inputs: Any) -> tuple[dict[str, Any], Any]:
        lists = {name: value if isinstance(value, list) else [value] for name, value in inputs.items()}
        with torch.inference_mode():
            output = pack.nodes.evaluation.node.ACLoRAEvaluate.execute(listed(drawn), listed(reference), **lists)
        return json.loads(output.result[1]), output

    return run


def listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


@pytest.fixture(scope="module", params=VISION)
def vision(request: pytest.FixtureRequest, pack: ModuleType) -> Any:
    return clip_vision(request.param)


@pytest.fixture(scope="module")
def clip_like(pack: ModuleType) -> Any:
    return clip_vision("clip")


@pytest.fixture(scope="module")
def tiny_base(pack: ModuleType) -> dict[str, Any]:
    with torch.inference_mode():
        model, clip, vae = pack.nodes.tiny_base.ACLoRATinyBase.execute().result
    return {"model": model, "clip": clip, "vae": vae}


REFERENCES, TRAINING = shapes(BLACK, range(5)), shapes(BLACK, range(5, 10))
BASE, LEARNED = shapes(COLOURED, range(5)), shapes(BLACK, range(5), 21, 1)
COPIED = (TRAINING + 0.01 * torch.randn(TRAINING.shape, generator=torch.Generator().manual_seed(1))).clamp(0, 1)
NOISE = torch.rand(REFERENCES.shape, generator=torch.Generator().manual_seed(0))


def row(facts: dict[str, Any], name: str) -> dict[str, Any]:
    (found,) = (each for each in facts["measures"] if each["name"] == name)
    return found


def value(facts: dict[str, Any], name: str, column: str = "drawn") -> float:
    return float(row(facts, name)[column]["value"])


# --- planted cases ---


CASES = {"learned": LEARNED, "base": BASE, "copies": COPIED, "noise": NOISE}


def judged(evaluate: Evaluate, **networks: Any) -> dict[str, dict[str, Any]]:
    others = {"base": BASE, "training": TRAINING, "pairs": True, **networks}
    return {name: evaluate(drawn, REFERENCES, **others)[0] for name, drawn in CASES.items()}


def test_every_kind_of_clip_vision_puts_planted_cases_in_order(evaluate: Evaluate, vision: Any) -> None:
    """Even with random weights, alike images have alike features."""
    found = judged(evaluate, clip_vision=vision)
    paired = {name: value(facts, PAIRED) for name, facts in found.items()}
    assert paired["learned"] > max(paired["base"], paired["copies"], paired["noise"])
    for name in ("CMMD", "KID"):
        distance = {case: value(facts, name) for case, facts in found.items()}
        assert distance["learned"] < min(distance["base"], distance["noise"])
    assert [value(facts, COPIES) for facts in found.values()] == [0, 0, 1, 0]
    assert "5 of 5 images may be copies" in found["copies"]["verdict"]
    assert "No copies" in found["learned"]["verdict"]


def test_the_denoiser_puts_planted_cases_in_order(evaluate: Evaluate, tiny_base: dict[str, Any]) -> None:
    found = judged(evaluate, **tiny_base)
    paired = {name: value(facts, PAIRED) for name, facts in found.items()}
    assert paired["learned"] > paired["copies"] > paired["noise"] and paired["learned"] > paired["base"]
    for name in ("CMMD", "KID"):
        distance = {case: value(facts, name) for case, facts in found.items()}
        assert distance["learned"] < distance["base"] < distance["noise"]
    assert [value(facts, COPIES) for facts in found.values()] == [0, 0, 1, 0]
    assert found["learned"]["verdict"].startswith("Closer to the real images of the same things than the base")
    assert found["noise"]["verdict"].startswith("Further from the real images of the same things than the base")


# --- against numpy ---


def embeddings(vision: Any, images: Tensor) -> np.ndarray:
    """Return what the host's network says of each image, with length 1."""
    with torch.inference_mode():
        rows = [vision.encode_image(image[None])["image_embeds"].double().numpy() for image in images]
    pooled = [each.mean(1) if each.ndim == 3 else each for each in rows]
    found = np.concatenate(pooled)
    return found / np.linalg.norm(found, axis=1, keepdims=True)


@pytest.mark.parametrize("kind", ["clip", "siglip", "dinov2"])
def test_measures_equal_a_computation_in_numpy(evaluate: Evaluate, kind: str) -> None:
    vision = clip_vision(kind)
    facts, _ = evaluate(LEARNED, REFERENCES, base=BASE, training=TRAINING, clip_vision=vision, pairs=True)
    sets = (LEARNED, REFERENCES, BASE, TRAINING)
    drawn, references, base, training = (embeddings(vision, images) for images in sets)
    off = ~np.eye(5, dtype=bool)

    def gaussian(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return np.exp(-((a[:, None] - b[None]) ** 2).sum(-1) / 200)

    def cubic(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return (a @ b.T + 1) ** 3

    def mmd(kernel: Callable[..., np.ndarray], a: np.ndarray, b: np.ndarray) -> float:
        return float(kernel(a, a)[off].mean() + kernel(b, b)[off].mean() - 2 * kernel(a, b).mean())

    expected = {
        (SIMILARITY, "drawn"): (drawn @ references.T).mean(),
        (SIMILARITY, "base"): (base @ references.T).mean(),
        (SIMILARITY, "references"): (references @ references.T)[off].mean(),
        (PAIRED, "drawn"): (drawn * references).sum(1).mean(),
        ("CMMD", "drawn"): 1000 * mmd(gaussian, drawn, references),
        ("CMMD", "base"): 1000 * mmd(gaussian, base, references),
        ("KID", "drawn"): mmd(cubic, drawn, references),
        (NEAREST, "drawn"): (drawn @ training.T).max(1).mean(),
        (NEAREST, "references"): (references @ training.T).max(1).mean(),
        (SPREAD, "drawn"): 1 - (drawn @ drawn.T)[off].mean(),
    }
    for (name, column), number in expected.items():
        assert value(facts, name, column) == pytest.approx(number, rel=1e-5, abs=1e-6), (name, column)
    found = {each["drawn"]: each for each in facts["nearest"]}
    assert [found[i]["reference"]["index"] for i in range(5)] == (drawn @ references.T).argmax(1).tolist()
    assert [found[i]["training"]["index"] for i in range(5)] == (drawn @ training.T).argmax(1).tolist()


# --- images ---


def test_lists_of_images_of_different_sizes_are_measured(evaluate: Evaluate, clip_like: Any) -> None:
    wide = torch.nn.functional.pad(LEARNED.movedim(-1, 1), (16, 16, 0, 0), value=1.0).movedim(1, -1)
    facts, output = evaluate([LEARNED[:2], wide[2:3], LEARNED[3:]], REFERENCES, clip_vision=clip_like)
    whole, _ = evaluate(LEARNED, REFERENCES, clip_vision=clip_like)
    assert facts["images"]["drawn"] == 5
    # The network sees the middle square, in which nothing has changed.
    assert value(facts, SIMILARITY) == pytest.approx(value(whole, SIMILARITY), abs=1e-6)
    assert output.result[2].ndim == 4


def test_transparent_parts_are_white_and_grey_images_are_read(evaluate: Evaluate, clip_like: Any) -> None:
    alpha = (LEARNED.mean(-1, keepdim=True) < 0.5).float()
    transparent = torch.cat([torch.zeros_like(LEARNED), alpha], -1)
    whole, _ = evaluate(LEARNED, REFERENCES, clip_vision=clip_like)
    for images in (transparent, LEARNED[..., :1]):
        facts, _ = evaluate(images, REFERENCES, clip_vision=clip_like)
        assert value(facts, SIMILARITY) == pytest.approx(value(whole, SIMILARITY), abs=1e-6)


def test_one_image_is_enough_for_a_similarity(evaluate: Evaluate, clip_like: Any) -> None:
    facts, output = evaluate(LEARNED[:1], REFERENCES[:1], clip_vision=clip_like, pairs=True)
    assert value(facts, PAIRED) > 0.5 and row(facts, PAIRED)["drawn"]["error"] is None
    assert "CMMD: a distance needs 2 drawn images and 2 references or more." in output.result[0]


def test_a_dataset_is_decoded_once_for_each_image_of_the_style(
    pack: ModuleType, evaluate: Evaluate, tiny_base: dict[str, Any], clip_like: Any
) -> None:
    key = pack.nodes.host.VARIANT_KEY
    with torch.inference_mode():
        samples = [tiny_base["vae"].encode(image[None]) for image in TRAINING[:4]]
    latents: list[dict[str, Any]] = [{"samples": each} for each in samples[:2]]
    latents += [latents[0]]  # a repeat
    latents += [{"samples": samples[2], key: {"picture": 3, "variant": number}} for number in (0, 1)]
    latents += [{"samples": samples[3], key: {"picture": 4, "variant": 0, "regularisation": 1.0}}]
    facts, _ = evaluate(COPIED, REFERENCES, training=latents, clip_vision=clip_like, vae=tiny_base["vae"], base=BASE)
    assert facts["images"]["training"] == 3
    nearest = {each["drawn"]: each["training"]["index"] for each in facts["nearest"]}
    assert [nearest[number] for number in range(3)] == [0, 1, 2]


def test_the_sheet_shows_the_nearest_first_and_is_bounded(evaluate: Evaluate, clip_like: Any) -> None:
    mixed = torch.cat([LEARNED, COPIED[2:3], LEARNED, LEARNED])
    _, output = evaluate(mixed, REFERENCES, training=TRAINING, clip_vision=clip_like)
    _, one = evaluate(mixed[5:6], REFERENCES, training=TRAINING, clip_vision=clip_like)
    _, three = evaluate(mixed[:3], REFERENCES, training=TRAINING, clip_vision=clip_like)
    sheet, first = output.result[2], one.result[2]
    height, width = first.shape[1:3]
    assert sheet.shape[2] == 2 * width and 5 * height < sheet.shape[1] < 6 * height  # twelve of the sixteen images
    assert three.result[2].shape[2] == 2 * width and 1.8 * height < three.result[2].shape[1] < 2 * height
    images = (
        slice(0, height - 60),
        slice(0, width),
    )  # of the first image, without the captions
    assert (sheet[0][images] - first[0][images]).abs().mean() < 0.01
    assert output.ui["images"] and output.ui["text"][0].splitlines()[0] == json.loads(output.result[1])["verdict"]


# --- texts ---


def test_clip_t_is_the_cosine_of_image_and_prompt(evaluate: Evaluate, clip_like: Any) -> None:
    clip, prompts = text_tower(), [f"a shape {number}" for number in range(5)]
    inputs = {"clip_vision": clip_like, "clip": clip, "base": BASE}
    facts, _ = evaluate(LEARNED, REFERENCES, prompts="\n".join(prompts), **inputs)
    with torch.inference_mode():
        texts = [clip.encode_from_tokens(clip.tokenize(each), return_pooled=True)[1] for each in prompts]
    rows = torch.cat(texts).double().numpy()
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    assert rows.shape == (5, WIDTH)
    assert value(facts, CLIP_T) == pytest.approx((embeddings(clip_like, LEARNED) * rows).sum(1).mean(), abs=1e-5)
    assert value(facts, CLIP_T, "base") == pytest.approx((embeddings(clip_like, BASE) * rows).sum(1).mean(), abs=1e-5)
    listed_prompts, _ = evaluate(LEARNED, REFERENCES, prompts=prompts, **inputs)
    assert row(listed_prompts, CLIP_T) == row(facts, CLIP_T)


def test_without_a_matching_text_tower_clip_t_says_why(evaluate: Evaluate, clip_like: Any) -> None:
    inputs = {"clip_vision": clip_like, "prompts": "a shape"}
    reasons = {
        "needs the prompts, and clip": {},
        "clip has embeddings of width 16, clip_vision those of width 24": {"clip": text_tower(16)},
        "came without the projection": {"clip": text_tower(projected=False)},
        "needs a clip_vision of CLIP": {"clip": text_tower(), "clip_vision": clip_vision("dinov2")},
    }
    for reason, more in reasons.items():
        facts, output = evaluate(LEARNED, REFERENCES, **(inputs | more))
        assert reason in row(facts, CLIP_T)["missing"] and f"{CLIP_T}: " in output.result[0]


def test_preference_models_are_asked_where_they_are_installed(
    evaluate: Evaluate, clip_like: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The package stands in for ImageReward, whose weights are large; it gives the mean brightness."""

    class Model:
        def score(self, prompt: str, images: list[Any]) -> float:
            assert prompt == "a shape"
            return float(np.asarray(images[0]).mean() / 255)

    monkeypatch.setitem(sys.modules, "ImageReward", SimpleNamespace(load=lambda name: Model()))
    monkeypatch.setitem(sys.modules, "hpsv2", None)
    inputs = {"clip_vision": clip_like, "prompts": "a shape", "base": BASE}
    facts, _ = evaluate(LEARNED, REFERENCES, preference=True, **inputs)
    assert value(facts, "ImageReward") == pytest.approx(LEARNED.mean().item(), abs=0.003)
    assert value(facts, "ImageReward", "base") == pytest.approx(BASE.mean().item(), abs=0.003)
    assert "not installed, hpsv2" in row(facts, "HPS v2.1")["missing"]
    off, _ = evaluate(LEARNED, REFERENCES, **inputs)
    assert "ImageReward" not in {each["name"] for each in off["measures"]}


# --- errors, progress, cancel ---


def test_bad_input_gets_a_clear_error(evaluate: Evaluate, clip_like: Any, tiny_base: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="Connect a Load CLIP Vision node .* of which model and vae and clip are"):
        evaluate(LEARNED, REFERENCES)
    with pytest.raises(ValueError, match="of which clip is missing"):
        evaluate(LEARNED, REFERENCES, **(tiny_base | {"clip": None}))
    bad = LEARNED.clone()
    bad[2, 0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match="drawn: image 3 holds NaN or infinity. Load the VAE in fp32"):
        evaluate(bad, REFERENCES, clip_vision=clip_like)
    with pytest.raises(ValueError, match="base holds no image"):
        evaluate(LEARNED, REFERENCES, base=LEARNED[:0], clip_vision=clip_like)
    with pytest.raises(ValueError, match=r"drawn: image 1 has the shape \(64, 64, 2\)"):
        evaluate(LEARNED[..., :2], REFERENCES, clip_vision=clip_like)
    with pytest.raises(ValueError, match=r"shape \(images, height, width, channels\): \(64, 64, 3\)"):
        evaluate(LEARNED[0], REFERENCES, clip_vision=clip_like)
    with pytest.raises(ValueError, match="training holds the latents of a dataset. Connect the model's VAE"):
        evaluate(LEARNED, REFERENCES, training={"samples": torch.zeros(1, 16, 8, 8)}, clip_vision=clip_like)
    with pytest.raises(ValueError, match="there are 5 drawn images and 4 references"):
        evaluate(LEARNED, REFERENCES[1:], clip_vision=clip_like, pairs=True)
    with pytest.raises(ValueError, match="prompts holds 2 prompts, but there are 5 drawn images"):
        evaluate(LEARNED, REFERENCES, clip_vision=clip_like, prompts="a\nb")


@pytest.fixture
def steps() -> Iterator[list[tuple[int, int]]]:
    """What the progress bar shows."""
    import comfy.utils

    shown: list[tuple[int, int]] = []
    before = comfy.utils.PROGRESS_BAR_HOOK
    comfy.utils.set_progress_bar_global_hook(lambda done, total, preview, **other: shown.append((done, total)))
    yield shown
    comfy.utils.set_progress_bar_global_hook(before)


def test_progress_counts_all_images(evaluate: Evaluate, clip_like: Any, steps: list[tuple[int, int]]) -> None:
    evaluate(LEARNED, REFERENCES, base=BASE, training=TRAINING, clip_vision=clip_like)
    assert steps[0] == (1, 20) and steps[-1] == (20, 20)  # ComfyUI leaves out what comes too fast to be seen


@pytest.mark.parametrize("network", ["clip_vision", "denoiser"])
def test_a_cancel_ends_the_node_and_leaves_no_hook(
    evaluate: Evaluate, clip_like: Any, tiny_base: dict[str, Any], network: str
) -> None:
    import comfy.model_management

    networks = {"clip_vision": clip_like} if network == "clip_vision" else tiny_base
    comfy.model_management.interrupt_current_processing(True)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        evaluate(LEARNED, REFERENCES, **networks)
    blocks = tiny_base["model"].model.diffusion_model.modules()
    assert not any(module._forward_hooks for module in blocks)
