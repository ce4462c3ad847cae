"""Every options node and every kind of image in one prompt, from the folder to a sample, in the real server."""

from __future__ import annotations

import shutil

import pytest
import torch
from PIL import Image
from safetensors import safe_open

from aclora_core.adapter.rank_report import RankReport
from tests.support.host_server import HostServer
from tests.support.server_runs import adapter
from tests.support.trouble import TRAIN, drawing, noise_images, prompt, says


@pytest.mark.slow
def test_all_options_together(server: HostServer) -> None:
    style = noise_images(server.base / "input" / "all_style", 9, (128, 128))
    Image.new("L", (128, 128)).save(style / "0-masklabel.png")
    with Image.open(style / "0-masklabel.png") as mask:
        mask.paste(255, (32, 32, 96, 96))
        mask.save(style / "0-masklabel.png")
    plain = noise_images(server.base / "input" / "all_plain", 2, (128, 128))
    try:
        base = prompt(server, "all", "all_style", 64, steps=6, layers="all")
        base["dataset"]["inputs"] |= {
            "flip": True,
            "shuffles": 1,
            "caption_dropout": 0.1,
            "regularisation": "all_plain",
            "regularisation_weight": 0.5,
            "more_resolutions": "96",
            "trigger_word": "noisy",
        }
        base["plain"]["inputs"] |= {"held_out": 0.2, "refit": False}
        options = {
            "Learning": {
                "schedule": "cosine",
                "warm_up": 2,
                "accumulate": 2,
                "ema_decay": 0.5,
                "mask_floor": 0.1,
                "stratified_timesteps": True,
                "caption_dropout": 0.2,
                "prior_weight": 0.5,
                "unconditional": ["no_words", 0],
            },
            "Layer": {"exclude_layers": "final_layer", "layer_ranks": "^text_encoders=2"},
            "Rank": {"mode": "product", "restart_every": 1, "threshold": "scheduled", "restart_steps": 2},
            "TextEncoder": {"clip": ["base", 1], "text_learning": 1.0},
            "Preview": {"preview_every": 3, "preview_prompts": "a rocket", "clip": ["base", 1]},
            "Checkpoint": {"checkpoint_every": 3, "checkpoint_name": "all"},
            "Speed": {"checkpointing": "all"},
        }
        base["no_words"] = server.node("CLIPTextEncode", text="", clip=["base", 1])
        before = "plain"
        for kind, settings in options.items():
            base[kind] = server.node(f"ACLoRA{kind}Options", **settings, options=[before, 0])
            before = kind
        base[TRAIN]["inputs"]["options"] = [before, 0]
        base["save"]["inputs"]["rank_report"] = [TRAIN, 3]
        drawn = drawing(server, "all")
        drawn["text"]["inputs"]["clip"], drawn["draw"]["inputs"]["model"] = [TRAIN, 4], [TRAIN, 0]
        history = server.run(base | drawn)
        base[TRAIN]["inputs"]["step"] = 3
        base["save"]["inputs"]["filename"] = "all_step"
        chosen = server.run(base | drawn)
    finally:
        shutil.rmtree(style)
        shutil.rmtree(plain)
    assert says(history).startswith("6 steps on 9 images")
    assert sorted(path.name for path in server.images(history)) == [
        "all_00001_.png",
        "sheet.png",
        "training_00001_.png",
    ]
    assert says(chosen).startswith("The LoRA is that of step 3, as chosen.")
    assert "This step was kept, so nothing had to be trained." in says(chosen)
    assert list((server.base / "models" / "aclora_checkpoints" / "all").glob("first_*"))
    learned = adapter(server, "all")
    assert adapter(server, "all_step").keys() == learned.keys()
    text = [key for key in learned if key.startswith("text_encoders.") and key.endswith("lora_down.weight")]
    assert text and all(len(learned[key]) <= 2 for key in text)
    assert not [key for key in learned if "final_layer" in key]
    assert all(torch.isfinite(tensor).all() for tensor in learned.values())
    with safe_open(server.base / "models" / "loras" / "all.safetensors", "pt") as file:
        report = RankReport.from_json(file.metadata()["aclora.trajectory"])
    assert report.facts.regularisation_images == 2 and report.facts.held_out_images == 2
    assert report.facts.preview_seconds > 0 and report.validation
    assert [restart.step for restart in report.restarts] == [2, 4]
