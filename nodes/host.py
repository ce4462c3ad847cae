"""The one place that knows ComfyUI from the inside: its MODEL as something to train, its progress bar, its cancel."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import comfy.model_management
import comfy.sampler_helpers
import comfy.samplers
import comfy.sd
import comfy.utils
import torch
from comfy_api.latest import io
from comfy_execution.graph_utils import ExecutionBlocker
from PIL import Image
from torch import Tensor

from ..aclora_core.objective import Objective, Sampling

PREFIX = "diffusion_model."  # before every layer's name in the host's LoRA files


class Bar:
    """The node's progress bar, with a live picture and a line of text, and the host's cancel."""

    def __init__(self, total: int, node_id: str | None = None) -> None:
        self.total = total
        self._bar = comfy.utils.ProgressBar(total, node_id=node_id)
        self._node_id = node_id
        self._done = 0
        self._started = time.monotonic()

    def show(self, done: int, text: str = "", picture: Image.Image | None = None) -> None:
        """Moves the bar. On a cancel the host would raise here and the work would be lost; ask cancelled() first."""
        self._done = done
        preview = ("JPEG", picture, None) if picture else None
        self._bar.update_absolute(done, self.total, preview)
        if text:
            send_text(text, self._node_id)

    def advance(self, steps: int) -> None:
        """Moves the bar on by some steps."""
        self.show(self._done + steps)

    def time_left(self, done: int) -> str:
        """Minutes and seconds that the rest takes at the pace so far."""
        seconds = round((time.monotonic() - self._started) / max(1, done) * (self.total - done))
        return f"{seconds // 60}:{seconds % 60:02} left"


def send_text(text: str, node_id: str | None) -> None:
    """Shows text on the node that runs; outside a prompt, in a script or test, there is none."""
    if node_id is not None:
        from server import PromptServer  # the web server, which scripts do not start

        PromptServer.instance.send_progress_text(text, node_id)


def cancelled() -> bool:
    """Whether the user has asked to stop."""
    return bool(comfy.model_management.processing_interrupted())


def accept_cancel() -> None:
    """Takes the user's stop as done, so that the nodes behind this one still run."""
    comfy.model_management.interrupt_current_processing(False)


def raise_if_cancelled() -> None:
    """Stops the whole prompt where the user has asked for it."""
    comfy.model_management.throw_exception_if_processing_interrupted()


def blocked(reason: str) -> ExecutionBlocker:
    """An output that stops only the nodes behind it, with a sentence."""
    return ExecutionBlocker(reason)


def with_adapter(model: Any, state_dict: dict[str, Tensor]) -> Any:
    """A copy of the MODEL with a LoRA on it at strength 1; the MODEL itself stays as it is."""
    return comfy.sd.load_lora_for_models(model, None, state_dict, 1.0, 0.0)[0]


@dataclass
class TrainableModel:
    """The host's MODEL and a set of captioned latents, as aclora_core.training.Model wants them."""

    base: Any  # the host's BaseModel
    device: torch.device
    latents: list[Tensor]
    conditions: list[dict[str, Any]]  # for each picture, what the host's model wants besides noise, by name
    groups: list[Hashable]
    objective: Objective
    options: dict[str, Any]  # the MODEL's transformer_options
    prefix: str = PREFIX
    interrupted: bool = False  # the user asked to stop in the middle of a step

    @property
    def network(self) -> torch.nn.Module:
        return self.base.diffusion_model

    @property
    def base_name(self) -> str:
        """The host's name for the kind of model, such as SDXL."""
        return type(self.base.model_config).__name__

    @property
    def resolution(self) -> str:
        """Width x height in pixels of the commonest picture."""
        shapes = [tuple(latent.shape[-2:]) for latent in self.latents]
        height, width = max(set(shapes), key=shapes.count)
        pixels = self.base.latent_format.spacial_downscale_ratio
        return f"{width * pixels}x{height * pixels}"

    def denoise(self, noisy: Tensor, sigma: Tensor, pictures: Sequence[int]) -> Tensor:
        first, *others = [self.conditions[number] for number in pictures]
        # Only pictures of one group come together, so the host joins their conditions without padding any.
        joined = {name: cond.concat([other[name] for other in others]) for name, cond in first.items()}
        count = len(pictures)
        options = {**self.options, "cond_or_uncond": [0] * count, "sigmas": sigma}
        conditions = _moved(joined, self.device)
        while True:
            try:
                return self.base.apply_model(noisy, sigma, transformer_options=options, **conditions)
            except comfy.model_management.InterruptProcessingException:
                # The host raises this in every layer and forgets it then. The step is ended so that no work is lost.
                self.interrupted = True

    def cancelled(self) -> bool:
        """Whether the user has asked to stop, now or in the middle of a step."""
        return self.interrupted or cancelled()


@contextmanager
def training(model: Any, latents: Sequence[dict], conditioning: Sequence[Any]) -> Iterator[TrainableModel]:
    """Opens a MODEL for training, with each latent's own caption; afterwards everything is as it was.

    Raises:
        ValueError: what came in cannot be trained on; the sentence says which picture and what to do.
    """
    _check_inputs(model, latents, conditioning)
    patcher = _patcher_for_training(model)
    # Still in the mode in which the host made the weights: moved in the other one, they could be used in neither.
    comfy.model_management.load_models_gpu([patcher], force_full_load=True)
    base, device = patcher.model, patcher.load_device
    before = comfy.model_management.in_training
    try:
        # Some of the host's fused kernels have no backward; this flag makes it leave them out.
        comfy.model_management.in_training = True
        with torch.inference_mode(False), torch.enable_grad(), _differentiable_weights(base):
            yield _trainable(patcher, base, device, latents, conditioning)
    finally:
        comfy.model_management.in_training = before


def _check_inputs(model: Any, latents: Sequence[dict], conditioning: Sequence[Any]) -> None:
    if not hasattr(getattr(model, "model", None), "diffusion_model"):
        raise ValueError("The model input is no diffusion model that can be trained. Connect a checkpoint's MODEL.")
    if len(latents) != len(conditioning):
        raise ValueError(
            f"There are {len(latents)} latents but {len(conditioning)} conditionings; each picture needs its own "
            "caption. Connect both outputs of one AC-LoRA Dataset node."
        )
    if not latents:
        raise ValueError("There are no pictures to learn from. Connect an AC-LoRA Dataset node.")
    channels = model.model.latent_format.latent_channels
    sides = max(2, model.model.latent_format.latent_dimensions)  # 3 for video models
    for number, latent in enumerate(latents, start=1):
        samples = latent["samples"]
        if samples.ndim != 2 + sides or samples.shape[1] != channels:
            raise ValueError(
                f"Latent {number} has the shape {tuple(samples.shape)}, but this model works on {channels} channels. "
                "Connect the VAE that belongs to the model to the dataset node."
            )
        if samples.shape[0] != 1:
            raise ValueError(
                f"Latent {number} holds {samples.shape[0]} pictures, which would share one caption. Give each picture "
                "a latent of its own, as AC-LoRA Dataset does."
            )
        if not torch.isfinite(samples).all():
            raise ValueError(f"Latent {number} holds NaN or infinity. Load the VAE in fp32 (--fp32-vae) and try again.")
        if len(conditioning[number - 1]) != 1:
            raise ValueError(
                f"Caption {number} is made of {len(conditioning[number - 1])} conditionings. Give each picture one, "
                "not a combination."
            )


def _patcher_for_training(model: Any) -> Any:
    """A clone whose weights stay in place while training, and that computes in a type with a usable gradient."""
    patcher = model.clone(disable_dynamic=True) if model.is_dynamic() else model.clone()
    float16 = patcher.model.get_dtype_inference() == torch.float16
    if float16 and comfy.model_management.should_use_bf16(patcher.load_device):
        patcher.set_model_compute_dtype(torch.bfloat16)  # float16 gradients vanish
    return patcher


@contextmanager
def _differentiable_weights(module: torch.nn.Module) -> Iterator[None]:
    """Weights made under inference mode cannot be used in autograd; for a while, aliases of the same memory can."""
    swapped = []
    try:
        for part in module.modules():
            for store in (part._parameters, part._buffers):
                for name, tensor in store.items():
                    if tensor is not None and (tensor.is_inference() or tensor.requires_grad):
                        swapped.append((store, name, tensor))
                        store[name] = _alias(tensor)
        yield
    finally:
        for store, name, tensor in swapped:
            store[name] = tensor


def _alias(tensor: Tensor) -> Tensor:
    """The same memory as a tensor that autograd accepts as a constant."""
    if hasattr(tensor, "__tensor_flatten__"):  # a quantised weight: a tensor made of others, with no memory of its own
        names, facts = tensor.__tensor_flatten__()
        inner = {name: _alias(getattr(tensor, name)) for name in names}
        alias = type(tensor).__tensor_unflatten__(inner, facts, tensor.size(), tensor.stride())
    else:
        alias = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
        alias.set_(tensor.untyped_storage(), tensor.storage_offset(), tensor.size(), tensor.stride())
    return torch.nn.Parameter(alias, requires_grad=False) if isinstance(tensor, torch.nn.Parameter) else alias


def _trainable(
    patcher: Any, base: Any, device: torch.device, latents: Sequence[dict], conditioning: Sequence[Any]
) -> TrainableModel:
    scaled = [base.process_latent_in(latent["samples"].clone().float().cpu()) for latent in latents]
    # The same tensors come again for repeated pictures and shared captions; each is prepared once.
    prepared: dict[tuple[int, tuple[int, ...]], dict[str, Any]] = {}
    conditions = []
    with torch.no_grad():
        for samples, cond in zip(scaled, conditioning, strict=True):
            key = (id(cond), tuple(samples.shape))
            if key not in prepared:
                prepared[key] = _condition(base, cond, samples, device)
            conditions.append(prepared[key])
    groups = [(tuple(s.shape), _signature(c)) for s, c in zip(scaled, conditions, strict=True)]
    options = patcher.model_options.get("transformer_options", {})
    return TrainableModel(base, device, scaled, conditions, groups, _objective(base.model_sampling), options)


def _condition(base: Any, conditioning: Any, samples: Tensor, device: torch.device) -> dict[str, Any]:
    """What the host's model wants for one picture, by name, kept in main memory."""
    single = comfy.sampler_helpers.convert_cond(_cloned(conditioning))
    noise = torch.zeros_like(samples, device=device)
    encoded = comfy.samplers.encode_model_conds(base.extra_conds, single, noise, device, "positive")
    conds = {n: c.process_cond(batch_size=1, area=None) for n, c in encoded[0]["model_conds"].items()}
    return {name: cond._copy_with(_to(cond.cond, torch.device("cpu"))) for name, cond in conds.items()}


def _cloned(value: Any) -> Any:
    """Tensors from nodes before this one were made under inference mode; their clones were not."""
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, dict):
        return {key: _cloned(item) for key, item in value.items()}
    return [_cloned(item) for item in value] if isinstance(value, list | tuple) else value


def _to(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    return [_to(item, device) for item in value] if isinstance(value, list) else value


def _moved(joined: dict[str, Any], device: torch.device) -> dict[str, Any]:
    return {name: _to(value, device) for name, value in joined.items()}


def _signature(condition: dict[str, Any]) -> Hashable:
    """What two captions must share to be joined: names, kinds and sizes."""

    def kind(value: Any) -> Hashable:
        if isinstance(value, Tensor):
            return tuple(value.shape)
        return tuple(kind(item) for item in value) if isinstance(value, list) else repr(value)

    return tuple((name, type(cond).__name__, kind(cond.cond)) for name, cond in sorted(condition.items()))


def _objective(sampling: Any) -> Objective:
    """The model's noise; flow models draw their noise levels around the middle, the others evenly."""
    flow = hasattr(sampling, "shift") or float(sampling.sigma_max) <= 1.0
    drawn: Sampling = "logit-normal" if flow else "uniform"
    add_noise: Callable[[Tensor, Tensor, Tensor], Tensor] = sampling.noise_scaling
    return Objective(
        add_noise=add_noise,
        denoised=sampling.calculate_denoised,
        sigma_at=lambda share: float(sampling.percent_to_sigma(1.0 - share)),
        sampling=drawn,
    )


def hidden_node_id(cls: type[io.ComfyNode]) -> str | None:
    """The id of the node that runs; None outside a prompt."""
    return getattr(getattr(cls, "hidden", None), "unique_id", None)
