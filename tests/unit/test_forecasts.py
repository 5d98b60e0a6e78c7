"""Forecasts of routing: what they say is what the gates would say, and asking them changes nothing."""

import logging
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from predictor.gate import GateForecast
from predictor.resident import ResidentForecast, ResidentOutput
from raymoe.actors.session import Session
from raymoe.checkpoint.architectures import experts_modules
from raymoe.checkpoint.opening import open_checkpoint
from raymoe.config import EMBEDDED_MODEL, ClusterConfig, DeviceConfig
from raymoe.engine.dispatch import Dispatcher
from raymoe.engine.host_experts import HostExperts
from raymoe.experts.build import make_worker
from raymoe.experts.call import ExpertCall
from raymoe.launcher import Moe
from raymoe.model.emulation import MOST_ROWS, Emulation
from raymoe.model.emulation_proof import attach_emulation
from raymoe.model.router import probe_tokens
from raymoe.model.runner import Runner
from raymoe.model.sites import MoeSite, attach_sites
from raymoe.model.trunk import build_trunk
from raymoe.types import DeviceName, ExpertKey
from tests.toy_models import PROMPT, TOYS, Toys, reference_at

TEXT = Path(__file__).parents[2] / "benchmarks" / "data" / "eval"
EXPERT_BYTES = 3 * 64 * 256 * 4  # of the embedded model in float32
UNSEEN = [3, 118, 99, 12, 70, 7, 101, 25, 53, 88, 110, 31]
STEPS = 6  # past the sliding windows of the toys

# MoE layers that can't be run ahead from; the last one never can
NOT_RUN_AHEAD = {
    # each layer gets an input of its own beside the hidden states
    "gemma4": [0, 1, 2],
    "gemma4_text": [0, 1, 2],
    # each layer has rotary embeddings of its own
    "granitemoe_swa": [0, 1],
    # a layer hands more than the hidden states to the next
    "hy_v4": [0],
    "inkling2_text": [0, 2],
    # no known rule, so no scores
    "inkling_text": [0, 1],
    "phimoe": [0, 1],
    "zaya": [0, 1, 2],
    # the second kind of attention, or of state, comes up for the first time
    "glm_moe_dsa": [1],
    "gpt_oss": [0],
    "granitemoehybrid": [0],
    "kolibri1": [0],
    "minimax": [0],
    "nemotron_h": [0],
    "qwen3_5_moe": [2],
    "qwen3_5_moe_text": [2],
    "qwen3_next": [1],
}

Ask = Callable[[int, ResidentOutput], None]


@dataclass
class Experts:
    """All experts of a checkpoint, computed at once; ``ask`` may forecast before a layer goes on."""

    compute_pairs: HostExperts
    sites: list[MoeSite] = field(default_factory=list)
    ask: Ask = lambda _layer, _output: None
    real: dict[int, np.ndarray] = field(default_factory=dict)

    def route(
        self, layer: int, experts_TK: torch.Tensor, weights_TK: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self.weights_TK = weights_TK
        if self.sites and self.sites[layer].router.rule is not None:
            router = self.sites[layer].router
            self.real[layer] = router.rule.scores(router.logits_TE.float().numpy())
        return experts_TK, weights_TK

    def compute(self, layer: int, hidden_TH: torch.Tensor, experts_TK: torch.Tensor) -> torch.Tensor:
        experts_P = experts_TK.reshape(-1).numpy().astype(np.int32)
        order_P = np.argsort(experts_P, kind="stable")
        rows_P = np.repeat(np.arange(len(hidden_TH), dtype=np.int32), experts_TK.shape[1])
        output_PH = torch.empty((len(experts_P), hidden_TH.shape[1]))
        output_PH[torch.from_numpy(order_P)] = self.compute_pairs(layer, experts_P[order_P], hidden_TH, rows_P[order_P])
        output_TKH = output_PH.view(*experts_TK.shape, -1)
        self.ask(layer, ResidentOutput(output_TKH=output_TKH, weights_TK=self.weights_TK))
        return output_TKH


@dataclass
class Here:
    """Hands out what a forecast asks for."""

    output: ResidentOutput | None = None

    def resident(self) -> ResidentOutput | None:
        return self.output


@dataclass
class Model:
    """A trunk with its experts, and what forecasts need of it."""

    experts: Experts
    trunk: Any
    sites: list[MoeSite]
    emulation: Emulation | None
    here: Here = field(default_factory=Here)

    @property
    def gate(self) -> GateForecast:
        return GateForecast([site if site.router.rule is not None else None for site in self.sites])

    @property
    def resident(self) -> ResidentForecast:
        assert self.emulation is not None
        return ResidentForecast(self.emulation, self.here, self.gate)


def model_at(path: Path) -> Model:
    checkpoint = open_checkpoint(path, "float32")
    experts = Experts(HostExperts(checkpoint, 1 << 30))
    trunk = build_trunk(checkpoint, experts, torch.device("cpu"))
    experts.sites = attach_sites(trunk)
    return Model(experts, trunk, experts.sites, attach_emulation(trunk, experts.sites))


@pytest.fixture(scope="module")
def embedded() -> Model:
    return model_at(EMBEDDED_MODEL)


def run(model: Model, prompt: list[int], tokens: list[int], ask: Ask) -> list[torch.Tensor]:
    """Logits of a prompt and of each token after it."""
    runner = Runner(model.trunk)
    model.experts.ask = ask
    try:
        logits, state = runner.prefill(prompt)
        return [logits, *(runner.decode(state, token) for token in tokens)]
    finally:
        model.experts.ask = lambda _layer, _output: None


def eval_tokens(name: str, count: int) -> list[int]:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(EMBEDDED_MODEL).encode((TEXT / name).read_text()[4000:8000])[:count]


# --- the gate forecast ----------------------------------------------------------------------------------


@pytest.mark.parametrize("ahead", [1, 2])
def test_the_gate_forecast_is_norm_and_gate_of_a_later_layer(embedded: Model, ahead: int) -> None:
    seen = []

    def ask(layer: int, _output: ResidentOutput) -> None:
        scores_TE = embedded.gate.scores(layer, ahead)
        if layer + ahead > 7:
            assert scores_TE is None
            return
        later = embedded.trunk.model.layers[layer + ahead]
        state_TH = embedded.sites[layer].state_TH
        assert state_TH is not None and scores_TE is not None
        x_TH = state_TH.numpy()
        normed_TH = x_TH / np.sqrt((x_TH**2).mean(axis=1, keepdims=True) + 1e-6)
        normed_TH *= later.post_attention_layernorm.weight.numpy()
        odds_TE = np.exp(normed_TH @ later.mlp.gate.weight.numpy().T)
        np.testing.assert_allclose(scores_TE, odds_TE / odds_TE.sum(axis=1, keepdims=True), rtol=1e-4, atol=1e-6)
        seen.append(scores_TE.shape)

    run(embedded, UNSEEN, [5], ask)
    assert seen == [(12, 32)] * (8 - ahead) + [(1, 32)] * (8 - ahead)


def test_the_gate_forecast_looks_as_far_as_there_are_layers(embedded: Model) -> None:
    assert embedded.gate.farthest == 7


# --- the resident forecast ------------------------------------------------------------------------------


def told_by(model: Model, prompt: list[int], tokens: list[int]) -> tuple[set[int], list[torch.Tensor]]:
    """From which layers the emulation foretold the next one's scores, each of them right; and the logits."""
    emulation, told, expected = model.emulation, set(), {}

    def ask(layer: int, output: ResidentOutput) -> None:
        foretold_TE = expected.pop(layer, None)
        if foretold_TE is not None:
            np.testing.assert_allclose(foretold_TE, model.experts.real[layer], rtol=1e-4, atol=1e-6)
            told.add(layer - 1)
        site = model.sites[layer]
        if site.router.rule is not None:  # on the state of the step, gates say what they said in the step
            assert site.state_TH is not None
            state_TH = site.state_TH.clone()
            np.testing.assert_allclose(site.gate_scores(state_TH), model.experts.real[layer], rtol=1e-4, atol=1e-6)
        if emulation is None:
            return
        states = [site.state_TH for site in model.sites]
        model.here.output = output
        scores_TE = emulation.scores_after(layer, routed(output))
        assert all(site.state_TH is before or torch.equal(site.state_TH, before) for site, before in known(states))
        if scores_TE is not None:
            expected[layer + 1] = scores_TE

    def known(states: list[torch.Tensor | None]) -> list[tuple[MoeSite, torch.Tensor]]:
        pairs = zip(model.sites, states, strict=True)
        return [(site, before) for site, before in pairs if before is not None and site.state_TH is not None]

    logits = run(model, prompt, tokens, ask)
    return told, logits


def routed(output: ResidentOutput) -> torch.Tensor:
    return (output.output_TKH * output.weights_TK.unsqueeze(-1)).sum(dim=1)


@pytest.mark.parametrize("model_type", sorted(TOYS))
def test_with_every_expert_here_the_next_gate_is_foretold_exactly(model_type: str, toys: Toys) -> None:
    model = model_at(toys(model_type))
    plain = run(model, UNSEEN, list(range(40, 40 + STEPS)), lambda _layer, _output: None)
    run(model, UNSEEN[:4], [], lambda layer, output: ask_once(model, layer, output))  # recording begins here
    told, logits = told_by(model, UNSEEN, list(range(40, 40 + STEPS)))
    assert told == set(range(len(model.sites) - 1)) - set(NOT_RUN_AHEAD.get(model_type, []))
    assert all(torch.equal(one, other) for one, other in zip(logits, plain, strict=True))  # no cache has noticed


def ask_once(model: Model, layer: int, output: ResidentOutput) -> None:
    if model.emulation is not None:
        model.emulation.scores_after(layer, routed(output))


@pytest.mark.parametrize("rows", [1, 3])
def test_rows_of_a_batch_are_foretold_exactly(embedded: Model, rows: int) -> None:
    forecast, expected, differences = embedded.resident, {}, []

    def ask(layer: int, output: ResidentOutput) -> None:
        if layer in expected:
            differences.append(np.abs(expected.pop(layer) - embedded.experts.real[layer]).max())
        embedded.here.output = output
        scores_TE = forecast.scores(layer, 1)
        if scores_TE is not None:
            expected[layer + 1] = scores_TE

    runner = Runner(embedded.trunk)
    embedded.experts.ask = ask
    _, state = runner.prefill_rows([[token + row for token in UNSEEN] for row in range(rows)])
    for token in (5, 90, 41):
        differences.clear()
        runner.decode_rows(state, [token + row for row in range(rows)])
        assert len(differences) == 7 and max(differences) < 1e-5
    embedded.experts.ask = lambda _layer, _output: None


def test_with_half_of_the_experts_here_it_recalls_more_than_the_gate(embedded: Model) -> None:
    random = np.random.default_rng(0)
    here_LE = np.stack([random.permutation(32) < 16 for _ in range(8)])
    recalls: dict[str, list[float]] = {"gate": [], "resident": []}
    expected: dict[str, np.ndarray] = {}
    forecasts = {"gate": embedded.gate, "resident": embedded.resident}

    def ask(layer: int, output: ResidentOutput) -> None:
        chosen = np.argsort(-embedded.experts.real[layer][0])[:4]
        for name, scores_TE in expected.items():
            recalls[name].append(len(set(chosen) & set(np.argsort(-scores_TE[0])[:4].tolist())) / 4)
        expected.clear()
        if len(output.output_TKH) > 1:  # the prompt
            return
        here_K = torch.from_numpy(here_LE[layer][chosen_experts(embedded, layer)])
        partial_TKH = output.output_TKH * here_K[None, :, None]
        embedded.here.output = ResidentOutput(output_TKH=partial_TKH, weights_TK=output.weights_TK)
        for name, forecast in forecasts.items():
            scores_TE = forecast.scores(layer, 1)
            if scores_TE is not None:
                expected[name] = scores_TE

    for file in ("austen.txt", "pysrc.txt"):
        tokens = eval_tokens(file, 48)
        run(embedded, tokens[:8], tokens[8:], ask)
    assert len(recalls["gate"]) == len(recalls["resident"]) == 2 * 40 * 7
    gate, resident = np.mean(recalls["gate"]), np.mean(recalls["resident"])
    assert 0.65 < gate < 0.85
    assert resident > gate + 0.1


def chosen_experts(model: Model, layer: int) -> np.ndarray:
    """The step's experts of a single token in the router's order: by falling score."""
    return np.argsort(-model.experts.real[layer][0], kind="stable")[:4]


def test_more_than_one_layer_ahead_the_gates_are_asked(embedded: Model) -> None:
    forecast = embedded.resident
    assert forecast.farthest == 1
    asked = []

    def ask(layer: int, output: ResidentOutput) -> None:
        embedded.here.output = output
        for there in (forecast.scores(layer, 2), embedded.gate.scores(layer, 2)):
            asked.append(there)

    run(embedded, UNSEEN, [], ask)
    assert all((one is None) == (other is None) for one, other in zip(asked[::2], asked[1::2], strict=True))
    np.testing.assert_array_equal(asked[0], asked[1])


def test_where_nothing_is_waited_for_the_gates_are_asked(embedded: Model) -> None:
    embedded.here.output = None
    run(
        embedded,
        UNSEEN,
        [],
        lambda layer, _output: np.testing.assert_array_equal(
            embedded.resident.scores(layer, 1), embedded.gate.scores(layer, 1)
        ),
    )


# --- what running ahead leaves behind -------------------------------------------------------------------


def test_nothing_is_recorded_before_the_first_question() -> None:
    model = model_at(EMBEDDED_MODEL)
    assert model.emulation is not None
    assert not any("forward" in vars(module) for module in model.trunk.modules())
    run(model, UNSEEN, [], lambda layer, output: ask_once(model, layer, output))
    assert any("forward" in vars(module) for module in model.trunk.modules())
    model.emulation.remove()
    assert not any("forward" in vars(module) for module in model.trunk.modules())


def test_nothing_of_a_step_is_kept_when_it_is_over(embedded: Model) -> None:
    run(embedded, UNSEEN, [5], lambda layer, output: ask_once(embedded, layer, output))
    assert embedded.emulation is not None
    for tap in embedded.emulation._taps:
        assert tap.arguments is None and tap.routed_TH is None
        assert not any(module.outputs for module in tap._recorded)


def test_a_step_that_fails_keeps_nothing_either(embedded: Model) -> None:
    def fail(layer: int, _output: ResidentOutput) -> None:
        if layer == 3:
            raise RuntimeError("a worker is gone")

    with pytest.raises(RuntimeError, match="a worker is gone"):
        run(embedded, UNSEEN, [], fail)
    assert embedded.emulation is not None
    assert all(tap.arguments is None for tap in embedded.emulation._taps)


def test_long_prompts_are_not_recorded(embedded: Model) -> None:
    told: list[np.ndarray | None] = []
    assert embedded.emulation is not None
    ahead = embedded.emulation
    tokens = [*probe_tokens(embedded.trunk), 7]
    assert len(tokens) == MOST_ROWS + 1
    run(embedded, tokens, [], lambda layer, output: told.append(ahead.scores_after(layer, routed(output))))
    assert told == [None] * 8


def test_a_run_ahead_that_fails_leaves_the_step_and_the_forecast_to_others(caplog: pytest.LogCaptureFixture) -> None:
    model = model_at(EMBEDDED_MODEL)
    assert model.emulation is not None
    expected = run(model, UNSEEN, [5], lambda _layer, _output: None)
    way = model.emulation.ways[2]
    assert way is not None
    model.emulation.ways[2] = replace(way, sources=(((), {"of another architecture": 0}),))
    with caplog.at_level(logging.WARNING):
        logits = run(model, UNSEEN, [5], lambda layer, output: ask_once(model, layer, output))
    assert [way is None for way in model.emulation.ways] == [layer in (2, 7) for layer in range(8)]
    assert all(torch.equal(one, other) for one, other in zip(logits, expected, strict=True))
    assert "layer 3 can't be run ahead of any more" in caplog.text


# --- in the engine --------------------------------------------------------------------------------------


def open_with(path: Path, slot_memory: int | None, **scheduling: Any) -> Moe:
    config = ClusterConfig.model_validate(
        {
            "model": {"path": str(path), "dtype": "float32"},
            "devices": [{"name": f"edge-{i}", "transport": "local", "slot_memory": slot_memory} for i in range(2)],
            "trunk": {"threads": 1},
            "scheduling": scheduling,
        }
    )
    return Moe(Session(config, "test"), owns_ray=False)


@pytest.mark.parametrize("model_type", ["embedded", "deepseek_v3", "gpt_oss", "qwen3_next"])
def test_forecasts_do_not_change_the_tokens(model_type: str, toys: Toys) -> None:
    path = EMBEDDED_MODEL if model_type == "embedded" else toys(model_type)
    prompt = list(range(200, 216)) if model_type == "embedded" else PROMPT
    budget = 32 * EXPERT_BYTES if model_type == "embedded" else 24_000
    expected = reference_at(path, prompt, 24)
    for prefetch in ("gate", "resident", "none"):
        with open_with(path, budget, policy="importance", alpha=0.0, prefetch=prefetch) as moe:
            result = moe.generate(prompt, max_tokens=24, temperature=0.0, ignore_eos=True)
            assert result.token_ids == expected, prefetch
            assert result.routing.misses > 0


def test_the_resident_forecast_loads_ahead_in_the_engine() -> None:
    tells: list[tuple[int, int]] = []
    with open_with(EMBEDDED_MODEL, 32 * EXPERT_BYTES, policy="importance", alpha=0.0, prefetch="resident") as moe:
        scheduler = moe._session.service.experts
        forecast = scheduler._forecasts["resident"]
        assert isinstance(forecast, ResidentForecast)
        real, emulation = [], forecast._trunk
        own = emulation.scores_after
        emulation.scores_after = lambda layer, routed_TH: real.append(own(layer, routed_TH)) or real[-1]
        scheduler._on_forecast = lambda layer, experts, _worth: tells.append((layer, len(experts)))
        moe.generate("It is a truth", max_tokens=16, temperature=0.0, ignore_eos=True)
        moe.reconfigure(prefetch="none")
        told = len(tells)
        moe.generate("It is a truth", max_tokens=4, temperature=0.0, ignore_eos=True)
        prefetches = sum(worker.report().prefetches for worker in moe._session._local.values())
    assert told == len(tells) and prefetches > 0
    assert sum(scores_TE is not None for scores_TE in real) > 20


def test_a_preview_of_a_call_changes_nothing_and_is_used_again(toys: Toys) -> None:
    checkpoint = open_checkpoint(toys("qwen3_moe"), "float32")
    one = checkpoint.layers[0].expert_bytes(torch.float32)
    worker = make_worker(checkpoint, DeviceConfig(name="edge", slot_memory=5 * one))
    worker.own([ExpertKey(layer=layer, expert=expert) for layer in range(2) for expert in range(8)])
    hidden_RH = torch.randn((2, 32), generator=torch.Generator().manual_seed(0))

    def call(*experts: int) -> ExpertCall:
        pairs, rows = np.array(experts, dtype=np.int32), np.arange(len(experts), dtype=np.int32) % 2
        return ExpertCall(layer=0, hidden_RH=hidden_RH, experts_P=pairs, rows_P=rows)

    expected = worker.compute(call(0, 1, 2, 5)).output_PH
    worker.compute(call(6, 7))  # 0 and 1 made room, or others did
    begun = worker.begin(call(0, 1, 2, 5))
    before = worker.report()
    ready_P, output_PH = worker.preview(begun)
    landed = {name: getattr(before, name) for name in ("loads", "bytes_loaded", "link_busy_s")}  # may land meanwhile
    after = replace(worker.report(), **landed)
    assert after == before
    assert 0 < ready_P.sum() < 4
    torch.testing.assert_close(output_PH, expected[torch.from_numpy(ready_P)], rtol=0, atol=0)
    answer = worker.finish(begun)
    assert begun.early_PH is output_PH
    torch.testing.assert_close(answer.output_PH, expected, rtol=0, atol=0)
    worker.close()


def test_a_preview_of_several_devices_is_in_the_order_of_pairs(toys: Toys) -> None:
    checkpoint = open_checkpoint(toys("qwen3_moe"), "float32")
    one = checkpoint.layers[0].expert_bytes(torch.float32)
    workers = {
        DeviceName(name): make_worker(checkpoint, DeviceConfig(name=name, slot_memory=3 * one)) for name in ("a", "b")
    }
    owners = {ExpertKey(layer=layer, expert=e): DeviceName("ab"[e % 2]) for layer in range(2) for e in range(8)}
    for name, worker in workers.items():
        worker.own([key for key, owner in owners.items() if owner == name])
    dispatcher = Dispatcher(checkpoint.sizes(), owners, local=workers, remote=None, timeout_s=30.0)
    hidden_TH = torch.randn((4, 32), generator=torch.Generator().manual_seed(0))
    experts_TK = torch.tensor([[5, 0, 3], [2, 1, 7], [6, 4, 0], [3, 2, 5]])
    previews: list[torch.Tensor | None] = []
    for _ in range(2):
        output_TKH = dispatcher.compute(0, hidden_TH, experts_TK, None, lambda: previews.append(dispatcher.preview(12)))
    assert dispatcher.preview(12) is None  # nothing is under way
    preview_PH = previews[-1]
    assert preview_PH is not None
    known_P = (preview_PH != 0).any(dim=1)
    assert 0 < int(known_P.sum()) < 12
    assert torch.equal(preview_PH[known_P], output_TKH.view(12, -1)[known_P])
    for worker in workers.values():
        worker.close()


def test_experts_are_called_as_before_after_the_proof(toys: Toys) -> None:
    model = model_at(toys("mixtral"))
    assert all(module.raymoe_backend is model.experts for _, module in experts_modules(model.trunk))
    assert not any("forward" in vars(module) for module in model.trunk.modules())
