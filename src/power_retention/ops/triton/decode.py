"""One token of decoding in one launch: the state is read once, extended, written back, and its answer reduced in place."""

from __future__ import annotations

import triton
import triton.language as tl

from power_retention.ops.triton.common import regular_inverse


@triton.jit
def decode_kernel(
    q, k, v, log_g, memory, normalizer, partial, arrived, y, heads, splits,
    HAS_GATES: tl.constexpr, FORGET: tl.constexpr, NOISE: tl.constexpr, GROUPS: tl.constexpr,
    D: tl.constexpr, DP: tl.constexpr, E: tl.constexpr, EP: tl.constexpr, BR: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """S ← g·S + φ(k)vᵀ, s ← g·s + φ(k), y = φ(q)ᵀS / φ(q)ᵀs for one token of each sequence.

    q, y [B, heads·GROUPS, ·], k, v [B, heads, ·], log_g [B, heads], memory [B, heads, D(D+1)/2, E] and normalizer in the
    canonical layout.  A program owns BR rows of one state and leaves its part of the sums in ``partial``
    [B·heads, splits, GROUPS, EP + 2]; the last to arrive adds them up, and sets ``arrived`` back to 0 for the next launch.
    """
    ROWS: tl.constexpr = D * (D + 1) // 2
    split = tl.program_id(0)
    n = tl.program_id(1).to(tl.int64)
    row = split * BR + tl.arange(0, BR)
    inside = row < ROWS
    a = row % D
    b = (a + row // D) % D
    col = tl.arange(0, EP)
    own = inside[:, None] & (col < E)[None, :]
    gate = 1.0
    if HAS_GATES:
        gate = tl.exp(tl.maximum(tl.load(log_g + n).to(tl.float32), FORGET))
    key = tl.load(k + n * D + a, mask=inside, other=0.0).to(tl.float32)
    key *= tl.load(k + n * D + b, mask=inside, other=0.0).to(tl.float32)
    value = tl.load(v + n * E + col, mask=col < E, other=0.0).to(tl.float32)
    address = memory + (n * ROWS + row)[:, None] * E + col[None, :]
    state = tl.load(address, mask=own, other=0.0).to(tl.float32) * gate + key[:, None] * value[None, :]
    tl.store(address, state.to(memory.dtype.element_ty), mask=own)
    old = tl.load(normalizer + n * ROWS + row, mask=inside, other=0.0).to(tl.float32) * gate
    weight = old + key
    tl.store(normalizer + n * ROWS + row, weight.to(normalizer.dtype.element_ty), mask=inside)
    trace = tl.sum(tl.where(row < D, old, 0.0), 0)

    multiplicity = tl.where(row < D, 1.0, 2.0)
    full = tl.arange(0, DP)
    for group in tl.static_range(GROUPS):
        query = q + (n * GROUPS + group) * D
        whole = tl.load(query + full, mask=full < D, other=0.0).to(tl.float32)
        exponent = tl.max(tl.abs(whole), 0).to(tl.int32, bitcast=True) >> 23
        exponent = tl.where(exponent == 0, 127, tl.minimum(exponent, 253))
        scale = ((254 - exponent) << 23).to(tl.float32, bitcast=True)
        phi = tl.load(query + a, mask=inside, other=0.0).to(tl.float32) * scale
        phi *= tl.load(query + b, mask=inside, other=0.0).to(tl.float32) * scale * multiplicity
        out = partial + ((n * splits + split) * GROUPS + group) * (EP + 2)
        tl.store(out + col, tl.sum(phi[:, None] * state, 0))
        tl.store(out + EP, tl.sum(phi * weight, 0))
        tl.store(out + EP + 1, trace * NOISE * tl.sum(whole * whole, 0) * scale * scale)

    tl.debug_barrier()
    if tl.atomic_add(arrived + n, 1, sem="acq_rel") == splits - 1:
        tl.atomic_xchg(arrived + n, 0)
        part = tl.arange(0, SPLITS)
        there = part < splits
        for group in tl.static_range(GROUPS):
            base = partial + ((n * splits + part) * GROUPS + group) * (EP + 2)
            sums = tl.load(base[:, None] + col[None, :], mask=there[:, None], other=0.0, cache_modifier=".cg")
            den = tl.sum(tl.load(base + EP, mask=there, other=0.0, cache_modifier=".cg"), 0)
            noise = tl.sum(tl.load(base + EP + 1, mask=there, other=0.0, cache_modifier=".cg"), 0)
            inverse, _ = regular_inverse(den, tl.maximum(noise, 0.0))
            answer = tl.sum(sums, 0) * inverse
            tl.store(y + (n * GROUPS + group) * E + col, answer.to(y.dtype.element_ty), mask=col < E)
