"""Optimisation steps: forward and backward passes, the update of the adapter's weights, the weights to evaluate."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from ..acceleration import CudaGraphRunner
from ..config import OptimizerName
from ..diffusion import Batch
from ..distributed import ALONE, Processes
from ..lora import FlatParameters
from .ema import Ema
from .evaluation import EvaluationWeights
from .flat_optimizer import FlatOptimizer
from .grad_scaler import GradScaler
from .gradients import GradientAccumulator, Loss
from .weight_update import WeightUpdate


def _no_batches() -> Sequence[Batch]:
    return ()


class Stepper:
    """Takes optimisation steps on an adapter, and skips those whose loss or gradient is not finite.

    The loss of float16 models is scaled. A step whose gradient overflows is repeated at half the scale, so no image is
    left out for it.

    Args:
        weights: the adapter's parameters.
        loss_of: the loss of a micro-batch, see Loss. A step descends the sum over its micro-batches.
        graphs: runs the steps, as captured CUDA graphs where possible.
        learning_rate: of the first step.
        weight_decay: of the optimizer.
        max_norm: gradients with a larger norm are scaled down to it.
        optimizer: a key of OPTIMIZERS.
        ema_decay: of the EMA to evaluate and save in place of the weights; 0 for none.
        processes: that share the micro-batches of each step.

    Attributes:
        skipped_in_a_row: number of steps that were skipped since the last that was not.
    """

    def __init__(
        self,
        weights: FlatParameters,
        loss_of: Loss,
        graphs: CudaGraphRunner,
        learning_rate: float,
        weight_decay: float,
        max_norm: float,
        *,
        optimizer: OptimizerName = "AdamW",
        ema_decay: float = 0.0,
        processes: Processes = ALONE,
    ) -> None:
        self.weights = weights
        self.graphs = graphs
        self._processes = processes
        self.skipped_in_a_row = 0
        scaler = GradScaler(weights.master.device) if weights.gradient.dtype == torch.float16 else None
        ema = Ema(weights, ema_decay) if ema_decay else None
        self._gradients = GradientAccumulator(weights, loss_of, graphs, scaler.value if scaler else None)
        self._optimizer = FlatOptimizer(optimizer, weights, self._gradients.gradient, learning_rate, weight_decay)
        self._update = WeightUpdate(weights, self._gradients, self._optimizer, max_norm, scaler, ema)
        self._evaluation = EvaluationWeights(weights, self._optimizer, ema)

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """The torch optimizer."""
        return self._optimizer.optimizer

    @property
    def learning_rate(self) -> float:
        """Learning rate of the last step, and of the next unless it is set."""
        return self._optimizer.learning_rate

    @learning_rate.setter
    def learning_rate(self, value: float) -> None:
        self._optimizer.learning_rate = value

    def step(self, batches: Sequence[Batch], meanwhile: Callable[[], Sequence[Batch]] = _no_batches) -> float:
        """Take one step on the summed loss of the micro-batches.

        Args:
            batches: one or more micro-batches; of several processes, one may have none.
            meanwhile: called once while the GPU works. It may return the micro-batches of the next step; the GPU then
                starts on the first of them while the CPU reads this step's loss. Whoever changes weights between the
                two steps calls clear_gradients.

        Returns:
            The sum of the reported losses; NaN if the step was skipped.
        """
        gradients = self._gradients
        gradients.discard_prefetched(unless=batches[0] if batches else None)
        alone = self._processes.size == 1  # sums over processes are taken in float32
        in_model_dtype = alone and len(batches) == 1 and self._update.takes_model_dtype
        while True:
            for batch in batches:
                gradients.add(batch)
                if not in_model_dtype:
                    gradients.to_float32()
            gradients.sum_over(self._processes)
            read_result = self.graphs.async_read(self._updated(in_model_dtype))
            for batch in meanwhile()[:1]:
                gradients.prefetch(batch)
            loss, overflowed = read_result()
            if not overflowed:
                break
            gradients.discard_prefetched()
            meanwhile = _no_batches  # the next step's are drawn already
        self.skipped_in_a_row = 0 if math.isfinite(loss) else self.skipped_in_a_row + 1
        return loss

    def _updated(self, in_model_dtype: bool) -> Tensor:
        try:
            return self._update.run(self.graphs, in_model_dtype)
        except torch.cuda.OutOfMemoryError as error:
            if self._processes.size == 1:
                raise
            raise RuntimeError(
                "There is no memory left for the update of the weights, and of several processes none can repeat a "
                "step alone. Lower batch_size or max_rank."
            ) from error

    def clear_gradients(self) -> None:
        """Discard the gradients of an unfinished step, and a prefetched micro-batch of the next."""
        self._gradients.clear()

    def reset_state(self, factors: Iterable[Tensor]) -> None:
        """Reset the optimizer state of factors that a restart has replaced."""
        self._update.reset_state(factors)

    def restart_ema(self, factors: Iterable[Tensor]) -> None:
        """Restart the EMA at factors that a restart has replaced. Give both factors of a layer."""
        self._update.restart_ema(factors)

    def restore_last_good(self) -> None:
        """Restore the weights from before the last finite step, with a fresh optimizer state."""
        self._update.restore_last_good()

    def evaluation_weights(self) -> AbstractContextManager[None]:
        """Return a context in which the weights are those to evaluate: the EMA or schedule-free average, if any."""
        return self._evaluation.swapped_in()

    def keep_evaluation_weights(self) -> None:
        """Replace the weights by those to evaluate for good. Further calls change nothing."""
        self._evaluation.keep()

    def state_dict(self) -> dict[str, Any]:
        """State for a checkpoint besides the weights; the tensors are not copied."""
        return {"skipped_in_a_row": self.skipped_in_a_row, **self._update.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a state_dict. Tensors are filled in place, as captured graphs hold their addresses."""
        self.skipped_in_a_row = int(state["skipped_in_a_row"])
        self._update.load_state_dict(state)
