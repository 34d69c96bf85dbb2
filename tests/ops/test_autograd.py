"""Derivatives by finite differences, and the custom operators' contract with autograd and torch.compile."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from problems import Problem, assert_same, outputs_and_gradients, random_problem, run_operator
from torch import Tensor

from power_retention.ops import PowerState, power_retention, power_retention_step

retain = torch.ops.power_retention.retain
retain_backward = torch.ops.power_retention.retain_backward
PACKED = torch.tensor([0, 2, 5])


def small_problem(p: int = 2, *, states: int = 1, tokens: int = 5) -> Problem:
    return random_problem(tokens=tokens, heads=1, groups=2, d=2, e=3, p=p, states=states)


def gradcheck(run: Callable[[Problem], object], problem: Problem) -> None:
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in problem.leaves().items()}

    def function(*tensors: Tensor) -> object:
        return run(problem.with_leaves(dict(zip(leaves, tensors, strict=True))))

    assert torch.autograd.gradcheck(function, tuple(leaves.values()))


@pytest.mark.parametrize("p", [2, 4])
@pytest.mark.parametrize("chunk_size", [2, 8])
def test_gradients_of_chunks(p: int, chunk_size: int) -> None:
    gradcheck(lambda x: run_operator(x, chunk_size=chunk_size), small_problem(p))


@pytest.mark.parametrize("p", [2, 6])
def test_gradients_of_attention(p: int) -> None:
    gradcheck(lambda x: power_retention(*x[:4], p=p, chunk_size=0), small_problem(p, states=0))


def test_gradients_of_packed_sequences() -> None:
    gradcheck(lambda x: run_operator(x, chunk_size=2, cu_seqlens=PACKED), small_problem(states=2))


def test_gradients_of_padded_sequences() -> None:
    mask = torch.tensor([[False, True, True, False, True]])
    gradcheck(lambda x: run_operator(x, chunk_size=2, mask=mask), small_problem())


@pytest.mark.parametrize("p", [2, 4])
def test_gradients_of_a_step(p: int) -> None:
    def step(x: Problem) -> tuple[Tensor, ...]:
        y, state = power_retention_step(*(t[:, 0] for t in x[:4]), x.state)
        return y, state.memory, state.normalizer

    gradcheck(step, small_problem(p, tokens=1))


def test_gradient_of_one_input_only() -> None:
    problem = small_problem()
    full = outputs_and_gradients(lambda x: run_operator(x, chunk_size=2)[:1], problem)
    for name, tensor in problem.leaves().items():
        leaf = tensor.clone().requires_grad_()
        y = run_operator(problem.with_leaves(problem.leaves() | {name: leaf}), chunk_size=2)[0]
        weight = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=y.dtype)
        (got,) = torch.autograd.grad(y, leaf, weight)
        assert torch.equal(got, full[f"gradient of {name}"])


def test_gradient_through_the_final_state_only() -> None:
    problem = small_problem()
    q = problem.q.clone().requires_grad_()
    k = problem.k.clone().requires_grad_()
    _, memory, normalizer = run_operator(problem._replace(q=q, k=k), chunk_size=2)
    (memory.sum() + normalizer.sum()).backward()
    assert not q.grad.any()
    assert k.grad.all()


def test_a_second_derivative_is_refused() -> None:
    problem = small_problem(states=0)
    q = problem.q.clone().requires_grad_()
    y = power_retention(q, *problem[1:4], chunk_size=2)
    (dq,) = torch.autograd.grad(y.sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        dq.sum().backward()


def calls() -> dict[str, tuple[object, ...]]:
    """Arguments of the custom operator: with and without gates, states, packing; as attention; odd memory layouts."""
    plain, stateful = small_problem(states=0), small_problem()
    packed, narrow = small_problem(states=2), random_problem(tokens=3, d=1, e=1, states=1)
    relaid = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in random_problem(batch=2, heads=2)[:4]]
    return {
        "plain": (*plain[:3], None, None, None, None, 2, 2, False),
        "attention": (*plain[:4], None, None, None, 4, 0, False),
        "state": (*stateful[:4], *stateful.state[:2], None, 2, 2, True),
        "packed": (*packed[:4], *packed.state[:2], PACKED, 2, 2, True),
        "width 1": (*narrow[:4], *narrow.state[:2], None, 2, 2, True),
        "transposed": (*relaid, None, None, None, 2, 4, True),
    }


@pytest.mark.parametrize("case", calls())
def test_custom_operators_keep_their_contract(case: str) -> None:
    """Schema, fake shapes and strides, no aliasing, autograd registration, tracing."""
    arguments = calls()[case]
    leaves = tuple(
        x.clone().requires_grad_() if isinstance(x, Tensor) and x.is_floating_point() else x for x in arguments
    )
    torch.library.opcheck(retain, leaves)
    *inputs, p, chunk_size, return_state = arguments
    y, memory, normalizer = retain(*arguments)
    grads = (y, memory, normalizer) if return_state else (y, None, None)
    torch.library.opcheck(retain_backward, (*grads, *inputs, p, chunk_size))


def compiled(run: Callable[[Problem], tuple[Tensor, ...]], backend: str) -> Callable[[Problem], tuple[Tensor, ...]]:
    def on_tensors(tensors: dict[str, Tensor], problem: Problem) -> tuple[Tensor, ...]:
        return run(problem.with_leaves(tensors))

    torch._dynamo.reset()
    function = torch.compile(on_tensors, fullgraph=True, backend=backend)
    return lambda x: function(x.leaves(), x)


@pytest.mark.parametrize("case", ["plain", "state", "packed", "padded"])
def test_compiled_equals_eager(case: str) -> None:
    options = {"packed": {"cu_seqlens": PACKED}, "padded": {"mask": torch.tensor([[False, True, True, True, True]])}}

    def run(x: Problem) -> tuple[Tensor, ...]:
        if x.state is None:
            return (power_retention(*x[:4], chunk_size=2) * 2,)
        y, *final = run_operator(x, **options.get(case, {}))
        return y * 2, *final

    problem = small_problem(states={"plain": 0, "packed": 2}.get(case, 1))
    assert_same(
        outputs_and_gradients(compiled(run, "aot_eager"), problem), outputs_and_gradients(run, problem), tolerance=1e-14
    )


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # inductor's own
def test_compiled_with_inductor() -> None:
    """The default compiler asserts at run time what the fake operators promised of shapes and strides."""
    problem = random_problem(batch=2, tokens=5, heads=2, d=3, e=2, states=2)
    relaid = problem._replace(q=problem.q.transpose(0, 1).contiguous().transpose(0, 1))
    assert_same(
        outputs_and_gradients(compiled(run_operator, "inductor"), relaid),
        outputs_and_gradients(run_operator, relaid),
        tolerance=1e-14,
    )


def test_compiled_for_any_length() -> None:
    """One graph serves sequences of every length."""
    torch._dynamo.reset()
    function = torch.compile(power_retention, fullgraph=True, backend="aot_eager")
    for tokens in (5, 6, 9):
        problem = random_problem(tokens=tokens, states=1)
        for tensor in problem[:4]:
            torch._dynamo.mark_dynamic(tensor, 1)
        with torch.compiler.set_stance("fail_on_recompile" if tokens > 5 else "default"):
            y, state = function(*problem[:4], initial_state=problem.state, return_state=True)
        expected_y, *expected = run_operator(problem)
        assert torch.allclose(y, expected_y)
        assert isinstance(state, PowerState)
        assert torch.allclose(state.memory, expected[0])


def test_compiled_step() -> None:
    torch._dynamo.reset()
    problem = small_problem(tokens=1)
    inputs = tuple(x[:, 0] for x in problem[:4])
    expected_y, expected = power_retention_step(*inputs, problem.state)
    y, state = torch.compile(power_retention_step, fullgraph=True, backend="aot_eager")(*inputs, problem.state)
    assert torch.allclose(y, expected_y)
    assert torch.allclose(state.memory, expected.memory)


def test_compiled_once_for_several_widths() -> None:
    """The second shape makes lengths, widths and head counts symbolic."""
    compiled = torch.compile(power_retention, fullgraph=True, backend="aot_eager")
    for tokens, query_heads, heads, width, p in ((40, 4, 2, 8, 2), (33, 6, 3, 16, 2), (20, 2, 2, 4, 4)):
        q, k, v = (torch.randn(1, tokens, h, width, requires_grad=True) for h in (query_heads, heads, heads))
        log_g = -torch.rand(1, tokens, heads)
        y, state = compiled(q, k, v, log_g, p=p, return_state=True)
        wanted, wanted_state = power_retention(q, k, v, log_g, p=p, return_state=True)
        torch.testing.assert_close((y, state.memory), (wanted, wanted_state.memory))
        got = torch.autograd.grad(y.sum() + state.memory.sum(), (q, k, v))
        expected = torch.autograd.grad(wanted.sum() + wanted_state.memory.sum(), (q, k, v))
        torch.testing.assert_close(got, expected)
