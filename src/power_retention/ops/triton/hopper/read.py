"""φ(x)·S of every token on Hopper: φ formed in registers, states streamed by the copy engine, two groups of 128 tokens."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait

from power_retention.ops.triton.hopper.common import power_of_two_scale, products_layout


@gluon.jit
def _fetch(state_desc, stages, full, empty, first_row, UNITS: gl.constexpr, STAGES: gl.constexpr):
    """The producer: one unit of 64 rows of the state after the other."""
    for n in range(UNITS):
        stage = n % STAGES
        mbarrier.wait(empty.index(stage), (n // STAGES & 1) ^ 1)
        mbarrier.expect(full.index(stage), state_desc.block_type.nbytes)
        tma.async_copy_global_to_shared(state_desc, [first_row + n * 64, 0], full.index(stage), stages.index(stage))


@gluon.jit
def _halves(factors, ROWS: gl.constexpr):
    """Eight columns of every token → the first four and the last, [ROWS, 4, 1], ready to be spread over eight others."""
    half: gl.constexpr = gl.SliceLayout(2, products_layout(ROWS, 4))
    eight = factors.load(gl.SliceLayout(2, products_layout(ROWS, 8)))
    low, high = gl.split(gl.permute(gl.reshape(eight, [ROWS, 2, 4]), [0, 2, 1]))
    low = gl.expand_dims(gl.convert_layout(low, half, assert_trivial=True), 2)
    return low, gl.expand_dims(gl.convert_layout(high, half, assert_trivial=True), 2)


@gluon.jit
def _consume(
    x, out, factors, stages, full, empty, tile_start, end, head, all_heads,
    scaled, WHO: gl.constexpr, D: gl.constexpr, E: gl.constexpr, ROWS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Tokens first + WHO·ROWS …: fetch their x, multiply with every unit, store."""
    GROUPS: gl.constexpr = D // 8
    begin = tile_start + WHO * ROWS
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, E, 16])
    left: gl.constexpr = gl.DotOperandLayout(0, mma, 2)
    half: gl.constexpr = products_layout(ROWS, 4)
    by_row: gl.constexpr = gl.BlockedLayout([1, 8], [32, 1], [4, 1], [1, 0])
    row = gl.arange(0, ROWS, gl.SliceLayout(1, by_row))
    token = begin + row
    own = x + (token * all_heads + head)[:, None] * D
    scale = gl.full([ROWS], 1.0, gl.float32, gl.SliceLayout(1, by_row))
    if scaled != 0:
        column = gl.arange(0, D, gl.SliceLayout(0, by_row))
        scale = power_of_two_scale(gl.load(own + column[None, :], mask=(token < end)[:, None], other=0.0))
    eight = gl.arange(0, 8, gl.SliceLayout(0, by_row))
    for group in gl.static_range(GROUPS):
        tile = gl.load(own + (group * 8 + eight)[None, :], mask=(token < end)[:, None], other=0.0)
        tile = (tile.to(gl.float32) * scale[:, None]).to(gl.bfloat16)
        factors.index(WHO * GROUPS + group).store(tile)

    # The second half of a unit is formed in registers while the first is being multiplied.  All products are waited for
    # before any of these registers is written again, and factors are loaded after a wait: ptxas moves plain arithmetic ahead
    # of products in flight, into registers that they are still reading.
    acc = gl.zeros([ROWS, E], gl.float32, mma)
    n = 0
    for i in range(GROUPS):
        xa = gl.expand_dims(factors.index(WHO * GROUPS + i).load(gl.SliceLayout(1, half)), 1)
        for j in range(i, GROUPS):
            stage = n % STAGES
            mbarrier.wait(full.index(stage), n // STAGES & 1)
            low, high = _halves(factors.index(WHO * GROUPS + j), ROWS)
            first = gl.convert_layout(gl.reshape(low * xa, [ROWS, 32]), left, assert_trivial=True)
            acc = warpgroup_mma(first, stages.index(stage).slice(0, 32), acc, is_async=True)
            second = gl.convert_layout(gl.reshape(high * xa, [ROWS, 32]), left, assert_trivial=True)
            acc = warpgroup_mma(second, stages.index(stage).slice(32, 32), acc, is_async=True)
            acc, first, second = warpgroup_mma_wait(0, deps=[acc, first, second])
            mbarrier.arrive(empty.index(stage), count=1)
            n += 1
    row = gl.arange(0, ROWS, gl.SliceLayout(1, mma))
    col = gl.arange(0, E, gl.SliceLayout(0, mma))
    address = out + ((begin + row) * all_heads + head)[:, None] * E + col[None, :]
    gl.store(address, acc, mask=(begin + row < end)[:, None])


@gluon.jit(do_not_specialize=["heads", "groups", "tiles", "at_end", "always", "scaled"])
def read_state_kernel(
    state_desc, x, table, out, heads, groups, tiles, at_end, always, scaled,
    D: gl.constexpr, E: gl.constexpr, ROWS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """out [tokens, heads·groups, E] float32 = φ(x)·state of each token's slot; unwritten where a slot has no state.

    A program owns 2·ROWS tokens of one head.  state_desc: [slots·heads·units·64, E] in boxes of 64 rows (``tiled_order``).
    """
    program = gl.program_id(0)
    inner = program % (groups * tiles)
    outer = program // (groups * tiles)
    head = outer % heads
    slot = outer // heads
    tile = inner // groups
    row = head * groups + inner % groups
    start = gl.load(table + slot * 4)
    end = gl.load(table + slot * 4 + 1)
    first = start + tile * 2 * ROWS
    present = (always != 0) | (gl.load(table + slot * 4 + 2 + at_end) == 0)
    if first < end and present:
        GROUPS: gl.constexpr = D // 8
        UNITS: gl.constexpr = GROUPS * (GROUPS + 1) // 2
        stages = gl.allocate_shared_memory(gl.bfloat16, [STAGES, 64, E], state_desc.layout)
        plain: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
        factors = gl.allocate_shared_memory(gl.bfloat16, [2 * GROUPS, ROWS, 8], plain)
        full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
        empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
        for stage in gl.static_range(STAGES):
            mbarrier.init(full.index(stage), count=1)
            mbarrier.init(empty.index(stage), count=2)
        first_row = (slot * heads + head) * (UNITS * 64)
        gl.warp_specialize(
            [
                (_consume, (x, out, factors, stages, full, empty, first.to(gl.int64), end, row.to(gl.int64), heads * groups,
                            scaled, 0, D, E, ROWS, STAGES)),
                (_consume, (x, out, factors, stages, full, empty, first.to(gl.int64), end, row.to(gl.int64), heads * groups,
                            scaled, 1, D, E, ROWS, STAGES)),
                (_fetch, (state_desc, stages, full, empty, first_row, UNITS, STAGES)),
            ],
            [4, 1],
            [240, 24],
        )  # fmt: skip
