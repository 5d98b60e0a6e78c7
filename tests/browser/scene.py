"""A server whose engine is a play: the real routes and the real page, over a cluster that is made up. No Ray, no model.

The clock of the play is the number of looks that were taken, so every run shows the same.
"""

import asyncio
import base64
import socket
import threading
from collections.abc import AsyncGenerator, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse

from raymoe.engine.request import Chunk, Usage
from raymoe.errors import RequestError
from raymoe.observe.stats import ClusterStats, DeviceStats, EngineStats, SettingsStats
from raymoe.serve.api import Api, create_app
from raymoe.serve.batch import Batch
from raymoe.types import Routing

TEXT = (
    "a single man in possession of a good fortune, must be in want of a wife. However little known the feelings or "
    "views of such a man may be on his first entering a neighbourhood, this truth is so well fixed in the minds of "
    "the surrounding families, that he is considered the rightful property of some one or other of their daughters."
)
DEVICE = DeviceStats(
    name="edge-0", kind="cuda:0", transport="zmq", state="healthy", node="n", pid=4242, emulated_link=True,
    slot_budget_bytes=96 << 20, peak_slot_bytes=96 << 20, host_bytes=512 << 20, owned=0, resident=0,
    resident_experts=(), calls=0, hits=0, misses=0, hosted=0, loads=0, bytes_loaded=0, evictions=0, prefetches=0,
    prefetches_refused=3, prefetches_late=4, slot_count=0, heartbeat_age_s=0.2,
)  # fmt: skip
ENGINE = EngineStats(
    model="tiny-moe", architecture="qwen3_moe", dtype="bfloat16", running=2, waiting=1, finished=12, failed=0,
    prompt_tokens=300, completion_tokens=0, kv_bytes=3 << 20, kv_budget_bytes=64 << 20, hits=0, misses=0, hosted=0,
    substituted=0, substituted_gate_mass=0.012, loads=0, bytes_loaded=0, alpha=0.25, decode_s=0.0, steps=0, recall=0.94,
)  # fmt: skip


class Scene:
    """A made-up cluster.

    Attributes:
        settings: changed by the admin route, and shown by the stats.
        is_broken: every question ends with a server error.
        asked: bodies of what was posted.
    """

    def __init__(self, layers: int = 8, experts: int = 32, devices: int = 2, slots: float = 0.3) -> None:
        self.layers, self.experts = layers, experts
        self.names = [f"edge-{index}" for index in range(devices)]
        self.settings = SettingsStats(policy="importance", substitutes=True, alpha=0.25, alpha_max=0.5)
        self.is_broken = False
        self.asked: list[dict[str, Any]] = []
        self._random = np.random.default_rng(7)
        self._looks = 0
        self._slots = slots
        self._owner_LE = self._random.integers(devices, size=(layers, experts))
        self._heat_LE = self._random.gamma(0.6, 1.0, size=(layers, experts))

    # --- what the engine would say ------------------------------------------------------------------------

    async def stats(self) -> ClusterStats:
        self._check()
        self._looks += 1
        looks = self._looks
        wave = 1.0 + 0.18 * np.sin(looks / 4) + 0.08 * self._random.random()
        steps = 46 * looks
        pairs = steps * self.layers * 4
        hits = int(pairs * (0.83 + 0.03 * np.sin(looks / 9)))
        engine = replace(
            ENGINE, steps=steps, completion_tokens=steps * 2, decode_s=0.0098 * steps * (1 + 0.02 * wave), hits=hits,
            misses=pairs - hits, substituted=int(pairs * 0.061), loads=6 * steps, bytes_loaded=6 * steps * 98304,
            alpha=self.settings.alpha,
        )  # fmt: skip
        devices = {name: self._device(index, name, steps) for index, name in enumerate(self.names)}
        return ClusterStats(
            app="play", devices=devices, engine=engine, policy=self.settings.policy, settings=self.settings
        )

    def _device(self, index: int, name: str, steps: int) -> DeviceStats:
        owned = int((self._owner_LE == index).sum())
        state = "down" if index == 2 else "healthy"
        used = int(1.7 * steps)
        return replace(
            DEVICE, name=name, state=state, owned=owned, resident=int(owned * self._slots),
            slot_count=int(owned * self._slots), hits=17 * steps, misses=3 * steps + index * steps, loads=3 * steps,
            bytes_loaded=3 * steps * 98304, link_busy_s=steps * 0.011 * (1 - 0.3 * index), prefetches=2 * steps,
            prefetches_used=used, prefetches_wasted=2 * steps - used, substituted=int(0.4 * steps),
            heartbeat_age_s=None if index == 3 else 0.2,
        )  # fmt: skip

    async def residency(self) -> dict[str, Any]:
        self._check()
        self._heat_LE *= 0.9
        self._heat_LE += self._random.gamma(0.3, 0.35, size=self._heat_LE.shape)
        score = np.sqrt(self._heat_LE)
        cut = np.quantile(self._heat_LE, 1 - self._slots)
        devices = {}
        for index, name in enumerate(self.names):
            mine = self._owner_LE == index
            place = np.where(mine, np.where(self._heat_LE > cut, 3, 1), 0).astype(np.uint8)
            place[mine & (self._random.random(mine.shape) < 0.004)] = 2
            devices[name] = {
                "state": encoded(place),
                "use": encoded(self._heat_LE * mine * (255 / self._heat_LE.max())),
                "use_max": float(self._heat_LE.max() * 12),
                "score": encoded(score * mine * (255 / score.max())),
                "score_max": float(score.max() / 8),
            }
        return {"layers": self.layers, "experts": self.experts, "devices": devices}

    async def timeline(self) -> dict[str, Any]:
        self._check()
        main, workers = [], {name: [] for name in self.names[:2]}
        now, layers = 0.0, min(self.layers, 8)
        for _ in range(3):
            for layer in range(layers):
                trunk = 0.0006 + 0.0002 * self._random.random()
                main.append(["compute", "trunk", now, now + trunk, layer, [], ""])
                now += trunk
                longest = 0.0004
                for spans in workers.values():
                    load = 0.0009 * float(self._random.random() > 0.7)
                    begin = now + 0.00008
                    if load:
                        note = "ordered, loaded" if self._random.random() > 0.4 else "on demand, loaded"
                        spans.append(["link", "load", begin - 0.0003, begin + load, layer, [int(7 * load * 1e4)], note])
                        spans.append(["wait", "wait for load", begin, begin + load, layer, [3], ""])
                    work = 0.00025 + 0.0001 * self._random.random()
                    spans.append(["compute", "compute", begin + load, begin + load + work, layer, [3, 9], "hit"])
                    longest = max(longest, load + work + 0.00016, 0.0004)
                main.append(["wait", "experts", now, now + longest, layer, [3, 9, 11, 30], ""])
                now += longest
            main.append(["compute", "head", now, now + 0.0011, None, [], ""])
            main.append(["compute", "sample", now + 0.0011, now + 0.0014, None, [], ""])
            now += 0.0014
        processes = [{"role": "main", "emulated_link": False, "spans": main}]
        for name, spans in workers.items():
            processes.append({"role": f"worker {name}", "emulated_link": True, "spans": spans})
        return {"recorded_s": float(self._looks), "duration_s": now, "steps": 3, "processes": processes}

    async def stream(self, prompt: Any, params: Any) -> AsyncGenerator[Batch]:
        self._check()
        self.asked.append({"prompt": prompt, "params": params})
        words = TEXT.split()[: params.max_tokens or 16]
        yield Batch()
        for place, word in enumerate(words):
            await asyncio.sleep(0.004)
            if place < len(words) - 1:
                yield Batch(chunks=(Chunk(text=f" {word}", token_ids=(place,)),))
        usage = Usage(prompt_tokens=9, completion_tokens=len(words))
        routing = Routing(
            hits=820, misses=96, loads=61, bytes_loaded=61 * 98304, decisions=300, substituted=44, replaced_mass=3.1
        )
        last = Chunk(text=f" {words[-1]}", token_ids=(0,), finish_reason="length", usage=usage, routing=routing)
        yield Batch(chunks=(last,))

    async def card(self) -> dict[str, Any]:
        self._check()
        return {"name": "tiny-moe"}

    def _check(self) -> None:
        if self.is_broken:
            raise RequestError("the play is over")

    def app(self) -> FastAPI:
        """The real application, and a stand-in for the admin route."""
        app = create_app(Api(self, "tiny-moe"))  # type: ignore[arg-type]

        async def change(request: Request) -> JSONResponse:
            body = await request.json()
            self.asked.append(body)
            if request.headers.get("authorization") != "Bearer secret":
                error = {
                    "message": "this needs an API key",
                    "type": "authentication_error",
                    "param": None,
                    "code": None,
                }
                return JSONResponse({"error": error}, 401)
            self.settings = replace(self.settings, **body["scheduling"])
            return JSONResponse({"scheduling": body["scheduling"]})

        app.post("/v1/admin/settings", response_model=None)(change)
        app.router.routes.insert(0, app.router.routes.pop())  # before any other that has the same path
        return app


def encoded(value_LE: np.ndarray) -> str:
    """A byte per cell in base64."""
    return base64.b64encode(value_LE.astype(np.uint8).tobytes()).decode()


@contextmanager
def serving(scene: Scene) -> Iterator[str]:
    """The scene on a free port of this machine; gives its URL."""
    listening = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(scene.app(), log_level="error"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(timeout=10)
        listening.close()
