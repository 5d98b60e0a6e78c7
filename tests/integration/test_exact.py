"""Greedy tokens equal transformers' generate, for every architecture, device count, budget and transport."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import raymoe
from raymoe.actors.session import Session
from raymoe.config import EMBEDDED_MODEL, ClusterConfig
from raymoe.launcher import Moe
from tests.toy_models import EXCLUDED, PROMPT, TOYS, Toys, causal_moe_types, reference_at, reference_tokens
from tests.workers import service_over_sockets

NEW_TOKENS = 12
CONTRASTING = ["gpt_oss", "deepseek_v3", "nemotron_h", "granitemoe"]
EMBEDDED_PROMPT = list(range(200, 216))


def test_every_type_has_a_toy_or_a_reason() -> None:
    missing = sorted(set(causal_moe_types()) - set(TOYS) - set(EXCLUDED))
    assert not missing, f"new architectures in transformers need an entry in tests/toy_models.py: {missing}"


def open_local(path: Path, devices: int, slot_memory: int | None) -> Moe:
    config = ClusterConfig.model_validate(
        {
            "model": {"path": str(path), "dtype": "float32"},
            "devices": [
                {"name": f"edge-{i}", "transport": "local", "slot_memory": slot_memory} for i in range(devices)
            ],
        }
    )
    return Moe(Session(config, "test"), owns_ray=False)


def one_expert_bytes(path: Path) -> int:
    """A budget that holds one expert of each shape."""
    from raymoe.checkpoint.opening import open_checkpoint

    checkpoint = open_checkpoint(path, "float32")
    kinds = {tuple(sorted(layer.shapes.items())): layer.expert_bytes(torch.float32) for layer in checkpoint.layers}
    return sum(kinds.values())


def test_embedded_model_matches_for_text_of_every_kind() -> None:
    reference = AutoModelForCausalLM.from_pretrained(EMBEDDED_MODEL, dtype=torch.float32).eval()
    with open_local(EMBEDDED_MODEL, 1, None) as moe:
        for text in ("It is a truth universally acknowledged, that", "def __init__(self", "In the beginning God"):
            prompt = moe._session.service.encode(text)
            result = moe.generate(text, max_tokens=48, temperature=0.0, ignore_eos=True)
            assert result.token_ids == reference_tokens(reference, prompt, 48)


@pytest.mark.parametrize("model_type", sorted(TOYS))
def test_every_architecture_in_process(model_type: str, toys: Toys) -> None:
    path = toys(model_type)
    expected = reference_at(path, PROMPT, NEW_TOKENS)
    with open_local(path, 1, None) as moe:
        assert moe.generate(PROMPT, max_tokens=NEW_TOKENS, temperature=0.0, ignore_eos=True).token_ids == expected
    with open_local(path, 2, one_expert_bytes(path)) as moe:
        result = moe.generate(PROMPT, max_tokens=NEW_TOKENS, temperature=0.0, ignore_eos=True)
        assert result.token_ids == expected
        assert result.routing.misses > 0
        for device in moe.stats().devices.values():
            assert device.slot_budget_bytes is not None
            assert 0 < device.peak_slot_bytes <= device.slot_budget_bytes


@pytest.mark.parametrize("model_type", ["embedded", *CONTRASTING])
@pytest.mark.parametrize("devices", [1, 2, 4])
@pytest.mark.parametrize("transport", ["local", "zmq"])
def test_matrix_of_devices_budgets_and_transports(model_type: str, devices: int, transport: str, toys: Toys) -> None:
    path = EMBEDDED_MODEL if model_type == "embedded" else toys(model_type)
    prompt = EMBEDDED_PROMPT if model_type == "embedded" else PROMPT
    expected = reference_at(path, prompt, NEW_TOKENS)
    one = one_expert_bytes(path)
    for budget in (one, 5 * one, None):
        if transport == "local":
            with open_local(path, devices, budget) as moe:
                result = moe.generate(prompt, max_tokens=NEW_TOKENS, temperature=0.0, ignore_eos=True)
        else:
            with service_over_sockets(path, devices, budget, spread=devices) as (service, workers):
                result = service.generate(prompt, max_tokens=NEW_TOKENS, temperature=0.0, ignore_eos=True)
                reports = [worker.report() for worker in workers]
            assert all(budget is None or report.peak_slot_bytes <= budget for report in reports)
            assert sum(report.hits + report.misses for report in reports) == result.routing.hits + result.routing.misses
        assert result.token_ids == expected, f"budget {budget}"


@pytest.mark.integration
@pytest.mark.parametrize("model_type", ["embedded", "gpt_oss"])
def test_worker_processes_give_the_same_tokens(model_type: str, toys: Toys, ray_session: None) -> None:
    path = EMBEDDED_MODEL if model_type == "embedded" else toys(model_type)
    prompt = EMBEDDED_PROMPT if model_type == "embedded" else PROMPT
    expected = reference_at(path, prompt, NEW_TOKENS)
    budget = 5 * one_expert_bytes(path)
    config = {
        "model": {"path": str(path), "dtype": "float32"},
        "devices": [{"name": "bounded", "slot_memory": budget}, {"name": "free"}],
    }
    with raymoe.launch(config) as moe:
        result = moe.generate(prompt, max_tokens=NEW_TOKENS, temperature=0.0, ignore_eos=True)
        chunks = list(moe.stream(prompt, max_tokens=NEW_TOKENS, temperature=0.0, ignore_eos=True))
        stats = moe.stats()
    assert result.token_ids == expected
    assert [token for chunk in chunks for token in chunk.token_ids] == expected
    assert 0 < stats.devices["bounded"].peak_slot_bytes <= budget
    assert stats.devices["free"].peak_slot_bytes == 0
    assert stats.devices["bounded"].pid != stats.devices["free"].pid
    assert stats.engine is not None and stats.engine.completion_tokens == 2 * NEW_TOKENS
