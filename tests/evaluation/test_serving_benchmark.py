"""The benchmark of serving, in small: it measures what it says, refuses what is wrong, and reports what does not fit."""

from __future__ import annotations

import importlib.util
import json
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest
import torch


@pytest.fixture(scope="module")
def serving() -> ModuleType:
    path = Path(__file__).parents[2] / "benchmarks" / "serving.py"
    spec = importlib.util.spec_from_file_location("serving_benchmark", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look themselves up
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def settings(serving):
    return serving.Settings(("tiny",), (1, 3), (64, 256), torch.device("cpu"), torch.float32, int(1e8), 4)


def test_everything_is_measured_after_it_was_found_right(serving, tmp_path):
    serving.main([str(tmp_path / "r.json"), "--figure", str(tmp_path / "r.png"), "--quick", "--memory-gb", "0.05"])
    rows = json.loads((tmp_path / "r.json").read_text())["rows"]
    kinds = {kind: [row for row in rows if row["kind"] == kind] for kind in ("check", "users", "step", "batcher")}
    assert [row["right"] for row in kinds["check"]] == [True] * 3
    assert {(row["who"], row["batch"], row["context"]) for row in kinds["step"] if row["ms"] > 0} == {
        (who, batch, context)
        for who in ("float32", "bfloat16", "Transformer")
        for batch in (1, 3)
        for context in (64, 256)
    }
    assert [row["batch"] for row in kinds["batcher"] if row["tokens_per_second"] > 0] == [1, 3]
    for row in kinds["users"]:
        assert row["measured"] == pytest.approx(row["predicted"], rel=0.25), row
    assert (tmp_path / "r.png").read_bytes().startswith(b"\x89PNG")


def test_another_context_is_told_apart(serving, settings):
    """What judges the model is not blind to its memory."""
    model = serving.build(serving.our_config(serving.SHAPES["tiny"]), settings)
    report = serving.Report(time.monotonic() + 100)
    for mixer in model.mixers:
        mixer.o_proj.weight.zero_()  # nothing that was read counts any more
    assert not serving.check_ours(report, "tiny", model, "float32")


def test_a_cache_of_something_else_is_seen(serving, settings, monkeypatch):
    model = serving.build(serving.SHAPES["tiny"], settings)
    monkeypatch.setattr(serving.KeptLayer, "update", lambda layer, *_: (layer.keys, layer.values))
    assert not serving.check_parent(serving.Report(time.monotonic() + 100), "tiny", model, None)


def test_what_does_not_fit_is_a_result(serving, settings):
    from dataclasses import replace

    small = replace(settings, memory=400_000)
    model = serving.build(serving.our_config(serving.SHAPES["tiny"]), settings)
    report = serving.Report(time.monotonic() + 100)
    serving.time_ours(report, "tiny", model, "float32", small)
    serving.time_batcher(report, "tiny", model, small)
    assert [(row["kind"], row["batch"], row.get("refused")) for row in report.rows] == [
        ("step", 1, None),
        ("step", 1, None),
        ("step", 3, "does not fit"),
        ("step", 3, "does not fit"),
        ("batcher", 1, None),
        ("batcher", 3, "does not fit"),
    ]


def test_what_there_is_no_time_for_is_said(serving, settings):
    report = serving.Report(time.monotonic() - 1)
    serving.time_parent(report, "tiny", None, [None], settings)
    assert [row["refused"] for row in report.rows] == ["not run: out of time"] * 4
