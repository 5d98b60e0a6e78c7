"""The GPU's kernels in torch operations, for tests on a CPU of what calls them."""

import time
from typing import Any

import torch
import torch.nn.functional as F

from raymoe.kernels.gpu import GpuKernels

TIMEOUT_S = 60.0


class TorchKernels(GpuKernels):
    """Computes what ``GpuKernels`` does, at once."""

    def __init__(self) -> None:
        """There is no module of kernels."""

    def linear(
        self, x_K: torch.Tensor, weight_NK: torch.Tensor, bias_N: torch.Tensor | None, output_N: torch.Tensor, *_: Any
    ) -> None:
        output_N.view(-1).copy_(F.linear(x_K.view(-1), weight_NK, bias_N))

    def rms_norm(
        self, x_RH: torch.Tensor, weight_H: torch.Tensor, epsilon: float, offset: float, early: bool, output: Any
    ) -> None:
        wide = x_RH.float() * torch.rsqrt(x_RH.float().pow(2).mean(-1, keepdim=True) + epsilon)
        wide = wide.to(output.dtype).float() if early else wide
        output.copy_(wide * (weight_H.float() + offset))

    def rope(
        self,
        mixed: torch.Tensor,
        cos_D: torch.Tensor,
        sin_D: torch.Tensor,
        position: torch.Tensor,
        norms: tuple[torch.Tensor, torch.Tensor] | None,
        epsilon: float,
        offset: float,
        early: bool,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
    ) -> None:
        place, half = int(position), query.shape[-1] // 2
        parts = list(mixed.split([query.shape[0], keys.shape[0], keys.shape[0]]))
        for number, weight in enumerate(norms or ()):
            normed = torch.empty_like(parts[number])
            self.rms_norm(parts[number], weight, epsilon, offset, early, normed)
            parts[number] = normed
        for target, heads in ((query, parts[0]), (keys[:, place], parts[1])):
            turned = torch.cat((-heads[:, half:], heads[:, :half]), dim=-1)
            target.copy_(heads * cos_D.view(-1) + turned * sin_D.view(-1))
        values[:, place].copy_(parts[2])

    def attend(
        self,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        position: torch.Tensor,
        scale: float,
        scratch: torch.Tensor,
        output: torch.Tensor,
    ) -> None:
        length, group = int(position) + 1, query.shape[0] // keys.shape[0]
        seen = (part[:, :length].repeat_interleave(group, dim=0) for part in (keys, values))
        output.view(-1).copy_(F.scaled_dot_product_attention(query[:, None], *seen, scale=scale).reshape(-1))

    def route(
        self,
        logits_E: torch.Tensor,
        sigmoid: bool,
        renormalised: bool,
        scale: float,
        experts_K: torch.Tensor,
        weights_K: torch.Tensor,
    ) -> None:
        logits = logits_E.view(-1).float()
        best = torch.topk(logits.sigmoid() if sigmoid else logits.softmax(-1), experts_K.numel())
        weights = best.values / best.values.sum() if renormalised else best.values
        experts_K.view(-1).copy_(best.indices)
        weights_K.view(-1).copy_(weights * scale)

    def publish(
        self,
        experts_K: torch.Tensor,
        weights_K: torch.Tensor,
        logits_E: torch.Tensor | None,
        coming_E: torch.Tensor | None,
        hidden_H: torch.Tensor | None,
        told: torch.Tensor,
    ) -> None:
        values = (experts_K, weights_K, logits_E, coming_E, hidden_H)
        parts = [part.view(-1).float() for part in values if part is not None]
        joined = torch.cat(parts)
        told[: joined.numel()].copy_(joined)

    def fetch(self, decided: torch.Tensor, turn: torch.Tensor, slots_K: torch.Tensor, weights_K: torch.Tensor) -> None:
        values, k = awaited(decided, int(turn) + 1), slots_K.numel()
        turn += 1
        slots_K.copy_(values[:k])
        weights_K.copy_(values[k:].view(torch.float32))

    def assist(self, sums: torch.Tensor, turn: torch.Tensor, slots_K: torch.Tensor, output_H: torch.Tensor) -> None:
        if int(slots_K.min()) < 0:
            output_H += awaited(sums, int(turn)).view(torch.float32)

    def gate_up(
        self,
        x_RH: torch.Tensor,
        weight: torch.Tensor,
        slot_stride: int,
        index_P: torch.Tensor,
        table: torch.Tensor | None,
        inner_PI: torch.Tensor,
        *_: Any,
    ) -> None:
        slots = (index_P if table is None else table[index_P]).tolist()
        for pair, slot in enumerate(slots):
            if slot < 0:
                inner_PI[pair] = 0
                continue
            gate, up = F.linear(x_RH[pair * x_RH.shape[0] // len(slots)], weight[slot]).chunk(2)
            inner_PI[pair] = F.silu(gate) * up

    def down(
        self,
        inner_PI: torch.Tensor,
        weight: torch.Tensor,
        slot_stride: int,
        index_P: torch.Tensor,
        table: torch.Tensor | None,
        weights_P: torch.Tensor | None,
        output: torch.Tensor,
        rows: int,
        *_: Any,
    ) -> None:
        slots = (index_P if table is None else table[index_P]).tolist()
        plain = torch.stack([F.linear(inner, weight[slot]) for inner, slot in zip(inner_PI, slots, strict=True)])
        if weights_P is not None:
            plain = (plain * weights_P.view(-1, 1)).view(rows, len(slots) // rows, -1).sum(dim=1)
        output.copy_(plain)


def awaited(words: torch.Tensor, turn: int) -> torch.Tensor:
    """The values of words of a turn, int32, as soon as all are."""
    deadline = time.monotonic() + TIMEOUT_S
    while int((words >> 32).min()) < turn:
        assert time.monotonic() < deadline, "the host did not answer"
        time.sleep(0)
    return words.to(torch.int32)
