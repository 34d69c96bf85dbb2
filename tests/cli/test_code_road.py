"""From a StarCoder2 to a retrained model with the one command of `docs/code.md`, on a tiny one."""

from __future__ import annotations

import importlib
import json
import os
import random
import string
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from transformers import Starcoder2Config, Starcoder2ForCausalLM

from power_retention.conversion.source import open_source
from power_retention.training.fill_in import MARKS
from small_tokenizer import write_code_tokenizer

SCRIPTS = Path(__file__).parents[2] / "scripts"
SOURCES = [
    f"def add_{name}(first, second):\n    total = first + second\n    return total + {i}\n\n\nprint(add_{name}({i}, 2))\n"
    for i, name in enumerate(f"{a}{b}" for a in string.ascii_lowercase for b in string.ascii_lowercase)
]


@pytest.fixture
def starcoder2(tmp_path: Path) -> Path:
    """All that makes it differ from Llama, at a size that trains in a second."""
    folder = write_code_tokenizer(tmp_path / "starcoder2", SOURCES)
    torch.manual_seed(0)
    config = Starcoder2Config(
        vocab_size=320, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, sliding_window=16, use_bias=True, tie_word_embeddings=True,
        bos_token_id=0, eos_token_id=0, pad_token_id=None, residual_dropout=0.0, embedding_dropout=0.0,
    )  # fmt: skip
    Starcoder2ForCausalLM(config).save_pretrained(folder)
    return folder


def test_the_road(starcoder2: Path, tmp_path: Path) -> None:
    text, out, questions = tmp_path / "python.jsonl", tmp_path / "out", tmp_path / "questions.jsonl"
    text.write_text("".join(json.dumps({"content": source}) + "\n" for source in SOURCES))
    questions.write_text(
        "".join(json.dumps({"prompt": f"{x[:40]}\n    return", "answers": ["total"]}) + "\n" for x in SOURCES[:4])
    )
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "MODEL": str(starcoder2), "GPUS": "0", "TEXT_FIELD": "content", "QUESTIONS": str(questions),
    }  # fmt: skip
    options = ("--steps", "4", "--batch", "2", "--length", "32", "--precision", "float32", "--device", "cpu")
    command = ["bash", str(SCRIPTS / "retrain_code.sh"), str(text), str(out), *options]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads((out / "shards" / "shards.json").read_text())["fill_in"] == {"share": 0.5, "seed": 0}
    config = json.loads((out / "retrained" / "config.json").read_text())
    assert (config["norm_kind"], config["mlp_kind"], config["qkv_bias"]) == ("layer", "plain", True)
    tokenizer = open_source(str(starcoder2)).tokenizer
    assert tokenizer.convert_tokens_to_ids(MARKS[0][0]) == 1
    report = json.loads((out / "retrained" / "evaluation" / "evaluation.json").read_text())
    assert set(report["losses"]) == {"teacher", "hard swap", "calibrated", "retrained"}
    assert report["tasks"]["questions"]["documents"] == 4


def test_without_arguments_it_says_how(tmp_path: Path) -> None:
    done = subprocess.run(["bash", SCRIPTS / "retrain_code.sh"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "scripts/retrain_code.sh TEXT OUT" in done.stderr


@pytest.fixture(scope="module")
def script() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(SCRIPTS))
        yield importlib.import_module("complete_functions")


class TestFinishedFunctions:
    """What counts as Python."""

    given = "def f(x):\n    y = x"

    @pytest.mark.parametrize(
        ("written", "valid"),
        [
            ("\n    return y\n", True),
            ("\n    return y\n\n\ndef g(:", True),  # what comes after the function is not looked at
            ("\n    return y\n    if y", True),  # nor is a line that had no room to end
            ("\n    return (y\n", False),
            ("\n   return y\n", False),
            ("\n    return y", False),  # no whole line
            ("\n\n\nclass A:\n", False),
            (" y\n", False),
        ],
    )
    def test_valid(self, script: ModuleType, written: str, valid: bool) -> None:
        assert script.is_valid(self.given, written) == valid

    def test_real_functions_are_valid_and_are_what_the_file_says(self, script: ModuleType, tmp_path: Path) -> None:
        body = "    total = 0\n    for x in values:\n        total += x\n    return total\n"
        source = f"import os\n\n\ndef add(values):\n{body}\n\ndef short():\n    return 1\n"
        (tmp_path / "a.py").write_text(source)
        (tmp_path / "broken.py").write_text("def (:\n")
        (function,) = script.functions(tmp_path, random.Random(0))
        assert source.startswith(function.before + function.given + function.rest)
        assert function.given == "def add(values):\n    total = 0"
        assert script.is_valid(function.given, function.rest)
