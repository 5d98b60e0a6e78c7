"""C++ kernels for one-row work on a CPU, compiled once where a compiler is found.

At decode a CPU reads each weight once; what costs beyond that is small operations. These kernels do a linear
layer, or a token's experts, in one call at the memory's rate. They are optional: without a compiler, or with
``RAYMOE_NATIVE=0``, everything runs through torch.

The library is a plain C interface loaded with ctypes; ``building`` makes it.
"""

import ctypes

import numpy as np
import torch

from raymoe.kernels.building import native_library

THREADED_BYTES = 1 << 18  # below this many bytes of weights, read once per row, waking threads costs more than it saves
LANES = 16  # of a vector in native.cpp: scores are padded to them
SUFFIX = {torch.float32: "f32", torch.bfloat16: "bf16"}


class NativeKernels:
    """The loaded library. Call through ``load_native``.

    Not thread safe: scratch memory belongs to the instance, so each worker and the trunk has its own.
    """

    def __init__(self, library: ctypes.CDLL, threads: int) -> None:
        self.threads = threads
        pointer, number = ctypes.c_void_p, ctypes.c_int64
        self._linear = {}
        self._experts = {}
        self._rms_norm = {}
        self._attention = {}
        self._gated = {}
        self._projections = {}
        self._attention_rows = {}
        self._quantized_experts = {}
        self._restore = library.raymoe_restore
        self._restore.argtypes = [ctypes.c_int, *[pointer] * 3, *[number] * 2, ctypes.c_int]
        self._restore.restype = ctypes.c_int
        for dtype, suffix in SUFFIX.items():
            linear = getattr(library, f"raymoe_linear_{suffix}")
            linear.argtypes = [pointer] * 4 + [number] * 3 + [pointer, ctypes.c_int]
            linear.restype = None
            experts = getattr(library, f"raymoe_experts_{suffix}")
            experts.argtypes = [pointer] * 6 + [number] * 4 + [pointer, ctypes.c_int]
            experts.restype = None
            rms_norm = getattr(library, f"raymoe_rms_norm_{suffix}")
            rms_norm.argtypes = [pointer] * 3 + [number] * 2 + [ctypes.c_float, ctypes.c_int]
            rms_norm.restype = None
            attention = getattr(library, f"raymoe_attention_{suffix}")
            attention.argtypes = [pointer] * 4 + [number] * 5 + [pointer, ctypes.c_float, pointer, ctypes.c_int]
            attention.restype = None
            gated = getattr(library, f"raymoe_gated_{suffix}")
            gated.argtypes = [pointer] * 5 + [number] * 3 + [pointer, ctypes.c_int]
            gated.restype = None
            projections = getattr(library, f"raymoe_projections_{suffix}")
            projections.argtypes = [pointer] * 5 + [number] * 5 + [pointer, ctypes.c_int, pointer, ctypes.c_int]
            projections.restype = None
            self._gated[dtype], self._projections[dtype] = gated, projections
            rows = getattr(library, f"raymoe_attention_rows_{suffix}")
            rows.argtypes = [pointer] * 3 + [number] * 5 + [ctypes.c_float, pointer, ctypes.c_int]
            rows.restype = None
            self._attention_rows[dtype] = rows
            quantized = getattr(library, f"raymoe_quantized_experts_{suffix}")
            quantized.argtypes = [ctypes.c_int, *[pointer] * 5, *[number] * 4, pointer, ctypes.c_int]
            quantized.restype = ctypes.c_int
            self._quantized_experts[dtype] = quantized
            self._linear[dtype], self._experts[dtype] = linear, experts
            self._rms_norm[dtype], self._attention[dtype] = rms_norm, attention
        self._scratch = torch.empty(0)
        self._scratch_pointer = 0

    @staticmethod
    def supports(dtype: torch.dtype, device: torch.device) -> bool:
        """Whether there are kernels for this precision and device."""
        return dtype in SUFFIX and device.type == "cpu"

    def linear(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor) -> None:
        """``out[t, n] = weight[n, k] @ x[t, k] + bias[n]``; all contiguous, of one dtype, on the CPU.

        A row of x gives the same bits alone and among others.
        """
        rows, columns = weight.shape
        count = x.numel() // columns
        self._linear[weight.dtype](
            weight.data_ptr(),
            None if bias is None else bias.data_ptr(),
            x.data_ptr(),
            out.data_ptr(),
            rows,
            columns,
            count,
            self._room(count * columns),
            self.threads if weight.nbytes * count >= THREADED_BYTES else 1,
        )

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, epsilon: float, early: bool, out: torch.Tensor) -> None:
        """Root mean square norm over the last dimension of ``x``; ``weight`` is float32.

        Args:
            early: round the normalised value to x's type before the weight is applied.
        """
        columns = weight.shape[0]
        self._rms_norm[x.dtype](
            x.data_ptr(), weight.data_ptr(), out.data_ptr(), x.numel() // columns, columns, epsilon, early
        )

    def attention(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, out: torch.Tensor) -> None:
        """One token's attention: q [heads, d] contiguous, k and v [kv_heads, length, d], out [heads, d of v]."""
        heads, d = q.shape
        kv_heads, length, dv = v.shape
        strides = (ctypes.c_int64 * 4)(k.stride(0), k.stride(1), v.stride(0), v.stride(1))
        self._attention[q.dtype](
            q.data_ptr(),
            k.data_ptr(),
            v.data_ptr(),
            out.data_ptr(),
            heads,
            kv_heads,
            length,
            d,
            dv,
            strides,
            scale,
            self._room(heads * (d + length + dv + LANES)),
            self.threads if k.nbytes >= THREADED_BYTES else 1,
        )

    def attention_rows(
        self, mixed: torch.Tensor, places: np.ndarray, heads: int, longest: int, scale: float, out: torch.Tensor
    ) -> None:
        """Attention of tokens of any sequences, each over its own cache, into which its keys and values are put first.

        Args:
            mixed: [tokens, heads + 2 kv_heads, d], contiguous, as ``projections`` gave it.
            places: int64 [tokens, 4], contiguous: addresses of the keys and the values of the token's sequence (both
                [kv_heads, capacity, d], contiguous), elements from head to head, and the token's position.
            heads: of queries.
            longest: positions that any token looks back on, its own included.
            out: [tokens, heads, d], contiguous.
        """
        tokens, rows, d = mixed.shape
        work = tokens * longest * rows * d * mixed.element_size()
        self._attention_rows[mixed.dtype](
            mixed.data_ptr(),
            places.ctypes.data,
            out.data_ptr(),
            tokens,
            heads,
            (rows - heads) // 2,
            d,
            longest,
            scale,
            self._room(tokens * heads * (2 * d + longest + LANES)),
            self.threads if work >= THREADED_BYTES else 1,
        )

    def gated(
        self, gate: torch.Tensor, up: torch.Tensor, down: torch.Tensor, x: torch.Tensor, out: torch.Tensor
    ) -> None:
        """``out[t, n] = down[n, i] @ (silu(gate[i, n] @ x[t, n]) * (up[i, n] @ x[t, n]))``.

        All are contiguous and of one dtype. A row of x gives the same bits alone and among others.
        """
        inner, hidden = gate.shape
        count = x.numel() // hidden
        self._gated[x.dtype](
            gate.data_ptr(),
            up.data_ptr(),
            down.data_ptr(),
            x.data_ptr(),
            out.data_ptr(),
            hidden,
            inner,
            count,
            self._room(count * (hidden + inner)),
            self.threads if 3 * gate.nbytes * count >= THREADED_BYTES else 1,
        )

    def projections(
        self,
        weights: np.ndarray,
        x: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        heads: int,
        out: torch.Tensor,
        epsilons: np.ndarray,
        early: bool,
    ) -> None:
        """Queries, keys and values of some tokens, rotated where they are to be.

        Args:
            weights: uint64, eight addresses, 0 for what there is not: the matrices of queries, keys and values, each
                with its bias, and in float32 the weights [d] of norms over the heads of queries and keys.
            x: [tokens, hidden], contiguous.
            cos, sin: [tokens, d], of the tokens' positions; contiguous, of x's type.
            heads: of queries.
            out: [tokens, heads + 2 kv_heads, d], contiguous: first the queries, then the keys, then the values.
            epsilons: float32, of the two norms.
            early: as for ``rms_norm``.
        """
        tokens, rows, d = out.shape
        hidden = x.numel() // tokens
        self._projections[x.dtype](
            weights.ctypes.data,
            x.data_ptr(),
            cos.data_ptr(),
            sin.data_ptr(),
            out.data_ptr(),
            heads,
            (rows - heads) // 2,
            d,
            hidden,
            tokens,
            epsilons.ctypes.data,
            early,
            self._room(tokens * hidden),
            self.threads if out.nbytes * hidden >= THREADED_BYTES else 1,
        )

    def experts(
        self,
        gate_up_pointers: int,
        down_pointers: int,
        index_P: np.ndarray,
        x_RH: torch.Tensor,
        rows_P: np.ndarray,
        inner: int,
        out_PH: torch.Tensor,
    ) -> None:
        """Gated SiLU experts: ``out[p] = down(silu(gate(x)) * up(x))`` for every pair.

        Args:
            gate_up_pointers, down_pointers: addresses of tables of weight addresses.
            index_P: int32, the table entry of each pair.
            rows_P: int32, the row of ``x_RH`` of each pair.
            inner: the intermediate size.
        """
        rows, hidden = x_RH.shape
        pairs = len(index_P)
        self._experts[x_RH.dtype](
            gate_up_pointers,
            down_pointers,
            index_P.ctypes.data,
            x_RH.data_ptr(),
            rows_P.ctypes.data,
            out_PH.data_ptr(),
            pairs,
            rows,
            hidden,
            inner,
            self._room(rows * hidden + pairs * inner),
            self.threads,
        )

    def quantized_experts(
        self,
        bits: int,
        table: int,
        index_P: np.ndarray,
        x_RH: torch.Tensor,
        rows_P: np.ndarray,
        inner: int,
        out_PH: torch.Tensor,
    ) -> None:
        """Gated SiLU experts whose weights are quantised; activations and sums are as in ``experts``.

        Args:
            bits: 16 (bfloat16), 8, 4, 3 or 2; native.cpp describes the forms.
            table: address of four addresses per expert: gate and up together, their scales, down, its scales.
            index_P: int32, the expert of each pair.
            x_RH: contiguous; H and ``inner`` are multiples of 4.
            rows_P: int32, the row of ``x_RH`` of each pair.
            inner: the intermediate size.
            out_PH: contiguous, of x's type.
        """
        rows, hidden = x_RH.shape
        pairs = len(index_P)
        unknown = self._quantized_experts[x_RH.dtype](
            bits,
            table,
            index_P.ctypes.data,
            x_RH.data_ptr(),
            rows_P.ctypes.data,
            out_PH.data_ptr(),
            pairs,
            rows,
            hidden,
            inner,
            self._room(rows * padded_floats(hidden) + pairs * padded_floats(inner)),
            self.threads,
        )
        assert not unknown, f"no kernel for {bits} bits"

    def restore(self, bits: int, codes: torch.Tensor, scales: torch.Tensor, out_OI: torch.Tensor) -> None:
        """The values of one quantised matrix of 8, 4, 3 or 2 bits, into ``out_OI`` in float32; all contiguous."""
        outputs, inputs = out_OI.shape
        unknown = self._restore(
            bits, codes.data_ptr(), scales.data_ptr(), out_OI.data_ptr(), outputs, inputs, self.threads
        )
        assert not unknown, f"no kernel for {bits} bits"

    def _room(self, floats: int) -> int:
        if floats > self._scratch.numel():
            self._scratch = torch.empty(2 * floats)
            self._scratch_pointer = self._scratch.data_ptr()
        return self._scratch_pointer


def padded_floats(columns: int) -> int:
    """Scratch of one row for quantised weights: padded to a multiple of 64, then the sum of each group of 32."""
    return -(-columns // 64) * 66


def load_native(threads: int) -> NativeKernels | None:
    """The kernels for ``threads`` threads, or None where they can't be built or are switched off."""
    library = native_library()
    return None if library is None else NativeKernels(library, threads)
