"""Where the arithmetic could go wrong: directions without an answer, extreme magnitudes, hard gates, long sequences."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from problems import (
    Problem,
    assert_same,
    outputs_and_gradients,
    random_problem,
    relative_error,
    run_operator,
    run_recurrence,
)
from torch import Tensor

from power_retention.ops import PowerState, power_retention, power_retention_step

FORMS = ["attention", "chunks of 1", "chunks of 3", "one chunk", "steps"]


def run_form(form: str, problem: Problem) -> Tensor:
    if form == "steps":
        return run_steps(problem)[0]
    chunk_size = {"attention": 0, "chunks of 1": 1, "chunks of 3": 3, "one chunk": problem.tokens}[form]
    return power_retention(*problem[:4], p=problem.p, chunk_size=chunk_size)


def run_steps(problem: Problem) -> tuple[Tensor, PowerState]:
    batch, _, heads, d = problem.k.shape
    dtype = torch.promote_types(problem.k.dtype, torch.float32)
    state = problem.state or PowerState.empty(batch, heads, d, problem.v.shape[-1], p=problem.p, dtype=dtype)
    outputs = []
    for q, k, v, log_g in zip(*(x.unbind(1) for x in problem[:4]), strict=True):
        y, state = power_retention_step(q, k, v, log_g, state)
        outputs.append(y)
    return torch.stack(outputs, 1), state


def finite(results: dict[str, Tensor]) -> bool:
    return all(bool(x.isfinite().all()) for x in results.values())


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("p", [2, 4])
def test_queries_without_an_answer_give_zero_in_every_form(form: str, dtype: torch.dtype, p: int) -> None:
    """All-zero queries, queries orthogonal to every key, and queries before the first non-zero key."""
    problem = random_problem(tokens=10, heads=2, groups=2, d=6, p=p).cast(dtype)
    problem.k[..., 3:] = 0
    problem.q[:, 2:4] = 0
    problem.q[:, 4:6, :, :3] = 0
    problem.k[:, 0] = 0
    results = outputs_and_gradients(lambda x: (run_form(form, x),), problem)
    silent = [0, 2, 3, 4, 5]
    assert finite(results)
    assert not results["y"][:, silent].any()
    answered = [t for t in range(10) if t not in silent]
    exact = run_recurrence(problem)[0]
    assert relative_error(results["y"][:, answered], exact[:, answered]) < 2 * torch.finfo(dtype).eps * 4


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("p", [2, 4])
@given(seed=st.integers(0, 2**20))
def test_queries_orthogonal_up_to_rounding_stay_bounded(form: str, p: int, seed: int) -> None:
    """No form may divide one rounding error by another and return something far outside the values' range."""
    rng = torch.Generator().manual_seed(seed)
    problem = random_problem(seed, tokens=12, d=6, p=p)
    basis = torch.linalg.qr(torch.randn(6, 6, generator=rng, dtype=torch.float64))[0]
    keys = torch.randn(1, 12, 1, 3, generator=rng, dtype=torch.float64) @ basis[:3]
    queries = torch.randn(1, 12, 1, 3, generator=rng, dtype=torch.float64) @ basis[3:]
    results = outputs_and_gradients(
        lambda x: (run_form(form, x),), problem._replace(q=queries, k=keys).cast(torch.float32)
    )
    assert finite(results)
    assert results["y"].abs().max() < 4 * problem.v.abs().max()


@pytest.mark.parametrize("form", FORMS)
@given(exponents=st.lists(st.integers(-130, 110), min_size=6, max_size=6), seed=st.integers(0, 2**20))
def test_length_of_a_query_does_not_matter(form: str, exponents: list[int], seed: int) -> None:
    """Powers of two only move the exponent: the outputs are bit-equal, down to float32's smallest normal numbers."""
    problem = random_problem(seed, tokens=6, heads=2, d=4).cast(torch.float32)
    factors = torch.tensor(exponents, dtype=torch.float64).clamp(-120).exp2().float()[None, :, None, None]
    assert torch.equal(run_form(form, problem._replace(q=problem.q * factors)), run_form(form, problem))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_denormal_queries(form: str, dtype: torch.dtype) -> None:
    problem = random_problem(tokens=6, d=4).cast(dtype)
    tiny = problem._replace(q=(problem.q.double() * 2.0**-134).to(dtype))
    assert 0 < tiny.q.abs().max() < torch.finfo(dtype).tiny
    exact = run_recurrence(tiny)[0]
    assert relative_error(run_form(form, tiny), exact) < 0.01


@pytest.mark.parametrize(("p", "exponent"), [(2, 40), (2, -40), (4, 20), (4, -20)])
@pytest.mark.parametrize("form", FORMS)
def test_common_length_of_keys_does_not_matter(form: str, p: int, exponent: int) -> None:
    problem = random_problem(tokens=9, heads=2, d=4, p=p).cast(torch.float32)
    scaled = problem._replace(k=problem.k * 2.0**exponent)
    expected = outputs_and_gradients(lambda x: (run_form(form, x),), problem)
    got = outputs_and_gradients(lambda x: (run_form(form, x),), scaled)
    got["gradient of k"] *= 2.0**exponent
    assert_same(got, expected, tolerance=1e-5)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("size", [1e-16, 1e-18, 1e-20, 1e-23, 1e-30, 1e-36])
def test_underflowing_keys_give_finite_results(form: str, size: float) -> None:
    problem = random_problem(tokens=9, heads=2, d=4).cast(torch.float32)
    results = outputs_and_gradients(lambda x: (run_form(form, x),), problem._replace(k=problem.k * size))
    assert results["y"].isfinite().all()
    assert results["y"].abs().max() <= 1.01 * problem.v.abs().max()
    assert not results["gradient of q"].isnan().any()
    assert not results["gradient of k"].isnan().any()


@pytest.mark.parametrize("size", [1e-30, 1e-10, 1e10, 1e17])
def test_attention_form_takes_keys_of_any_size(size: float) -> None:
    problem = random_problem(tokens=9, heads=2, d=4, p=8).cast(torch.float32)
    y = power_retention(*problem._replace(k=problem.k * size)[:4], p=8, chunk_size=0)
    assert relative_error(y, power_retention(*problem[:4], p=8, chunk_size=0)) < 1e-5


@pytest.mark.parametrize("p", [2, 4, 6, 8])
def test_gradients_of_gaussian_inputs_are_finite(p: int) -> None:
    """Early queries are often nearly orthogonal to the few keys there are: weights near 0, inverses near overflow."""
    rng = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(200, 3, 2, 32, generator=rng) for _ in range(3))
    problem = Problem(q, k, v, None, p, None)
    for chunk_size in (0, 2) if p == 2 else (0,):
        results = outputs_and_gradients(lambda x, c=chunk_size: (power_retention(*x[:4], p=p, chunk_size=c),), problem)
        assert finite(results)
        assert results["y"].abs().max() <= 1.01 * v.abs().max()


@pytest.mark.parametrize("gate", [-80.0, -800.0, -1e4, -torch.inf])
@pytest.mark.parametrize("form", FORMS)
def test_gates_that_forget_everything(form: str, gate: float) -> None:
    """With every gate shut each token sees itself only."""
    problem = random_problem(tokens=9, heads=2, groups=2, d=4)
    problem.log_g[:] = gate
    results = outputs_and_gradients(lambda x: (run_form(form, x),), problem)
    assert finite(results)
    assert relative_error(results["y"], problem.v.repeat_interleave(2, dim=2)) < 1e-12
    assert results["gradient of log_g"].abs().max() < 1e-12


@given(st.data(), st.integers(0, 2**20), st.integers(1, 14))
def test_hard_and_soft_gates_together(data: st.DataObject, seed: int, chunk_size: int) -> None:
    """Any mix of gates, −∞ among them, against the recurrence; an entering state included."""
    problem = random_problem(seed, tokens=12, heads=1, d=3, states=1)
    values = st.sampled_from([0.0, -1e-6, -0.1, -3.0, -80.0, -700.0, -5000.0, -torch.inf])
    problem.log_g[0, :, 0] = torch.tensor(data.draw(st.lists(values, min_size=12, max_size=12)), dtype=torch.float64)
    got = outputs_and_gradients(lambda x: run_operator(x, chunk_size=chunk_size), problem)
    expected = outputs_and_gradients(run_recurrence, problem)
    infinite = problem.log_g.isneginf()
    expected["gradient of log_g"][infinite] = 0  # the recurrence differentiates exp(−∞) as 0 · ∞ at places
    assert_same(got, expected)


@pytest.mark.parametrize("hard", [-50.0, -500.0, -torch.inf])
@pytest.mark.parametrize("chunk_size", [0, 512])
def test_a_hard_gate_costs_the_mild_ones_no_digits(hard: float, chunk_size: int) -> None:
    """Cumulative sums over a long chunk: after −500 every few tokens, −0.001 still counts in full."""
    problem = random_problem(tokens=512, d=4)
    problem.log_g[:] = -1e-3
    problem.log_g[:, 7::50] = hard
    problem = problem.cast(torch.float32)._replace(log_g=problem.log_g.float())
    got = outputs_and_gradients(lambda x: (power_retention(*x[:4], chunk_size=chunk_size),), problem)
    expected = outputs_and_gradients(lambda x: run_recurrence(x)[:1], problem)
    assert_same(got, expected, tolerance=1e-5)


@pytest.mark.parametrize("chunk_size", [0, 64])
def test_gate_gradients_of_long_bfloat16_sequences(chunk_size: int) -> None:
    """A gate's gradient is a sum over all pairs around it; in bfloat16 it would lose every digit."""
    problem = random_problem(tokens=2048, d=8)
    problem = problem._replace(log_g=problem.log_g.clamp(min=-0.01).float()).cast(torch.bfloat16)
    got = outputs_and_gradients(lambda x: (power_retention(*x[:4], chunk_size=chunk_size),), problem)
    exact = outputs_and_gradients(
        lambda x: (power_retention(*x[:4], chunk_size=128).bfloat16(),), problem.cast(torch.float64)
    )
    assert got["gradient of log_g"].dtype == torch.float32
    assert relative_error(got["gradient of log_g"], exact["gradient of log_g"], floor=0) < 2e-3


@pytest.mark.parametrize("p", [2, 4])
def test_states_of_half_precision_inputs_do_not_overflow(p: int) -> None:
    problem = random_problem(tokens=40, d=4, p=p)
    problem = problem._replace(k=problem.k * 200, log_g=None).cast(torch.float16)
    y, memory, normalizer = run_operator(problem, chunk_size=8)
    exact = run_recurrence(problem)
    assert normalizer.max() > torch.finfo(torch.float16).max
    assert relative_error(normalizer, exact[2]) < 1e-6
    assert relative_error(memory, exact[1]) < 1e-6
    assert relative_error(y, exact[0]) < 1e-3


def test_padding_alone_does_not_touch_a_state() -> None:
    problem = random_problem(batch=2, tokens=5, heads=2, d=4, states=2)
    nothing = torch.zeros(2, 5, dtype=torch.bool)
    y, memory, normalizer = run_operator(problem, mask=nothing, chunk_size=2)
    assert not y.any()
    assert torch.equal(memory, problem.state.memory)
    assert torch.equal(normalizer, problem.state.normalizer)


PEAK_MEMORY = """
    import resource, torch
    from power_retention.ops import attention, power_retention

    def peak_megabytes(tokens, chunk_size):
        torch.manual_seed(0)
        q, k, v = (torch.randn(1, tokens, 1, 16, requires_grad=True) for _ in range(3))
        log_g = torch.full((1, tokens, 1), -0.01, requires_grad=True)
        y = power_retention(q, k, v, log_g, chunk_size=chunk_size)
        y.sum().backward()
        assert k.grad.isfinite().all()
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

    attention._BLOCK_ELEMENTS = 1 << 18  # of which a short sequence already has many
    torch.set_num_threads(1)
    base = peak_megabytes(64, {chunk_size})
    print(peak_megabytes({tokens}, {chunk_size}) - base)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak memory the way Linux reports it")
@pytest.mark.parametrize(("tokens", "chunk_size", "megabytes"), [(12_000, 64, 64), (4000, 0, 64)])
def test_memory_is_linear_in_the_number_of_tokens(tokens: int, chunk_size: int, megabytes: int) -> None:
    """Forward and backward: one T×T matrix of float32 would take 576 MB and 64 MB, and backward needs several."""
    script = textwrap.dedent(PEAK_MEMORY).format(tokens=tokens, chunk_size=chunk_size)
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert float(result.stdout) < megabytes
