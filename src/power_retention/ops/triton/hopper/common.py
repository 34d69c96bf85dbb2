"""What the Hopper kernels share."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.constexpr_function
def products_layout(rows, columns):
    """Layout of [rows, columns, 8] whose reshape to [rows, 8·columns] is a product's left operand in four warps' registers."""

    def doublings(first, end, axis):
        return [[n * (axis == a) for a in range(3)] for n in (first << m for m in range(8)) if n < end]

    return gl.DistributedLinearLayout(
        reg_bases=[[0, 0, 1], [8, 0, 0], *doublings(1, columns, 1), *doublings(64, rows, 0)],
        lane_bases=[[0, 0, 2], [0, 0, 4], [1, 0, 0], [2, 0, 0], [4, 0, 0]],
        warp_bases=[[16, 0, 0], [32, 0, 0]],
        block_bases=[],
        shape=[rows, columns, 8],
    )


@gluon.jit
def power_of_two_scale(x):
    """Per row of ``x`` the power of two that brings its largest entry into [1, 2): exact, and no square overflows."""
    largest = gl.max(gl.abs(x.to(gl.float32)), 1)
    exponent = largest.to(gl.int32, bitcast=True) >> 23
    exponent = gl.where(exponent == 0, 127, gl.minimum(exponent, 253))
    return ((254 - exponent) << 23).to(gl.float32, bitcast=True)


@gluon.constexpr_function
def units_layout():
    """Layout of [2 units, 8, 8, 32 columns] whose rows and tokens become :func:`left_of_units`."""
    return gl.DistributedLinearLayout(
        reg_bases=[[0, 0, 0, 1], [0, 1, 0, 0], [0, 0, 0, 2], [0, 0, 0, 4], [1, 0, 0, 0]],
        lane_bases=[[0, 0, 0, 8], [0, 0, 0, 16], [0, 0, 1, 0], [0, 0, 2, 0], [0, 0, 4, 0]],
        warp_bases=[[0, 2, 0, 0], [0, 4, 0, 0]],
        block_bases=[],
        shape=[2, 8, 8, 32],
    )


@gluon.constexpr_function
def rows_layout(axis):
    """Layout of [2 units · 8 rows, 64 columns] in which a thread holds what it needs of the first or second factors."""
    first = axis == 1
    none = [[0, 0]]
    return gl.DistributedLinearLayout(
        reg_bases=[[0, 1], [0, 2], [0, 4], [0, 8], [8, 0], *([] if first else [[1, 0]])],
        lane_bases=[[0, 16], [0, 32], *([[1, 0], [2, 0], [4, 0]] if first else none * 3)],
        warp_bases=none * 2 if first else [[2, 0], [4, 0]],
        block_bases=[],
        shape=[16, 64],
    )


@gluon.jit
def left_of_units(phi, left: gl.constexpr):
    """[2, 8, 8, 32 columns] → [128, 32 tokens], a product's left operand; nothing moves."""
    bits = gl.reshape(phi, [128, 2, 2, 2, 2, 2])  # tokens' bits 2, 1, 4, 3, 0
    return gl.convert_layout(gl.reshape(gl.permute(bits, [0, 3, 4, 1, 2, 5]), [128, 32]), left, assert_trivial=True)


@gluon.jit
def regular_inverse(den, noise):
    """(den / (den² + noise²), its derivative), free of overflow, both 0 where den = noise = 0: the ratio's epilogue."""
    size = gl.maximum(gl.abs(den), noise)
    size = gl.where(size == 0, float("inf"), size)
    x = den / size
    n = noise / size
    square = x * x + n * n
    square = gl.where(square == 0, 1.0, square)
    return x / square / size, (n * n - x * x) / (square * square) / size / size
