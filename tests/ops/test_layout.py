"""The layout is a contract: states are saved, served and moved under it."""

from itertools import product
from math import comb

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from problems import relative_error
from torch import Tensor

from power_retention.errors import ArgumentError
from power_retention.ops import LAYOUT, expand, from_blocks16, multiplicity, state_width, to_blocks16
from power_retention.ops.layout import (
    WIDEST_STATE,
    blocks16_width,
    expand_backward,
    has_state,
    monomials,
    norm_functional,
)

widths = st.integers(1, 9)
powers = st.sampled_from([2, 4])
seeds = st.integers(0, 2**20)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def products(x: Tensor, index_tuples: tuple[tuple[int, ...], ...]) -> Tensor:
    return torch.stack([x[..., list(indices)].prod(-1) for indices in index_tuples], -1)


def test_the_version_of_this_contract() -> None:
    """A change of any list below is a new version of the layout, and needs a converter from this one."""
    assert LAYOUT == "power-retention/1"


@pytest.mark.parametrize(
    ("head_width", "p", "order"),
    [
        (1, 2, "00"),
        (2, 2, "00 11 01"),
        (3, 2, "00 11 22 01 12 02"),
        (4, 2, "00 11 22 33 01 12 23 03 02 13"),
        (5, 2, "00 11 22 33 44 01 12 23 34 04 02 13 24 03 14"),
        (1, 4, "0000"),
        (2, 4, "0000 0001 0011 0111 1111"),
        (3, 4, "0000 0001 0002 0011 0012 0022 0111 0112 0122 0222 1111 1112 1122 1222 2222"),
    ],
)
def test_order_of_monomials(head_width: int, p: int, order: str) -> None:
    expected = tuple(tuple(map(int, indices)) for indices in order.split())
    assert monomials(head_width, p) == expected
    x = random(3, head_width)
    assert torch.allclose(expand(x, p), products(x, expected), rtol=1e-14)


@given(widths, st.sampled_from([2, 4, 6]), seeds)
def test_every_monomial_stands_where_the_contract_says(d: int, p: int, seed: int) -> None:
    d = min(d, 5) if p == 6 else d
    x = random(2, d, seed=seed)
    assert torch.allclose(expand(x, p), products(x, monomials(d, p)), rtol=1e-13)
    assert sorted(monomials(d, p)) == sorted({tuple(sorted(indices)) for indices in product(range(d), repeat=p)})


@given(widths, powers, seeds)
def test_embedded_product_is_the_power_of_the_product(d: int, p: int, seed: int) -> None:
    q, k = random(2, 7, d, seed=seed)
    embedded = (expand(q, p) * multiplicity(d, p, q) * expand(k, p)).sum(-1)
    assert relative_error(embedded, (q * k).sum(-1) ** p) < 1e-12


@given(widths, powers)
def test_multiplicities_count_all_index_tuples(d: int, p: int) -> None:
    assert multiplicity(d, p, random(1)).sum() == d**p


@given(widths, powers, seeds)
def test_norm_functional_reads_the_norm_off_an_embedding(d: int, p: int, seed: int) -> None:
    k = random(5, d, seed=seed)
    norms = expand(k, p) @ norm_functional(d, p, k)
    assert torch.allclose(norms, torch.linalg.vector_norm(k, dim=-1) ** p, rtol=1e-12)


@given(widths, powers, seeds)
def test_expand_backward_is_the_gradient_of_the_contract(d: int, p: int, seed: int) -> None:
    x = random(2, 3, d, seed=seed).requires_grad_()
    grad = random(2, 3, state_width(d, p), seed=seed + 1)
    (expected,) = torch.autograd.grad((products(x, monomials(d, p)) * grad).sum(), x)
    assert relative_error(expand_backward(x.detach(), grad, p), expected) < 1e-12


def test_expand_backward_takes_views() -> None:
    x, grad = random(6, 8).T[:, :6], random(21, 8).T
    assert torch.equal(expand_backward(x, grad, 2), expand_backward(x.contiguous(), grad.contiguous(), 2))


@pytest.mark.parametrize(("d", "p", "width"), [(64, 2, 2080), (128, 2, 8256), (16, 4, 3876), (32, 4, 52_360)])
def test_widths_are_the_ideal_ones(d: int, p: int, width: int) -> None:
    assert state_width(d, p) == comb(d + p - 1, p) == width
    assert expand(torch.ones(1, d), p).shape == (1, width)


def test_where_a_state_is_offered() -> None:
    assert has_state(1024, 2)
    assert has_state(32, 4)
    assert state_width(33, 4) <= WIDEST_STATE < state_width(34, 4)
    assert not has_state(34, 4)


@pytest.mark.parametrize("p", [0, 1, 3, -2, 2.0, True, "2"])
def test_powers_that_are_none(p: object) -> None:
    with pytest.raises(ArgumentError, match="even integer"):
        state_width(4, p)


def blocks16_embedding(x: Tensor, *, key: bool) -> Tensor:
    """The 16-block layout built from its description, one entry at a time."""
    d = x.shape[-1]
    out = x.new_full((*x.shape[:-1], blocks16_width(d)), torch.nan)
    for block in range(d // 16):
        for inner in range(16 * (block + 1)):
            for i in range(16):
                weight = 2 if key and inner < 16 * block else 1
                index = 256 * block * (block + 1) // 2 + 16 * inner + i
                out[..., index] = weight * x[..., 16 * block + i] * x[..., inner]
    return out


@pytest.mark.parametrize("d", [16, 48])
def test_blocks16_equals_its_description(d: int) -> None:
    q, k = random(2, 5, d)
    keys = blocks16_embedding(k, key=True)
    assert torch.equal(to_blocks16(expand(k), d, -1), keys)
    assert torch.equal(from_blocks16(keys, d, -1), expand(k))
    scores = (blocks16_embedding(q, key=False) * keys).sum(-1)
    assert relative_error(scores, (q * k).sum(-1) ** 2) < 1e-13


@given(st.sampled_from([16, 32, 64]), st.integers(0, 2), seeds)
def test_blocks16_round_trip_along_any_dimension(d: int, dim: int, seed: int) -> None:
    x = random(2, 3, state_width(d), seed=seed).movedim(-1, dim)
    for axis in (dim, dim - 3):
        there = to_blocks16(x, d, axis)
        assert there.shape[dim] == blocks16_width(d)
        assert torch.equal(from_blocks16(there, d, axis), x)


def test_blocks16_widths() -> None:
    assert (blocks16_width(64), blocks16_width(128)) == (2560, 9216)
    with pytest.raises(ArgumentError, match="divisible by 16, not 24"):
        to_blocks16(torch.zeros(1, state_width(24)), 24, -1)


def test_tables_do_not_keep_the_mode_they_were_first_asked_for_in() -> None:
    d = 112  # used by no other test
    with torch.device("meta"):
        assert multiplicity(d, 2, torch.zeros(1, device="cpu")).device.type == "cpu"
    with torch.inference_mode():
        to_blocks16(torch.zeros(1, state_width(d)), d, -1)
        norm_functional(d - 1, 2, torch.zeros(1, dtype=torch.float64))
    q = torch.ones(d - 1, dtype=torch.float64, requires_grad=True)
    (expand(q) * norm_functional(d - 1, 2, q)).sum().backward()
    assert torch.equal(q.grad, 2 * q.detach())
