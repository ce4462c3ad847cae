"""A diffusion model with a trainable adapter: its layers, their parameters, and the faster ways to compute them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor

from ..acceleration import ActivationCheckpointing, CudaGraphRunner, NoInplaceAdd, fuse_modules
from ..adapter import Adapter
from ..config import TrainConfig, rank_overrides
from ..diffusion import Batch, DiffusionModel, prediction_loss, weighted_loss
from ..lora import LoraSpec, alpha_scales, injected, make_parameters, target_layers
from ..storage import component_tensors


class AdaptedModel:
    """A frozen model and the adapter that is trained on it.

    Args:
        model: the frozen model.
        config: which layers are adapted, at which rank and alpha.
        generator: the adapter's start is drawn from it.
    """

    def __init__(self, model: DiffusionModel, config: TrainConfig, generator: torch.Generator) -> None:
        self.model = model
        self.layers = target_layers(
            model, config.layers, config.include_layers, config.exclude_layers, bool(config.text_learning)
        )
        spec = LoraSpec(
            config.max_rank,
            config.alpha,
            rank_overrides(self.layers, config.layer_ranks, model.prefix),
            alpha_scales(self.layers, model.text_encoders, config.text_learning),
        )
        self.parameters = make_parameters(self.layers, spec, generator, model.device, model.dtype)
        self.graphs = CudaGraphRunner(model.device, config.graph, model.weight_stream)
        self.checkpointing = ActivationCheckpointing(model.network)
        self.require_recomputing()

    @contextmanager
    def injected(self) -> Iterator[Callable[[], None]]:
        """Put the adapter on the model while the context lasts.

        Yields a function to call after a forward pass: from then on, layers that read the same tensor share a launch.
        """
        model = self.model
        fused = fuse_modules(model.network, model.is_unpatched, model.fusable, model.dtype)
        branches = injected(self.layers, self.parameters.layers, model.is_unpatched)
        streamed = model.weight_stream.attached() if model.weight_stream else nullcontext()
        with fused, branches as join_shared_inputs, streamed, self.checkpointing.attached():
            try:
                yield join_shared_inputs
            finally:
                self.graphs.clear()  # they hold the memory of a whole step

    def require_recomputing(self) -> None:
        """Have streamed blocks recomputed, whose weights are gone when the backward pass needs them."""
        if stream := self.model.weight_stream:
            self.checkpointing.required = self.recomputed_if_streamed(stream.streamed)

    def recomputed_if_streamed(self, indices: Sequence[int]) -> set[int]:
        """Return which blocks have to be recomputed if these of the weight stream's are streamed."""
        stream = self.model.weight_stream
        streamed = {id(stream.blocks[index]) for index in indices} if stream else set()
        return {index for index, block in enumerate(self.checkpointing.blocks) if id(block) in streamed}

    def loss(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return (training loss, reported loss) of a batch on the device, both scalars."""
        # As denoising_losses, written out: the whole loss of a step in one view, and the model one call below.
        sigma, latents, objective = batch.sigma, batch.latents, self.model.objective
        with NoInplaceAdd() if self.checkpointing.no_inplace_add else nullcontext():
            noisy = objective.add_noise(sigma, batch.noise, latents)
            target = self._base_prediction(noisy, batch) if batch.prior else latents
            denoised = self.model.denoise(noisy, sigma, batch.conditioning)
            losses = prediction_loss(objective, sigma, noisy, target, denoised, batch.position_weights)
            return weighted_loss(losses, batch)

    def _base_prediction(self, noisy: Tensor, batch: Batch) -> Tensor:
        """Return the clean latents that the frozen model predicts without its adapter, in float32."""
        with torch.no_grad(), self.parameters.switched_off():
            return self.model.denoise(noisy, batch.sigma, batch.conditioning).float()

    def adapter(self, dtype: torch.dtype = torch.float32) -> Adapter:
        """Return a copy of the adapter in main memory, in a dtype.

        Raises:
            ValueError: a weight is not finite in that dtype.
        """
        return Adapter(self.parameters.to_layers(dtype))

    def weight_addresses(self) -> list[int]:
        """Return where the network's weights lie; captured graphs are void once one has moved."""
        weights = self.model.network.parameters()
        return [part.data_ptr() for tensor in weights for part in component_tensors(tensor)]
