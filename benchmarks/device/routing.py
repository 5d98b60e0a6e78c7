"""Router logits for models without trained weights: uniform, which is the worst case, and typical.

Typical logits are the embedded model's own, read over held-out text: its skew and its habit of choosing again what it
chose before. A layer of the synthetic model gets a few of its layers' logits side by side, each over another stretch of
text, so that a softmax over all of them chooses.

N steps, L layers, E experts.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from raymoe.config import EMBEDDED_MODEL

CONTEXT = 256  # tokens of a text before the piece that is read


def embedded_logits(texts: list[list[int]], device: torch.device) -> list[np.ndarray]:
    """The embedded model's router logits over each text, [tokens, layers, experts]."""
    model: Any = AutoModelForCausalLM.from_pretrained(EMBEDDED_MODEL, dtype=torch.float32)
    model = model.to(device).eval()
    found = []
    for tokens in texts:
        with torch.inference_mode():
            output = model(torch.tensor([tokens], device=device), output_router_logits=True, use_cache=False)
        found.append(torch.stack(output.router_logits, dim=1).float().cpu().numpy())
    return found


def held_out(eval_texts: Path, domains: tuple[str, ...], tokenizer: Any, tokens: int) -> list[list[int]]:
    """A piece of so many tokens of each domain."""
    found = []
    for name in domains:
        ids: list[int] = tokenizer.encode((eval_texts / f"{name}.txt").read_text(), add_special_tokens=False)
        found.append(ids[CONTEXT : CONTEXT + tokens])
    return found


def typical(streams: list[np.ndarray], layers: int, experts: int, steps: int, seed: int) -> np.ndarray:
    """Logits [N, L, E] made of the embedded model's."""
    random = np.random.default_rng(seed)
    theirs = streams[0].shape[2]
    together = -(-experts // theirs)
    logits_NLE = np.empty((steps, layers, together * theirs), dtype=np.float32)
    for layer in range(layers):
        for part in range(together):
            stream = streams[random.integers(len(streams))]
            begin = random.integers(0, len(stream) - steps + 1)
            order = random.permutation(theirs)
            chosen = stream[begin : begin + steps, random.integers(stream.shape[1])][:, order]
            logits_NLE[:, layer, part * theirs : (part + 1) * theirs] = chosen
    return np.ascontiguousarray(logits_NLE[:, :, :experts])


def uniform(layers: int, experts: int, steps: int, seed: int) -> np.ndarray:
    """Logits [N, L, E] without favourites or memory: every expert is as likely in every step."""
    return np.random.default_rng(seed).standard_normal((steps, layers, experts), dtype=np.float32)


def chosen(logits: np.ndarray, top_k: int) -> np.ndarray:
    """The experts [.., K] that such logits choose."""
    return np.argpartition(-logits, top_k - 1, axis=-1)[..., :top_k]


def foretold(logits_NLE: np.ndarray, top_k: int, recall: float, seed: int) -> np.ndarray:
    """The logits as a predictor of this recall sees them: with as much noise as makes it name so many of the chosen."""
    random = np.random.default_rng(seed)
    noise_NLE = random.standard_normal(logits_NLE.shape, dtype=np.float32)
    spread = float(logits_NLE.std())
    low, high = 0.0, 4.0
    sample = slice(0, min(24, len(logits_NLE)))
    for _ in range(18):
        middle = (low + high) / 2
        found = recall_of(logits_NLE[sample], logits_NLE[sample] + middle * spread * noise_NLE[sample], top_k)
        low, high = (middle, high) if found > recall else (low, middle)
    return logits_NLE + np.float32(low * spread) * noise_NLE


def recall_of(logits: np.ndarray, seen: np.ndarray, top_k: int) -> float:
    """Share of what the first choose that the second choose too."""
    true, named = chosen(logits, top_k), chosen(seen, top_k)
    return float((true[..., :, None] == named[..., None, :]).any(-1).mean())


@dataclass(frozen=True, slots=True, kw_only=True)
class Locality:
    """What kind of routing some logits are.

    Attributes:
        again: share of a step's experts that the step before chose too.
        mass: share of the gate scores that the chosen ones have.
    """

    again: float
    mass: float


def locality(logits_NLE: np.ndarray, top_k: int) -> Locality:
    """Measured over all layers."""
    experts = chosen(logits_NLE, top_k)
    again = (experts[1:, :, :, None] == experts[:-1, :, None, :]).any(-1).mean()
    scores = np.exp(logits_NLE - logits_NLE.max(-1, keepdims=True))
    mass = np.take_along_axis(scores, experts, -1).sum(-1) / scores.sum(-1)
    return Locality(again=float(again), mass=float(mass.mean()))
