"""The benchmark measures what is right, says what is not, and draws what it measured."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from power_retention.evaluation.bench import measure as measuring
from power_retention.evaluation.bench.contenders import OURS, Contender, Inputs, contenders, draw_inputs, ours
from power_retention.evaluation.bench.figures import draw_figures
from power_retention.evaluation.bench.measure import count, gradient_errors, measure
from power_retention.evaluation.bench.report import crossover, speed_ups
from power_retention.evaluation.bench.settings import PASSES, TOLERANCES, Settings
from power_retention.evaluation.bench.stages import useful_operations, useful_pass
from power_retention.files import json_text
from power_retention.ops.triton.samples import HeadShape

CPU = torch.device("cpu")
SHAPE = HeadShape(4, 2, 16, 16)
QUICK = replace(Settings.usual(CPU, quick=True), lengths=(40, 160), longest_backward=40, stages_at=40, seconds=0.0)


def last(settings: Settings, **options: Any) -> dict[str, Any]:
    *_, report = measure(settings, CPU, **options)
    return report


@pytest.fixture(scope="module")
def report() -> dict[str, Any]:
    notes: list[str] = []
    found = last(QUICK, progress=notes.append)
    assert len(notes) == count(QUICK, CPU)
    return json.loads(json_text(found))


def test_everything_that_runs_here_is_right(report: dict[str, Any]) -> None:
    assert {check["verdict"] for check in report["checks"]} == {"right"}
    assert {check["contender"] for check in report["checks"]} == {c.name for c in contenders(CPU)[0]}
    assert set(report["absent"]) == {"retention", "flash-linear-attention"}


def test_every_length_and_pass_is_timed(report: dict[str, Any]) -> None:
    timed = {(row["contender"], row["pass"], row["tokens"]) for row in report["times"]}
    names = {c.name for c in contenders(CPU)[0]}
    assert timed == {(n, PASSES[0], t) for n in names for t in (40, 160)} | {(n, PASSES[1], 40) for n in names}
    for row in report["times"]:
        assert 0 < row["ms"]["p10"] <= row["ms"]["median"] <= row["ms"]["p90"]
        assert row["sampled_error"] < 1e-4
    assert {row["contender"] for row in report["decode"]} == {OURS, "PyTorch attention"}
    assert all(row["verdict"] == "right" for row in report["decode"])
    assert {row["stage"] for row in report["stages"]} == {"whole pass"}


def test_the_figures_are_drawn_and_drawn_again(report: dict[str, Any], tmp_path: Path) -> None:
    for _ in range(2):
        drawn = draw_figures(report, tmp_path, "x")
        assert [path.name for path in drawn] == ["x-time.png", "x-ceiling.png", "x-decode.png"]
        assert all(path.read_bytes().startswith(b"\x89PNG") for path in drawn)
        assert {path.name for path in tmp_path.iterdir()} == {path.name for path in drawn}


def wrong_output(inputs: Inputs) -> Tensor:
    return ours(inputs) * 1.01


def wrong_gradient(inputs: Inputs) -> Tensor:
    return ours(inputs._replace(k=inputs.k + 0.05 * (inputs.k - inputs.k.detach())))


def wrong_late(inputs: Inputs) -> Tensor:
    """Right at the checked length, wrong past it."""
    y = ours(inputs)
    return y if y.shape[1] <= QUICK.checked else torch.cat((y[:, :-1], y[:, -1:] * 2), 1)


def broken(inputs: Inputs) -> Tensor:
    raise RuntimeError("no kernel image is available\nand more")


@pytest.mark.parametrize("call", [wrong_output, wrong_gradient])
def test_what_is_wrong_is_not_timed(monkeypatch: pytest.MonkeyPatch, call: Any) -> None:
    planted = [Contender(OURS, True, call), *contenders(CPU)[0][-1:]]
    monkeypatch.setattr(measuring, "contenders", lambda device: (planted, {}))
    report = last(replace(QUICK, contexts=()))
    assert [check["verdict"] for check in report["checks"]] == ["wrong", "right"]
    assert {row["contender"] for row in report["times"]} == {"PyTorch attention"}
    assert {row["ratio"] for row in speed_ups(report)} == {None}
    assert report["stages"] == []


def test_what_turns_wrong_with_length_gets_no_speed_up(monkeypatch: pytest.MonkeyPatch) -> None:
    planted = [Contender(OURS, True, wrong_late), *contenders(CPU)[0][-1:]]
    monkeypatch.setattr(measuring, "contenders", lambda device: (planted, {}))
    report = last(replace(QUICK, lengths=(40, 260), longest_backward=0, contexts=(), stages_at=1000))
    ratios = {row["tokens"]: row["ratio"] for row in speed_ups(report)}
    assert ratios[40] is not None
    assert ratios[260] is None


def test_what_cannot_run_is_a_line_of_the_report(monkeypatch: pytest.MonkeyPatch) -> None:
    planted = [Contender("theirs", True, broken), *contenders(CPU)[0][:1]]
    monkeypatch.setattr(measuring, "contenders", lambda device: (planted, {}))
    report = last(replace(QUICK, lengths=(40,), contexts=(), stages_at=1000))
    assert report["checks"][0]["verdict"] == "failed"
    assert report["checks"][0]["why"] == "RuntimeError: no kernel image is available"
    assert {row["contender"] for row in report["times"]} == {OURS}


def test_a_contender_that_is_too_slow_leaves() -> None:
    report = last(replace(QUICK, patience=1e-6, contexts=(), stages_at=1000))
    assert {row["tokens"] for row in report["times"]} == {40}


def test_errors_are_of_outputs_and_all_gradients() -> None:
    inputs = draw_inputs(SHAPE, 50, torch.bfloat16, CPU, grad=True)
    for contender in contenders(CPU)[0]:
        errors = gradient_errors(contender, inputs)
        assert set(errors) == {"y", "dq", "dk", "dv"} | ({"dlog_g"} if contender.power else set())
        assert max(errors.values()) < TOLERANCES[torch.bfloat16]


def a_report(ratios: dict[int, float]) -> dict[str, Any]:
    def row(name: str, tokens: int, ms: float) -> dict[str, Any]:
        spread = {"median": ms, "p10": ms, "p90": ms, "repeats": 3}
        where = {"shape": "s", "pass": PASSES[0], "tokens": tokens, "contender": name, "power": name == OURS}
        return {**where, "ms": spread, "sampled_error": 0.0}

    checks = [{"contender": name, "shape": "s", "verdict": "right"} for name in (OURS, "a")]
    times = [row(name, n, r if name == "a" else 1.0) for n, r in ratios.items() for name in (OURS, "a")]
    return {"dtype": "float32", "checks": checks, "times": times}


def test_the_crossover_lies_between_the_lengths_around_it() -> None:
    assert crossover(a_report({1024: 0.5, 4096: 2.0, 8192: 4.0}), "s", PASSES[0]) == pytest.approx(2048)
    assert crossover(a_report({1024: 1.5, 4096: 2.0}), "s", PASSES[0]) == 1024
    assert crossover(a_report({1024: 0.5, 4096: 0.9}), "s", PASSES[0]) is None
    # Only the last time it is passed counts.
    assert crossover(a_report({512: 2.0, 1024: 0.5, 4096: 2.0}), "s", PASSES[0]) == pytest.approx(2048)


def test_useful_arithmetic_of_a_pass_is_that_of_its_kernels() -> None:
    kernels = ("accumulate_kernel", "read_state_kernel", "read_kernel")
    forward = [useful_operations(name, SHAPE, 8192, False) for name in kernels]
    assert sum(forward) == pytest.approx(useful_pass(SHAPE, 8192, False))
    assert useful_operations("columns_kernel", SHAPE, 8192, True) is None
    more = (*kernels, "contract_state_kernel", "query_grad_kernel", "key_grad_kernel")
    both = [useful_operations(name, SHAPE, 8192, True) for name in more]
    assert sum(both) == pytest.approx(useful_pass(SHAPE, 8192, True))
