"""The host's own residual and transformer blocks, entered in our way: the same numbers, and nothing left behind."""

import importlib
from collections import Counter

import pytest
import torch

from bench.step_time_parts.models import build, case_named, pictures
from tests.stand_ins import stand_ins


@pytest.mark.parametrize("name", ["sd15", "sdxl"])
def test_the_blocks_of_a_unet_give_the_same_in_our_way(name, pack, monkeypatch):
    core = f"{pack.__name__}.aclora_core"
    lora, kernels = (importlib.import_module(f"{core}.{part}") for part in ("lora", "kernels"))
    fast = importlib.import_module(f"{core}.fast_modules")
    case = case_named(name, True, 0)
    latents, captions = pictures(case)
    with torch.inference_mode():
        model = build(case)
        opened = pack.nodes.host.training(model, latents, captions)
        with opened as trainable, torch.inference_mode(False), torch.enable_grad():
            network, found, counted = trainable.network, [], Counter()
            monkeypatch.setattr(fast, "_kernels_for", lambda network: stand_ins(kernels.Kernels, counted))
            layers = lora.find_layers(network, "all")
            for quick in (False, True):
                weights = lora.make_weights(layers, 4, 4.0, torch.Generator().manual_seed(0), torch.device("cpu"))
                weights.master.normal_(std=0.05, generator=torch.Generator().manual_seed(1))
                weights.refresh()
                classes = trainable.fast_classes if quick else fast.FastClasses()
                is_plain = trainable.is_plain if quick else (lambda module: False)
                generator = torch.Generator().manual_seed(2)
                noisy = torch.randn(trainable.latents[0].shape, generator=generator)
                with (
                    fast.fast_modules(network, is_plain, classes),
                    lora.attached(layers, weights.branches, trainable.is_plain),
                ):
                    counted.clear()
                    output = trainable.denoise(noisy, torch.tensor([3.0]), trainable.condition([0]))
                    output.square().sum().backward()
                found.append((output.detach().clone(), weights.gradient.clone()))
            blocks = Counter(type(module).__name__ for module in network.modules())
            assert not [name for name, module in network.named_modules() if "forward" in vars(module)]
    transformers = blocks["BasicTransformerBlock"]
    assert counted["shift"] == blocks["ResBlock"] > 0
    assert counted["and rows"] == counted["gate"] == transformers > 0
    assert counted["sum and rows"] == 2 * transformers and not counted["rows"]
    torch.testing.assert_close(found[1], found[0], rtol=1e-3, atol=1e-4)
