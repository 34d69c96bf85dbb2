"""Decoding through a ring in one launch: states are only read, but for the sequences whose oldest tokens are due to be folded.

Legend: T new tokens of a sequence, GROUPS query heads that share a key/value head; of their T·GROUPS rows M are padded to in
products with keys, N in products with the state and R in what is stored; D and E widths and DP and EP these padded to powers of
two, L tokens folded at a time, C = 2L places in the ring.  A head of a sequence is worked on by 1 + splits programs: the first
attends to the ring, each other one reads its share of the state in tiles of BR rows.  The last to finish adds up what all left
in ``partial`` and ``sums``, and only then are the new tokens stored: until then somebody may still read the places they take.
"""

from __future__ import annotations

import triton
import triton.language as tl

from power_retention.ops.triton.common import power_of_two_scale, regular_inverse


@triton.jit
def rows_of(query, row, a, scale, valid, D: tl.constexpr, GROUPS: tl.constexpr, heads):
    """Entries ``a`` of the queries ``row`` = t·GROUPS + group, float32 ``[M, len(a)]``, each query in units of its scale."""
    place = (row // GROUPS) * (heads * GROUPS) + row % GROUPS
    x = tl.load(query + (place * D)[:, None] + a[None, :], mask=valid, other=0.0)
    return x.to(tl.float32) * scale[:, None]


@triton.jit
def load_queries(query, row, there, full, heads, D: tl.constexpr, GROUPS: tl.constexpr):
    """(queries in units of their scales, scales): float32 ``[len(row), len(full)]``, ``[len(row)]``."""
    place = (row // GROUPS) * (heads * GROUPS) + row % GROUPS
    raw = tl.load(query + (place * D)[:, None] + full[None, :], mask=there[:, None] & (full < D)[None, :], other=0.0)
    scale = power_of_two_scale(raw)
    return raw.to(tl.float32) * scale[:, None], scale


@triton.jit
def reverse_sum(x):
    """x_j + x_{j+1} + …"""
    return tl.cumsum(x, 0, reverse=True)


@triton.jit
def pair(tile, D: tl.constexpr, BR: tl.constexpr):
    """Rows of a tile of the state: (row, a, b), each the monomial x_a·x_b."""
    r = tile * BR + tl.arange(0, BR)
    if D % BR == 0:
        # A tile lies within one rotation: no division in the loop.
        a = (tile % (D // BR)) * BR + tl.arange(0, BR)
        b = a + tile // (D // BR)
    else:
        a = r % D
        b = a + r // D
    return r, a, tl.where(b >= D, b - D, b)


@triton.jit
def product_of_pairs(
    query, scaled, scale, row, r, a, b, there, heads,
    D: tl.constexpr, GROUPS: tl.constexpr, ROWS: tl.constexpr, M: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """φ of the queries with its multiplicity, rows ``r`` of the state: float32 ``[M, BR]``.

    The rotated factor is gathered from registers: a load, even one that hits the L1 cache, may queue behind the tiles in
    flight.
    """
    if D % BR == 0:
        left = rows_of(query, row, a, scale, there[:, None], D, GROUPS, heads)
    else:
        left = tl.gather(scaled, tl.broadcast_to(a[None, :], [M, BR]), 1)
    phi = left * tl.gather(scaled, tl.broadcast_to(b[None, :], [M, BR]), 1)
    return phi * tl.where(r < D, 1.0, tl.where(r < ROWS, 2.0, 0.0))[None, :]


@triton.jit
def ring_kernel(
    q, k, v, log_g, slot_indices, memory, normalizer, keys, values, gates, cursor, arrived, partial, sums, y,
    heads, splits, memory_stride, normalizer_stride, keys_stride, values_stride, gates_stride,
    HAS_GATES: tl.constexpr, HAS_SLOTS: tl.constexpr, FORGET: tl.constexpr, NOISE: tl.constexpr, T: tl.constexpr,
    TP: tl.constexpr, GROUPS: tl.constexpr, M: tl.constexpr, N: tl.constexpr, R: tl.constexpr, D: tl.constexpr,
    DP: tl.constexpr, E: tl.constexpr, EP: tl.constexpr, L: tl.constexpr, LP: tl.constexpr, CP: tl.constexpr, BR: tl.constexpr,
    CHUNK: tl.constexpr, PARTS: tl.constexpr, CT: tl.constexpr, ST: tl.constexpr, PREC: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """y [B, T, heads·GROUPS, E] of new tokens q, k [B, T, heads, D], v, log_g of sequences in ``slot_indices`` [B]."""
    ROWS: tl.constexpr = D * (D + 1) // 2
    TILES: tl.constexpr = (ROWS + BR - 1) // BR
    C: tl.constexpr = 2 * L
    parts = splits + 1
    part = tl.program_id(0) % parts
    n = (tl.program_id(0) // parts).to(tl.int64)
    batch = n // heads
    head = n % heads
    slot = batch
    if HAS_SLOTS:
        slot = tl.load(slot_indices + batch).to(tl.int64)
    row = tl.arange(0, M)
    col = tl.arange(0, EP)
    out = y + (batch * T * heads + head) * (GROUPS * E)
    out_row = (row // GROUPS) * (heads * GROUPS) + row % GROUPS
    there = row < T * GROUPS
    if slot < 0:
        if part == 0:
            nothing = tl.zeros([M, EP], y.dtype.element_ty)
            tl.store(out + (out_row * E)[:, None] + col[None, :], nothing, mask=there[:, None] & (col < E)[None, :])
        return

    here = slot * heads + head
    start = tl.load(cursor + here * 2)
    fill = tl.load(cursor + here * 2 + 1)
    folds = fill + T > C
    kept_start = tl.where(folds, (start + L) % C, start)
    kept = tl.where(folds, fill - L, fill)
    ring_k = keys + slot * keys_stride + head * (C * D)
    ring_v = values + slot * values_stride + head * (C * E)
    ring_g = gates + slot * gates_stride + head * C
    query = q + (batch * T * heads + head) * (GROUPS * D)
    new_k = k + (batch * T * heads + head) * D
    new_v = v + (batch * T * heads + head) * E
    new_g = log_g + batch * T * heads + head

    full = tl.arange(0, DP)
    base = (n * parts + part) * R
    if part == 0:
        # Attention to what the ring keeps and to the new tokens; its share carries the state's decay along.  Everything is
        # fetched before anything is waited for.
        asked, _ = load_queries(query, row, there, full, heads, D, GROUPS)
        j = tl.arange(0, CP)
        at = (kept_start + j) % C
        t = j - kept
        old = j < kept
        new = (t >= 0) & (t < T)
        gate = tl.load(ring_g + at, mask=old, other=0.0)
        next_gate = tl.load(ring_g + (at + 1) % C, mask=j + 1 < kept, other=0.0)
        if HAS_GATES:
            gate += tl.maximum(tl.load(new_g + t * heads, mask=new, other=0.0).to(tl.float32), FORGET)
            later = (t >= -1) & (t < T - 1)
            next_gate += tl.maximum(tl.load(new_g + (t + 1) * heads, mask=later, other=0.0).to(tl.float32), FORGET)
        inside = (full < D)[None, :]
        old_key = tl.load(ring_k + (at * D)[:, None] + full[None, :], mask=old[:, None] & inside, other=0.0)
        new_key = tl.load(new_k + (t * heads * D)[:, None] + full[None, :], mask=new[:, None] & inside, other=0.0)
        inside = (col < E)[None, :]
        old_value = tl.load(ring_v + (at * E)[:, None] + col[None, :], mask=old[:, None] & inside, other=0.0)
        new_value = tl.load(new_v + (t * heads * E)[:, None] + col[None, :], mask=new[:, None] & inside, other=0.0)
        score = tl.dot(asked.to(CT), tl.trans(old_key.to(CT) + new_key.to(CT)), input_precision=PREC)
        after = reverse_sum(next_gate)
        own = kept + row // GROUPS
        after_own = tl.sum(tl.where(j[None, :] == own[:, None], after[None, :], 0.0), 1)
        decay = tl.exp(tl.minimum(after[None, :] - after_own[:, None], 0.0))
        weight = tl.where(j[None, :] <= own[:, None], score * score * decay, 0.0)
        near = tl.dot(weight.to(CT), old_value.to(CT) + new_value.to(CT), input_precision=PREC)
        kept_rows = row < R
        tl.store(partial + ((base + row) * EP)[:, None] + col[None, :], near, mask=kept_rows[:, None])
        tl.store(sums + (base + row) * 2, tl.sum(weight, 1), mask=kept_rows)
        tl.store(sums + (base + row) * 2 + 1, tl.exp(tl.sum(gate, 0) - after_own), mask=kept_rows)
    else:
        # The tile's columns are the rows of the product, and the queries its columns: eight of them are no waste.
        line = tl.arange(0, N)
        asks = line < T * GROUPS
        scaled, scale = load_queries(query, line, asks, full, heads, D, GROUPS)
        state = memory + slot * memory_stride + head * (ROWS * E)
        norm = normalizer + slot * normalizer_stride + head * ROWS
        acc = tl.zeros([EP, N], tl.float32)
        dens = tl.zeros([N, BR], tl.float32)
        begin = (part - 1) * TILES // splits
        end = part * TILES // splits
        if folds:
            f = tl.arange(0, LP)
            at = (start + f) % C
            due = f < L
            after = reverse_sum(tl.load(ring_g + (at + 1) % C, mask=f + 1 < L, other=0.0))
            weight = tl.where(due, tl.exp(after), 0.0)
            decay = tl.exp(tl.sum(tl.load(ring_g + at, mask=due, other=0.0), 0))
            value = tl.load(
                ring_v + (at * E)[:, None] + col[None, :], mask=due[:, None] & (col < E)[None, :], other=0.0
            ).to(ST)
            for tile in tl.range(begin, end, num_stages=1):
                r, a, b = pair(tile, D, BR)
                exists = (r < ROWS)[:, None] & due[None, :]
                phi = tl.load(ring_k + (at * D)[None, :] + a[:, None], mask=exists, other=0.0).to(tl.float32)
                phi *= tl.load(ring_k + (at * D)[None, :] + b[:, None], mask=exists, other=0.0).to(tl.float32)
                phi *= weight[None, :]
                address = state + r[:, None] * E + col[None, :]
                mask = (r < ROWS)[:, None] & (col < E)[None, :]
                s = tl.load(address, mask=mask, other=0.0).to(tl.float32) * decay
                s = tl.dot(phi.to(ST), value, s, input_precision=PREC).to(memory.dtype.element_ty)
                tl.store(address, s, mask=mask)
                z = tl.load(norm + r, mask=r < ROWS, other=0.0) * decay + tl.sum(phi, 1)
                tl.store(norm + r, z, mask=r < ROWS)
                phi = product_of_pairs(query, scaled, scale, line, r, a, b, asks, heads, D, GROUPS, ROWS, N, BR)
                acc = tl.dot(tl.trans(s.to(ST)), tl.trans(phi.to(ST)), acc, input_precision=PREC)
                dens += phi * z[None, :]
            tl.debug_barrier()  # what other threads of this program wrote of the normaliser is read below
        else:
            for tile in tl.range(begin, end, num_stages=STAGES):
                r, a, b = pair(tile, D, BR)
                address = state + r[None, :] * E + col[:, None]
                if ROWS % BR == 0 and E == EP:
                    s = tl.load(address, eviction_policy="evict_first")
                    z = tl.load(norm + r)
                else:
                    mask = (r < ROWS)[None, :] & (col < E)[:, None]
                    s = tl.load(address, mask=mask, other=0.0, eviction_policy="evict_first")
                    z = tl.load(norm + r, mask=r < ROWS, other=0.0)
                phi = product_of_pairs(query, scaled, scale, line, r, a, b, asks, heads, D, GROUPS, ROWS, N, BR)
                acc = tl.dot(s.to(ST), tl.trans(phi.to(ST)), acc, input_precision=PREC)
                dens += phi * z[None, :]
        mine = (full >= begin * BR) & (full < end * BR) & (full < D)
        trace = tl.sum(tl.load(norm + full, mask=mine, other=0.0), 0)
        stored = line < R
        tl.store(partial + ((base + line) * EP)[None, :] + col[:, None], acc, mask=stored[None, :])
        tl.store(sums + (base + line) * 2, tl.sum(dens, 1), mask=stored)
        tl.store(sums + (base + line) * 2 + 1, NOISE * trace * tl.sum(scaled * scaled, 1), mask=stored)

    tl.debug_barrier()
    if tl.atomic_add(arrived + here, 1, sem="acq_rel") == splits:
        tl.atomic_xchg(arrived + here, 0)
        flat = tl.arange(0, R * EP)
        first = n * parts * R
        lane = tl.arange(0, R)
        share = tl.arange(0, PARTS)
        address = sums + (first + share[:, None] * R + lane[None, :]) * 2
        of_state = ((share > 0) & (share < parts))[:, None]
        decay = tl.load(sums + (first + lane) * 2 + 1, cache_modifier=".cg")
        below = tl.load(sums + (first + lane) * 2, cache_modifier=".cg")
        below_state = tl.load(address, mask=of_state, other=0.0, cache_modifier=".cg")
        noises = tl.load(address + 1, mask=of_state, other=0.0, cache_modifier=".cg")
        near = tl.load(partial + first * EP + flat, cache_modifier=".cg")
        t = tl.arange(0, TP)[:, None]
        key_mask = (t < T) & (full < D)[None, :]
        value_mask = (t < T) & (col < E)[None, :]
        key = tl.load(new_k + t * heads * D + full[None, :], mask=key_mask)
        value = tl.load(new_v + t * heads * E + col[None, :], mask=value_mask)
        gate = tl.zeros([TP, 1], tl.float32)
        if HAS_GATES:
            gate = tl.maximum(tl.load(new_g + t * heads, mask=t < T, other=0.0).to(tl.float32), FORGET)
        total = tl.zeros([R * EP], tl.float32)
        for group in range(1, parts, CHUNK):
            some = group + tl.arange(0, CHUNK)
            pieces = partial + (first * EP + some * (R * EP))[:, None] + flat[None, :]
            asked = (some < parts)[:, None] & (flat < T * GROUPS * EP)[None, :]
            total += tl.sum(tl.load(pieces, mask=asked, other=0.0, cache_modifier=".cg"), 0)
        below += tl.sum(below_state, 0) * decay
        noise = tl.sum(noises, 0) * decay
        inverse, _ = regular_inverse(below, tl.maximum(noise, 0.0))
        answer = (tl.reshape(total, (R, EP)) * decay[:, None] + tl.reshape(near, (R, EP))) * inverse[:, None]
        lane_row = (lane // GROUPS) * (heads * GROUPS) + lane % GROUPS
        mask = (lane < T * GROUPS)[:, None] & (col < E)[None, :]
        tl.store(out + (lane_row * E)[:, None] + col[None, :], answer.to(y.dtype.element_ty), mask=mask)

        at = (kept_start + kept + t) % C
        tl.store(ring_k + at * D + full[None, :], key, mask=key_mask)
        tl.store(ring_v + at * E + col[None, :], value, mask=value_mask)
        tl.store(ring_g + at, gate, mask=t < T)
        tl.store(cursor + here * 2, kept_start)
        tl.store(cursor + here * 2 + 1, kept + T)
