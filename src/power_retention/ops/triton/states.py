"""The state entering every chunk: φ(x)ᵀu accumulated along a run, forward (keys, values) or backward (queries, gradients)."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["tokens"])
def accumulate_kernel(
    xt, u, order, gates, table, borders, initial, states, other, flows, final, columns, pad, tokens, heads, groups,
    HAS_GATES: tl.constexpr, HAS_INITIAL: tl.constexpr, KEEP_STATES: tl.constexpr, KEEP_FINAL: tl.constexpr,
    REVERSE: tl.constexpr, FLOWS: tl.constexpr,
    D: tl.constexpr, W: tl.constexpr, E: tl.constexpr, BR: tl.constexpr, BE: tl.constexpr, BT: tl.constexpr,
    CT: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """A program owns BR rows of φ and BE value columns of one head's state and walks along one run.

    xt [heads·groups, D, columns]; u [tokens, heads·groups, E], already weighted; order [4, ROWS]: of each row of a state its
    factors a and b, its canonical index, and whether it is the first row of that index; states
    [slots, heads, ROWS, E]: twice what enters each slot; initial and final [runs, heads, D(D+1)/2, E].  With REVERSE it
    walks from the right: then initial, final are gradients of a state, and with FLOWS ``flows`` [slots, heads, programs]
    receives the part of ⟨state, its gradient⟩ at each slot's start, ``other`` being the forward states.
    """
    ROWS: tl.constexpr = D * (D // 2 + 1)
    CANONICAL: tl.constexpr = D * (D + 1) // 2
    NEAR: tl.constexpr = D * (W // 2 + 1)
    NEAR_TILES: tl.constexpr = (NEAR + BR - 1) // BR
    program = tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    run = tl.program_id(2).to(tl.int64)
    tile = program // (E // BE)
    far = tile >= NEAR_TILES
    top = tl.where(far, NEAR + (tile - NEAR_TILES) * BR, tile * BR)
    row = top + tl.arange(0, BR)
    col = (program % (E // BE)) * BE + tl.arange(0, BE)
    inside = row < tl.where(far, ROWS, NEAR)
    own = inside[:, None]
    a = tl.load(order + row, mask=inside, other=0)
    b = tl.load(order + ROWS + row, mask=inside, other=0)
    canonical = tl.load(order + 2 * ROWS + row, mask=inside, other=0)
    diagonal = (a == b)[:, None]

    acc = tl.zeros([BR, BE], tl.float32)
    if HAS_INITIAL:
        address = ((run * heads + head) * CANONICAL + canonical)[:, None] * E + col[None, :]
        acc += tl.load(initial + address, mask=own, other=0.0).to(tl.float32)
        if REVERSE:
            acc = tl.where(diagonal, acc, acc * 0.5)
    first = tl.load(borders + run).to(tl.int64)
    last = tl.load(borders + run + 1).to(tl.int64)
    for n in range(last - first):
        slot = last - 1 - n if REVERSE else first + n
        start = tl.load(table + slot * 4).to(tl.int64)
        end = tl.load(table + slot * 4 + 1).to(tl.int64)
        here = ((slot * heads + head) * ROWS + row)[:, None] * E + col[None, :]
        if KEEP_STATES:
            tl.store(states + here, (acc * 2).to(states.dtype.element_ty), mask=own)
        if HAS_GATES:
            acc *= tl.exp(tl.load(gates + head * tokens + end - 1).to(tl.float32))
        length = (end - start).to(tl.int32)
        steps = groups * ((length + BT - 1) // BT)
        source = head * groups
        place = 0
        if far:
            # BR/W columns times the W of one block: few rows to load, many products.
            block = tl.load(order + top) + tl.arange(0, W)
            single = tl.load(order + ROWS + top) + tl.arange(0, BR // W)
            for _ in range(steps):
                t = place + tl.arange(0, BT)
                column = xt + source * D * columns + (slot * pad + t)[None, :]
                left = tl.load(column + single[:, None] * columns).to(CT)
                right = tl.load(column + block[:, None] * columns).to(CT)
                phi = tl.reshape(left[:, None, :] * right[None, :, :], [BR, BT])
                token = start + t
                values = u + (token * (heads * groups) + source)[:, None] * E + col[None, :]
                weighted = tl.load(values, mask=(token < end)[:, None], other=0.0).to(CT)
                acc = tl.dot(phi, weighted, acc, input_precision=PREC)
                # On to the next tile, or to the next query head's first: no division in this loop.
                wrap = place + BT >= length
                source += wrap.to(tl.int64)
                place = tl.where(wrap, 0, place + BT)
        else:
            for _ in range(steps):
                t = place + tl.arange(0, BT)
                column = xt + source * D * columns + (slot * pad + t)[None, :]
                left = tl.load(column + a[:, None] * columns).to(CT)
                right = tl.load(column + b[:, None] * columns).to(CT)
                token = start + t
                values = u + (token * (heads * groups) + source)[:, None] * E + col[None, :]
                weighted = tl.load(values, mask=(token < end)[:, None], other=0.0).to(CT)
                acc = tl.dot(left * right, weighted, acc, input_precision=PREC)
                wrap = place + BT >= length
                source += wrap.to(tl.int64)
                place = tl.where(wrap, 0, place + BT)
        if FLOWS:
            entering = tl.load(other + here, mask=own, other=0.0).to(tl.float32)
            # A pair of two columns counts twice, in one row or in two; the stored states have their factor of two.
            once = (diagonal | (((b - a) & (W - 1)) == W // 2)[:, None]) & (a // W == b // W)[:, None]
            part = tl.sum(tl.sum(tl.where(own, acc * entering * tl.where(once, 0.5, 1.0), 0.0), 1), 0)
            tl.store(flows + (slot * heads + head) * tl.num_programs(0) + program, part)
    if KEEP_FINAL:
        if REVERSE:
            acc = tl.where(diagonal, acc, acc * 2)
        unique = inside & (tl.load(order + 3 * ROWS + row, mask=inside, other=0) != 0)
        address = ((run * heads + head) * CANONICAL + canonical)[:, None] * E + col[None, :]
        tl.store(final + address, acc, mask=unique[:, None])
