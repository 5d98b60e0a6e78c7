"""What those who look on are shown: where experts are, their use, prefetches, the last steps, `raymoe top`."""

import asyncio
import base64
import pickle
import subprocess
import sys
import threading
from typing import Any

import httpx
import numpy as np
import pytest
from rich.console import Console
from typer.testing import CliRunner

from raymoe import cli
from raymoe.actors.observing import as_json
from raymoe.config import EMBEDDED_MODEL
from raymoe.errors import EngineStoppedError, StartError
from raymoe.experts.report import Place, ResidencyMap
from raymoe.experts.usage import Usage, as_heat
from raymoe.observe.timeline import MOST_SPANS, steps_to_record, timeline
from raymoe.observe.top import Look, rate, share, table_of
from raymoe.observe.trace import Recording, Span
from raymoe.serve.api import Api, create_app
from raymoe.serve.shared import Shared
from raymoe.top_command import looks_at
from raymoe.types import DeviceName, StepId
from tests.browser.scene import Scene, serving
from tests.conveyors import make, order
from tests.local import local_service
from tests.unit.test_shelf import expect, make_shelf, run_step

STEP = StepId(sequence=1, position=5)


def test_reading_a_worker_s_answer_loads_no_libraries() -> None:
    seen = ResidencyMap(layers=1, experts=1, place=b"1", use=b"0", use_max=0.0, score=b"0", score_max=0.0)
    code = (
        "import pickle, sys; assert pickle.load(sys.stdin.buffer).layers == 1; "
        "sys.exit(len({'torch', 'numpy', 'transformers'} & set(sys.modules)))"
    )
    subprocess.run([sys.executable, "-c", code], input=pickle.dumps(seen), check=True)


# --- use and residency ----------------------------------------------------------------------------------


def test_uses_fade_with_time_and_not_with_looks() -> None:
    often, seldom = Usage(1, 4), Usage(1, 4)
    for usage in (often, seldom):
        usage.note(0, np.array([1, 1, 2], dtype=np.int32))
    for at_s in (0.0, 2.0, 5.0, 10.0):
        often.recent(at_s)
    seldom.recent(0.0)
    assert often.recent(10.0) == pytest.approx(seldom.recent(10.0))
    assert seldom.recent(10.0)[0] == pytest.approx([0.0, 2 / np.e, 1 / np.e, 0.0])


def test_heat_is_a_byte_and_says_what_its_highest_stands_for() -> None:
    heat, most = as_heat(np.array([[0.0, 0.5], [2.0, 1.0]]))
    assert (list(heat), most) == ([0, 64, 255, 128], 2.0)
    assert as_heat(np.zeros((2, 2))) == (bytes(4), 0.0)


def test_a_worker_tells_where_every_expert_is() -> None:
    with local_service(EMBEDDED_MODEL, slot_memory=8 << 20) as service:
        service.generate([1, 2, 3], max_tokens=3, temperature=0.0, ignore_eos=True)
        worker: Any = service.experts.dispatcher._local[DeviceName("cpu-0")]
        seen, report = worker.residency(), worker.report()
        place = np.frombuffer(seen.place, dtype=np.uint8).reshape(seen.layers, seen.experts)
        here = {(int(layer), int(expert)) for layer, expert in np.argwhere(place >= Place.LOADING)}
        assert here == set(report.resident) and len(here) == report.resident_count
        assert (place != Place.ELSEWHERE).all(), "it owns them all"
        assert seen.use_max > 0 and len(seen.use) == len(seen.score) == place.size
        assert worker.report(names=False).resident == ()
        as_text = as_json(seen)
        assert base64.b64decode(as_text["state"]) == seen.place and as_text["use_max"] == seen.use_max


# --- prefetches -----------------------------------------------------------------------------------------


def test_a_prefetch_that_a_call_asks_for_was_used_even_on_its_way() -> None:
    shelf, loader = make_shelf(slots=4)
    expect(shelf, {3: 0.5})
    run_step(shelf, [3])
    run_step(shelf, [3])
    assert loader.started[0][0] == 3
    assert (shelf.counters.prefetches_used, shelf.counters.prefetches_wasted) == (1, 0)


def test_a_prefetch_that_leaves_unasked_was_wasted() -> None:
    shelf, loader = make_shelf(slots=2)
    expect(shelf, {3: 0.5})
    loader.tickets[3].finish()
    run_step(shelf, [1])
    run_step(shelf, [1, 2])
    assert 3 not in shelf.resident()
    assert (shelf.counters.prefetches_used, shelf.counters.prefetches_wasted) == (0, 1)


def test_orders_of_a_conveyor_are_counted_as_used_when_their_call_comes() -> None:
    conveyor, loader = make(slots=2)
    order(conveyor, [1], position=5)
    assert conveyor.counters.prefetches == 1
    loader.tickets[1].finish()
    conveyor.begin_step(0, np.array([1], dtype=np.int32), 1, None, STEP)
    conveyor.end_step()
    assert (conveyor.counters.prefetches_used, conveyor.counters.prefetches_wasted) == (1, 0)
    assert conveyor.counters.link_busy_s > 0


def test_pairs_that_gave_way_are_counted_at_their_devices() -> None:
    with local_service(EMBEDDED_MODEL, slot_memory=8 << 20, policy="importance", alpha=0.5) as service:
        service.generate([1, 2, 3], max_tokens=24, temperature=0.0, ignore_eos=True)
        assert service.substituted == {"cpu-0": service.report().routing.substituted}
        assert service.substituted["cpu-0"] > 0


# --- the last steps -------------------------------------------------------------------------------------


def span(lane: Any, kind: str, start_s: float, end_s: float, step: StepId | None = None, **facts: Any) -> Span:
    return Span(lane=lane, kind=kind, start_s=start_s, end_s=end_s, layer=2, experts=(7,), step=step, facts=facts)


def recording(role: str, *spans: Span, offset_s: float = 0.0) -> Recording:
    return Recording(role=role, emulated_link=False, spans=spans, offset_s=offset_s, dropped=0, pid=1)


def test_a_timeline_is_the_main_process_s_time_and_cuts_what_lies_outside() -> None:
    main = recording("main", span("compute", "trunk", 1.0, 2.0, STEP), span("wait", "experts", 2.0, 4.0, STEP))
    load = span("link", "load", 1.0, 2.5, order="ordered", outcome="loaded", bytes=8)
    worker = recording("worker a", load, span("link", "load", 9.0, 9.5), offset_s=-0.5)
    told = timeline([main, worker], 77.0)
    assert told is not None
    assert (told["recorded_s"], told["duration_s"], told["steps"]) == (77.0, 3.0, 1)
    assert told["processes"][0]["spans"][0] == ["compute", "trunk", 0.0, 1.0, 2, [7], ""]
    assert told["processes"][1]["spans"] == [["link", "load", 0.0, 1.0, 2, [7], "ordered, loaded"]]
    assert timeline([recording("main")], 0.0) is None


def test_a_timeline_stays_small_however_deep_the_model() -> None:
    many = [span("compute", "trunk", float(at), at + 1.0, STEP) for at in range(2 * MOST_SPANS)]
    told = timeline([recording("main", *many)], 0.0)
    assert told is not None and len(told["processes"][0]["spans"]) == MOST_SPANS
    assert [steps_to_record(layers) for layers in (1, 8, 48, 94, 400)] == [4, 4, 3, 1, 1]


def test_looking_at_a_few_steps_changes_no_token_and_leaves_nothing_behind() -> None:
    with local_service(EMBEDDED_MODEL, slot_memory=8 << 20, policy="importance") as service:
        options: dict[str, Any] = {"max_tokens": 24, "temperature": 0.0, "ignore_eos": True, "quality": "exact"}
        unseen = service.generate([1, 2, 3], **options)
        assert service.live.record(2, timeout_s=0.01) is None, "nothing runs"
        found = []
        looking = threading.Thread(target=lambda: found.append(service.live.record(2, timeout_s=30.0)))
        looking.start()
        seen = service.generate([1, 2, 3], **options)
        looking.join(timeout=60)
        assert seen.token_ids == unseen.token_ids
        assert found[0] is not None
        assert len({one.step for one in found[0].spans if one.step is not None}) == 2
        assert {one.kind for one in found[0].spans} >= {"trunk", "experts", "head"}
        assert service._engine.experts is service.experts


def test_rows_of_one_step_stay_together_while_somebody_looks() -> None:
    with local_service(EMBEDDED_MODEL, policy="all_resident") as service:
        options: dict[str, Any] = {"max_tokens": 40, "temperature": 0.0, "ignore_eos": True}
        alone = [service.generate(prompt, **options).token_ids for prompt in ([1, 2, 3], [9, 8])]
        service.meter.take()
        found: list[Recording | None] = []
        answers: dict[int, Any] = {}

        def ask(index: int, prompt: list[int]) -> None:
            answers[index] = service.generate(prompt, **options).token_ids

        threads = [
            threading.Thread(target=ask, args=(index, prompt)) for index, prompt in enumerate(([1, 2, 3], [9, 8]))
        ]
        threads.append(threading.Thread(target=lambda: found.append(service.live.record(3, timeout_s=30.0))))
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=60)
        assert [answers[0], answers[1]] == alone
        assert found[0] is not None
        taken = service.meter.take()
        assert 2 in taken.rows and len(taken.ttft_s) == len(taken.queue_s) == len(taken.tpot_s) == 2


# --- answers that are shared ----------------------------------------------------------------------------


def test_many_askers_are_one_question_and_errors_are_not_kept() -> None:
    asked = 0
    now_s = 0.0

    async def ask() -> int:
        nonlocal asked
        asked += 1
        await asyncio.sleep(0)
        if asked == 1:
            raise EngineStoppedError("not yet")
        return asked

    async def scenario() -> None:
        nonlocal now_s
        shared = Shared(ask, 1.0, clock=lambda: now_s)
        both = await asyncio.gather(shared.get(), shared.get(), return_exceptions=True)
        assert all(isinstance(one, EngineStoppedError) for one in both) and asked == 1
        assert await asyncio.gather(shared.get(), shared.get(), shared.get()) == [2, 2, 2]
        now_s = 0.9
        assert await shared.get() == 2
        now_s = 1.1
        assert await shared.get() == 3
        shared.forget()
        assert await shared.get() == 4

    asyncio.run(scenario())


def test_an_asker_who_leaves_takes_the_answer_from_nobody() -> None:
    async def scenario() -> None:
        gate = asyncio.Event()

        async def ask() -> str:
            await gate.wait()
            return "answer"

        shared = Shared(ask, 1.0)
        leaver, stayer = asyncio.ensure_future(shared.get()), asyncio.ensure_future(shared.get())
        await asyncio.sleep(0)
        leaver.cancel()
        gate.set()
        assert await stayer == "answer"

    asyncio.run(scenario())


def test_routes_tell_maps_timeline_and_metrics_or_why_not() -> None:
    scene = Scene()

    async def gather() -> bytes:
        return b"raymoe_nodes_unreachable 0\n"

    async def requests() -> list[httpx.Response]:
        app = create_app(Api(scene, "tiny-moe"), gather=gather)  # type: ignore[arg-type]
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            paths = ("/v1/stats/residency", "/v1/stats/timeline", "/metrics", "/", "/page/main.js", "/page/none.js")
            return [await client.get(path) for path in paths]

    residency, steps, metrics, page, script, none = asyncio.run(requests())
    assert set(residency.json()["devices"]) == {"edge-0", "edge-1"}
    assert len(base64.b64decode(residency.json()["devices"]["edge-0"]["state"])) == 8 * 32
    assert steps.json()["steps"] == 3
    assert metrics.headers["content-type"].startswith("text/plain") and b"unreachable" in metrics.content
    assert "<title>raymoe</title>" in page.text and script.headers["content-type"].startswith("text/javascript")
    assert none.status_code == 404 and none.json()["error"]["code"] == "not_found"
    scene.is_broken = True
    assert asyncio.run(requests())[0].status_code == 400


# --- raymoe top -----------------------------------------------------------------------------------------


def shown(*args: Any) -> str:
    console = Console(width=200, record=True)
    console.print(table_of(*args))
    return console.export_text()


def test_top_shows_rates_between_two_looks() -> None:
    scene = Scene()
    first = Look(stats=asyncio.run(scene.stats()).as_dict(), at_s=10.0)
    second = Look(stats=asyncio.run(scene.stats()).as_dict(), at_s=12.0)
    text = shown(second, first)
    assert "46.0 tokens/s" in text and "edge-0" in text and "healthy" in text
    assert rate({"loads": 30}, {"loads": 10}, "loads", 4.0) == 5.0
    assert rate({"loads": 3}, {"loads": 10}, "loads", 4.0) is None, "it was restarted"
    assert share({"hits": 9, "misses": 1}, {"hits": 6, "misses": 0}, "hits", ("hits", "misses")) == "75.0%"
    assert share({"hits": 0, "misses": 0}, None, "hits", ("hits", "misses")) == "-"


def test_top_looks_once_at_a_server() -> None:
    with serving(Scene(devices=3)) as url:
        result = CliRunner().invoke(cli.app, ["top", "--url", url, "--once"], env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    assert "play: policy importance" in result.output and "down" in result.output and "edge-2" in result.output


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--url", "localhost:8000"], "must begin with http"),
        (["--url", "http://127.0.0.1:9", "--name", "a"], "either --url or --name"),
    ],
)
def test_top_says_what_is_wrong(args: list[str], words: str) -> None:
    result = CliRunner().invoke(cli.app, ["top", "--once", *args])
    assert result.exit_code == 2 and words in result.output


def test_top_names_a_server_that_does_not_answer() -> None:
    with pytest.raises(StartError, match=r"no stats from http://127\.0\.0\.1:9/v1/stats"):
        looks_at("http://127.0.0.1:9/v1", "key")()
