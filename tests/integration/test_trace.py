"""``raymoe trace`` of a cacheless cluster: all processes are in it, on one time scale."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import deployments
from raymoe import cli

pytestmark = pytest.mark.integration

CONFIG = Path(deployments.__file__).parent / "on-demand-shadow.yaml"
DEVICES = [f"edge-{number}" for number in range(4)]
LAYERS, TOP_K, TOKENS = 8, 4, 6

Event = dict[str, Any]


@pytest.fixture(scope="module")
def events(ray_session: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Event]]:
    """What the command wrote."""
    output = tmp_path_factory.mktemp("trace") / "trace.json"
    result = CliRunner().invoke(cli.app, ["trace", str(CONFIG), "-o", str(output), "--tokens", str(TOKENS)])
    assert result.exit_code == 0, result.output
    yield json.loads(output.read_text())["traceEvents"]


def roles(events: list[Event]) -> dict[str, int]:
    """Number of each process."""
    return {event["args"]["name"]: event["pid"] for event in events if event["name"] == "process_name"}


def spans(events: list[Event], role: str, kind: str, *, since: int = 1) -> list[Event]:
    """Of decode steps, or of the prompt too, which is step 0."""
    mine = [event for event in events if event["ph"] == "X" and event["pid"] == roles(events)[role]]
    return [event for event in mine if event["cat"] == kind and event["args"].get("step", 0) >= since]


def workers() -> list[str]:
    return [f"worker {device} (emulated link)" for device in DEVICES]


def experts_of(event: Event) -> list[int]:
    named = event["args"]["expert"]
    return named if isinstance(named, list) else [named]


def test_every_process_is_in_the_trace(events: list[Event]) -> None:
    assert list(roles(events)) == ["main", "shadow", *workers()]


def test_the_trunk_and_its_waits_take_turns_through_all_layers(events: list[Event]) -> None:
    both = [event for kind in ("trunk", "experts") for event in spans(events, "main", kind)]
    both.sort(key=lambda event: event["ts"])
    places = [(event["args"]["layer"], event["cat"]) for event in both]
    assert places == [(layer, kind) for layer in range(LAYERS) for kind in ("trunk", "experts")] * TOKENS


def test_the_shadow_foretells_what_workers_load(events: list[Event]) -> None:
    foretold = {
        (event["args"]["step"], event["args"]["layer"], expert)
        for event in spans(events, "shadow", "layer")
        for expert in experts_of(event)
    }
    ordered = [
        (event["args"]["step"], event["args"]["layer"], *experts_of(event))
        for worker in workers()
        for event in spans(events, worker, "load")
        if event["args"]["order"] == "ordered"
    ]
    assert ordered and set(ordered) <= foretold


def test_what_the_router_chose_was_computed_while_the_trunk_waited(events: list[Event]) -> None:
    chosen = {(event["args"]["step"], event["args"]["layer"]): event for event in spans(events, "main", "experts")}
    computed = [event for worker in workers() for event in spans(events, worker, "compute")]
    assert sum(len(experts_of(event)) for event in computed) == TOKENS * LAYERS * TOP_K
    for event in computed:
        wait = chosen[event["args"]["step"], event["args"]["layer"]]
        assert set(experts_of(event)) <= set(experts_of(wait))
        assert wait["ts"] < event["ts"] < wait["ts"] + wait["dur"]


def test_loads_of_hits_were_over_before_and_began_before_the_trunk_asked(events: list[Event]) -> None:
    asked = {(event["args"]["step"], event["args"]["layer"]): event["ts"] for event in spans(events, "main", "experts")}
    lead = []
    for worker in workers():
        # an expert that a prompt loaded stays for the first decode step where that had been ordered before it was used
        loads = spans(events, worker, "load", since=0)
        for event in spans(events, worker, "compute"):
            if event["args"]["residency"] != "hit":
                continue
            for expert in experts_of(event):
                load = load_before(loads, event, expert)
                assert load["ts"] + load["dur"] <= event["ts"]
                lead.append(asked[event["args"]["step"], event["args"]["layer"]] - load["ts"])
    assert lead and sorted(lead)[len(lead) // 2] > 0


def load_before(loads: list[Event], computed: Event, expert: int) -> Event:
    """The last load of an expert that began before it was computed."""
    layer = computed["args"]["layer"]
    mine = [load for load in loads if load["args"]["layer"] == layer and experts_of(load) == [expert]]
    return max((load for load in mine if load["ts"] < computed["ts"]), key=lambda load: load["ts"])


def test_arrows_lead_forward(events: list[Event]) -> None:
    starts = {event["id"]: event["ts"] for event in events if event["ph"] == "s"}
    ends = {event["id"]: event["ts"] for event in events if event["ph"] == "f"}
    assert starts and starts.keys() == ends.keys()
    assert all(starts[arrow] <= ends[arrow] for arrow in starts)
