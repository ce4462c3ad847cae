"""Train a LoRA for a network of your own, without ComfyUI: `pip install .`, then run this, some seconds on a CPU."""

import sys

import torch
from torch import Tensor, nn

import aclora_core as aclora

# A flow model: sigma runs from 0 (clean) to 1 (noise), and the network predicts the velocity, noise - latent.
FLOW = aclora.Objective(
    add_noise=lambda sigma, noise, latent: latent + sigma.view(-1, 1, 1, 1) * (noise - latent),
    denoised=lambda sigma, output, noisy: noisy - sigma.view(-1, 1, 1, 1) * output,
    sigma_at=lambda fraction: fraction,
    sampling="logit-normal",
)


class Denoiser(nn.Sequential):
    """A small network for latents of 4 channels and 4 × 4 pixels, with captions of 8 numbers."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(64 + 1 + 8, 128), nn.SiLU(), nn.Linear(128, 128), nn.SiLU(), nn.Linear(128, 64))

    def predict(self, noisy: Tensor, sigma: Tensor, captions: Tensor) -> Tensor:
        return self(torch.cat([noisy.flatten(1), sigma[:, None], captions], dim=1)).view(noisy.shape)

    def learn(self, latents: Tensor, captions: Tensor) -> None:
        """Stand in for the training of your base model."""
        optimizer = torch.optim.Adam(self.parameters(), lr=2e-3)
        for _ in range(1000):
            noise, sigma = torch.randn_like(latents), torch.rand(len(latents))
            output = self.predict(FLOW.add_noise(sigma, noise, latents), sigma, captions)
            (output - (noise - latents)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()


def print_progress(progress: aclora.Progress) -> None:
    if progress.done % 100 == 0:
        print(f"{progress.stage}: step {progress.done} of {progress.total}, loss {progress.losses[-1]:.3f}")


torch.manual_seed(0)
network, captions = Denoiser(), torch.randn(128, 8)
latents = (captions @ torch.randn(8, 64) / 8**0.5).view(128, 4, 4, 4)  # what an image shows follows from its caption
network.learn(latents, captions)
styled = 0.5 * latents[:16] + torch.randn(4, 4, 4)  # sixteen images with one style in common

model = aclora.SimpleModel(network.requires_grad_(False), FLOW, network.predict)
images = aclora.SimpleTrainingSet(styled.split(1), captions[:16].split(1))
config = aclora.TrainConfig(steps=350, learning_rate=1e-3, max_rank=8)
result = aclora.train(model, images, config, on_step=print_progress)  # also: checkpoints, previews, should_stop
path = sys.argv[1] if len(sys.argv) > 1 else "style.safetensors"
aclora.save(result.adapter, path, aclora.build_metadata(result.adapter, "My style", result.report))

adapter, losses = aclora.load(path), [loss for _, loss in result.report.fit]
inspection = aclora.inspect_lora(aclora.to_state_dict(adapter), adapter.metadata)
print(f"Loss on its images: {losses[0]:.3f} before, {losses[-1]:.3f} after. Saved as {path}.")
print("Ranks:", ", ".join(f"{layer.name} {layer.rank}" for layer in inspection.layers))
