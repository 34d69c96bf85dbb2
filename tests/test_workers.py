"""Work in processes that may die."""

from __future__ import annotations

import os
import time

from power_retention.workers import Failed, in_processes


def work(task: str) -> str:
    if task == "dies":
        os._exit(3)
    if task == "hangs":
        time.sleep(60)
    if task == "raises":
        raise ValueError("no such thing")
    return task.upper()


def test_a_task_that_fails_costs_one_result() -> None:
    found = dict(in_processes(work, ["a", "dies", "b", "raises", "c"], workers=1))
    assert {task: found[task] for task in "abc"} == {"a": "A", "b": "B", "c": "C"}
    assert isinstance(found["dies"], Failed)
    assert isinstance(found["raises"], Failed)
    assert "status 3" in found["dies"]
    assert "ValueError: no such thing" in found["raises"]


def test_a_task_that_hangs_is_given_up() -> None:
    ((_, result),) = in_processes(work, ["hangs"], workers=2, timeout=3)
    assert isinstance(result, Failed)
    assert "3 seconds" in result
