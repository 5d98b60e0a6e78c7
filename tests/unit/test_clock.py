"""A wall clock that jumps moves time stamps and nothing else: what waits, expires or is measured asks another."""

import ast
import itertools
import time
from pathlib import Path

import pytest

import raymoe
from raymoe.observe.trace import Tracer
from tests.local import local_service
from tests.toy_models import PROMPT, reference_at, save_toy

PACKAGES = [Path(raymoe.__file__).parent, Path(raymoe.__file__).parent.parent / "predictor"]
STAMPS = {  # who may ask for the time of day, and what for
    "raymoe/serve/render.py",  # "created" of an answer
    "raymoe/serve/api.py",  # "created" of the model
    "raymoe/actors/observing.py",  # when a timeline was recorded
    "raymoe/observe/trace.py",  # relates the clocks of processes
}
WALL = {"time": {"time", "time_ns", "localtime", "gmtime", "ctime"}, "datetime": {"datetime", "date", "now", "today"}}


def asks_for_the_time_of_day(file: Path) -> bool:
    """By an attribute such as ``time.time``, or by importing it."""
    nodes = list(ast.walk(ast.parse(file.read_text())))
    used = {
        (node.value.id, node.attr)
        for node in nodes
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)
    }
    imported = {(node.module, alias.name) for node in nodes if isinstance(node, ast.ImportFrom) for alias in node.names}
    return any(name in WALL.get(module or "", ()) for module, name in used | imported)


def test_only_time_stamps_use_the_wall_clock() -> None:
    files = [file for package in PACKAGES for file in package.rglob("*.py")]
    root = PACKAGES[0].parent
    assert {str(file.relative_to(root)) for file in files if asks_for_the_time_of_day(file)} == STAMPS


@pytest.mark.parametrize(
    "text",
    [
        "import time\ntime.time()",
        "from time import time_ns",
        "from datetime import datetime",
        "import time\ntime.sleep(1)",
    ],
)
def test_the_search_finds_what_it_looks_for(tmp_path: Path, text: str) -> None:
    file = tmp_path / "module.py"
    file.write_text(text)
    assert asks_for_the_time_of_day(file) == ("sleep" not in text)


def test_requests_do_not_notice_a_wall_clock_that_jumps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save_toy("qwen3_moe", tmp_path / "m")
    expected = reference_at(path, PROMPT, 8)
    days = itertools.cycle([0.0, 86_400.0, -86_400.0, 3.0, -7.0])
    now_s = time.time()
    monkeypatch.setattr(time, "time", lambda: now_s + next(days))
    with local_service(path, trunk={"max_running": 2}) as service:
        started_s = time.monotonic()
        first = service.stream(PROMPT, max_tokens=8, temperature=0, ignore_eos=True)
        second = service.generate(PROMPT, max_tokens=8, temperature=0, ignore_eos=True)
        assert [token for chunk in first for token in chunk.token_ids] == second.token_ids == expected
        took_s = time.monotonic() - started_s
        report, observed = service.report(), service.meter.take()
    assert 0 <= report.queue_s <= 2 * took_s and 0 < report.decode_s <= took_s
    assert all(0 <= value <= took_s for value in (*observed.ttft_s, *observed.duration_s, *observed.tpot_s))


def test_a_recording_keeps_its_own_time_through_a_jump() -> None:
    clock, wall = itertools.count(100.0, 0.001), itertools.cycle([5e9, 1e9, 9e9])
    tracer = Tracer("main", clock=lambda: next(clock), wall=lambda: next(wall))
    first, second = tracer.now(), tracer.now()
    assert first < second < first + 1
