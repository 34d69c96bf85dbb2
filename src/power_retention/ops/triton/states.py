"""The state entering every chunk: φ(x)ᵀu accumulated along a run, forward (keys, values) or backward (queries, gradients).

Inside the kernels a state has a full last row o = D/2, so that every row of the layout is D long; its two halves are the
same monomials and count once each, where rows 0 < o < D/2 count twice.  The reader then needs no multiplicity.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def accumulate_kernel(
    xt, u, gates, table, borders, initial, states, other, flows, final, columns, pad, tokens, heads, groups,
    HAS_GATES: tl.constexpr, HAS_INITIAL: tl.constexpr, KEEP_STATES: tl.constexpr, KEEP_FINAL: tl.constexpr,
    REVERSE: tl.constexpr, FLOWS: tl.constexpr,
    D: tl.constexpr, E: tl.constexpr, BR: tl.constexpr, BE: tl.constexpr, BT: tl.constexpr,
    CT: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """A program owns BR rows of φ and BE value columns of one head's state and walks along one run.

    xt [heads·groups, D, columns]; u [tokens, heads·groups, E], already weighted; states [slots, heads, ROWS, E]: what enters
    each slot, times the multiplicity; initial and final [runs, heads, D(D+1)/2, E].  With REVERSE it walks from the right:
    then initial, final are gradients of a state, and with FLOWS ``flows`` [slots, heads, programs] receives the part
    of ⟨state, its gradient⟩ at each slot's start, ``other`` being the forward states.
    """
    ROWS: tl.constexpr = D * (D // 2 + 1)
    CANONICAL: tl.constexpr = D * (D + 1) // 2
    program = tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    run = tl.program_id(2).to(tl.int64)
    row = (program // (E // BE)) * BR + tl.arange(0, BR)
    col = (program % (E // BE)) * BE + tl.arange(0, BE)
    offset = row // D
    a = row % D
    b = (a + offset) % D
    own = (row < ROWS)[:, None]
    twice = ((offset > 0) & (offset < D // 2))[:, None]
    diagonal = (offset == 0)[:, None]

    acc = tl.zeros([BR, BE], tl.float32)
    if HAS_INITIAL:
        canonical = tl.where(row < CANONICAL, row, row - D // 2)
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
            tl.store(states + here, tl.where(twice, acc * 2, acc).to(states.dtype.element_ty), mask=own)
        if HAS_GATES:
            acc *= tl.exp(tl.load(gates + head * tokens + end - 1).to(tl.float32))
        steps = (end - start + BT - 1) // BT
        for step in range(groups * steps):
            source = head * groups + step // steps
            t = (step % steps) * BT + tl.arange(0, BT)
            left = xt + (source * D + a)[:, None] * columns + (slot * pad + t)[None, :]
            right = xt + (source * D + b)[:, None] * columns + (slot * pad + t)[None, :]
            phi = tl.load(left).to(CT) * tl.load(right).to(CT)
            token = start + t
            values = u + (token * (heads * groups) + source)[:, None] * E + col[None, :]
            weighted = tl.load(values, mask=(token < end)[:, None], other=0.0).to(CT)
            acc = tl.dot(phi, weighted, acc, input_precision=PREC)
        if FLOWS:
            entering = tl.load(other + here, mask=own, other=0.0).to(tl.float32)
            part = tl.sum(tl.sum(tl.where(own, acc * entering, 0.0), 1), 0)
            tl.store(flows + (slot * heads + head) * tl.num_programs(0) + program, part)
    if KEEP_FINAL:
        if REVERSE:
            acc = tl.where(diagonal, acc, acc * 2)
        address = ((run * heads + head) * CANONICAL + row)[:, None] * E + col[None, :]
        tl.store(final + address, acc, mask=(row < CANONICAL)[:, None])
