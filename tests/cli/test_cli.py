"""The command line as a user meets it: the whole path in real processes, and every refusal in one sentence."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from transformers import LlamaForCausalLM

from power_retention.cli import main
from power_retention.files import held_folder
from real_models import write_stories_gguf, write_stories_model
from tiny_models import randomise

COMMAND = Path(sys.executable).with_name("power-retention")
RECIPE = (
    "--seed",
    "3",
    "--steps",
    "30",
    "--batch",
    "2",
    "--length",
    "64",
    "--align-share",
    "0.5",
    "--precision",
    "float32",
)
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "80"}


@dataclass
class Result:
    code: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        return json.loads(self.out, parse_constant=pytest.fail)


class Here:
    """Runs commands in this process, which spares seconds of imports."""

    def __init__(self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
        self.capsys, self.monkeypatch = capsys, monkeypatch
        for name, value in {"COLUMNS": "80", "TQDM_DISABLE": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}.items():
            monkeypatch.setenv(name, value)

    def __call__(self, *arguments: str | Path) -> Result:
        self.monkeypatch.setattr(sys, "argv", ["power-retention", *map(str, arguments)])
        self.capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            main()
        code = caught.value.code
        return Result(0 if code is None else int(code), *self.capsys.readouterr())

    def refusal(self, *arguments: str | Path) -> str:
        """The one sentence that a command is refused with."""
        result = self(*arguments)
        assert (result.code, result.out) == (1, "")
        *progress, sentence = result.err.splitlines()
        assert sentence.startswith("error: "), result.err
        assert not [line for line in progress if not re.fullmatch(r"[^:]+: \d+/\d+.*", line)], result.err
        return sentence.removeprefix("error: ")


@pytest.fixture
def here(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Here:
    return Here(capsys, monkeypatch)


def run(*arguments: str | Path, stdin: str = "") -> Result:
    """A command in a process of its own."""
    done = subprocess.run(
        [COMMAND, *arguments], input=stdin, capture_output=True, text=True, env=ENVIRONMENT, check=False, timeout=120
    )
    return Result(done.returncode, done.stdout, done.stderr)


def interrupt_after(lines: int, metrics: Path, *arguments: str | Path) -> Result:
    """Start a command, and press Ctrl-C once so many steps are recorded."""
    with subprocess.Popen(
        [COMMAND, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT
    ) as process:
        deadline = time.monotonic() + 60
        while process.poll() is None and time.monotonic() < deadline:
            if metrics.exists() and metrics.read_text().count("\n") >= lines:
                process.send_signal(signal.SIGINT)
                break
            time.sleep(0.005)
        return Result(*reversed((*reversed(process.communicate(timeout=60)), process.returncode)))


@dataclass
class WholePath:
    """What the commands of the whole path answered, and where their outputs lie."""

    converted: Path
    retrained: Path
    convert: Result
    interrupted: Result
    resumed: Result
    evaluate: Result
    generate: Result


@pytest.fixture(scope="module")
def path(stories_dir: Path, stories_text: Path, tmp_path_factory: pytest.TempPathFactory) -> WholePath:
    """Convert → retrain, interrupted → retrain, resumed → evaluate → generate."""
    folder = tmp_path_factory.mktemp("whole path")
    converted, retrained = folder / "converted", folder / "retrained"
    text = ("--text", stories_text)
    convert = run("convert", stories_dir, converted, *text, "--windows", "4", "--json")
    metrics = retrained / "run" / "metrics.jsonl"
    interrupted = interrupt_after(2, metrics, "retrain", converted, retrained, *text, *RECIPE)
    assert (retrained / "run" / "checkpoints").exists(), interrupted
    assert not (retrained / "config.json").exists()
    resumed = run("retrain", converted, retrained, *text, "--resume", "--json")
    measure = ("--windows", "6", "--length", "128", "--contexts", "128,512", "--prompt", "Once upon a time", "--json")
    evaluate = run("evaluate", retrained, *text, *measure)
    generate = run("generate", retrained, "-", "--max-new-tokens", "24", "--json", stdin="Once upon a time, Tim")
    return WholePath(converted, retrained, convert, interrupted, resumed, evaluate, generate)


class TestTheWholePath:
    def test_convert(self, path: WholePath, stories_dir: Path) -> None:
        assert path.convert.code == 0, path.convert.err
        report = path.convert.json
        assert report["out"] == str(path.converted)
        assert report["source"]["location"] == str(stories_dir)
        assert len(report["layers"]) == 5
        assert all(layer["error_after"] < layer["error_before"] for layer in report["layers"])
        assert json.loads((path.converted / "conversion.json").read_text())["source"] == report["source"]

    @pytest.mark.parametrize(("flags", "has"), [((), False), (("--no-key-bias",), False), (("--key-bias",), True)])
    def test_a_key_bias_is_asked_for(
        self, stories_dir: Path, stories_text: Path, tmp_path: Path, here: Here, flags: tuple[str, ...], has: bool
    ) -> None:
        out = tmp_path / "converted"
        shown = here("convert", stories_dir, out, "--text", stories_text, "--windows", "1", *flags)
        assert ("key-bias fit" in " ".join(shown.out.split())) == has
        assert any(name.endswith("k_bias") for name in load_file(out / "model.safetensors")) == has

    def test_an_interrupt_is_no_accident(self, path: WholePath) -> None:
        assert path.interrupted.code == 75
        assert "Stopped after step" in path.interrupted.err
        assert "Run the same command with --resume to continue." in path.interrupted.err
        assert "Traceback" not in path.interrupted.err

    def test_resumed_it_equals_a_run_that_nothing_stopped(
        self, path: WholePath, stories_text: Path, tmp_path: Path, here: Here
    ) -> None:
        assert path.resumed.code == 0, path.resumed.err
        assert path.resumed.json["tokens"] == 30 * 2 * 64
        assert path.resumed.json["recipe"]["precision"] == "float32"
        straight = here("retrain", path.converted, tmp_path / "straight", "--text", stories_text, *RECIPE)
        assert straight.code == 0, straight.err
        assert "holds the retrained model (30 steps, 3,840 tokens)" in " ".join(straight.out.split())
        got, wanted = (load_file(f / "model.safetensors") for f in (path.retrained, tmp_path / "straight"))
        assert got.keys() == wanted.keys()
        assert all(value.equal(wanted[name]) for name, value in got.items())
        steps, other = ((f / "run" / "metrics.jsonl").read_text() for f in (path.retrained, tmp_path / "straight"))
        assert without_speed(steps) == without_speed(other)
        assert not (path.retrained / "run" / "checkpoints").exists()
        assert not [name for name in os.listdir(path.retrained) if name.startswith(".")]

    def test_evaluate(self, path: WholePath) -> None:
        assert path.evaluate.code == 0, path.evaluate.err
        report = path.evaluate.json
        folder = path.retrained / "evaluation"
        assert json.loads((folder / "evaluation.json").read_text()) == report
        assert (folder / "decode.png").read_bytes().startswith(b"\x89PNG")
        assert sorted(os.listdir(folder)) == ["decode.png", "evaluation.json"]
        losses = report["losses"]
        assert list(losses) == ["teacher", "hard swap", "calibrated", "retrained"]
        assert losses["teacher"]["recovered"] == 1
        assert losses["teacher"]["kl"] == 0
        assert losses["hard swap"]["recovered"] == 0
        assert losses["teacher"]["loss"] < losses["retrained"]["loss"] < losses["hard swap"]["loss"]
        assert 0.3 < losses["retrained"]["recovered"] < 1
        assert losses["retrained"]["kl"] < min(losses["calibrated"]["kl"], losses["hard swap"]["kl"])
        assert report["held_out"] == {"windows": 6, "length": 128}
        assert all(report["samples"][who] for who in ("teacher", "student"))

    def test_the_cost_of_a_context(self, path: WholePath) -> None:
        decode = path.evaluate.json["decode"]
        for points in decode.values():
            assert [point["context"] for point in points] == [128, 512]
            assert all(point["low"] <= point["milliseconds"] <= point["high"] for point in points)
            assert all(point["tokens_per_second"] > 10 and point["resident_gb"] > 0.05 for point in points)
        teacher, student = ([point["cache_mb"] for point in decode[name]] for name in ("teacher", "student"))
        assert teacher == pytest.approx([5 * 2 * 4 * 8 * 4 * context / 1e6 for context in (128, 512)], rel=0.2)
        a_head = 36 * 9 + 64 * (8 + 8 + 1) + 3  # the state, the ring of recent tokens and its cursor
        assert student[0] == student[1] == 5 * 4 * a_head * 4 / 1e6

    def test_generate(self, path: WholePath, here: Here) -> None:
        assert path.generate.code == 0, path.generate.err
        answer = path.generate.json
        assert answer["prompt"] == "Once upon a time, Tim"
        assert len(answer["text"]) > 30
        streamed = here("generate", path.retrained, "Once upon a time, Tim", "--max-new-tokens", "24")
        assert streamed.code == 0
        assert streamed.out == answer["prompt"] + answer["text"] + "\n"
        drawn = [
            here("generate", path.retrained, "Tim", "--temperature", "1", "--seed", seed, "--json").json["text"]
            for seed in ("1", "1", "2")
        ]
        assert drawn[0] == drawn[1] != drawn[2]

    def test_a_book_read_once(self, path: WholePath, tmp_path: Path, here: Here) -> None:
        """Read, saved, and gone on from in other processes: the text is that of one long prompt."""
        book, more = " ".join(["Once upon a time, Tim had a big red ball."] * 5), "One day, Tim"
        state = tmp_path / "book.state"
        read = run(
            "generate", path.retrained, "-", "--max-new-tokens", "0", "--save-state", state, "--json", stdin=book
        )
        assert read.code == 0, read.err
        assert read.json["text"] == ""
        seen = read.json["state"]["tokens_seen"]
        assert f"book.state has read {seen} tokens" in " ".join(read.err.split())
        greedy = ("--max-new-tokens", "16", "--repetition-penalty", "1", "--json")
        wanted = here("generate", path.retrained, f"{book} {more}", *greedy).json["text"]
        options = ("--state", state, "--save-state", tmp_path / "later.state", "--prefill-chunk-size", "2")
        answer = here("generate", path.retrained, more, *greedy, *options)
        assert answer.code == 0, answer.err
        assert "Reading: " in answer.err
        assert answer.json["text"].split() == wanted.split()
        assert answer.json["state"]["tokens_seen"] > seen + 16
        self.look_at_states(tmp_path, seen, here)

    def look_at_states(self, folder: Path, seen: int, here: Here) -> None:
        state = folder / "book.state"
        described = here("state", "inspect", state, "--verify", "--json").json
        assert (described["tokens_seen"], described["position"], described["p"]) == (seen, str(seen), 2)
        assert described["verified"]
        assert "tokens_seen" in here("state", "inspect", state).out
        forks = here("state", "fork", state, folder / "a.state", folder / "b.state", "--json").json
        assert [fork["forked_from"] for fork in forks] == [described["checksum"]] * 2
        assert "exists already; choose another name" in here.refusal("state", "fork", state, folder / "a.state")
        (folder / "notes.txt").write_text("no state")
        listed = here("state", "list", folder, "--json").json
        assert sorted(Path(one["file"]).name for one in listed) == ["a.state", "b.state", "book.state", "later.state"]
        assert "4 state files" in here("state", "list", folder).out
        assert "is not a folder" in here.refusal("state", "list", folder / "notes.txt")
        assert "is not a state file" in here.refusal("state", "inspect", folder / "notes.txt")

    def test_a_state_of_another_model(self, path: WholePath, tmp_path: Path, here: Here) -> None:
        options = ("--max-new-tokens", "0", "--save-state", tmp_path / "x.state")
        assert here("generate", path.converted, "Tim", *options).code == 0
        refused = here.refusal("generate", path.retrained, "Tim", "--state", tmp_path / "x.state")
        assert "a state only means something to the model that made it" in refused
        assert "The prompt is empty" in here.refusal(
            "generate", path.converted, "", *options, "--state", tmp_path / "x.state"
        )

    def test_a_report_for_people(self, path: WholePath, stories_text: Path, tmp_path: Path, here: Here) -> None:
        options = ("--windows", "1", "--length", "64", "--contexts", "", "--prompt", "", "--out", tmp_path)
        result = here("evaluate", path.converted, "--text", stories_text, *options)
        assert result.code == 0, result.err
        for words in ("Held-out loss, nats a token", "teacher", "hard swap", "calibrated", "100%", "0%"):
            assert words in result.out
        assert "retrained" not in result.out
        json.loads((tmp_path / "evaluation.json").read_text(), parse_constant=pytest.fail)
        assert os.listdir(tmp_path) == ["evaluation.json"]

    def test_minutes_decide_how_many_steps(
        self, path: WholePath, stories_text: Path, tmp_path: Path, here: Here
    ) -> None:
        """Two steps is the least; the precision chosen is written down."""
        options = ("--minutes", "0.0001", "--batch", "1", "--length", "32", "--json")
        result = here("retrain", path.converted, tmp_path / "out", "--text", stories_text, *options)
        assert result.code == 0, result.err
        assert (result.json["recipe"]["steps"], result.json["tokens"]) == (2, 64)
        assert result.json["recipe"]["precision"] in ("float32", "bfloat16")

    def test_a_run_that_is_done_or_begun_is_not_overwritten(
        self, path: WholePath, stories_text: Path, tmp_path: Path, here: Here
    ) -> None:
        text = ("--text", stories_text)
        for more in ((), ("--resume",)):
            message = here.refusal("retrain", path.converted, path.retrained, *text, *more)
            assert message == f"{path.retrained} holds a finished retraining; choose another folder."
        (tmp_path / "run").mkdir()
        shutil.copy(path.retrained / "run" / "run.json", tmp_path / "run")
        assert "holds an unfinished run; continue it with --resume" in here.refusal(
            "retrain", path.converted, tmp_path, *text
        )
        other = tmp_path / "other.txt"
        other.write_text("Another text. " * 200)
        assert "resume it with the same" in here.refusal(
            "retrain", path.converted, tmp_path, "--text", other, "--resume"
        )

    def test_text_that_changed_is_not_resumed_on(
        self, path: WholePath, stories_text: Path, tmp_path: Path, here: Here
    ) -> None:
        text = Path(shutil.copy(stories_text, tmp_path / "own.jsonl"))
        arguments = ("retrain", path.converted, tmp_path / "out", "--text", text)
        assert here(*arguments, *RECIPE).code == 0
        (tmp_path / "out" / "config.json").unlink()  # as if it had not been finished
        lines = text.read_text().splitlines()
        text.write_text("\n".join(lines[:-20]))
        message = here.refusal(*arguments, "--resume")
        assert message == f"The text ({text}) is not what it was when the run began: put it back, or start a new run."
        settings = tmp_path / "out" / "run" / "run.json"
        noted = json.loads(settings.read_text())
        del noted["inputs"]["text of fingerprint"]  # as begun by an earlier version
        settings.write_text(json.dumps(noted))
        assert here(*arguments, "--resume").code == 0

    def test_sequences_beyond_the_teachers_window(
        self, path: WholePath, stories_text: Path, tmp_path: Path, here: Here
    ) -> None:
        options = ("--steps", "1", "--batch", "1", "--length", "600", "--align-share", "0")
        result = here("retrain", path.converted, tmp_path / "out", "--text", stories_text, *options)
        assert "the teacher was made for 512 tokens, and a sequence has 600" in " ".join(result.err.split())

    def test_two_runs_in_one_folder(self, path: WholePath, stories_text: Path, tmp_path: Path, here: Here) -> None:
        arguments = ("retrain", path.converted, tmp_path, "--text", stories_text, "--resume")
        (tmp_path / "run").mkdir()
        shutil.copy(path.retrained / "run" / "run.json", tmp_path / "run")
        with held_folder(tmp_path / "run"):
            assert "is being written by another process" in here.refusal(*arguments)
        assert here(*arguments).code == 0

    def test_shards_of_the_text_are_not_measured_on(
        self, path: WholePath, stories_text: Path, tmp_path: Path, here: Here
    ) -> None:
        assert here("data", stories_text, "--tokenizer", path.converted, "--out", tmp_path / "shards").code == 0
        held_out = ("--held-out", f"own={tmp_path / 'shards'}")
        message = here.refusal("retrain", path.converted, tmp_path / "out", "--text", stories_text, *RECIPE, *held_out)
        assert message.startswith(f"The held-out shards 'own' were made of {stories_text.resolve()}")
        assert not (tmp_path / "out").exists()

    def test_held_out_text_is_measured_on_the_way(
        self, path: WholePath, stories_text: Path, tmp_path: Path, here: Here, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The text of the run itself, of which its held-out documents are taken, and text it knows nothing of."""
        letters = tmp_path / "letters.txt"
        letters.write_text("\n".join(chr(97 + i % 26) * (i % 7 + 1) for i in range(400)))
        out, text = tmp_path / "out", ("--text", stories_text)
        held_out = ("--held-out", f"own={stories_text}", "--held-out", f"letters={letters}", "--probe-length", "128")
        monkeypatch.setattr("power_retention.training.board.has_tensorboard", lambda: False)
        sentence = here.refusal("retrain", path.converted, out, *text, "--held-out", "letters")
        assert sentence == "Held-out text is given as NAME=PATH, such as code=text/code.jsonl, not 'letters'."
        result = here("retrain", path.converted, out, *text, *RECIPE, *held_out, "--probe-every", "1k")
        assert result.code == 0, result.err
        assert result.err.count("TensorBoard is not installed (pip install 'power-retention[watch]')") == 1
        assert "Held out, after 3,840 tokens" in result.out
        assert re.search(r"│ own +│.*→.*│", result.out)
        assert re.search(r"│ letters \* +│.*→.*│", result.out)
        probes = [json.loads(line) for line in (out / "run" / "held_out.jsonl").read_text().splitlines()]
        assert [probe["step"] for probe in probes] == [0, 8, 15, 16, 24, 30]
        assert {name: domain["kept_out"] for name, domain in probes[-1]["domains"].items()} == {
            "own": False,
            "letters": True,
        }
        assert probes[-1]["domains"]["own"]["kl"] < probes[0]["domains"]["own"]["kl"]
        noted = json.loads((out / "run" / "run.json").read_text())["inputs"]
        assert noted["held out"]["letters"]["path"] == str(letters)
        (tmp_path / "begun" / "run").mkdir(parents=True)
        shutil.copy(out / "run" / "run.json", tmp_path / "begun" / "run")
        letters.write_text("Another text. " * 200)
        message = here.refusal("retrain", path.converted, tmp_path / "begun", *text, "--resume")
        assert message.startswith(f"The held-out text 'letters' ({letters}) is not what it was when the run began")
        letters.write_text("\n".join(chr(97 + i % 26) * (i % 7 + 1) for i in range(400)))
        resumed = here("retrain", path.converted, tmp_path / "begun", *text, "--resume", "--json")
        assert resumed.code == 0, resumed.err
        assert resumed.json["held_out"]["domains"] == probes[-1]["domains"]

    def test_a_damaged_checkpoint(self, path: WholePath, stories_text: Path, tmp_path: Path, here: Here) -> None:
        (tmp_path / "run").mkdir()
        shutil.copy(path.retrained / "run" / "run.json", tmp_path / "run")
        checkpoint = tmp_path / "run" / "checkpoints" / "step-00000003"
        checkpoint.mkdir(parents=True)
        (checkpoint / "checkpoint.json").write_text('{"step": 3, "sha256": "0"}')
        (checkpoint / "tensors.safetensors").write_bytes(b"damaged")
        message = here.refusal("retrain", path.converted, tmp_path, "--text", stories_text, "--resume")
        assert message.startswith(f"The checkpoint {checkpoint} is damaged")
        assert f"Delete {checkpoint}" in message


def test_a_disk_too_full_for_the_result(
    path: WholePath, stories_text: Path, disk_of: Callable[[int], Path], here: Here
) -> None:
    """The run is told so in one sentence, no half model is left, and with more room it can be finished."""
    disk = disk_of(800)
    arguments = ("retrain", path.converted, disk / "out", "--text", stories_text, "--steps", "2", "--batch", "1")
    message = here.refusal(*arguments)
    assert message.startswith(f"Could not write {disk / 'out'}")
    assert "ree some space" in message
    assert os.listdir(disk / "out") == ["run"]
    subprocess.run(["mount", "-o", "remount,size=8m", disk], check=True)
    assert here(*arguments, "--resume").code == 0
    assert (disk / "out" / "config.json").exists()


def without_speed(metrics: str) -> list[dict[str, Any]]:
    times = ("tokens_per_second", "seconds", "device_seconds")
    return [{k: v for k, v in json.loads(line).items() if k not in times} for line in metrics.splitlines()]


@pytest.fixture
def converted(path: WholePath, tmp_path: Path) -> Path:
    """A converted model to damage."""
    return Path(shutil.copytree(path.converted, tmp_path / "converted"))


@pytest.fixture
def copied(stories_dir: Path, tmp_path: Path) -> Path:
    """A Transformer to damage."""
    return Path(shutil.copytree(stories_dir, tmp_path / "source"))


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1000])


class TestSources:
    def test_missing(self, tmp_path: Path, here: Here) -> None:
        message = here.refusal("convert", tmp_path / "nowhere", tmp_path / "out")
        assert message.startswith(f"{tmp_path / 'nowhere'} does not exist, and is not a hub id")
        assert os.listdir(tmp_path) == []

    def test_a_name_that_looks_like_markup(self, tmp_path: Path, here: Here) -> None:
        source = tmp_path / "[/bold][red]model"
        assert here.refusal("convert", source, tmp_path / "out").startswith(f"{source} does not exist")
        source.mkdir(parents=True)
        assert here.refusal("convert", source, tmp_path / "out").startswith(f"{source} has no config.json")

    def test_unsupported(self, copied: Path, tmp_path: Path, here: Here) -> None:
        config = json.loads((copied / "config.json").read_text())
        (copied / "config.json").write_text(json.dumps({**config, "model_type": "gpt2"}))
        message = here.refusal("convert", copied, tmp_path / "out")
        assert (
            "has model_type 'gpt2', which cannot be converted; supported: llama, mistral, qwen2, qwen3, qwen3_moe, "
            in message
        )

    def test_truncated_safetensors(self, copied: Path, tmp_path: Path, here: Here) -> None:
        truncate(copied / "model.safetensors")
        assert "model.safetensors is truncated or damaged" in here.refusal("convert", copied, tmp_path / "out")

    def test_truncated_gguf(self, tmp_path: Path, here: Here) -> None:
        source = write_stories_gguf(tmp_path / "stories.gguf")
        truncate(source)
        message = here.refusal("convert", source, tmp_path / "out")
        assert str(source) in message
        assert "truncated" in message

    def test_already_converted(self, converted: Path, tmp_path: Path, here: Here) -> None:
        assert "is already a power-retention model" in here.refusal("convert", converted, tmp_path / "out")

    @pytest.mark.parametrize("power", ["3", "0", "-2"])
    def test_an_odd_power(self, stories_dir: Path, tmp_path: Path, here: Here, power: str) -> None:
        message = here.refusal("convert", stories_dir, tmp_path / "out", "--power", power)
        assert f"p must be an even integer of at least 2 (weights are (q·k)^p), not {power}." in message

    def test_an_output_that_holds_something(self, stories_dir: Path, tmp_path: Path, here: Here) -> None:
        (tmp_path / "thesis").touch()
        message = here.refusal("convert", stories_dir, tmp_path)
        assert message == f"{tmp_path} already holds something; choose another folder, or empty it first."
        assert "is a file; the name of a new folder" in here.refusal("convert", stories_dir, tmp_path / "thesis")
        assert os.listdir(tmp_path) == ["thesis"]


class TestTexts:
    @pytest.mark.parametrize(
        ("name", "content", "message"),
        [
            ("empty.txt", b"", "No text was found in"),
            ("empty.jsonl", b"", "is empty"),
            ("latin.txt", "Café ".encode("latin-1") * 100, "not UTF-8"),
            ("broken.jsonl", b'{"text": "a"}\n{"text"', "not JSON"),
            ("fields.jsonl", b'{"content": "a"}', "text"),
            ("model.bin", b"text", "is not a text file"),
            ("missing.txt", None, "does not exist"),
        ],
    )
    def test_of_the_wrong_kind(
        self, stories_dir: Path, tmp_path: Path, here: Here, name: str, content: bytes | None, message: str
    ) -> None:
        if content is not None:
            (tmp_path / name).write_bytes(content)
        refusal = here.refusal("convert", stories_dir, tmp_path / "out", "--text", tmp_path / name)
        assert name in refusal
        assert message in refusal
        assert not (tmp_path / "out").exists()

    def test_none(self, path: WholePath, tmp_path: Path, here: Here) -> None:
        assert "retrain needs text to train on" in here.refusal("retrain", path.converted, tmp_path / "out")
        assert "evaluate needs the text" in here.refusal("evaluate", path.converted)

    def test_too_short(self, path: WholePath, tmp_path: Path, here: Here) -> None:
        """Nothing is begun, so the same command with more text succeeds."""
        (tmp_path / "short.txt").write_text("Once upon a time.")
        text = ("--text", tmp_path / "short.txt")
        for steps in (("--steps", "2"), ("--minutes", "0.01")):
            message = here.refusal("retrain", path.converted, tmp_path / "out", *text, *steps)
            assert "give more text or a shorter window" in message
            assert not (tmp_path / "out").exists()
        assert here.refusal("evaluate", path.converted, *text, "--contexts", "")


class TestOptions:
    @pytest.mark.parametrize("contexts", ["abc", "1024,abc", "0", "-5", "1e3"])
    def test_contexts(self, path: WholePath, stories_text: Path, here: Here, contexts: str) -> None:
        message = here.refusal("evaluate", path.converted, "--text", stories_text, f"--contexts={contexts}")
        assert message == f"--contexts must be positive numbers of tokens separated by commas, not '{contexts}'."

    @pytest.mark.parametrize(
        ("option", "message"),
        [
            (("--precision", "float8"), "--precision must be float32, bfloat16 or auto, not 'float8'."),
            (("--steps", "5", "--batch", "0"), "at least 1 step, 1 sequence and 2 tokens, not 5, 0 and 256"),
            (("--minutes", "nan"), "--minutes is nan; a finite number above 0 was expected: give one, or --steps."),
            (("--minutes", "inf"), "--minutes is inf; a finite number above 0 was expected: give one, or --steps."),
            (("--steps", "5", "--align-share", "2"), "align_share must lie in [0, 1], not 2.0"),
        ],
    )
    def test_recipes(
        self, path: WholePath, stories_text: Path, tmp_path: Path, here: Here, option: tuple[str, ...], message: str
    ) -> None:
        assert message in here.refusal("retrain", path.converted, tmp_path / "out", "--text", stories_text, *option)
        assert not (tmp_path / "out").exists()

    def test_no_step(self, path: WholePath, stories_text: Path, tmp_path: Path, here: Here) -> None:
        result = here("retrain", path.converted, tmp_path / "out", "--text", stories_text, "--steps", "0")
        assert result.code == 2
        assert "--steps" in result.err

    @pytest.mark.parametrize("command", ["convert", "retrain", "evaluate", "generate", "chat", "serve", "state", "env"])
    def test_help_shows_an_example(self, here: Here, command: str) -> None:
        result = here(command, "--help")
        assert result.code == 0
        assert f"power-retention {command} " in result.out.partition("Options")[0].partition("Example")[2]

    def test_help_names_the_commands(self, here: Here) -> None:
        result = here("--help")
        assert all(command in result.out for command in ("convert", "retrain", "evaluate", "generate", "state", "env"))
        assert here("--version").out == "0.1.0\n"


class TestModels:
    def test_missing(self, tmp_path: Path, stories_text: Path, here: Here) -> None:
        for command in (("generate", tmp_path, "x"), ("evaluate", tmp_path, "--text", stories_text)):
            assert here.refusal(*command).startswith(f"{tmp_path} holds no model (no config.json)")

    def test_a_transformer(self, stories_dir: Path, here: Here) -> None:
        assert "is not a power-retention model" in here.refusal("generate", stories_dir, "x")

    def test_truncated(self, converted: Path, here: Here) -> None:
        truncate(converted / "model.safetensors")
        assert here.refusal("generate", converted, "x").startswith(f"The model in {converted} cannot be loaded")

    def test_without_tokenizer(self, converted: Path, here: Here) -> None:
        for path in converted.glob("tokenizer*"):
            path.unlink()
        assert "holds no tokenizer that can be read" in here.refusal("generate", converted, "x")

    def test_without_chat_template(self, path: WholePath, here: Here) -> None:
        message = here.refusal("generate", path.converted, "x", "--chat")
        assert message == "This model has no chat template; generate without --chat."

    def test_a_damaged_note_of_the_conversion(self, converted: Path, stories_text: Path, here: Here) -> None:
        for content in ("{", "{}"):
            (converted / "conversion.json").write_text(content)
            message = here.refusal("evaluate", converted, "--text", stories_text, "--contexts", "")
            assert "conversion.json" in message

    def test_a_damaged_calibration(self, converted: Path, stories_text: Path, here: Here) -> None:
        truncate(converted / "calibration.safetensors")
        options = ("--text", stories_text, "--contexts", "", "--windows", "1", "--length", "32")
        assert "calibration.safetensors is not the calibration" in here.refusal("evaluate", converted, *options)

    def test_a_teacher_that_is_not_the_parent(
        self, path: WholePath, stories_text: Path, tmp_path: Path, here: Here
    ) -> None:
        stranger = write_stories_model(tmp_path / "stranger")
        randomise(LlamaForCausalLM.from_pretrained(stranger)).save_pretrained(stranger)
        for command in (("retrain", path.converted, tmp_path / "out"), ("evaluate", path.converted)):
            message = here.refusal(*command, "--text", stories_text, "--teacher", stranger)
            assert f"{stranger} is not the Transformer that {path.converted} was converted from" in message
        assert not (tmp_path / "out").exists()

    def test_a_teacher_that_is_gone(self, converted: Path, stories_text: Path, here: Here) -> None:
        note = json.loads((converted / "conversion.json").read_text())
        note["source"]["location"] = str(converted.parent / "gone")
        (converted / "conversion.json").write_text(json.dumps(note))
        assert "gone does not exist" in here.refusal("evaluate", converted, "--text", stories_text)


def test_the_environment_for_a_bug_report(here: Here) -> None:
    report = here("env", "--json").json
    assert {"power-retention", "torch", "transformers", "python", "state layout", "backends"} <= report.keys()
    assert report["float32 matmul, GFLOP/s"] > 0
    assert "torch" in here("env").out
