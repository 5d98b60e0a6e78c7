"""NaN and infinity: the request fails by name of who is to blame, others go on, and it is counted."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from raymoe.checkpoint.opening import SINGLE_FILE
from raymoe.engine.request import SamplingParams
from raymoe.engine.sampling import Sampler, SamplingDefaults
from raymoe.engine.service import ModelService
from raymoe.errors import ExpertOutputError, NotFiniteError
from raymoe.observe import metrics
from raymoe.serve.errors import describe
from raymoe.types import DeviceName, ExpertFault, ExpertKey
from tests.local import local_service
from tests.toy_models import reference_at, save_toy

TOKENS = 12
LAYER = 1


# --- one choice -------------------------------------------------------------------------------------------

WAYS: dict[str, SamplingParams] = {
    "greedy": SamplingParams(temperature=0),
    "sampled": SamplingParams(temperature=1.0, seed=1),
    "cut off": SamplingParams(temperature=0.7, top_k=4, top_p=0.9, min_p=0.1, seed=1),
    "biased": SamplingParams(temperature=0, logit_bias={3: 5.0}),
    "penalised": SamplingParams(temperature=0, repetition_penalty=1.2, presence_penalty=0.5, frequency_penalty=0.5),
    "with log probabilities": SamplingParams(temperature=1.0, seed=1, logprobs=3),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("bad", [[math.nan] * 16, [0.5] * 7 + [math.nan] + [0.1] * 8, [1.0] * 15 + [math.inf]])
def test_no_way_of_choosing_takes_what_is_no_number(way: str, bad: list[float]) -> None:
    sampler = Sampler(WAYS[way], SamplingDefaults())
    with pytest.raises(NotFiniteError, match=r"the model's output is not finite \(NaN or infinity\)"):
        sampler.choose(torch.tensor(bad), [1, 2], [3, 4])


@pytest.mark.parametrize("way", WAYS)
def test_tokens_that_a_model_never_uses_are_no_fault(way: str) -> None:
    logits_V = torch.tensor([-math.inf, 1.0, 2.0, -math.inf, *[0.1] * 12])
    token, _ = Sampler(WAYS[way], SamplingDefaults()).choose(logits_V, [1, 2], [3, 4])
    assert math.isfinite(logits_V[token])


# --- a poisoned expert ------------------------------------------------------------------------------------


def poison(path: Path, names: tuple[str, ...], value: float = math.nan) -> Path:
    """One element of a tensor, of those whose name contains all of this."""
    file = path / SINGLE_FILE
    tensors = load_file(file)
    (name,) = (name for name in tensors if all(part in name for part in names))
    tensors[name].view(-1)[0] = value
    save_file(tensors, file, metadata={"format": "pt"})
    return path


def routed(service: ModelService, prompt: list[int]) -> set[int]:
    """Experts of the layer that greedy decoding of this prompt asks for, tokens of the prompt included."""
    seen: set[int] = set()
    inner = service.experts.dispatcher.compute

    def noting(layer: int, hidden_TH: torch.Tensor, experts_TK: torch.Tensor, *rest: Any, **more: Any) -> torch.Tensor:
        if layer == LAYER:
            seen.update(experts_TK.unique().tolist())
        return inner(layer, hidden_TH, experts_TK, *rest, **more)

    service.experts.dispatcher.compute = noting  # type: ignore[method-assign]
    try:
        service.generate(prompt, max_tokens=TOKENS, temperature=0, ignore_eos=True)
    finally:
        service.experts.dispatcher.compute = inner  # type: ignore[method-assign]
    return seen


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int, list[int], list[int]]:
    """A model with one poisoned expert, a prompt that comes to it, and one that never does."""
    path = save_toy("qwen3_moe", tmp_path_factory.mktemp("toy") / "m")
    prompts = [[token] * 2 for token in range(3, 123)]
    with local_service(path, trunk={"prefix_memory": 0}) as service:
        asked = [routed(service, prompt) for prompt in prompts[:40]]
    spared, expert, hit = next(
        (spared, expert, hit)
        for spared, mine in zip(prompts, asked, strict=False)
        for expert in range(8)
        if expert not in mine
        for hit, theirs in zip(prompts, asked, strict=False)
        if expert in theirs
    )
    return poison(path, (f"layers.3.mlp.experts.{expert}.down_proj",)), expert, hit, spared


@pytest.mark.parametrize(
    "scheduling", [{}, {"policy": "importance", "alpha": 0.0}, {"policy": "importance", "alpha": 0.3}], ids=str
)
def test_the_expert_is_named_and_counted_and_others_are_answered(
    scene: tuple[Path, int, list[int], list[int]], scheduling: dict[str, Any]
) -> None:
    path, expert, hit, spared = scene
    expected = reference_at(path, spared, TOKENS)
    slots = {} if not scheduling else {"slot_memory": 1 << 20}
    with local_service(path, trunk={"max_running": 4}, **slots, **scheduling) as service:
        options = {"max_tokens": TOKENS, "temperature": 0, "ignore_eos": True, "quality": None}
        well = service.stream(spared, **options)
        chunks = [next(well)]
        with pytest.raises(
            ExpertOutputError, match=rf'layer {LAYER}, expert {expert} on device "cpu-0" is to blame; check'
        ):
            service.generate(hit, **options)
        chunks += well
        assert [token for chunk in chunks for token in chunk.token_ids] == expected
        report = service.report()
        assert (report.failed, report.not_finite, report.finished) == (1, 1, 1)
        assert report.faults == (ExpertFault(layer=LAYER, expert=expert, device=DeviceName("cpu-0"), requests=1),)
        assert service.runner.joins and report.kv_set_aside_bytes == 0
        assert service.generate(spared, **options).token_ids == expected


def test_a_second_request_is_counted_too(scene: tuple[Path, int, list[int], list[int]]) -> None:
    path, _, hit, _ = scene
    with local_service(path) as service:
        for _ in range(2):
            with pytest.raises(ExpertOutputError):
                service.generate(hit, max_tokens=TOKENS, temperature=1.0, seed=3, ignore_eos=True, top_k=1)
        assert [fault.requests for fault in service.report().faults] == [2]
        (value,) = metrics.of_faults(service.report().faults, ["cpu-0"])
        assert value[1:] == ({"device": "cpu-0"}, 2.0)


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (("embed_tokens",), r"the trunk is to blame, before MoE layer 0"),
        (("model.norm",), r"the trunk is to blame, after the last MoE layer"),
        (("layers.3.mlp.gate.weight",), r"is not finite"),
    ],
    ids=["embedding", "last norm", "router"],
)
def test_a_trunk_that_is_to_blame_is_named_instead(tmp_path: Path, names: tuple[str, ...], words: str) -> None:
    path = poison(save_toy("qwen3_moe", tmp_path / "m"), names)
    with local_service(path) as service:
        with pytest.raises(NotFiniteError, match=words) as raised:
            service.generate([0, 5, 9], max_tokens=4, temperature=0)
        assert not isinstance(raised.value, ExpertOutputError)
        assert service.report().faults == () and service.report().not_finite == 1


def test_what_clients_are_told() -> None:
    told = describe(ExpertOutputError("layer 1, expert 2"))
    error = told.body["error"]
    assert (told.status, error["type"], error["code"]) == (
        500,
        "server_error",
        "expert_output",
    )
    assert "expert 2" in told.message
    assert describe(NotFiniteError("x")).code == "output_not_finite"


def test_faults_are_kept_in_order() -> None:
    from raymoe.engine.totals import Totals

    totals = Totals()
    totals.faults[ExpertKey(layer=2, expert=1), DeviceName("b")] += 3
    totals.faults[ExpertKey(layer=0, expert=7), DeviceName("a")] += 1
    assert [(fault.layer, fault.requests) for fault in totals.faults_by_expert()] == [(0, 1), (2, 3)]
