"""One trunk, many schedulers: every variant has a worker of its own, and takes its turn on the same trunk.

L layers, C slots per layer, B rows decoded in lockstep.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from raymoe.checkpoint.architectures import experts_modules
from raymoe.checkpoint.checkpoint import Checkpoint
from raymoe.checkpoint.opening import open_checkpoint
from raymoe.config import EMBEDDED_MODEL, DeviceConfig, SchedulingConfig
from raymoe.engine.dispatch import Dispatcher
from raymoe.engine.forced import Forced, forced
from raymoe.engine.scheduler import ExpertScheduler
from raymoe.engine.service import forecasts, load_tokenizer
from raymoe.experts.build import make_worker
from raymoe.experts.worker import ExpertWorker
from raymoe.model.emulation_proof import attach_emulation
from raymoe.model.fast import use_native_kernels
from raymoe.model.runner import Runner
from raymoe.model.sites import attach_sites
from raymoe.model.trunk import build_trunk
from raymoe.placement.host_assist import Split, two_ended_walk
from raymoe.placement.similarity import Similarity
from raymoe.types import DeviceName, ExpertKey

EVAL = Path(__file__).parent.parent / "data" / "eval"
DOMAINS = ("austen", "kjv", "pydocs", "pysrc", "wordnet")


@dataclass(frozen=True, slots=True, kw_only=True)
class EmulatedLinkTimes:
    """What an imitated link and host take for one expert, in seconds."""

    load_s: float
    host_s: float


def published_walk(
    scores_N: np.ndarray, load_s: float, host_s: float | None, *, remaining_s: np.ndarray | None = None, **_: object
) -> Split:
    """The published two-ended walk, with the arguments of the exact split: what is in flight is waited for."""
    new = np.arange(len(scores_N)) if remaining_s is None else np.flatnonzero(np.isnan(remaining_s))
    split = two_ended_walk(scores_N[new], load_s, host_s)
    return Split(tuple(new[list(split.load)].tolist()), tuple(new[list(split.host)].tolist()), split.finish_s)


@dataclass(slots=True)
class Variant:
    """One way to schedule, with slots of its own."""

    scheduler: ExpertScheduler
    worker: ExpertWorker
    alpha: float


class Bench:
    """The embedded model in float32 with its held-out text. Not thread safe: variants take turns."""

    def __init__(self) -> None:
        self.checkpoint: Checkpoint = open_checkpoint(str(EMBEDDED_MODEL), "float32")
        self.layers = len(self.checkpoint.layers)
        self.experts = self.checkpoint.layers[0].num_experts
        self.top_k = self.checkpoint.layers[0].top_k
        self.expert_bytes = self.checkpoint.layers[0].expert_bytes(torch.float32)
        self._keys = [
            ExpertKey(layer=layer, expert=expert) for layer in range(self.layers) for expert in range(self.experts)
        ]
        first = self._scheduler(self._worker(None, None, SchedulingConfig()), SchedulingConfig())
        self.model = build_trunk(self.checkpoint, first, torch.device("cpu"))
        native = use_native_kernels(self.model) > 0
        sites = attach_sites(self.model)
        self.routers = [site.router for site in sites]
        self.sites = sites
        self._emulation = attach_emulation(self.model, sites)
        self.runner = Runner(self.model, single_threaded_decode=native)
        self._experts_modules = [module for _, module in experts_modules(self.model)]
        self._tokenizer = load_tokenizer(self.checkpoint)

    def text(self, domain: str, tokens: int, offset: int = 0) -> list[int]:
        """Held-out tokens of a domain."""
        ids: list[int] = self._tokenizer.encode((EVAL / f"{domain}.txt").read_text())
        return ids[offset : offset + tokens]

    @contextmanager
    def variant(
        self,
        scheduling: SchedulingConfig,
        *,
        slots: int | None,
        link: EmulatedLinkTimes | None = None,
        similarity: Similarity | None = None,
        walk: bool = False,
    ) -> Iterator[Variant]:
        """A worker with ``slots`` per layer (None: straight from host memory), and a scheduler before it.

        Args:
            walk: share misses between link and host by the published walk instead of the exact split.
        """
        worker = self._worker(slots, link, scheduling)
        if walk:
            for shelf in worker._shelves:  # no setting: the exact split is never worse
                shelf.split = published_walk
        try:
            scheduler = self._scheduler(worker, scheduling, similarity)
            scheduler.attach(self.routers, forecasts(self.sites, self._emulation, scheduler))
            yield Variant(scheduler, worker, scheduling.alpha_of(None))
        finally:
            worker.close()

    def run(self, variant: Variant, ids_BT: list[list[int]], on_step: Callable[[], None] = lambda: None) -> Forced:
        """Decode text with a variant's experts."""
        for module in self._experts_modules:
            module.raymoe_backend = variant.scheduler
        variant.scheduler.alpha = np.full(len(ids_BT), variant.alpha) if len(ids_BT) > 1 else variant.alpha
        return forced(self.runner, variant.scheduler, ids_BT, on_step=on_step)

    def _worker(self, slots: int | None, link: EmulatedLinkTimes | None, scheduling: SchedulingConfig) -> ExpertWorker:
        imitated = None
        if link is not None:
            imitated = {"bytes_per_s": round(self.expert_bytes / link.load_s), "host_s": link.host_s}
        device = DeviceConfig.model_validate(
            {
                "name": "bench",
                "transport": "local",
                "slot_memory": None if slots is None else slots * self.layers * self.expert_bytes,
                "link": imitated,
            }
        )
        worker = make_worker(self.checkpoint, device, scheduling)
        worker.own(self._keys)
        if scheduling.policy == "all_resident":
            worker.load_all()
        return worker

    def _scheduler(
        self, worker: ExpertWorker, scheduling: SchedulingConfig, similarity: Similarity | None = None
    ) -> ExpertScheduler:
        name = DeviceName("bench")
        dispatcher = Dispatcher(
            self.checkpoint.sizes(),
            dict.fromkeys(self._keys, name),
            local={name: worker},
            remote=None,
            timeout_s=60.0,
        )
        return ExpertScheduler(dispatcher, scheduling, similarity=similarity)
