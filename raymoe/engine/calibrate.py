"""Make a similarity profile: run text through the model, and see which experts behave alike.

Text comes in sequences, each with a KV cache of its own. After each one the sums so far go to a file beside the
profile, so that an interrupted calibration continues where it was, with the very same result.

T tokens of a sequence, S sampled ones, E experts, K experts per token, H hidden, N tokens of one expert.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
import torch
import torch.nn.functional as F

from raymoe.checkpoint.checkpoint import Checkpoint
from raymoe.checkpoint.fingerprint import fingerprint
from raymoe.engine.corpus import generated_sequences
from raymoe.engine.host_experts import HostExperts
from raymoe.engine.profile import LayerProfile, Profile, critical_experts, read_tensors, write_tensors
from raymoe.errors import ConfigError
from raymoe.model.runner import Runner
from raymoe.model.trunk import build_trunk

PART_FORMAT = "raymoe-calibration-1"
SEED = 0
SAMPLED = 64  # tokens per sequence on which all experts are computed: a mean cosine over 512 has an error of about 0.01
SAMPLED_BYTES = 1 << 28  # of all experts' outputs at once; models with many wide experts sample fewer tokens
KEPT_SHARE = 0.5  # of free memory for experts; what does not fit is read again for every sequence

OnStage = Callable[[str], None]
OnTokens = Callable[[str, int, int], None]
"""Told of a stage that is under way: its name, tokens done, tokens in all."""


@dataclass(slots=True, kw_only=True)
class LayerSums:
    """What is known of one layer so far. Mutated in place.

    Attributes:
        together_EE: int64, tokens that chose both experts.
        output_EE: float64, sum of cosines between outputs.
        samples: how many tokens that sum is over.
    """

    together_EE: np.ndarray
    output_EE: np.ndarray
    samples: int = 0

    def profile(self) -> LayerProfile:
        """The means."""
        chosen_E = self.together_EE.diagonal()
        norm_EE = np.sqrt(np.outer(chosen_E, chosen_E).astype(np.float64))
        output_EE = (self.output_EE / max(1, self.samples)).astype(np.float32)
        return LayerProfile(
            coactivation_EE=(self.together_EE / np.maximum(norm_EE, 1)).astype(np.float32),
            output_EE=output_EE,
            chosen_E=chosen_E.copy(),
            critical_E=critical_experts(output_EE),
        )


class Observer:
    """An ``ExpertBackend`` that changes nothing, and adds up what it sees.

    Attributes:
        sums: one per layer; None while nothing is to be observed.
    """

    def __init__(self, checkpoint: Checkpoint, experts: HostExperts) -> None:
        self.sums: list[LayerSums] | None = None
        self._layers = checkpoint.layers
        self._experts = experts
        self._counts_TK = torch.empty(0)

    def route(
        self, layer: int, experts_TK: torch.Tensor, weights_TK: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The router's own choice. A weight of zero means that the token skips its expert."""
        self._counts_TK = weights_TK != 0
        return experts_TK, weights_TK

    def compute(self, layer: int, hidden_TH: torch.Tensor, experts_TK: torch.Tensor) -> torch.Tensor:
        """Unweighted output of every chosen expert for every token, [T, K, H]."""
        if self.sums is None:
            return self._experts.of_tokens(layer, hidden_TH, experts_TK)
        experts_P = experts_TK.reshape(-1).numpy().astype(np.int32)
        rows_P = np.repeat(np.arange(len(hidden_TH), dtype=np.int32), experts_TK.shape[1])
        output_PH = hidden_TH.new_empty((len(experts_P), hidden_TH.shape[1]))
        count = self._layers[layer].num_experts
        sampled_S = sample_rows(len(hidden_TH), count, hidden_TH.shape[1])
        unit_ESH = torch.empty((count, len(sampled_S), hidden_TH.shape[1]))
        for expert in range(count):
            mine_N = np.flatnonzero(experts_P == expert)
            rows = np.concatenate([rows_P[mine_N], sampled_S])
            outputs = self._experts(layer, np.full(len(rows), expert, dtype=np.int32), hidden_TH, rows)
            output_PH[torch.from_numpy(mine_N)] = outputs[: len(mine_N)]
            unit_ESH[expert] = F.normalize(outputs[len(mine_N) :].float(), dim=-1)
        observe(self.sums[layer], experts_TK, self._counts_TK, unit_ESH)
        return output_PH.view(*experts_TK.shape, -1)


def kept_bytes() -> int:
    """Memory for experts that stay, on this machine now."""
    return int(KEPT_SHARE * psutil.virtual_memory().available)


def sample_rows(tokens: int, experts: int, hidden: int) -> np.ndarray:
    """Evenly spaced places in a sequence, int32; the first token, which has no context, is none of them."""
    count = min(SAMPLED, tokens // 2, max(1, SAMPLED_BYTES // (experts * hidden * 4)))
    return ((np.arange(count, dtype=np.int32) + 1) * tokens // max(1, count) - 1).astype(np.int32)


def observe(sums: LayerSums, experts_TK: torch.Tensor, counts_TK: torch.Tensor, unit_ESH: torch.Tensor) -> None:
    """Add one sequence to a layer's sums.

    Args:
        counts_TK: bool, whether a choice counts.
        unit_ESH: float32, outputs of all experts for the sampled tokens, each of length 1.
    """
    experts = len(unit_ESH)
    chosen_TE = torch.zeros((len(experts_TK), experts)).scatter_(1, experts_TK, counts_TK.float())
    sums.together_EE += (chosen_TE.T @ chosen_TE).numpy().astype(np.int64)
    flat_EF = unit_ESH.reshape(experts, -1)
    sums.output_EE += (flat_EF @ flat_EF.T).numpy().astype(np.float64)
    sums.samples += unit_ESH.shape[1]


@dataclass(slots=True, kw_only=True)
class Calibration:
    """A calibration under way, as it lies in its file.

    Attributes:
        identity: what it is of: weights, precision, text. One of another identity can't be continued.
        sequences: the text.
        sums: over the first ``done`` sequences.
    """

    identity: dict[str, str]
    sequences: list[list[int]]
    sums: list[LayerSums]
    done: int = 0

    @property
    def tokens_done(self) -> int:
        """Tokens of the sequences that are done."""
        return sum(len(sequence) for sequence in self.sequences[: self.done])

    @property
    def tokens(self) -> int:
        """Tokens in all."""
        return sum(len(sequence) for sequence in self.sequences)

    def save(self, path: Path) -> None:
        """Write the file. Raises ConfigError where that can't be done."""
        tensors = {
            "ids": np.array([token for sequence in self.sequences for token in sequence], dtype=np.int64),
            "lengths": np.array([len(sequence) for sequence in self.sequences], dtype=np.int64),
            "samples": np.array([layer.samples for layer in self.sums], dtype=np.int64),
        }
        for index, layer in enumerate(self.sums):
            tensors |= {f"together.{index}": layer.together_EE, f"output.{index}": layer.output_EE}
        write_tensors(path, tensors, {**self.identity, "done": str(self.done)})

    @classmethod
    def load(cls, path: Path, identity: dict[str, str]) -> "Calibration | None":
        """What an earlier calibration of the same identity left; None where there is none to continue."""
        try:
            metadata, tensors = read_tensors(path)
            done = int(metadata.pop("done"))
            bounds = np.cumsum(tensors["lengths"])[:-1]
            sequences = [piece.tolist() for piece in np.split(tensors["ids"], bounds)]
            sums = [
                LayerSums(
                    together_EE=tensors[f"together.{index}"], output_EE=tensors[f"output.{index}"], samples=samples
                )
                for index, samples in enumerate(tensors["samples"].tolist())
            ]
        except (ConfigError, KeyError, ValueError):
            return None
        return cls(identity=identity, sequences=sequences, sums=sums, done=done) if metadata == identity else None


def calibrate(
    checkpoint: Checkpoint,
    output: Path,
    *,
    sequences: list[list[int]] | None,
    tokens: int,
    on_stage: OnStage = lambda stage: None,
    on_tokens: OnTokens = lambda stage, done, total: None,
) -> Profile:
    """Make a profile and write it to ``output``, continuing an interrupted one of the same weights and text.

    Args:
        sequences: token ids to run; None: ``tokens`` of what the model itself says.

    Raises:
        ConfigError: where ``output`` can't be written.
    """
    part = output.with_name(output.name + ".part")
    source = f"ids {text_sha256(sequences)}" if sequences else f"{tokens} tokens generated from seed {SEED}"
    identity = {
        "format": PART_FORMAT,
        "fingerprint": fingerprint(checkpoint),
        "dtype": str(checkpoint.dtype),
        "source": source,
    }
    work = Calibration.load(part, identity)
    if work is not None:
        on_stage(f"continuing after {work.tokens_done:,} of {work.tokens:,} tokens ({part})")
    elif part.exists():
        on_stage(f"{part} is of other weights or another text: starting anew")
    on_stage("building the trunk")
    observer = Observer(checkpoint, HostExperts(checkpoint, kept_bytes()))
    runner = Runner(build_trunk(checkpoint, observer, torch.device("cpu")))
    if work is None:
        sums = [empty_sums(layer.num_experts) for layer in checkpoint.layers]
        work = Calibration(identity=identity, sequences=sequences or [], sums=sums)
        write_tensors(part, {}, {})  # a place that can't be written to is told before the work, not after
        if not sequences:
            work.sequences = generated_sequences(
                runner, tokens, seed=SEED, on_tokens=lambda done: on_tokens("generating text", done, tokens)
            )
        work.save(part)
    observer.sums = work.sums
    for sequence in work.sequences[work.done :]:
        on_tokens("calibrating", work.tokens_done, work.tokens)
        runner.prefill(sequence)
        work.done += 1
        work.save(part)
    on_tokens("calibrating", work.tokens_done, work.tokens)
    profile = Profile(
        layers=tuple(layer.profile() for layer in work.sums),
        fingerprint=identity["fingerprint"],
        model_type=checkpoint.config.model_type,
        tokens=work.tokens,
        text_sha256=text_sha256(work.sequences),
    )
    profile.save(output)
    part.unlink()
    return profile


def empty_sums(experts: int) -> LayerSums:
    """A layer of which nothing is known."""
    return LayerSums(together_EE=np.zeros((experts, experts), np.int64), output_EE=np.zeros((experts, experts)))


def text_sha256(sequences: list[list[int]]) -> str:
    """Hex SHA-256 of token ids as little-endian int32."""
    ids = np.array([token for sequence in sequences for token in sequence], dtype="<i4")
    return hashlib.sha256(ids.tobytes()).hexdigest()
