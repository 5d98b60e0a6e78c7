"""Native kernels give what torch gives, whatever the number of threads; skipped where no compiler is."""

import platform
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from predictor.quantize import matrix_form
from raymoe.experts.compute import WeightTable
from raymoe.kernels import building
from raymoe.kernels.building import COMPILERS, native_library
from raymoe.kernels.native import NativeKernels, load_native
from raymoe.model.fast import MOST_ROWS, FewRowsLinear, SmallNorm, small_norm

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


@pytest.fixture
def kernels() -> NativeKernels:
    loaded = load_native(1)
    if loaded is None and not any(map(shutil.which, COMPILERS)):
        pytest.skip("no C++ compiler")
    assert loaded is not None, "there is a compiler, so the kernels must build"
    return loaded


def random(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def close(actual: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> bool:
    return torch.allclose(actual.float(), expected.float(), rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype] * 4)


@DTYPES
@pytest.mark.parametrize("rows,columns", [(1, 1), (7, 33), (64, 128), (129, 40)])
def test_linear(kernels: NativeKernels, dtype: torch.dtype, rows: int, columns: int) -> None:
    weight, bias, x = random(rows, columns, dtype=dtype), random(rows, dtype=dtype), random(1, columns, dtype=dtype)
    out = torch.full((1, rows), torch.nan, dtype=dtype)
    kernels.linear(x, weight, bias, out)
    assert close(out, x.float() @ weight.float().T + bias.float(), dtype)


@DTYPES
def test_experts(kernels: NativeKernels, dtype: torch.dtype) -> None:
    hidden, inner, count = 40, 24, 5
    table = WeightTable(count)
    for index in range(count):
        weights = {
            "gate_up_proj": random(2 * inner, hidden + index, dtype=dtype)[:, :hidden].contiguous(),
            "down_proj": random(hidden, inner + index, dtype=dtype)[:, :inner].contiguous(),
        }
        table.put(index, weights)
    x = random(3, hidden, dtype=dtype)
    index = np.array([4, 0, 0, 2], dtype=np.int32)
    rows = np.array([0, 2, 1, 2], dtype=np.int32)
    out = torch.full((4, hidden), torch.nan, dtype=dtype)
    kernels.experts(table.first_pointers, table.down_pointers, index, x, rows, inner, out)
    for pair in range(4):
        weights = table.tensors[index[pair]]
        assert weights is not None
        gate, up = nn.functional.linear(x[rows[pair]], weights["gate_up_proj"]).chunk(2)
        assert close(out[pair], nn.functional.linear(nn.functional.silu(gate) * up, weights["down_proj"]), dtype)


@DTYPES
@pytest.mark.parametrize("heads,kv_heads,length,d,dv", [(8, 2, 37, 64, 64), (4, 4, 300, 48, 32), (6, 1, 1, 24, 16)])
def test_attention(
    kernels: NativeKernels, dtype: torch.dtype, heads: int, kv_heads: int, length: int, d: int, dv: int
) -> None:
    q, k = random(1, heads, 1, d, dtype=dtype), random(1, kv_heads, length, d, dtype=dtype)
    v = random(1, kv_heads, length + 3, dv, dtype=dtype)[:, :, 3:]  # a view with a stride of its own
    out = torch.full((heads, dv), torch.nan, dtype=dtype)
    kernels.attention(q.reshape(heads, d), k[0], v[0], 0.2, out)
    expected = nn.functional.scaled_dot_product_attention(
        q.float(), k.float(), v.float(), scale=0.2, enable_gqa=heads != kv_heads
    )
    assert close(out, expected[0, :, 0], dtype)


@DTYPES
def test_the_number_of_threads_does_not_change_a_bit(kernels: NativeKernels, dtype: torch.dtype) -> None:
    many = load_native(4)
    assert many is not None
    weight, x = random(2048, 512, dtype=dtype), random(1, 512, dtype=dtype)
    alone, together = torch.empty(1, 2048, dtype=dtype), torch.empty(1, 2048, dtype=dtype)
    kernels.linear(x, weight, None, alone)
    for _ in range(50):
        together.fill_(torch.nan)
        many.linear(x, weight, None, together)
        assert torch.equal(alone, together)


class PlainNorm(nn.Module):
    """As most architectures have it; ``offset`` as in those that store the weight minus one."""

    def __init__(self, size: int, dtype: torch.dtype, offset: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(random(size, dtype=dtype) * 0.1 + 1 - offset)
        self.variance_epsilon = 1e-6
        self.offset = offset

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = x.float()
        normal = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        if self.offset:
            return (normal * (self.offset + self.weight.float())).to(x.dtype)
        return self.weight * normal.to(x.dtype)


class OtherNorm(PlainNorm):
    """Not a root mean square norm, whatever its name would say."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.weight


@DTYPES
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_a_norm_is_replaced_where_the_kernel_does_the_same(
    kernels: NativeKernels, dtype: torch.dtype, offset: float
) -> None:
    module = PlainNorm(48, dtype, offset)
    replacement = small_norm(module, kernels)
    assert isinstance(replacement, SmallNorm)
    x = random(1, 2, 48, dtype=dtype)
    with torch.no_grad():
        assert close(replacement(x), module(x), dtype)


def test_a_norm_that_does_something_else_keeps_its_own_forward(kernels: NativeKernels) -> None:
    assert small_norm(OtherNorm(48, torch.float32, 0.0), kernels) is None


def test_many_rows_take_the_modules_own_way(kernels: NativeKernels) -> None:
    module = nn.Linear(16, 8).requires_grad_(False)
    for shape in ((MOST_ROWS + 1, 16), (2, MOST_ROWS, 16), (0, 16)):
        x = random(*shape, dtype=torch.float32)
        assert torch.equal(FewRowsLinear(module, kernels)(x), module(x))


@DTYPES
@pytest.mark.parametrize("rows", range(1, MOST_ROWS + 1))
def test_a_row_of_few_has_the_bits_that_it_has_alone(kernels: NativeKernels, dtype: torch.dtype, rows: int) -> None:
    module = nn.Linear(40, 71).to(dtype).requires_grad_(False)
    x = random(1, rows, 40, dtype=dtype)
    linear = FewRowsLinear(module, kernels)
    together = linear(x)
    assert together.shape == (1, rows, 71) and close(together, module(x), dtype)
    assert torch.equal(together, torch.cat([linear(x[:, row : row + 1]) for row in range(rows)], dim=1))


@pytest.fixture
def unloaded(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """The library forgotten, so that the environment a test sets decides how it is loaded; forgotten again after."""
    native_library.cache_clear()
    yield monkeypatch
    native_library.cache_clear()


def test_they_can_be_switched_off(unloaded: pytest.MonkeyPatch) -> None:
    unloaded.setenv("RAYMOE_NATIVE", "0")
    assert load_native(1) is None


def test_without_a_working_compiler_there_are_none(unloaded: pytest.MonkeyPatch, tmp_path) -> None:
    unloaded.setenv("CXX", "/bin/false")
    unloaded.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert load_native(1) is None


@pytest.fixture
def prebuilt(unloaded: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A library built for many processors, on a machine that has no compiler from then on."""
    if building.find_compiler() is None or platform.machine() not in building.PORTABLE:
        pytest.skip("no C++ compiler, or an unknown kind of processor")
    library = building.build_portable(tmp_path / "prebuilt.so")
    unloaded.delenv("CXX", raising=False)
    unloaded.setenv("PATH", str(tmp_path))
    unloaded.setattr(building, "PREBUILT", library)
    return library


def test_without_a_compiler_what_was_built_elsewhere_is_taken(prebuilt: Path) -> None:
    loaded = load_native(1)
    assert loaded is not None
    weight, x = random(24, 40, dtype=torch.float32), random(1, 40, dtype=torch.float32)
    out = torch.empty(1, 24)
    loaded.linear(x, weight, None, out)
    torch.testing.assert_close(out, x @ weight.T, rtol=1e-5, atol=1e-5)


def test_on_a_processor_that_it_was_not_built_for_it_is_not(prebuilt: Path, unloaded: pytest.MonkeyPatch) -> None:
    unloaded.setattr(building, "_processor", lambda: "flags : sse2")
    assert load_native(1) is None


def test_what_is_no_library_is_passed_over(prebuilt: Path) -> None:
    prebuilt.write_bytes(b"no library")
    assert load_native(1) is None


@pytest.mark.parametrize("bits", [16, 8, 4, 3, 2])
@DTYPES
@pytest.mark.parametrize("hidden,inner", [(40, 24), (64, 128), (100, 36), (256, 64)])
def test_quantized_experts(kernels: NativeKernels, bits: int, dtype: torch.dtype, hidden: int, inner: int) -> None:
    form = matrix_form(bits)
    firsts = [form.store(random(2 * inner, hidden + index, dtype=torch.float32)[:, :hidden]) for index in range(5)]
    downs = [form.store(random(hidden, inner + index, dtype=torch.float32)[:, :inner]) for index in range(5)]
    table = np.array(
        [
            [part.data_ptr() for matrix in pair for part in (matrix.codes, matrix.scales)]
            for pair in zip(firsts, downs, strict=True)
        ],
        dtype=np.uint64,
    )
    x = random(3, hidden, dtype=dtype) / hidden**0.5
    index = np.array([4, 0, 0, 2], dtype=np.int32)
    rows = np.array([0, 2, 1, 2], dtype=np.int32)
    out = torch.full((4, hidden), torch.nan, dtype=dtype)
    kernels.quantized_experts(bits, table.ctypes.data, index, x, rows, inner, out)
    for pair in range(4):
        first = form.restore(firsts[index[pair]], (2 * inner, hidden), torch.float32)
        down = form.restore(downs[index[pair]], (hidden, inner), torch.float32)
        gate, up = nn.functional.linear(x[rows[pair]].float(), first).chunk(2)
        assert close(out[pair], nn.functional.linear(nn.functional.silu(gate) * up, down), dtype)


@pytest.mark.parametrize("bits", [8, 4, 3, 2])
@pytest.mark.parametrize("shape", [(1, 1), (7, 33), (130, 100)])
def test_restored_weights_are_those_of_the_form(kernels: NativeKernels, bits: int, shape: tuple[int, int]) -> None:
    form = matrix_form(bits)
    stored = form.store(random(*shape, dtype=torch.float32))
    guarded = torch.full((shape[0] + 1, shape[1]), torch.nan)
    kernels.restore(bits, stored.codes, stored.scales, guarded[:-1])
    assert torch.allclose(guarded[:-1], form.restore(stored, shape, torch.float32), rtol=1e-6, atol=1e-6)
    assert guarded[-1].isnan().all()  # nothing was written behind the matrix


@pytest.mark.parametrize("bits", [16, 8, 4, 3, 2])
def test_threads_do_not_change_a_bit_of_quantized_experts(kernels: NativeKernels, bits: int) -> None:
    many = load_native(4)
    assert many is not None
    form = matrix_form(bits)
    first, down = form.store(random(512, 256, dtype=torch.float32)), form.store(random(256, 256, dtype=torch.float32))
    table = np.array([[part.data_ptr() for part in (first.codes, first.scales, down.codes, down.scales)]], np.uint64)
    x, zero = random(1, 256, dtype=torch.float32), np.zeros(1, dtype=np.int32)
    alone, together = torch.empty(1, 256), torch.empty(1, 256)
    kernels.quantized_experts(bits, table.ctypes.data, zero, x, zero, 256, alone)
    for _ in range(20):
        together.fill_(torch.nan)
        many.quantized_experts(bits, table.ctypes.data, zero, x, zero, 256, together)
        assert torch.equal(alone, together)
