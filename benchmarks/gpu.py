"""``python -m benchmarks.gpu``: slots over a real link, kernels, and decoding by every policy, on one CUDA GPU.

No Ray. Weights of real shapes are made in memory; routing is uniform (the worst case) or typical (the embedded model's
skew and locality). Quality and exactness are the embedded model's. A part that fails is told and the others go on.
"""

import argparse
import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.device import exact, kernels, link, offload
from benchmarks.device.decode import LRU, POLICIES, RESIDENT, WORST, Bench, Policy, Timed, Trace
from benchmarks.device.emulated import emulated_loader
from benchmarks.device.routing import embedded_logits, foretold, held_out, locality, typical, uniform
from benchmarks.device.synthetic import (
    MIXTRAL,
    QWEN3,
    RandomExperts,
    ReusedMemory,
    Shape,
    keys_of,
    make_trunk,
    store_over,
)
from benchmarks.harness import machine
from benchmarks.scheduling.setup import DOMAINS, EVAL
from raymoe.checkpoint.opening import open_checkpoint
from raymoe.config import EMBEDDED_MODEL
from raymoe.engine.service import load_tokenizer
from raymoe.experts.arena import CudaPinning
from raymoe.experts.host_store import HostStore
from raymoe.kernels.gpu import GpuKernels, load_gpu
from raymoe.kernels.native import load_native
from raymoe.model.captured import GraphRecorder
from raymoe.model.gpu_blocks import use_gpu_kernels
from raymoe.whole_file import write_whole

SHARES = (1 / 8, 1 / 4, 1 / 2)  # of all experts, in slots
GATE_RECALL, SHADOW_RECALL = 0.75, 0.98  # of gates one layer ahead, and of a 4-bit shadow: docs/benchmarks.md
STEPS = (40, 40)  # tokens: to fill the slots, and to measure
FEW_STEPS = (6, 10)  # the same where each takes a quarter of a second
PARTS = ("link", "kernels", "exact", "decode", "offload", "emulated")


class Report:
    """What was found, by part, written after each so that nothing is lost."""

    def __init__(self, path: Path | None, console: Console) -> None:
        self.found: dict[str, Any] = {"machine": machine() | {"gpu": torch.cuda.get_device_name()}}
        self.failed: list[str] = []
        self._path, self._console = path, console
        self._start_s = time.monotonic()

    def part(self, name: str, work: Callable[[], Any]) -> Any:
        """Run one part; its result, or None where it fails."""
        start = time.monotonic()
        try:
            result = work()
        except Exception:  # the others are worth having
            traceback.print_exc()
            self.failed.append(name)
            result = None
        if result is not None:
            self.found[name] = result
        self.keep(name, self.found.get(name))
        now = time.monotonic()
        self._console.print(f"[{name}: {now - start:.1f} s, {now - self._start_s:.0f} s in all]", markup=False)
        return result

    def keep(self, name: str, found: Any) -> None:
        """Write what is known so far."""
        self.found[name] = found
        if self._path is not None:
            write_whole(self._path, json.dumps(self.found, indent=2, default=str) + "\n")


def main() -> int:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="write what was found here")
    parser.add_argument("--part", choices=PARTS, action="append", help="these only")
    parser.add_argument("--model", choices=[QWEN3.name, MIXTRAL.name], help="decode with this one only")
    parser.add_argument("--layers", type=int, help="of the models that are imitated; omitted: as many as memory takes")
    options = parser.parse_args()
    if not torch.cuda.is_available() or (gpu := load_gpu()) is None:
        print("this benchmark needs a CUDA GPU and Triton", file=sys.stderr)
        return 2
    console = Console(width=150)
    wanted = options.part or list(PARTS)
    report = Report(options.json, console)
    run = Run(report, console, gpu, options.layers)
    if "exact" in wanted:
        report.part("exact", run.exact)
    if "kernels" in wanted:
        report.part("kernels", run.kernels)
    if "link" in wanted or "decode" in wanted or "emulated" in wanted:
        report.part("memory", run.memory)
        report.part("link", run.link)
    if "decode" in wanted and options.model != MIXTRAL.name:
        report.part("decode_qwen3", lambda: run.decode(run.qwen3, SHARES, *STEPS))
    if "decode" in wanted and options.model != QWEN3.name:
        report.part("decode_mixtral", lambda: run.decode(run.mixtral, (1 / 4,), *FEW_STEPS))
    if "emulated" in wanted:
        report.part("emulated", run.emulated)
    if "offload" in wanted:
        report.part("offload", run.offload)
    return 1 if report.failed else 0


def shortened(shape: Shape, layers: int | None) -> Shape:
    """With fewer layers where that is asked for."""
    return shape if layers is None else replace(shape, layers=min(layers, shape.layers))


class Run:
    """The parts, and what they share: host memory is pinned once."""

    def __init__(self, report: Report, console: Console, gpu: GpuKernels, layers: int | None) -> None:
        self._report, self._console, self._gpu = report, console, gpu
        self._device = torch.device("cuda:0")
        self.qwen3 = shortened(QWEN3, layers)
        self.mixtral = shortened(MIXTRAL, layers)
        self._arena: ReusedMemory | None = None
        self._store: HostStore | None = None
        self._times: link.LinkTimes | None = None
        self._streams: list[Any] = []

    # --- the embedded model ---------------------------------------------------------------------------------

    def exact(self) -> dict[str, Any]:
        """Tokens in float32, logits in bfloat16, quality by alpha."""
        tokenizer = load_tokenizer(open_checkpoint(str(EMBEDDED_MODEL), "float32"))
        texts = held_out(EVAL, DOMAINS, tokenizer, 192)
        equal = exact.tokens_equal([text[: exact.PROMPT] for text in texts])
        spread = exact.spread(texts[0])
        quality = exact.quality([text[:128] for text in texts], (0.0, 0.25, 0.5))
        for name, words in equal.items():
            self._console.print(f"float32, {name}: {words}")
        table = Table(title="bfloat16: root mean square distance from float32's logits")
        table.add_column("implementation")
        table.add_column("distance", justify="right")
        for name, value in spread.items():
            table.add_row(name, f"{value:.4f}")
        self._console.print(table)
        for alpha, facts in quality.items():
            self._console.print(f"alpha {alpha}: " + ", ".join(f"{k} {v:.4g}" for k, v in facts.items()))
        return {"float32_tokens": equal, "bfloat16_rms": spread, "quality": quality}

    # --- kernels --------------------------------------------------------------------------------------------

    def kernels(self) -> dict[str, Any]:
        """One layer's experts against the bound; where to decide."""
        rate = link.device_rate(self._device)
        found: dict[str, Any] = {"device_bytes_per_s": rate, "deciding_us": kernels.deciding_us(self._device)}
        for shape, slots in ((QWEN3, 512), (MIXTRAL, 8)):
            with torch.device("meta"):
                model = shape.model_class(shape.config(layers=1))
            module = model.model.layers[0].mlp.experts
            bound_us = 1e6 * shape.top_k * shape.expert_elements * 2 / rate
            one = kernels.experts_us(shape, module, self._gpu, slots, self._device)
            rows = kernels.rows_us(shape, module, self._gpu, slots, self._device) if shape is QWEN3 else {}
            found[shape.name] = {"bound_us": bound_us, "one_token_us": one, "rows_us": rows}
            self._console.print(
                f"{shape.name}: a token's experts, bound {bound_us:.1f} us: "
                + ", ".join(f"{name} {value:.1f} ({bound_us / value:.0%})" for name, value in one.items())
            )
            self._console.print("  tokens: " + ", ".join(f"{name} {value:.0f} us" for name, value in rows.items()))
        self._console.print(f"deciding one token's substitution: {found['deciding_us']}")
        return found

    # --- memory and link ------------------------------------------------------------------------------------

    def memory(self) -> dict[str, Any]:
        """Pin host memory and fill it with experts."""
        layer_bytes = self.qwen3.experts * self.qwen3.expert_elements * 2
        start = time.monotonic()
        self._arena = ReusedMemory(CudaPinning(), layer_bytes)
        self._store = HostStore(RandomExperts(self.qwen3, torch.bfloat16, self._device), self._arena)
        self._store.load(keys_of(self.qwen3))
        took_s = time.monotonic() - start
        return {"bytes": self._arena.nbytes, "pinned_bytes": self._arena.pinned_bytes, "seconds": took_s}

    def link(self) -> dict[str, Any]:
        """The link's rates."""
        assert self._arena is not None
        times = self._times = link.measure(self._arena.pieces[0], self.qwen3.expert_elements * 2, self._device)
        table = Table(title="host to device, GB/s")
        for column in ("bytes", "pinned", "pageable"):
            table.add_column(column, justify="right")
        for size, rate in times.pinned.items():
            pageable = times.pageable.get(size)
            table.add_row(f"{size:,}", f"{rate / 1e9:.1f}", f"{pageable / 1e9:.1f}" if pageable else "")
        self._console.print(table)
        self._console.print(
            f"experts in pieces {times.in_pieces / 1e9:.1f}; whole, beside computing {times.beside_compute / 1e9:.1f} "
            f"({times.beside_compute / times.peak:.0%} of the peak); latency {1e6 * times.latency_s:.1f} us; "
            f"device memory {times.device / 1e9:.0f} GB/s"
        )
        return asdict(times) | {"beside_compute_share": times.beside_compute / times.peak}

    # --- decoding -------------------------------------------------------------------------------------------

    def traces(self, shape: Shape, steps: int) -> list[Trace]:
        """Uniform and typical routing, with forecasts of either."""
        logits = [("uniform", uniform(shape.layers, shape.experts, steps, seed=0))]
        logits.insert(0, ("typical", typical(self.streams(), shape.layers, shape.experts, steps, seed=0)))
        return [
            Trace(
                name=name,
                logits_NLE=values,
                gate_NLE=foretold(values, shape.top_k, GATE_RECALL, seed=1),
                shadow_NLE=foretold(values, shape.top_k, SHADOW_RECALL, seed=2),
            )
            for name, values in logits
        ]

    def streams(self) -> list[Any]:
        """The embedded model's router logits over held-out text."""
        if not self._streams:
            tokenizer = load_tokenizer(open_checkpoint(str(EMBEDDED_MODEL), "float32"))
            self._streams = embedded_logits(held_out(EVAL, DOMAINS, tokenizer, 640), self._device)
        return self._streams

    def bench(self, shape: Shape) -> Bench:
        """A trunk for this shape, over the memory that is pinned."""
        assert self._store is not None and self._arena is not None
        store = self._store
        if shape.name != self.qwen3.name:
            held = sum(piece.numel() // (2 * shape.expert_elements) for piece in self._arena.pieces)
            shape = replace(shape, layers=min(shape.layers, held // shape.experts))
            store = store_over(self._arena.pieces, shape, torch.bfloat16, self._arena)
        model = make_trunk(shape, torch.bfloat16, self._device)
        use_gpu_kernels(model, self._gpu)
        return Bench(
            shape=shape,
            model=model,
            store=store,
            kernels=self._gpu,
            new_recorder=lambda: GraphRecorder(self._device),
            native=load_native(len(os.sched_getaffinity(0))),
        )

    def decode(self, shape: Shape, shares: tuple[float, ...], warm_up: int, steps: int) -> dict[str, Any]:
        """Every policy at every share of slots, for both kinds of routing."""
        assert self._times is not None
        bench, times = self.bench(shape), self._times
        shape = bench.shape
        traces = self.traces(shape, warm_up + steps + 1)
        total = shape.layers * shape.experts
        resident = bench.run(RESIDENT, None, traces[0], 5, steps) if fits(bench) else None
        floor_s = bench.active_bytes / times.device
        compute_s = resident.tpot_s if resident is not None else floor_s
        table = Table(title=f"{shape.name}: {shape.layers} of {shape.all_layers} layers, ms per token")
        for column in (
            "routing",
            "slots",
            "policy",
            "ms",
            "tokens/s",
            "hits",
            "loads",
            "hosted",
            "link ms",
            "of bound",
            "host ms",
        ):
            table.add_column(column, justify="left" if column in ("routing", "policy") else "right")
        found: dict[str, Any] = {"active_bytes": bench.active_bytes, "floor_s": floor_s, "runs": []}
        if resident is not None:
            self._console.print(
                " | ".join(add_row(table, "", 1.0, resident, RESIDENT.name, 0.0, floor_s / resident.tpot_s))
            )
            found |= {"resident_s": resident.step_s, "resident_share_of_floor": floor_s / resident.tpot_s}
            found["profile"] = profile(bench, traces[0])
        for trace in traces:
            habits = locality(trace.logits_NLE, shape.top_k)
            self._console.print(f"{trace.name}: chosen again {habits.again:.2f}, mass of the chosen {habits.mass:.2f}")
            for share in shares:
                lru_s = 0.0
                for policy in POLICIES if trace.name == "typical" else WORST:
                    timed = bench.run(policy, int(total * share), trace, warm_up, steps)
                    lru_s = timed.tpot_s if policy is LRU else lru_s
                    link_s = timed.loaded_bytes / times.peak
                    bound = max(link_s, compute_s) / timed.tpot_s
                    row = add_row(table, trace.name, share, timed, policy.name, link_s, bound)
                    self._console.print(" | ".join(row))
                    about = facts(policy, trace, share, timed, link_s, bound)
                    found["runs"].append(about | {"tpot_reduction_vs_lru": 1 - timed.tpot_s / lru_s})
                    self._report.keep(f"decode_{shape.name}", found)
        self._console.print(table)
        return found

    def emulated(self) -> dict[str, Any]:
        """The emulated link, set to what was measured, beside the real one."""
        assert self._times is not None
        times, found = self._times, {}
        for shape, share, (warm_up, steps) in ((self.qwen3, 1 / 4, STEPS), (self.mixtral, 1 / 4, FEW_STEPS)):
            bench = self.bench(shape)
            trace = self.traces(bench.shape, warm_up + steps + 1)[0]
            slots = int(bench.shape.layers * shape.experts * share)
            for policy in POLICIES[:2]:
                elements = shape.expert_elements
                new_loader = partial(emulated_loader, times.peak, times.latency_s, elements, self._device)
                real = bench.run(policy, slots, trace, warm_up, steps)
                imitated = bench.run(policy, slots, trace, warm_up, steps, new_loader)
                ratio = imitated.tpot_s / real.tpot_s
                found[f"{shape.name} {policy.name}"] = {
                    "real_ms": 1e3 * real.tpot_s,
                    "emulated_ms": 1e3 * imitated.tpot_s,
                    "ratio": ratio,
                }
                self._console.print(
                    f"emulated link, {shape.name}, {policy.name}: {1e3 * imitated.tpot_s:.2f} ms, "
                    f"real {1e3 * real.tpot_s:.2f} ms, ratio {ratio:.2f}"
                )
                self._report.keep("emulated", found)
        return found

    def offload(self) -> dict[str, Any]:
        """accelerate beside it."""
        tpot_s = offload.tpot_s(QWEN3, self._device)
        self._console.print(f"accelerate's cpu_offload, {QWEN3.name}: {tpot_s:.2f} s per token")
        return {"tpot_s": tpot_s}


def fits(bench: Bench) -> bool:
    """Whether the device has memory for all experts."""
    free, _ = torch.cuda.mem_get_info()
    return free > len(bench.keys) * bench.expert_bytes + (3 << 30)


def profile(bench: Bench, trace: Trace) -> dict[str, float]:
    """Milliseconds per step by kernel, of decoding with everything resident."""
    steps = 4
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as recorded:
        bench.run(RESIDENT, None, trace, 0, steps)
    events = {event.key: event.self_device_time_total / 1e3 for event in recorded.key_averages()}
    return dict(sorted(events.items(), key=lambda item: -item[1])[:24])


def add_row(
    table: Table, routing: str, share: float, timed: Timed, policy: str, link_s: float, bound: float
) -> tuple[str, ...]:
    """One line, which is returned too."""
    steps = len(timed.step_s)
    row = (
        routing,
        f"{share:.3g}",
        policy,
        f"{1e3 * timed.tpot_s:.2f}",
        f"{1 / timed.tpot_s:.1f}",
        f"{timed.cost.hit_rate:.3f}",
        f"{timed.cost.loads / steps:.0f}",
        f"{timed.cost.hosted / steps:.0f}" + (f" of {1e6 * timed.host_s:.0f} us" if timed.host_s else ""),
        f"{1e3 * link_s:.2f}",
        f"{bound:.0%}",
        f"{1e3 * sum(timed.decide_s) / steps:.2f}",
    )
    table.add_row(*row)
    return row


def facts(policy: Policy, trace: Trace, share: float, timed: Timed, link_s: float, bound: float) -> dict[str, Any]:
    """For JSON."""
    return {
        "policy": policy.name,
        "routing": trace.name,
        "slots": share,
        "slot_bytes": timed.slot_bytes,
        "step_s": timed.step_s,
        "decide_s": sum(timed.decide_s) / len(timed.decide_s),
        "hit_rate": timed.cost.hit_rate,
        "loads": timed.cost.loads / len(timed.step_s),
        "hosted": timed.cost.hosted / len(timed.step_s),
        "host_expert_s": timed.host_s,
        "substituted_gate_mass": timed.cost.substituted_gate_mass,
        "link_s": link_s,
        "share_of_bound": bound,
        "captured": timed.captured,
    }


if __name__ == "__main__":
    sys.exit(main())
