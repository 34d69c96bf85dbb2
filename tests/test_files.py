"""Writing files: complete or not at all, and one clear sentence when the disk refuses."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from power_retention.errors import OutputError, SourceError
from power_retention.files import check_new_folder, clear_write_errors, new_folder, write_json


class TestNewFolder:
    @pytest.mark.parametrize("exists", [False, True])
    def test_it_takes_its_place_when_complete(self, tmp_path: Path, exists: bool) -> None:
        target = tmp_path / "a" / "b"
        if exists:
            target.mkdir(parents=True)
        with new_folder(target) as folder:
            (folder / "deep").mkdir()
            (folder / "deep" / "file").write_text("text")
            assert not target.exists() or not any(target.iterdir())
        assert (target / "deep" / "file").read_text() == "text"
        assert os.listdir(target.parent) == ["b"]
        assert target.stat().st_mode & 0o777 == 0o755

    @pytest.mark.parametrize("error", [KeyboardInterrupt, SourceError("x"), OSError(28, "No space left on device")])
    def test_whatever_goes_wrong_nothing_is_left(self, tmp_path: Path, error: BaseException) -> None:
        def fill() -> None:
            with new_folder(tmp_path / "out") as folder:
                (folder / "half").write_text("half")
                raise error

        with pytest.raises(
            OutputError if isinstance(error, OSError) else error if isinstance(error, type) else type(error)
        ):
            fill()
        assert os.listdir(tmp_path) == []

    def test_somebody_else_may_be_quicker(self, tmp_path: Path) -> None:
        def fill() -> None:
            with new_folder(tmp_path / "out") as folder:
                (folder / "mine").touch()
                (tmp_path / "out").mkdir()
                (tmp_path / "out" / "theirs").touch()

        with pytest.raises(OutputError, match="Could not write"):
            fill()
        assert os.listdir(tmp_path) == ["out"]
        assert os.listdir(tmp_path / "out") == ["theirs"]

    def test_what_is_there_already_is_refused(self, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        for path, message in (
            (tmp_path, "already holds something"),
            (tmp_path / "file", "is a file; the name of a new"),
        ):
            with pytest.raises(OutputError, match=message):
                check_new_folder(path)
            with pytest.raises(OutputError, match=message), new_folder(path):
                pytest.fail("entered")
        check_new_folder(tmp_path / "new")
        assert not (tmp_path / "new").exists()

    def test_a_parent_that_is_a_file(self, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        with (
            pytest.raises(OutputError, match=r"Could not write .*out: .* GB free there"),
            new_folder(tmp_path / "file" / "out"),
        ):
            pytest.fail("entered")

    def test_a_disk_that_is_full(self, disk_of: Callable[[int], Path]) -> None:
        disk = disk_of(64)

        def write(content: Callable[[Path], object]) -> None:
            with new_folder(disk / "out") as folder:
                content(folder)

        with pytest.raises(OutputError, match="No space left on device") as caught:
            write(lambda folder: (folder / "text").write_bytes(bytes(100_000)))
        assert str(caught.value).count("\n") == 0
        with pytest.raises(OutputError, match=r"Could not write .*Free some space"):
            write(lambda folder: save_file({"x": torch.zeros(50_000)}, folder / "x.safetensors"))
        assert os.listdir(disk) == []


class TestJson:
    def test_it_replaces_the_file_at_once(self, tmp_path: Path) -> None:
        path = tmp_path / "a.json"
        write_json(path, {"a": [1, None, "ü"]})
        write_json(path, {"b": 2})
        assert json.loads(path.read_text(encoding="utf-8")) == {"b": 2}
        assert path.read_text().endswith("}\n")
        assert os.listdir(tmp_path) == ["a.json"]

    def test_a_number_that_is_not_finite_is_null(self, tmp_path: Path) -> None:
        write_json(tmp_path / "a.json", {"a": [float("nan"), 1.5], "b": (float("-inf"),)})
        assert json.loads((tmp_path / "a.json").read_text(), parse_constant=pytest.fail) == {
            "a": [None, 1.5],
            "b": [None],
        }

    def test_a_value_that_is_not_json_leaves_the_old_file(self, tmp_path: Path) -> None:
        write_json(tmp_path / "a.json", 1)
        with pytest.raises(TypeError):
            write_json(tmp_path / "a.json", threading.Lock())
        assert os.listdir(tmp_path) == ["a.json"]
        assert (tmp_path / "a.json").read_text() == "1\n"

    def test_a_full_disk_leaves_the_old_file(self, disk_of: Callable[[int], Path]) -> None:
        path = disk_of(16) / "a.json"
        write_json(path, "old")
        with pytest.raises(OutputError, match=rf"Could not write {path}: No space left on device"):
            write_json(path, "x" * 100_000)
        assert json.loads(path.read_text()) == "old"
        assert os.listdir(path.parent) == ["a.json"]


class TestErrors:
    def test_the_sentence_names_file_reason_and_remedy(self, tmp_path: Path) -> None:
        target = tmp_path / "not" / "there" / "x"
        with pytest.raises(OutputError) as caught, clear_write_errors(target):
            target.write_text("x")
        message = str(caught.value)
        assert message.startswith(f"Could not write {target}: No such file or directory (")
        assert message.endswith("free some space or choose another folder, and run the command again.")

    def test_other_errors_pass(self, tmp_path: Path) -> None:
        for error in (ValueError("v"), OutputError("already clear")):
            with pytest.raises(type(error), match=str(error)), clear_write_errors(tmp_path):
                raise error
