"""The benchmark of training's throughput, on tiny shapes: what it counts, what it keeps, when it refuses."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def run(out: Path, patch: pytest.MonkeyPatch) -> None:
    patch.syspath_prepend(str(BENCHMARKS))
    patch.setattr(sys, "argv", ["training_throughput.py", str(out), "--quick"])
    importlib.import_module("training_throughput").main()


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("throughput") / "results.json"
    with pytest.MonkeyPatch.context() as patch:
        run(out, patch)
    return out


def cells(out: Path) -> dict[str, Any]:
    return json.loads(out.read_text())["cells"]


def test_every_cell_is_measured_and_right(done: Path) -> None:
    rows = cells(done)
    assert len(rows) == 6
    for name, row in rows.items():
        assert row["right"], (name, row)
        assert row["milliseconds"]["steps"] >= 5
        assert row["milliseconds"]["p10"] <= row["milliseconds"]["median"] <= row["milliseconds"]["p90"]
        tokens = row["rows"] * row["length"]
        assert row["tokens_per_second"] == pytest.approx(1e3 * tokens / row["milliseconds"]["median"])
        assert row["of_peak"] == pytest.approx(row["tokens_per_second"] * row["flops_per_token"] / 989e12)
    assert [row["layers computed again"] for name, row in rows.items() if "128" in name] == [True] * 3
    with Image.open(done.with_suffix(".png")) as figure:
        assert figure.width > 1000


def test_operations_are_those_of_the_formulas(done: Path) -> None:
    rows = cells(done)
    # Embedding, and two layers: q, k, v, o of one key/value head for two query heads of 16; three matrices of the MLP; norms.
    transformer = 211 * 32 + 2 * (32 * (32 + 16 + 16 + 32) + 3 * 32 * 64 + 2 * 32) + 32
    ours = transformer + 2 * (32 + 1 + 16)  # a gate and its bias, a bias of the keys
    for length in (16, 128):
        attention = 2 * 2 * 2 * 16 * length
        mixer = min(attention, 2 * 2 * 136 * 17 * (2 + 1))
        assert rows[f"tiny {length} plain"]["flops_per_token"] == 6 * ours + 3 * mixer
        assert rows[f"tiny {length} transformer"]["flops_per_token"] == 6 * transformer + 3 * attention
        teacher = 2 * transformer + attention
        assert rows[f"tiny {length} distil"]["flops_per_token"] == 6 * ours + 3 * mixer + teacher


def test_a_stopped_run_keeps_its_cells_and_measures_the_others(
    done: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    held = json.loads(done.read_text())
    del held["cells"]["tiny 16 plain"]
    held["cells"]["tiny 128 transformer"]["right"] = False
    out = tmp_path / "results.json"
    out.write_text(json.dumps(held))
    run(out, monkeypatch)
    assert [line.split()[:3] for line in capsys.readouterr().out.splitlines() if " x " in line] == [
        ["tiny", "16", "plain"]
    ]
    rows = cells(out)
    assert rows["tiny 16 distil"] == held["cells"]["tiny 16 distil"]
    ratio = rows["tiny 16 plain"]["tokens_per_second"] / rows["tiny 16 transformer"]["tokens_per_second"]
    assert json.loads(out.read_text())["over the Transformer"] == pytest.approx({"tiny 16": ratio})


def test_another_machines_file_is_not_added_to(done: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "results.json"
    out.write_text(done.read_text().replace('"CPU"', '"NVIDIA H200"'))
    with pytest.raises(SystemExit, match="was measured on NVIDIA H200"):
        run(out, monkeypatch)
