"""Decode kernels for one token on a GPU, in Triton: linear layer, norm, attention over a cache of fixed size, router,
and experts in slots. Products accumulate in float32; what the architectures round to their own precision between two
operations is rounded here too.

H hidden, I intermediate, N rows of a weight, K its columns, D width of a head, C capacity of the cache, E experts.
"""

# type annotations of Triton's parameters say which are compile-time constants, so mypy has no use for this file
# mypy: ignore-errors

import triton
import triton.language as tl


@triton.jit
def linear_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    output_ptr,
    N,
    K: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """output[n] = weight[n, :] . x (+ bias[n]); one row."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    rows = weight_ptr + n[:, None].to(tl.int64) * K
    total = tl.zeros((BLOCK_N, BLOCK_K), dtype=tl.float32)
    for start in range(0, K, BLOCK_K):
        inside = start + k < K
        x = tl.load(x_ptr + start + k, mask=inside, other=0.0).to(tl.float32)
        w = tl.load(rows + (start + k)[None, :], mask=(n < N)[:, None] & inside[None, :], other=0.0)
        total += w.to(tl.float32) * x[None, :]
    y = tl.sum(total, axis=1)
    if HAS_BIAS:
        y += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)
    tl.store(output_ptr + n, y, mask=n < N)


@triton.jit
def rms_norm_kernel(
    x_ptr, weight_ptr, output_ptr, epsilon, columns, OFFSET: tl.constexpr, EARLY: tl.constexpr, BLOCK: tl.constexpr
):
    """One row per program. EARLY: the normalised value is rounded before the weight is applied."""
    row = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    inside = column < columns
    x = tl.load(x_ptr + row * columns + column, mask=inside, other=0.0).to(tl.float32)
    y = x * tl.rsqrt(tl.sum(x * x, axis=0) / columns + epsilon)
    weight = tl.load(weight_ptr + column, mask=inside, other=0.0).to(tl.float32) + OFFSET
    if EARLY:
        y = y.to(output_ptr.dtype.element_ty).to(tl.float32)
    tl.store(output_ptr + row * columns + column, y * weight, mask=inside)


@triton.jit
def rope_kernel(
    mixed_ptr,
    cos_ptr,
    sin_ptr,
    position_ptr,
    query_norm_ptr,
    key_norm_ptr,
    query_ptr,
    keys_ptr,
    values_ptr,
    epsilon,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    CAPACITY: tl.constexpr,
    D: tl.constexpr,
    HAS_NORM: tl.constexpr,
    OFFSET: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Heads of queries, keys and values, which lie one after the other: norm, rotate half against half, and put keys
    and values into the cache [KV_HEADS, CAPACITY, D] at the position. One head per program."""
    head = tl.program_id(0)
    half = tl.arange(0, D // 2)
    dtype = query_ptr.dtype.element_ty
    x1 = tl.load(mixed_ptr + head * D + half).to(tl.float32)
    x2 = tl.load(mixed_ptr + head * D + D // 2 + half).to(tl.float32)
    position = tl.load(position_ptr).to(tl.int64)
    place = ((head - HEADS) % KV_HEADS) * CAPACITY * D + position * D
    if head < HEADS + KV_HEADS:
        if HAS_NORM:
            norm_ptr = query_norm_ptr
            if head >= HEADS:
                norm_ptr = key_norm_ptr
            scale = tl.rsqrt((tl.sum(x1 * x1, axis=0) + tl.sum(x2 * x2, axis=0)) / D + epsilon)
            w1 = tl.load(norm_ptr + half).to(tl.float32) + OFFSET
            w2 = tl.load(norm_ptr + D // 2 + half).to(tl.float32) + OFFSET
            x1, x2 = x1 * scale, x2 * scale
            if EARLY:
                x1, x2 = x1.to(dtype).to(tl.float32), x2.to(dtype).to(tl.float32)
            x1, x2 = (x1 * w1).to(dtype).to(tl.float32), (x2 * w2).to(dtype).to(tl.float32)
        c1 = tl.load(cos_ptr + half).to(tl.float32)
        c2 = tl.load(cos_ptr + D // 2 + half).to(tl.float32)
        s1 = tl.load(sin_ptr + half).to(tl.float32)
        s2 = tl.load(sin_ptr + D // 2 + half).to(tl.float32)
        y1, y2 = x1 * c1 - x2 * s1, x2 * c2 + x1 * s2
        if head < HEADS:
            tl.store(query_ptr + head * D + half, y1)
            tl.store(query_ptr + head * D + D // 2 + half, y2)
        else:
            tl.store(keys_ptr + place + half, y1)
            tl.store(keys_ptr + place + D // 2 + half, y2)
    else:
        tl.store(values_ptr + place + half, x1)
        tl.store(values_ptr + place + D // 2 + half, x2)


@triton.jit
def attend_kernel(
    query_ptr,
    keys_ptr,
    values_ptr,
    position_ptr,
    part_ptr,
    best_ptr,
    sum_ptr,
    scale,
    GROUP: tl.constexpr,
    GROUP_BLOCK: tl.constexpr,
    SPLITS: tl.constexpr,
    SPAN: tl.constexpr,
    CAPACITY: tl.constexpr,
    D: tl.constexpr,
):
    """One key head and one span of the cache per program: the queries of its group attend to the span alone.

    What spans give is merged by ``merge_kernel``: part [KV_HEADS * GROUP, SPLITS, D], best and sum [.., SPLITS].
    """
    kv_head, split = tl.program_id(0), tl.program_id(1)
    g, d, place = tl.arange(0, GROUP_BLOCK), tl.arange(0, D), split * SPAN + tl.arange(0, SPAN)
    length = tl.load(position_ptr).to(tl.int32) + 1
    slot = (kv_head * GROUP + g) * SPLITS + split
    mine = g < GROUP
    if split * SPAN < length:
        seen = place < length
        query = tl.load(query_ptr + (kv_head * GROUP + g)[:, None] * D + d[None, :], mask=mine[:, None], other=0.0)
        base = (kv_head * CAPACITY + place)[:, None] * D + d[None, :]
        keys = tl.load(keys_ptr + base, mask=seen[:, None], other=0.0)
        scores = tl.dot(query, tl.trans(keys), input_precision="ieee") * scale
        scores = tl.where(seen[None, :], scores, -float("inf"))
        best = tl.max(scores, axis=1)
        weights = tl.exp(scores - best[:, None])
        values = tl.load(values_ptr + base, mask=seen[:, None], other=0.0)
        part = tl.dot(weights.to(values.dtype), values, input_precision="ieee")
        tl.store(part_ptr + slot[:, None] * D + d[None, :], part, mask=mine[:, None])
        tl.store(best_ptr + slot, best, mask=mine)
        tl.store(sum_ptr + slot, tl.sum(weights, axis=1), mask=mine)
    else:
        tl.store(best_ptr + slot, tl.full((GROUP_BLOCK,), -float("inf"), tl.float32), mask=mine)


@triton.jit
def merge_kernel(part_ptr, best_ptr, sum_ptr, output_ptr, SPLITS: tl.constexpr, BLOCK: tl.constexpr, D: tl.constexpr):
    """Attention of one head from its spans; spans beyond the length have best -inf and hold nothing."""
    head = tl.program_id(0)
    split, d = tl.arange(0, BLOCK), tl.arange(0, D)
    best = tl.load(best_ptr + head * SPLITS + split, mask=split < SPLITS, other=-float("inf"))
    weight = tl.exp(best - tl.max(best, axis=0))
    held = (split < SPLITS) & (best > -float("inf"))
    total = tl.sum(weight * tl.load(sum_ptr + head * SPLITS + split, mask=held, other=0.0), axis=0)
    part = tl.load(part_ptr + (head * SPLITS + split)[:, None] * D + d[None, :], mask=held[:, None], other=0.0)
    tl.store(output_ptr + head * D + d, tl.sum(part * weight[:, None], axis=0) / total)


@triton.jit
def route_kernel(
    logits_ptr,
    weights_ptr,
    experts_ptr,
    scale,
    E: tl.constexpr,
    K: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SIGMOID: tl.constexpr,
    RENORMALISED: tl.constexpr,
):
    """The K best experts of one token by softmax or sigmoid of its logits, and their weights. Ties: the lower one.

    Of a broken model's logits, that are no numbers, weights are none either, and experts are some that exist.
    """
    expert, place = tl.arange(0, BLOCK_E), tl.arange(0, BLOCK_K)
    logits = tl.load(logits_ptr + expert, mask=expert < E, other=-float("inf")).to(tl.float32)
    if SIGMOID:
        scores = tl.sigmoid(logits)
    else:
        scores = tl.exp(logits - tl.max(logits, axis=0))
        scores = scores / tl.sum(scores, axis=0)
    rest = tl.where(expert < E, scores, -1.0)
    chosen = tl.zeros((BLOCK_K,), dtype=tl.int32)
    weights = tl.zeros((BLOCK_K,), dtype=tl.float32)
    for k in tl.static_range(K):
        best = tl.max(rest, axis=0)
        index = tl.minimum(tl.min(tl.where(rest == best, expert, BLOCK_E), axis=0), E - 1)
        chosen = tl.where(place == k, index, chosen)
        weights = tl.where(place == k, best, weights)
        rest = tl.where(expert == index, -1.0, rest)
    if RENORMALISED:
        weights = weights / tl.sum(weights, axis=0)
    total = tl.sum(tl.where(expert < E, scores, 0.0), axis=0)
    weights = tl.where(total == total, weights, float("nan"))
    tl.store(experts_ptr + place, chosen.to(tl.int64), mask=place < K)
    tl.store(weights_ptr + place, weights * scale, mask=place < K)


@triton.jit
def publish_kernel(
    experts_ptr,
    weights_ptr,
    logits_ptr,
    next_ptr,
    hidden_ptr,
    told_ptr,
    K: tl.constexpr,
    E: tl.constexpr,
    NEXT: tl.constexpr,
    H: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_NEXT: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """What the host decides by, float32 in one piece: [K] experts, [K] weights, [E] logits, [NEXT] foreseen logits, and
    the state [H]."""
    place, expert, coming = tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_E), tl.arange(0, BLOCK_NEXT)
    tl.store(told_ptr + place, tl.load(experts_ptr + place, mask=place < K, other=0).to(tl.float32), mask=place < K)
    weights = tl.load(weights_ptr + place, mask=place < K, other=0.0).to(tl.float32)
    tl.store(told_ptr + K + place, weights, mask=place < K)
    if E > 0:
        logits = tl.load(logits_ptr + expert, mask=expert < E, other=0.0).to(tl.float32)
        tl.store(told_ptr + 2 * K + expert, logits, mask=expert < E)
    if NEXT > 0:
        foreseen = tl.load(next_ptr + coming, mask=coming < NEXT, other=0.0).to(tl.float32)
        tl.store(told_ptr + 2 * K + E + coming, foreseen, mask=coming < NEXT)
    if H > 0:
        h = tl.arange(0, BLOCK_H)
        hidden = tl.load(hidden_ptr + h, mask=h < H, other=0.0).to(tl.float32)
        tl.store(told_ptr + 2 * K + E + NEXT + h, hidden, mask=h < H)


@triton.jit
def fetch_kernel(decided_ptr, turn_ptr, slots_ptr, weights_ptr, K: tl.constexpr, BLOCK: tl.constexpr):
    """Wait for what the host decides, [K] slots and [K] weights, and put it into device memory.

    A word of ``decided`` is 64 bits: the turn that it belongs to, and 32 bits of value. So no order among the host's
    writes has to be relied on. ``turn`` counts how often this was run.
    """
    place = tl.arange(0, BLOCK)
    turn = tl.load(turn_ptr) + 1
    words = tl.load(decided_ptr + place, mask=place < 2 * K, other=0x7FFFFFFFFFFFFFFF, volatile=True)
    while tl.min(words >> 32, axis=0) < turn:
        words = tl.load(decided_ptr + place, mask=place < 2 * K, other=0x7FFFFFFFFFFFFFFF, volatile=True)
    tl.store(turn_ptr, turn)
    value = words.to(tl.int32)
    tl.store(slots_ptr + place, value.to(tl.int64), mask=place < K)
    tl.store(weights_ptr + place - K, value.to(tl.float32, bitcast=True), mask=(place >= K) & (place < 2 * K))


@triton.jit
def assist_kernel(
    sum_ptr,
    turn_ptr,
    slots_ptr,
    output_ptr,
    H: tl.constexpr,
    K: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Add what the host has computed, [H] words as in ``fetch_kernel``, where a slot is -1: its own expert."""
    place, h = tl.arange(0, BLOCK_K), tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    slots = tl.load(slots_ptr + place, mask=place < K, other=0)
    if tl.min(slots, axis=0) < 0:
        turn = tl.load(turn_ptr)
        words = tl.load(sum_ptr + h, mask=h < H, other=0x7FFFFFFFFFFFFFFF, volatile=True)
        while tl.min(words >> 32, axis=0) < turn:
            words = tl.load(sum_ptr + h, mask=h < H, other=0x7FFFFFFFFFFFFFFF, volatile=True)
        output = tl.load(output_ptr + h, mask=h < H, other=0.0).to(tl.float32)
        tl.store(output_ptr + h, output + words.to(tl.int32).to(tl.float32, bitcast=True), mask=h < H)


@triton.jit
def slot_of(index_ptr, table_ptr, pair, HAS_TABLE: tl.constexpr):
    """The slot of a pair: its entry, or what the table says of the expert that it names."""
    slot = tl.load(index_ptr + pair).to(tl.int64)
    if HAS_TABLE:
        slot = tl.load(table_ptr + slot).to(tl.int64)
    return slot


@triton.jit
def gate_up_kernel(
    x_ptr,
    weight_ptr,
    index_ptr,
    table_ptr,
    inner_ptr,
    slot_stride,
    PER_ROW: tl.constexpr,
    H: tl.constexpr,
    I: tl.constexpr,  # noqa: E741 - the intermediate size
    HAS_TABLE: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """silu(gate . x) * (up . x) of each pair, [pairs, I]; pair p belongs to row p // PER_ROW. Slot -1: zeros."""
    pair = tl.program_id(1)
    slot = slot_of(index_ptr, table_ptr, pair, HAS_TABLE)
    i, h = tl.program_id(0) * BLOCK_I + tl.arange(0, BLOCK_I), tl.arange(0, BLOCK_H)
    base = weight_ptr + slot * slot_stride
    here = i < tl.where(slot >= 0, I, 0)
    gate = tl.zeros((BLOCK_I, BLOCK_H), dtype=tl.float32)
    up = tl.zeros((BLOCK_I, BLOCK_H), dtype=tl.float32)
    rows = base + i[:, None] * H
    for start in range(0, H, BLOCK_H):
        inside = start + h < H
        both = here[:, None] & inside[None, :]
        x = tl.load(x_ptr + (pair // PER_ROW) * H + start + h, mask=inside, other=0.0).to(tl.float32)[None, :]
        gate += tl.load(rows + (start + h)[None, :], mask=both, other=0.0).to(tl.float32) * x
        up += tl.load(rows + I * H + (start + h)[None, :], mask=both, other=0.0).to(tl.float32) * x
    dtype = inner_ptr.dtype.element_ty
    g = tl.sum(gate, axis=1).to(dtype).to(tl.float32)
    u = tl.sum(up, axis=1).to(dtype).to(tl.float32)
    activated = (g * tl.sigmoid(g)).to(dtype).to(tl.float32)
    tl.store(inner_ptr + pair * I + i, activated * u, mask=i < I)


@triton.jit
def down_kernel(
    inner_ptr,
    weight_ptr,
    index_ptr,
    table_ptr,
    gate_ptr,
    output_ptr,
    slot_stride,
    PER_ROW: tl.constexpr,
    H: tl.constexpr,
    I: tl.constexpr,  # noqa: E741 - the intermediate size
    HAS_TABLE: tl.constexpr,
    WEIGHTED: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_I: tl.constexpr,
):
    """The down projection. WEIGHTED: summed over the pairs of a row by their weights, [rows, H]; else [pairs, H].

    A slot of -1 adds nothing."""
    row = tl.program_id(1)
    h, i = tl.program_id(0) * BLOCK_H + tl.arange(0, BLOCK_H), tl.arange(0, BLOCK_I)
    dtype = output_ptr.dtype.element_ty
    total = tl.zeros((BLOCK_H,), dtype=tl.float32)
    for place in tl.static_range(PER_ROW):
        pair = row * PER_ROW + place
        slot = slot_of(index_ptr, table_ptr, pair, HAS_TABLE)
        base = weight_ptr + slot * slot_stride
        here = h < tl.where(slot >= 0, H, 0)
        part = tl.zeros((BLOCK_H, BLOCK_I), dtype=tl.float32)
        for start in range(0, I, BLOCK_I):
            inside = start + i < I
            x = tl.load(inner_ptr + pair * I + start + i, mask=inside, other=0.0).to(tl.float32)[None, :]
            both = here[:, None] & inside[None, :]
            w = tl.load(base + h[:, None] * I + (start + i)[None, :], mask=both, other=0.0)
            part += w.to(tl.float32) * x
        value = tl.sum(part, axis=1).to(dtype).to(tl.float32)
        if WEIGHTED:
            total += (value * tl.load(gate_ptr + pair).to(tl.float32)).to(dtype).to(tl.float32)
        else:
            tl.store(output_ptr + pair * H + h, value, mask=h < H)
    if WEIGHTED:
        tl.store(output_ptr + row * H + h, total, mask=h < H)
