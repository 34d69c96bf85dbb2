"""The output of a tile of queries: the entering state read, attention within the chunk added, one division at the end."""

from __future__ import annotations

import triton
import triton.language as tl

from power_retention.ops.triton.common import (
    integer_power,
    power_of_two_scale,
    read_normalizer,
    regular_inverse,
    trace,
)


@triton.jit
def read_state(
    x, rows, valid, head, all_heads, scale, xt, column, columns, state, acc, col,
    D: tl.constexpr, W: tl.constexpr, E: tl.constexpr, BM: tl.constexpr, CT: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """acc + φ(x)·state.

    One block of W columns of x stays in registers as a product's operand; what it is multiplied with is streamed.
    """
    address = x + (rows * all_heads + head)[:, None] * D
    token = xt + head * D * columns + column + tl.arange(0, BM)
    i = tl.arange(0, W)
    for block in tl.static_range(D // W):
        left = tl.load(address + (block * W + i)[None, :], mask=valid[:, None], other=0.0)
        left = (left.to(tl.float32) * scale[:, None]).to(CT)
        # Pairs within the block.  States are stored doubled: squares count once, and the last roll meets each pair twice.
        for o in range(W // 2 + 1):
            rotated = token[None, :] + (block * W + (i + o) % W)[:, None] * columns
            right = tl.trans(tl.load(rotated).to(CT)) * tl.where((o == 0) | (o == W // 2), 0.5, 1.0).to(CT)
            s = tl.load(state + (o * D + block * W + i)[:, None] * E + col[None, :])
            acc = tl.dot(left * right, s, acc, input_precision=PREC)
        if block < D // W - 1:
            # The block times each later column.
            base = state + (D * (W // 2 + 1) + W * W * (block * (D // W - 1) - block * (block - 1) // 2)) * E
            later = token + (block + 1) * W * columns
            # Factors are fetched a step ahead: such short loads are not pipelined, and their latency would be waited for.
            last = D - (block + 1) * W - 1
            even = tl.load(later)
            odd = tl.load(later + columns)
            for n in range(0, last + 1, 2):
                next_even = tl.load(later + tl.minimum(n + 2, last) * columns)
                next_odd = tl.load(later + tl.minimum(n + 3, last) * columns)
                s = tl.load(base + (n * W + i)[:, None] * E + col[None, :])
                acc = tl.dot(left * even.to(CT)[:, None], s, acc, input_precision=PREC)
                s = tl.load(base + ((n + 1) * W + i)[:, None] * E + col[None, :])
                acc = tl.dot(left * odd.to(CT)[:, None], s, acc, input_precision=PREC)
                even = next_even
                odd = next_odd
    return acc


@triton.jit(do_not_specialize=["tiles"])
def read_state_kernel(
    x, xt, table, states, partial, columns, pad, heads, groups, tiles,
    AT_END: tl.constexpr, ALWAYS: tl.constexpr, SCALE: tl.constexpr, D: tl.constexpr, W: tl.constexpr, E: tl.constexpr,
    BM: tl.constexpr, BE: tl.constexpr, CT: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """partial [tokens, heads·groups, E] float32 = φ(x)·state, left unwritten where a slot has no state.

    A kernel of its own: with the attention's registers in the same function, the products of its loops no longer overlap.
    Programs that read the same state are neighbours, so that it comes from L2.
    """
    program = tl.program_id(0)
    inner = program % (groups * tiles)
    outer = program // (groups * tiles)
    head = (outer % heads).to(tl.int64)
    slot = (outer // heads).to(tl.int64)
    tile = inner // groups
    row = head * groups + inner % groups
    start = tl.load(table + slot * 4).to(tl.int64)
    end = tl.load(table + slot * 4 + 1).to(tl.int64)
    first = start + tile * BM
    if first >= end:
        return
    if not ALWAYS and tl.load(table + slot * 4 + (3 if AT_END else 2)) != 0:
        return
    i = first + tl.arange(0, BM)
    valid = i < end
    col = tl.program_id(1) * BE + tl.arange(0, BE)
    all_heads = heads * groups
    scale = tl.full([BM], 1.0, tl.float32)
    if SCALE:
        address = x + (i * all_heads + row)[:, None] * D + tl.arange(0, D)[None, :]
        scale = power_of_two_scale(tl.load(address, mask=valid[:, None], other=0.0))
    state = states + (slot * heads + head) * (D * (D // 2 + 1) * E)
    acc = tl.zeros([BM, BE], tl.float32)
    acc = read_state(
        x, i, valid, row, all_heads, scale, xt, slot * pad + tile * BM, columns, state, acc, col, D, W, E, BM, CT, PREC
    )
    tl.store(partial + (i * all_heads + row)[:, None] * E + col[None, :], acc, mask=valid[:, None])


@triton.jit(do_not_specialize=["tokens", "tiles"])
def read_kernel(
    q, k, v, gates, table, partial, moments, y, tokens, heads, groups, tiles,
    HAS_GATES: tl.constexpr, HAS_STATE: tl.constexpr, HAS_INITIAL: tl.constexpr, P: tl.constexpr, NOISE: tl.constexpr,
    D: tl.constexpr, E: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BE: tl.constexpr, CT: tl.constexpr,
    PREC: tl.constexpr,
):  # fmt: skip
    """y [tokens, heads·groups, E] of BM queries of one head, BE value columns; ``partial`` is what they read of their state."""
    program = tl.program_id(0)
    inner = program % (groups * tiles)
    outer = program // (groups * tiles)
    head = (outer % heads).to(tl.int64)
    slot = (outer // heads).to(tl.int64)
    tile = inner // groups
    query_head = head * groups + inner % groups
    query_heads = heads * groups
    start = tl.load(table + slot * 4).to(tl.int64)
    end = tl.load(table + slot * 4 + 1).to(tl.int64)
    at_start = tl.load(table + slot * 4 + 2)
    first = start + tile * BM
    if first >= end:
        return
    i = first + tl.arange(0, BM)
    valid = i < end
    d = tl.arange(0, D)
    col = tl.program_id(1) * BE + tl.arange(0, BE)
    raw = tl.load(q + (i * query_heads + query_head)[:, None] * D + d[None, :], mask=valid[:, None], other=0.0)
    scale = power_of_two_scale(raw)
    wide = raw.to(tl.float32) * scale[:, None]
    square = tl.sum(wide * wide, 1)

    acc = tl.zeros([BM, BE], tl.float32)
    den = tl.zeros([BM], tl.float32)
    noise = tl.zeros([BM], tl.float32)
    peak = tl.zeros([BM], tl.float32)
    if HAS_GATES:
        gate_i = tl.load(gates + head * tokens + i, mask=valid, other=0.0)
    if HAS_STATE:
        here = slot * heads + head
        present = (at_start == 0) | HAS_INITIAL
        out = partial + (i * query_heads + query_head)[:, None] * E + col[None, :]
        acc = tl.load(out, mask=valid[:, None] & present, other=0.0)
        den = read_normalizer(q, i, valid, query_head, query_heads, scale, moments + here * (D * D), D, BM, CT, PREC)
        noise = NOISE * trace(moments + here * (D * D), D) * square
        if HAS_GATES:
            decay = tl.exp(gate_i.to(tl.float32))
            acc *= decay[:, None]
            den *= decay
            noise *= decay

    # Read again rather than kept in registers through the loops above.
    raw = tl.load(q + (i * query_heads + query_head)[:, None] * D + d[None, :], mask=valid[:, None], other=0.0)
    queries = (raw.to(tl.float32) * scale[:, None]).to(CT)
    keys = k + head * D
    values = v + head * E
    for n in range(start, first, BN):
        j = n + tl.arange(0, BN)
        kt = tl.load(keys + (j * heads * D)[None, :] + d[:, None]).to(CT)
        base = tl.dot(queries, kt, input_precision=PREC)
        if HAS_GATES:
            edge = tl.load(gates + head * tokens + n + BN - 1)
            gate_j = tl.load(gates + head * tokens + j)
            root_i = tl.exp((tl.minimum(gate_i - edge, 0.0) / P).to(tl.float32))
            base *= root_i[:, None] * tl.exp(((edge - gate_j) / P).to(tl.float32))[None, :]
        if P > 2:
            acc, den, peak, base = rescale(base, acc, den, peak, P)
        weight = integer_power(base, P)
        den += tl.sum(weight, 1)
        vt = tl.load(values + (j * heads * E)[:, None] + col[None, :]).to(CT)
        acc = tl.dot(weight.to(CT), vt, acc, input_precision=PREC)
    for n in range(first, tl.minimum(first + BM, end), BN):
        j = n + tl.arange(0, BN)
        kt = tl.load(keys + (j * heads * D)[None, :] + d[:, None], mask=(j < end)[None, :], other=0.0).to(CT)
        base = tl.dot(queries, kt, input_precision=PREC)
        if HAS_GATES:
            gate_j = tl.load(gates + head * tokens + j, mask=j < end, other=0.0)
            edge = tl.load(gates + head * tokens + first)
            near = (gate_i - edge).to(tl.float32)[:, None] - (gate_j - edge).to(tl.float32)[None, :]
            base *= tl.exp(tl.minimum(near, 0.0) / P)
        base = tl.where((i[:, None] >= j[None, :]) & (j < end)[None, :], base, 0.0)
        if P > 2:
            acc, den, peak, base = rescale(base, acc, den, peak, P)
        # The sum of what is multiplied, as numerator and denominator then round alike: a row of one key is exact.
        weight = integer_power(base, P).to(CT)
        den += tl.sum(weight.to(tl.float32), 1)
        vt = tl.load(values + (j * heads * E)[:, None] + col[None, :], mask=(j < end)[:, None], other=0.0).to(CT)
        acc = tl.dot(weight, vt, acc, input_precision=PREC)

    inverse, _ = regular_inverse(den, noise)
    out = y + (i * query_heads + query_head)[:, None] * E + col[None, :]
    tl.store(out, (acc * inverse[:, None]).to(y.dtype.element_ty), mask=valid[:, None])


@triton.jit
def rescale(base, acc, den, peak, P: tl.constexpr):
    """Online maximum: sums so far and the new bases relative to the largest base each row has seen."""
    higher = tl.maximum(peak, tl.max(tl.abs(base), 1))
    safe = tl.where(higher == 0, 1.0, higher)
    shrink = integer_power(peak / safe, P)
    return acc * shrink[:, None], den * shrink, higher, base / safe[:, None]
