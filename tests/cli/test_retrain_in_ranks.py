"""`retrain` in several processes, started as torchrun and srun start them; and its checkpoints as models."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from power_retention.cli import app
from power_retention.cli.retrain import usual_replicas
from power_retention.conversion.presets import preset
from power_retention.errors import CheckpointError
from power_retention.training.checkpoint import checkpoint_of, read_weights

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
RECIPE = ("--steps", "12", "--batch", "4", "--length", "64", "--precision", "float32")
MODULE = ("-m", "power_retention.cli")


def start(*arguments: str | Path, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**ENVIRONMENT, **environment},
    )


def here(*arguments: str | Path) -> dict[str, Any]:
    """A command in this process; what it answers."""
    done = CliRunner().invoke(app, [*map(str, arguments), "--json"])
    assert done.exit_code == 0, done.output
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def start_as_srun_does(*arguments: str | Path, size: int) -> list[subprocess.Popen[str]]:
    """Each rank is told who it is, and nobody stands above them."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        port = str(held.getsockname()[1])
    world = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [start(*arguments, **world, RANK=str(rank), LOCAL_RANK=str(rank)) for rank in range(size)]


@pytest.mark.parametrize(("memory_gb", "ranks", "groups"), [(80, "4", 4), (2, "4", 1), (80, "1", 1)])
def test_on_gpus_that_a_model_is_small_for_each_holds_all_of_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, memory_gb: int, ranks: str, groups: int
) -> None:
    preset("smollm2-135m").config().save_pretrained(tmp_path)
    monkeypatch.setenv("WORLD_SIZE", ranks)
    gpu = SimpleNamespace(total_memory=memory_gb << 30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: gpu)
    assert usual_replicas(tmp_path, torch.device("cuda")) == groups
    assert usual_replicas(tmp_path, torch.device("cpu")) == 1


def wait_for(records: Path, lines: int, processes: list[subprocess.Popen[str]]) -> None:
    deadline = time.monotonic() + 180
    while not (records.exists() and records.read_text().count("\n") >= lines):
        assert time.monotonic() < deadline
        for process in processes:
            assert process.poll() is None, process.communicate()
        time.sleep(0.01)


@pytest.fixture(scope="module")
def converted(stories_dir: Path, stories_text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "converted"
    here("convert", stories_dir, folder, "--text", stories_text, "--windows", "4")
    return folder


@pytest.fixture(scope="module")
def stopped(converted: Path, stories_text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run in two processes of which the second got SIGTERM; not to be written to."""
    out = tmp_path_factory.mktemp("runs") / "out"
    ranks = start_as_srun_does(*MODULE, "retrain", converted, out, "--text", stories_text, *RECIPE, size=2)
    wait_for(out / "run" / "metrics.jsonl", 2, ranks)
    ranks[1].send_signal(signal.SIGTERM)
    answers = [(*rank.communicate(timeout=120), rank.returncode) for rank in ranks]
    assert [code for _, _, code in answers] == [75, 75], answers
    assert "Run the same command with --resume to continue." in answers[0][1]
    assert answers[1][:2] == ("", "")  # the first one speaks for all
    return out


def test_continued_under_torchrun_it_goes_on_as_one_process_would(
    converted: Path, stopped: Path, stories_text: Path, tmp_path: Path
) -> None:
    whole, out = tmp_path / "whole", tmp_path / "out"
    here("retrain", converted, whole, "--text", stories_text, *RECIPE)
    shutil.copytree(stopped, out)
    torchrun = ("-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", *MODULE)
    resumed = start(*torchrun, "retrain", converted, out, "--text", stories_text, *RECIPE, "--resume", "--json")
    answer, complaints = resumed.communicate(timeout=240)
    assert resumed.returncode == 0, complaints
    assert json.loads(answer)["recipe"]["steps"] == 12
    losses = [
        [json.loads(line)["loss"] for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
        for folder in (whole, out)
    ]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    got, wanted = (load_file(folder / "model.safetensors") for folder in (out, whole))
    assert got.keys() == wanted.keys()
    assert {value.dtype for value in got.values()} == {torch.float32}
    assert sorted(os.listdir(out)) == sorted(os.listdir(whole))
    assert os.listdir(out / "run").count("checkpoints") == 0


def test_a_checkpoint_of_two_ranks_becomes_a_model_and_a_run_again(
    converted: Path, stopped: Path, stories_text: Path, tmp_path: Path
) -> None:
    step = here("export", stopped, tmp_path / "model")["step"]
    assert 2 <= step < 12
    stored = read_weights(checkpoint_of(stopped / "run" / "checkpoints", step))
    model, before = (AutoModelForCausalLM.from_pretrained(folder) for folder in (tmp_path / "model", converted))
    assert all(value.equal(stored[name]) for name, value in model.named_parameters())
    gates = [name for name in stored if name.endswith("g_proj.bias")]
    assert gates
    assert not any(stored[name].equal(before.get_parameter(name)) for name in gates)
    assert model.config.to_diff_dict() == before.config.to_diff_dict()
    assert sorted(os.listdir(tmp_path / "model")) == sorted(os.listdir(converted))
    again = here("retrain", tmp_path / "model", tmp_path / "again", "--text", stories_text, *RECIPE)
    assert again["recipe"]["steps"] == 12


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("{converted}",), "holds no run"),
        (("{stopped}", "--step", "99"), "has no checkpoint of step 99; it has "),
        (("{damaged}",), "is damaged: __1_0.distcp does not match its checksum"),
        (("{homeless}",), "is gone: put it back"),
    ],
)
def test_what_cannot_be_exported(
    converted: Path, stopped: Path, tmp_path: Path, arguments: tuple[str, ...], message: str
) -> None:
    places = {"converted": converted, "stopped": stopped}
    for name in ("damaged", "homeless"):
        places[name] = shutil.copytree(stopped, tmp_path / name)
    file = checkpoint_of(places["damaged"] / "run" / "checkpoints") / "__1_0.distcp"
    file.write_bytes(file.read_bytes()[:-1] + b"!")
    settings = places["homeless"] / "run" / "run.json"
    settings.write_text(settings.read_text().replace(str(converted), "/nowhere"))
    run, *more = (each.format(**places) for each in arguments)
    done = CliRunner().invoke(app, ["export", run, str(tmp_path / "out"), *more])
    assert isinstance(done.exception, CheckpointError)
    assert message in str(done.exception)
    assert not (tmp_path / "out").exists()
