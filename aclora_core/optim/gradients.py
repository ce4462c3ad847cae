"""Gradient accumulation: the losses and gradients of a step's micro-batches, summed."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..acceleration import CudaGraphRunner
from ..diffusion import Batch
from ..distributed import Processes
from ..lora import FlatParameters
from ..storage import tensors_in

# The training loss of a micro-batch on the device, as a scalar; or that and the loss to report, if it is another.
Loss = Callable[[Batch], Tensor | tuple[Tensor, Tensor]]


class GradientAccumulator:
    """Sums the losses and gradients of micro-batches, whose passes run as CUDA graphs where possible.

    Args:
        weights: the parameters to differentiate by; the backward pass adds to weights.gradient.
        loss_of: the loss of a micro-batch.
        graphs: runs and captures the passes.
        loss_scale: scalar that the loss is multiplied by before the backward pass, or None.

    Attributes:
        loss: scalar, the sum of the reported losses.
        gradient: flat float32 sum of the gradients; weights.gradient itself if that is float32. In the model's dtype
            small addends would be rounded away.
    """

    def __init__(
        self, weights: FlatParameters, loss_of: Loss, graphs: CudaGraphRunner, loss_scale: Tensor | None = None
    ) -> None:
        self.loss = torch.zeros((), device=weights.master.device)
        in_float32 = weights.gradient.dtype == torch.float32
        self.gradient = weights.gradient if in_float32 else torch.zeros_like(weights.master)
        self._weights = weights
        self._loss_of = loss_of
        self._graphs = graphs
        self._loss_scale = loss_scale
        self._prefetched: Batch | None = None  # first micro-batch of the next step, whose gradient is there already

    def add(self, batch: Batch) -> None:
        """Add a micro-batch's loss to the sum and its gradient to weights.gradient, unless it was prefetched.

        Text encoders that learn ran before the captured graph, so the gradient is passed on to them after it.
        """
        if batch is self._prefetched:
            self._prefetched = None
            return
        changes = [self.loss, self._weights.gradient]
        gradients = self._graphs.call(self._forward_backward, batch, batch.key, changes)
        if gradients:
            encoded = _encoder_outputs(batch)  # may be in main memory
            gradients = [gradient.to(tensor.device) for gradient, tensor in zip(gradients, encoded, strict=True)]
            # The graph is retained, as an overflow repeats the step on the same micro-batches.
            torch.autograd.backward(encoded, gradients, retain_graph=True)

    def _forward_backward(self, batch: Batch) -> list[Tensor]:
        """Return the gradients by the outputs of text encoders that learn; the others are added in place."""
        result = self._loss_of(batch)
        loss, reported = result if isinstance(result, tuple) else (result, result)
        if self._loss_scale is not None:
            loss = loss * self._loss_scale
        loss.backward()
        with torch.no_grad():
            self.loss += reported
        return [_take_gradient(tensor) for tensor in _encoder_outputs(batch)]

    def prefetch(self, batch: Batch) -> None:
        """Start the first micro-batch of the next step, if that is only a graph to be launched.

        Whoever changes the weights before that step calls clear.
        """
        if self._graphs.is_captured(self._forward_backward, batch.key) and not _encoder_outputs(batch):
            self.add(batch)
            self._prefetched = batch

    def discard_prefetched(self, unless: Batch | None = None) -> None:
        """Clear the sums if they hold the gradient of a prefetched micro-batch other than `unless`."""
        if self._prefetched is not None and self._prefetched is not unless:
            self.clear()

    @torch.no_grad()
    def to_float32(self) -> None:
        """Move weights.gradient into the float32 sum, if they are two tensors."""
        if self.gradient is not self._weights.gradient:
            self.gradient += self._weights.gradient
            self._weights.gradient.zero_()

    def sum_over(self, processes: Processes) -> None:
        """Sum loss and gradient over all processes, each of which has added its micro-batches in float32."""
        processes.sum_(self.gradient, self.loss)

    def clear(self) -> None:
        """Zero the sums, and discard a prefetched micro-batch."""
        self._prefetched = None
        for tensor in (self.loss, self.gradient, self._weights.gradient):
            tensor.zero_()


def _encoder_outputs(batch: Batch) -> Sequence[Tensor]:
    """Tensors of the batch that text encoders which learn have made of its captions."""
    return [tensor for tensor in tensors_in(batch) if tensor.requires_grad]


def _take_gradient(tensor: Tensor) -> Tensor:
    """Remove and return the tensor's .grad, or zeros where it has none."""
    gradient = tensor.grad
    tensor.grad = None
    return torch.zeros_like(tensor) if gradient is None else gradient
