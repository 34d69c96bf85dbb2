"""The grid of the GPU check, a part of it run by Triton's interpreter: the same code, a few tokens."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from grid import WIDTHS, grid

HERE = Path(__file__).parent
NAMES = (
    "packed, with states, width 32",
    "forgets everything, width 32",
    "attention, p = 4, width 16",
    "17 tokens",
    "2 tokens",
)
PROGRAM = f"""
import sys
sys.path.insert(0, {str(HERE.parent / "ops")!r})
import interpreter, check
for name in sys.argv[1:]:
    outcome = check.check_grid(name, "cpu")
    print(name, outcome)
    assert outcome.verdict == "right"
"""


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
def test_the_grid_is_right_where_it_is_interpreted() -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([*sys.path, str(HERE)])}
    command = [sys.executable, "-W", "ignore", "-c", PROGRAM, *NAMES]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]


def test_the_grid_covers_every_width_and_kind() -> None:
    for small in (False, True):
        cases = grid(small=small)
        assert {case.p for case in cases.values()} == {2, 4, 6}
        assert {case.state for case in cases.values()} == {False, True}
        assert any(case.runs for case in cases.values())
        assert any(case.heads[0] > case.heads[1] for case in cases.values())
        assert any(case.strongest is None for case in cases.values())
    assert {case.widths[0] for case in grid().values()} > set(WIDTHS)
