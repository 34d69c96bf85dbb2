"""Pieces that several kernels share.

Inside the kernels a state has rows of its own order (:func:`block_row`), fit for products in registers; it never leaves
them.  Legend of the kernels' constants: P power, D key width, W width of its blocks, E value width, BM rows of the tile a
program owns, BN rows of the tiles it walks over, CT type of the matrix products' operands, PREC their precision.  Tokens
are numbered through the whole batch; a *slot* is one chunk of one run, its row in ``table`` is (first token, one past the
last, whether it is its run's first, whether its last).  A query tile is a whole number of key tiles.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def power_of_two_scale(x):
    """Per row of ``x`` the power of two that brings its largest entry into [1, 2): exact, and no square overflows."""
    largest = tl.max(tl.abs(x.to(tl.float32)), 1)
    exponent = largest.to(tl.int32, bitcast=True) >> 23
    exponent = tl.where(exponent == 0, 127, tl.minimum(exponent, 253))
    return ((254 - exponent) << 23).to(tl.float32, bitcast=True)


@triton.jit
def integer_power(x, P: tl.constexpr):
    """x^P by repeated multiplication."""
    if P == 1:
        return x
    elif P % 2 == 0:
        root = integer_power(x, P // 2)
        return root * root
    else:
        return integer_power(x, P - 1) * x


@triton.jit
def regular_inverse(den, noise):
    """(den / (den² + noise²), its derivative), free of overflow, both 0 where den = noise = 0: the ratio's epilogue."""
    size = tl.maximum(tl.abs(den), noise)
    size = tl.where(size == 0, float("inf"), size)
    x = den / size
    n = noise / size
    square = x * x + n * n
    square = tl.where(square == 0, 1.0, square)
    return x / square / size, (n * n - x * x) / (square * square) / size / size


@triton.jit
def split_dot(a, b, acc, CT: tl.constexpr, PREC: tl.constexpr):
    """a·b + acc with ``b`` float32: where operands are narrower, b is split in two so that its digits survive."""
    high = b.to(CT)
    acc = tl.dot(a, high, acc, input_precision=PREC)
    if CT != tl.float32:
        acc = tl.dot(a, (b - high.to(tl.float32)).to(CT), acc, input_precision=PREC)
    return acc


@triton.jit
def read_normalizer(
    x,
    rows,
    valid,
    head,
    all_heads,
    scale,
    moment,
    D: tl.constexpr,
    BM: tl.constexpr,
    CT: tl.constexpr,
    PREC: tl.constexpr,
):
    """x M xᵀ per row [BM] with M the [D, D] second moments at ``moment``; ``x`` in memory is [tokens, all_heads, D]."""
    WIDE: tl.constexpr = min(D, 64)
    full = tl.arange(0, D)
    address = x + (rows * all_heads + head)[:, None] * D
    a = tl.load(address + full[None, :], mask=valid[:, None], other=0.0).to(tl.float32) * scale[:, None]
    a = a.to(CT)
    den = tl.zeros([BM], tl.float32)
    for block in tl.static_range(D // WIDE):
        cols = block * WIDE + tl.arange(0, WIDE)
        m = tl.load(moment + full[:, None] * D + cols[None, :])
        product = split_dot(a, m, tl.zeros([BM, WIDE], tl.float32), CT, PREC)
        b = tl.load(address + cols[None, :], mask=valid[:, None], other=0.0).to(tl.float32) * scale[:, None]
        den += tl.sum(product * b, 1)
    return den


@triton.jit
def trace(moment, D: tl.constexpr):
    """Σ_a M[a, a], never negative: Σ decay·|k|², which bounds what any unit query can find."""
    diagonal = tl.arange(0, D) * (D + 1)
    return tl.maximum(tl.sum(tl.load(moment + diagonal), 0), 0.0)


@triton.jit
def block_row(a, b, D: tl.constexpr, W: tl.constexpr):
    """Where the monomial x_a·x_b stands among a state's rows inside the kernels.

    First the pairs within blocks of W columns, rolled: row o·D + a holds x_a·x_(a+o), the sum taken within a's block, for
    o = 0 … W/2 (o = W/2 holds each pair twice).  Then, for each block, every later column b times the block's columns a: W
    rows a column, so that a matrix product's operand is a block of x times one number a token.
    """
    BLOCKS: tl.constexpr = D // W
    low = tl.minimum(a, b)
    high = tl.maximum(a, b)
    block = low // W
    offset = (b - a) & (W - 1)
    folded = offset > W // 2
    near = tl.where(folded, (W - offset) * D + b, offset * D + a)
    base = D * (W // 2 + 1) + W * W * (block * (BLOCKS - 1) - block * (block - 1) // 2)
    far = base + (high - (block + 1) * W) * W + low % W
    return tl.where(block == high // W, near, far)
