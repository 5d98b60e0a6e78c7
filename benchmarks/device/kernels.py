"""One token's experts by whoever can compute them, against the bound that memory sets; and where to decide."""

import time
from functools import partial
from typing import Any

import numpy as np
import torch
from transformers.integrations.moe import grouped_mm_experts_forward

from benchmarks.device.synthetic import Shape, moe_layers
from benchmarks.device.timing import graphed, seconds
from raymoe.experts.on_device import KernelRow, ModuleRow
from raymoe.experts.slots import SlotPool
from raymoe.kernels.gpu import GpuKernels
from raymoe.placement.routing import route

ROWS = (1, 2, 4, 8)


def experts_us(shape: Shape, module: Any, kernels: GpuKernels, slots: int, device: torch.device) -> dict[str, float]:
    """Microseconds of one layer's experts for one token, over slots chosen anew each time."""
    pool = SlotPool(moe_layers(shape)[0].shapes, slots, torch.bfloat16, device)
    pool.block.normal_(0.0, 0.02)
    hidden = torch.randn((1, shape.hidden), device=device, dtype=torch.bfloat16)
    weights = torch.rand(shape.top_k, device=device)
    random = np.random.default_rng(0)
    picks = [
        torch.from_numpy(random.permutation(slots)[: shape.top_k].astype(np.int64)).to(device)
        for _ in range(max(2, slots // shape.top_k))
    ]
    row, own = KernelRow(pool, kernels), ModuleRow(module, pool)
    found = {
        "triton": graphed(lambda i: row(hidden, picks[i % len(picks)], None, weights)),
        "batched_mm": graphed(lambda i: own(hidden, picks[i % len(picks)], None, weights), 4),
    }
    return {name: 1e6 * value for name, value in found.items()}


def rows_us(shape: Shape, module: Any, kernels: GpuKernels, slots: int, device: torch.device) -> dict[str, float]:
    """Microseconds for several tokens, each with experts of its own, by kernel and by ``grouped_mm``."""
    pool = SlotPool(moe_layers(shape)[0].shapes, slots, torch.bfloat16, device)
    pool.block.normal_(0.0, 0.02)
    own, random, found = ModuleRow(module, pool), np.random.default_rng(1), {}
    for rows in ROWS:
        hidden = torch.randn((rows, shape.hidden), device=device, dtype=torch.bfloat16)
        pick = np.stack([random.permutation(slots)[: shape.top_k] for _ in range(rows)])
        index = torch.from_numpy(pick.astype(np.int64)).to(device)
        weights = torch.rand((rows, shape.top_k), device=device, dtype=torch.bfloat16)
        by_kernel = partial(rows_by_kernel, kernels, pool, hidden, index.view(-1), weights.view(-1))
        found[f"triton_{rows}"] = 1e6 * graphed(by_kernel, 4)
        by_module = partial(rows_by_module, own._module, hidden, index, weights)
        try:
            by_module(0)
            found[f"grouped_mm_{rows}"] = 1e6 * seconds(by_module, 20)
        except (RuntimeError, NotImplementedError, ValueError) as error:
            print("grouped_mm can't:", str(error).splitlines()[0])
    return found


def rows_by_kernel(
    kernels: GpuKernels, pool: SlotPool, hidden: torch.Tensor, index_P: torch.Tensor, weights_P: torch.Tensor, _: int
) -> torch.Tensor:
    """[rows, H]"""
    first, down, stride = pool.stacked["gate_up_proj"], pool.stacked["down_proj"], pool.block.stride(0)
    inner = hidden.new_empty((len(index_P), down.shape[-1]))
    output = torch.empty_like(hidden)
    kernels.gate_up(hidden, first, stride, index_P, None, inner)
    kernels.down(inner, down, stride, index_P, None, weights_P, output, rows=len(hidden))
    return output


def rows_by_module(module: Any, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor, _: int) -> Any:
    """[rows, H]"""
    return grouped_mm_experts_forward(module, hidden, index, weights)


def route_on_device(
    scores_E: torch.Tensor, chosen_K: torch.Tensor, available_E: torch.Tensor, alpha: float
) -> torch.Tensor:
    """``placement.routing.route`` for one token in vectors, without a look from the host: the final experts [K]."""
    low = torch.finfo(scores_E.dtype).min
    rest_E = scores_E.index_fill(0, chosen_K, low)
    best = rest_E.max().clamp_min(0.0)
    chosen_scores_K = scores_E[chosen_K]
    unwanted_K = (chosen_scores_K < (1 + alpha) * best) & ~available_E[chosen_K]
    window_E = (rest_E > (1 - alpha) * best) & available_E
    candidates = torch.topk(torch.where(window_E, rest_E, low), len(chosen_K))
    order_K = torch.argsort(torch.where(unwanted_K, chosen_scores_K, torch.inf))
    replace_K = unwanted_K[order_K] & (candidates.values > low)
    final_K = chosen_K.clone()
    final_K[order_K] = torch.where(replace_K, candidates.indices, chosen_K[order_K])
    return final_K


def deciding_us(device: torch.device, experts: int = 128, top_k: int = 8, alpha: float = 0.25) -> dict[str, float]:
    """Microseconds of one token's substitution: by the host's rule, and by vectors on the device, which agree."""
    random = np.random.default_rng(2)
    cases = []
    for _ in range(32):
        logits = random.standard_normal(experts).astype(np.float32) * 1.5
        scores_E = np.exp(logits) / np.exp(logits).sum()
        cases.append((scores_E, np.argsort(-scores_E)[:top_k].astype(np.int64), random.random(experts) < 0.25))
    start = time.perf_counter()
    for scores_E, chosen_K, available_E in cases:
        routed = route(scores_E[None].copy(), chosen_K[None], available_E, alpha)
    host = (time.perf_counter() - start) / len(cases)
    there = [[torch.from_numpy(value).to(device) for value in case] for case in cases]

    def decide(case: list[torch.Tensor]) -> torch.Tensor:
        scores_E, chosen_K, available_E = case
        return route_on_device(scores_E, chosen_K, available_E, alpha)

    for (scores_E, chosen_K, available_E), mine in zip(cases, there, strict=True):
        routed = route(scores_E[None].copy(), chosen_K[None], available_E, alpha).experts_TK[0]
        assert sorted(routed.tolist()) == sorted(decide(mine).tolist()), "both decide alike"
    return {"host": 1e6 * host, "device": 1e6 * graphed(lambda i: decide(there[i % len(there)]), 8)}
