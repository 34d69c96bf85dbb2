"""Gradients, with nothing kept from the forward pass but its inputs.

With y = N/Z (numerator over denominator, the noise level counting as a constant) the gradients of N and Z are dN = dy·inv and
dZ = (dy·N)·inv'.  The state's part of N is homogeneous of degree p in the query, so its part of dy·N is q·∂(dy·N)/∂q / p: found
from the gradient that is computed anyway.  Homogeneity gives the gates too: the gradient of the cumulative log gate is
(q·dq − k·dk) / p per token.
"""

from __future__ import annotations

import triton
import triton.language as tl

from power_retention.ops.triton.common import (
    block_row,
    integer_power,
    power_of_two_scale,
    read_normalizer,
    regular_inverse,
    split_dot,
    trace,
)


@triton.jit(do_not_specialize=["tiles"])
def contract_state_kernel(
    u, xt, table, states, partial, columns, pad, heads, groups, tiles,
    AT_END: tl.constexpr, ALWAYS: tl.constexpr, D: tl.constexpr, W: tl.constexpr, E: tl.constexpr,
    BM: tl.constexpr, BE: tl.constexpr, CT: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """partial [tokens, heads·groups, D] float32 = gradient of u·(φ(x)·state) with respect to x, 2 Σ_b x_b (u·S_ab).

    Unwritten where a slot has no state.  Each pair is met from both sides: twice the products of a sum over pairs, but no
    operand ever has to be rolled back.
    """
    program = tl.program_id(0)
    inner = program % (groups * tiles)
    outer = program // (groups * tiles)
    head = (outer % heads).to(tl.int64)
    slot = (outer // heads).to(tl.int64)
    tile = inner // groups
    source = head * groups + inner % groups
    start = tl.load(table + slot * 4).to(tl.int64)
    end = tl.load(table + slot * 4 + 1).to(tl.int64)
    first = start + tile * BM
    if first >= end:
        return
    if not ALWAYS and tl.load(table + slot * 4 + (3 if AT_END else 2)) != 0:
        return
    i = first + tl.arange(0, BM)
    valid = i < end
    a = tl.arange(0, D)
    rows = (i * (heads * groups) + source)[:, None]
    state = states + (slot * heads + head) * (D * (D // 2 + 1) * E)
    token = xt + source * D * columns + slot * pad + tile * BM + tl.arange(0, BM)
    if BE == E:
        left = tl.load(u + rows * E + tl.arange(0, E)[None, :], mask=valid[:, None], other=0.0).to(CT)
    acc = tl.zeros([BM, D], tl.float32)
    factor = tl.load(token)
    for b in range(D):
        next_factor = tl.load(token + tl.minimum(b + 1, D - 1) * columns)
        row = block_row(a, b, D, W)
        product = tl.zeros([BM, D], tl.float32)
        for block in tl.static_range(E // BE):
            col = block * BE + tl.arange(0, BE)
            if BE != E:
                left = tl.load(u + rows * E + col[None, :], mask=valid[:, None], other=0.0).to(CT)
            s = tl.load(state + (row * E)[None, :] + col[:, None])
            product = tl.dot(left, s, product, input_precision=PREC)
        acc += product * factor.to(tl.float32)[:, None]
        factor = next_factor
    tl.store(partial + rows * D + a[None, :], acc, mask=valid[:, None])


@triton.jit
def contract_moment(
    x,
    rows,
    valid,
    head,
    all_heads,
    scale,
    moment,
    D: tl.constexpr,
    BM: tl.constexpr,
    CT: tl.constexpr,
    PREC: tl.constexpr,
):
    """2 x M, the gradient of x M xᵀ: [BM, D]."""
    WIDE: tl.constexpr = min(D, 64)
    full = tl.arange(0, D)
    acc = tl.zeros([BM, D], tl.float32)
    for block in tl.static_range(D // WIDE):
        a = block * WIDE + tl.arange(0, WIDE)
        left = tl.load(x + (rows * all_heads + head)[:, None] * D + a[None, :], mask=valid[:, None], other=0.0)
        left = (left.to(tl.float32) * scale[:, None]).to(CT)
        acc = split_dot(left, tl.load(moment + a[:, None] * D + full[None, :]), acc, CT, PREC)
    return acc * 2


@triton.jit
def query_tile(
    queries, dout, k, v, gates, gate_i, shrink, i, n, first, end, head, heads, tokens,
    DIAGONAL: tl.constexpr, HAS_GATES: tl.constexpr, P: tl.constexpr, D: tl.constexpr, E: tl.constexpr, BN: tl.constexpr,
    CT: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """(keys [D, BN], gradients of the weights before the ratio, bases, what the scores were multiplied with) of one tile."""
    j = n + tl.arange(0, BN)
    inside = j < end
    d = tl.arange(0, D)
    e = tl.arange(0, E)
    address = (j * heads + head)[None, :]
    if DIAGONAL:
        kt = tl.load(k + address * D + d[:, None], mask=inside[None, :], other=0.0).to(CT)
        vt = tl.load(v + address * E + e[:, None], mask=inside[None, :], other=0.0).to(CT)
        root = tl.where((i[:, None] >= j[None, :]) & inside[None, :], shrink[:, None], 0.0)
        if HAS_GATES:
            gate_j = tl.load(gates + head * tokens + j, mask=inside, other=0.0)
            edge = tl.load(gates + head * tokens + first)
            near = (gate_i - edge).to(tl.float32)[:, None] - (gate_j - edge).to(tl.float32)[None, :]
            root *= tl.exp(tl.minimum(near, 0.0) / P)
    else:
        kt = tl.load(k + address * D + d[:, None]).to(CT)
        vt = tl.load(v + address * E + e[:, None]).to(CT)
        root = shrink[:, None]
        if HAS_GATES:
            gate_j = tl.load(gates + head * tokens + j)
            edge = tl.load(gates + head * tokens + n + BN - 1)
            root *= tl.exp((tl.minimum(gate_i - edge, 0.0) / P).to(tl.float32))[:, None]
            root *= tl.exp(((edge - gate_j) / P).to(tl.float32))[None, :]
    base = tl.dot(queries, kt, input_precision=PREC) * root
    dw = tl.dot(dout, vt, input_precision=PREC)
    return kt, dw, base, root


@triton.jit(do_not_specialize=["tokens", "tiles"])
def query_grad_kernel(
    q, k, v, dy, gates, table, partial, moments, dq, dn, inverses, dz, peaks, flow, tokens, heads, groups, tiles,
    HAS_GATES: tl.constexpr, HAS_STATE: tl.constexpr, HAS_INITIAL: tl.constexpr, WITH_DN: tl.constexpr, P: tl.constexpr,
    NOISE: tl.constexpr, D: tl.constexpr, E: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, CT: tl.constexpr,
    PREC: tl.constexpr,
):  # fmt: skip
    """dq of BM queries of one head, and what the other kernels need of them.

    dn [tokens, heads·groups, E]: gradient of the numerators times exp(G_i), where states are to have gradients (WITH_DN);
    inverses [heads·groups, tokens]; dz, same shape: gradient of the denominators; peaks, same shape: the largest base of
    each row (p > 2); flow, same shape: q·dq.
    """
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
    e = tl.arange(0, E)
    own = (i * query_heads + query_head)[:, None]
    raw = tl.load(q + own * D + d[None, :], mask=valid[:, None], other=0.0)
    scale = power_of_two_scale(raw)
    wide = raw.to(tl.float32) * scale[:, None]
    square = tl.sum(wide * wide, 1)
    dout = tl.load(dy + own * E + e[None, :], mask=valid[:, None], other=0.0).to(CT)

    grad = tl.zeros([BM, D], tl.float32)
    den = tl.zeros([BM], tl.float32)
    delta = tl.zeros([BM], tl.float32)
    noise = tl.zeros([BM], tl.float32)
    peak = tl.zeros([BM], tl.float32)
    gate_i = tl.zeros([BM], tl.float64)
    if HAS_GATES:
        gate_i = tl.load(gates + head * tokens + i, mask=valid, other=0.0)
    if HAS_STATE:
        here = slot * heads + head
        present = (at_start == 0) | HAS_INITIAL
        grad = tl.load(partial + own * D + d[None, :], mask=valid[:, None] & present, other=0.0)
        delta = tl.sum(grad * wide, 1) / P
        moment = moments + here * (D * D)
        den = read_normalizer(q, i, valid, query_head, query_heads, scale, moment, D, BM, CT, PREC)
        noise = NOISE * trace(moment, D) * square
        if HAS_GATES:
            decay = tl.exp(gate_i.to(tl.float32))
            delta *= decay
            den *= decay
            noise *= decay

    # Read again rather than kept in registers through the loops above.
    raw = tl.load(q + own * D + d[None, :], mask=valid[:, None], other=0.0)
    queries = (raw.to(tl.float32) * scale[:, None]).to(CT)
    keys = k + head * D
    last = tl.minimum(first + BM, end)
    if P > 2:
        for n in range(start, last, BN):
            j = n + tl.arange(0, BN)
            kt = tl.load(keys + (j * heads * D)[None, :] + d[:, None], mask=(j < end)[None, :], other=0.0).to(CT)
            base = tl.dot(queries, kt, input_precision=PREC)
            if HAS_GATES:
                gate_j = tl.load(gates + head * tokens + j, mask=j < end, other=0.0)
                base *= tl.exp(tl.minimum((gate_i[:, None] - gate_j[None, :]).to(tl.float32), 0.0) / P)
            base = tl.where((i[:, None] >= j[None, :]) & (j < end)[None, :], base, 0.0)
            peak = tl.maximum(peak, tl.max(tl.abs(base), 1))
        tl.store(peaks + query_head * tokens + i, peak, mask=valid)
    shrink = 1.0 / tl.where(peak == 0, 1.0, peak)
    # First the sums of each row, in float32: where weights cancel in the ratio, they must do so before any rounding.
    for n in range(start, first, BN):
        _, dw, base, _ = query_tile(
            queries, dout, k, v, gates, gate_i, shrink, i, n, first, end, head, heads, tokens,
            False, HAS_GATES, P, D, E, BN, CT, PREC,
        )  # fmt: skip
        weight = integer_power(base, P)
        den += tl.sum(weight, 1)
        delta += tl.sum(weight * dw, 1)
    for n in range(first, last, BN):
        _, dw, base, _ = query_tile(
            queries, dout, k, v, gates, gate_i, shrink, i, n, first, end, head, heads, tokens,
            True, HAS_GATES, P, D, E, BN, CT, PREC,
        )  # fmt: skip
        weight = integer_power(base, P)
        den += tl.sum(weight, 1)
        delta += tl.sum(weight * dw, 1)
    inverse, d_inverse = regular_inverse(den, noise)
    d_den = delta * d_inverse
    if HAS_STATE:
        moment_grad = contract_moment(q, i, valid, query_head, query_heads, scale, moment, D, BM, CT, PREC)
        grad = grad * inverse[:, None] + moment_grad * d_den[:, None]
        if HAS_GATES:
            grad *= decay[:, None]
    for n in range(start, first, BN):
        kt, dw, base, root = query_tile(
            queries, dout, k, v, gates, gate_i, shrink, i, n, first, end, head, heads, tokens,
            False, HAS_GATES, P, D, E, BN, CT, PREC,
        )  # fmt: skip
        ds = (dw * inverse[:, None] + d_den[:, None]) * integer_power(base, P - 1) * root * P
        grad = tl.dot(ds.to(CT), tl.trans(kt), grad, input_precision=PREC)
    for n in range(first, last, BN):
        kt, dw, base, root = query_tile(
            queries, dout, k, v, gates, gate_i, shrink, i, n, first, end, head, heads, tokens,
            True, HAS_GATES, P, D, E, BN, CT, PREC,
        )  # fmt: skip
        ds = (dw * inverse[:, None] + d_den[:, None]) * integer_power(base, P - 1) * root * P
        grad = tl.dot(ds.to(CT), tl.trans(kt), grad, input_precision=PREC)

    wide = queries.to(tl.float32)
    tl.store(dq + own * D + d[None, :], (grad * scale[:, None]).to(dq.dtype.element_ty), mask=valid[:, None])
    tl.store(inverses + query_head * tokens + i, inverse, mask=valid)
    tl.store(dz + query_head * tokens + i, d_den, mask=valid)
    tl.store(flow + query_head * tokens + i, tl.sum(grad * wide, 1), mask=valid)
    if WITH_DN:
        dn_tile = dout.to(tl.float32) * inverse[:, None]
        if HAS_GATES:
            dn_tile *= tl.exp(gate_i.to(tl.float32))[:, None]
        tl.store(dn + own * E + e[None, :], dn_tile.to(dn.dtype.element_ty), mask=valid[:, None])


@triton.jit(do_not_specialize=["tokens", "tiles"])
def key_grad_kernel(
    q, k, v, dy, inverses, dz, peaks, gates, table, partial, moments, grad, flow, tokens, heads, groups, tiles,
    VALUES: tl.constexpr, HAS_GATES: tl.constexpr, HAS_STATE: tl.constexpr, HAS_FINAL: tl.constexpr, P: tl.constexpr,
    D: tl.constexpr, E: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, CT: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """dv (VALUES) or dk of BM tokens of one key/value head; ``partial`` is what comes to them through the state.

    q [tokens, heads·groups, D] is scaled already; flow [heads, tokens] receives k·dk.
    """
    program = tl.program_id(0)
    tile = program % tiles
    outer = program // tiles
    head = (outer % heads).to(tl.int64)
    slot = (outer // heads).to(tl.int64)
    start = tl.load(table + slot * 4).to(tl.int64)
    end = tl.load(table + slot * 4 + 1).to(tl.int64)
    at_end = tl.load(table + slot * 4 + 3)
    first = start + tile * BM
    if first >= end:
        return
    WIDTH: tl.constexpr = E if VALUES else D
    j = first + tl.arange(0, BM)
    valid = j < end
    d = tl.arange(0, D)
    e = tl.arange(0, E)
    if not VALUES:
        value = tl.load(v + (j * heads + head)[:, None] * E + e[None, :], mask=valid[:, None], other=0.0).to(CT)
    acc = tl.zeros([BM, WIDTH], tl.float32)
    last = tl.minimum(first + BM, end)
    if HAS_GATES:
        gate_j = tl.load(gates + head * tokens + j, mask=valid, other=0.0)
        edge = tl.load(gates + head * tokens + last - 1)
        gate_end = tl.load(gates + head * tokens + end - 1)
        root_j = tl.exp((tl.minimum(edge - gate_j, 0.0) / P).to(tl.float32))
    if HAS_STATE:
        here = slot * heads + head
        present = (at_end == 0) | HAS_FINAL
        ones = tl.full([BM], 1.0, tl.float32)
        if VALUES:
            acc += tl.load(
                partial + (j * heads + head)[:, None] * E + e[None, :], mask=valid[:, None] & present, other=0.0
            )
        else:
            acc += tl.load(
                partial + (j * heads + head)[:, None] * D + d[None, :], mask=valid[:, None] & present, other=0.0
            )
            acc += contract_moment(k, j, valid, head, heads, ones, moments + here * (D * D), D, BM, CT, PREC)
        if HAS_GATES:
            acc *= tl.exp((gate_end - gate_j).to(tl.float32))[:, None]

    key = tl.load(k + (j * heads + head)[:, None] * D + d[None, :], mask=valid[:, None], other=0.0).to(CT)
    for group in range(groups):
        row = head * groups + group
        for n in range(first, end, BN):
            i = n + tl.arange(0, BN)
            inside = i < end
            address = (i * (heads * groups) + row)[:, None]
            query = tl.load(q + address * D + d[None, :], mask=inside[:, None], other=0.0).to(CT)
            dout = tl.load(dy + address * E + e[None, :], mask=inside[:, None], other=0.0).to(CT)
            base = tl.dot(key, tl.trans(query), input_precision=PREC)
            root = tl.where((j[:, None] <= i[None, :]) & inside[None, :], 1.0, 0.0)
            if HAS_GATES:
                gate_i = tl.load(gates + head * tokens + i, mask=inside, other=0.0)
                if n < last:
                    near = (gate_i - edge).to(tl.float32)[None, :] - (gate_j - edge).to(tl.float32)[:, None]
                    root *= tl.exp(tl.minimum(near, 0.0) / P)
                else:
                    root *= root_j[:, None] * tl.exp((tl.minimum(gate_i - edge, 0.0) / P).to(tl.float32))[None, :]
            if P > 2:
                peak = tl.load(peaks + row * tokens + i, mask=inside, other=0.0)
                root *= (1.0 / tl.where(peak == 0, 1.0, peak))[None, :]
            base *= root
            inverse = tl.load(inverses + row * tokens + i, mask=inside, other=0.0)[None, :]
            if VALUES:
                acc = tl.dot((integer_power(base, P) * inverse).to(CT), dout, acc, input_precision=PREC)
            else:
                d_den = tl.load(dz + row * tokens + i, mask=inside, other=0.0)
                dw = tl.dot(value, tl.trans(dout), input_precision=PREC) * inverse + d_den[None, :]
                ds = dw * integer_power(base, P - 1) * root * P
                acc = tl.dot(ds.to(CT), query, acc, input_precision=PREC)

    col = tl.arange(0, WIDTH)
    address = (j * heads + head)[:, None] * WIDTH + col[None, :]
    tl.store(grad + address, acc.to(grad.dtype.element_ty), mask=valid[:, None])
    if not VALUES:
        tl.store(flow + head * tokens + j, tl.sum(acc * key.to(tl.float32), 1), mask=valid)


@triton.jit
def _add_unless_closed(sum_a, closed_a, sum_b, closed_b):
    """Sums that start anew at a closed gate, as an associative operation."""
    return tl.where(closed_b != 0, sum_b, sum_a + sum_b), closed_a | closed_b


@triton.jit(do_not_specialize=["tokens"])
def gate_grad_kernel(
    query_flow, key_flow, leaving, log_g, table, grad, tokens, heads, groups,
    P: tl.constexpr, CLOSED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Reverse cumulative sums of (q·dq − k·dk)/p within each slot, float64, from what crosses its right border.

    query_flow [heads·groups, tokens], key_flow [heads, tokens], leaving [slots, heads] float64, log_g and grad
    [tokens, heads].  Nothing passes a gate below CLOSED: what the sums say there is rounding, so they start anew.
    """
    slot = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1).to(tl.int64)
    start = tl.load(table + slot * 4).to(tl.int64)
    end = tl.load(table + slot * 4 + 1).to(tl.int64)
    carried = tl.load(leaving + slot * heads + head)
    blocks = (end - start + BLOCK - 1) // BLOCK
    for n in range(blocks):
        place = tl.arange(0, BLOCK)
        t = start + (blocks - 1 - n) * BLOCK + place
        inside = t < end
        x = -tl.load(key_flow + head * tokens + t, mask=inside, other=0.0).to(tl.float64)
        for group in range(groups):
            x += tl.load(query_flow + (head * groups + group) * tokens + t, mask=inside, other=0.0).to(tl.float64)
        closed = (tl.load(log_g + t * heads + head, mask=inside, other=0.0).to(tl.float32) < CLOSED).to(tl.int32)
        x = tl.where(closed != 0, 0.0, x / P)
        out, cut = tl.associative_scan((x, closed), 0, _add_unless_closed, reverse=True)
        out += tl.where(cut != 0, 0.0, carried)
        tl.store(grad + t * heads + head, out.to(grad.dtype.element_ty), mask=inside)
        carried = tl.sum(tl.where(place == 0, out, 0.0), 0)
