"""`evaluate --tasks`, its report, figure and card, and the harness's own command on our models."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_cli import Here, here, run  # noqa: F401 (a fixture)
from transformers import AutoModelForCausalLM

from power_retention_plugin import register_with_harness
from story_tasks import write_story_tasks

needs_harness = pytest.mark.usefixtures("harness")


@pytest.fixture
def harness() -> None:
    pytest.importorskip("lm_eval", reason="pip install power-retention[tasks]")


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory, stories_text: Path) -> Path:
    return write_story_tasks(tmp_path_factory.mktemp("tasks"), stories_text)


@pytest.fixture(scope="module")
def converted(stories_dir: Path, stories_text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A calibrated conversion, which speaks, if badly; without a key bias this small a model speaks no better than a swap."""
    folder = tmp_path_factory.mktemp("models") / "converted"
    done = run("convert", stories_dir, folder, "--text", stories_text, "--windows", "4", "--key-bias")
    assert done.code == 0, done.err
    return folder


@needs_harness
class TestBenchmarks:
    def test_report_figure_table_and_card(self, converted: Path, tasks: Path, tmp_path: Path, here: Here) -> None:  # noqa: F811
        options = ("--tasks", "story_cloze, story_word", "--task-folder", tasks, "--out", converted / "evaluation")
        report = here("evaluate", converted, *options, "--json").json
        cloze, word = report["tasks"]["story_cloze"], report["tasks"]["story_word"]
        assert (cloze["kind"], word["kind"], cloze["documents"]) == ("likelihood", "generation", 40)
        assert cloze["run_in"] == f"{'bfloat16 on cuda' if torch.cuda.is_available() else 'float32 on cpu'}"
        scores = {model: score["value"] for model, score in cloze["scores"].items()}
        assert list(scores) == ["teacher", "hard swap", "student"]
        assert scores["teacher"] > 0.8
        student = cloze["recovered"]["student"]
        assert student["value"] == pytest.approx((scores["student"] - 1 / 3) / (scores["teacher"] - 1 / 3))
        assert cloze["recovered"]["hard swap"]["value"] < student["value"] < 1
        assert 0 < student["error"] < 0.3

        figure = (converted / "evaluation" / "recovery.png").read_bytes()
        assert figure.startswith(b"\x89PNG")
        assert json.loads((converted / "evaluation" / "evaluation.json").read_text()) == report

        shown = here("evaluate", converted, *options, "--limit", "10", "--no-hard-swap").out
        assert "By likelihood" in shown
        assert "By generation" in shown
        assert "hard swap" not in shown

        made = here("card", converted, "--json").json
        row = next(line for line in Path(made["card"]).read_text().splitlines() if line.startswith("| story_cloze"))
        assert "| 0, by likelihood | 10 | 33.3% |" in row
        assert row.count("±") == 3

    def test_what_was_measured_before_stays(
        self,
        converted: Path,
        tasks: Path,
        stories_text: Path,
        tmp_path: Path,
        here: Here,  # noqa: F811
    ) -> None:
        model = Path(shutil.copytree(converted, tmp_path / "model"))
        ask = ("--task-folder", tasks, "--limit", "4", "--no-hard-swap", "--out", tmp_path / "report", "--json")
        here("evaluate", model, "--tasks", "story_cloze", *ask)
        here("evaluate", model, "--tasks", "story_word", *ask)
        text = ("--text", stories_text, "--windows", "1", "--length", "64", "--contexts", "", "--prompt", "")
        report = here("evaluate", model, *text, "--out", tmp_path / "report", "--json").json
        assert list(report["tasks"]) == ["story_cloze", "story_word"]
        assert report["losses"]

        other = AutoModelForCausalLM.from_pretrained(model)
        torch.nn.init.zeros_(other.model.norm.weight[:1])
        other.save_pretrained(model)
        report = here("evaluate", model, "--tasks", "story_cloze", *ask).json
        assert list(report["tasks"]) == ["story_cloze"], "of other weights"
        assert "losses" not in report

    def test_a_teacher_at_chance(self, converted: Path, tasks: Path, tmp_path: Path, here: Here) -> None:  # noqa: F811
        """One document tells nothing, and the report says so."""
        options = ("--tasks", "story_cloze", "--task-folder", tasks, "--limit", "1", "--out", tmp_path)
        shown = here("evaluate", converted, *options)
        assert "not clearly above chance" in " ".join(shown.out.split())
        assert json.loads((tmp_path / "evaluation.json").read_text())["tasks"]["story_cloze"]["recovered"] == {
            "hard swap": None,
            "student": None,
        }

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (("--tasks", "arcc"), "There is no benchmark or task named 'arcc'"),
            (("--tasks", "humaneval"), "humaneval executes the programs that the models write."),
            (
                ("--tasks", "arc", "--precision", "float8"),
                "--precision must be float32, bfloat16 or auto, not 'float8'.",
            ),
            (("--tasks", "arc", "--task-folder", "nowhere"), "nowhere is not a folder"),
        ],
    )
    def test_refusals(self, converted: Path, options: tuple[str, ...], message: str, here: Here) -> None:  # noqa: F811
        assert here.refusal("evaluate", converted, *options).startswith(message)


def test_without_the_harness(converted: Path, monkeypatch: pytest.MonkeyPatch, here: Here) -> None:  # noqa: F811
    for name in [name for name in sys.modules if name.startswith(("lm_eval", "power_retention.evaluation.harness"))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    message = here.refusal("evaluate", converted, "--tasks", "arc")
    assert message.startswith("Benchmarks need lm-evaluation-harness")
    assert "pip install 'power-retention[tasks]'" in message


OPEN = "from lm_eval.models.huggingface import HFLM; print(type(HFLM(pretrained={!r}, device='cpu').model).__name__)"


@needs_harness
class TestTheHarnessItself:
    """Installed beside power_retention, it knows our models: nothing of ours is imported by name in these processes."""

    def test_its_command(self, converted: Path, tasks: Path, tmp_path: Path, here: Here) -> None:  # noqa: F811
        options = ("--tasks", "story_cloze", "--limit", "12", "--batch_size", "5", "--device", "cpu")
        done = subprocess.run(
            [
                *(Path(sys.executable).with_name("lm_eval"), "run", "--model", "hf"),
                *("--model_args", f"pretrained={converted}", "--include_path", tasks, "--output_path", tmp_path),
                *options,
            ],
            capture_output=True,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
            check=False,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr
        (written,) = tmp_path.glob("**/results_*.json")
        theirs = json.loads(written.read_text())["results"]["story_cloze"]
        ours = here(
            "evaluate",
            converted,
            "--tasks",
            "story_cloze",
            "--task-folder",
            tasks,
            "--limit",
            "12",
            "--precision",
            "float32",
            "--json",
        ).json["tasks"]["story_cloze"]["scores"]["student"]
        assert theirs["acc_norm,none"] == pytest.approx(ours["value"])
        assert theirs["acc_norm_stderr,none"] == pytest.approx(ours["error"])

    @pytest.mark.parametrize("first", ["", "import torch; "])
    def test_from_python(self, converted: Path, first: str) -> None:
        assert self.python(first + OPEN.format(str(converted))) == "PowerRetentionForCausalLM"

    def test_not_where_plugins_are_switched_off(self, converted: Path) -> None:
        answer = self.python(OPEN.format(str(converted)), TORCH_DEVICE_BACKEND_AUTOLOAD="0")
        assert "does not recognize this architecture" in answer

    def test_other_programs_import_nothing_of_ours_but_the_note(self) -> None:
        program = (
            "import torch, transformers, sys; print(sorted(m for m in sys.modules if m.startswith('power_retention')))"
        )
        assert self.python(program) == "['power_retention_plugin']"

    @staticmethod
    def python(program: str, **environment: str) -> str:
        done = subprocess.run(
            [sys.executable, "-c", program],
            capture_output=True,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
            check=False,
            timeout=120,
        )
        return (done.stdout if done.returncode == 0 else done.stderr).strip()


def test_the_note_is_left_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "meta_path", [f for f in sys.meta_path if type(f).__name__ != "_RegisterOnImport"])
    before = len(sys.meta_path)
    register_with_harness()
    register_with_harness()
    assert len(sys.meta_path) == before + 1
