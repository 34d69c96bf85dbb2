"""Decoding through a ring on Hopper in one launch: the copy engine streams the states, products read them where they land.

The tiles of 64 rows of all states, one head of a sequence (an *item*) after the other, are cut into equal pieces, one for each
program.  In a program one warp fetches tiles, as far ahead as shared memory allows; four warps multiply them with φ(q); four
others attend to the ring of every item that begins in the piece.  What a piece reads of an item is one *part* of its sums, and
attention another; whoever brings an item's last part adds all of them up in their order, and stores the new token: until then
somebody may still read its place.  Where the oldest L tokens are due to be folded, a tile takes them in where it lies, and is
written back from there before it is read.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from power_retention.ops.triton.hopper.common import power_of_two_scale, regular_inverse


@gluon.jit
def piece_start(program, programs, tiles):
    """The first of a program's share of all ``tiles``."""
    return program * tiles // programs


@gluon.jit
def owner(tile, programs, tiles):
    """The program whose share a tile is in."""
    return ((tile + 1) * programs - 1) // tiles


@gluon.jit
def _slot(slot_indices, batch, HAS_SLOTS: gl.constexpr):
    slot = batch
    if HAS_SLOTS:
        slot = gl.load(slot_indices + batch).to(gl.int32)
    return slot


@gluon.jit
def _pair(tile, i, D: gl.constexpr):
    """Rows ``i`` of a tile, which lies within one rotation: (row of the state, a, b), each the monomial x_a·x_b."""
    a = tile % (D // 64) * 64 + i
    b = a + tile // (D // 64)
    return tile * 64 + i, a, gl.where(b >= D, b - D, b)


@gluon.jit
def _sum_after(gate, row, across):
    """Sum of the gates that come after each ``row``."""
    return gl.sum(gl.where(across[None, :] > row[:, None], gate[None, :], 0.0), 1)


@gluon.jit
def _fetch(
    state_desc, norm_desc, tiles, norms, full, empty, slot_indices, page_rows, page_entries, heads, total,
    HAS_SLOTS: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """The producer: every tile of the piece, and its part of the normaliser."""
    ROWS: gl.constexpr = D * (D + 1) // 2
    TILES: gl.constexpr = (ROWS + 63) // 64
    BOX: gl.constexpr = state_desc.block_type.shape[0]
    BYTES: gl.constexpr = 64 // BOX * state_desc.block_type.nbytes + norm_desc.block_type.nbytes
    begin = piece_start(gl.program_id(0), gl.num_programs(0), total)
    end = piece_start(gl.program_id(0) + 1, gl.num_programs(0), total)
    n = 0
    for item in range(begin // TILES, (end + TILES - 1) // TILES):
        slot = _slot(slot_indices, item // heads, HAS_SLOTS)
        if slot >= 0:
            first = item % heads * ROWS
            for tile in range(gl.maximum(begin - item * TILES, 0), gl.minimum(end - item * TILES, TILES)):
                stage = n % STAGES
                row = first + tile * 64
                mbarrier.wait(empty.index(stage), (n // STAGES & 1) ^ 1)
                mbarrier.expect(full.index(stage), BYTES)
                target = tiles.index(stage)
                state_row = slot * page_rows + row
                tma.async_copy_global_to_shared(state_desc, [state_row, 0], full.index(stage), target.slice(0, BOX))
                if BOX < 64:
                    # The last tile is half a tile: its other half is anything of the same state, and weighs nothing.
                    state_row += gl.where(tile < TILES - 1, BOX, 0)
                    tma.async_copy_global_to_shared(
                        state_desc, [state_row, 0], full.index(stage), target.slice(BOX, BOX)
                    )
                tma.async_copy_global_to_shared(
                    norm_desc, [0, slot * page_entries + row], full.index(stage), norms.index(stage)
                )
                n += 1


@gluon.jit
def _arrive(
    item, slot, start, fill, new, ring, results, heads, total, parts,
    HAS_GATES: gl.constexpr, FORGET: gl.constexpr, GROUPS: gl.constexpr, N: gl.constexpr,
    D: gl.constexpr, E: gl.constexpr, L: gl.constexpr,
):  # fmt: skip
    """One part of an item's sums is stored; the last one to come here adds up, answers, and stores the new token."""
    TILES: gl.constexpr = (D * (D + 1) // 2 + 63) // 64
    keys, values, gates, cursor, arrived, keys_stride, values_stride, gates_stride = ring
    programs = gl.num_programs(0)
    here = slot * heads + item % heads
    count = owner(item * TILES + TILES - 1, programs, total) - owner(item * TILES, programs, total) + 1
    gl.thread_barrier()
    if gl.atomic_add(arrived + here, 1, sem="acq_rel") == count:
        gl.atomic_xchg(arrived + here, 0)
        k, v, log_g = new[1], new[2], new[3]
        partial, sums, y = results
        head = item % heads
        where: gl.constexpr = gl.BlockedLayout([1, 4], [128 // N, N // 4], [4, 1], [1, 0])
        col = gl.arange(0, E, gl.SliceLayout(1, where))
        line = gl.arange(0, N, gl.SliceLayout(0, where))
        base = item.to(gl.int64) * parts
        address = partial + base * (E * N) + col[:, None] * N + line[None, :]
        numbers = sums + base * (2 * N) + line
        near = gl.load(address, cache_modifier=".cg")
        den = gl.load(numbers, cache_modifier=".cg")
        decay = gl.load(numbers + N, cache_modifier=".cg")

        line_d = gl.arange(0, D, gl.BlockedLayout([1], [32], [4], [0]))
        key = gl.load(k + item.to(gl.int64) * D + line_d)
        value = gl.load(v + item.to(gl.int64) * E + line_d)
        far = gl.zeros([E, N], gl.float32, where)
        den_far = gl.zeros([N], gl.float32, gl.SliceLayout(0, where))
        noise = gl.zeros([N], gl.float32, gl.SliceLayout(0, where))
        for first in range(1, count + 1, 8):
            for i in gl.static_range(8):
                part = first + i
                there = part + line * 0 <= count
                far += gl.load(
                    address + part * (E * N), mask=(part + col * 0 <= count)[:, None], other=0.0, cache_modifier=".cg"
                )
                den_far += gl.load(numbers + part * (2 * N), mask=there, other=0.0, cache_modifier=".cg")
                noise += gl.load(numbers + part * (2 * N) + N, mask=there, other=0.0, cache_modifier=".cg")
        inverse, _ = regular_inverse(den + den_far * decay, gl.maximum(noise * decay, 0.0))
        answer = (far * decay[None, :] + near) * inverse[None, :]
        target = y + item.to(gl.int64) * (GROUPS * E) + line[None, :] * E + col[:, None]
        gl.store(target, answer.to(y.dtype.element_ty), mask=(line < GROUPS)[None, :])

        gate = 0.0
        if HAS_GATES:
            gate = gl.maximum(gl.load(log_g + item).to(gl.float32), FORGET)
        C: gl.constexpr = 2 * L
        folded = gl.where(fill >= C, L, 0)
        start = (start + folded) % C
        fill = fill - folded
        place = (start + fill) % C
        page = slot.to(gl.int64)
        gl.store(keys + page * keys_stride + (head * C + place) * D + line_d, key)
        gl.store(values + page * values_stride + (head * C + place) * E + line_d, value)
        gl.store(gates + page * gates_stride + head * C + place, gate)
        gl.store(cursor + here * 2, start)
        gl.store(cursor + here * 2 + 1, fill + 1)


@gluon.jit
def _attend(
    new, ring, results, slot_indices, heads, total, parts,
    HAS_GATES: gl.constexpr, HAS_SLOTS: gl.constexpr, FORGET: gl.constexpr, GROUPS: gl.constexpr, N: gl.constexpr,
    D: gl.constexpr, E: gl.constexpr, L: gl.constexpr, CP: gl.constexpr,
):  # fmt: skip
    """Attention to what the ring keeps and to the new token, for the items that begin in the piece: part 0 of their sums."""
    TILES: gl.constexpr = (D * (D + 1) // 2 + 63) // 64
    C: gl.constexpr = 2 * L
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    across = gl.arange(0, CP, gl.SliceLayout(0, layout))
    col = gl.arange(0, D, gl.SliceLayout(0, layout))
    one = gl.arange(0, 1, gl.SliceLayout(1, layout))
    line = gl.arange(0, N, gl.SliceLayout(1, layout))
    q, k, v, log_g = new
    keys, values, gates, cursor, _arrived, keys_stride, values_stride, gates_stride = ring
    partial, sums, y = results
    begin = piece_start(gl.program_id(0), gl.num_programs(0), total)
    end = piece_start(gl.program_id(0) + 1, gl.num_programs(0), total)
    for item in range((begin + TILES - 1) // TILES, (end + TILES - 1) // TILES):
        head = item % heads
        slot = _slot(slot_indices, item // heads, HAS_SLOTS)
        wide = item.to(gl.int64)
        if slot < 0:
            nothing = gl.zeros([N, D], y.dtype.element_ty, layout)
            target = y + wide * (GROUPS * E) + line[:, None] * E + col[None, :]
            gl.store(target, nothing, mask=(line < GROUPS)[:, None])
        else:
            here = slot * heads + head
            start = gl.load(cursor + here * 2)
            fill = gl.load(cursor + here * 2 + 1)
            folded = gl.where(fill >= C, L, 0)
            kept = fill - folded
            page = slot.to(gl.int64)
            own_k = keys + page * keys_stride + head * (C * D)
            own_v = values + page * values_stride + head * (C * E)
            at = (start + folded + across) % C
            gate = gl.load(gates + page * gates_stride + head * C + at, mask=across < kept, other=0.0)
            if HAS_GATES:
                now = gl.maximum(gl.load(log_g + item).to(gl.float32), FORGET)
                gate += gl.where(across == kept, now, 0.0)
            answer = gl.zeros([N, E], gl.float32, layout)
            below = gl.zeros([N], gl.float32, gl.SliceLayout(1, layout))
            for block in gl.static_range(CP // 64):
                row = block * 64 + gl.arange(0, 64, gl.SliceLayout(1, layout))
                at = (start + folded + row) % C
                old = (row < kept)[:, None]
                last = (row == kept)[:, None]
                key = gl.load(own_k + (at * D)[:, None] + col[None, :], mask=old, other=0.0)
                key += gl.load(k + wide * D + (row * 0)[:, None] + col[None, :], mask=last, other=0.0)
                value = gl.load(own_v + (at * E)[:, None] + col[None, :], mask=old, other=0.0)
                value += gl.load(v + wide * E + (row * 0)[:, None] + col[None, :], mask=last, other=0.0)
                after = gl.exp(_sum_after(gate, row, across))
                for group in gl.static_range(GROUPS):
                    query = gl.load(q + (wide * GROUPS + group) * D + one[:, None] + col[None, :]).to(gl.float32)
                    query *= power_of_two_scale(query)[:, None]
                    score = gl.sum(key.to(gl.float32) * query, 1)
                    weight = score * score * after
                    near = gl.expand_dims(gl.sum(value.to(gl.float32) * weight[:, None], 0), 0)
                    answer += gl.where((line == group)[:, None], near, 0.0)
                    below += gl.where(line == group, gl.sum(weight, 0), 0.0)
            base = wide * parts
            gl.store(partial + base * (E * N) + col[None, :] * N + line[:, None], answer)
            gl.store(sums + base * (2 * N) + line, below)
            gl.store(sums + base * (2 * N) + N + line, line * 0 + gl.exp(gl.sum(gate, 0)))
            _arrive(item, slot, start, fill, new, ring, results, heads, total, parts,
                    HAS_GATES, FORGET, GROUPS, N, D, E, L)  # fmt: skip


@gluon.jit
def _fold(
    state_desc, state_row, norm, tile, rows, entries, key_rows, folded_values, own_k, places, weight, decay,
    D: gl.constexpr, E: gl.constexpr, L: gl.constexpr, LP: gl.constexpr,
):  # fmt: skip
    """rows, entries ← decay·(the same) + φ(keys)ᵀ·(weight, values), here and in memory."""
    ROWS: gl.constexpr = D * (D + 1) // 2
    BOX: gl.constexpr = state_desc.block_type.shape[0]
    tokens: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, E, 16])
    r, a, b = _pair(tile, gl.arange(0, 64, gl.SliceLayout(0, tokens)), D)
    own = own_k + (places * D)[:, None]
    due = (gl.arange(0, LP, gl.SliceLayout(1, tokens)) < L)[:, None] & (r < ROWS)[None, :]
    phi = gl.load(own + a[None, :], mask=due, other=0.0).to(gl.float32)
    phi *= gl.load(own + b[None, :], mask=due, other=0.0).to(gl.float32) * weight[:, None]
    key_rows.store(phi.to(gl.bfloat16))
    entry = entries.load(tokens) * decay + gl.expand_dims(gl.sum(phi, 0), 0)
    gl.store(norm + gl.expand_dims(r, 0), entry, mask=gl.expand_dims(r < ROWS, 0))
    entries.store(entry)
    state = rows.load(mma).to(gl.float32) * decay
    fence_async_shared()
    gl.thread_barrier()
    state = warpgroup_mma(key_rows.permute([1, 0]), folded_values, state, is_async=True)
    state = warpgroup_mma_wait(0, deps=[state])
    rows.store(state.to(gl.bfloat16))
    fence_async_shared()
    gl.thread_barrier()
    if BOX == 64:
        tma.async_copy_shared_to_global(state_desc, [state_row, 0], rows)
    else:
        tma.async_copy_shared_to_global(state_desc, [state_row, 0], rows.slice(0, BOX))
        if tile * 64 + BOX < ROWS:
            tma.async_copy_shared_to_global(state_desc, [state_row + BOX, 0], rows.slice(BOX, BOX))


@gluon.jit
def _read(
    state_desc, tiles, norms, asked, key_rows, folded_values, full, empty, normalizer, page_rows, page_entries,
    new, ring, results, slot_indices, heads, total, parts,
    HAS_GATES: gl.constexpr, HAS_SLOTS: gl.constexpr, FORGET: gl.constexpr, NOISE: gl.constexpr, GROUPS: gl.constexpr,
    N: gl.constexpr, D: gl.constexpr, E: gl.constexpr, L: gl.constexpr, LP: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """φ(q)·state over the piece; a tile's columns are the rows of the product, and the queries its columns."""
    ROWS: gl.constexpr = D * (D + 1) // 2
    TILES: gl.constexpr = (ROWS + 63) // 64
    C: gl.constexpr = 2 * L
    layout: gl.constexpr = gl.BlockedLayout([1, 4], [2, 16], [4, 1], [1, 0])
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, N, 16])
    tokens: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    by_token: gl.constexpr = gl.BlockedLayout([1, 8], [256 // E, E // 8], [4, 1], [1, 0])
    line = gl.arange(0, N, gl.SliceLayout(1, layout))
    i = gl.arange(0, 64, gl.SliceLayout(0, layout))
    there = (line < GROUPS)[:, None]
    q = new[0]
    keys, values, gates, cursor, _arrived, keys_stride, values_stride, gates_stride = ring
    partial, sums = results[0], results[1]
    program = gl.program_id(0)
    begin = piece_start(program, gl.num_programs(0), total)
    end = piece_start(program + 1, gl.num_programs(0), total)
    n = 0
    for item in range(begin // TILES, (end + TILES - 1) // TILES):
        head = item % heads
        slot = _slot(slot_indices, item // heads, HAS_SLOTS)
        if slot >= 0:
            here = slot * heads + head
            start = gl.load(cursor + here * 2)
            fill = gl.load(cursor + here * 2 + 1)
            folds = fill >= C
            page = slot.to(gl.int64)
            query = q + item.to(gl.int64) * (GROUPS * D) + line[:, None] * D
            whole = gl.load(query + gl.arange(0, D, gl.SliceLayout(0, layout))[None, :], mask=there, other=0.0)
            scale = power_of_two_scale(whole)
            whole = whole.to(gl.float32) * scale[:, None]
            square = gl.sum(whole * whole, 1)

            # What is folded; nothing is loaded where nothing is due.
            f = gl.arange(0, LP, gl.SliceLayout(1, tokens))
            across = gl.arange(0, LP, gl.SliceLayout(0, tokens))
            places = (start + f) % C
            own_g = gates + page * gates_stride + head * C
            own_k = keys + page * keys_stride + head * (C * D)
            gate = gl.load(own_g + (start + across) % C, mask=(across < L) & folds, other=0.0)
            weight = gl.where(f < L, gl.exp(_sum_after(gate, f, across)), 0.0)
            decay = gl.exp(gl.sum(gate, 0))
            if folds:
                token = gl.arange(0, LP, gl.SliceLayout(1, by_token))
                address = values + page * values_stride + (head * C + (start + token) % C)[:, None] * E
                address += gl.arange(0, E, gl.SliceLayout(0, by_token))[None, :]
                folded_values.store(gl.load(address, mask=(token < L)[:, None], other=0.0))

            acc = gl.zeros([E, N], gl.float32, mma)
            dens = gl.zeros([N, 64], gl.float32, layout)
            trace = gl.zeros([1, 64], gl.float32, layout)
            first = gl.maximum(begin - item * TILES, 0)
            r, a, b = _pair(first, i, D)
            left = gl.load(query + a[None, :], mask=there, other=0.0)
            right = gl.load(query + b[None, :], mask=there, other=0.0)
            steps = gl.minimum(end - item * TILES, TILES) - first
            gl.assume(steps > 0)
            for step in range(steps):
                tile = first + step
                stage = n % STAGES
                rows = tiles.index(stage)
                twice = gl.where(r < D, 1.0, gl.where(r < ROWS, 2.0, 0.0))
                phi = left.to(gl.float32) * scale[:, None] * (right.to(gl.float32) * scale[:, None]) * twice[None, :]
                asked.store(phi.to(gl.bfloat16))
                fence_async_shared()
                mbarrier.wait(full.index(stage), n // STAGES & 1)
                if folds:
                    state_row = slot * page_rows + head * ROWS + tile * 64
                    norm = normalizer + page * page_entries + head * ROWS
                    _fold(state_desc, state_row, norm, tile, rows, norms.index(stage), key_rows, folded_values,
                          own_k, places, weight, decay, D, E, L, LP)  # fmt: skip
                entry = norms.index(stage).load(layout)
                if ROWS % 64 != 0:
                    entry = gl.where((r < ROWS)[None, :], entry, 0.0)
                gl.thread_barrier()
                acc = warpgroup_mma(rows.permute([1, 0]), asked.permute([1, 0]), acc, is_async=True)
                dens += phi * entry
                trace += gl.where((r < D)[None, :], entry, 0.0)
                r, a, b = _pair(gl.minimum(tile + 1, TILES - 1), i, D)
                left = gl.load(query + a[None, :], mask=there, other=0.0)
                right = gl.load(query + b[None, :], mask=there, other=0.0)
                acc = warpgroup_mma_wait(0, deps=[acc])
                if folds:
                    tma.store_wait(0)
                mbarrier.arrive(empty.index(stage), count=1)
                n += 1

            part = 1 + program - owner(item * TILES, gl.num_programs(0), total)
            base = item.to(gl.int64) * parts + part
            col = gl.arange(0, E, gl.SliceLayout(1, mma))
            lane = gl.arange(0, N, gl.SliceLayout(0, mma))
            gl.store(partial + base * (E * N) + col[:, None] * N + lane[None, :], acc)
            gl.store(sums + base * (2 * N) + line, gl.sum(dens, 1))
            gl.store(sums + base * (2 * N) + N + line, NOISE * gl.sum(trace, 1) * square)
            _arrive(item, slot, start, fill, new, ring, results, heads, total, parts,
                    HAS_GATES, FORGET, GROUPS, N, D, E, L)  # fmt: skip


@gluon.jit(do_not_specialize=["total", "parts"])
def decode_kernel(
    state_desc, norm_desc, q, k, v, log_g, slot_indices, normalizer, keys, values, gates, cursor, arrived, partial, sums, y,
    heads, total, parts, page_rows, page_entries, keys_stride, values_stride, gates_stride,
    HAS_GATES: gl.constexpr, HAS_SLOTS: gl.constexpr, FORGET: gl.constexpr, NOISE: gl.constexpr, GROUPS: gl.constexpr,
    N: gl.constexpr, D: gl.constexpr, E: gl.constexpr, L: gl.constexpr, LP: gl.constexpr, CP: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    """y [B, heads·GROUPS, E] of one new token of each sequence q, k [B, heads, D], v, log_g, in slots ``slot_indices`` [B].

    state_desc: the memory of all slots as rows of E, ``page_rows`` from one slot to the next, in boxes of 64 rows (of 32
    where a state is no whole number of 64); norm_desc: the normalisers as one row, ``page_entries`` from one slot to the
    next, in boxes of 64.  GROUPS query heads are padded to N, L tokens to LP, 2L to CP; ``total`` tiles of 64 rows; an item
    has room for ``parts`` parts in ``partial`` [B·heads, parts, E, N] and ``sums`` [B·heads, parts, 2, N], float32.
    """
    tiles = gl.allocate_shared_memory(gl.bfloat16, [STAGES, 64, E], state_desc.layout)
    norms = gl.allocate_shared_memory(gl.float32, [STAGES, 1, 64], norm_desc.layout)
    asked_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([N, 64], gl.bfloat16)
    asked = gl.allocate_shared_memory(gl.bfloat16, [N, 64], asked_layout)
    key_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([LP, 64], gl.bfloat16)
    key_rows = gl.allocate_shared_memory(gl.bfloat16, [LP, 64], key_layout)
    value_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([LP, E], gl.bfloat16)
    folded_values = gl.allocate_shared_memory(gl.bfloat16, [LP, E], value_layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=1)
    new = (q, k, v, log_g)
    ring = (keys, values, gates, cursor, arrived, keys_stride, values_stride, gates_stride)
    results = (partial, sums, y)
    gl.warp_specialize(
        [
            (_read, (state_desc, tiles, norms, asked, key_rows, folded_values, full, empty, normalizer, page_rows,
                     page_entries, new, ring, results, slot_indices, heads, total, parts,
                     HAS_GATES, HAS_SLOTS, FORGET, NOISE, GROUPS, N, D, E, L, LP, STAGES)),
            (_attend, (new, ring, results, slot_indices, heads, total, parts,
                       HAS_GATES, HAS_SLOTS, FORGET, GROUPS, N, D, E, L, CP)),
            (_fetch, (state_desc, norm_desc, tiles, norms, full, empty, slot_indices, page_rows, page_entries, heads, total,
                      HAS_SLOTS, D, STAGES)),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip
