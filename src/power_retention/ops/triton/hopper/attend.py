"""The output on Hopper: attention within a slot, what was read of the entering state added, one division at the end."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait

from power_retention.ops.triton.hopper.common import power_of_two_scale, regular_inverse


@gluon.jit
def _place(item, table, heads, groups, tiles, slots):
    """(slot, head, query head, tile, first token, end of the slot, whether it starts its run); longest tiles come first."""
    group = item % groups
    rest = item // groups
    head = rest % heads
    rest = rest // heads
    slot = rest % slots
    tile = tiles - 1 - rest // slots
    first = gl.load(table + slot * 4) + tile * 128
    return slot, head, head * groups + group, tile, first, gl.load(table + slot * 4 + 1), gl.load(table + slot * 4 + 2)


@gluon.jit
def _fetch(
    q_desc, k_desc, v_desc, high_desc, low_desc, q_tiles, k_tiles, v_tiles, q_full, q_empty, full, empty,
    table, heads, groups, tiles, slots, has_initial,
    HAS_STATE: gl.constexpr, D: gl.constexpr, E: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    n = 0
    m = 0
    for item in range(gl.program_id(0), tiles * slots * heads * groups, gl.num_programs(0)):
        slot, head, row, tile, first, end, at_start = _place(item, table, heads, groups, tiles, slots)
        if first < end:
            mbarrier.wait(q_empty, (m & 1) ^ 1)
            mbarrier.expect(q_full, 2 * q_desc.block_type.nbytes)
            tma.async_copy_global_to_shared(q_desc, [first, row * D], q_full, q_tiles.index(0))
            tma.async_copy_global_to_shared(q_desc, [first + 64, row * D], q_full, q_tiles.index(1))
            m += 1
            if HAS_STATE:
                if (has_initial != 0) | (at_start == 0):
                    stage = n % STAGES
                    mbarrier.wait(empty.index(stage), (n // STAGES & 1) ^ 1)
                    mbarrier.expect(full.index(stage), 2 * high_desc.block_type.nbytes)
                    moment = (slot * heads + head) * D
                    high = k_tiles.index(stage).slice(0, D)
                    low = v_tiles.index(stage)._reinterpret(gl.bfloat16, [128, D], k_desc.layout).slice(0, D)
                    tma.async_copy_global_to_shared(high_desc, [moment, 0], full.index(stage), high)
                    tma.async_copy_global_to_shared(low_desc, [moment, 0], full.index(stage), low)
                    n += 1
            for block in range(tile + 1):
                stage = n % STAGES
                token = first + (block - tile) * 128
                mbarrier.wait(empty.index(stage), (n // STAGES & 1) ^ 1)
                mbarrier.expect(full.index(stage), k_desc.block_type.nbytes + v_desc.block_type.nbytes)
                tma.async_copy_global_to_shared(k_desc, [token, head * D], full.index(stage), k_tiles.index(stage))
                tma.async_copy_global_to_shared(v_desc, [token, head * E], full.index(stage), v_tiles.index(stage))
                n += 1


@gluon.jit
def _add_keys(acc, total, queries, keys, values, weight, HAS_GATES: gl.constexpr, N: gl.constexpr, E: gl.constexpr):
    """(acc + W·values, total + row sums of W) with W = (queries·keysᵀ)²·weight of N keys."""
    scores: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, N, 16])
    weigh: gl.constexpr = gl.DotOperandLayout(0, gl.NVMMADistributedLayout([3, 0], [4, 1], [16, E, 16]), 2)
    s = gl.zeros([64, N], gl.float32, scores)
    s = warpgroup_mma(queries, keys.permute([1, 0]), s, use_acc=False, is_async=True)
    s = warpgroup_mma_wait(0, deps=[s])
    s = s * s
    if HAS_GATES:
        s = s * weight
    total += gl.convert_layout(gl.sum(s, 1), total.type.layout)
    p = gl.convert_layout(s.to(gl.bfloat16), weigh)
    acc = warpgroup_mma(p, values, acc, is_async=True)
    acc, p = warpgroup_mma_wait(0, deps=[acc, p])
    return acc, total


@gluon.jit
def _weight_before(gates, roots, token, edge, HAS_GATES: gl.constexpr, N: gl.constexpr):
    """What the N keys from ``token`` (a block of 64, or two) weigh at the token whose cumulative gate is ``edge``, [1, N]."""
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, N, 16])
    col = gl.arange(0, N, gl.SliceLayout(0, layout))
    weight = gl.full([N], 1.0, gl.float32, gl.SliceLayout(0, layout))
    if HAS_GATES:
        weight = gl.exp((edge - gl.load(gates + token + 63)).to(gl.float32))
        if N == 128:
            weight = gl.where(col < 64, weight, gl.exp((edge - gl.load(gates + token + 127)).to(gl.float32)))
        weight *= gl.load(roots + token + col)
    return gl.expand_dims(weight, 0)


@gluon.jit
def _consume(
    q_tiles, k_tiles, v_tiles, q_full, q_empty, full, empty, gates, roots, table, partial, traces, y,
    tokens, heads, groups, tiles, slots, has_initial,
    WHO: gl.constexpr, HAS_GATES: gl.constexpr, HAS_STATE: gl.constexpr, NOISE: gl.constexpr,
    D: gl.constexpr, E: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """64 queries: rows 64·WHO and on of a tile of 128."""
    scores: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    out: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, E, 16])
    left: gl.constexpr = gl.DotOperandLayout(0, scores, 2)
    weigh: gl.constexpr = gl.DotOperandLayout(0, out, 2)
    wide: gl.constexpr = gl.BlockedLayout([1, 8], [256 // E, E // 8], [4, 1], [1, 0])
    moment: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    r: gl.constexpr = gl.SliceLayout(1, scores)
    c: gl.constexpr = gl.SliceLayout(0, scores)
    row = gl.arange(0, 64, r)
    col = gl.arange(0, 64, c)
    n = 0
    m = 0
    for item in range(gl.program_id(0), tiles * slots * heads * groups, gl.num_programs(0)):
        slot, head, query_head, tile, first, end, at_start = _place(item, table, heads, groups, tiles, slots)
        if first < end:
            first = first + 64 * WHO
            present = (has_initial != 0) | (at_start == 0)
            mbarrier.wait(q_full, m & 1)
            m += 1
            queries = q_tiles.index(WHO).load(left)
            scale = power_of_two_scale(queries)
            queries = queries * gl.expand_dims(scale, 1).to(gl.bfloat16)
            scale = gl.convert_layout(scale, r)
            den = gl.zeros([64], gl.float32, r)
            noise = gl.zeros([64], gl.float32, r)
            if HAS_STATE:
                if present:
                    stage = n % STAGES
                    mbarrier.wait(full.index(stage), n // STAGES & 1)
                    high = k_tiles.index(stage).slice(0, D)
                    low = v_tiles.index(stage)._reinterpret(gl.bfloat16, [128, D], k_tiles.type.layout).slice(0, D)
                    product = gl.zeros([64, D], gl.float32, moment)
                    product = warpgroup_mma(queries, high.permute([1, 0]), product, is_async=True)
                    product = warpgroup_mma(queries, low.permute([1, 0]), product, is_async=True)
                    product = warpgroup_mma_wait(0, deps=[product])
                    mbarrier.arrive(empty.index(stage), count=1)
                    own = q_tiles.index(WHO).load(moment).to(gl.float32)
                    own *= gl.expand_dims(gl.convert_layout(scale, gl.SliceLayout(1, moment)), 1)
                    den = gl.convert_layout(gl.sum(product * own, 1), r)
                    square = gl.convert_layout(gl.sum(own * own, 1), r)
                    noise = NOISE * gl.load(traces + slot * heads + head) * square
                    n += 1
            mbarrier.arrive(q_empty, count=1)
            edge = 0.0
            mine = gates + head.to(gl.int64) * tokens
            weights = roots + head.to(gl.int64) * tokens
            if HAS_GATES:
                edge = gl.load(mine + first, mask=first < end, other=0.0)
                gate = gl.load(mine + first + row, mask=first + row < end, other=0.0)
                decay = gl.exp(gate.to(gl.float32))
                den *= decay
                noise *= decay
                # The blocks before the diagonal are weighed relative to this tile's first token.
                since = gl.exp((gate - edge).to(gl.float32))
            acc = gl.zeros([64, E], gl.float32, out)
            total = gl.zeros([64], gl.float32, r)
            start = first - 64 * WHO - 128 * tile
            for block in range(tile):
                stage = n % STAGES
                weight = _weight_before(mine, weights, start + block * 128, edge, HAS_GATES, 128)
                mbarrier.wait(full.index(stage), n // STAGES & 1)
                acc, total = _add_keys(
                    acc, total, queries, k_tiles.index(stage), v_tiles.index(stage), weight, HAS_GATES, 128, E
                )
                mbarrier.arrive(empty.index(stage), count=1)
                n += 1
            stage = n % STAGES
            mbarrier.wait(full.index(stage), n // STAGES & 1)
            if WHO == 1:
                if first < end:
                    weight = _weight_before(mine, weights, first - 64, edge, HAS_GATES, 64)
                    keys, values = k_tiles.index(stage).slice(0, 64), v_tiles.index(stage).slice(0, 64)
                    acc, total = _add_keys(acc, total, queries, keys, values, weight, HAS_GATES, 64, E)
            if HAS_GATES:
                total *= since
                acc *= gl.expand_dims(gl.convert_layout(since, gl.SliceLayout(1, out)), 1)
            near = gl.where(row[:, None] >= col[None, :], 1.0, 0.0)
            if HAS_GATES:
                across = gl.load(mine + first + col, mask=first + col < end, other=0.0)
                ahead = (gate - edge).to(gl.float32)[:, None] - (across - edge).to(gl.float32)[None, :]
                near = near * gl.exp(gl.minimum(ahead, 0.0))
            near = gl.where((first + col < end)[None, :], near, 0.0)
            s = gl.zeros([64, 64], gl.float32, scores)
            keys = k_tiles.index(stage).slice(64 * WHO, 64)
            s = warpgroup_mma(queries, keys.permute([1, 0]), s, use_acc=False, is_async=True)
            s = warpgroup_mma_wait(0, deps=[s])
            # The sum of what is multiplied, as numerator and denominator then round alike: a row of one key is exact.
            rounded = gl.where(near > 0, s * s * near, 0.0).to(gl.bfloat16)
            total += gl.sum(rounded.to(gl.float32), 1)
            p = gl.convert_layout(rounded, weigh)
            acc = warpgroup_mma(p, v_tiles.index(stage).slice(64 * WHO, 64), acc, is_async=True)
            acc, p = warpgroup_mma_wait(0, deps=[acc, p])
            mbarrier.arrive(empty.index(stage), count=1)
            n += 1
            token = first + gl.arange(0, 64, gl.SliceLayout(1, out))
            address = (token.to(gl.int64) * (heads * groups) + query_head)[:, None] * E
            if HAS_STATE:
                if present:
                    mask = (token < end)[:, None]
                    state = gl.load(
                        partial + address + gl.arange(0, E, gl.SliceLayout(0, out))[None, :], mask=mask, other=0.0
                    )
                    if HAS_GATES:
                        state *= gl.expand_dims(gl.convert_layout(decay, gl.SliceLayout(1, out)), 1)
                    acc += state
            inverse, _ = regular_inverse(den + total, noise)
            acc *= gl.expand_dims(gl.convert_layout(inverse, gl.SliceLayout(1, out)), 1)
            result = gl.convert_layout(acc.to(gl.bfloat16), wide)
            token = first + gl.arange(0, 64, gl.SliceLayout(1, wide))
            address = (token.to(gl.int64) * (heads * groups) + query_head)[:, None] * E
            gl.store(
                y + address + gl.arange(0, E, gl.SliceLayout(0, wide))[None, :], result, mask=(token < end)[:, None]
            )


@gluon.jit(do_not_specialize=["tokens", "heads", "groups", "tiles", "slots", "has_initial"])
def attend_kernel(
    q_desc, k_desc, v_desc, high_desc, low_desc, gates, roots, table, partial, traces, y,
    tokens, heads, groups, tiles, slots, has_initial,
    HAS_GATES: gl.constexpr, HAS_STATE: gl.constexpr, NOISE: gl.constexpr,
    D: gl.constexpr, E: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """y [tokens, heads·groups, E] at p = 2.  ``partial`` is what each query reads of its state, by ``read_state_kernel``.

    q_desc, k_desc, v_desc: [tokens, heads·width] in boxes of 64 and 128 tokens; high_desc, low_desc: second moments
    [slots·heads·D, D] in two bfloat16 parts, in boxes of one; traces [slots, heads] of them; gates [heads, tokens] float64,
    cumulative within slots; roots [heads, tokens]: what each token weighs at the end of its block of 64.
    """
    q_tiles = gl.allocate_shared_memory(gl.bfloat16, [2, 64, D], q_desc.layout)
    k_tiles = gl.allocate_shared_memory(gl.bfloat16, [STAGES, 128, D], k_desc.layout)
    v_tiles = gl.allocate_shared_memory(gl.bfloat16, [STAGES, 128, E], v_desc.layout)
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
            (_consume, (q_tiles, k_tiles, v_tiles, q_full, q_empty, full, empty, gates, roots, table, partial, traces, y,
                        tokens, heads, groups, tiles, slots, has_initial, 0, HAS_GATES, HAS_STATE, NOISE, D, E, STAGES)),
            (_consume, (q_tiles, k_tiles, v_tiles, q_full, q_empty, full, empty, gates, roots, table, partial, traces, y,
                        tokens, heads, groups, tiles, slots, has_initial, 1, HAS_GATES, HAS_STATE, NOISE, D, E, STAGES)),
            (_fetch, (q_desc, k_desc, v_desc, high_desc, low_desc, q_tiles, k_tiles, v_tiles, q_full, q_empty, full, empty,
                      table, heads, groups, tiles, slots, has_initial, HAS_STATE, D, E, STAGES)),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip
