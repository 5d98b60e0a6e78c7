"""The GPU's kernels compute what torch computes. Without a GPU they run in Triton's interpreter (conftest)."""

import threading
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton", reason="Triton is not installed; the GPU's kernels are tested where it is")

from raymoe.kernels.gpu import GpuKernels, load_gpu

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2}
DTYPES = (torch.float32, torch.bfloat16) if DEVICE == "cuda" else (torch.float32,)  # interpreted bfloat16 is slow


@pytest.fixture(scope="module")
def kernels() -> GpuKernels:
    loaded = load_gpu()
    assert loaded is not None
    return loaded


@pytest.fixture(params=DTYPES, ids=str)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


def randn(*shape: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape))).to(DEVICE, dtype)


def assert_alike(found: torch.Tensor, expected: torch.Tensor) -> None:
    scale = expected.float().abs().max().item() or 1.0
    torch.testing.assert_close(
        found.float(), expected.float(), rtol=0, atol=TOLERANCE[expected.dtype] * scale, check_stride=False
    )


@pytest.mark.parametrize(("rows", "columns", "bias"), [(7, 48, True), (40, 1100, False), (16, 64, False)])
def test_linear(kernels: GpuKernels, dtype: torch.dtype, rows: int, columns: int, bias: bool) -> None:
    x, weight = randn(columns, dtype=dtype), randn(rows, columns, dtype=dtype)
    offset = randn(rows, dtype=dtype, seed=1) if bias else None
    output = torch.full((rows,), torch.nan, device=DEVICE, dtype=dtype)
    kernels.linear(x, weight, offset, output)
    assert_alike(output, F.linear(x, weight, offset))


@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("early", [True, False])
def test_rms_norm(kernels: GpuKernels, dtype: torch.dtype, offset: float, early: bool) -> None:
    x, weight = randn(3, 80, dtype=dtype), randn(80, dtype=dtype)
    output = torch.full_like(x, torch.nan)
    kernels.rms_norm(x, weight, 1e-6, offset, early, output)
    wide = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-6)
    wide = wide.to(dtype).float() if early else wide
    assert_alike(output, (wide * (weight.float() + offset)).to(dtype))


def rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    half = x.shape[-1] // 2
    return x * cos + torch.cat((-x[..., half:], x[..., :half]), dim=-1) * sin


@pytest.mark.parametrize("normed", [True, False])
def test_rope_puts_keys_and_values_where_they_belong(kernels: GpuKernels, dtype: torch.dtype, normed: bool) -> None:
    heads, kv_heads, capacity, width, place = 4, 2, 10, 16, 7
    mixed = randn(heads + 2 * kv_heads, width, dtype=dtype)
    cos, sin = randn(width, dtype=dtype, seed=1), randn(width, dtype=dtype, seed=2)
    norms = (randn(width, dtype=dtype, seed=3), randn(width, dtype=dtype, seed=4)) if normed else None
    query = torch.full((heads, width), torch.nan, device=DEVICE, dtype=dtype)
    keys, values = randn(2, kv_heads, capacity, width, dtype=dtype).unbind(0)
    before = keys.clone(), values.clone()
    position = torch.tensor([[place]], device=DEVICE)
    kernels.rope(mixed, cos, sin, position, norms, 1e-6, 0.0, True, query, keys, values)

    def head_norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return (weight * (x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-6)).to(dtype)).to(dtype)

    q, k, v = mixed.split([heads, kv_heads, kv_heads])
    if norms is not None:
        q, k = head_norm(q, norms[0]), head_norm(k, norms[1])
    assert_alike(query, rotated(q, cos, sin))
    before[0][:, place], before[1][:, place] = rotated(k, cos, sin), v
    assert_alike(keys, before[0])
    assert_alike(values, before[1])


@pytest.mark.parametrize("length", [1, 64, 65, 150])
def test_attention_to_the_cache_so_far(kernels: GpuKernels, dtype: torch.dtype, length: int) -> None:
    heads, kv_heads, capacity, width = 6, 2, 192, 32
    query = randn(heads, width, dtype=dtype)
    keys, values = randn(2, kv_heads, capacity, width, dtype=dtype).unbind(0)
    keys[:, length:], values[:, length:] = torch.nan, torch.nan  # beyond its length a cache holds anything
    output = torch.full((heads * width,), torch.nan, device=DEVICE, dtype=dtype)
    scratch = torch.full((kernels.scratch_elements(heads, width, capacity),), torch.nan, device=DEVICE)
    kernels.attend(query, keys, values, torch.tensor([[length - 1]], device=DEVICE), 0.3, scratch, output)
    expected = F.scaled_dot_product_attention(
        query.view(1, heads, 1, width),
        keys[None, :, :length].repeat_interleave(heads // kv_heads, dim=1),
        values[None, :, :length].repeat_interleave(heads // kv_heads, dim=1),
        scale=0.3,
    )
    assert_alike(output, expected.reshape(-1))


@pytest.mark.parametrize("sigmoid", [True, False])
@pytest.mark.parametrize("renormalised", [True, False])
@pytest.mark.parametrize(("experts", "top_k"), [(8, 2), (60, 6)])
def test_route(kernels: GpuKernels, sigmoid: bool, renormalised: bool, experts: int, top_k: int) -> None:
    logits = randn(experts, dtype=torch.float32)
    chosen = torch.full((top_k,), -1, device=DEVICE)
    weights = torch.full((top_k,), torch.nan, device=DEVICE)
    kernels.route(logits, sigmoid, renormalised, 1.5, chosen, weights)
    scores = torch.sigmoid(logits) if sigmoid else torch.softmax(logits, dim=-1)
    best = torch.topk(scores, top_k)
    assert chosen.tolist() == best.indices.tolist()
    expected = best.values / best.values.sum() if renormalised else best.values
    assert_alike(weights, expected * 1.5)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter's, of what is no number
@pytest.mark.parametrize("sigmoid", [True, False])
@pytest.mark.parametrize("renormalised", [True, False])
@pytest.mark.parametrize(("experts", "broken"), [(8, [3]), (60, [59]), (60, list(range(60)))])
def test_what_is_no_number_is_routed_to_experts_that_exist(
    kernels: GpuKernels, sigmoid: bool, renormalised: bool, experts: int, broken: list[int]
) -> None:
    logits = randn(experts, dtype=torch.float32)
    logits[broken] = torch.nan
    chosen, weights = torch.full((4,), -1, device=DEVICE), torch.zeros(4, device=DEVICE)
    kernels.route(logits, sigmoid, renormalised, 1.0, chosen, weights)
    assert int(chosen.min()) >= 0 and int(chosen.max()) < experts
    assert weights.isnan().all(), "so that the request's outputs are seen to be none"


def test_published(kernels: GpuKernels) -> None:
    experts, weights = torch.tensor([5, 2, 9], device=DEVICE), randn(3, dtype=torch.float32)
    logits, coming, state = (randn(count, dtype=torch.float32) for count in (11, 7, 20))
    told = torch.full((3 + 3 + 11 + 7 + 20,), torch.nan, device=DEVICE)
    kernels.publish(experts, weights, logits, coming, state, told)
    expected = [5.0, 2.0, 9.0, *weights.tolist(), *logits.tolist(), *coming.tolist(), *state.tolist()]
    assert told.tolist() == expected
    kernels.publish(experts, weights * 2, None, None, None, told)
    assert told.tolist() == [5.0, 2.0, 9.0, *(weights * 2).tolist(), *expected[6:]]


def words(turn: int, values: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(values.view(np.uint32).astype(np.int64) | turn << 32).to(DEVICE)


def test_fetched_in_its_turn(kernels: GpuKernels) -> None:
    chosen, gates = np.array([5, -1, 9], dtype=np.int32), np.array([0.5, -0.0, 3e-9], dtype=np.float32)
    slots, weights = torch.zeros(3, dtype=torch.int64, device=DEVICE), torch.zeros(3, device=DEVICE)
    turn = torch.tensor([6], device=DEVICE)
    kernels.fetch(torch.cat((words(7, chosen), words(7, gates))), turn, slots, weights)
    assert slots.tolist() == chosen.tolist() and weights.tolist() == gates.tolist() and turn.tolist() == [7]


@pytest.mark.skipif(DEVICE == "cuda", reason="its memory is not the host's; the benchmark waits there")
def test_fetching_waits_for_every_word_of_the_turn(kernels: GpuKernels) -> None:
    gates = np.array([0.25, 0.75], dtype=np.float32)
    decided = torch.cat((words(1, np.array([8, 8], dtype=np.int32)), words(1, gates * 0)))
    slots, weights = torch.zeros(2, dtype=torch.int64), torch.zeros(2)
    answer = torch.cat((words(2, np.array([3, 4], dtype=np.int32)), words(2, gates)))
    fetching = threading.Thread(
        target=kernels.fetch, args=(decided, torch.ones(1, dtype=torch.int64), slots, weights), daemon=True
    )
    fetching.start()
    for place in range(4):
        assert fetching.is_alive() and slots.tolist() == [0, 0]
        decided[place] = answer[place]
    fetching.join(timeout=60)
    assert slots.tolist() == [3, 4] and weights.tolist() == gates.tolist()


@pytest.mark.parametrize("hosted", [True, False])
def test_what_the_host_computed_is_added(kernels: GpuKernels, dtype: torch.dtype, hosted: bool) -> None:
    output, sums = randn(300, dtype=dtype), randn(300, dtype=torch.float32)
    slots = torch.tensor([2, -1 if hosted else 0, 7], device=DEVICE)
    expected = (output.float() + sums).to(dtype) if hosted else output.clone()
    turn = torch.tensor([3], device=DEVICE)
    kernels.assist(words(3 if hosted else 2, sums.cpu().numpy()), turn, slots, output)
    assert output.tolist() == expected.tolist()


def test_experts_of_no_slot_add_nothing(kernels: GpuKernels, dtype: torch.dtype) -> None:
    slots, hidden, inner = 3, 64, 24
    stride = 3 * inner * hidden
    block = randn(slots, stride, dtype=dtype) * 0.2
    first = block.as_strided((slots, 2 * inner, hidden), (stride, hidden, 1))
    down = block.as_strided((slots, hidden, inner), (stride, inner, 1), 2 * inner * hidden)
    x, weights = randn(1, hidden, dtype=dtype), randn(3, dtype=torch.float32).abs()
    found = []
    for chosen in ([2, -1, 1], [2, 1]):
        index = torch.tensor(chosen, device=DEVICE)
        mine = torch.stack([weights[place] for place in (0, 1, 2) if len(chosen) == 3 or place != 1])
        inner_PI = torch.full((len(chosen), inner), torch.nan, device=DEVICE, dtype=dtype)
        output = torch.full((1, hidden), torch.nan, device=DEVICE, dtype=dtype)
        kernels.gate_up(x, first, stride, index, None, inner_PI)
        kernels.down(inner_PI, down, stride, index, None, mine, output, rows=1)
        found.append(output)
    assert_alike(found[0], found[1])


@pytest.mark.parametrize("with_table", [True, False])
@pytest.mark.parametrize(("hidden", "inner"), [(64, 24), (40, 600)])
def test_experts_in_slots(kernels: GpuKernels, dtype: torch.dtype, with_table: bool, hidden: int, inner: int) -> None:
    slots, rows, top_k = 5, 2, 3
    stride = 3 * inner * hidden + 16  # a slot may be longer than its expert
    block = randn(slots, stride, dtype=dtype) * 0.2
    first = block.as_strided((slots, 2 * inner, hidden), (stride, hidden, 1))
    down = block.as_strided((slots, hidden, inner), (stride, inner, 1), 2 * inner * hidden)
    x, weights = randn(rows, hidden, dtype=dtype), randn(rows * top_k, dtype=dtype).abs()
    index = torch.tensor([4, 0, 2, 1, 1, 3], device=DEVICE)
    table = torch.tensor([3, 2, 0, 4, 1], dtype=torch.int32, device=DEVICE) if with_table else None
    inner_PI = torch.full((rows * top_k, inner), torch.nan, device=DEVICE, dtype=dtype)
    plain = torch.full((rows * top_k, hidden), torch.nan, device=DEVICE, dtype=dtype)
    summed = torch.full((rows, hidden), torch.nan, device=DEVICE, dtype=dtype)
    kernels.gate_up(x, first, stride, index, table, inner_PI)
    kernels.down(inner_PI, down, stride, index, table, None, plain, rows)
    kernels.down(inner_PI, down, stride, index, table, weights, summed, rows)

    place = (index if table is None else table[index].long()).tolist()
    expected = []
    for pair, slot in enumerate(place):
        gate, up = F.linear(x[pair // top_k], first[slot]).chunk(2)
        expected.append(F.linear(F.silu(gate) * up, down[slot]))
    assert_alike(plain, torch.stack(expected))
    combined = (torch.stack(expected) * weights[:, None]).view(rows, top_k, hidden).sum(dim=1)
    assert_alike(summed, combined)


def test_triton_without_a_compiler_is_not_used(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    for name in ("CC", "TRITON_INTERPRET"):
        monkeypatch.delenv(name, raising=False)
    assert load_gpu() is None
