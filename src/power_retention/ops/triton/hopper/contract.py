"""The gradient of u·(φ(x)·S) with respect to x on Hopper: u·Sᵀ on the tensor cores, folded with x as it comes."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait

from power_retention.ops.triton.hopper.common import power_of_two_scale


@gluon.jit
def _fetch(state_desc, stages, full, empty, first_row, GROUPS: gl.constexpr, STAGES: gl.constexpr):
    """The producer: units of the state two by two, those of one first factor after the other; of an odd number one alone."""
    n = 0
    unit = 0
    for i in range(GROUPS):
        count = GROUPS - i
        for pair in range((count + 1) // 2):
            stage = n % STAGES
            row = first_row + (unit + gl.maximum(2 * pair - count % 2, 0)) * 64
            mbarrier.wait(empty.index(stage), (n // STAGES & 1) ^ 1)
            mbarrier.expect(full.index(stage), state_desc.block_type.nbytes)
            tma.async_copy_global_to_shared(state_desc, [row, 0], full.index(stage), stages.index(stage))
            n += 1
        unit += count


@gluon.jit
def _products(u, state, full, empty, phase, N: gl.constexpr):
    """u·stateᵀ [64, N]; the state's rows are free again.

    Products with operands in registers run at full speed from 128 columns on.
    """
    mbarrier.wait(full, phase)
    out = gl.zeros([64, N], gl.float32, gl.NVMMADistributedLayout([3, 0], [4, 1], [16, N, 16]))
    out = warpgroup_mma(u, state.permute([1, 0]), out, use_acc=False, is_async=True)
    out = warpgroup_mma_wait(0, deps=[out])
    mbarrier.arrive(empty, count=1)
    return out


@gluon.constexpr_function
def _cube():
    return gl.DistributedLinearLayout(
        reg_bases=[[0, 0, 1], [8, 0, 0], [0, 1, 0], [0, 2, 0], [0, 4, 0]],
        lane_bases=[[0, 0, 2], [0, 0, 4], [1, 0, 0], [2, 0, 0], [4, 0, 0]],
        warp_bases=[[16, 0, 0], [32, 0, 0]],
        block_bases=[],
        shape=[64, 8, 8],
    )


@gluon.jit
def _add(target, value):
    target.store(target.load(value.type.layout) + value)


@gluon.jit
def _consume(
    u, x, out, factors, grads, stages, full, empty, start, end, head, groups, all_heads, blocks, block,
    WHO: gl.constexpr, SCALE: gl.constexpr, D: gl.constexpr, E: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """64 tokens of one head: the ``block + WHO``-th of the heads' blocks."""
    GROUPS: gl.constexpr = D // 8
    left: gl.constexpr = gl.DotOperandLayout(0, gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16]), 2)
    first_factor: gl.constexpr = gl.SliceLayout(1, _cube())
    second_factor: gl.constexpr = gl.SliceLayout(2, _cube())
    by_row: gl.constexpr = gl.BlockedLayout([1, 8], [32, 1], [4, 1], [1, 0])
    number = block + WHO
    row = (head * groups + number % groups).to(gl.int64)
    begin = start + number // groups * 64
    live = number < groups * blocks
    token = begin + gl.arange(0, 64, gl.SliceLayout(1, by_row))
    valid = ((token < end) & live)[:, None]
    own = (token.to(gl.int64) * all_heads + row)[:, None] * D
    scale = gl.full([64], 1.0, gl.float32, gl.SliceLayout(1, by_row))
    if SCALE:
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
    for i in range(GROUPS):
        left_x = gl.expand_dims(factors.index(WHO * GROUPS + i).load(first_factor).to(gl.float32), 1)
        grad = gl.zeros([64, 8], gl.float32, first_factor)
        alone = (GROUPS - i) % 2
        if alone == 1:
            stage = n % STAGES
            product = _products(
                left_u, stages.index(stage).slice(0, 64), full.index(stage), empty.index(stage), n // STAGES & 1, 64
            )
            product = gl.convert_layout(gl.reshape(product, [64, 8, 8]), _cube(), assert_trivial=True)
            right = gl.expand_dims(factors.index(WHO * GROUPS + i).load(second_factor).to(gl.float32), 2)
            grad += gl.sum(product * right, 1)
            _add(grads.index(WHO * GROUPS + i), gl.sum(product * left_x, 2))
            n += 1
        for j in range(i + alone, GROUPS, 2):
            stage = n % STAGES
            both = _products(left_u, stages.index(stage), full.index(stage), empty.index(stage), n // STAGES & 1, 128)
            product, other = gl.split(gl.permute(gl.reshape(both, [64, 2, 64]), [0, 2, 1]))
            product = gl.convert_layout(gl.reshape(product, [64, 8, 8]), _cube(), assert_trivial=True)
            right = gl.expand_dims(factors.index(WHO * GROUPS + j).load(second_factor).to(gl.float32), 2)
            grad += gl.sum(product * right, 1)
            _add(grads.index(WHO * GROUPS + j), gl.sum(product * left_x, 2))
            other = gl.convert_layout(gl.reshape(other, [64, 8, 8]), _cube(), assert_trivial=True)
            right = gl.expand_dims(factors.index(WHO * GROUPS + j + 1).load(second_factor).to(gl.float32), 2)
            grad += gl.sum(other * right, 1)
            _add(grads.index(WHO * GROUPS + j + 1), gl.sum(other * left_x, 2))
            n += 1
        _add(grads.index(WHO * GROUPS + i), grad)
    for group in gl.static_range(GROUPS):
        gl.store(out + own + (group * 8 + eight)[None, :], grads.index(WHO * GROUPS + group).load(by_row), mask=valid)


@gluon.jit(do_not_specialize=["blocks", "tiles"])
def contract_state_kernel(
    state_desc, u, x, table, out, heads, groups, blocks, tiles,
    AT_END: gl.constexpr, ALWAYS: gl.constexpr, SCALE: gl.constexpr, D: gl.constexpr, E: gl.constexpr, STAGES: gl.constexpr,
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
    if ALWAYS or gl.load(table + slot * 4 + (3 if AT_END else 2)) == 0:
        GROUPS: gl.constexpr = D // 8
        UNITS: gl.constexpr = GROUPS * (GROUPS + 1) // 2
        plain: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
        stages = gl.allocate_shared_memory(gl.bfloat16, [STAGES, 128, E], state_desc.layout)
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
                            tile * 3, 0, SCALE, D, E, STAGES)),
                (_consume, (u, x, out, factors, grads, stages, full, empty, start, end, head, groups, heads * groups, blocks,
                            tile * 3, 1, SCALE, D, E, STAGES)),
                (_consume, (u, x, out, factors, grads, stages, full, empty, start, end, head, groups, heads * groups, blocks,
                            tile * 3, 2, SCALE, D, E, STAGES)),
                (_fetch, (state_desc, stages, full, empty, (slot * heads + head) * (UNITS * 64), GROUPS, STAGES)),
            ],
            [4, 4, 1],
            [160, 160, 24],
        )  # fmt: skip
