"""One function, three forms: they agree, forward and backward, for every way of cutting a sequence."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from problems import (
    Problem,
    assert_same,
    chunk_sizes,
    outputs_and_gradients,
    problems,
    random_problem,
    relative_error,
    rms,
    run_operator,
    run_recurrence,
)
from torch import Tensor

from power_retention.ops import PowerState, power_retention, power_retention_state, power_retention_step
from power_retention.ops.reference import attention_form, chunk_form

seeds = st.integers(0, 2**20)


@given(problems(), st.integers(1, 14))
def test_chunk_reference_equals_recurrent_reference(problem: Problem, chunk_size: int) -> None:
    def run_chunks(x: Problem) -> tuple[Tensor, ...]:
        y, final = chunk_form(x.q, x.k, x.v, x.log_g, p=x.p, chunk_size=chunk_size, initial_state=x.state)
        return y, final.memory, final.normalizer

    assert_same(outputs_and_gradients(run_chunks, problem), outputs_and_gradients(run_recurrence, problem))


@given(problems(with_state=False))
def test_attention_reference_equals_recurrent_reference(problem: Problem) -> None:
    def run_attention(x: Problem) -> tuple[Tensor]:
        return (attention_form(x.q, x.k, x.v, x.log_g, p=x.p),)

    expected = outputs_and_gradients(lambda x: run_recurrence(x)[:1], problem)
    assert_same(outputs_and_gradients(run_attention, problem), expected)


@given(problems(), chunk_sizes())
def test_operator_equals_recurrence(problem: Problem, chunk_size: int | None) -> None:
    got = outputs_and_gradients(lambda x: run_operator(x, chunk_size=chunk_size), problem)
    assert_same(got, outputs_and_gradients(run_recurrence, problem))


@given(problems(), chunk_sizes())
def test_the_state_alone_is_that_of_the_call(problem: Problem, chunk_size: int | None) -> None:
    """Without any output; queries have no part in it."""

    def run_state(x: Problem) -> tuple[Tensor, ...]:
        final = power_retention_state(x.k, x.v, x.log_g, p=x.p, chunk_size=chunk_size, initial_state=x.state)
        return final[:2]

    def run_all(x: Problem) -> tuple[Tensor, ...]:
        return run_recurrence(x)[1:]

    got, expected = (outputs_and_gradients(run, problem) for run in (run_state, run_all))
    assert_same(got, expected)


@given(problems(with_state=False), st.just(0) | chunk_sizes())
def test_operator_without_states_equals_attention(problem: Problem, chunk_size: int | None) -> None:
    def run(x: Problem) -> tuple[Tensor]:
        return (power_retention(x.q, x.k, x.v, x.log_g, p=x.p, chunk_size=chunk_size),)

    def expected(x: Problem) -> tuple[Tensor]:
        return (attention_form(x.q, x.k, x.v, x.log_g, p=x.p),)

    assert_same(outputs_and_gradients(run, problem), outputs_and_gradients(expected, problem))


@pytest.mark.parametrize("p", [6, 8])
@given(seed=seeds, gated=st.booleans())
def test_high_powers_as_attention(p: int, seed: int, gated: bool) -> None:
    problem = random_problem(seed, tokens=9, heads=2, groups=2, d=5, e=3, p=p, gated=gated)

    def run(x: Problem) -> tuple[Tensor]:
        return (power_retention(x.q, x.k, x.v, x.log_g, p=p, chunk_size=0),)

    def expected(x: Problem) -> tuple[Tensor]:
        return (attention_form(x.q, x.k, x.v, x.log_g, p=p),)

    assert_same(outputs_and_gradients(run, problem), outputs_and_gradients(expected, problem))


def test_default_form_of_a_power_without_state() -> None:
    problem = random_problem(tokens=6, d=40, p=6)
    y = power_retention(problem.q, problem.k, problem.v, problem.log_g, p=6)
    assert relative_error(y, attention_form(*problem[:4], p=6)) < 1e-12


@given(problems(with_state=False), st.floats(0.01, 100))
def test_the_scale_cancels(problem: Problem, scale: float) -> None:
    y = power_retention(*problem[:4], p=problem.p, scale=scale)
    assert torch.equal(y, power_retention(*problem[:4], p=problem.p))


@st.composite
def cuts(draw: st.DrawFn, tokens: int) -> list[tuple[int, int, int | None]]:
    """(start, end, chunk size) of consecutive calls; a chunk size of −1 means single steps."""
    borders = sorted(draw(st.sets(st.integers(1, tokens - 1)))) if tokens > 1 else []
    ways = st.just(-1) | chunk_sizes()
    return [(a, b, draw(ways)) for a, b in zip([0, *borders], [*borders, tokens], strict=True)]


def run_in_pieces(problem: Problem, pieces: Sequence[tuple[int, int, int | None]]) -> tuple[Tensor, ...]:
    outputs, state = [], problem.state
    for start, end, chunk_size in pieces:
        if chunk_size == -1 and state is None:
            state = empty_state(problem)
        if chunk_size == -1:
            y, state = run_steps(problem.span(start, end, state))
        else:
            y, *final = run_operator(problem.span(start, end, state), chunk_size=chunk_size)
            state = PowerState(*final, problem.p, problem.k.shape[-1])
        outputs.append(y)
    return torch.cat(outputs, 1), state.memory, state.normalizer


def run_steps(problem: Problem) -> tuple[Tensor, PowerState]:
    outputs, state = [], problem.state
    for t in range(problem.tokens):
        q, k, v, log_g = (None if x is None else x[:, t] for x in problem[:4])
        y, state = power_retention_step(q, k, v, log_g, state)
        outputs.append(y)
    return torch.stack(outputs, 1), state


def empty_state(problem: Problem) -> PowerState:
    batch, _, heads, d = problem.k.shape
    return PowerState.empty(batch, heads, d, problem.v.shape[-1], p=problem.p, dtype=problem.k.dtype)


@given(st.data(), problems(max_tokens=16))
def test_every_cut_into_calls_and_steps(data: st.DataObject, problem: Problem) -> None:
    pieces = data.draw(cuts(problem.tokens))
    got = outputs_and_gradients(lambda x: run_in_pieces(x, pieces), problem)
    assert_same(got, outputs_and_gradients(run_recurrence, problem))


@given(problems(max_tokens=10))
def test_steps_in_place(problem: Problem) -> None:
    state = problem.state or empty_state(problem)
    own = state._replace(memory=state.memory.clone(), normalizer=state.normalizer.clone())
    expected_y, *expected_final = run_recurrence(problem._replace(state=state))
    for t in range(problem.tokens):
        q, k, v, log_g = (None if x is None else x[:, t] for x in problem[:4])
        y, after = power_retention_step(q, k, v, log_g, own, inplace=True)
        assert relative_error(y, expected_y[:, t]) < 1e-10
        assert after.memory is own.memory
        assert after.normalizer is own.normalizer
    assert relative_error(own.memory, expected_final[0]) < 1e-10
    assert relative_error(own.normalizer, expected_final[1]) < 1e-10


def test_a_step_in_place_updates_a_state_that_is_a_view() -> None:
    problem = random_problem(batch=2, tokens=1, heads=3, d=4, states=2)
    view = problem.state._replace(
        memory=problem.state.memory.transpose(0, 1).contiguous().transpose(0, 1),
        normalizer=problem.state.normalizer.transpose(0, 1).contiguous().transpose(0, 1),
    )
    assert not view.memory.is_contiguous()
    power_retention_step(*(x[:, 0] for x in problem[:4]), view, inplace=True)
    _, memory, normalizer = run_recurrence(problem)
    assert relative_error(view.memory, memory) < 1e-12
    assert relative_error(view.normalizer, normalizer) < 1e-12


def test_a_step_leaves_the_state_it_was_given() -> None:
    problem = random_problem(tokens=1, states=1)
    before = problem.state.memory.clone(), problem.state.normalizer.clone()
    power_retention_step(*(x[:, 0] for x in problem[:4]), problem.state)
    run_operator(problem)
    assert torch.equal(problem.state.memory, before[0])
    assert torch.equal(problem.state.normalizer, before[1])


@pytest.mark.parametrize("memory_dtype", [torch.float32, torch.bfloat16])
def test_step_and_call_read_a_state_in_its_own_dtypes(memory_dtype: torch.dtype) -> None:
    """A memory in bfloat16 beside a normaliser in float32, as others store them, costs the normaliser no digit."""
    problem = random_problem(tokens=1, heads=2, d=8, states=1).cast(torch.float32)
    state = problem.state._replace(
        memory=problem.state.memory.to(memory_dtype), normalizer=problem.state.normalizer.float()
    )
    y, memory, normalizer = run_operator(problem._replace(state=state))
    step_y, after = power_retention_step(*(x[:, 0] for x in problem[:4]), state)
    exact = run_recurrence(problem._replace(state=state))
    for got in ((y[:, 0], memory, normalizer), (step_y, *after[:2])):
        assert relative_error(got[0], exact[0][:, 0]) < 1e-6
        assert relative_error(got[1], exact[1]) < 1e-6
        assert relative_error(got[2], exact[2]) < 1e-6
        assert got[1].dtype == got[2].dtype == torch.float32


lengths = st.lists(st.integers(1, 6), min_size=1, max_size=4)


@given(st.data(), lengths, seeds, chunk_sizes(6), st.booleans())
def test_packed_sequences_equal_each_alone(
    data: st.DataObject, lengths: list[int], seed: int, chunk_size: int | None, with_states: bool
) -> None:
    problem = random_problem(
        seed,
        tokens=sum(lengths),
        heads=data.draw(st.integers(1, 2)),
        groups=data.draw(st.integers(1, 2)),
        d=data.draw(st.integers(1, 5)),
        e=3,
        p=data.draw(st.sampled_from([2, 4])),
        gated=data.draw(st.booleans()),
        states=len(lengths) * with_states,
    )
    borders = torch.tensor([0, *lengths], dtype=data.draw(st.sampled_from([torch.int32, torch.int64]))).cumsum(0)

    def run_alone(x: Problem) -> tuple[Tensor, ...]:
        alone = []
        for row, (start, end) in enumerate(zip(borders[:-1].tolist(), borders[1:].tolist(), strict=True)):
            state = x.state if x.state is None else x.state.select(torch.tensor([row]))
            alone.append(run_recurrence(x.span(start, end, state)))
        y, memory, normalizer = zip(*alone, strict=True)
        return torch.cat(y, 1), torch.cat(memory), torch.cat(normalizer)

    got = outputs_and_gradients(lambda x: run_operator(x, chunk_size=chunk_size, cu_seqlens=borders), problem)
    assert_same(got, outputs_and_gradients(run_alone, problem))


def test_packed_sequences_as_attention() -> None:
    problem = random_problem(tokens=9, heads=2, groups=2)
    borders = torch.tensor([0, 4, 5, 9])
    y = power_retention(*problem[:4], chunk_size=0, cu_seqlens=borders)
    alone = [attention_form(*problem.span(a, b, None)[:4]) for a, b in ((0, 4), (4, 5), (5, 9))]
    assert relative_error(y, torch.cat(alone, 1)) < 1e-12


@given(st.data(), problems(max_tokens=10), chunk_sizes(10))
def test_padded_equals_unpadded(data: st.DataObject, problem: Problem, chunk_size: int | None) -> None:
    """Padding anywhere, full of NaN: outputs, final states and gradients are those of the tokens alone."""
    rows = problem.q.shape[0]
    mask = torch.tensor([data.draw(st.lists(st.booleans(), min_size=n, max_size=n)) for n in [problem.tokens] * rows])
    mask[:, data.draw(st.integers(0, problem.tokens - 1))] = True
    check_padding(problem, mask, chunk_size)


@pytest.mark.parametrize("mask", [[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0], [1, 1, 0, 0, 1, 1]])
@pytest.mark.parametrize("chunk_size", [None, 1, 2, 4])
def test_left_right_and_middle_padding(mask: list[int], chunk_size: int | None) -> None:
    problem = random_problem(tokens=6, heads=2, groups=2, states=1)
    check_padding(problem, torch.tensor([mask], dtype=torch.bool), chunk_size)


def check_padding(problem: Problem, mask: Tensor, chunk_size: int | None) -> None:
    def run_padded(x: Problem) -> tuple[Tensor, ...]:
        padding = ~mask[:, :, None]
        q, k, v = (t.masked_fill(padding[..., None], torch.nan) for t in x[:3])
        log_g = None if x.log_g is None else x.log_g.masked_fill(padding, torch.nan)
        return run_operator(Problem(q, k, v, log_g, x.p, x.state), chunk_size=chunk_size, mask=mask)

    def run_unpadded(x: Problem) -> tuple[Tensor, ...]:
        y, finals = torch.zeros(*x.q.shape[:3], x.v.shape[-1], dtype=torch.float64), []
        for row, kept in enumerate(mask):
            tensors = (None if t is None else t[row : row + 1, kept] for t in x[:4])
            state = x.state if x.state is None else x.state.select(torch.tensor([row]))
            y_row, *final = run_recurrence(Problem(*tensors, x.p, state))
            y = y.index_put((torch.tensor(row), kept.nonzero().flatten()), y_row[0])
            finals.append(final)
        return y, *(torch.cat(tensors) for tensors in zip(*finals, strict=True))

    got = outputs_and_gradients(run_padded, problem)
    assert_same(got, outputs_and_gradients(run_unpadded, problem))
    assert not got["y"][~mask].any()


@given(problems(max_tokens=10), st.just(0) | chunk_sizes(), st.integers(0, 9))
def test_later_tokens_change_nothing_before_them(problem: Problem, chunk_size: int | None, end: int) -> None:
    other = Problem(
        *(None if x is None else torch.cat((x[:, :end], 2 * x[:, end:]), 1) for x in problem[:4]), problem.p, None
    )
    y, changed = (power_retention(*x[:4], p=x.p, chunk_size=chunk_size) for x in (problem, other))
    assert torch.equal(y[:, :end], changed[:, :end])


@given(problems(max_tokens=6), st.integers(0, 2**20))
def test_batch_rows_and_heads_do_not_mix(problem: Problem, seed: int) -> None:
    """Permuting rows, key/value heads or the queries within a group permutes the results."""
    rng = torch.Generator().manual_seed(seed)
    rows = torch.randperm(problem.k.shape[0], generator=rng)
    heads = torch.randperm(problem.k.shape[2], generator=rng)
    groups = problem.q.shape[2] // problem.k.shape[2]
    query_heads = torch.cat([h * groups + torch.randperm(groups, generator=rng) for h in heads])
    state = problem.state and problem.state.select(rows)
    state = state and state._replace(memory=state.memory[:, heads], normalizer=state.normalizer[:, heads])
    log_g = None if problem.log_g is None else problem.log_g[rows][:, :, heads]
    permuted = Problem(
        problem.q[rows][:, :, query_heads],
        problem.k[rows][:, :, heads],
        problem.v[rows][:, :, heads],
        log_g,
        problem.p,
        state,
    )
    y, memory, normalizer = run_operator(problem, chunk_size=4)
    got = run_operator(permuted, chunk_size=4)
    expected = (y[rows][:, :, query_heads], memory[rows][:, heads], normalizer[rows][:, heads])
    for one, other in zip(got, expected, strict=True):
        assert torch.allclose(one, other, rtol=1e-12, atol=0)


@pytest.mark.parametrize("layout", ["transposed", "expanded", "strided"])
def test_any_memory_layout(layout: str) -> None:
    problem = random_problem(batch=2, tokens=6, heads=2, d=4, states=2)

    def relaid(x: Tensor) -> Tensor:
        if layout == "transposed":
            return x.transpose(0, 1).contiguous().transpose(0, 1)
        if layout == "strided":
            return torch.stack((x, x), -1)[..., 0]
        return x[:1].expand_as(x)

    q, k, v, log_g = (relaid(x) for x in problem[:4])
    state = problem.state._replace(memory=relaid(problem.state.memory), normalizer=relaid(problem.state.normalizer))
    other = Problem(q, k, v, log_g, 2, state)
    packed = Problem(*(x.contiguous() for x in other[:4]), 2, PowerState(*(x.contiguous() for x in state[:2]), 2, 4))

    def run_relaid(x: Problem) -> tuple[Tensor, ...]:
        tensors = [x.q, x.k, x.v, x.log_g, *x.state[:2]]
        q, k, v, log_g, memory, normalizer = map(relaid, tensors)
        return run_operator(Problem(q, k, v, log_g, 2, PowerState(memory, normalizer, 2, 4)), chunk_size=4)

    for one, want in zip(run_operator(other, chunk_size=4), run_recurrence(packed), strict=True):
        assert relative_error(one, want) < 1e-12
    if layout != "expanded":
        assert_same(outputs_and_gradients(run_relaid, problem), outputs_and_gradients(run_recurrence, problem))


@pytest.mark.parametrize("chunk_size", [0, 16, 64, None])
@pytest.mark.parametrize("p", [2, 4])
@pytest.mark.parametrize(("dtype", "roundings"), [(torch.float32, 40.0), (torch.bfloat16, 1.2), (torch.float16, 1.2)])
def test_narrow_dtypes_err_by_their_own_rounding(
    dtype: torch.dtype, roundings: float, p: int, chunk_size: int | None
) -> None:
    """Against float64 on the same inputs, in units of the error of rounding the exact result to the dtype."""
    problem = random_problem(tokens=150, heads=2, groups=2, d=8, p=p).cast(dtype)

    def run(x: Problem) -> tuple[Tensor]:
        return (power_retention(x.q, x.k, x.v, x.log_g, p=p, chunk_size=chunk_size),)

    got = outputs_and_gradients(run, problem)
    exact = outputs_and_gradients(lambda x: (attention_form(*x[:4], p=p).to(dtype),), problem.cast(torch.float64))
    assert got["y"].dtype == dtype
    for name in ("y", "gradient of q", "gradient of k", "gradient of v"):
        assert got[name].dtype == dtype
        rounding = rms(exact[name].to(dtype) - exact[name]) or rms(exact[name]) * torch.finfo(dtype).eps / 4
        assert rms(got[name].double() - exact[name]) < roundings * rounding, name
    assert relative_error(got["gradient of log_g"], exact["gradient of log_g"]) < 2e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes_that_come_back(dtype: torch.dtype) -> None:
    """y in the dtype of v, states in float32 whatever the inputs; a decoded sequence keeps float32 precision."""
    problem = random_problem(tokens=60, heads=2, d=8).cast(dtype)
    exact = run_recurrence(problem)
    y, memory, normalizer = run_operator(problem, chunk_size=16)
    step_y, state = run_steps(problem._replace(state=PowerState.empty(1, 2, 8)))
    assert y.dtype == step_y.dtype == dtype
    for got in (memory, normalizer, *state[:2]):
        assert got.dtype == torch.float32
    for got, want in ((memory, exact[1]), (normalizer, exact[2]), (state.memory, exact[1])):
        assert relative_error(got, want) < 1e-5
    assert relative_error(y, exact[0]) < torch.finfo(dtype).eps
    assert relative_error(step_y, exact[0]) < torch.finfo(dtype).eps * 8
