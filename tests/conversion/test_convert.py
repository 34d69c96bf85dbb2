"""From an opened source to a folder that loads back, complete or not there at all."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from power_retention.conversion import convert as conversions
from power_retention.conversion.convert import (
    Conversion,
    calibration_windows,
    convert,
    converted_again,
    sample_text,
    save_conversion,
)
from power_retention.conversion.source import Source, open_source
from power_retention.errors import DataError, OutputError
from power_retention.training.text import tokenize


@pytest.fixture(scope="module")
def source(stories_dir: Path) -> Source:
    return open_source(stories_dir)


@pytest.fixture(scope="module")
def conversion(source: Source) -> Conversion:
    ids = tokenize([sample_text()], source.tokenizer, max_tokens=4096).ids
    return convert(source, calibration_windows(torch.from_numpy(ids).long(), count=4, length=256))


def test_the_source_is_left_as_it_is(source: Source, conversion: Conversion, stories_dir: Path) -> None:
    assert type(source.model).__name__ == "LlamaForCausalLM"
    fresh = AutoModelForCausalLM.from_pretrained(stories_dir).state_dict()
    assert all(value.equal(fresh[name]) for name, value in source.model.state_dict().items())
    assert conversion.student is not source.model


def test_what_is_saved_loads_back_equal(conversion: Conversion, source: Source, tmp_path: Path) -> None:
    out = tmp_path / "deep" / "converted"
    save_conversion(conversion, out)
    loaded, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(info.values()), info
    wanted = conversion.student.state_dict()
    assert all(value.equal(wanted[name]) for name, value in loaded.state_dict().items())
    parent = {"name": "stories260k", "model_type": "llama", "fingerprint": source.fingerprint}
    assert loaded.config.parent == parent
    text = "Once upon a time, Lily found a ball."
    assert AutoTokenizer.from_pretrained(out)(text).input_ids == source.tokenizer(text).input_ids
    report = json.loads((out / "conversion.json").read_text())
    assert report["source"] == {**parent, "kind": "directory"}
    assert (report["power"], len(report["layers"])) == (2, 5)
    assert os.listdir(out.parent) == ["converted"]
    assert out.stat().st_mode & 0o777 == 0o755


def test_without_text_it_is_the_bare_swap(source: Source, tmp_path: Path) -> None:
    bare = convert(source, None, p=4, chunk_size=32, key_bias=True)
    assert bare.layers == []
    assert not bare.student.model.layers[0].self_attn.k_bias.any()
    save_conversion(bare, tmp_path / "bare")
    assert not (tmp_path / "bare" / "calibration.safetensors").exists()
    config = AutoModelForCausalLM.from_pretrained(tmp_path / "bare").config
    assert (config.power, config.chunk_size) == (4, 32)


def test_a_key_bias_is_there_when_asked_for(conversion: Conversion, source: Source, tmp_path: Path) -> None:
    """A saved model keeps what it has, also one whose configuration does not name it."""
    save_conversion(conversion, tmp_path / "plain")
    assert json.loads((tmp_path / "plain" / "config.json").read_text())["key_bias"] is False
    assert all(mixer.k_bias is None for mixer in AutoModelForCausalLM.from_pretrained(tmp_path / "plain").mixers)
    save_conversion(convert(source, None, key_bias=True), tmp_path / "biased")
    config = json.loads((tmp_path / "biased" / "config.json").read_text())
    assert config.pop("key_bias") is True
    (tmp_path / "biased" / "config.json").write_text(json.dumps(config))
    assert all(mixer.k_bias is not None for mixer in AutoModelForCausalLM.from_pretrained(tmp_path / "biased").mixers)


@pytest.mark.parametrize("key_bias", [False, True])
def test_only_a_key_bias_knows_where_it_is(source: Source, key_bias: bool) -> None:
    """Far beyond the parent's 512 positions a model without one says what it says at the first."""
    ids = torch.from_numpy(tokenize([sample_text()], source.tokenizer, max_tokens=1024).ids).long()
    windows = calibration_windows(ids, count=2, length=256)
    model = convert(source, windows, key_bias=key_bias).student.double().eval()
    near = torch.arange(256).expand(2, -1)
    with torch.no_grad():
        here, there = (
            model(input_ids=windows, position_ids=near + first, use_cache=False).logits for first in (0, 100_000)
        )
    apart = float((here - there).norm() / here.norm())
    assert apart > 1e-2 if key_bias else apart < 1e-4  # the rotations are float32


@pytest.mark.parametrize("key_bias", [False, True])
def test_what_a_retrained_model_started_from(source: Source, key_bias: bool, tmp_path: Path) -> None:
    ids = tokenize([sample_text()], source.tokenizer, max_tokens=1024).ids
    windows = calibration_windows(torch.from_numpy(ids).long(), count=2, length=128)
    conversion = convert(source, windows, key_bias=key_bias)
    save_conversion(conversion, tmp_path / "out")
    again = converted_again(source.model, conversion.student.config, tmp_path / "out").state_dict()
    wanted = conversion.student.state_dict()
    assert list(again) == list(wanted)
    assert all(torch.allclose(again[name], value, rtol=1e-6, atol=0) for name, value in wanted.items())


def test_progress_is_told(source: Source) -> None:
    told: list[tuple[int, int]] = []
    convert(source, torch.randint(3, 500, (2, 128)), progress=lambda done, of: told.append((done, of)))
    assert told == [(i, 5) for i in range(1, 6)]


def test_a_folder_that_holds_something_is_not_touched(conversion: Conversion, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("years of work")
    with pytest.raises(OutputError, match="already holds something; choose another folder"):
        save_conversion(conversion, tmp_path / "out")
    assert os.listdir(tmp_path) == ["out"]
    assert os.listdir(tmp_path / "out") == ["thesis.txt"]


@pytest.mark.parametrize("what", ["a full disk", "an interrupt"])
def test_a_failed_write_leaves_nothing(
    conversion: Conversion, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    """The last of the files fails."""

    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) if what == "a full disk" else KeyboardInterrupt

    monkeypatch.setattr(conversions, "save_calibration", fail)
    with pytest.raises(OutputError if what == "a full disk" else KeyboardInterrupt) as caught:
        save_conversion(conversion, tmp_path / "out")
    if what == "a full disk":
        assert str(caught.value).startswith(f"Could not write {tmp_path / 'out'}: No space left on device (")
    assert os.listdir(tmp_path) == []


def test_a_disk_that_is_really_full(conversion: Conversion, disk_of: Callable[[int], Path]) -> None:
    full_disk = disk_of(512)
    (full_disk / "kept").write_text("kept")
    with pytest.raises(OutputError, match=f"Could not write {full_disk / 'out'}") as caught:
        save_conversion(conversion, full_disk / "out")
    assert "ree some space" in str(caught.value)
    assert os.listdir(full_disk) == ["kept"]


def test_a_short_text_is_refused() -> None:
    with pytest.raises(DataError, match="has 10 tokens; at least 64 are needed"):
        calibration_windows(torch.arange(10), count=4, length=64)
    spread = calibration_windows(torch.arange(1000), count=3, length=64)
    assert spread[:, 0].tolist() == [0, 448, 896]
    assert calibration_windows(torch.arange(130), count=8, length=64).shape == (2, 64)


def test_the_built_in_sample_is_english() -> None:
    assert "Call me Ishmael" in sample_text()
    assert len(sample_text()) > 10_000


def test_a_process_killed_while_writing_leaves_no_model(stories_dir: Path, tmp_path: Path) -> None:
    """SIGKILL after the weights: the folder is not there, and the same command succeeds afterwards."""
    script = """
import os, signal, sys
from pathlib import Path
from power_retention.conversion import convert as c
from power_retention.conversion.source import open_source
c.write_json = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
c.save_conversion(c.convert(open_source(sys.argv[1]), None), Path(sys.argv[2]))
"""
    out = tmp_path / "out"
    result = subprocess.run([sys.executable, "-c", script, stories_dir, out], capture_output=True, check=False)
    assert result.returncode == -9, result.stderr.decode()
    assert not out.exists()
    assert any((path / "model.safetensors").exists() for path in tmp_path.iterdir()), "it was killed too early"
    save_conversion(convert(open_source(stories_dir), None), out)
    assert (out / "config.json").exists()
