"""``power-retention chat`` in a pipe: real processes, one after the other."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from power_retention import PowerRetentionCache
from power_retention.cli import chat as chat_command
from power_retention.cli import main
from power_retention.cli.options import open_student
from power_retention.conversion.convert import convert, save_conversion
from power_retention.conversion.source import open_source
from power_retention.ops import PowerState
from power_retention.serving.conversation import Conversation
from power_retention.serving.generate import open_tokenizer
from power_retention.serving.sampling import Draw
from power_retention.serving.states import StateDirectory


@pytest.fixture(scope="module")
def folder(stories_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    converted = tmp_path_factory.mktemp("chatting") / "stories"
    save_conversion(convert(open_source(str(stories_dir)), None), converted)
    return converted


def chat(folder: Path, said: str, states: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "power_retention.cli", "chat", folder, "--states", states, "--temperature", "0"]
    return subprocess.run(
        [*map(str, command), "--max-tokens", "10", *options],
        input=said, capture_output=True, text=True, timeout=120, check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200"},
    )  # fmt: skip


def answers(done: subprocess.CompletedProcess[str]) -> list[dict[str, Any]]:
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_keeps_forks_and_goes_on_in_another_process(folder: Path, tmp_path: Path) -> None:
    states = tmp_path / "states"
    StateDirectory(states).save("foreign", [PowerState.empty(1, 1, 8)], model="another", tokens_seen=3)
    script = "Once upon a time\n/save story\nShe said\n/fork other\n/load story\nShe said\n/states\n/reset\nShe said\n"
    first = chat(folder, script, states, "--json")
    opening, onward, again, anew = answers(first)
    assert again == onward
    assert onward["tokens_seen"] > opening["tokens_seen"]
    assert anew["tokens_seen"] == onward["tokens_seen"] - opening["tokens_seen"]
    assert all(name in first.stderr for name in ("story", "other", "none read again", "Everything said is forgotten"))
    listed = {line.split()[0]: line for line in first.stderr.splitlines() if " kB  " in line}
    assert {name: line.endswith("of another model") for name, line in listed.items()} == {
        "story": False, "other": False, "foreign": True,
    }  # fmt: skip
    second = chat(folder, "She said\n", states, "--json", "--load", "story")
    assert answers(second) == [onward]
    plain = chat(folder, "/load story\nShe said\n/quit\nnever heard\n", states)
    assert plain.stdout == onward["answer"] + "\n"


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
@pytest.mark.parametrize("moment", ["reading", "writing"])
def test_ctrl_c_leaves_no_layer_behind(
    folder: Path, tmp_path: Path, moment: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """It comes when half of the layers have read a token; what is kept is what was read up to there, in all of them."""
    student, tokenizer = open_student(folder).eval(), open_tokenizer(folder)
    conversation = Conversation(student, tokenizer, draw=Draw(), max_tokens=40, piece=8)
    read: list[int] = []

    def note(model: nn.Module, ids: tuple[torch.Tensor]) -> None:
        read.extend(ids[0][0].tolist())

    def interrupt(layer: nn.Module, inputs: object) -> None:
        if len(read) > {"reading": 10, "writing": 50}[moment] and not interrupted:
            interrupted.append(len(read))
            signal.raise_signal(signal.SIGINT)

    interrupted: list[int] = []
    student.register_forward_pre_hook(note)
    student.model.layers[2].register_forward_pre_hook(interrupt)
    talk = chat_command._Talk(conversation, StateDirectory(tmp_path), json=False)
    talk.hear("Once upon a time there was a little dog who wanted to see the world and went away")
    assert "(stopped)" in capsys.readouterr().err
    assert conversation.tokens_seen == len(read) == interrupted[0]
    expected = PowerRetentionCache(student.config.num_hidden_layers)
    with torch.no_grad():
        student(torch.tensor([read]), past_key_values=expected)
    for one, other in zip(conversation.cache.states, expected.states, strict=True):
        error = (one.memory - other.memory).norm() / other.memory.norm()
        assert error < 1e-5
    talk.hear("And then?")  # goes on


@pytest.mark.parametrize(
    ("said", "sentence"),
    [
        ("/load nowhere\n", "There is no state called 'nowhere'"),
        ("Once\n/save ../x\n", "no name of a state"),
        ("/save\n", "/save needs a name"),
        ("/dance\n", "/dance is no command"),
        ("Once\n/save a\n/fork a\n", "A state called 'a' is kept already"),
        (b"\xff\xfe\n", "no UTF-8 text"),
    ],
)
def test_refused_in_a_sentence(
    folder: Path,
    tmp_path: Path,
    said: str | bytes,
    sentence: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    options = ["--states", str(tmp_path / "states"), "--max-tokens", "3"]
    monkeypatch.setattr(sys, "argv", ["power-retention", "chat", str(folder), *options])
    told = io.StringIO(said) if isinstance(said, str) else io.TextIOWrapper(io.BytesIO(said), encoding="utf-8")
    monkeypatch.setattr(sys, "stdin", told)
    with pytest.raises(SystemExit, match="1"):
        main()
    assert sentence in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("options", "sentence"),
    [(["--load", "nowhere"], "There is no state called 'nowhere'"), (["--states", __file__], "a folder was expected")],
)
def test_refused_before_the_model_is_opened(
    options: list[str],
    sentence: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["power-retention", "chat", "no-such-model", *options])
    with pytest.raises(SystemExit, match="1"):
        main()
    assert sentence in " ".join(capsys.readouterr().err.split())
