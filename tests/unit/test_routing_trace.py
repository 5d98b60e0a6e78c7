"""Routing traces: what is written is read, what is no trace is refused, synthetic ones are as they were asked for."""

import contextlib
import json
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from raymoe.errors import ConfigError
from raymoe.simulation.shape import SHAPES, ModelShape, shape_named
from raymoe.simulation.synthetic import Habits, synthetic
from raymoe.simulation.trace import RoutingTrace, load, save
from tests.simulated import shape, walking

ARRAYS = ("chosen_NLK", "scores_NLE", "tokens_N", "foretold_NLK", "guessed_N")


def alike(one: RoutingTrace, other: RoutingTrace) -> bool:
    pairs = [(getattr(one, name), getattr(other, name)) for name in ARRAYS]
    same = all((a is None and b is None) or np.array_equal(a, b) for a, b in pairs)
    return same and one.shape == other.shape and one.about == other.about


# --- files ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lacking", [(), ("scores_NLE",), ("foretold_NLK", "guessed_N"), ("tokens_N",)])
def test_what_is_written_is_read(tmp_path: Path, lacking: tuple[str, ...]) -> None:
    trace = replace(synthetic(shape(), 5), tokens_N=np.arange(5, dtype=np.int32))
    trace = replace(trace, **dict.fromkeys(lacking))
    save(trace, tmp_path / "t.npz")
    assert alike(load(tmp_path / "t.npz"), trace)


def test_no_file_and_no_directory(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"can't read the trace .*No such file"):
        load(tmp_path / "no.npz")
    with pytest.raises(ConfigError, match=r"can't write .*: "):
        save(walking(shape(), 2), tmp_path / "no" / "t.npz")


@given(garbage=st.binary(max_size=200))
def test_bytes_that_are_no_trace_are_refused(tmp_path_factory: pytest.TempPathFactory, garbage: bytes) -> None:
    file = tmp_path_factory.mktemp("trace") / "t.npz"
    file.write_bytes(garbage)
    with pytest.raises(ConfigError):
        load(file)


@given(data=st.data())
def test_a_damaged_trace_is_refused_or_still_one(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    file = tmp_path_factory.mktemp("trace") / "t.npz"
    save(walking(shape(layers=2), 3), file)
    content = bytearray(file.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    file.write_bytes(content[: data.draw(st.integers(1, len(content)))])
    with contextlib.suppress(ConfigError):
        assert load(file).steps > 0


def test_pickled_objects_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "t.npz", facts=np.array({"kind": "x"}, dtype=object))
    with pytest.raises(ConfigError, match="no routing trace"):
        load(tmp_path / "t.npz")


def written_with(tmp_path: Path, **facts: object) -> Path:
    trace = walking(shape(), 2)
    known = {"kind": "raymoe routing trace", "version": 1, "shape": trace.shape.as_dict(), "about": {}}
    np.savez(tmp_path / "t.npz", facts=np.array(json.dumps(known | facts)), chosen_NLK=trace.chosen_NLK)
    return tmp_path / "t.npz"


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({"version": 2}, "version 2; this reads 'raymoe routing trace', 1"),
        ({"kind": "other"}, "of kind 'other'"),
        ({"shape": {"name": "x"}}, "facts are not as they should be"),
        ({"shape": {**shape().as_dict(), "layers": 9}}, "chosen_NLK is int32 .* ask for int32"),
        ({"shape": {**shape().as_dict(), "layers": 0}}, "layers is 0; allowed is 1 to"),
        ({"shape": {**shape().as_dict(), "experts": 4}}, "names expert 0 or 7 of 4"),
        ({"shape": {**shape().as_dict(), "top_k": 9}}, "top_k is 9, but there are 8 experts"),
        ({"about": 3}, "facts are not as they should be"),
    ],
)
def test_facts_that_do_not_fit_are_named(tmp_path: Path, facts: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load(written_with(tmp_path, **facts))


def test_a_file_that_would_fill_the_memory_is_not_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("raymoe.simulation.trace.MOST_BYTES", 100)
    with zipfile.ZipFile(tmp_path / "t.npz", "w") as archive:
        archive.writestr("chosen_NLK.npy", bytes(101))
    with pytest.raises(ConfigError, match="101 bytes; at most 100 are read"):
        load(tmp_path / "t.npz")


def test_the_first_steps_and_other_sizes() -> None:
    trace = synthetic(shape(), 9)
    assert trace.first(4).steps == 4 and trace.first(99).steps == 9
    large = replace(trace.shape, expert_bytes=10**9)
    assert trace.priced(large).shape.expert_bytes == 10**9
    with pytest.raises(ConfigError, match="ask for"):
        trace.priced(shape(layers=3))


def test_recall_counts_names_in_any_order() -> None:
    trace = walking(shape(layers=1, experts=4, top_k=2), 2)
    turned = np.ascontiguousarray(trace.chosen_NLK[..., ::-1])
    half = turned.copy()
    half[0, 0] = (-1, trace.chosen_NLK[0, 0, 0])
    assert replace(trace, foretold_NLK=turned).recall == 1.0
    assert replace(trace, foretold_NLK=half).recall == 0.75
    assert trace.recall is None and trace.agreement is None


# --- synthetic ------------------------------------------------------------------------------------------


@given(
    top_k=st.integers(1, 4),
    experts=st.integers(4, 20),
    popularity=st.floats(0, 3),
    persistence=st.floats(0, 1),
    recall=st.floats(0, 1),
    seed=st.integers(0, 99),
)
def test_synthetic_traces_are_traces(
    top_k: int, experts: int, popularity: float, persistence: float, recall: float, seed: int
) -> None:
    of = shape(layers=3, experts=experts, top_k=top_k)
    habits = Habits(popularity=popularity, persistence=persistence, recall=recall, seed=seed)
    trace = synthetic(of, 6, habits)
    assert alike(trace, synthetic(of, 6, habits))
    assert all(len(set(chosen_K)) == top_k for step in trace.chosen_NLK.tolist() for chosen_K in step)
    assert trace.scores_NLE is not None and trace.foretold_NLK is not None
    chosen = np.take_along_axis(trace.scores_NLE, trace.chosen_NLK.astype(np.int64), axis=2)
    assert (np.diff(chosen.astype(np.float32), axis=2) <= 0).all()
    assert (chosen.min(axis=2) >= np.sort(trace.scores_NLE, axis=2)[..., -top_k] - 1e-3).all()
    assert np.allclose(trace.scores_NLE.astype(np.float32).sum(axis=2), 1.0, atol=0.01)
    for named_K in trace.foretold_NLK.reshape(-1, top_k).tolist():
        named = [expert for expert in named_K if expert >= 0]
        assert len(set(named)) == len(named)


def test_habits_have_the_effect_that_they_are_named_for() -> None:
    of = shape(layers=4, experts=32, top_k=4)

    def again(trace: RoutingTrace) -> float:
        return float((trace.chosen_NLK[1:, :, :, None] == trace.chosen_NLK[:-1, :, None, :]).any(axis=3).mean())

    def most(trace: RoutingTrace) -> float:
        counts_LE = np.stack([np.bincount(trace.chosen_NLK[:, layer].ravel(), minlength=32) for layer in range(4)])
        return float(counts_LE.max(axis=1).mean() / trace.steps)

    even = synthetic(of, 400, Habits(popularity=0.0, persistence=0.0))
    assert again(even) == pytest.approx(4 / 32, abs=0.02)
    assert again(synthetic(of, 400, Habits(popularity=0.0, persistence=0.5))) == pytest.approx(
        0.5 + 0.5 * 2 / 30, abs=0.03
    )
    assert most(synthetic(of, 400, Habits(popularity=1.5, persistence=0.0))) > 2 * most(even)
    told = synthetic(of, 400, Habits(recall=0.9, agreement=0.8))
    assert told.recall == pytest.approx(0.9, abs=0.02) and told.agreement == pytest.approx(0.8, abs=0.06)


@pytest.mark.parametrize(
    ("habits", "message"),
    [({"recall": 1.5}, "--recall is 1.5"), ({"popularity": -1.0}, "--popularity is -1")],
)
def test_habits_that_nobody_has(habits: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Habits(**habits)  # type: ignore[arg-type]


# --- models ---------------------------------------------------------------------------------------------


def test_known_models_have_the_sizes_that_are_published() -> None:
    mixtral = shape_named("mixtral-8x7b")
    assert mixtral.expert_bytes == 704_643_072 and mixtral.kv_bytes == 256 * 1024
    total = mixtral.trunk_bytes + 32 * 8 * mixtral.expert_bytes + 32_000 * 4096 * 4
    assert total / 4 == pytest.approx(46.7e9, rel=0.01)  # parameters
    qwen = shape_named("qwen3-30b-a3b")
    assert 48 * 128 * qwen.expert_bytes == pytest.approx(58.0e9, rel=0.01)
    assert SHAPES["tiny-moe"].expert_bytes == 196_608 and SHAPES["tiny-moe"].kv_bytes == 8192


def test_an_unknown_model_is_told_the_known_ones() -> None:
    with pytest.raises(ConfigError, match='--like is "x"; known are mixtral-8x7b, qwen3-30b-a3b, tiny-moe'):
        shape_named("x")


def test_a_shape_survives_json() -> None:
    for known in SHAPES.values():
        assert ModelShape(**json.loads(json.dumps(known.as_dict()))) == known
