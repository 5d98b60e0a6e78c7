"""Decode speed of the first whole: against transformers' generate, over workers, and against memory's rate.

All runs sample at temperature 1 with fixed seeds. Time per output token (TPOT) excludes the prefill: it is taken
between the first and the last token. No link is emulated, so every roofline here is the memory's: the weights that a
token needs, read once (``roofline_fraction``).

    python -m benchmarks.decode [--quick] [--json PATH]
"""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("RAY_AUTH_MODE", "disabled")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

import psutil
import torch
from transformers import AutoModelForCausalLM
from transformers.generation.streamers import BaseStreamer

import raymoe
from benchmarks.harness import Figure, arguments, figure, in_turns, ratios, read_bandwidth, report
from benchmarks.roofline import MEMORY_FLOOR, active_bytes, floor_s
from raymoe.checkpoint.opening import open_checkpoint
from raymoe.config import EMBEDDED_MODEL
from raymoe.launcher import Moe

PROMPT = list(range(200, 216))
IMPLEMENTATIONS = ("grouped_mm", "batched_mm", "eager")
CORES = len(os.sched_getaffinity(0))


class Clock(BaseStreamer):
    """Notes when each token comes out of ``generate``."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        """A token (the first call brings the prompt)."""
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Nothing to finish."""


def transformers_tpot(model: Any, tokens: int) -> float:
    """Seconds per output token of ``generate``, prefill excluded."""
    clock = Clock()
    torch.manual_seed(0)
    model.generate(
        torch.tensor([PROMPT]),
        do_sample=True,
        temperature=1.0,
        top_k=0,
        max_new_tokens=tokens,
        min_new_tokens=tokens,
        eos_token_id=None,
        pad_token_id=0,
        streamer=clock,
    )
    times = clock.times[1:]
    return (times[-1] - times[0]) / (len(times) - 1)


def raymoe_tpot(moe: Moe, tokens: int) -> float:
    """Seconds per output token of a running model, prefill excluded."""
    times = []
    for _ in moe.stream(PROMPT, max_tokens=tokens, temperature=1.0, seed=0, ignore_eos=True):
        times.append(time.perf_counter())
    return (times[-1] - times[0]) / (len(times) - 1)


def reference(path: Path, dtype: torch.dtype, tokens: int) -> tuple[Any, str]:
    """transformers' model with whichever experts implementation is fastest here."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype).eval()
    speeds = {}
    for name in IMPLEMENTATIONS:
        model.set_experts_implementation(name)
        transformers_tpot(model, 8)
        speeds[name] = min(transformers_tpot(model, tokens) for _ in range(2))
    best = min(speeds, key=lambda name: speeds[name])
    model.set_experts_implementation(best)
    return model, best


def open_model(path: Path, dtype: str, devices: list[dict[str, Any]], **more: Any) -> Moe:
    """A running model."""
    return raymoe.launch({"model": {"path": str(path), "dtype": dtype}, "devices": devices, **more})


def fractions(name: str, bound_s: float, tpots_s: list[float]) -> Figure:
    """Share of the roofline that a variant reached.

    Args:
        bound_s: seconds in which memory delivers what a token needs.
    """
    floor = floor_s(resident_s=bound_s)
    return figure(f"roofline_fraction_{name}", [floor / value for value in tpots_s], "", MEMORY_FLOOR)


def embedded(tokens: int, rounds: int) -> list[Figure]:
    """The embedded model in float32: all overhead, little arithmetic."""
    torch.set_num_threads(CORES)
    model, best = reference(EMBEDDED_MODEL, torch.float32, tokens)
    checkpoint = open_checkpoint(EMBEDDED_MODEL, "float32")
    local = open_model(EMBEDDED_MODEL, "float32", [{"name": "local", "transport": "local"}])
    with local:
        alone = in_turns(
            {"transformers": lambda: transformers_tpot(model, tokens), "local": lambda: raymoe_tpot(local, tokens)},
            rounds,
        )
        bandwidth = read_bandwidth(CORES)
        bound = active_bytes(checkpoint) / bandwidth
        layers = len(checkpoint.layers)
        workers = open_model(EMBEDDED_MODEL, "float32", [{"name": f"edge-{i}"} for i in range(4)])
        with workers:
            four = in_turns(
                {
                    "transformers": timed_with_threads(CORES, lambda: transformers_tpot(model, tokens)),
                    "workers": timed_with_threads(max(1, CORES - 4), lambda: raymoe_tpot(workers, tokens)),
                    "local": timed_with_threads(CORES, lambda: raymoe_tpot(local, tokens)),
                },
                rounds,
            )
    hop = [(w - lo) / layers * 1e6 for w, lo in zip(four["workers"], four["local"], strict=True)]
    over = [(value - bound) / layers * 1e6 for value in alone["local"]]
    ms = [1e3 * value for value in alone["local"]]
    return [
        figure("local_vs_transformers", ratios(alone["transformers"], alone["local"]), "x", f"generate with {best}"),
        figure("workers4_vs_transformers", ratios(four["transformers"], four["workers"]), "x", "4 worker processes"),
        figure("layer_overhead_us", over, "us", "local, per MoE layer, beyond reading the active weights once"),
        figure("worker_layer_overhead_us", hop, "us", "per MoE layer, 4 worker processes over local"),
        figure("local_tpot_ms", ms, "ms", "orientation only"),
        fractions("transformers", bound, alone["transformers"]),
        fractions("local", bound, alone["local"]),
        fractions("workers4", bound, four["workers"]),
    ]


def timed_with_threads(threads: int, run: Callable[[], float]) -> Callable[[], float]:
    """The same run with torch's thread count set for its duration."""

    def timed() -> float:
        torch.set_num_threads(threads)
        return run()

    return timed


def against_disk_offload(tokens: int, rounds: int) -> list[Figure]:
    """The embedded model with a third of its experts' bytes in fast memory, against accelerate's disk offload."""
    torch.set_num_threads(CORES)
    checkpoint = open_checkpoint(EMBEDDED_MODEL, "float32")
    budget = checkpoint.routed_bytes // 3
    with tempfile.TemporaryDirectory() as folder:
        offloaded = AutoModelForCausalLM.from_pretrained(
            EMBEDDED_MODEL,
            dtype=torch.float32,
            device_map="auto",
            max_memory={"cpu": checkpoint.trunk_bytes + budget},
            offload_folder=folder,
        )
        device = {"name": "local", "transport": "local", "slot_memory": budget}
        with open_model(EMBEDDED_MODEL, "float32", [device]) as moe:
            times = in_turns(
                {
                    "accelerate": lambda: transformers_tpot(offloaded, tokens),
                    "raymoe": lambda: raymoe_tpot(moe, tokens),
                },
                rounds,
            )
    bound = active_bytes(checkpoint) / read_bandwidth(CORES)
    note = "a third of the experts in fast memory; the rest on disk (accelerate), in host memory (raymoe)"
    return [
        figure("vs_accelerate_offload", ratios(times["accelerate"], times["raymoe"]), "x", note),
        fractions("offload_accelerate", bound, times["accelerate"]),
        fractions("offload", bound, times["raymoe"]),
    ]


def synthetic(tokens: int, rounds: int) -> list[Figure]:
    """A 1 GB checkpoint in bfloat16: bytes and arithmetic matter."""
    path = synthetic_checkpoint()
    torch.set_num_threads(CORES)
    checkpoint = open_checkpoint(path)
    with open_model(path, "auto", [{"name": "local", "transport": "local"}]) as moe:
        model, best = reference(path, torch.bfloat16, tokens)
        bandwidths: list[float] = []

        def bandwidth() -> float:
            bandwidths.append(read_bandwidth(CORES, rounds=3))
            return bandwidths[-1]

        times = in_turns(
            {
                "bandwidth": bandwidth,
                "transformers": lambda: transformers_tpot(model, tokens),
                "local": lambda: raymoe_tpot(moe, tokens),
            },
            rounds,
        )
    needed = active_bytes(checkpoint)
    best_rate = max(times["bandwidth"])
    reached = [needed / best_rate / value for value in times["local"]]
    over = [(value - needed / best_rate) / len(checkpoint.layers) * 1e6 for value in times["local"]]
    return [
        figure("bandwidth_fraction", reached, "", f"{needed / 1e6:.0f} MB per token at {best_rate / 1e9:.1f} GB/s"),
        figure("synth_local_vs_transformers", ratios(times["transformers"], times["local"]), "x", f"{best}, bfloat16"),
        figure("synth_layer_overhead_us", over, "us", "per MoE layer, beyond the bandwidth bound"),
        figure("synth_local_tpot_ms", [1e3 * value for value in times["local"]], "ms", "orientation only"),
        fractions("synth_transformers", needed / best_rate, times["transformers"]),
        fractions("synth_local", needed / best_rate, times["local"]),
    ]


def synthetic_checkpoint() -> Path:
    """The 1 GB checkpoint, written on first use and kept in the system's temporary directory."""
    path = Path(tempfile.gettempdir()) / "raymoe-synth-qwen3_moe-1GB-0"
    if not (path / "config.json").exists():
        shutil.rmtree(path, ignore_errors=True)
        command = [sys.executable, "-m", "raymoe.cli", "synth", "--like", "qwen3_moe", "--size", "1GB", "--seed", "0"]
        subprocess.run([*command, str(path)], check=True)
    return path


ENGINE_MEMORY = """
import sys, psutil, ray, raymoe
import raymoe.actors.session
ray.init("local", log_to_driver=False, include_dashboard=False)
def private():
    memory = psutil.Process().memory_info()
    return memory.rss - memory.shared
before = private()
config = {'model': {'path': sys.argv[1]}, 'devices': [{'name': 'a'}, {'name': 'b'}], 'replication': 1}
with raymoe.launch(config) as moe:
    moe.generate(list(range(16)), max_tokens=8, ignore_eos=True)
    print(private() - before)
"""


def engine_memory() -> list[Figure]:
    """How much an engine grows whose experts live in worker processes, beyond its trunk, over the experts' bytes."""
    path = synthetic_checkpoint()
    checkpoint = open_checkpoint(path)
    command = [sys.executable, "-c", ENGINE_MEMORY, str(path)]
    grown = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])
    share = (grown - checkpoint.trunk_bytes) / checkpoint.routed_bytes
    trunk, routed = checkpoint.trunk_bytes / 1e6, checkpoint.routed_bytes / 1e6
    note = f"grew by {grown / 1e6:.0f} MB for a trunk of {trunk:.0f} MB; the experts are {routed:.0f} MB"
    return [figure("engine_memory_over_experts", [share], "", note)]


def main() -> None:
    """Run everything and report."""
    options = arguments(__doc__ or "")
    tokens, rounds = (48, 5) if options.quick else (128, 9)
    figures = embedded(tokens, rounds) + against_disk_offload(tokens // 2, 3) + synthetic(tokens, rounds)
    figures += engine_memory()
    settings = {"tokens": tokens, "rounds": rounds, "cores": CORES, "quick": options.quick}
    settings["free_memory_bytes"] = psutil.virtual_memory().available
    report("decode", figures, settings, options.json)


if __name__ == "__main__":
    main()
