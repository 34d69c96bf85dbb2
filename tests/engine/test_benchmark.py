"""The benchmark of the engine, tiny and on the CPU: what it says is true of what ran."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "engine.py"


def test_named_and_given_contexts_are_timed_and_the_house_is_full(tmp_path: Path) -> None:
    parts = ("states in bfloat16", "transformer")
    command = [sys.executable, str(BENCHMARK), str(tmp_path / "report.json"), "--shape", "tiny", "--minutes", "8"]
    subprocess.run([*command, "--parts", *parts], check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    report = json.loads((tmp_path / "report.json").read_text())
    states, transformer = (report["parts"][name] for name in parts)
    assert [part["ended"] for part in (states, transformer)] == ["exit status 0"] * 2
    assert states["rows"][0]["context"] == 1 << 20
    assert states["capacity"]["users foretold"] == states["capacity"]["users measured"]
    assert transformer["capacity"]["tokens foretold"] == transformer["capacity"]["tokens measured"]
    (house,) = (row for row in transformer["rows"] if "house" in row)
    assert house["served at once"] == house["tokens in a step"] == transformer["capacity"]["users"] == 4
    assert house["thrown out"] == 0
    for part in (states, transformer):
        assert not any("error" in row for row in part["rows"])
        for row in part["rows"]:
            if "batch" in row:
                assert row["slowest ms"] >= row["ms a step"] > 0
                assert abs(row["tokens/s"] * row["ms a step"] - 1000 * row["batch"]) < 1
