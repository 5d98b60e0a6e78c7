"""``python -m benchmarks.turns``: what the host does while a GPU waits for it, with device and link played.

Emulated throughout: no figure of this is hardware's. Decisions, loads and books are those of a captured step over a
model with the layers and experts of Qwen3-30B-A3B; its experts are tiny, and a link of PCIe 5's rate is imitated as if
they were not. So it shows what a change of the host's part is worth where no GPU is at hand. It wants two cores to
itself.
"""

import argparse
import json
import statistics
import sys
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any, cast

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from benchmarks.device.decode import LRU, NAME, SHADOW, Policy, TimedTurns, by_importance, foretell, scheduler_over
from benchmarks.device.emulated import EmulatedStream
from benchmarks.device.played import PlayedDevice, share
from benchmarks.device.routing import chosen, embedded_logits, foretold, held_out, typical
from benchmarks.device.synthetic import QWEN3, GivenRouting, RandomExperts, keys_of, make_trunk, moe_layers
from benchmarks.gpu import SHADOW_RECALL
from benchmarks.harness import machine
from benchmarks.scheduling.setup import DOMAINS, EVAL
from raymoe.checkpoint.architectures import experts_modules
from raymoe.checkpoint.opening import open_checkpoint
from raymoe.config import EMBEDDED_MODEL
from raymoe.engine.dialogue import Dialogue, Words
from raymoe.engine.service import load_tokenizer
from raymoe.experts.arena import HostArena
from raymoe.experts.cuda_loader import PIECE_BYTES, CudaLoader
from raymoe.experts.host_store import HostStore
from raymoe.experts.worker import ExpertWorker
from raymoe.whole_file import write_whole

LINK_BYTES_PER_S, LATENCY_S = 54.6e9, 2.6e-6  # as measured on an H100's host: docs/benchmarks.md
LAYER_S, HEAD_S = 71e-6, 250e-6  # likewise, of Qwen3-30B-A3B
EXPERT_BYTES = 2 * QWEN3.expert_elements  # as they would be
TINY = replace(QWEN3, hidden=32, inner=16, heads=2, kv_heads=1, head_dim=16, vocabulary=64)
SHARES = (1 / 8, 1 / 4, 1 / 2)
POLICIES = (LRU, by_importance(0.25, "none", False), by_importance(0.5, "none", False), SHADOW)
WARM_UP, STEPS, ROUNDS = 30, 30, 3
CPU = torch.device("cpu")


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """Means over the steps of one round.

    Attributes:
        step_s: of a step; waited_s: of it, for which the device waited; link_s: what its loads take on the link alone.
    """

    step_s: float
    waited_s: float
    link_s: float
    loads: float
    hit_rate: float

    @property
    def of_chain(self) -> float:
        """Computing and loading one after the other, over the step."""
        return (self.link_s + TINY.layers * LAYER_S + HEAD_S) / self.step_s


def main() -> int:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="write what was found here")
    parser.add_argument("--quick", action="store_true", help="a quarter of the slots, one round")
    options = parser.parse_args()
    torch.set_num_threads(1)
    shares, rounds = ((1 / 4,), 1) if options.quick else (SHARES, ROUNDS)
    bench = HostBench()
    found: dict[tuple[float, str], list[Found]] = {}
    for _ in range(rounds):
        for part in shares:
            for policy in POLICIES:
                found.setdefault((part, policy.name), []).append(bench.run(policy, part))
    report(found, Console(width=120))
    if options.json is not None:
        rows = [
            {"slots": part, "policy": name, "rounds": list(map(asdict, runs))} for (part, name), runs in found.items()
        ]
        everything = {"machine": machine(), "emulated": True, "rows": rows}
        write_whole(options.json, json.dumps(everything, indent=2) + "\n")
    return 0


def report(found: dict[tuple[float, str], list[Found]], console: Console) -> None:
    """A table: the median round of each, and the range."""
    table = Table(title="captured steps, device and link emulated")
    columns = ("slots", "policy", "ms", "range", "to LRU", "of chain", "waits, ms", "link, ms", "loads", "hits")
    for column in columns:
        table.add_column(column, justify="left" if column == "policy" else "right")
    for (part, name), runs in found.items():
        median = sorted(runs, key=lambda run: run.step_s)[len(runs) // 2]
        lru_s = statistics.median(run.step_s for run in found[part, LRU.name])
        table.add_row(
            f"{part:.3g}",
            name,
            f"{1e3 * median.step_s:.1f}",
            f"{1e3 * min(run.step_s for run in runs):.1f}-{1e3 * max(run.step_s for run in runs):.1f}",
            f"{median.step_s / lru_s - 1:+.0%}",
            f"{median.of_chain:.0%}",
            f"{1e3 * median.waited_s:.1f}",
            f"{1e3 * median.link_s:.1f}",
            f"{median.loads:.0f}",
            f"{median.hit_rate:.3f}",
        )
    console.print(table)


class PlayedTurns(TimedTurns):
    """Turns of a step that nobody has captured."""

    def hears(self, known: int) -> None:
        """The device tells so many logits of each layer."""
        for talk in self._talks:
            talk.words = Words(TINY.top_k, known)

    @property
    def talks(self) -> list[Dialogue]:
        """Of the layers."""
        return self._talks

    @property
    def turn(self) -> int:
        """Of the step that has begun."""
        return self._turn


class HostBench:
    """One tiny model, and the routing of its steps."""

    def __init__(self) -> None:
        model, kernels = make_trunk(TINY, torch.float32, CPU), cast(Any, None)  # nothing is computed
        self._given = GivenRouting(model, TINY, kernels)
        read = RandomExperts(TINY, torch.float32, CPU)
        self._store = HostStore(read, HostArena(Unpinned()))
        self._read = read
        self._keys = keys_of(TINY)
        with torch.device("meta"):
            one = TINY.model_class(TINY.config(layers=1))
        self._modules = [experts_modules(one)[0][1]] * TINY.layers
        tokenizer = load_tokenizer(open_checkpoint(str(EMBEDDED_MODEL), "float32"))
        streams = embedded_logits(held_out(EVAL, DOMAINS, tokenizer, 640), CPU)
        steps = WARM_UP + STEPS + 1
        self._logits_NLE = typical(streams, TINY.layers, TINY.experts, steps, seed=0)
        self._shadow_NLE = foretold(self._logits_NLE, TINY.top_k, SHADOW_RECALL, seed=2)

    def run(self, policy: Policy, part: float) -> Found:
        """One round of a policy with slots for this part of all experts."""
        tiny_bytes = 4 * TINY.expert_elements
        worker = ExpertWorker(
            name=NAME,
            layers=moe_layers(TINY),
            modules=self._modules,
            read_expert=self._read,
            dtype=torch.float32,
            device=CPU,
            slot_budget_bytes=int(len(self._keys) * part) * tiny_bytes,
            new_loader=partial(new_loader, EXPERT_BYTES / tiny_bytes),
            scheduling=policy.scheduling,
            store=self._store,
        )
        worker.own(self._keys)
        try:
            return self._timed(policy, worker)
        finally:
            worker.close()

    def _timed(self, policy: Policy, worker: ExpertWorker) -> Found:
        scheduler = scheduler_over(worker, policy, TINY, EXPERT_BYTES, self._given)
        staging = worker.staging()
        assert staging is not None, "it has slots that cache"
        turns = PlayedTurns(
            self._given,
            policy.foreseen,
            scheduler,
            staging,
            cast(Any, None),
            modules=self._modules,
            top_k=[TINY.top_k] * TINY.layers,
            share=share,
        )
        known = TINY.experts if policy.scheduling.policy == "importance" else 0
        turns.hears(known)
        device = PlayedDevice(turns.talks, LAYER_S, HEAD_S)
        turns.open()
        step_s, waited_s = [], []
        for number in range(WARM_UP + STEPS):
            if number == WARM_UP:
                scheduler.take_cost()
            if policy.foreseen == "shadow":
                ahead_ME = self._shadow_NLE[number : number + 2].reshape(-1, TINY.experts)
                turns.foretold = foretell(ahead_ME, TINY.top_k)
            data = told(self._logits_NLE[number], known)
            start = perf_counter()
            turns.begin()
            device.run(turns.turn, data)
            turns.serve(device.is_done)
            if number >= WARM_UP:
                step_s.append(perf_counter() - start)
                waited_s.append(float(device.waited_s.sum()))
        device.close()
        cost = scheduler.take_cost()
        return Found(
            step_s=statistics.mean(step_s),
            waited_s=statistics.mean(waited_s),
            link_s=cost.loads / STEPS * (LATENCY_S + EXPERT_BYTES / LINK_BYTES_PER_S),
            loads=cost.loads / STEPS,
            hit_rate=cost.hit_rate,
        )


def told(logits_LE: np.ndarray, known: int) -> list[np.ndarray]:
    """What each layer's router says: experts, weights, and as many logits as are asked for."""
    experts_LK = chosen(logits_LE, TINY.top_k)
    scores_LE = np.exp(logits_LE - logits_LE.max(axis=1, keepdims=True))
    weights_LK = np.take_along_axis(scores_LE, experts_LK, axis=1)
    weights_LK /= weights_LK.sum(axis=1, keepdims=True)
    rows = zip(experts_LK, weights_LK, logits_LE, strict=True)
    return [np.concatenate([experts, weights, logits[:known]]).astype(np.float32) for experts, weights, logits in rows]


class Unpinned:
    """``Pinning`` of memory that no device will read."""

    def pin(self, address: int, nbytes: int) -> bool:
        """As if."""
        return True

    def unpin(self, address: int) -> None:
        """Nothing."""


def new_loader(size: float) -> CudaLoader:
    """A GPU's over an imitated link; ``size``: how many times as large experts count as they are."""
    stream = EmulatedStream(LINK_BYTES_PER_S / size, LATENCY_S, lambda target, nbytes: None)
    return CudaLoader(stream, piece_bytes=max(1, int(PIECE_BYTES / size)))


if __name__ == "__main__":
    sys.exit(main())
