"""The cost model: fitted to what was measured, never choosing the slow form, and asked only once sizes are known."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from power_retention.ops import Call, backends, power_retention
from power_retention.ops.backends import TorchBackend
from power_retention.ops.cost import ATTENTION, CHUNKS, Costs, Measured, Work, fit_costs, regret
from power_retention.ops.triton.sizes import cheapest_chunk, workspace
from power_retention.ops.triton.tuned import costs_for

TRUTH = Costs(attention_fixed=0.1, attention=7.0, chunk_fixed=0.5, within=10.0, states=2.0, borders=1.5)
LENGTHS = (1024, 2048, 4096, 8192, 16384, 32768)


def work(tokens: int, **more: bool) -> Work:
    return Work(1, tokens, 40, 8, 128, 128, **more)


def measured(costs: Costs, noise: float = 0.0) -> list[Measured]:
    generator = torch.Generator().manual_seed(0)
    return [
        Measured(work(n), c, costs.milliseconds(work(n), c) * (1 + noise * float(torch.randn(1, generator=generator))))
        for n in LENGTHS
        for c in (ATTENTION, *CHUNKS)
        if c < n
    ]


def test_costs_are_found_again() -> None:
    found = fit_costs(measured(TRUTH)).to_dict()
    assert found == pytest.approx(TRUTH.to_dict(), rel=1e-6)


def test_noisy_measurements_still_choose_well() -> None:
    noisy = measured(TRUTH, noise=0.03)
    costs = fit_costs(noisy)
    assert min(costs.to_dict().values()) >= 0
    assert max(regret(costs, noisy).values()) < 1.1


def test_a_cost_that_nothing_shows_is_zero_and_not_negative() -> None:
    free = Costs(0.1, 7.0, 0.5, 10.0, 2.0, 0.0)
    assert min(fit_costs(measured(free, noise=0.02)).to_dict().values()) >= 0


@given(tokens=st.integers(1, 1 << 20), states=st.booleans())
def test_the_choice_is_nearly_the_cheapest_and_one_that_can_run(tokens: int, states: bool) -> None:
    wanted = work(tokens, to_state=states)
    chosen = TRUTH.best_chunk(wanted)
    assert chosen != ATTENTION or not states
    assert 0 <= chosen <= tokens
    possible = [c for c in CHUNKS if c < tokens] + ([] if states else [ATTENTION])
    assert all(TRUTH.milliseconds(wanted, chosen) <= 1.03 * TRUTH.milliseconds(wanted, c) for c in possible)


def test_short_inputs_take_attention_and_long_ones_chunks() -> None:
    assert TRUTH.best_chunk(work(256)) == ATTENTION
    assert all(TRUTH.best_chunk(work(n)) in CHUNKS for n in (8192, 65536, 1 << 20))


def test_dearer_borders_make_larger_chunks() -> None:
    chosen = [replace(TRUTH, borders=borders).best_chunk(work(65536)) for borders in (0.0, 1.0, 10.0, 100.0)]
    assert chosen == sorted(chosen)
    assert chosen[0] < chosen[-1]


def test_of_two_equal_chunks_the_larger_is_taken_for_its_memory() -> None:
    level = Costs(attention_fixed=1e6, attention=0.0, chunk_fixed=1.0, within=0.0, states=0.0, borders=0.0)
    assert level.best_chunk(work(65536)) == CHUNKS[-1]


def test_every_family_and_width_has_costs() -> None:
    for width in (8, 16, 64, 100, 128, 256):
        for backward in (False, True):
            costs = costs_for(width, backward, torch.device("cpu"))
            assert costs.best_chunk(work(128)) == ATTENTION
            assert costs.best_chunk(work(1 << 18)) in CHUNKS


def call(tokens: int, **more: bool) -> Call:
    q, k = torch.empty(1, tokens, 40, 128, device="meta"), torch.empty(1, tokens, 8, 128, device="meta")
    return Call(q, k, k, k[..., 0], None, None, None, 2, more.pop("chunk_size", 0), more.pop("return_state", False))


def test_a_call_on_a_device_chooses_by_its_shapes_alone() -> None:
    """On the meta device there are no values to look at."""
    assert cheapest_chunk(call(200), backward=False) == ATTENTION
    assert cheapest_chunk(call(1 << 17), backward=True) in CHUNKS
    assert cheapest_chunk(call(200, return_state=True), backward=False) in (*CHUNKS, 200)


class Chooser(TorchBackend):
    """Asks for other chunks forward than backward, and notes what it was given."""

    name = "chooser"

    def __init__(self) -> None:
        self.asked: list[bool] = []
        self.ran: list[int] = []

    def chunk_size(self, call: Call, *, backward: bool) -> int:
        self.asked.append(backward)
        return 4 if backward else 3

    def forward(self, call: Call):  # type: ignore[no-untyped-def]
        self.ran.append(call.chunk_size)
        return super().forward(call)

    def backward(self, call: Call, *gradients):  # type: ignore[no-untyped-def]
        self.ran.append(call.chunk_size)
        return super().backward(call, *gradients)


@pytest.fixture
def chooser(monkeypatch: pytest.MonkeyPatch) -> Chooser:
    backend = Chooser()
    monkeypatch.setattr(backends, "_BACKENDS", [backend])
    return backend


def test_a_backend_chooses_for_each_pass_and_the_answer_stays(chooser: Chooser) -> None:
    leaves = [torch.randn(1, 10, 2, 8, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    y = power_retention(*leaves)
    got = torch.autograd.grad(y.square().sum(), leaves)
    assert (chooser.asked, chooser.ran) == ([False, True], [3, 4])
    wanted = torch.autograd.grad(power_retention(*leaves, chunk_size=0).square().sum(), leaves)
    assert all(torch.allclose(a, b, rtol=1e-10) for a, b in zip(got, wanted, strict=True))


def test_an_explicit_chunk_size_is_nobody_elses_choice(chooser: Chooser) -> None:
    x = torch.randn(1, 10, 2, 8)
    power_retention(x, x, x, chunk_size=5)
    assert (chooser.asked, chooser.ran) == ([], [5])


def test_one_graph_serves_short_and_long_calls(chooser: Chooser) -> None:
    """The choice is made behind the graph, so that crossing from one form to another compiles nothing."""
    torch._dynamo.reset()
    compiled = torch.compile(power_retention, fullgraph=True, backend="aot_eager")
    for tokens in (6, 9, 2000):
        x = torch.randn(1, tokens, 2, 8)
        torch._dynamo.mark_dynamic(x, 1)
        with torch.compiler.set_stance("fail_on_recompile" if tokens > 6 else "default"):
            assert torch.allclose(compiled(x, x, x), power_retention(x, x, x), atol=1e-6)


def test_the_workspace_grows_where_chunks_are_small() -> None:
    few, many = (workspace(call(65536, chunk_size=c), backward=False) for c in (4096, 128))
    assert many["states at chunk borders"] == 32 * few["states at chunk borders"]
    assert "gradients of the states" in workspace(call(65536, chunk_size=128), backward=True)
    assert set(workspace(call(64), backward=False)) == {"cumulative gates"}
