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
def columns_kernel(
    x, table, xt, columns, pad, heads, D: tl.constexpr, BT: tl.constexpr, SCALE: tl.constexpr, ORDERED: tl.constexpr
):
    """x [tokens, heads, D] → xt [heads, D, columns]: a slot's tokens start at column slot·pad, zeros after its last.

    With SCALE each token is multiplied by its power of two (queries).  With ORDERED (and BT = 64) the columns of every 64
    tokens are in the order in which the Hopper kernels hold them: a column's bits 5, 4, 3, 2, 1, 0 are its token's bits 2,
    1, 5, 4, 3, 0.
    """
    column = tl.program_id(0).to(tl.int64) * BT
    head = tl.program_id(1).to(tl.int64)
    slot = column // pad
    start = tl.load(table + slot * 4).to(tl.int64)
    end = tl.load(table + slot * 4 + 1).to(tl.int64)
    place = tl.arange(0, BT)
    if ORDERED:
        place = (place & 1) | (place & 14) << 2 | (place & 48) >> 3
    t = start + column - slot * pad + place
    a = tl.arange(0, D)
    tile = tl.load(x + (t * heads + head)[:, None] * D + a[None, :], mask=(t < end)[:, None], other=0.0)
    if SCALE:
        tile = (tile.to(tl.float32) * power_of_two_scale(tile)[:, None]).to(tile.dtype)
    target = xt + (head * D + a)[:, None] * columns + column + tl.arange(0, BT)[None, :]
    tl.store(target, tl.trans(tile))


@triton.jit(do_not_specialize=["tokens"])
def weigh_values_kernel(
    v,
    gates,
    table,
    out,
    tokens,
    pad,
    heads,
    HAS_GATES: tl.constexpr,
    PADDED: tl.constexpr,
    E: tl.constexpr,
    BT: tl.constexpr,
):
    """out_j = exp(G_end − G_j) v_j: what each token still weighs at its slot's end.  v [tokens, heads, E].

    out is [tokens, heads, E], or with PADDED [columns, heads, E] like the columns of keys, zero after a slot's last token.
    """
    position = tl.program_id(0).to(tl.int64) * BT
    head = tl.program_id(1).to(tl.int64)
    slot = position // pad
    start = tl.load(table + slot * 4).to(tl.int64)
    end = tl.load(table + slot * 4 + 1).to(tl.int64)
    row = position + tl.arange(0, BT)
    t = start + row - slot * pad
    valid = t < end
    col = tl.arange(0, E)[None, :]
    tile = tl.load(v + (t * heads + head)[:, None] * E + col, mask=valid[:, None], other=0.0)
    if HAS_GATES:
        last = tl.load(gates + head * tokens + tl.maximum(end - 1, start), mask=end > start, other=0.0)
        weight = tl.exp((last - tl.load(gates + head * tokens + t, mask=valid, other=0.0)).to(tl.float32))
        tile = (tile.to(tl.float32) * weight[:, None]).to(tile.dtype)
    if PADDED:
        tl.store(out + (row * heads + head)[:, None] * E + col, tile)
    else:
        tl.store(out + (t * heads + head)[:, None] * E + col, tile, mask=valid[:, None])


@triton.jit(do_not_specialize=["tokens"])
def block_roots_kernel(gates, table, roots, tokens, pad, BT: tl.constexpr):
    """Within each BT tokens of a slot: what a token weighs at their end.

    gates [heads, tokens] float64 → roots = exp(G_end − G) [heads, tokens] float32, all ≤ 1.
    """
    position = tl.program_id(0).to(tl.int64) * BT
    head = tl.program_id(1).to(tl.int64)
    slot = position // pad
    start = tl.load(table + slot * 4).to(tl.int64)
    end = tl.load(table + slot * 4 + 1).to(tl.int64)
    first = start + position - slot * pad
    t = first + tl.arange(0, BT)
    valid = t < end
    mine = gates + head * tokens
    g = tl.load(mine + t, mask=valid, other=0.0)
    last = tl.load(mine + tl.minimum(first + BT, end) - 1, mask=first < end, other=0.0)
    tl.store(roots + head * tokens + t, tl.exp((last - g).to(tl.float32)), mask=valid)


@triton.jit
def flows_kernel(states, gradients, out, STEP, D: tl.constexpr, E: tl.constexpr):
    """out [slots − 1, heads, units]: the parts of ⟨state entering a slot, its gradient⟩, both in the Hopper kernels' units.

    What enters a slot has left the one before it: ``gradients`` start where the first slot's stand, ``states`` a slot
    later.  Units of different columns hold every pair twice on both sides.
    """
    GROUPS: tl.constexpr = D // 8
    unit = tl.program_id(0).to(tl.int64)
    base = (tl.program_id(1).to(tl.int64) * tl.num_programs(0) + unit) * (64 * E)
    i = tl.arange(0, 4096)
    total = tl.zeros([4096], tl.float32)
    for part in tl.static_range(64 * E // 4096):
        state = tl.load(states + STEP + base + part * 4096 + i).to(tl.float32)
        total += state * tl.load(gradients + base + part * 4096 + i).to(tl.float32)
    square = False
    for group in tl.static_range(GROUPS):
        square |= unit == group * GROUPS - group * (group - 1) // 2
    tl.store(
        out + tl.program_id(1).to(tl.int64) * tl.num_programs(0) + unit, tl.sum(total, 0) * tl.where(square, 1.0, 0.5)
    )


@triton.jit(do_not_specialize=["tokens"])
def moments_kernel(
    x, row_weight, gates, table, moments, tokens, heads, groups,
    SCALE: tl.constexpr, TO_END: tl.constexpr, HAS_GATES: tl.constexpr, HAS_WEIGHT: tl.constexpr,
    D: tl.constexpr, BD: tl.constexpr, BT: tl.constexpr, CT: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """moments[slot, head] = Σ_t weight_t x_t x_tᵀ over a slot (and the query heads that share a key head), [D, D] float32.

    x [tokens, heads·groups, D], with SCALE times its rows' powers of two; weight_t is row_weight [heads·groups, tokens] (if
    any) times exp(G_end − G_t) (TO_END) or exp(G_t).
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
        for first in range(start, end, BT):
            t = first + tl.arange(0, BT)
            address = x + (t * (heads * groups) + row)[:, None] * D
            inside = (t < end)[:, None]
            right = tl.load(address + b[None, :], mask=inside, other=0.0)
            left = tl.load(address + a[None, :], mask=inside, other=0.0).to(tl.float32)
            if SCALE:
                scale = power_of_two_scale(right)[:, None]
                right = right.to(tl.float32) * scale
                left *= scale
            if HAS_WEIGHT:
                left *= tl.load(row_weight + row * tokens + t, mask=t < end, other=0.0)[:, None]
            if HAS_GATES:
                g = tl.load(gates + head * tokens + t, mask=t < end, other=0.0)
                left *= tl.exp((last - g if TO_END else g).to(tl.float32))[:, None]
            high = left.to(CT)
            acc = tl.dot(tl.trans(high), right.to(CT), acc, input_precision=PREC)
            if CT != tl.float32:
                low = (left - high.to(tl.float32)).to(CT)
                acc = tl.dot(tl.trans(low), right.to(CT), acc, input_precision=PREC)
    tl.store(moments + ((slot * heads + head) * D + a)[:, None] * D + b[None, :], acc)


@triton.jit(do_not_specialize=["tokens"])
def scan_moments_kernel(
    moments, initial, final, high, low, traces, gates, table, borders, tokens, heads,
    HAS_INITIAL: tl.constexpr, HAS_GATES: tl.constexpr, REVERSE: tl.constexpr, SPLIT: tl.constexpr,
    D: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Each slot's own moments → those entering it (from the right with REVERSE), in place; ``final`` after the last slot.

    moments [slots, heads, D²], initial and final [runs, heads, D²]; state ← exp(G_end)·state + own.  With SPLIT also in two
    bfloat16 parts, and in ``traces`` [slots, heads, D²/BLOCK] the parts of their traces, never negative.
    """
    SIZE: tl.constexpr = D * D
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
        here = (slot * heads + head) * SIZE + i
        own = tl.load(moments + here, mask=inside, other=0.0)
        tl.store(moments + here, state, mask=inside)
        if SPLIT:
            rounded = state.to(high.dtype.element_ty)
            tl.store(high + here, rounded, mask=inside)
            tl.store(low + here, (state - rounded.to(tl.float32)).to(low.dtype.element_ty), mask=inside)
            part = tl.sum(tl.where(inside & (i % (D + 1) == 0), state, 0.0), 0)
            tl.store(traces + (slot * heads + head) * tl.num_programs(2) + tl.program_id(2), tl.maximum(part, 0.0))
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
