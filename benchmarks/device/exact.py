"""The embedded model on a GPU: the tokens of transformers in float32, logits within its own spread in bfloat16."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from benchmarks.local import local_service
from raymoe.checkpoint.opening import open_checkpoint
from raymoe.config import EMBEDDED_MODEL, ClusterConfig
from raymoe.engine.service import ModelService
from raymoe.model.captured import CapturedDecode
from raymoe.types import Routing

PROMPT, ANSWER = 24, 64  # tokens
IMPLEMENTATIONS = ("eager", "batched_mm", "grouped_mm")


@contextmanager
def served(dtype: str, share: float, cuda_graphs: bool = True, **scheduling: Any) -> Iterator[ModelService]:
    """The embedded model with trunk and experts on the GPU, with slots for this share of its experts (1: all)."""
    checkpoint = open_checkpoint(str(EMBEDDED_MODEL), dtype)
    config = ClusterConfig.parse(
        {
            "model": {"dtype": dtype},
            "trunk": {"device": "cuda:0", "cuda_graphs": cuda_graphs},
            "devices": [
                {
                    "name": "gpu",
                    "kind": "cuda:0",
                    "transport": "local",
                    "slot_memory": int(checkpoint.routed_bytes * share),
                }
            ],
            "scheduling": scheduling,
        }
    )
    with local_service(checkpoint, config, load_all=config.scheduling.policy == "all_resident") as service:
        yield service


VARIANTS: dict[str, dict[str, Any]] = {
    "all_resident": {"share": 1.0, "policy": "all_resident"},
    "on_demand, a quarter": {"share": 0.25, "policy": "on_demand"},
    "importance, exact": {"share": 0.25, "policy": "importance", "alpha": 0.0},
    "on_demand, uncaptured": {"share": 0.25, "policy": "on_demand", "cuda_graphs": False},
}


def tokens_equal(prompts: list[list[int]]) -> dict[str, str]:
    """Per variant: "equal", or what differs and by how much of a logit; greedy, float32."""
    model: Any = AutoModelForCausalLM.from_pretrained(EMBEDDED_MODEL, dtype=torch.float32)
    model = model.cuda().eval()
    expected = [greedy(model, prompt) for prompt in prompts]
    found = {}
    for name, settings in VARIANTS.items():
        with served("float32", **settings) as service:
            answers = [
                list(service.generate(prompt, max_tokens=ANSWER, temperature=0.0, ignore_eos=True).token_ids)
                for prompt in prompts
            ]
            decode = service.runner.captured
            how = "uncaptured" if not isinstance(decode, CapturedDecode) else decode.refused or "captured"
        gaps = [gap(model, p, a) for p, a, e in zip(prompts, answers, expected, strict=True) if a != e]
        found[name] = f"{how}: " + ("equal" if not gaps else f"differs, {max(gaps):.2g} below the best logit")
    return found


def greedy(model: Any, prompt: list[int]) -> list[int]:
    """transformers' own answer."""
    ids = torch.tensor([prompt], device=model.device)
    output = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=ANSWER,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
        repetition_penalty=1.0,
    )
    return output[0, len(prompt) :].tolist()


@torch.inference_mode()
def gap(model: Any, prompt: list[int], answer: list[int]) -> float:
    """How far an answer's tokens lie below the best logit at most, by transformers."""
    logits = model(torch.tensor([prompt + answer], device=model.device)).logits[0, len(prompt) - 1 : -1].float()
    mine = logits.gather(1, torch.tensor(answer, device=model.device)[:, None])[:, 0]
    return float((logits.max(dim=1).values - mine).max())


@torch.inference_mode()
def spread(text: list[int]) -> dict[str, float]:
    """Root mean square distance from float32's logits: ours in bfloat16, and that of transformers' implementations."""
    ids = torch.tensor([text], device="cuda")
    exact: Any = AutoModelForCausalLM.from_pretrained(EMBEDDED_MODEL, dtype=torch.float32)
    exact = exact.cuda().eval()
    reference = exact(ids).logits[0, PROMPT - 1 :]
    found: dict[str, float] = {}
    for implementation in IMPLEMENTATIONS:
        model: Any = AutoModelForCausalLM.from_pretrained(
            EMBEDDED_MODEL, dtype=torch.bfloat16, experts_implementation=implementation
        )
        try:
            found[implementation] = distance(model.cuda().eval()(ids).logits[0, PROMPT - 1 :], reference)
        except (RuntimeError, NotImplementedError, ValueError) as error:
            print(f"{implementation} can't:", str(error).splitlines()[0])
    for name, settings in VARIANTS.items():
        if name != "importance, exact":
            with served("bfloat16", **settings) as service:
                found[f"raymoe {name}"] = distance(read(service, text), reference)
    return found


def distance(logits: torch.Tensor, reference: torch.Tensor) -> float:
    """Root mean square."""
    return float((logits.float() - reference.float()).square().mean().sqrt())


def read(service: ModelService, text: list[int]) -> torch.Tensor:
    """Logits after each token of a text from its ``PROMPT``-th on, read one by one. The prompt's cost is dropped."""
    runner = service.runner
    logits_V, state = runner.prefill(text[:PROMPT])
    service.experts.take_cost()
    return torch.stack([logits_V, *(runner.decode(state, token) for token in text[PROMPT:])])


def quality(texts: list[list[int]], alphas: tuple[float, ...]) -> dict[float, dict[str, float]]:
    """Perplexity, hits and substitutions of held-out text, decoded token by token with slots for a quarter of all."""
    found = {}
    for alpha in alphas:
        with served("float32", 0.25, policy="importance", alpha=alpha, host_assist=False) as service:
            service.experts.alpha = alpha
            nll, count, routing = 0.0, 0, Routing()
            for text in texts:
                logits = read(service, text)
                targets = torch.tensor(text[PROMPT:], device=logits.device)
                nll += float(torch.nn.functional.cross_entropy(logits[:-1], targets, reduction="sum"))
                count += len(targets)
                routing = routing + service.experts.take_cost()
            found[alpha] = {
                "perplexity": math.exp(nll / count),
                "hit_rate": routing.hit_rate,
                "substituted_gate_mass": routing.substituted_gate_mass,
            }
    return found
