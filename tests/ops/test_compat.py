"""Code written against the public `retention` package runs here, and gets what its formulas say."""

from __future__ import annotations

import inspect
import re
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from problems import Problem, assert_same, outputs_and_gradients, random_problem, relative_error, run_recurrence
from torch import Tensor

from power_retention.compat import power_retention, power_retention_inference
from power_retention.errors import ArgumentError
from power_retention.ops import PowerState, to_blocks16
from power_retention.ops.reference import attention_form

WIDTH16 = 256
"""Of the 16-block layout at d = 16."""


def blocks16(state: PowerState) -> tuple[Tensor, Tensor]:
    return to_blocks16(state.memory, state.head_width, 2), to_blocks16(state.normalizer, state.head_width, 2)


def final_blocks16(problem: Problem) -> tuple[Tensor, Tensor]:
    _, memory, normalizer = run_recurrence(problem)
    return blocks16(PowerState(memory, normalizer, 2, problem.k.shape[-1]))


@st.composite
def blocked_problems(draw: st.DrawFn, *, max_tokens: int = 12, states: bool = False) -> Problem:
    batch = draw(st.integers(1, 2))
    return random_problem(
        draw(st.integers(0, 2**20)),
        batch=batch,
        tokens=draw(st.integers(1, max_tokens)),
        heads=draw(st.integers(1, 2)),
        groups=draw(st.integers(1, 2)),
        d=16,
        e=draw(st.integers(1, 4)),
        gated=draw(st.booleans()),
        states=batch * states,
    )


def parameters(function: object) -> dict[str, object]:
    found = inspect.signature(function).parameters
    assert {parameter.kind for parameter in found.values()} == {inspect.Parameter.POSITIONAL_OR_KEYWORD}
    return {name: parameter.default for name, parameter in found.items()}


def test_signatures() -> None:
    """Names, order and defaults, so that positional and keyword calls bind as they did."""
    required = inspect.Parameter.empty
    shared = {"Q": required, "K": required, "V": required, "log_G": None, "initial_state": None, "sum_of_keys": None}
    whole = {"return_final_state": False, "deg": 2, "scale": None, "chunk_size": None, "switch_over_seq_len": None}
    decoding = {"deg": 2, "scale": None, "switch_over_seq_len": 512}
    assert list(parameters(power_retention).items()) == list((shared | whole).items())
    assert list(parameters(power_retention_inference).items()) == list((shared | decoding).items())


def test_unknown_keywords_are_not_dropped() -> None:
    problem = random_problem(d=16)
    with pytest.raises(TypeError, match="chunk_len"):
        power_retention(*problem[:4], chunk_len=16)
    with pytest.raises(TypeError, match="chunk_size"):
        power_retention_inference(*problem[:4], chunk_size=16)


@given(blocked_problems(states=True), st.none() | st.integers(1, 14))
def test_whole_sequences_with_states(problem: Problem, chunk_size: int | None) -> None:
    """Positionally, in and out of the 16-block layout, gradients through both included."""

    def run(x: Problem) -> tuple[Tensor, Tensor, Tensor]:
        memory, normalizer = blocks16(x.state)
        return power_retention(x.q, x.k, x.v, x.log_g, memory, normalizer, True, 2, 0.25, chunk_size, None)

    def expected(x: Problem) -> tuple[Tensor, Tensor, Tensor]:
        return run_recurrence(x)[0], *final_blocks16(x)

    assert_same(outputs_and_gradients(run, problem), outputs_and_gradients(expected, problem))


@given(blocked_problems(), st.none() | st.integers(1, 14), st.none() | st.integers(0, 14))
def test_whole_sequences_without_states(problem: Problem, chunk_size: int | None, switch: int | None) -> None:
    exact = attention_form(*problem[:4])
    out = power_retention(*problem[:4], chunk_size=chunk_size, switch_over_seq_len=switch)
    assert relative_error(out, exact) < 1e-10
    out, memory, normalizer = power_retention(*problem[:4], return_final_state=True, switch_over_seq_len=switch)
    assert relative_error(out, exact) < 1e-10
    for got, want in zip((memory, normalizer), final_blocks16(problem), strict=True):
        assert relative_error(got, want) < 1e-10


@pytest.mark.parametrize("deg", [2, 4, 6])
def test_widths_without_a_16_block_layout(deg: int) -> None:
    problem = random_problem(tokens=9, heads=2, groups=2, d=5, e=3, p=deg)
    exact = attention_form(*problem[:4], p=deg)
    assert relative_error(power_retention(*problem[:4], deg=deg), exact) < 1e-12
    assert relative_error(power_retention(*problem[:4], deg=deg, switch_over_seq_len=9), exact) < 1e-12
    y, state, sum_of_keys = power_retention_inference(problem.q[:, -2:], *problem[1:4], deg=deg)
    assert relative_error(y, exact[:, -2:]) < 1e-12
    assert state is sum_of_keys is None


class RetentionCache:
    """What callers of `retention` keep a layer: keys, values and gates since the last fold, a state, a sum of keys."""

    def __init__(self, switch_over_seq_len: int | None) -> None:
        self.switch_over_seq_len = switch_over_seq_len
        self.cached: list[Tensor | None] = [None, None, None]
        self.state: Tensor | None = None
        self.sum_of_keys: Tensor | None = None

    def decode(self, q: Tensor, *new: Tensor | None) -> Tensor:
        """Append the new tokens, read, and empty the cache when it has been folded; as in Brumby's attention layer."""
        for slot, tokens in enumerate(new):
            old = self.cached[slot]
            self.cached[slot] = tokens if old is None else torch.cat((old, tokens), 1)
        keys, values, gates = self.cached
        y, self.state, self.sum_of_keys = power_retention_inference(
            q,
            keys,
            values,
            gates,
            initial_state=self.state,
            sum_of_keys=self.sum_of_keys,
            deg=2,
            scale=q.shape[-1] ** -0.5,
            switch_over_seq_len=self.switch_over_seq_len,
        )
        if self.switch_over_seq_len is not None and keys.shape[1] >= self.switch_over_seq_len:
            self.cached = [None, None, None]
        return y


@st.composite
def bursts(draw: st.DrawFn, tokens: int) -> list[tuple[int, int]]:
    """Consecutive spans of one to four tokens, as a decode loop or a speculative decoder would feed them."""
    spans, start = [], 0
    while start < tokens:
        end = min(tokens, start + draw(st.integers(1, 4)))
        spans.append((start, end))
        start = end
    return spans


@given(st.data(), blocked_problems(max_tokens=16), st.none() | st.integers(1, 6))
def test_decode_loop_with_cache_folding(data: st.DataObject, problem: Problem, switch: int | None) -> None:
    """Bursts of any length, folds at any length: every row is what the recurrence gives."""
    cache = RetentionCache(switch)
    outputs = [
        cache.decode(*(None if x is None else x[:, start:end] for x in problem[:4]))
        for start, end in data.draw(bursts(problem.tokens))
    ]
    assert relative_error(torch.cat(outputs, 1), run_recurrence(problem)[0]) < 1e-10
    folded = problem.tokens - (0 if cache.cached[0] is None else cache.cached[0].shape[1])
    if folded == 0:
        assert cache.state is None
        return
    expected = final_blocks16(problem.span(0, folded, None))
    assert relative_error(cache.state, expected[0]) < 1e-10
    assert relative_error(cache.sum_of_keys, expected[1]) < 1e-10


@given(blocked_problems(max_tokens=12), st.integers(1, 11), st.integers(1, 5))
def test_prefill_then_decode(problem: Problem, prefill: int, switch: int) -> None:
    """A prompt through one function, its continuation through the other."""
    prefill = min(prefill, problem.tokens)
    cache = RetentionCache(switch)
    prompt = (None if x is None else x[:, :prefill] for x in problem[:4])
    out, cache.state, cache.sum_of_keys = power_retention(*prompt, return_final_state=True, chunk_size=4)
    outputs = [out]
    for t in range(prefill, problem.tokens):
        outputs.append(cache.decode(*(None if x is None else x[:, t : t + 1] for x in problem[:4])))
    assert relative_error(torch.cat(outputs, 1), run_recurrence(problem)[0]) < 1e-10


def test_each_query_row_has_its_own_gate() -> None:
    """Several queries, gates and a state: the row before last is not discounted by the last row's gate."""
    problem = random_problem(tokens=3, heads=2, groups=2, d=16, states=1)
    problem.log_g[:, -1] = -20
    y, _, _ = power_retention_inference(*problem[:4], *blocks16(problem.state))
    y_two, _, _ = power_retention_inference(problem.q[:, 1:], *problem[1:4], *blocks16(problem.state))
    exact = run_recurrence(problem)[0]
    assert relative_error(y, exact) < 1e-12
    assert relative_error(y_two, exact[:, 1:]) < 1e-12


def test_an_unfolded_call_returns_what_came_in() -> None:
    problem = random_problem(tokens=5, d=16, states=1)
    state, sum_of_keys = blocks16(problem.state)
    for queries in (problem.q, problem.q[:, -1:]):
        _, *returned = power_retention_inference(queries, *problem[1:4], state, sum_of_keys, switch_over_seq_len=6)
        assert returned[0] is state
        assert returned[1] is sum_of_keys
        _, *returned = power_retention_inference(queries, *problem[1:4], switch_over_seq_len=6)
        assert returned == [None, None]


def test_a_fold_includes_every_cached_token_and_leaves_its_inputs() -> None:
    problem = random_problem(tokens=5, d=16, states=1)
    state, sum_of_keys = blocks16(problem.state)
    before = state.clone(), sum_of_keys.clone()
    y, new_state, new_sum = power_retention_inference(
        problem.q[:, -2:], *problem[1:4], state, sum_of_keys, switch_over_seq_len=5
    )
    assert relative_error(y, run_recurrence(problem)[0][:, -2:]) < 1e-12
    for got, want in zip((new_state, new_sum), final_blocks16(problem), strict=True):
        assert relative_error(got, want) < 1e-12
    assert torch.equal(state, before[0])
    assert torch.equal(sum_of_keys, before[1])


@pytest.mark.parametrize("empty", [None, 0])
def test_reading_a_state_with_an_empty_cache(empty: int | None) -> None:
    """Queries straight after a fold, several at once: none is discounted, nothing is added."""
    problem = random_problem(batch=2, tokens=3, heads=2, groups=2, d=16, e=4, states=2)
    state, sum_of_keys = blocks16(problem.state)
    cache = (None, None, None) if empty is None else (problem.k[:, :0], problem.v[:, :0], problem.log_g[:, :0])
    y, *returned = power_retention_inference(problem.q, *cache, state, sum_of_keys)
    nothing_new = problem._replace(k=torch.zeros_like(problem.k), v=torch.zeros_like(problem.v), log_g=None)
    assert relative_error(y, run_recurrence(nothing_new)[0]) < 1e-12
    assert returned[0] is state
    assert returned[1] is sum_of_keys


@pytest.mark.parametrize("switch", [4, 100])
def test_caches_of_unequal_length_padded_with_zeros(switch: int) -> None:
    """Servers batch sequences by padding their caches with zeros on the right; a zero gate discounts nothing."""
    problem = random_problem(batch=2, tokens=6, heads=2, groups=2, d=16, states=2)
    q, k, v, log_g = (x.clone() for x in problem[:4])
    for tensor in (k, v, log_g):
        tensor[1, 4:] = 0
    queries = torch.stack((q[0, 5:], q[1, 3:4]))
    y, state, _ = power_retention_inference(queries, k, v, log_g, *blocks16(problem.state), switch_over_seq_len=switch)
    for row, length in ((0, 6), (1, 4)):
        alone = Problem(*(x[row : row + 1, :length] for x in problem[:4]), 2, problem.state.select(torch.tensor([row])))
        assert relative_error(y[row], run_recurrence(alone)[0][0, -1:]) < 1e-12
        if switch == 4:
            assert relative_error(state[row], final_blocks16(alone)[0][0]) < 1e-12


@pytest.mark.parametrize("switch", [2, 8, None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtypes(dtype: torch.dtype, switch: int | None) -> None:
    """The state in the dtype of the inputs, the sum of keys in float32; errors of the size of that rounding."""
    problem = random_problem(tokens=24, heads=2, groups=2, d=16).cast(dtype)
    problem = problem._replace(log_g=problem.log_g.float())
    out, state, sum_of_keys = power_retention(*problem[:4], return_final_state=True)
    assert (out.dtype, state.dtype, sum_of_keys.dtype) == (dtype, dtype, torch.float32)
    cache = RetentionCache(switch)
    outputs = [cache.decode(*(x[:, t : t + 1] for x in problem[:4])) for t in range(24)]
    y = torch.cat(outputs, 1)
    assert y.dtype == dtype
    assert relative_error(y, run_recurrence(problem)[0]) < 4 * torch.finfo(dtype).eps
    if switch is not None:
        assert (cache.state.dtype, cache.sum_of_keys.dtype) == (dtype, torch.float32)


def test_queries_without_an_answer_are_zero() -> None:
    problem = random_problem(tokens=4, heads=2, d=16, states=1)
    state, sum_of_keys = (x.zero_() for x in blocks16(problem.state))
    problem.k[..., 8:] = 0
    problem.q[..., :8] = 0
    for queries in (problem.q, problem.q[:, -1:]):
        for memory in ((None, None), (state, sum_of_keys)):
            y, _, _ = power_retention_inference(queries, *problem[1:4], *memory)
            assert not y.any()


@pytest.mark.parametrize("size", [1e-30, 1e-8, 1e8, 1e17])
@pytest.mark.parametrize("deg", [2, 8])
def test_keys_of_any_size_in_a_cache(size: float, deg: int) -> None:
    problem = random_problem(tokens=6, d=16, p=deg).cast(torch.float32)
    y, _, _ = power_retention_inference(problem.q[:, -1:], problem.k * size, problem.v, problem.log_g, deg=deg)
    assert relative_error(y, attention_form(*problem[:4], p=deg)[:, -1:]) < 1e-5


def test_a_cache_with_gates_shut() -> None:
    problem = random_problem(tokens=6, heads=2, d=16, states=1)
    problem.log_g[:, 2] = -torch.inf
    problem.log_g[:, 4] = -80
    exact = run_recurrence(problem)[0]
    for count in (1, 3, 5):
        y, _, _ = power_retention_inference(problem.q[:, -count:], *problem[1:4], *blocks16(problem.state))
        assert relative_error(y, exact[:, -count:]) < 1e-12


def arguments(d: int = 16) -> dict[str, Any]:
    """A good call of either function, with a state where the layout has one."""
    problem = random_problem(tokens=4, heads=2, groups=2, d=d, states=1)
    memory, normalizer = blocks16(problem.state) if d % 16 == 0 else (None, None)
    given = {"Q": problem.q, "K": problem.k, "V": problem.v, "log_G": problem.log_g}
    return given | {"initial_state": memory, "sum_of_keys": normalizer}


def ones(*shape: int, dtype: torch.dtype = torch.float64, device: str = "cpu") -> Tensor:
    return torch.ones(*shape, dtype=dtype, device=device)


SHARED_CASES = {
    "state without its sum": ({"sum_of_keys": None}, "initial_state came without sum_of_keys; pass both"),
    "sum without its state": ({"initial_state": None}, "sum_of_keys came without initial_state; pass both"),
    "state shape": (
        {"initial_state": ones(1, 2, 136, 16)},
        f"initial_state is [1, 2, 136, 16] in torch.float64; this call needs [1, 2, {WIDTH16}, 16]",
    ),
    "sum shape": ({"sum_of_keys": ones(1, 4, WIDTH16)}, f"sum_of_keys is [1, 4, {WIDTH16}]"),
    "state dtype": ({"initial_state": ones(1, 2, WIDTH16, 16, dtype=torch.int32)}, "in torch.int32"),
    "state device": ({"sum_of_keys": ones(1, 2, WIDTH16, device="meta")}, "sum_of_keys is on meta, Q is on cpu"),
    "power with a state": ({"deg": 4}, "initial_state holds a state in the 16-block layout, which exists at deg=2"),
    "odd power": ({"deg": 3}, "p must be an even integer"),
    "gate above zero": ({"log_G": ones(1, 4, 2)}, "log_g holds a gate above zero"),
    "scale": ({"scale": 0.0}, "scale must be a non-zero number"),
    "head counts": ({"Q": ones(1, 4, 3, 16)}, "3 query heads cannot share 2 key/value heads"),
    "rank": ({"Q": ones(4, 4, 16)}, "must be a tensor"),
}


@pytest.mark.parametrize("function", [power_retention, power_retention_inference])
@pytest.mark.parametrize("case", SHARED_CASES)
def test_bad_arguments(function: Any, case: str) -> None:
    changes, message = SHARED_CASES[case]
    with pytest.raises(ArgumentError, match=re.escape(message)):
        function(**arguments() | changes)


EMPTY = {"K": None, "V": None, "log_G": None}
DECODING_CASES = {
    "values without keys": ({"K": None}, "K and V hold the same cached tokens: pass both or neither"),
    "nothing at all": (EMPTY | {"initial_state": None, "sum_of_keys": None}, "There is nothing to read"),
    "gates of no token": (EMPTY | {"log_G": ones(1, 4, 2)}, "log_G holds 4 tokens and the cache none"),
    "more queries than tokens": ({"Q": ones(1, 5, 4, 16)}, "Q holds 5 tokens and the cache 4"),
    "no query": ({"Q": ones(1, 0, 4, 16)}, "Q must be a tensor [B, Tq, Hq, d] of at least one token"),
    "heads of a state": (EMPTY | {"Q": ones(1, 1, 3, 16)}, "Q has 3 heads; [B, H, D, e] was expected"),
    "rank of a state": (EMPTY | {"initial_state": ones(2, WIDTH16, 16)}, "[B, H, D, e] was expected"),
    "switch": ({"switch_over_seq_len": 0}, "switch_over_seq_len must be a positive number of tokens"),
}


@pytest.mark.parametrize("case", DECODING_CASES)
def test_bad_arguments_of_decoding(case: str) -> None:
    changes, message = DECODING_CASES[case]
    with pytest.raises(ArgumentError, match=re.escape(message)):
        power_retention_inference(**arguments() | changes)


@pytest.mark.parametrize(("d", "deg"), [(20, 2), (16, 4)])
def test_states_that_the_layout_does_not_have(d: int, deg: int) -> None:
    given = arguments(d) | {"initial_state": None, "sum_of_keys": None}
    reason = re.escape(f"not at deg={deg} and head width {d}")
    with pytest.raises(ArgumentError, match=f"return_final_state=True asks for a state in the 16-block.*{reason}"):
        power_retention(**given, deg=deg, return_final_state=True)
    with pytest.raises(ArgumentError, match=f"4 cached tokens reach switch_over_seq_len=4 .*{reason}"):
        power_retention_inference(**given, deg=deg, switch_over_seq_len=4)
