"""The load test in a minute: vLLM's own server with the plugin, asked, hung up on, killed and started again."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import load_test
from load_clients import CLOSE


def test_users_who_come_go_and_vanish(tmp_path: Path) -> None:
    report, _ = load_test.load_test("vllm", 0.5, 0, tmp_path)
    assert report["faults"] == []
    assert report["worst log-probability difference"] < CLOSE
    did = report["counts"]
    assert all(did[what] for what in ("complete", "chat", "state", "refused", "hung up", "alone")), did
    assert did["states until the number is reached"] > 2
    assert did["states found again after SIGKILL"] > 0
