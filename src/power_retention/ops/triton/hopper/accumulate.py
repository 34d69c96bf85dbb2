"""The state entering every chunk on Hopper: φ(x)ᵀu accumulated along a run, φᵀ formed in registers."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait

from power_retention.ops.triton.hopper.common import left_of_units, rows_layout, units_layout


@gluon.jit
def _place(item, table, borders, heads, tiles, runs, segments, reverse):
    """(segment, run, head, tile, first slot, slots to walk) of a work item; segments of a run are far apart in the order."""
    tile = item % tiles
    rest = item // tiles
    head = rest % heads
    rest = rest // heads
    run = rest % runs
    segment = rest // runs
    first = gl.load(borders + run)
    count = gl.load(borders + run + 1) - first
    begin = segment * count // segments
    end = (segment + 1) * count // segments
    first += gl.where(reverse != 0, count - 1 - begin, begin)
    return segment, run, head, tile, first, end - begin


@gluon.jit
def _fetch(
    xt_desc, u_desc, x_tiles, u_tiles, full, empty, table, borders, pairs, pad, walk,
    D: gl.constexpr, E: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """The producer: of 64 tokens the eight-row tiles that four units need of x, and u."""
    _, heads, tiles, runs, segments, groups, reverse, _, _ = walk
    n = 0
    for item in range(gl.program_id(0), tiles * heads * runs * segments, gl.num_programs(0)):
        _, _, head, tile, slot, count = _place(item, table, borders, heads, tiles, runs, segments, reverse)
        for _ in range(count):
            steps = (gl.load(table + slot * 4 + 1) - gl.load(table + slot * 4) + 63) // 64
            for group in range(groups):
                source = head * groups + group
                for step in range(steps):
                    stage = n % STAGES
                    column = slot * pad + step * 64
                    mbarrier.wait(empty.index(stage), (n // STAGES & 1) ^ 1)
                    mbarrier.expect(full.index(stage), u_desc.block_type.nbytes + 8 * xt_desc.block_type.nbytes)
                    tma.async_copy_global_to_shared(
                        u_desc, [column, source * E], full.index(stage), u_tiles.index(stage)
                    )
                    for part in gl.static_range(8):
                        row = source * D + 8 * gl.load(pairs + tile * 8 + part)
                        target = x_tiles.index(stage * 4 + part // 4 * 2 + part % 2).slice(part // 2 % 2 * 8, 8)
                        tma.async_copy_global_to_shared(xt_desc, [row, column], full.index(stage), target)
                    n += 1
            slot += 1 - 2 * reverse


@gluon.jit
def _halves(tiles, AXIS: gl.constexpr):
    """Eight rows of each of two units [16, 64 columns] → those of the first and of the last 32 tokens, ready to spread."""
    spread: gl.constexpr = gl.SliceLayout(AXIS, units_layout())
    bits = gl.reshape(tiles.load(rows_layout(AXIS)), [2, 8, 4, 2, 8])
    low, high = gl.split(gl.permute(bits, [0, 1, 2, 4, 3]))
    low = gl.convert_layout(gl.reshape(low, [2, 8, 32]), spread, assert_trivial=True)
    high = gl.convert_layout(gl.reshape(high, [2, 8, 32]), spread, assert_trivial=True)
    return gl.expand_dims(low, AXIS), gl.expand_dims(high, AXIS)


@gluon.jit
def _address(base, unit, E: gl.constexpr, layout: gl.constexpr):
    row = gl.arange(0, 128, gl.SliceLayout(1, layout))
    col = gl.arange(0, E, gl.SliceLayout(0, layout))
    return base + unit.to(gl.int64) * (64 * E) + row[:, None] * E + col[None, :]


@gluon.jit
def _consume(
    x_tiles, u_tiles, full, empty, gates, table, borders, pairs, carried, arrived, states, walk,
    WHO: gl.constexpr, HAS_GATES: gl.constexpr, D: gl.constexpr, E: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Units 4·tile + 2·WHO and the next: walk along a segment, store what enters each slot."""
    tokens, heads, tiles, runs, segments, groups, reverse, has_initial, keep_final = walk
    UNITS: gl.constexpr = (D // 8) * (D // 8 + 1) // 2
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, E, 16])
    left: gl.constexpr = gl.DotOperandLayout(0, mma, 2)
    wide: gl.constexpr = gl.BlockedLayout([1, 8], [256 // E, E // 8], [4, 1], [1, 0])
    n = 0
    for item in range(gl.program_id(0), tiles * heads * runs * segments, gl.num_programs(0)):
        segment, run, head, tile, slot, count = _place(item, table, borders, heads, tiles, runs, segments, reverse)
        unit = tile * 4 + 2 * WHO
        state = (run * heads + head).to(gl.int64)
        mine = arrived + (state * tiles + tile) * 2 + WHO
        acc = gl.zeros([128, E], gl.float32, mma)
        if (has_initial != 0) | (segment > 0):
            if segment > 0:
                while gl.atomic_add(mine, 0, sem="acquire") < segment:
                    pass
            acc = gl.load(_address(carried, state * UNITS + unit, E, mma), cache_modifier=".cg")
        twice0 = gl.where(gl.load(pairs + unit * 2) == gl.load(pairs + unit * 2 + 1), 1.0, 2.0)
        twice1 = gl.where(gl.load(pairs + unit * 2 + 2) == gl.load(pairs + unit * 2 + 3), 1.0, 2.0)
        twice = gl.where(gl.arange(0, 128, gl.SliceLayout(1, mma)) < 64, twice0, twice1)
        for _ in range(count):
            entering = gl.convert_layout((acc * twice[:, None]).to(gl.bfloat16), wide)
            gl.store(_address(states, (slot.to(gl.int64) * heads + head) * UNITS + unit, E, wide), entering)
            start = gl.load(table + slot * 4)
            end = gl.load(table + slot * 4 + 1)
            if HAS_GATES:
                acc *= gl.exp(gl.load(gates + head.to(gl.int64) * tokens + end - 1).to(gl.float32))
            steps = groups * ((end - start + 63) // 64)
            gl.assume(steps > 0)  # otherwise ptxas waits for every product
            for _ in range(steps):
                stage = n % STAGES
                mbarrier.wait(full.index(stage), n // STAGES & 1)
                a_low, a_high = _halves(x_tiles.index(stage * 4 + WHO * 2), 1)
                b_low, b_high = _halves(x_tiles.index(stage * 4 + WHO * 2 + 1), 2)
                first = left_of_units(a_low * b_low, left)
                acc = warpgroup_mma(first, u_tiles.index(stage).slice(0, 32), acc, is_async=True)
                second = left_of_units(a_high * b_high, left)
                acc = warpgroup_mma(second, u_tiles.index(stage).slice(32, 32), acc, is_async=True)
                acc, first, second = warpgroup_mma_wait(0, deps=[acc, first, second])
                mbarrier.arrive(empty.index(stage), count=1)
                n += 1
            slot += 1 - 2 * reverse
        if (keep_final != 0) | (segment < segments - 1):
            gl.store(_address(carried, state * UNITS + unit, E, mma), acc)
            if segments > 1:
                gl.thread_barrier()
                gl.atomic_add(mine, 1, sem="release")


@gluon.jit(
    do_not_specialize=[
        "pad", "tokens", "heads", "groups", "tiles", "runs", "segments", "reverse", "has_initial", "keep_final"
    ]
)  # fmt: skip
def accumulate_kernel(
    xt_desc, u_desc, gates, table, borders, pairs, carried, arrived, states,
    pad, tokens, heads, groups, tiles, runs, segments, reverse, has_initial, keep_final,
    HAS_GATES: gl.constexpr, D: gl.constexpr, E: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """states [slots, heads, units·64, E] bfloat16: what enters each slot, pairs of different columns twice.

    xt_desc: [heads·groups·D, columns] in boxes of 8 × 64, tokens in the order of ``columns_kernel``; u_desc:
    [columns, heads·groups·E], zero past a slot's end.  Each of two groups of warps owns two units of 64 rows of one head.  A
    run is walked in ``segments``, by whichever program comes to them; ``carried`` [runs, heads, units·64, E] float32 takes
    the sums from one to the next, holds the initial state at first and the final one at last, and ``arrived`` (zeros)
    counts the segments done.
    """
    x_tiles = gl.allocate_shared_memory(gl.bfloat16, [STAGES * 4, 16, 64], xt_desc.layout)
    u_tiles = gl.allocate_shared_memory(gl.bfloat16, [STAGES, 64, E], u_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=2)
    walk = (tokens, heads, tiles, runs, segments, groups, reverse, has_initial, keep_final)
    gl.warp_specialize(
        [
            (_consume, (x_tiles, u_tiles, full, empty, gates, table, borders, pairs, carried, arrived, states, walk,
                        0, HAS_GATES, D, E, STAGES)),
            (_consume, (x_tiles, u_tiles, full, empty, gates, table, borders, pairs, carried, arrived, states, walk,
                        1, HAS_GATES, D, E, STAGES)),
            (_fetch, (xt_desc, u_desc, x_tiles, u_tiles, full, empty, table, borders, pairs, pad, walk, D, E, STAGES)),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip
