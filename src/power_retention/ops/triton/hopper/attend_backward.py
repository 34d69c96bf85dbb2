"""Gradients of the attention within slots on Hopper, p = 2, what goes through the states added.

Accumulators start with the part that goes through a state, weighed so that the one factor per row which the blocks far from
the diagonal still lack (everything there is relative to one token of the tile) is right for it too; blocks on the diagonal
come last, with their own differences of gates.
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

SCALE = gl.constexpr(0)
INVERSE = gl.constexpr(1)
# For blocks far from the diagonal, decay since their first query included: P = s²·inverse, dS = s·(dW·slope + offset).
SLOPE = gl.constexpr(2)
OFFSET = gl.constexpr(3)
# For blocks beside the diagonal, without decay; LEAD is its logarithm.
DZ = gl.constexpr(2)
LEAD = gl.constexpr(3)


@gluon.constexpr_function
def factors_layout():
    """Of four rows of 64 numbers that describe 64 queries, as the copy engine writes them: plain."""
    return gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=2)


@gluon.jit
def _copy_rows(x, base, first, begin, end, row_stride, WIDTH: gl.constexpr, tile):
    """Rows [begin, end) of ``x`` from ``tile`` [64, WIDTH], whose first is ``first``; sixteen bytes a thread at a time."""
    wide: gl.constexpr = gl.BlockedLayout([1, 8], [256 // WIDTH, WIDTH // 8], [4, 1], [1, 0])
    row = first + gl.arange(0, 64, gl.SliceLayout(1, wide))
    col = gl.arange(0, WIDTH, gl.SliceLayout(0, wide))
    address = base + row.to(gl.int64) * row_stride
    inside = (row >= begin) & (row < end)
    gl.store(x + address[:, None] + col[None, :], gl.convert_layout(tile, wide), mask=inside[:, None])


@gluon.jit
def _load_rows(x, table, slot, before, head, heads, WIDTH: gl.constexpr, layout: gl.constexpr):
    """64 rows [64, WIDTH] of float32 [tokens, heads, WIDTH], from ``before`` tokens into the slot; zeros past its end."""
    first = gl.load(table + slot * 4) + before
    token = first + gl.arange(0, 64, gl.SliceLayout(1, layout))
    inside = token < gl.load(table + slot * 4 + 1)
    address = (token * heads + head).to(gl.int64) * WIDTH
    return gl.load(
        x + address[:, None] + gl.arange(0, WIDTH, gl.SliceLayout(0, layout))[None, :], mask=inside[:, None], other=0.0
    )


# ── queries ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@gluon.jit
def _place_queries(item, table, heads, groups, tiles, slots):
    """(slot, head, query head, tile, start, end of the slot, whether it starts its run); longest tiles come first."""
    group = item % groups
    rest = item // groups
    head = rest % heads
    rest = rest // heads
    slot = rest % slots
    tile = tiles - 1 - rest // slots
    row = table + slot * 4
    return slot, head, head * groups + group, tile, gl.load(row), gl.load(row + 1), gl.load(row + 2)


@gluon.jit
def _fetch_for_queries(
    q_desc, k_desc, v_desc, dy_desc, high_desc, low_desc, q_tiles, dy_tiles, k_tiles, v_tiles, q_full, q_empty, full, empty,
    table, heads, groups, tiles, slots, has_initial,
    HAS_STATE: gl.constexpr, D: gl.constexpr, E: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """The producer: of each tile the moments, the keys and values, and these again; queries as soon as there is room."""
    n = 0
    m = 0
    for item in range(gl.program_id(0), tiles * slots * heads * groups, gl.num_programs(0)):
        slot, head, query_head, tile, start, end, at_start = _place_queries(item, table, heads, groups, tiles, slots)
        first = start + tile * 128
        if first < end:
            moments = 0
            if HAS_STATE:
                moments = gl.where((has_initial != 0) | (at_start == 0), D // 32, 0)
            blocks = 2 * tile + 2
            total = moments + 2 * blocks
            for step in range(total):
                stage = n % STAGES
                mbarrier.wait(empty.index(stage), (n // STAGES & 1) ^ 1)
                if step < moments:
                    mbarrier.expect(full.index(stage), k_desc.block_type.nbytes)
                    moment = (slot * heads + head) * D + step // 2 * 64
                    if step % 2 == 0:
                        tma.async_copy_global_to_shared(high_desc, [moment, 0], full.index(stage), k_tiles.index(stage))
                    else:
                        tma.async_copy_global_to_shared(low_desc, [moment, 0], full.index(stage), k_tiles.index(stage))
                else:
                    token = start + (step - moments) % blocks * 64
                    mbarrier.expect(full.index(stage), k_desc.block_type.nbytes + v_desc.block_type.nbytes)
                    tma.async_copy_global_to_shared(k_desc, [token, head * D], full.index(stage), k_tiles.index(stage))
                    tma.async_copy_global_to_shared(v_desc, [token, head * E], full.index(stage), v_tiles.index(stage))
                n += 1
                if step == gl.minimum(STAGES, total) - 1:
                    mbarrier.wait(q_empty, (m & 1) ^ 1)
                    mbarrier.expect(q_full, 2 * (q_desc.block_type.nbytes + dy_desc.block_type.nbytes))
                    for half in gl.static_range(2):
                        token = first + half * 64
                        tma.async_copy_global_to_shared(q_desc, [token, query_head * D], q_full, q_tiles.index(half))
                        tma.async_copy_global_to_shared(dy_desc, [token, query_head * E], q_full, dy_tiles.index(half))
                    m += 1


@gluon.jit
def _scores(queries, douts, keys, values, layout: gl.constexpr):
    """(left·keysᵀ, douts·valuesᵀ) of 64 rows and 64 columns, float32."""
    s = gl.zeros([64, 64], gl.float32, layout)
    dw = gl.zeros([64, 64], gl.float32, layout)
    s = warpgroup_mma(queries, keys.permute([1, 0]), s, use_acc=False, is_async=True)
    dw = warpgroup_mma(douts, values.permute([1, 0]), dw, use_acc=False, is_async=True)
    return warpgroup_mma_wait(0, deps=[s, dw])


@gluon.jit
def _weight_before(gates, roots, token, end, edge, col):
    """What the 64 keys from ``token`` weigh at the token whose cumulative gate is ``edge``."""
    last = gl.load(gates + gl.minimum(token + 63, end - 1))
    root = gl.load(roots + token + col, mask=token + col < end, other=0.0)
    return root * gl.exp(gl.minimum(edge - last, 0.0).to(gl.float32))


@gluon.jit
def _weight_near(gates, gate, slot, table, before, edge, row, col, HAS_GATES: gl.constexpr):
    """[64, 64]: what 64 keys weigh at the queries of the same tokens, ``before`` tokens into the slot.

    The borders are loaded anew: known numbers would let masks stay in registers from one use to the next.
    """
    first = gl.load(table + slot * 4) + before
    end = gl.load(table + slot * 4 + 1)
    near = ((first + row)[:, None] >= (first + col)[None, :]) & (first + col < end)[None, :]
    if HAS_GATES:
        across = gl.load(gates + first + col, mask=first + col < end, other=0.0)
        ahead = (gate - edge).to(gl.float32)[:, None] - (across - edge).to(gl.float32)[None, :]
        return gl.where(near, gl.exp(gl.minimum(ahead, 0.0)), 0.0)
    else:
        return gl.where(near, 1.0, 0.0)


@gluon.jit
def _store_factors(factors, block, row, scale, inverse, d_den, since, lead, mask):
    far = factors + block.to(gl.int64) * 512 + row
    gl.store(far + SCALE * 64, scale, mask=mask)
    gl.store(far + INVERSE * 64, inverse * since, mask=mask)
    gl.store(far + SLOPE * 64, inverse * since * scale, mask=mask)
    gl.store(far + OFFSET * 64, d_den * since * scale, mask=mask)
    beside = far + 256
    gl.store(beside + SCALE * 64, scale, mask=mask)
    gl.store(beside + INVERSE * 64, inverse, mask=mask)
    gl.store(beside + DZ * 64, d_den, mask=mask)
    gl.store(beside + LEAD * 64, lead, mask=mask)


@gluon.jit
def _consume_for_queries(
    q_tiles, dy_tiles, k_tiles, v_tiles, q_full, q_empty, full, empty, gates, roots, table, partial, traces,
    dq, dn, factors, dz, flow, tokens, pad, heads, groups, tiles, slots, has_initial,
    WHO: gl.constexpr, HAS_GATES: gl.constexpr, HAS_STATE: gl.constexpr, WITH_DN: gl.constexpr,
    NOISE: gl.constexpr, D: gl.constexpr, E: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """64 queries: rows 64·WHO and on of a tile of 128."""
    scores: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    out: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    left: gl.constexpr = gl.DotOperandLayout(0, scores, 2)
    weigh: gl.constexpr = gl.DotOperandLayout(0, out, 2)
    wide: gl.constexpr = gl.BlockedLayout([1, 8], [256 // E, E // 8], [4, 1], [1, 0])
    r: gl.constexpr = gl.SliceLayout(1, scores)
    c: gl.constexpr = gl.SliceLayout(0, scores)
    rows: gl.constexpr = gl.SliceLayout(1, out)
    row = gl.arange(0, 64, r)
    col = gl.arange(0, 64, c)
    n = 0
    m = 0
    for item in range(gl.program_id(0), tiles * slots * heads * groups, gl.num_programs(0)):
        slot, head, query_head, tile, start, end, at_start = _place_queries(item, table, heads, groups, tiles, slots)
        before = tile * 128 + 64 * WHO
        first = start + before
        if first - 64 * WHO < end:
            present = (has_initial != 0) | (at_start == 0)
            valid = first + row < end
            mine = gates + head.to(gl.int64) * tokens
            weights = roots + head.to(gl.int64) * tokens
            mbarrier.wait(q_full, m & 1)
            m += 1
            queries = q_tiles.index(WHO).load(left)
            scale = power_of_two_scale(queries)
            queries = queries * gl.expand_dims(scale, 1).to(gl.bfloat16)
            scale = gl.convert_layout(scale, r)
            acc = gl.zeros([64, D], gl.float32, out)
            den = gl.zeros([64], gl.float32, r)
            delta = gl.zeros([64], gl.float32, r)
            noise = gl.zeros([64], gl.float32, r)
            if HAS_STATE:
                if present:
                    q_tiles.index(WHO).store(queries)
                    fence_async_shared()
                    for part in gl.static_range(D // 64):
                        for _ in gl.static_range(2):
                            stage = n % STAGES
                            mbarrier.wait(full.index(stage), n // STAGES & 1)
                            own = q_tiles.index(WHO).slice(part * 64, 64, dim=1)
                            acc = warpgroup_mma(own, k_tiles.index(stage), acc, is_async=True)
                            acc = warpgroup_mma_wait(0, deps=[acc])
                            mbarrier.arrive(empty.index(stage), count=1)
                            n += 1
                    x = q_tiles.index(WHO).load(out).to(gl.float32)
                    state = _load_rows(partial, table, slot, before, query_head, heads * groups, D, out)
                    den = gl.convert_layout(gl.sum(acc * x, 1), r)
                    delta = gl.convert_layout(gl.sum(state * x, 1), r) * 0.5
                    noise = NOISE * gl.load(traces + slot * heads + head) * gl.convert_layout(gl.sum(x * x, 1), r)
            edge = 0.0
            gate = 0.0
            decay = gl.full([64], 1.0, gl.float32, r)
            since = gl.full([64], 1.0, gl.float32, r)
            if HAS_GATES:
                edge = gl.load(mine + first, mask=first < end, other=0.0)
                gate = gl.load(mine + first + row, mask=valid, other=0.0)
                decay = gl.exp(gate.to(gl.float32))
                den *= decay
                delta *= decay
                noise *= decay
                # The blocks before the diagonal are weighed relative to this tile's first token.
                since = gl.exp((gate - edge).to(gl.float32))
            # First the sums of each row, in float32: where weights cancel in the ratio, they must do so before any rounding.
            total = gl.zeros([64], gl.float32, r)
            change = gl.zeros([64], gl.float32, r)
            for block in range(2 * tile + WHO):
                stage = n % STAGES
                if HAS_GATES:
                    weight = _weight_before(mine, weights, start + block * 64, end, edge, col)
                mbarrier.wait(full.index(stage), n // STAGES & 1)
                s, dw = _scores(queries, dy_tiles.index(WHO), k_tiles.index(stage), v_tiles.index(stage), scores)
                mbarrier.arrive(empty.index(stage), count=1)
                s = s * s
                if HAS_GATES:
                    s = s * weight[None, :]
                total += gl.sum(s, 1)
                change += gl.sum(s * dw, 1)
                n += 1
            den += total * since
            delta += change * since
            stage = n % STAGES
            mbarrier.wait(full.index(stage), n // STAGES & 1)
            s, dw = _scores(queries, dy_tiles.index(WHO), k_tiles.index(stage), v_tiles.index(stage), scores)
            mbarrier.arrive(empty.index(stage), count=1)
            n += 1
            near = _weight_near(mine, gate, slot, table, before, edge, row, col, HAS_GATES)
            s = gl.where(near > 0, s * s * near, 0.0)
            den += gl.sum(s, 1)
            delta += gl.sum(gl.where(near > 0, s * dw, 0.0), 1)
            if WHO == 0:
                mbarrier.wait(full.index(n % STAGES), n // STAGES & 1)
                mbarrier.arrive(empty.index(n % STAGES), count=1)
                n += 1

            inverse, d_inverse = regular_inverse(den, noise)
            d_den = delta * d_inverse
            flat = query_head.to(gl.int64) * tokens + first
            gl.store(dz + flat + row, d_den, mask=valid)
            # q·dq by homogeneity: exact where the sum over the gradient would cancel.
            gl.store(flow + flat + row, 2 * (inverse * delta + d_den * den), mask=valid)
            place = before + row
            block_row = (query_head * slots + slot) * (pad // 64) + before // 64
            kept = gl.where(valid, inverse, 0.0)
            lead = gl.zeros([64], gl.float32, r)
            if HAS_GATES:
                lead = gl.where(valid, (gate - edge).to(gl.float32), 0.0)
            _store_factors(
                factors, block_row, row, gl.where(valid, scale, 0.0), kept, gl.where(valid, d_den, 0.0),
                gl.where(valid, since, 0.0), lead, place < pad,
            )  # fmt: skip
            if WITH_DN:
                numerators = dy_tiles.index(WHO).load(wide).to(gl.float32)
                numerators *= gl.expand_dims(gl.convert_layout(kept * decay, gl.SliceLayout(1, wide)), 1)
                column = slot * pad + before
                _copy_rows(
                    dn,
                    query_head * E,
                    column,
                    column,
                    slot * pad + pad,
                    heads * groups * E,
                    E,
                    numerators.to(gl.bfloat16),
                )
            if HAS_STATE:
                if present:
                    state = _load_rows(partial, table, slot, before, query_head, heads * groups, D, out)
                    acc *= gl.expand_dims(gl.convert_layout(2 * d_den, rows), 1)
                    acc += state * gl.expand_dims(gl.convert_layout(inverse, rows), 1)
                    if HAS_GATES:
                        acc *= gl.exp(edge.to(gl.float32))
            inverse2 = 2 * inverse
            d_den2 = 2 * d_den
            for block in range(2 * tile + WHO):
                stage = n % STAGES
                if HAS_GATES:
                    weight = _weight_before(mine, weights, start + block * 64, end, edge, col)
                mbarrier.wait(full.index(stage), n // STAGES & 1)
                s, dw = _scores(queries, dy_tiles.index(WHO), k_tiles.index(stage), v_tiles.index(stage), scores)
                if HAS_GATES:
                    s = s * weight[None, :]
                s = s * (dw * inverse2[:, None] + d_den2[:, None])
                ds = gl.convert_layout(s.to(gl.bfloat16), weigh)
                acc = warpgroup_mma(ds, k_tiles.index(stage), acc, is_async=True)
                acc, ds = warpgroup_mma_wait(0, deps=[acc, ds])
                mbarrier.arrive(empty.index(stage), count=1)
                n += 1
            if HAS_GATES:
                acc *= gl.expand_dims(gl.convert_layout(since, rows), 1)
            near = _weight_near(mine, gate, slot, table, before, edge, row, col, HAS_GATES)
            stage = n % STAGES
            mbarrier.wait(full.index(stage), n // STAGES & 1)
            s, dw = _scores(queries, dy_tiles.index(WHO), k_tiles.index(stage), v_tiles.index(stage), scores)
            mbarrier.arrive(q_empty, count=1)
            s = gl.where(near > 0, s * near * (dw * inverse2[:, None] + d_den2[:, None]), 0.0)
            ds = gl.convert_layout(s.to(gl.bfloat16), weigh)
            acc = warpgroup_mma(ds, k_tiles.index(stage), acc, is_async=True)
            acc, ds = warpgroup_mma_wait(0, deps=[acc, ds])
            mbarrier.arrive(empty.index(stage), count=1)
            n += 1
            if WHO == 0:
                mbarrier.wait(full.index(n % STAGES), n // STAGES & 1)
                mbarrier.arrive(empty.index(n % STAGES), count=1)
                n += 1
            acc *= gl.expand_dims(gl.convert_layout(scale, rows), 1)
            _copy_rows(dq, query_head * D, first, first, end, heads * groups * D, D, acc.to(gl.bfloat16))


@gluon.jit(do_not_specialize=["tokens", "pad", "heads", "groups", "tiles", "slots", "has_initial"])
def query_grad_kernel(
    q_desc, k_desc, v_desc, dy_desc, high_desc, low_desc, gates, roots, table, partial, traces, dq, dn, factors, dz, flow,
    tokens, pad, heads, groups, tiles, slots, has_initial,
    HAS_GATES: gl.constexpr, HAS_STATE: gl.constexpr, WITH_DN: gl.constexpr, NOISE: gl.constexpr,
    D: gl.constexpr, E: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """dq [tokens, heads·groups, D] bfloat16, and what the other kernels need of the queries.

    q_desc, k_desc, v_desc, dy_desc: [tokens, heads·width] in boxes of 64 tokens; high_desc, low_desc: second moments
    [slots·heads·D, D] in two bfloat16 parts; traces [slots, heads] of them; gates [heads, tokens] float64, cumulative within
    slots; roots [heads, tokens]: what each token weighs at the end of its block of 64 of its slot; partial
    [tokens, heads·groups, D]: gradients of dy·(φ(x)·state) with respect to the scaled queries x.

    dn [slots·pad, heads·groups, E] bfloat16 (WITH_DN): gradient of the numerators times exp(G_i), zero past a slot's end
    within its last tile; dz [heads·groups, tokens] float32: gradient of the denominators; flow, same shape: q·dq; factors
    [heads·groups, slots·pad / 64, 2, 4, 64] float32: what ``key_grad_kernel`` wants to know of each block of 64 queries of a
    slot, far from its keys and beside them, gates counted from the block's first token, zeros past the end.  All but dq
    refer to the scaled queries.
    """
    q_tiles = gl.allocate_shared_memory(gl.bfloat16, [2, 64, D], q_desc.layout)
    dy_tiles = gl.allocate_shared_memory(gl.bfloat16, [2, 64, E], dy_desc.layout)
    k_tiles = gl.allocate_shared_memory(gl.bfloat16, [STAGES, 64, D], k_desc.layout)
    v_tiles = gl.allocate_shared_memory(gl.bfloat16, [STAGES, 64, E], v_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    q_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    q_empty = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=2)
    mbarrier.init(q_full, count=1)
    mbarrier.init(q_empty, count=2)
    gl.warp_specialize(
        [
            (_consume_for_queries, (
                q_tiles, dy_tiles, k_tiles, v_tiles, q_full, q_empty, full, empty, gates, roots, table, partial, traces,
                dq, dn, factors, dz, flow, tokens, pad, heads, groups, tiles, slots, has_initial,
                0, HAS_GATES, HAS_STATE, WITH_DN, NOISE, D, E, STAGES)),
            (_consume_for_queries, (
                q_tiles, dy_tiles, k_tiles, v_tiles, q_full, q_empty, full, empty, gates, roots, table, partial, traces,
                dq, dn, factors, dz, flow, tokens, pad, heads, groups, tiles, slots, has_initial,
                1, HAS_GATES, HAS_STATE, WITH_DN, NOISE, D, E, STAGES)),
            (_fetch_for_queries, (
                q_desc, k_desc, v_desc, dy_desc, high_desc, low_desc, q_tiles, dy_tiles, k_tiles, v_tiles,
                q_full, q_empty, full, empty, table, heads, groups, tiles, slots, has_initial, HAS_STATE, D, E, STAGES)),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip


# ── keys and values ──────────────────────────────────────────────────────────────────────────────────────────────────


@gluon.jit
def _place_keys(item, table, heads, slots):
    """(slot, head, tile, start, end of the slot, whether it ends its run); longest tiles, the first ones, come first."""
    head = item % heads
    rest = item // heads
    slot = rest % slots
    row = table + slot * 4
    return slot, head, rest // slots, gl.load(row), gl.load(row + 1), gl.load(row + 3)


@gluon.jit
def _fetch_for_keys(
    q_desc, k_desc, v_desc, dy_desc, factors_desc, high_desc, low_desc, k_tiles, v_tiles, q_tiles, dy_tiles, factors,
    k_full, k_empty, full, empty, table, pad, heads, groups, tiles, slots, has_final,
    HAS_STATE: gl.constexpr, D: gl.constexpr, E: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """The producer: of each tile the moments, all later blocks of queries, then the two blocks beside the keys."""
    n = 0
    m = 0
    for item in range(gl.program_id(0), tiles * slots * heads, gl.num_programs(0)):
        slot, head, tile, start, end, at_end = _place_keys(item, table, heads, slots)
        first = start + tile * 128
        if first < end:
            moments = 0
            if HAS_STATE:
                moments = gl.where((has_final != 0) | (at_end == 0), D // 32, 0)
            later = gl.maximum((end - start + 63) // 64 - 2 * tile - 2, 0)
            far = groups * later
            total = moments + far + 2 * groups
            for step in range(total):
                stage = n % STAGES
                mbarrier.wait(empty.index(stage), (n // STAGES & 1) ^ 1)
                if step < moments:
                    mbarrier.expect(full.index(stage), q_desc.block_type.nbytes)
                    moment = (slot * heads + head) * D + step // 2 * 64
                    if step % 2 == 0:
                        tma.async_copy_global_to_shared(high_desc, [moment, 0], full.index(stage), q_tiles.index(stage))
                    else:
                        tma.async_copy_global_to_shared(low_desc, [moment, 0], full.index(stage), q_tiles.index(stage))
                else:
                    place = step - moments
                    beside = place >= far
                    place = gl.where(beside, place - far, place)
                    count = gl.where(beside, 2, gl.maximum(later, 1))
                    row = head * groups + place // count
                    block = place % count + 2 * tile + gl.where(beside, 0, 2)
                    token = start + block * 64
                    mbarrier.expect(
                        full.index(stage),
                        q_desc.block_type.nbytes + dy_desc.block_type.nbytes + factors_desc.block_type.nbytes,
                    )
                    tma.async_copy_global_to_shared(q_desc, [token, row * D], full.index(stage), q_tiles.index(stage))
                    tma.async_copy_global_to_shared(dy_desc, [token, row * E], full.index(stage), dy_tiles.index(stage))
                    of_block = ((row * slots + slot) * (pad // 64) + block) * 2 + beside.to(gl.int32)
                    tma.async_copy_global_to_shared(
                        factors_desc, [of_block, 0], full.index(stage), factors.index(stage)
                    )
                n += 1
                if step == gl.minimum(STAGES, total) - 1:
                    mbarrier.wait(k_empty, (m & 1) ^ 1)
                    mbarrier.expect(k_full, 2 * (k_desc.block_type.nbytes + v_desc.block_type.nbytes))
                    for half in gl.static_range(2):
                        token = first + half * 64
                        tma.async_copy_global_to_shared(k_desc, [token, head * D], k_full, k_tiles.index(half))
                        tma.async_copy_global_to_shared(v_desc, [token, head * E], k_full, v_tiles.index(half))
                    m += 1


@gluon.jit
def _factor(factors, WHICH: gl.constexpr, layout: gl.constexpr):
    """One of the four rows of 64 numbers that describe 64 queries, [1, 64]."""
    plain: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    return factors._reinterpret(gl.float32, [4, 64], plain).slice(WHICH, 1, dim=0).load(layout)


@gluon.jit
def _consume_for_keys(
    k_tiles, v_tiles, q_tiles, dy_tiles, factors, k_full, k_empty, full, empty, gates, table, partial_k, partial_v,
    dk, dv, flow, tokens, heads, groups, tiles, slots, has_final,
    WHO: gl.constexpr, HAS_GATES: gl.constexpr, HAS_STATE: gl.constexpr,
    D: gl.constexpr, E: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """64 keys: rows 64·WHO and on of a tile of 128.  dk is accumulated halved."""
    scores: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    out_k: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    out_v: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, E, 16])
    weigh_k: gl.constexpr = gl.DotOperandLayout(0, out_k, 2)
    weigh_v: gl.constexpr = gl.DotOperandLayout(0, out_v, 2)
    r: gl.constexpr = gl.SliceLayout(1, scores)
    c: gl.constexpr = gl.SliceLayout(0, scores)
    rows_k: gl.constexpr = gl.SliceLayout(1, out_k)
    rows_v: gl.constexpr = gl.SliceLayout(1, out_v)
    row = gl.arange(0, 64, r)
    col = gl.arange(0, 64, c)
    n = 0
    m = 0
    for item in range(gl.program_id(0), tiles * slots * heads, gl.num_programs(0)):
        slot, head, tile, start, end, at_end = _place_keys(item, table, heads, slots)
        before = tile * 128 + 64 * WHO
        first = start + before
        if first - 64 * WHO < end:
            present = (has_final != 0) | (at_end == 0)
            mine = gates + head.to(gl.int64) * tokens
            valid = first + row < end
            mbarrier.wait(k_full, m & 1)
            m += 1
            acc_k = gl.zeros([64, D], gl.float32, out_k)
            acc_v = gl.zeros([64, E], gl.float32, out_v)
            # k·dk, summed before anything is rounded: the gates' gradients are long sums of these.
            own_flow = gl.zeros([64], gl.float32, r)
            if HAS_GATES:
                # Queries after these keys are weighed relative to the last of them.
                edge = gl.load(mine + gl.minimum(first + 63, end - 1))
            if HAS_STATE:
                if present:
                    for part in gl.static_range(D // 64):
                        for _ in gl.static_range(2):
                            stage = n % STAGES
                            mbarrier.wait(full.index(stage), n // STAGES & 1)
                            own = k_tiles.index(WHO).slice(part * 64, 64, dim=1)
                            acc_k = warpgroup_mma(own, q_tiles.index(stage), acc_k, is_async=True)
                            acc_k = warpgroup_mma_wait(0, deps=[acc_k])
                            mbarrier.arrive(empty.index(stage), count=1)
                            n += 1
                    acc_k += _load_rows(partial_k, table, slot, before, head, heads, D, out_k) * 0.5
                    own = k_tiles.index(WHO).load(out_k).to(gl.float32)
                    own_flow = gl.convert_layout(gl.sum(acc_k * own, 1), r)
                    acc_v += _load_rows(partial_v, table, slot, before, head, heads, E, out_v)
                    if HAS_GATES:
                        leaving = gl.exp((gl.load(mine + end - 1) - edge).to(gl.float32))
                        acc_k *= leaving
                        acc_v *= leaving
                        own_flow *= leaving
            for _ in range(groups):
                for block in range(2 * tile + 2, (end - start + 63) // 64):
                    stage = n % STAGES
                    if HAS_GATES:
                        since = gl.exp((gl.load(mine + start + block * 64) - edge).to(gl.float32))
                    mbarrier.wait(full.index(stage), n // STAGES & 1)
                    s, dw = _scores(
                        k_tiles.index(WHO), v_tiles.index(WHO), q_tiles.index(stage), dy_tiles.index(stage), scores
                    )
                    inverse = _factor(factors.index(stage), INVERSE, scores)
                    slope = _factor(factors.index(stage), SLOPE, scores)
                    offset = _factor(factors.index(stage), OFFSET, scores)
                    if HAS_GATES:
                        inverse *= since
                        slope *= since
                        offset *= since
                    ds = s * (dw * slope + offset)
                    scale = _factor(factors.index(stage), SCALE, scores)
                    own_flow += gl.sum(ds * (s * scale), 1)
                    ds = ds * scale
                    s = s * scale
                    p = gl.convert_layout((s * s * inverse).to(gl.bfloat16), weigh_v)
                    ds = gl.convert_layout(ds.to(gl.bfloat16), weigh_k)
                    acc_v = warpgroup_mma(p, dy_tiles.index(stage), acc_v, is_async=True)
                    acc_k = warpgroup_mma(ds, q_tiles.index(stage), acc_k, is_async=True)
                    acc_v, acc_k, p, ds = warpgroup_mma_wait(0, deps=[acc_v, acc_k, p, ds])
                    mbarrier.arrive(empty.index(stage), count=1)
                    n += 1
            if HAS_GATES:
                gate = gl.load(mine + first + row, mask=valid, other=0.0)
                until = gl.exp(gl.minimum(edge - gate, 0.0).to(gl.float32))
                own_flow *= until
                acc_k *= gl.expand_dims(gl.convert_layout(until, rows_k), 1)
                acc_v *= gl.expand_dims(gl.convert_layout(until, rows_v), 1)
                begin = gl.load(mine + first, mask=first < end, other=0.0)
                behind = (gate - begin).to(gl.float32)
            for _ in range(groups):
                for beside in gl.static_range(2):
                    stage = n % STAGES
                    if beside < WHO:
                        mbarrier.wait(full.index(stage), n // STAGES & 1)
                    else:
                        # Loaded anew: known numbers would let masks stay in registers from one head to the next.
                        last = gl.load(table + slot * 4 + 1)
                        j = gl.load(table + slot * 4) + before + row
                        i = start + (2 * tile + beside) * 64
                        if HAS_GATES:
                            since = (gl.load(mine + i, mask=i < end, other=0.0) - begin).to(gl.float32)
                        mbarrier.wait(full.index(stage), n // STAGES & 1)
                        s = gl.zeros([64, 64], gl.float32, scores)
                        s = warpgroup_mma(
                            k_tiles.index(WHO), q_tiles.index(stage).permute([1, 0]), s, use_acc=False, is_async=True
                        )
                        s = warpgroup_mma_wait(0, deps=[s])
                        s = s * _factor(factors.index(stage), SCALE, scores)
                        near = (j[:, None] <= (i + col)[None, :]) & (i + col < last)[None, :]
                        weighed = gl.where(near, s, 0.0)
                        if HAS_GATES:
                            ahead = _factor(factors.index(stage), LEAD, scores) + since
                            weighed *= gl.exp(gl.minimum(ahead - behind[:, None], 0.0))
                        p = (s * weighed * _factor(factors.index(stage), INVERSE, scores)).to(gl.bfloat16)
                        p = gl.convert_layout(p, weigh_v)
                        acc_v = warpgroup_mma(p, dy_tiles.index(stage), acc_v, is_async=True)
                        # One product after the other: all at once would not fit in the registers.
                        acc_v, p = warpgroup_mma_wait(0, deps=[acc_v, p])
                        dw = gl.zeros([64, 64], gl.float32, scores)
                        dw = warpgroup_mma(
                            v_tiles.index(WHO), dy_tiles.index(stage).permute([1, 0]), dw, use_acc=False, is_async=True
                        )
                        dw = warpgroup_mma_wait(0, deps=[dw])
                        dw = dw * _factor(factors.index(stage), INVERSE, scores) + _factor(
                            factors.index(stage), DZ, scores
                        )
                        weighed = weighed * dw
                        own_flow += gl.sum(weighed * s, 1)
                        weighed *= _factor(factors.index(stage), SCALE, scores)
                        ds = gl.convert_layout(weighed.to(gl.bfloat16), weigh_k)
                        acc_k = warpgroup_mma(ds, q_tiles.index(stage), acc_k, is_async=True)
                        acc_k, ds = warpgroup_mma_wait(0, deps=[acc_k, ds])
                    mbarrier.arrive(empty.index(stage), count=1)
                    n += 1
            acc_k *= 2
            mbarrier.arrive(k_empty, count=1)
            gl.store(flow + head.to(gl.int64) * tokens + first + row, 2 * own_flow, mask=valid)
            _copy_rows(dk, head * D, first, first, end, heads * D, D, acc_k.to(gl.bfloat16))
            _copy_rows(dv, head * E, first, first, end, heads * E, E, acc_v.to(gl.bfloat16))


@gluon.jit(do_not_specialize=["tokens", "pad", "heads", "groups", "tiles", "slots", "has_final"])
def key_grad_kernel(
    q_desc, k_desc, v_desc, dy_desc, factors_desc, high_desc, low_desc, gates, table, partial_k, partial_v, dk, dv, flow,
    tokens, pad, heads, groups, tiles, slots, has_final,
    HAS_GATES: gl.constexpr, HAS_STATE: gl.constexpr,
    D: gl.constexpr, E: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """dk [tokens, heads, D] and dv [tokens, heads, E] bfloat16; flow [heads, tokens] float32: k·dk.

    Descriptors as in :func:`query_grad_kernel`, moments being the gradients of those that leave the slots; factors_desc:
    its factors as [heads·groups·slots·pad / 32, 256] in boxes of one row; partial_k [tokens, heads, D] and partial_v
    [tokens, heads, E] float32: what comes through the state, as it is at the slot's end.
    """
    k_tiles = gl.allocate_shared_memory(gl.bfloat16, [2, 64, D], k_desc.layout)
    v_tiles = gl.allocate_shared_memory(gl.bfloat16, [2, 64, E], v_desc.layout)
    q_tiles = gl.allocate_shared_memory(gl.bfloat16, [STAGES, 64, D], q_desc.layout)
    dy_tiles = gl.allocate_shared_memory(gl.bfloat16, [STAGES, 64, E], dy_desc.layout)
    factors = gl.allocate_shared_memory(gl.float32, [STAGES, 1, 256], factors_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    k_empty = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=2)
    mbarrier.init(k_full, count=1)
    mbarrier.init(k_empty, count=2)
    gl.warp_specialize(
        [
            (_consume_for_keys, (
                k_tiles, v_tiles, q_tiles, dy_tiles, factors, k_full, k_empty, full, empty, gates, table, partial_k, partial_v,
                dk, dv, flow, tokens, heads, groups, tiles, slots, has_final, 0, HAS_GATES, HAS_STATE, D, E, STAGES)),
            (_consume_for_keys, (
                k_tiles, v_tiles, q_tiles, dy_tiles, factors, k_full, k_empty, full, empty, gates, table, partial_k, partial_v,
                dk, dv, flow, tokens, heads, groups, tiles, slots, has_final, 1, HAS_GATES, HAS_STATE, D, E, STAGES)),
            (_fetch_for_keys, (
                q_desc, k_desc, v_desc, dy_desc, factors_desc, high_desc, low_desc, k_tiles, v_tiles, q_tiles, dy_tiles,
                factors, k_full, k_empty, full, empty, table, pad, heads, groups, tiles, slots,
                has_final, HAS_STATE, D, E, STAGES)),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip
