"""Measure what the allocator takes for an eager step beyond its tensors, with the CPU ahead of the GPU and in pace.

    PYTORCH_CUDA_ALLOC_CONF=backend:cudaMallocAsync python -m bench.memory.gaps --cases sdxl flux_fp8    # on a CUDA GPU

The step recomputes every block and streams all weights; see aclora_core/acceleration/pace.py. Without the variable
PyTorch's own allocator is measured.
"""

from __future__ import annotations

import argparse
import gc
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from bench.memory.__main__ import weights_in_main_memory
from bench.memory.ballast import left_free
from bench.memory.cases import LIMITS, case_of
from bench.no_search.tables import markdown
from bench.step_time.aclora import PLAIN
from bench.step_time.models import random_dataset
from bench.training_session import make_config, training_session
from launcher.inprocess import load_pack, open_host


class Found(Exception):  # noqa: N818 - it ends a training that has shown what is wanted
    """The sizes of the step, first ahead of the GPU and then in pace."""


def sizes_of(pack: Any, name: str, free: float) -> tuple[Any, Any]:
    """Return the ActivationSizes of a case's step with so many GiB free, ahead of the GPU and in pace."""
    case = case_of(name)
    checkpointing = import_module(f"{pack.__name__}.aclora_core.acceleration").ActivationCheckpointing
    measure = checkpointing.measure

    def measure_both(self: Any, loss: Callable[[], Any], in_pace: bool = False) -> Any:
        raise Found(*[measure(self, loss, paced) for paced in (False, True)])

    with torch.inference_mode(), patch.object(checkpointing, "measure", measure_both):
        model, data = weights_in_main_memory(case), random_dataset(case)
        try:
            with left_free(free), training_session(pack, model, *data) as session:
                if session.network.weight_stream is None:
                    raise RuntimeError(f"with {free:g} GiB free no weights of {name} are streamed")
                session.train(make_config(pack, **PLAIN, batch_size=1, steps=1))
        except Found as found:
            ahead, in_pace = found.args
            return ahead, in_pace
    raise RuntimeError(f"{name} was trained without a measurement")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.memory.gaps", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--host", type=Path, default=Path(".runtime/ComfyUI"))
    parser.add_argument("--cases", nargs="+", choices=list(LIMITS), default=["sdxl", "flux_fp8"])
    args = parser.parse_args()
    open_host(args.host)
    pack, rows = load_pack(), list[list[str]]()
    for name in args.cases:
        ahead, in_pace = sizes_of(pack, name, LIMITS[name][-1])
        rows.append([name, *(f"{size / 1e9:.2f}" for size in (ahead.used, ahead.least, in_pace.least))])
        gc.collect()  # of the training, before the memory of the next one is measured
        print(*rows[-1], flush=True)
    header = ["model", "tensors, GB", "taken ahead of the GPU, GB", "taken in pace, GB"]
    print(f"\n{torch.cuda.get_allocator_backend()}\n\n{markdown(header, rows)}")


if __name__ == "__main__":
    main()
