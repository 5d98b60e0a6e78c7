"""Sequences of any lengths as rows of one forward: as if each were alone, and one by one where that can't be."""

import random
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from raymoe.checkpoint.opening import open_checkpoint
from raymoe.config import EMBEDDED_MODEL
from raymoe.engine.request import Chunk, SamplingParams
from raymoe.engine.service import ModelService
from raymoe.engine.substitution import Decided, Substituted
from raymoe.errors import ExpertUnavailableError
from raymoe.model.router import ProbeExperts
from raymoe.model.rows import ByRow
from raymoe.model.rows_proof import join_rows
from raymoe.model.runner import Runner
from raymoe.model.trunk import build_trunk
from raymoe.types import Routing
from tests.local import local_service
from tests.toy_models import TOYS, Toys

ALONE = {  # what goes wrong if they were joined, or why they are not tried
    "deepseek_v4": "positions",
    "gemma4": "a way of its own",
    "minimax": "a way of its own",
    "nemotron_h": "a way of its own",
    "phimoe": "a way of its own",
    "qwen4_exp": "positions",
    "qwen4_exp_text": "positions",
    "zaya": "states",
}
TIE = 1e-2  # how far below the best logit a token may be, run together with others


@pytest.mark.parametrize("model_type", list(TOYS))
def test_which_architectures_join_rows(model_type: str, toys: Toys) -> None:
    checkpoint = open_checkpoint(toys(model_type), "float32")
    runner = Runner(build_trunk(checkpoint, ProbeExperts(), torch.device("cpu")))
    reason = join_rows(runner)
    assert runner.joins == (reason is None)
    assert runner.joins == (model_type not in ALONE), reason
    left = [module for module in runner.model.modules() if isinstance(vars(module).get("forward"), ByRow)]
    assert bool(left) == runner.joins, "what can't be joined is as it was"


def test_a_forward_that_mixes_rows_up_is_found_out(toys: Toys, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = open_checkpoint(toys("mixtral"), "float32")
    runner = Runner(build_trunk(checkpoint, ProbeExperts(), torch.device("cpu")))
    together = runner.decode_together
    monkeypatch.setattr(runner, "decode_together", lambda states, tokens: together(states, tokens).flip(0))
    reason = join_rows(runner)
    assert reason == "a forward of several sequences gives other logits than single ones" and not runner.joins


def test_what_rows_share_is_spread_and_nothing_is_lost() -> None:
    total = Routing(hits=7, misses=2, loads=1, bytes_loaded=100, decisions=6, replaced_mass=0.9)
    parts = total.spread(3)
    assert [part.hits for part in parts] == [3, 2, 2] and [part.loads for part in parts] == [1, 0, 0]
    whole = sum(parts, Routing())
    assert whole.replaced_mass == pytest.approx(0.9)
    assert {name: getattr(whole, name) for name in ("hits", "misses", "loads", "bytes_loaded", "decisions")} == {
        name: getattr(total, name) for name in ("hits", "misses", "loads", "bytes_loaded", "decisions")
    }


# --- in the engine ------------------------------------------------------------------------------------------


class Answer:
    """What comes of one request."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.last: Chunk | BaseException | None = None

    def take(self, chunk: Chunk | BaseException) -> None:
        if isinstance(chunk, Chunk):
            self.tokens.extend(chunk.token_ids)
        if isinstance(chunk, BaseException) or chunk.finish_reason is not None:
            self.last = chunk


def stepped(service: ModelService) -> ModelService:
    """Its engine's thread is ended: tests step it."""
    service._engine.stop()
    service._engine._stopping = False
    return service


def submit(service: ModelService, prompt: list[int], **params: object) -> Answer:
    answer = Answer()
    params = {"temperature": 0.0, "ignore_eos": True, **params}
    service._engine.submit(prompt, SamplingParams(**params), answer.take)  # type: ignore[arg-type]
    return answer


@cache
def oracle(path: Path) -> Any:
    """transformers' own model."""
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)


def check_by_transformers(path: Path, prompt: list[int], tokens: list[int]) -> list[int]:
    """Each token is the best, or nearly, after those before it; returns the places where it is not the best."""
    with torch.inference_mode():
        logits_TV = oracle(path)(torch.tensor([[*prompt, *tokens]])).logits[0, len(prompt) - 1 : -1].float()
    behind_T = logits_TV.max(dim=-1).values - logits_TV[range(len(tokens)), tokens]
    assert float(behind_T.max()) <= TIE
    return torch.nonzero(behind_T).flatten().tolist()


@pytest.mark.parametrize(
    "scheduling", [{}, {"policy": "all_resident"}, {"policy": "importance", "alpha": 0.0, "prefetch": "resident"}]
)
def test_requests_that_come_and_go_get_what_transformers_gives(
    scheduling: dict[str, object], caplog: pytest.LogCaptureFixture
) -> None:
    """Random arrivals, lengths and cancellations; teacher-forced by transformers on the tokens that came."""
    draw = random.Random(5)
    slot_memory = None if scheduling.get("policy") == "all_resident" else 60 * 196_608
    with local_service(EMBEDDED_MODEL, slot_memory=slot_memory, **scheduling) as service:
        engine = stepped(service)._engine
        assert service.runner.joins
        widths: list[tuple[int, int]] = []
        together = service.runner.read_together
        service.runner.read_together = lambda states, tokens: (  # type: ignore[method-assign]
            widths.append((len(states), sum(map(len, tokens)))) or together(states, tokens)
        )
        asked: list[tuple[list[int], int, Answer]] = []
        cancelled: set[int] = set()
        while len(asked) < 14 or engine.report().running:
            if len(asked) < 14 and draw.random() < 0.4:
                prompt = [draw.randrange(20, 2000) for _ in range(draw.choice([1, 9, 33, 150]))]
                if asked and draw.random() < 0.4:  # a chat that goes on
                    prompt = [*asked[-1][0], *asked[-1][2].tokens, *prompt]
                wanted = draw.randrange(1, 30)
                asked.append((prompt, wanted, submit(service, prompt, max_tokens=wanted)))
            if engine._roster.running and draw.random() < 0.03:
                victim = draw.choice(engine._roster.running)
                engine.cancel(victim.id)
                cancelled.add(id(victim.on_chunk.__self__))  # type: ignore[attr-defined]
            engine.step()
        assert max(widths)[0] >= 4 and min(widths)[0] >= 2
        assert any(tokens > rows for rows, tokens in widths), "pieces of prompts are read beside"
        report = engine.report()
        assert (report.running, report.waiting, report.kv_bytes, report.failed) == (0, 0, 0, 0)
        assert report.kv_set_aside_bytes == 0 and report.cached_tokens > 0
    assert not [record for record in caplog.records if record.levelname in ("WARNING", "ERROR")], caplog.text
    ties = []
    for prompt, wanted, answer in asked:
        assert isinstance(answer.last, Chunk)
        if id(answer) in cancelled and answer.last.finish_reason == "cancelled":
            assert len(answer.tokens) <= wanted
        else:
            assert len(answer.tokens) == wanted and answer.last.finish_reason == "length"
        if answer.tokens:
            ties += check_by_transformers(EMBEDDED_MODEL, prompt, answer.tokens)
    made = sum(len(answer.tokens) for *_, answer in asked)
    print("ties:", ties, "of", made)
    assert len(ties) <= made / 10_000


def test_each_row_has_its_own_alpha_and_its_own_substitutions() -> None:
    with local_service(EMBEDDED_MODEL, slot_memory=40 * 196_608, policy="importance", alpha=0.5) as service:
        stepped(service)
        prompt = list(range(300, 316))
        exact = submit(service, prompt, max_tokens=12, quality="exact")
        fast = submit(service, prompt, max_tokens=12)
        while service._engine.step():
            pass
    assert isinstance(exact.last, Chunk) and isinstance(fast.last, Chunk)
    assert exact.last.routing is not None and fast.last.routing is not None
    assert exact.last.routing.substituted == 0 and exact.last.routing.replaced_mass == 0.0
    assert fast.last.routing.substituted > 0 and fast.last.routing.replaced_mass > 0.0
    assert exact.last.routing.decisions == fast.last.routing.decisions > 0
    assert check_by_transformers(EMBEDDED_MODEL, prompt, exact.tokens) == []


@pytest.mark.parametrize("error", [ExpertUnavailableError("a worker is gone"), RuntimeError("shapes do not fit")])
def test_a_step_that_fails_is_run_again_for_each_alone(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the middle of a step, after some layers: the caches are half written, and are made anew."""
    with local_service(EMBEDDED_MODEL, slot_memory=None) as service:
        engine = stepped(service)._engine
        prompts = [list(range(40, 40 + length)) for length in (5, 11, 8)]
        answers = [submit(service, prompt, max_tokens=9) for prompt in prompts]
        for _ in range(3):
            engine.step()
        compute, calls = service.experts.compute, []

        def failing(layer: int, hidden_TH: torch.Tensor, experts_TK: torch.Tensor) -> torch.Tensor:
            calls.append(hidden_TH.shape[0])
            if layer == 3 and hidden_TH.shape[0] == 3:
                raise error
            return compute(layer, hidden_TH, experts_TK)

        monkeypatch.setattr(service.experts, "compute", failing)
        engine.step()
        monkeypatch.setattr(service.experts, "compute", compute)
        assert calls[:4] == [3, 3, 3, 3] and 3 not in calls[4:12]
        while engine.step():
            pass
        assert engine.report().failed == 0
        assert service.runner.joins == isinstance(error, ExpertUnavailableError), "what fails by itself is given up"
    for prompt, answer in zip(prompts, answers, strict=True):
        assert len(answer.tokens) == 9
        assert check_by_transformers(EMBEDDED_MODEL, prompt, answer.tokens) == []


def test_where_rows_do_not_join_each_has_steps_of_its_own(toys: Toys) -> None:
    with local_service(toys("minimax")) as service:
        engine = stepped(service)._engine
        assert not service.runner.joins
        prompts = [[17, 93, 5], [64, 28, 111, 42, 9]]
        answers = [submit(service, prompt, max_tokens=5) for prompt in prompts]
        while engine.step():
            pass
    for prompt, answer in zip(prompts, answers, strict=True):
        assert check_by_transformers(toys("minimax"), prompt, answer.tokens) == []


def test_decided_of_steps_of_other_lengths_are_sums() -> None:
    done = partial(Substituted, experts_TK=torch.empty(0), weights_TK=torch.empty(0))
    decided = Decided()
    decided.add(done(replaced_T=np.array([1, 0]), replaced_mass_T=np.array([0.5, 0.0], dtype=np.float32)))
    decided.add(done())
    decided.add(done(replaced_T=np.array([1, 2]), replaced_mass_T=np.array([0.25, 0.5], dtype=np.float32)))
    assert decided.substituted_T is not None and decided.substituted_T.tolist() == [2, 2]
    decided.add(done(replaced_T=np.array([3]), replaced_mass_T=np.array([0.25], dtype=np.float32)))
    assert (decided.substituted, decided.replaced_mass) == (7, 1.5)
