"""A backend joins behind the same call; which one runs is never a silent choice."""

from __future__ import annotations

import warnings

import pytest
import torch
from problems import assert_same, outputs_and_gradients, random_problem, run_operator
from torch import Tensor

from power_retention.errors import BackendError
from power_retention.ops import Call, backend_names, backends, power_retention, register_backend

TORCH = backends.TorchBackend()


class Recorder:
    """Computes like the backend in plain PyTorch and keeps what it was asked."""

    def __init__(self, name: str = "recorder", refusal: str | None = None) -> None:
        self.name, self.answer = name, refusal
        self.forwards: list[Call] = []
        self.backwards: list[Call] = []

    def refusal(self, call: Call) -> str | None:
        return self.answer

    def forward(self, call: Call) -> tuple[Tensor, Tensor, Tensor]:
        self.forwards.append(call)
        return TORCH.forward(call)

    def backward(self, call: Call, dy: Tensor, *d_state: Tensor | None) -> tuple[Tensor | None, ...]:
        self.backwards.append(call)
        return TORCH.backward(call, dy, *d_state)


@pytest.fixture(autouse=True)
def _registry_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "_BACKENDS", [TORCH])
    monkeypatch.setattr(backends, "_reported", set())
    monkeypatch.delenv("POWER_RETENTION_BACKEND", raising=False)
    monkeypatch.delenv("POWER_RETENTION_STRICT", raising=False)


def test_a_registered_backend_computes_the_same_call() -> None:
    problem = random_problem(tokens=6, heads=2, groups=2, states=1)
    expected = outputs_and_gradients(run_operator, problem)
    recorder = Recorder()
    register_backend(recorder)
    assert backend_names() == ["recorder", "torch"]
    assert_same(outputs_and_gradients(run_operator, problem), expected, tolerance=0)
    assert (len(recorder.forwards), len(recorder.backwards)) == (1, 1)


def test_what_a_backend_is_told() -> None:
    recorder = Recorder()
    register_backend(recorder)
    problem = random_problem(tokens=6, d=3, states=2)
    run_operator(problem, cu_seqlens=torch.tensor([0, 2, 6]), chunk_size=5)
    (call,) = recorder.forwards
    assert (call.p, call.chunk_size, call.return_state, call.runs) == (2, 5, True, 2)
    assert torch.equal(call.q, problem.q)
    assert torch.equal(call.memory, problem.state.memory)
    power_retention(*problem[:3])
    assert recorder.forwards[1].log_g is recorder.forwards[1].memory is recorder.forwards[1].cu_seqlens is None
    assert (recorder.forwards[1].return_state, recorder.forwards[1].runs) == (False, 1)


def test_order_of_preference() -> None:
    register_backend(Recorder("slow"), first=False)
    register_backend(Recorder("fast"))
    assert backend_names() == ["fast", "torch", "slow"]
    register_backend(Recorder("slow"))
    assert backend_names() == ["slow", "fast", "torch"]


def test_a_fallback_is_reported_once() -> None:
    register_backend(Recorder("fast", refusal="no accelerator"))
    problem = random_problem()
    with pytest.warns(RuntimeWarning, match=r"runs on the 'torch' backend \(fast: no accelerator\)"):
        power_retention(*problem[:4])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        power_retention(*problem[:4])


def test_no_report_when_the_first_choice_runs() -> None:
    register_backend(Recorder("slow", refusal="never asked"), first=False)
    power_retention(*random_problem()[:4])


def test_strict_mode_makes_a_fallback_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    register_backend(Recorder("fast", refusal="no accelerator"))
    monkeypatch.setenv("POWER_RETENTION_STRICT", "1")
    with pytest.raises(BackendError, match=r"fast: no accelerator.*POWER_RETENTION_STRICT"):
        power_retention(*random_problem()[:4])
    monkeypatch.setenv("POWER_RETENTION_BACKEND", "torch")
    power_retention(*random_problem()[:4])


def test_a_pinned_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    fast, slow = Recorder("fast"), Recorder("slow")
    register_backend(slow)
    register_backend(fast)
    monkeypatch.setenv("POWER_RETENTION_BACKEND", "slow")
    power_retention(*random_problem()[:4])
    assert (len(fast.forwards), len(slow.forwards)) == (0, 1)


def test_a_pinned_backend_that_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    register_backend(Recorder("fast", refusal="head width 4 is not a multiple of 16"))
    monkeypatch.setenv("POWER_RETENTION_BACKEND", "fast")
    with pytest.raises(BackendError, match=r"No backend can run this call \(fast: head width 4"):
        power_retention(*random_problem()[:4])


def test_a_pinned_backend_that_does_not_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POWER_RETENTION_BACKEND", "quick")
    with pytest.raises(BackendError, match="POWER_RETENTION_BACKEND='quick' names no backend; there are: torch"):
        power_retention(*random_problem()[:4])
