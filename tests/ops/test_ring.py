"""Decoding through a ring: however tokens come, are folded, taken back or moved between slots, it is the recurrence."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import Problem, problems, random_problem, relative_error, run_recurrence
from torch import Tensor

from power_retention.errors import ArgumentError, StateError
from power_retention.ops import PowerState, RingState, power_retention_decode
from power_retention.ops.reference import recurrent_form


def ring_for(problem: Problem, fold_size: int = 4, slots: int | None = None) -> RingState:
    """A ring in the problem's dtype, that starts from the problem's state."""
    batch, _, heads, d = problem.k.shape
    options = {"fold_size": fold_size, "dtype": problem.q.dtype, "state_dtype": problem.q.dtype}
    if problem.state is not None:
        return RingState.from_state(problem.state, **options)
    return RingState.empty(slots or batch, heads, d, problem.v.shape[-1], p=problem.p, **options)


def feed(problem: Problem, ring: RingState, pieces: list[int], **options: Tensor) -> Tensor:
    y, start = [], 0
    for size in pieces:
        q, k, v, log_g, *_ = problem.span(start, start + size, None)
        y.append(power_retention_decode(q, k, v, log_g, ring, **options))
        start += size
    return torch.cat(y, 1)


def assert_recurrence(problem: Problem, y: Tensor, ring: RingState, tolerance: float = 1e-10) -> None:
    wanted = run_recurrence(problem)
    final = ring.to_state()
    for got, want in zip((y, final.memory, final.normalizer), wanted, strict=True):
        assert relative_error(got, want) < tolerance


def tensors_of(ring: RingState) -> list[Tensor]:
    """Everything that later answers depend on; places past the fill are not among it."""
    order = torch.arange(ring.capacity) + ring.cursor[..., :1]
    used = torch.zeros_like(ring.gates, dtype=torch.bool)
    used.scatter_(2, (order % ring.capacity).long(), torch.arange(ring.capacity) < ring.fill.unsqueeze(-1))
    kept = [x * used.unsqueeze(-1) for x in (ring.keys, ring.values)]
    return [ring.memory, ring.normalizer, *kept, ring.gates * used, ring.cursor]


def same(a: RingState, b: RingState) -> bool:
    return all(x.equal(y) for x, y in zip(tensors_of(a), tensors_of(b), strict=True))


@pytest.mark.parametrize("fold_size", [1, 3, 8])
@pytest.mark.parametrize("p", [2, 4])
def test_token_by_token_it_is_the_recurrence(fold_size: int, p: int) -> None:
    problem = random_problem(batch=2, tokens=30, heads=2, groups=3, d=5, e=3, p=p, states=2)
    ring = ring_for(problem, fold_size)
    assert_recurrence(problem, feed(problem, ring, [1] * 30), ring)
    assert int(ring.fill.min()) >= fold_size


@settings(max_examples=30)
@given(problem=problems(max_tokens=24), data=st.data())
def test_any_pieces(problem: Problem, data: st.DataObject) -> None:
    """Pieces that fit the ring, and prompts longer than it, in any order."""
    pieces, left = [], problem.tokens
    while left:
        pieces.append(data.draw(st.integers(1, min(left, 12))))
        left -= pieces[-1]
    ring = ring_for(problem, data.draw(st.integers(1, 6)))
    assert_recurrence(problem, feed(problem, ring, pieces), ring)


def test_without_gates_and_with_gates_that_forget_everything() -> None:
    for gates in (None, -(torch.rand(1, 30, 1, dtype=torch.float64) ** 8) * 2000):
        problem = random_problem(tokens=30)._replace(log_g=gates)
        ring = ring_for(problem)
        assert_recurrence(problem, feed(problem, ring, [1] * 30), ring)


@pytest.mark.parametrize(("read", "taken"), [(5, 3), (8, 4), (13, 4), (20, 1), (40, 4)])
def test_tokens_taken_back_were_never_read(read: int, taken: int) -> None:
    """Bit for bit where they caused no fold: the same tensors, and the same answers to other tokens."""
    problem, other = random_problem(tokens=60), random_problem(1, tokens=60)
    ring = ring_for(problem)
    feed(problem, ring, [1] * (read - taken))
    before = ring.clone()
    feed(problem.span(read - taken, read, None), ring, [1] * taken)
    folded = int(ring.fill[0, 0]) != int(before.fill[0, 0]) + taken
    ring.roll_back(taken)
    assert folded or same(ring, before)
    rest = other.span(0, 30, None)
    y = feed(rest, ring, [1] * 30)
    joined = Problem(
        *(torch.cat((a[:, : read - taken], b[:, :30]), 1) for a, b in zip(problem[:4], other[:4], strict=True)), 2, None
    )
    wanted = run_recurrence(joined)[0][:, read - taken :]
    assert relative_error(y, wanted) < 1e-10
    assert folded or y.equal(feed(rest, before, [1] * 30))


def test_a_fold_that_later_tokens_caused_holds_none_of_them() -> None:
    """The state after taking back is that of a sequence which folded as early: bit for bit, the taken tokens being NaN."""
    problem = random_problem(tokens=12)
    ring = ring_for(problem)
    feed(problem, ring, [1] * 8)
    assert ring.fill.tolist() == [[8]]
    poison = problem.span(8, 11, None)
    poison = poison._replace(k=poison.k * torch.nan, v=poison.v * torch.nan)
    feed(poison, ring, [3])
    assert ring.fill.tolist() == [[7]]
    ring.roll_back(3)
    y = feed(problem.span(8, 12, None), ring, [1] * 4)
    assert relative_error(y, run_recurrence(problem)[0][:, 8:]) < 1e-10
    assert ring.memory.isfinite().all()


def test_after_a_long_prompt_its_last_tokens_can_be_taken_back() -> None:
    problem = random_problem(tokens=40)
    ring = ring_for(problem)
    feed(problem, ring, [30])
    ring.roll_back(4)
    y = feed(problem.span(26, 40, None), ring, [14])
    assert_recurrence(problem, torch.cat((run_recurrence(problem)[0][:, :26], y), 1), ring)


def test_more_than_the_ring_holds_cannot_be_taken_back() -> None:
    problem = random_problem(tokens=12)
    ring = ring_for(problem)
    feed(problem, ring, [1] * 12)
    before = ring.clone()
    held = int(ring.fill[0, 0])
    with pytest.raises(StateError, match=f"{held + 1} tokens cannot be taken back: the ring holds {held}"):
        ring.roll_back(held + 1)
    assert same(ring, before)


def test_slots_in_any_order_with_different_fill() -> None:
    """Sequences of a serving engine: each with its own slot and length; the others' memory is not touched."""
    problem, slots = random_problem(batch=3, tokens=25, heads=2, groups=2), torch.tensor([4, 0, 2])
    ring = ring_for(problem, slots=6)
    for tensor in (ring.memory, ring.normalizer, ring.keys, ring.values, ring.gates):
        tensor[[1, 3, 5]] = torch.nan
    outputs: list[list[Tensor]] = [[], [], []]
    read = [0, 0, 0]
    for step in range(40):
        rows = [i for i in range(3) if read[i] < 25 and (step + i) % (i + 1) == 0]
        if not rows:
            continue
        token = [x[torch.tensor(rows), torch.tensor([read[i] for i in rows])].unsqueeze(1) for x in problem[:4]]
        y = power_retention_decode(*token, ring, slot_indices=slots[rows].to(torch.int32))
        for i, row in enumerate(rows):
            outputs[row].append(y[i])
            read[row] += 1
    wanted = run_recurrence(problem)[0]
    assert read[0] == 25 > read[1] > read[2] > 8
    for row, got in enumerate(outputs):
        assert relative_error(torch.cat(got), wanted[row, : read[row]]) < 1e-10
    assert ring.memory[[1, 3, 5]].isnan().all()
    ring.roll_back(torch.tensor([1, 2, 3]), slots)
    assert ring.fill[slots].tolist() != ring.fill[[1, 3, 5]].tolist()


def test_rows_without_a_slot() -> None:
    problem = random_problem(batch=2, tokens=3)
    ring = ring_for(problem)
    y = feed(problem, ring, [1, 2], slot_indices=torch.tensor([-1, 0]))
    assert not y[0].any()
    assert relative_error(y[1:], run_recurrence(problem)[0][1:]) < 1e-10
    assert ring.fill.tolist() == [[3], [0]]


def test_padding_has_no_effect() -> None:
    problem = random_problem(tokens=20, states=1)
    keep = torch.rand(1, 20, generator=torch.Generator().manual_seed(0)) < 0.6
    ring, alone = ring_for(problem), ring_for(problem)
    y = torch.cat(
        [
            power_retention_decode(*problem.span(t, t + 5, None)[:4], ring, mask=keep[:, t : t + 5])
            for t in range(0, 20, 5)
        ],
        1,
    )
    shorter = Problem(*(x[:, keep[0]] for x in problem[:4]), 2, problem.state)
    assert not y[~keep].any()
    assert relative_error(y[keep], feed(shorter, alone, [1] * shorter.tokens)[0]) < 1e-10
    assert relative_error(ring.to_state().memory, alone.to_state().memory) < 1e-10


@pytest.mark.parametrize("seed", [0, 1])
def test_bfloat16_states_lose_little_over_a_long_decode(seed: int) -> None:
    """A thousand tokens through a bfloat16 state that is rounded once every fold, against float64."""
    problem = random_problem(seed, tokens=1000, heads=1, groups=2, d=16)
    problem = problem._replace(log_g=-torch.rand(1, 1000, 1, dtype=torch.float64) / 50)
    single = Problem(*(x.float() for x in problem[:4]), 2, None)
    errors = {}
    for dtype in (torch.float32, torch.bfloat16):
        ring = RingState.empty(1, 1, 16, fold_size=16, state_dtype=dtype)
        errors[dtype] = relative_error(feed(single, ring, [1] * 1000)[:, 500:], run_recurrence(problem)[0][:, 500:])
    assert errors[torch.float32] < 1e-5
    assert errors[torch.bfloat16] < 2e-2


def test_compiled_without_a_graph_break() -> None:
    problem = random_problem(tokens=20, heads=2)
    ring = ring_for(problem)

    @torch.compile(backend="aot_eager", fullgraph=True)
    def step(q: Tensor, k: Tensor, v: Tensor, log_g: Tensor) -> Tensor:
        return power_retention_decode(q, k, v, log_g, ring)

    y = torch.cat([step(*(x[:, t : t + 1] for x in problem[:4])) for t in range(20)], 1)
    assert_recurrence(problem, y, ring)


class TestRefusals:
    problem = random_problem(batch=2, tokens=3, heads=2)

    def refused(self, error: type[Exception], message: str, ring: object = None, **options: object) -> None:
        with pytest.raises(error, match=message):
            power_retention_decode(*self.problem[:4], ring or ring_for(self.problem), **options)

    def test_wrong_rings(self) -> None:
        ring = ring_for(self.problem)
        self.refused(StateError, "must be a RingState, not PowerState", PowerState.empty(2, 2, 4))
        self.refused(StateError, "needs \\[slots, 2, 10, 4\\]", RingState.empty(2, 2, 5, dtype=torch.float64))
        self.refused(StateError, "3 slots for 2 sequences", ring.select(torch.tensor([0, 1, 1])))
        self.refused(StateError, "Make the ring with the model's device and dtype", RingState.empty(2, 2, 4))
        self.refused(ArgumentError, "p must be an even integer", replace(ring, p=3))

    def test_wrong_arguments(self) -> None:
        self.refused(ArgumentError, "slot_indices must be an integer tensor", slot_indices=torch.tensor([0.0, 1.0]))
        self.refused(ArgumentError, "slot_indices must be an integer tensor", slot_indices=torch.tensor([0]))
        self.refused(ArgumentError, "mask must be", mask=torch.ones(2, 4))
        with pytest.raises(ArgumentError, match="fold_size must be a positive number"):
            RingState.empty(1, 1, 4, fold_size=0)
        with pytest.raises(ArgumentError, match="float16 overflows"):
            RingState.empty(1, 1, 4, state_dtype=torch.float16)


def test_forgetting_and_selecting_slots() -> None:
    problem = random_problem(batch=3, tokens=12)
    ring = ring_for(problem)
    feed(problem, ring, [1] * 12)
    kept = ring.select(torch.tensor([2, 2, 0]))
    ring.reset(torch.tensor([1]))
    assert ring.fill.tolist() == [[8], [0], [8]]
    assert not ring.to_state().memory[1].any()
    assert kept.to_state().memory.equal(ring.to_state().memory[[2, 2, 0]])
    kept.memory[0].zero_()
    assert kept.memory[1].any()
    ring.reset()
    again = feed(problem, ring, [12])
    assert relative_error(again, recurrent_form(*problem[:4])[0]) < 1e-10
