"""A saved state comes back as it was, or not at all."""

from __future__ import annotations

import dataclasses
import errno
import io
import json
import os
import re
import signal
import subprocess
import sys
import textwrap
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
from hypothesis import given
from hypothesis import strategies as st
from problems import random_problem, relative_error, run_operator
from safetensors.torch import load_file

from power_retention.errors import ArgumentError, OutputError, StateError
from power_retention.ops import LAYOUT, PowerState, power_retention, power_retention_step, state_file, to_blocks16
from power_retention.ops.state_file import (
    BLOCKS16_LAYOUT,
    StateHeader,
    load_states,
    read_header,
    save_states,
    write_state_file,
)


def make_states(
    layers: int = 2, *, batch: int = 1, heads: int = 2, d: int = 3, e: int = 4, p: int = 2
) -> list[PowerState]:
    return [random_problem(seed, heads=heads, d=d, e=e, p=p, states=batch).state for seed in range(layers)]


def in_dtypes(state: PowerState, memory: torch.dtype, normalizer: torch.dtype) -> PowerState:
    return state._replace(memory=state.memory.to(memory), normalizer=state.normalizer.to(normalizer))


def assert_equal(got: list[PowerState], want: list[PowerState]) -> None:
    assert len(got) == len(want)
    for one, other in zip(got, want, strict=True):
        assert (one.p, one.head_width) == (other.p, other.head_width)
        for tensor, expected in zip(one[:2], other[:2], strict=True):
            assert tensor.dtype == expected.dtype
            assert torch.equal(tensor, expected)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "context.state"


@pytest.fixture
def saved(path: Path) -> tuple[Path, list[PowerState], StateHeader]:
    states = make_states()
    return path, states, save_states(path, states, model="abc", tokens_seen=7)


def files_in(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


dtypes = st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16])


@given(
    layers=st.integers(1, 3),
    shape=st.fixed_dictionaries(
        {name: st.integers(1, 3) for name in ("batch", "heads", "d", "e")} | {"p": st.sampled_from([2, 4])}
    ),
    memory=dtypes,
    normalizer=dtypes,
    model=st.text(),
    tokens=st.integers(0, 2**40),
    extra=st.dictionaries(st.text(), st.text(), max_size=3),
)
def test_round_trip(
    tmp_path_factory: pytest.TempPathFactory,
    layers: int,
    shape: dict[str, int],
    memory: torch.dtype,
    normalizer: torch.dtype,
    model: str,
    tokens: int,
    extra: dict[str, str],
) -> None:
    path = tmp_path_factory.mktemp("states") / "context.state"
    states = [in_dtypes(state, memory, normalizer) for state in make_states(layers, **shape)]
    written = save_states(path, states, model=model, tokens_seen=tokens, extra=extra)
    loaded, header = load_states(path, model=model)
    assert_equal(loaded, states)
    assert header == written == read_header(path)
    assert (header.layers, header.batch, header.heads) == (layers, shape["batch"], shape["heads"])
    assert (header.head_width, header.value_width, header.p) == (shape["d"], shape["e"], shape["p"])
    assert (header.model, header.tokens_seen, header.extra) == (model, tokens, extra)


def test_header(saved: tuple[Path, list[PowerState], StateHeader]) -> None:
    path, _, header = saved
    assert (header.format, header.version, header.layout) == ("power-retention-state", 1, LAYOUT)
    assert abs(datetime.fromisoformat(header.created) - datetime.now(UTC)) < timedelta(minutes=1)
    assert re.fullmatch("sha256:[0-9a-f]{64}", header.checksum)
    assert files_in(path.parent) == ["context.state"]


def test_the_file_is_plain_safetensors(saved: tuple[Path, list[PowerState], StateHeader]) -> None:
    path, states, header = saved
    tensors = load_file(path)
    assert sorted(tensors) == [f"layers.{i}.{name}" for i in range(2) for name in ("memory", "normalizer")]
    assert torch.equal(tensors["layers.1.memory"], states[1].memory)
    with safetensors.safe_open(path, "pt") as file:
        assert json.loads(file.metadata()["power-retention"]) == dataclasses.asdict(header)


def test_states_that_are_views_or_carry_gradients(path: Path) -> None:
    state = make_states(1, batch=2)[0]
    view = state._replace(memory=state.memory.transpose(0, 1).contiguous().transpose(0, 1))
    save_states(path, [view, view, state._replace(normalizer=state.normalizer.clone().requires_grad_())])
    assert_equal(load_states(path)[0], [state] * 3)


def test_a_context_continues_where_it_was_saved(path: Path) -> None:
    """Read a prompt, save, load in its place, continue: the same as reading on."""
    problem = random_problem(tokens=9, heads=2, groups=2, d=4)
    whole, *_ = run_operator(problem)
    _, *final = run_operator(problem.span(0, 6, None))
    save_states(path, [PowerState(*final, 2, 4)], tokens_seen=6)
    (state,), _ = load_states(path)
    y, _ = power_retention(*problem.span(6, 9, None)[:4], initial_state=state, return_state=True)
    assert relative_error(y, whole[:, 6:]) < 1e-12


def test_a_loaded_state_is_independent_of_its_file(saved: tuple[Path, list[PowerState], StateHeader]) -> None:
    """Updated in place it leaves the file alone; a file overwritten in place leaves it alone."""
    path, states, _ = saved
    (first, second), _ = load_states(path)
    problem = random_problem(tokens=1, heads=2, d=3, e=4)
    power_retention_step(*(x[:, 0] for x in problem[:4]), first, inplace=True)
    assert not torch.equal(first.memory, states[0].memory)
    assert_equal(load_states(path)[0], states)
    content = path.read_bytes()
    path.write_bytes(bytes(len(content)))
    assert torch.equal(second.memory, states[1].memory)


def test_reading_a_header_reads_no_tensor(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_states(path, make_states(1, d=64, e=64))
    monkeypatch.setattr("power_retention.ops.state_file.load_file", None)
    monkeypatch.setattr("power_retention.ops.state_file._checksum", None)
    assert read_header(path).head_width == 64


@pytest.mark.parametrize("verify", [True, False])
def test_states_of_another_model_are_refused(saved: tuple[Path, list[PowerState], StateHeader], verify: bool) -> None:
    path, _, _ = saved
    with pytest.raises(StateError, match=r"belongs to the model 'abc', not to 'xyz'"):
        load_states(path, model="xyz", verify=verify)
    save_states(path, make_states())
    with pytest.raises(StateError, match="belongs to the model ''"):
        load_states(path, model="xyz", verify=verify)


def test_16_block_states_are_converted(path: Path) -> None:
    states = make_states(2, d=16)
    pairs = [(to_blocks16(state.memory, 16, 2), to_blocks16(state.normalizer, 16, 2)) for state in states]
    header = save_states(path, states)
    write_state_file(path, dataclasses.replace(header, layout=BLOCKS16_LAYOUT), pairs)
    loaded, header = load_states(path)
    assert header.layout == "retention/blocks16"
    assert_equal(loaded, states)


HEADER_CASES: dict[str, tuple[dict[str, Any], str]] = {
    "layout": ({"layout": "power-retention/2"}, "holds states in the layout 'power-retention/2'; this package reads"),
    "version": ({"version": 2}, "is a state file of version 2; this package reads version 1"),
    "format": ({"format": "weights"}, "is not a state file: its header does not say 'power-retention-state'"),
    "type": ({"heads": "2"}, "is damaged: the field 'heads' of its header is '2'"),
    "layers": ({"layers": 3}, "is damaged: layers.2.memory should be [1, 2, 6, 4] and is missing"),
    "width": ({"head_width": 4}, "is damaged: layers.0.memory should be [1, 2, 10, 4] and is [1, 2, 6, 4]"),
    "batch": ({"batch": 2}, "layers.0.memory should be [2, 2, 6, 4] and is [1, 2, 6, 4]"),
}


@pytest.mark.parametrize("case", HEADER_CASES)
def test_headers_that_are_refused(saved: tuple[Path, list[PowerState], StateHeader], case: str) -> None:
    path, states, header = saved
    changes, message = HEADER_CASES[case]
    write_state_file(path, dataclasses.replace(header, **changes), states)
    with pytest.raises(StateError, match=re.escape(message)):
        load_states(path)


def test_every_flipped_byte_is_noticed(path: Path) -> None:
    """Whatever byte is damaged, in the header or in the tensors: refused, or harmless to what is loaded."""
    states = make_states(1, heads=1, d=1, e=2)
    header = save_states(path, states, model="abc")
    content = path.read_bytes()
    tensor_bytes = sum(state.nbytes for state in states)
    for position in range(len(content)):
        damaged = bytearray(content)
        damaged[position] ^= 0x11
        path.write_bytes(damaged)
        try:
            loaded, found = load_states(path, model="abc")
        except StateError:
            continue
        assert position < len(content) - tensor_bytes
        assert found == header
        assert_equal(loaded, states)


def test_a_flipped_byte_of_a_tensor(saved: tuple[Path, list[PowerState], StateHeader]) -> None:
    path, states, _ = saved
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)
    with pytest.raises(StateError, match="was altered after it was written: its checksum does not match"):
        load_states(path)
    loaded, _ = load_states(path, verify=False)
    assert not torch.equal(loaded[1].normalizer, states[1].normalizer)


def test_an_edited_header_is_noticed(saved: tuple[Path, list[PowerState], StateHeader]) -> None:
    path, _, _ = saved
    content = path.read_bytes()
    quoted = b'\\"abc\\"'  # quoted, since a checksum may hold these letters too
    assert content.count(quoted) == 1
    path.write_bytes(content.replace(quoted, quoted.replace(b"abc", b"xyz")))
    with pytest.raises(StateError, match="checksum"):
        load_states(path, model="xyz")


def test_every_truncation_is_refused(saved: tuple[Path, list[PowerState], StateHeader]) -> None:
    path, _, _ = saved
    content = path.read_bytes()
    for length in (0, 4, 8, 9, 100, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:length])
        for read in (read_header, load_states):
            with pytest.raises(StateError, match=r"cut short|does not start like one"):
                read(path)
    path.write_bytes(content + b"\0")
    with pytest.raises(StateError, match="where its header announces"):
        load_states(path)


def starting_like_safetensors(header: bytes) -> bytes:
    return len(header).to_bytes(8, "little") + header


OTHER_FILES = [
    b"",
    b"hello, world: a text file",
    bytes(200),
    starting_like_safetensors(b"{}"),
    starting_like_safetensors(b"[]"),
    starting_like_safetensors(b'{"__metadata__": 5}'),
    starting_like_safetensors(b'{"weight": {"data_offsets": []}}'),
]


@pytest.mark.parametrize("content", OTHER_FILES)
def test_other_files_are_refused(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    with pytest.raises(StateError, match="not a state file"):
        load_states(path)


def test_other_safetensors_are_refused(path: Path) -> None:
    safetensors.torch.save_file({"weight": torch.zeros(3)}, path)
    with pytest.raises(StateError, match="not a state file: it carries no 'power-retention-state' header"):
        load_states(path)
    safetensors.torch.save_file({"weight": torch.zeros(3)}, path, metadata={"power-retention": "{}"})
    with pytest.raises(StateError, match="not a state file: its header does not say"):
        load_states(path)


def test_a_missing_file_and_a_folder(tmp_path: Path) -> None:
    with pytest.raises(StateError, match="cannot be read: No such file"):
        load_states(tmp_path / "nothing.state")
    with pytest.raises(StateError, match="cannot be read: Is a directory"):
        load_states(tmp_path)


STATE_CASES: dict[str, tuple[list[Any], str]] = {
    "none": ([], "There is no state to save"),
    "powers": (make_states(1) + make_states(1, p=4), "The layers differ in (batch, heads, head width, value width, p)"),
    "heads": (make_states(1) + make_states(1, heads=1), "The layers differ"),
    "type": ([(torch.zeros(1), torch.zeros(1))], "Layer 0 holds no PowerState"),
    "dtype": ([in_dtypes(make_states(1)[0], torch.int32, torch.int32)], "Layer 0 holds a state in torch.int32"),
    "shape": ([make_states(1)[0]._replace(head_width=5)], "Layer 0 holds tensors [1, 2, 6, 4] and [1, 2, 6]; p=2 and"),
}


@pytest.mark.parametrize("case", STATE_CASES)
def test_states_that_do_not_belong_in_one_file(path: Path, case: str) -> None:
    states, message = STATE_CASES[case]
    with pytest.raises(StateError, match=re.escape(message)):
        save_states(path, states)
    assert not path.exists()


def test_extra_must_be_text(path: Path) -> None:
    with pytest.raises(ArgumentError, match="extra must map text to text"):
        save_states(path, make_states(), extra={"tokens": 3})


def test_a_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"nowhere does not exist: create it") as error:
        save_states(tmp_path / "nowhere" / "context.state", make_states())
    assert str(tmp_path / "nowhere" / "context.state") in str(error.value)


def test_a_destination_that_is_a_folder(path: Path) -> None:
    path.mkdir()
    with pytest.raises(OutputError, match="Is a directory"):
        save_states(path, make_states())
    assert files_in(path.parent) == ["context.state"]


def no_space(*_: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


class FullDisk(io.FileIO):
    """Takes the header, and then nothing more."""

    def write(self, data: object) -> int:
        return super().write(data) if self.tell() == 0 else no_space()


@pytest.mark.parametrize("moment", ["write", "fsync", "replace"])
def test_a_full_disk_leaves_the_previous_file(
    saved: tuple[Path, list[PowerState], StateHeader], monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    path, states, _ = saved
    with monkeypatch.context() as patch:
        if moment == "write":
            patch.setattr(state_file, "open", FullDisk, raising=False)
        else:
            patch.setattr(os, moment, no_space)
        with pytest.raises(OutputError, match=r"No space left on device\. Free some space") as error:
            save_states(path, make_states(3))
    assert str(path) in str(error.value)
    assert files_in(path.parent) == ["context.state"]
    assert_equal(load_states(path)[0], states)


def test_an_interrupted_write_leaves_nothing_behind(
    saved: tuple[Path, list[PowerState], StateHeader], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, states, _ = saved

    def interrupt(_: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        save_states(path, make_states(3))
    assert files_in(path.parent) == ["context.state"]
    assert_equal(load_states(path)[0], states)


def run_python(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), *arguments], capture_output=True, text=True, check=False
    )


@pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX limits and signals")
def test_a_real_write_that_fails(saved: tuple[Path, list[PowerState], StateHeader]) -> None:
    """The kernel itself refuses to write past a file size limit, as it would on a full disk."""
    path, states, _ = saved
    script = """
        import resource, sys
        from power_retention.errors import OutputError
        from power_retention.ops import PowerState
        from power_retention.ops.state_file import save_states

        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        try:
            save_states(sys.argv[1], [PowerState.empty(1, 1, 64)])
        except OutputError as error:
            print(error)
    """
    result = run_python(script, str(path))
    assert "File too large" in result.stdout, result.stderr
    assert files_in(path.parent) == ["context.state"]
    assert_equal(load_states(path)[0], states)


@pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX limits and signals")
def test_a_process_killed_while_writing(saved: tuple[Path, list[PowerState], StateHeader]) -> None:
    """SIGKILL between two pieces of the file: the previous file loads, and the next save succeeds."""
    path, states, _ = saved
    script = """
        import os, signal, sys
        from power_retention.ops import PowerState, state_file

        def killed_halfway(parts):
            parts = list(parts)
            yield from parts[: len(parts) // 2]
            os.kill(os.getpid(), signal.SIGKILL)

        write = state_file._write_atomically
        state_file._write_atomically = lambda path, parts: write(path, killed_halfway(parts))
        state_file.save_states(sys.argv[1], [PowerState.empty(1, 2, 64)] * 4)
    """
    result = run_python(script, str(path))
    assert result.returncode == -signal.SIGKILL, result.stderr
    leftovers = [name for name in files_in(path.parent) if name != "context.state"]
    assert len(leftovers) == 1
    assert (path.parent / leftovers[0]).stat().st_size > 100_000
    assert_equal(load_states(path)[0], states)
    newer = make_states(3)
    save_states(path, newer)
    assert_equal(load_states(path)[0], newer)
