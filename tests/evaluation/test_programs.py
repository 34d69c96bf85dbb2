"""Programs of models are run, and have passed only if their tests were reached and held."""

from __future__ import annotations

import pytest

from power_retention.evaluation import programs

PROBLEM = {
    "prompt": "def double(x):\n",
    "test": "def check(candidate):\n    assert candidate(2) == 4\n",
    "entry_point": "double",
    "test_list": ["assert double(2) == 4", "assert double(0) == 0"],
}


@pytest.mark.parametrize(
    ("body", "score"),
    [
        ("    return 2 * x", 1.0),
        ("    return x", 0.0),
        ("    return 2 *", 0.0),
        ("    import sys; sys.exit(0)", 0.0),
        ("    import os; os._exit(0)", 0.0),
        ("    return 2 * x\nx = '\0'", 0.0),
        ("    return 2 * x if [0] * (1 << 33) else 0", 0.0),  # 64 GB
    ],
)
def test_a_function_or_a_program(body: str, score: float) -> None:
    assert programs.humaneval(PROBLEM, [body]) == {"pass_at_1": score}
    assert programs.mbpp(PROBLEM, [PROBLEM["prompt"] + body]) == {"pass_at_1": score}


def test_one_that_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(programs, "SECONDS", 1)
    assert not programs.passes("while True: pass")
