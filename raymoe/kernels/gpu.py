"""What the decode step asks of a GPU's kernels, one method per kernel. See ``triton_kernels`` for what they compute.

Block sizes come from sweeps on an H100 and an H200. Every output is the caller's, so nothing is
allocated: calls can be captured into CUDA graphs.
"""

import importlib.util
import logging
import os
import shutil
from types import ModuleType
from typing import Any

import torch

log = logging.getLogger(__name__)

C_COMPILERS = ("gcc", "clang")  # that Triton looks for
MOST_EXPERTS = 1024  # of a layer: the router's kernel keeps all scores of a token in registers
MOST_COLUMNS = 1 << 15  # of a norm: one block holds a row
SPAN = 64  # places of the cache that one program attends to
ASSIST_BLOCK = 256  # elements of the host's sum that one program fetches
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def load_gpu() -> "GpuKernels | None":
    """The kernels, or None where Triton is not installed, or lacks the C compiler with which it builds launchers."""
    if importlib.util.find_spec("triton") is None:
        return None
    if os.environ.get("TRITON_INTERPRET") != "1" and not (os.environ.get("CC") or any(map(shutil.which, C_COMPILERS))):
        log.info("Triton finds no C compiler; decoding on the GPU goes through torch's kernels")
        return None
    from raymoe.kernels import triton_kernels

    return GpuKernels(triton_kernels)


def power_of_two(value: int) -> int:
    """The least one that is not less than ``value``."""
    return 1 << max(0, value - 1).bit_length()


class GpuKernels:
    """Launches kernels on the current stream. Shapes and letters are those of ``triton_kernels``.

    Args:
        kernels: the module that holds them.
    """

    def __init__(self, kernels: ModuleType) -> None:
        self._kernels = kernels

    @staticmethod
    def supports(dtype: torch.dtype) -> bool:
        """Whether the kernels compute in this precision."""
        return dtype in DTYPES

    def linear(
        self,
        x_K: torch.Tensor,
        weight_NK: torch.Tensor,
        bias_N: torch.Tensor | None,
        output_N: torch.Tensor,
        block: tuple[int, int, int] | None = None,
    ) -> None:
        """A linear layer for one row.

        Args:
            block: rows and columns per program and step, and warps; None: as fits the shape.
        """
        rows, columns = weight_NK.shape
        block_n, block_k, warps = block or linear_block(columns)
        self._kernels.linear_kernel[(-(-rows // block_n),)](
            x_K,
            weight_NK,
            weight_NK if bias_N is None else bias_N,
            output_N,
            rows,
            K=columns,
            HAS_BIAS=bias_N is not None,
            BLOCK_N=block_n,
            BLOCK_K=block_k,
            num_warps=warps,
        )

    def rms_norm(
        self, x_RH: torch.Tensor, weight_H: torch.Tensor, epsilon: float, offset: float, early: bool, output: Any
    ) -> None:
        """A root mean square norm of each row; the weight counts as ``weight_H + offset``."""
        columns = x_RH.shape[-1]
        block = power_of_two(columns)
        self._kernels.rms_norm_kernel[(x_RH.numel() // columns,)](
            x_RH,
            weight_H,
            output,
            epsilon,
            columns,
            OFFSET=offset,
            EARLY=early,
            BLOCK=block,
            num_warps=max(1, min(8, block // 256)),
        )

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
        """Norm and rotate the heads of one token, and put keys and values into the cache.

        Args:
            mixed: heads of queries, then of keys, then of values, [heads, D].
            query: takes the rotated queries, [query heads, D].
            keys, values: the cache, [key heads, C, D].
        """
        heads, width = query.shape
        kv_heads, capacity = keys.shape[0], keys.shape[1]
        query_norm, key_norm = norms or (mixed, mixed)
        self._kernels.rope_kernel[(heads + 2 * kv_heads,)](
            mixed,
            cos_D,
            sin_D,
            position,
            query_norm,
            key_norm,
            query,
            keys,
            values,
            epsilon,
            HEADS=heads,
            KV_HEADS=kv_heads,
            CAPACITY=capacity,
            D=width,
            HAS_NORM=norms is not None,
            OFFSET=offset,
            EARLY=early,
            num_warps=1,
        )

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
        """Attention of one token to the cache up to its position.

        Args:
            scratch: float32, as ``scratch_elements`` says.
        """
        heads, width = query.shape
        kv_heads, capacity = keys.shape[0], keys.shape[1]
        splits = -(-capacity // SPAN)
        part, best, total = scratch.split([heads * splits * width, heads * splits, heads * splits])
        self._kernels.attend_kernel[(kv_heads, splits)](
            query,
            keys,
            values,
            position,
            part,
            best,
            total,
            scale,
            GROUP=heads // kv_heads,
            GROUP_BLOCK=max(16, power_of_two(heads // kv_heads)),
            SPLITS=splits,
            SPAN=SPAN,
            CAPACITY=capacity,
            D=width,
            num_warps=4,
        )
        self._kernels.merge_kernel[(heads,)](
            part, best, total, output, SPLITS=splits, BLOCK=power_of_two(splits), D=width, num_warps=2
        )

    @staticmethod
    def scratch_elements(heads: int, width: int, capacity: int) -> int:
        """Of ``attend``."""
        return heads * -(-capacity // SPAN) * (width + 2)

    def route(
        self,
        logits_E: torch.Tensor,
        sigmoid: bool,
        renormalised: bool,
        scale: float,
        experts_K: torch.Tensor,
        weights_K: torch.Tensor,
    ) -> None:
        """The best experts of one token and their weights."""
        experts, top_k = logits_E.numel(), experts_K.numel()
        self._kernels.route_kernel[(1,)](
            logits_E,
            weights_K,
            experts_K,
            scale,
            E=experts,
            K=top_k,
            BLOCK_E=power_of_two(experts),
            BLOCK_K=power_of_two(top_k),
            SIGMOID=sigmoid,
            RENORMALISED=renormalised,
            num_warps=max(1, min(4, experts // 256)),  # reductions within a warp need no barrier: half the time
        )

    def publish(
        self,
        experts_K: torch.Tensor,
        weights_K: torch.Tensor,
        logits_E: torch.Tensor | None,
        coming_E: torch.Tensor | None,
        hidden_H: torch.Tensor | None,
        told: torch.Tensor,
    ) -> None:
        """Everything the host decides by, in one piece of float32: experts, weights, logits, foreseen logits, state."""
        top_k, experts, coming, hidden = experts_K.numel(), numel(logits_E), numel(coming_E), numel(hidden_H)
        self._kernels.publish_kernel[(1,)](
            experts_K,
            weights_K,
            weights_K if logits_E is None else logits_E,
            weights_K if coming_E is None else coming_E,
            weights_K if hidden_H is None else hidden_H,
            told,
            K=top_k,
            E=experts,
            NEXT=coming,
            H=hidden,
            BLOCK_K=power_of_two(top_k),
            BLOCK_E=power_of_two(experts),
            BLOCK_NEXT=power_of_two(coming),
            BLOCK_H=power_of_two(hidden),
            num_warps=4 if hidden else 1,
        )

    def fetch(self, decided: torch.Tensor, turn: torch.Tensor, slots_K: torch.Tensor, weights_K: torch.Tensor) -> None:
        """Wait for the host's slots and weights.

        Args:
            decided: int64 [2 K], words of turn and value; turn: int64 [1], how often this was run.
        """
        top_k = slots_K.numel()
        self._kernels.fetch_kernel[(1,)](
            decided, turn, slots_K, weights_K, K=top_k, BLOCK=power_of_two(2 * top_k), num_warps=1
        )

    def assist(self, sums: torch.Tensor, turn: torch.Tensor, slots_K: torch.Tensor, output_H: torch.Tensor) -> None:
        """Add what the host has computed, int64 [H] words of turn and value, if a slot of this turn is -1."""
        hidden, top_k = sums.numel(), slots_K.numel()
        self._kernels.assist_kernel[(-(-hidden // ASSIST_BLOCK),)](
            sums,
            turn,
            slots_K,
            output_H,
            H=hidden,
            K=top_k,
            BLOCK_K=power_of_two(top_k),
            BLOCK=ASSIST_BLOCK,
            num_warps=4,
        )

    def gate_up(
        self,
        x_RH: torch.Tensor,
        weight: torch.Tensor,
        slot_stride: int,
        index_P: torch.Tensor,
        table: torch.Tensor | None,
        inner_PI: torch.Tensor,
        block: tuple[int, int, int] | None = None,
    ) -> None:
        """silu(gate) * up of every pair.

        Args:
            weight: the first slot's fused gate and up, [2 I, H]; others lie ``slot_stride`` elements apart.
            index_P: each pair's slot, or, with a ``table`` of slots, its expert. Rows have equally many pairs each.
        """
        rows, hidden = x_RH.shape
        pairs, inner = inner_PI.shape
        block_i, block_h, warps = block or gate_up_block(hidden)
        self._kernels.gate_up_kernel[(-(-inner // block_i), pairs)](
            x_RH,
            weight,
            index_P,
            index_P if table is None else table,
            inner_PI,
            slot_stride,
            PER_ROW=pairs // rows,
            H=hidden,
            I=inner,
            HAS_TABLE=table is not None,
            BLOCK_I=block_i,
            BLOCK_H=block_h,
            num_warps=warps,
        )

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
        block: tuple[int, int, int] | None = None,
    ) -> None:
        """The down projection: [rows, H] summed by ``weights_P``, or [P, H] where there are none."""
        pairs, inner = inner_PI.shape
        hidden = output.shape[-1]
        block_h, block_i, warps = block or down_block(hidden, inner)
        self._kernels.down_kernel[(-(-hidden // block_h), rows)](
            inner_PI,
            weight,
            index_P,
            index_P if table is None else table,
            inner_PI if weights_P is None else weights_P,
            output,
            slot_stride,
            PER_ROW=pairs // rows,
            H=hidden,
            I=inner,
            HAS_TABLE=table is not None,
            WEIGHTED=weights_P is not None,
            BLOCK_H=block_h,
            BLOCK_I=block_i,
            num_warps=warps,
        )


def numel(tensor: torch.Tensor | None) -> int:
    """Elements, 0 of nothing."""
    return 0 if tensor is None else tensor.numel()


def linear_block(columns: int) -> tuple[int, int, int]:
    """Rows, columns and warps per program."""
    return 1, min(2048, power_of_two(columns)), 4


def gate_up_block(hidden: int) -> tuple[int, int, int]:
    """Rows of gate and of up, columns, warps."""
    return 2, min(2048, power_of_two(hidden)), 4


def down_block(hidden: int, inner: int) -> tuple[int, int, int]:
    """Rows, columns, warps."""
    return (1, min(1024, power_of_two(inner)), 1) if hidden < 4096 else (8, min(1024, power_of_two(inner)), 4)
