"""Checkpoints: bit for bit or refused, and never lost to the writing of the next one."""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from threading import Event

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.state_dict_loader import load as load_tensors

from power_retention.errors import CheckpointError, OutputError
from power_retention.models import PowerRetentionForCausalLM
from power_retention.training.checkpoint import Checkpoints, Place, checkpoint_of, read_weights
from tiny_models import tiny_model, tokens

State = tuple[PowerRetentionForCausalLM, torch.optim.AdamW]


def fresh(seed: int = 0, **changes: object) -> State:
    torch.manual_seed(seed)
    model = tiny_model(tie_word_embeddings=True, **changes).train()
    return model, torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)


def train(state: State, *steps: int, layers_only: bool = False) -> None:
    """Steps whose data are their number; with ``layers_only`` the embedding has no gradient and no optimiser state."""
    model, optimizer = state
    for step in steps:
        ids = tokens(2, 16, seed=step)
        model(ids, labels=ids, use_cache=False).loss.backward()
        if layers_only:
            model.model.embed_tokens.weight.grad = None
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def assert_equal(got: State, wanted: State) -> None:
    for (name, value), other in zip(got[0].named_parameters(), wanted[0].parameters(), strict=True):
        assert value.equal(other), name
        states = [optimizer.state.get(p, {}) for optimizer, p in ((got[1], value), (wanted[1], other))]
        assert states[0].keys() == states[1].keys(), name
        for key in states[0]:
            assert states[0][key].equal(states[1][key]), f"{key} of {name}"


def save(folder: Path, step: int, state: State) -> Path:
    checkpoints = Checkpoints(folder)
    checkpoints.save(Place(step), *state)
    checkpoints.wait()
    return checkpoint_of(folder)


def load(folder: Path, state: State) -> int:
    return Checkpoints(folder).load(*state).step


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Path, State]:
    state = fresh()
    train(state, 0, 1)
    save(tmp_path / "checkpoints", 2, state)
    return tmp_path / "checkpoints", state


@pytest.mark.parametrize("layers_only", [False, True])
def test_a_round_trip_is_exact_and_continues_exactly(tmp_path: Path, layers_only: bool) -> None:
    state, other = fresh(), fresh()
    train(state, 0, 1, layers_only=layers_only)
    path = save(tmp_path, 2, state)
    assert path.name == "step-00000002"
    train(other, 7)
    assert load(tmp_path, other) == 2
    assert_equal(other, state)
    for each in (state, other):
        train(each, 2, 3)
    assert_equal(other, state)


def test_no_checkpoint_is_step_zero(tmp_path: Path) -> None:
    state = fresh()
    assert load(tmp_path / "nowhere", state) == 0
    (tmp_path / "step-5").mkdir()
    (tmp_path / ".step-00000009-partial-x").mkdir()
    assert load(tmp_path, state) == 0
    assert_equal(state, fresh())


def test_what_is_trained_meanwhile_is_not_in_it(tmp_path: Path) -> None:
    """Written in the background, it holds the moment at which it was saved."""
    state, other, still = fresh(), fresh(), fresh()
    train(state, 0, 1)
    train(still, 0, 1)
    checkpoints = Checkpoints(tmp_path)
    held = Event()
    checkpoints._writer.submit(held.wait)  # the disk is busy
    checkpoints.save(Place(2), *state)
    train(state, 2)
    with pytest.raises(CheckpointError, match="has no checkpoint; it has no step"):
        checkpoint_of(tmp_path)
    held.set()
    checkpoints.wait()
    assert load(tmp_path, other) == 2
    assert_equal(other, still)


def test_a_place_comes_back_whole_and_can_be_changed(tmp_path: Path) -> None:
    state, place = fresh(), Place(step=4, data_shift=3, skipped=2, rollbacks=1)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(place, *state)
    assert checkpoints.load(*state) == place
    checkpoints.note(replace(place, data_shift=9))
    assert Checkpoints(tmp_path).load(*state) == replace(place, data_shift=9)


def test_the_last_two_are_kept(saved: tuple[Path, State]) -> None:
    folder, state = saved
    for step in (3, 4):
        train(state, step - 1)
        save(folder, step, state)
    assert sorted(os.listdir(folder)) == ["step-00000003", "step-00000004"]
    other = fresh()
    assert load(folder, other) == 4
    assert_equal(other, state)


def files_of(checkpoint: Path) -> list[Path]:
    return sorted(path for path in checkpoint.iterdir() if path.is_file())


def flip(path: Path, place: float) -> None:
    content = bytearray(path.read_bytes())
    content[int(place * len(content))] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("place", [0.01, 0.3, 0.9999])
@pytest.mark.parametrize("name", ["__0_0.distcp", ".metadata", "checkpoint.json"])
def test_one_flipped_bit_is_seen(saved: tuple[Path, State], name: str, place: float) -> None:
    folder, _ = saved
    flip(folder / "step-00000002" / name, place)
    state = fresh()
    with pytest.raises(
        CheckpointError, match=rf"step-00000002 is damaged: .*{re.escape(name)} .*Delete .*step-00000002"
    ):
        load(folder, state)
    assert_equal(state, fresh())


def test_the_library_alone_would_not_see_it(saved: tuple[Path, State]) -> None:
    """Why there are checksums: weights with flipped bits load as if nothing were wrong."""
    name, path = "model.layers.0.mlp.down_proj.weight", saved[0] / "step-00000002"
    wanted = saved[1][0].get_parameter(name).detach()
    file = path / "__0_0.distcp"
    content = bytearray(file.read_bytes())
    start = content.index(wanted.numpy().tobytes())
    content[start : start + 64] = bytes(byte ^ 255 for byte in content[start : start + 64])
    file.write_bytes(content)
    got = {f"model.{name}": torch.zeros_like(wanted)}
    load_tensors(got, storage_reader=FileSystemReader(path), no_dist=True)
    assert not got[f"model.{name}"].equal(wanted)


def test_a_damaged_one_is_set_aside_for_the_one_before(saved: tuple[Path, State]) -> None:
    folder, state = saved
    before = copy.deepcopy(state[0].state_dict())
    train(state, 2)
    save(folder, 3, state)
    flip(folder / "step-00000003" / "__0_0.distcp", 0.5)
    other, said = fresh(), []
    assert Checkpoints(folder).load(*other, said.append).step == 2
    assert all(value.equal(before[name]) for name, value in other[0].state_dict().items())
    assert re.search(r"step-00000003 is damaged: __0_0.distcp does not .* Continuing from step-00000002", said[0])
    assert sorted(os.listdir(folder)) == ["damaged-step-00000003", "step-00000002"]
    train(other, 2)
    save(folder, 3, other)
    assert load(folder, fresh()) == 3


@pytest.mark.parametrize("damage", ["truncated", "no tensors", "no header", "not JSON", "another JSON"])
def test_every_other_damage_is_refused(saved: tuple[Path, State], damage: str) -> None:
    folder, _ = saved
    tensors, header = (folder / "step-00000002" / name for name in ("__0_0.distcp", "checkpoint.json"))
    match damage:
        case "truncated":
            tensors.write_bytes(tensors.read_bytes()[:-1000])
        case "no tensors":
            tensors.unlink()
        case "no header":
            header.unlink()
        case "not JSON":
            header.write_text("{")
        case "another JSON":
            header.write_text("{}")
    state = fresh()
    with pytest.raises(CheckpointError, match=r"step-00000002 is damaged: .* to start over"):
        load(folder, state)
    assert_equal(state, fresh())


@pytest.mark.parametrize("changes", [{"num_hidden_layers": 1}, {"key_bias": False}, {"intermediate_size": 64}])
def test_the_checkpoint_of_another_model_is_refused(saved: tuple[Path, State], changes: dict[str, object]) -> None:
    other = fresh(**changes)
    with pytest.raises(CheckpointError, match="belongs to another model"):
        load(saved[0], other)
    assert_equal(other, fresh(**changes))


def test_a_full_disk_leaves_the_previous_one(disk_of: Callable[[int], Path]) -> None:
    disk, state = disk_of(700), fresh()
    train(state, 0)
    save(disk, 1, state)
    kept = fresh()
    train(kept, 0)
    train(state, 1)
    checkpoints = Checkpoints(disk)
    checkpoints.save(Place(2), *state)
    with pytest.raises(OutputError, match=r"Could not write .*step-00000002"):
        checkpoints.wait()
    assert not checkpoints.failed  # it was told
    assert os.listdir(disk) == ["step-00000001"]
    other = fresh()
    assert load(disk, other) == 1
    assert_equal(other, kept)


def test_saving_the_same_step_again_changes_nothing(saved: tuple[Path, State]) -> None:
    folder, state = saved
    before = [path.stat().st_mtime_ns for path in files_of(folder / "step-00000002")]
    save(folder, 2, state)
    assert [path.stat().st_mtime_ns for path in files_of(folder / "step-00000002")] == before


def test_what_a_kill_left_behind_goes(saved: tuple[Path, State]) -> None:
    folder, state = saved
    (folder / ".step-00000003-partial-x").mkdir()
    save(folder, 3, state)
    assert sorted(os.listdir(folder)) == ["step-00000002", "step-00000003"]


def test_weights_alone(saved: tuple[Path, State]) -> None:
    folder, state = saved
    weights = read_weights(folder / "step-00000002")
    parameters = dict(state[0].named_parameters())
    assert weights.keys() == parameters.keys()
    assert all(value.equal(parameters[name]) for name, value in weights.items())
    flip(folder / "step-00000002" / "__0_0.distcp", 0.5)
    with pytest.raises(CheckpointError, match=r"__0_0\.distcp does not match"):
        read_weights(folder / "step-00000002")


def test_any_module_can_be_saved(tmp_path: Path) -> None:
    layer = nn.Linear(3, 2)
    save(tmp_path, 1, (layer, torch.optim.SGD(layer.parameters(), lr=0.1)))  # type: ignore[arg-type]
    other = nn.Linear(3, 2)
    assert load(tmp_path, (other, torch.optim.SGD(other.parameters(), lr=0.1))) == 1  # type: ignore[arg-type]
    assert other.weight.equal(layer.weight)
