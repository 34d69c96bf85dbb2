"""The gradient of u·(φ(x)·S) with respect to x on Hopper: u·Sᵀ on the tensor cores, folded with x as it comes."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait

from power_retention.ops.triton.hopper.common import power_of_two_scale, products_layout


@gluon.jit
def _send(state_desc, stages, full, empty, first_row, i, j, n, GROUPS: gl.constexpr, STAGES: gl.constexpr):
    stage = n % STAGES
    unit = i * GROUPS - i * (i - 1) // 2 + j - i
    mbarrier.wait(empty.index(stage), (n // STAGES & 1) ^ 1)
    mbarrier.expect(full.index(stage), state_desc.block_type.nbytes)
    tma.async_copy_global_to_shared(state_desc, [first_row + unit * 64, 0], full.index(stage), stages.index(stage))


@gluon.jit
def _fetch(state_desc, stages, full, empty, first_row, GROUPS: gl.constexpr, STAGES: gl.constexpr):
    """The producer: units of the state, two rows of units at a time, column by column."""
    n = 0
    for i in range(0, GROUPS, 2):
        _send(state_desc, stages, full, empty, first_row, i, i, n, GROUPS, STAGES)
        n += 1
        for j in range(i + 1, GROUPS):
            _send(state_desc, stages, full, empty, first_row, i, j, n, GROUPS, STAGES)
            _send(state_desc, stages, full, empty, first_row, i + 1, j, n + 1, GROUPS, STAGES)
            n += 2


@gluon.jit
def _products(u, stages, full, empty, n, STAGES: gl.constexpr):
    """u·(one unit)ᵀ [64, 8, 8]: of each token the sums for second factor times first factor."""
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    stage = n % STAGES
    mbarrier.wait(full.index(stage), n // STAGES & 1)
    out = gl.zeros([64, 64], gl.float32, layout)
    out = warpgroup_mma(u, stages.index(stage).permute([1, 0]), out, use_acc=False, is_async=True)
    out = warpgroup_mma_wait(0, deps=[out])
    mbarrier.arrive(empty.index(stage), count=1)
    return gl.convert_layout(gl.reshape(out, [64, 8, 8]), products_layout(64, 8), assert_trivial=True)


@gluon.jit
def _add(target, value):
    target.store(target.load(value.type.layout) + value)


@gluon.jit
def _consume(
    u, x, out, factors, grads, stages, full, empty, start, end, head, groups, all_heads, blocks, block,
    scaled, WHO: gl.constexpr, D: gl.constexpr, E: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """64 tokens of one head: the ``block + WHO``-th of the heads' blocks."""
    GROUPS: gl.constexpr = D // 8
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    left: gl.constexpr = gl.DotOperandLayout(0, layout, 2)
    first_factor: gl.constexpr = gl.SliceLayout(1, products_layout(64, 8))
    second_factor: gl.constexpr = gl.SliceLayout(2, products_layout(64, 8))
    by_row: gl.constexpr = gl.BlockedLayout([1, 8], [32, 1], [4, 1], [1, 0])
    number = block + WHO
    row = (head * groups + number % groups).to(gl.int64)
    begin = start + number // groups * 64
    live = number < groups * blocks
    token = begin + gl.arange(0, 64, gl.SliceLayout(1, by_row))
    valid = ((token < end) & live)[:, None]
    own = (token.to(gl.int64) * all_heads + row)[:, None] * D
    scale = gl.full([64], 1.0, gl.float32, gl.SliceLayout(1, by_row))
    if scaled != 0:
        column = gl.arange(0, D, gl.SliceLayout(0, by_row))
        scale = power_of_two_scale(gl.load(x + own + column[None, :], mask=valid, other=0.0))
    eight = gl.arange(0, 8, gl.SliceLayout(0, by_row))
    for group in gl.static_range(GROUPS):
        tile = gl.load(x + own + (group * 8 + eight)[None, :], mask=valid, other=0.0)
        factors.index(WHO * GROUPS + group).store((tile.to(gl.float32) * scale[:, None]).to(gl.bfloat16))
        grads.index(WHO * GROUPS + group).store(gl.zeros([64, 8], gl.float32, by_row))
    token = begin + gl.arange(0, 64, gl.SliceLayout(1, left))
    address = (token.to(gl.int64) * all_heads + row)[:, None] * E + gl.arange(0, E, gl.SliceLayout(0, left))[None, :]
    left_u = gl.load(u + address, mask=((token < end) & live)[:, None], other=0.0)

    n = 0
    for i in range(0, GROUPS, 2):
        even = factors.index(WHO * GROUPS + i).load(first_factor).to(gl.float32)
        odd = factors.index(WHO * GROUPS + i + 1).load(first_factor).to(gl.float32)
        right = factors.index(WHO * GROUPS + i).load(second_factor).to(gl.float32)
        product = _products(left_u, stages, full, empty, n, STAGES)
        even_grad = gl.sum(product * gl.expand_dims(right, 2), 1)
        _add(grads.index(WHO * GROUPS + i), gl.sum(product * gl.expand_dims(even, 1), 2))
        odd_grad = gl.zeros([64, 8], gl.float32, first_factor)
        n += 1
        for j in range(i + 1, GROUPS):
            right = factors.index(WHO * GROUPS + j).load(second_factor).to(gl.float32)
            product = _products(left_u, stages, full, empty, n, STAGES)
            even_grad += gl.sum(product * gl.expand_dims(right, 2), 1)
            both = product * gl.expand_dims(even, 1)
            product = _products(left_u, stages, full, empty, n + 1, STAGES)
            odd_grad += gl.sum(product * gl.expand_dims(right, 2), 1)
            both += product * gl.expand_dims(odd, 1)
            _add(grads.index(WHO * GROUPS + j), gl.sum(both, 2))
            n += 2
        _add(grads.index(WHO * GROUPS + i), even_grad)
        _add(grads.index(WHO * GROUPS + i + 1), odd_grad)
    for group in gl.static_range(GROUPS):
        gl.store(out + own + (group * 8 + eight)[None, :], grads.index(WHO * GROUPS + group).load(by_row), mask=valid)


@gluon.jit(do_not_specialize=["heads", "groups", "blocks", "tiles", "at_end", "always", "scaled"])
def contract_state_kernel(
    state_desc, u, x, table, out, heads, groups, blocks, tiles, at_end, always, scaled,
    D: gl.constexpr, E: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """out [tokens, heads·groups, D] float32 = the gradient of u·(φ(x)·state) by x; unwritten where a slot has no state.

    u [tokens, heads·groups, E].  A program owns three blocks of 64 tokens, of any of the heads that share one state;
    ``blocks`` of them make a slot, and ``tiles`` programs take a slot's blocks of all those heads.
    """
    program = gl.program_id(0)
    tile = program % tiles
    head = program // tiles % heads
    slot = program // tiles // heads
    start = gl.load(table + slot * 4)
    end = gl.load(table + slot * 4 + 1)
    if (always != 0) | (gl.load(table + slot * 4 + 2 + at_end) == 0):
        GROUPS: gl.constexpr = D // 8
        UNITS: gl.constexpr = GROUPS * (GROUPS + 1) // 2
        plain: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
        stages = gl.allocate_shared_memory(gl.bfloat16, [STAGES, 64, E], state_desc.layout)
        factors = gl.allocate_shared_memory(gl.bfloat16, [3 * GROUPS, 64, 8], plain)
        grads = gl.allocate_shared_memory(gl.float32, [3 * GROUPS, 64, 8], plain)
        full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
        empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
        for stage in gl.static_range(STAGES):
            mbarrier.init(full.index(stage), count=1)
            mbarrier.init(empty.index(stage), count=3)
        gl.warp_specialize(
            [
                (_consume, (u, x, out, factors, grads, stages, full, empty, start, end, head, groups, heads * groups, blocks,
                            tile * 3, scaled, 0, D, E, STAGES)),
                (_consume, (u, x, out, factors, grads, stages, full, empty, start, end, head, groups, heads * groups, blocks,
                            tile * 3, scaled, 1, D, E, STAGES)),
                (_consume, (u, x, out, factors, grads, stages, full, empty, start, end, head, groups, heads * groups, blocks,
                            tile * 3, scaled, 2, D, E, STAGES)),
                (_fetch, (state_desc, stages, full, empty, (slot * heads + head) * (UNITS * 64), GROUPS, STAGES)),
            ],
            [4, 4, 1],
            [160, 160, 24],
        )  # fmt: skip
