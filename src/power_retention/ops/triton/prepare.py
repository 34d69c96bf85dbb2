"""What the main kernels read: cumulative gates, transposed keys and queries, weighted values, second moments."""

from __future__ import annotations

import triton
import triton.language as tl

from power_retention.ops.triton.common import power_of_two_scale


@triton.jit(do_not_specialize=["tokens"])
def gates_kernel(log_g, table, gates, tokens, heads, FORGET: tl.constexpr, BLOCK: tl.constexpr):
    """Inclusive cumulative sums within each slot, float64: differences of far-apart sums keep their digits.

    log_g [tokens, heads] → gates [heads, tokens].  Clamped where exp is already 0 in float32.
    """
    slot = tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    start = tl.load(table + slot * 4).to(tl.int64)
    end = tl.load(table + slot * 4 + 1).to(tl.int64)
    before = tl.zeros([1], tl.float64)
    for first in range(start, end, BLOCK):
        t = first + tl.arange(0, BLOCK)
        g = tl.load(log_g + t * heads + head, mask=t < end, other=0.0).to(tl.float64)
        g = tl.maximum(g, FORGET)
        tl.store(gates + head * tokens + t, before + tl.cumsum(g, 0), mask=t < end)
        before += tl.sum(g, 0)


@triton.jit
def columns_kernel(x, table, xt, columns, pad, heads, D: tl.constexpr, BT: tl.constexpr, SCALE: tl.constexpr):
    """x [tokens, heads, D] → xt [heads, D, columns]: a slot's tokens start at column slot·pad, zeros after its last.

    With SCALE each token is multiplied by its power of two (queries).
    """
    column = tl.program_id(0).to(tl.int64) * BT
    head = tl.program_id(1).to(tl.int64)
    slot = column // pad
    start = tl.load(table + slot * 4).to(tl.int64)
    end = tl.load(table + slot * 4 + 1).to(tl.int64)
    t = start + column - slot * pad + tl.arange(0, BT)
    a = tl.arange(0, D)
    tile = tl.load(x + (t * heads + head)[:, None] * D + a[None, :], mask=(t < end)[:, None], other=0.0)
    if SCALE:
        tile = (tile.to(tl.float32) * power_of_two_scale(tile)[:, None]).to(tile.dtype)
    target = xt + (head * D + a)[:, None] * columns + column + tl.arange(0, BT)[None, :]
    tl.store(target, tl.trans(tile))


@triton.jit(do_not_specialize=["tokens"])
def weigh_values_kernel(v, gates, table, out, tokens, pad, heads, E: tl.constexpr, BT: tl.constexpr):
    """out_j = exp(G_end − G_j) v_j: what each token still weighs at its slot's end.  v, out [tokens, heads, E]."""
    position = tl.program_id(0).to(tl.int64) * BT
    head = tl.program_id(1).to(tl.int64)
    slot = position // pad
    start = tl.load(table + slot * 4).to(tl.int64)
    end = tl.load(table + slot * 4 + 1).to(tl.int64)
    t = start + position - slot * pad + tl.arange(0, BT)
    valid = t < end
    last = tl.load(gates + head * tokens + tl.maximum(end - 1, start), mask=end > start, other=0.0)
    weight = tl.exp((last - tl.load(gates + head * tokens + t, mask=valid, other=0.0)).to(tl.float32))
    address = (t * heads + head)[:, None] * E + tl.arange(0, E)[None, :]
    tile = tl.load(v + address, mask=valid[:, None], other=0.0)
    tl.store(out + address, (tile.to(tl.float32) * weight[:, None]).to(tile.dtype), mask=valid[:, None])


@triton.jit(do_not_specialize=["tokens"])
def moments_kernel(
    xt, row_weight, gates, table, moments, columns, pad, tokens, heads, groups,
    TO_END: tl.constexpr, HAS_GATES: tl.constexpr, HAS_WEIGHT: tl.constexpr,
    D: tl.constexpr, BD: tl.constexpr, BT: tl.constexpr, CT: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """moments[slot, head] = Σ_t weight_t x_t x_tᵀ over a slot (and the query heads that share a key head), [D, D] float32.

    weight_t is row_weight [heads·groups, tokens] (if any) times exp(G_end − G_t) (TO_END) or exp(G_t).
    """
    slot = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1).to(tl.int64)
    a = tl.program_id(2) * BD + tl.arange(0, BD)
    b = tl.arange(0, D)
    start = tl.load(table + slot * 4).to(tl.int64)
    end = tl.load(table + slot * 4 + 1).to(tl.int64)
    acc = tl.zeros([BD, D], tl.float32)
    if HAS_GATES:
        last = tl.load(gates + head * tokens + tl.maximum(end - 1, start), mask=end > start, other=0.0)
    for group in range(groups):
        row = head * groups + group
        for first in range(0, end - start, BT):
            t = start + first + tl.arange(0, BT)
            column = slot * pad + first + tl.arange(0, BT)
            left = tl.load(xt + (row * D + a)[:, None] * columns + column[None, :]).to(tl.float32)
            right = tl.load(xt + (row * D + b)[:, None] * columns + column[None, :]).to(CT)
            if HAS_WEIGHT:
                left *= tl.load(row_weight + row * tokens + t, mask=t < end, other=0.0)[None, :]
            if HAS_GATES:
                g = tl.load(gates + head * tokens + t, mask=t < end, other=0.0)
                left *= tl.exp((last - g if TO_END else g).to(tl.float32))[None, :]
            high = left.to(CT)
            acc = tl.dot(high, tl.trans(right), acc, input_precision=PREC)
            if CT != tl.float32:
                acc = tl.dot((left - high.to(tl.float32)).to(CT), tl.trans(right), acc, input_precision=PREC)
    tl.store(moments + ((slot * heads + head) * D + a)[:, None] * D + b[None, :], acc)


@triton.jit(do_not_specialize=["tokens"])
def scan_moments_kernel(
    moments, initial, final, gates, table, borders, tokens, heads, SIZE,
    HAS_INITIAL: tl.constexpr, HAS_GATES: tl.constexpr, REVERSE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Each slot's own moments → those entering it (from the right with REVERSE), in place; ``final`` after the last slot.

    moments [slots, heads, SIZE], initial and final [runs, heads, SIZE]; state ← exp(G_end)·state + own.
    """
    run = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1).to(tl.int64)
    i = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    inside = i < SIZE
    first = tl.load(borders + run).to(tl.int64)
    last = tl.load(borders + run + 1).to(tl.int64)
    state = tl.zeros([BLOCK], tl.float32)
    if HAS_INITIAL:
        state += tl.load(initial + (run * heads + head) * SIZE + i, mask=inside, other=0.0)
    for n in range(last - first):
        slot = last - 1 - n if REVERSE else first + n
        address = moments + (slot * heads + head) * SIZE + i
        own = tl.load(address, mask=inside, other=0.0)
        tl.store(address, state, mask=inside)
        if HAS_GATES:
            end = tl.load(table + slot * 4 + 1).to(tl.int64)
            state *= tl.exp(tl.load(gates + head * tokens + end - 1).to(tl.float32))
        state += own
    tl.store(final + (run * heads + head) * SIZE + i, state, mask=inside)


@triton.jit(do_not_specialize=["rows"])
def scale_kernel(x, out, rows, D: tl.constexpr, BT: tl.constexpr):
    """x [rows, D] times its rows' powers of two."""
    t = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    address = t[:, None] * D + tl.arange(0, D)[None, :]
    tile = tl.load(x + address, mask=(t < rows)[:, None], other=0.0)
    scaled = tile.to(tl.float32) * power_of_two_scale(tile)[:, None]
    tl.store(out + address, scaled.to(tile.dtype), mask=(t < rows)[:, None])
