"""Random problems for the operator, and how results are compared."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from hypothesis import strategies as st
from torch import Tensor

from power_retention.ops import PowerState, power_retention
from power_retention.ops.reference import recurrent_form


class Problem(NamedTuple):
    """One call: q ``[B, T, Hq, d]``, k ``[B, T, H, d]``, v ``[B, T, H, e]``, log_g ``[B, T, H]``; the state before."""

    q: Tensor
    k: Tensor
    v: Tensor
    log_g: Tensor | None
    p: int
    state: PowerState | None

    @property
    def tokens(self) -> int:
        return self.q.shape[1]

    def span(self, start: int, end: int, state: PowerState | None) -> Problem:
        q, k, v = (x[:, start:end] for x in self[:3])
        return Problem(q, k, v, None if self.log_g is None else self.log_g[:, start:end], self.p, state)

    def cast(self, dtype: torch.dtype) -> Problem:
        """q, k and v in another dtype; gates and state stay what they are."""
        return self._replace(q=self.q.to(dtype), k=self.k.to(dtype), v=self.v.to(dtype))

    def leaves(self) -> dict[str, Tensor]:
        """What gradients are taken of."""
        tensors = {"q": self.q, "k": self.k, "v": self.v, "log_g": self.log_g}
        if self.state is not None:
            tensors |= {"memory": self.state.memory, "normalizer": self.state.normalizer}
        return {name: tensor for name, tensor in tensors.items() if tensor is not None}

    def with_leaves(self, leaves: dict[str, Tensor]) -> Problem:
        state = self.state
        if state is not None:
            state = state._replace(memory=leaves["memory"], normalizer=leaves["normalizer"])
        return Problem(leaves["q"], leaves["k"], leaves["v"], leaves.get("log_g"), self.p, state)


def random_problem(
    seed: int = 0,
    *,
    batch: int = 1,
    tokens: int = 8,
    heads: int = 1,
    groups: int = 1,
    d: int = 4,
    e: int | None = None,
    p: int = 2,
    gated: bool = True,
    states: int = 0,
) -> Problem:
    """A float64 problem in which no query is near orthogonal to every key, so that rounding errors stay small.

    Entries of queries and keys are bounded away from 0 and share their signs up to one a token.

    Args:
        states: rows of the initial state; 0 for none.
    """
    rng = torch.Generator().manual_seed(seed)
    e = d if e is None else e
    signs = torch.randn(d, generator=rng, dtype=torch.float64).sign()

    def tokens_of(rows: int, count: int, heads: int) -> Tensor:
        size = torch.randn(rows, count, heads, d, generator=rng, dtype=torch.float64).abs() + 0.2
        return size * signs * torch.randn(rows, count, heads, 1, generator=rng, dtype=torch.float64).sign()

    def values_of(rows: int, count: int) -> Tensor:
        return torch.randn(rows, count, heads, e, generator=rng, dtype=torch.float64)

    def gates_of(rows: int, count: int) -> Tensor | None:
        steps = torch.randn(rows, count, heads, generator=rng, dtype=torch.float64)
        return torch.nn.functional.logsigmoid(3 * steps) if gated else None

    state = None
    if states:
        before = (tokens_of(states, 5, heads), tokens_of(states, 5, heads), values_of(states, 5), gates_of(states, 5))
        state = recurrent_form(*before, p=p)[1]
    q, k = tokens_of(batch, tokens, heads * groups), tokens_of(batch, tokens, heads)
    return Problem(q, k, values_of(batch, tokens), gates_of(batch, tokens), p, state)


@st.composite
def problems(draw: st.DrawFn, *, max_tokens: int = 12, batched: bool = True, with_state: bool | None = None) -> Problem:
    """Problems of any small shape, odd widths and e ≠ d among them."""
    batch = draw(st.integers(1, 2)) if batched else 1
    return random_problem(
        draw(st.integers(0, 2**20)),
        batch=batch,
        tokens=draw(st.integers(1, max_tokens)),
        heads=draw(st.integers(1, 2)),
        groups=draw(st.integers(1, 3)),
        d=draw(st.integers(1, 6)),
        e=draw(st.integers(1, 5)),
        p=draw(st.sampled_from([2, 4])),
        gated=draw(st.booleans()),
        states=batch * (draw(st.booleans()) if with_state is None else with_state),
    )


def chunk_sizes(max_tokens: int = 12) -> st.SearchStrategy[int | None]:
    """Chunk sizes shorter and longer than the sequence, or None to let the operator choose."""
    return st.none() | st.integers(1, max_tokens + 2)


def run_operator(problem: Problem, **options: object) -> tuple[Tensor, Tensor, Tensor]:
    """(y, final memory, final normalizer) of the operator."""
    y, state = power_retention(
        problem.q,
        problem.k,
        problem.v,
        problem.log_g,
        p=problem.p,
        initial_state=problem.state,
        return_state=True,
        **options,
    )
    return y, state.memory, state.normalizer


def run_recurrence(problem: Problem) -> tuple[Tensor, Tensor, Tensor]:
    """(y, final memory, final normalizer) of the float64 recurrence."""
    q, k, v, log_g, p, state = problem
    y, final = recurrent_form(q, k, v, log_g, p=p, initial_state=state)
    return y, final.memory, final.normalizer


def outputs_and_gradients(run: Callable[[Problem], Sequence[Tensor]], problem: Problem) -> dict[str, Tensor]:
    """Outputs of ``run`` and the gradients of a random functional of them, by name."""
    leaves = {name: tensor.detach().clone().requires_grad_() for name, tensor in problem.leaves().items()}
    outputs = run(problem.with_leaves(leaves))
    rng = torch.Generator().manual_seed(1)
    torch.autograd.backward(
        list(outputs), [torch.randn(out.shape, generator=rng, dtype=torch.float64).to(out.dtype) for out in outputs]
    )
    results = {
        name: out.detach() for name, out in zip(("y", "final memory", "final normalizer"), outputs, strict=False)
    }
    for name, leaf in leaves.items():
        results[f"gradient of {name}"] = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
    return results


def rms(x: Tensor) -> float:
    """Root mean square, in float64."""
    return float(x.double().square().mean().sqrt())


def relative_error(got: Tensor, want: Tensor, floor: float = 1e-2) -> float:
    """RMS of the difference over RMS of what is wanted, NaN counting as infinite."""
    assert got.shape == want.shape, f"{list(got.shape)} is not {list(want.shape)}"
    error = rms(got.double() - want.double()) / max(rms(want), floor)
    return error if error == error else float("inf")


def assert_same(got: dict[str, Tensor], want: dict[str, Tensor], tolerance: float = 1e-10) -> None:
    """Every result within ``tolerance`` of the one wanted; names all that are not."""
    assert got.keys() == want.keys()
    errors = {name: relative_error(got[name], want[name]) for name in want}
    wrong = {name: error for name, error in errors.items() if error > tolerance}
    assert not wrong, f"relative errors above {tolerance:g}: {wrong}"
