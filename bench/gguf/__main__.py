"""Train small models from GGUF files, loaded by the node pack ComfyUI-GGUF, and compare with float32.

    pip install --target SITE gguf --no-deps
    git clone https://github.com/city96/ComfyUI-GGUF PACK
    python -m bench.gguf --pack PACK --site SITE --host path/to/ComfyUI                # a Flux in every type
    python -m bench.gguf --pack PACK --site SITE --host path/to/ComfyUI --families     # every family in one type

On the CPU, or with --gpu on a CUDA GPU. Random weights are written as that pack's files have them: matrices of layers
in the type, other matrices in F16, vectors in F32. The same weights, dequantised to float32 and loaded by ComfyUI
alone, take the same steps from the same noise. So an adapter differs from that of float32 by what the pack rounds: it
dequantises in float16. The table has the cosine of the two adapters' products, all layers together, for each way to
hold the blocks. On a GPU ComfyUI computes such a Flux in bfloat16, so there all is compared with bfloat16.
"""

from __future__ import annotations

import argparse
import importlib.util
import logging
import math
import sys
import tempfile
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from bench.gguf.files import TYPES, write_file
from bench.no_search.tables import markdown
from bench.training_session import make_config, training_session
from launcher.inprocess import load_pack, open_host
from tests.support.families import FAMILIES, Family, build, pictures

SETTINGS: dict[str, Any] = {
    "steps": 4,
    "batch_size": 2,
    "max_rank": 4,
    "layers": "all",
    "mode": "off",
    "smallest": False,
    "stop_early": False,
}
WAYS = ("whole", "recomputed", "streamed", "on a LoRA")
# ComfyUI detects it by its weights. Its rows are multiples of 256, as the K types need.
_FLUX_SIZES = {"hidden_size": 256, "num_heads": 2, "axes_dim": [16, 56, 56], "context_in_dim": 256, "vec_in_dim": 256}
FLUX = Family("Flux", FAMILIES["Flux.1"].network | _FLUX_SIZES, (16, 8, 8), text=(7, 256), pooled=256)
_FILE = "model.gguf"
_ANOTHER_IMAGE = {torch.float32: 0.01, torch.bfloat16: 0.3}  # relative difference from that of a plain model


def load_gguf_pack(folder: Path) -> Any:
    """Load ComfyUI-GGUF and return its node that loads a diffusion model."""
    spec = importlib.util.spec_from_file_location(
        "gguf_pack", folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module.NODE_CLASS_MAPPINGS["UnetLoaderGGUF"]()


def known_as(family: Family) -> AbstractContextManager[Any]:
    """Let ComfyUI take the next weights for a family whose true sizes are larger."""
    import comfy.model_detection
    import comfy.supported_models

    config = getattr(comfy.supported_models, family.config)(dict(family.network))
    config.unet_config |= family.network
    return patch.object(comfy.model_detection, "model_config_from_unet", lambda *_, **__: config)


def load(loader: Any, folder: Path, name: str, family: Family) -> tuple[Any, Any]:
    """Return the MODEL of a GGUF file with random weights of a type, and that of the same weights in float32."""
    import comfy.sd

    with torch.inference_mode():
        weights = write_file(folder / _FILE, name, build(family).model.diffusion_model)
        models = []
        for make in (
            lambda: loader.load_unet(_FILE)[0],
            lambda: comfy.sd.load_diffusion_model_state_dict(dict(weights), {"dtype": plain_dtype()}),
        ):
            with nullcontext() if family is FLUX else known_as(family), family.building():
                models.append(make())
    return models[0], models[1]


def plain_dtype() -> torch.dtype:
    """Return the dtype in which ComfyUI computes with a GGUF file here."""
    import comfy.model_management

    return torch.float32 if comfy.model_management.cpu_mode() else torch.bfloat16


def with_lora(model: Any, lora: dict[str, Tensor]) -> Any:
    """Return a MODEL with a LoRA, as ComfyUI's node loads it."""
    import comfy.sd

    with torch.inference_mode():
        return comfy.sd.load_lora_for_models(model, None, lora, 1.0, 0.0)[0]


def drawn(model: Any, family: Family, caption: Any) -> Tensor:
    """Return the denoised latent of pure noise: one step of ComfyUI's KSampler."""
    import nodes

    with torch.inference_mode():
        empty = {"samples": torch.zeros(1, *family.latent)}
        latent, *_ = nodes.common_ksampler(model, 3, 1, 1.0, "euler", "simple", caption, caption, empty)
    return torch.as_tensor(latent["samples"])


def weights_of(model: Any) -> dict[str, tuple[Any, ...]]:
    """Return class, type, shape and bytes of each weight of a MODEL, with its own patches applied."""
    import comfy.model_management

    with torch.inference_mode():
        comfy.model_management.load_models_gpu([model], force_full_load=True)
        return {name: _facts(weight) for name, weight in model.model.named_parameters()}


def _facts(weight: Tensor) -> tuple[Any, ...]:
    held = weight.data.as_subclass(Tensor).contiguous().view(torch.uint8).cpu().numpy().tobytes()
    own = vars(weight)
    return type(weight), own.get("tensor_type"), tuple(weight.shape), len(own.get("patches", [])), held


@dataclass(frozen=True)
class Learned:
    """What a training gives."""

    losses: list[float]
    lora: dict[str, Tensor]
    delta: Tensor  # the products of all layers, flat


def train(pack: ModuleType, model: Any, data: tuple[list[Any], list[Any]], way: str) -> Learned:
    """Train an adapter in one of the ways."""
    fits = patch.object(pack.nodes.host.loading, "fits", lambda patcher, limits: way != "streamed")
    config = make_config(pack, **SETTINGS, checkpointing="all" if way == "recomputed" else "off")
    with fits, torch.inference_mode(), training_session(pack, model, *data) as session:
        assert (session.network.weight_stream is not None) == (way == "streamed")
        result = session.train(config)
    core = importlib.import_module(f"{pack.__name__}.aclora_core.adapter")
    products = [
        layer.scale * layer.lora_up.double().flatten(1) @ layer.lora_down.double().flatten(1)
        for layer in result.adapter.layers.values()
    ]
    delta = torch.cat([product.flatten() for product in products])
    return Learned(list(result.report.losses), core.to_state_dict(result.adapter), delta)


@dataclass
class Row:
    """What was found of a file."""

    name: str
    failure: str = ""
    losses: float = 0.0  # largest relative difference from a loss of float32
    cosines: dict[str, float] = field(default_factory=dict)  # of the adapter and float32's, by way
    moved: tuple[float, float] = (math.nan, math.nan)  # relative change of the image by the LoRA; and in float32
    restored: bool = False  # whether the model has the same weights after all trainings
    redrawn: tuple[float, float] = (math.nan, math.nan)  # relative difference of its image: drawn again before, after

    def cells(self) -> list[str]:
        if self.failure:
            return [self.name, self.failure, *[""] * (len(WAYS) + 3)]
        cosines = [f"{self.cosines[way]:.5f}" for way in WAYS]
        moved = " / ".join(f"{share:.2%}" for share in self.moved)
        redrawn = " / ".join(f"{difference:.1e}" if difference else "the same" for difference in self.redrawn)
        return [self.name, f"{self.losses:.1e}", *cosines, moved, "the same" if self.restored else "CHANGED", redrawn]


def compare(pack: ModuleType, models: tuple[Any, Any], family: Family, row: Row) -> None:
    """Train both models in every way; what is found goes into the row."""
    data = pictures(family)
    before, weights = [drawn(model, family, data[1][0]) for model in models], weights_of(models[0])
    again = relative(drawn(models[0], family, data[1][0]), before[0])
    if (difference := relative(*before)) > _ANOTHER_IMAGE[plain_dtype()]:
        row.failure = f"draws another image than plain weights ({difference:.0%}), before any training"
        return
    lora: dict[str, Tensor] = {}
    for way in WAYS:
        bases = [with_lora(model, lora) if way == "on a LoRA" else model for model in models]
        ours, plain = (train(pack, base, data, way) for base in bases)
        lora = ours.lora
        row.losses = max(row.losses, *(abs(a / b - 1) for a, b in zip(ours.losses, plain.losses, strict=True)))
        row.cosines[way] = float(ours.delta @ plain.delta / ours.delta.norm() / plain.delta.norm())
    after = [drawn(with_lora(model, lora), family, data[1][0]) for model in models]
    row.moved = relative(after[0], before[0]), relative(after[1], before[1])
    row.restored = weights_of(models[0]) == weights
    row.redrawn = again, relative(drawn(models[0], family, data[1][0]), before[0])


def relative(found: Tensor, expected: Tensor) -> float:
    """Return the norm of a difference, relative to the expected one."""
    return float((found - expected).norm() / expected.norm())


def measured(pack: ModuleType, loader: Any, folder: Path, family: Family, name: str, kind: str) -> Row:
    """Train from a file of a family in a type, and return what was found."""
    row = Row(name)
    try:
        compare(pack, load(loader, folder, kind, family), family, row)
    except Exception as error:
        row.failure = f"{type(error).__name__}: {error}"
    return row


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.gguf", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--pack", type=Path, required=True, help="the folder of ComfyUI-GGUF")
    parser.add_argument("--site", type=Path, help="where the package gguf is, if not in this environment")
    parser.add_argument("--host", type=Path, default=Path(".runtime/ComfyUI"))
    parser.add_argument("--types", nargs="+", choices=TYPES, default=TYPES)
    parser.add_argument("--gpu", action="store_true", help="on a CUDA GPU")
    parser.add_argument("--families", action="store_true", help="every family in Q4_0, and not a Flux in every type")
    args = parser.parse_args()
    if args.site:
        sys.path.append(str(args.site))
    open_host(args.host, cpu=not args.gpu)
    pack, loader = load_pack(), load_gguf_pack(args.pack)
    import folder_paths

    logging.disable(logging.WARNING)
    jobs = [(FLUX, kind, kind) for kind in args.types]
    if args.families:
        plain = [name for name, family in FAMILIES.items() if family.dtype == torch.float32 and not family.loading]
        jobs = [(FAMILIES[name], name, "Q4_0") for name in plain]
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        folder_paths.add_model_folder_path("diffusion_models", folder)
        for job in jobs:
            rows.append(measured(pack, loader, Path(folder), *job).cells())
            print(*rows[-1], sep=", ", flush=True)
    header = ["file", "losses differ by", *WAYS, "the LoRA moves the image by, and in float32", "weights afterwards"]
    header += ["image drawn again before / afterwards"]
    print(f"\ngguf {version('gguf')}, torch {torch.__version__}\n\n{markdown(header, rows)}")


if __name__ == "__main__":
    main()
