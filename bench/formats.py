"""Train the tiny base in every format that ComfyUI draws with, its weights on the GPU and streamed from main memory.

    python -m bench.formats --host path/to/ComfyUI      # on a CUDA GPU

All rows take the same steps from the same noise. So the loss of a format differs from that of bf16 by what the format
rounds, and the loss of a streamed row from that of the row above it by the order of additions. Weights are streamed as
with ComfyUI's --lowvram. Writes bench/results/formats_DEVICE.json; on a CPU, which streams nothing, half of the rows.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from bench import result_file
from bench.no_search.tables import markdown
from bench.step_time.clock import Clock, Measured, measure
from bench.training_session import make_config, training_session
from launcher.environment import ROOT
from launcher.inprocess import load_pack, open_host
from tests.support import quantised

SETTINGS: dict[str, Any] = {"batch_size": 4, "max_rank": 16, "layers": "all", "mode": "off", "smallest": False}
UNQUANTISED = "as the file has it"
PACKED = "packed in bytes, as from GGUF"
_WARM_UP = 10
_COMPARED = 10  # the last losses, whose mean is compared


@dataclass
class Row(Measured):
    """One training in a format."""

    losses: list[float] = field(default_factory=list)

    @property
    def loss(self) -> float:
        """Return the mean loss of the last steps; NaN after a failure."""
        return statistics.mean(self.losses[-_COMPARED:]) if self.losses and not self.failure else float("nan")


def model_in(name: str, weights: dict[str, torch.Tensor]) -> Any:
    """Return the MODEL of the tiny base with the linear layers of its blocks in a format."""
    if name == PACKED:
        return quantised.pack_blocks(quantised.load(weights, None, disable_dynamic=True))
    return quantised.load(weights, quantised.FORMATS.get(name))


def train(pack: ModuleType, model: Any, data: tuple[list[Any], list[Any]], row: Row, clock: Clock) -> None:
    """Train until the clock has its steps; the losses go into the row."""

    def on_step(progress: Any) -> None:
        row.losses = list(progress.losses)
        clock.tick(progress.losses[-1])

    with torch.inference_mode(), training_session(pack, model, *data) as session:
        clock.start()
        session.train(make_config(pack, **SETTINGS, steps=clock.total), on_step=on_step)


def dataset(pack: ModuleType) -> tuple[list[Any], list[Any]]:
    """Return 16 random latents of the tiny base's size, and the encoded caption of each."""
    with torch.inference_mode():
        clip = pack.nodes.tiny_base.ACLoRATinyBase.execute().result[1]
        caption = clip.encode_from_tokens_scheduled(clip.tokenize("a rocket"))
    generator = torch.Generator().manual_seed(0)
    latents = [{"samples": torch.randn(1, 16, 16, 16, generator=generator)} for _ in range(16)]
    return latents, [caption] * len(latents)


def measured_rows(pack: ModuleType, device: torch.device, names: list[str], steps: int) -> Iterator[Row]:
    """Train in each format, whole and, on a GPU, streamed; yield a row for each."""
    import comfy.model_management
    from comfy.model_management import VRAMState

    weights, data = quantised.tiny_denoiser(pack.nodes.tiny_base.FOLDER), dataset(pack)
    own = comfy.model_management.vram_state
    ways = {"whole": own, "streamed": VRAMState.LOW_VRAM} if device.type == "cuda" else {"whole": own}
    for name in names:
        for way, state in ways.items():
            row = Row(name, SETTINGS["batch_size"], "ours", way)
            comfy.model_management.vram_state = state
            try:
                work = partial(train, pack, model_in(name, weights), data, row)
                measure(row, Clock(device, _WARM_UP, steps), work)
            finally:
                comfy.model_management.vram_state = own
            print(f"{name}, {way}: {row.failure or f'{row.loss:.4f}, {row.median:.1f} ms'}", flush=True)
            yield row


def table(rows: list[Row]) -> str:
    """Return the rows as Markdown; losses are relative to the first row's."""
    lines = [
        [row.case, row.variant, row.failure or f"{row.loss / rows[0].loss:.3f}", f"{row.median:.1f}",
         f"{row.memory_gb:.2f}" if row.memory_gb else ""]
        for row in rows
    ]  # fmt: skip
    return markdown(["format", "weights", "loss", "ms a step", "GPU memory, GB"], lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.formats", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--host", type=Path, default=Path(".runtime/ComfyUI"))
    parser.add_argument("--formats", nargs="+", default=[UNQUANTISED, *quantised.FORMATS, PACKED])
    parser.add_argument("--steps", type=int, default=20, help="timed steps")
    parser.add_argument("--out", type=Path, help="default: bench/results/formats_DEVICE.json")
    args = parser.parse_args()
    open_host(args.host)
    pack = load_pack()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    facts = {"device": name, "torch": torch.__version__, "date": time.strftime("%Y-%m-%d")}
    out, rows = args.out or ROOT / "bench" / "results" / f"formats_{device.type}.json", list[Row]()
    for row in measured_rows(pack, device, args.formats, args.steps):
        rows.append(row)
        result_file.write(out, {**facts, "rows": [result_file.finite(asdict(row)) for row in rows]})
    print(f"\n{name}, torch {torch.__version__}\n\n{table(rows)}")


if __name__ == "__main__":
    main()
