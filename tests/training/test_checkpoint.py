"""Checkpoints: bit for bit or refused, and never lost to the writing of the next one."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from power_retention.errors import CheckpointError, OutputError
from power_retention.models import PowerRetentionForCausalLM
from power_retention.training.checkpoint import load_latest, save_checkpoint
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


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Path, State]:
    state = fresh()
    train(state, 0, 1)
    save_checkpoint(tmp_path / "checkpoints", 2, *state)
    return tmp_path / "checkpoints", state


@pytest.mark.parametrize("layers_only", [False, True])
def test_a_round_trip_is_exact_and_continues_exactly(tmp_path: Path, layers_only: bool) -> None:
    state, other = fresh(), fresh()
    train(state, 0, 1, layers_only=layers_only)
    path = save_checkpoint(tmp_path, 2, *state)
    assert path.name == "step-00000002"
    train(other, 7)
    other = (other[0], torch.optim.AdamW(other[0].parameters(), lr=1e-2, fused=True))
    assert load_latest(tmp_path, *other) == 2
    assert_equal(other, state)
    for each in (state, other):
        train(each, 2, 3)
    assert_equal(other, state)


def test_no_checkpoint_is_step_zero(tmp_path: Path) -> None:
    state = fresh()
    assert load_latest(tmp_path / "nowhere", *state) == 0
    (tmp_path / "step-5").mkdir()
    (tmp_path / ".step-00000009-partial-x").mkdir()
    assert load_latest(tmp_path, *state) == 0
    assert_equal(state, fresh())


def test_the_newest_counts_and_older_ones_go(saved: tuple[Path, State]) -> None:
    folder, state = saved
    train(state, 2)
    save_checkpoint(folder, 3, *state)
    assert os.listdir(folder) == ["step-00000003"]
    other = fresh()
    assert load_latest(folder, *other) == 3
    assert_equal(other, state)


@pytest.mark.parametrize("place", [0.01, 0.3, 0.9999])
def test_one_flipped_bit_is_seen(saved: tuple[Path, State], place: float) -> None:
    folder, _ = saved
    path = folder / "step-00000002" / "tensors.safetensors"
    content = bytearray(path.read_bytes())
    content[int(place * len(content))] ^= 1
    path.write_bytes(content)
    state = fresh()
    with pytest.raises(CheckpointError, match=r"is damaged: .* does not match its checksum\. Delete .*step-00000002"):
        load_latest(folder, *state)
    assert_equal(state, fresh())


@pytest.mark.parametrize("damage", ["truncated", "no tensors", "no header", "not JSON", "another JSON"])
def test_every_other_damage_is_refused(saved: tuple[Path, State], damage: str) -> None:
    folder, _ = saved
    tensors, header = (folder / "step-00000002" / name for name in ("tensors.safetensors", "checkpoint.json"))
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
    with pytest.raises(CheckpointError, match=r"step-00000002 (cannot be read|is damaged)") as caught:
        load_latest(folder, *state)
    assert "to start over" in str(caught.value)
    assert_equal(state, fresh())


@pytest.mark.parametrize("changes", [{"num_hidden_layers": 1}, {"key_bias": False}, {"intermediate_size": 64}])
def test_the_checkpoint_of_another_model_is_refused(saved: tuple[Path, State], changes: dict[str, object]) -> None:
    other = fresh(**changes)
    with pytest.raises(CheckpointError, match="belongs to another model"):
        load_latest(saved[0], *other)
    assert_equal(other, fresh(**changes))


def test_a_full_disk_leaves_the_previous_one(disk_of: Callable[[int], Path]) -> None:
    disk, state = disk_of(300), fresh()
    train(state, 0)
    save_checkpoint(disk, 1, *state)
    kept = fresh()
    train(kept, 0)
    train(state, 1)
    with pytest.raises(OutputError, match=r"Could not write .*step-00000002"):
        save_checkpoint(disk, 2, *state)
    assert os.listdir(disk) == ["step-00000001"]
    other = fresh()
    assert load_latest(disk, *other) == 1
    assert_equal(other, kept)


def test_saving_the_same_step_again_changes_nothing(saved: tuple[Path, State]) -> None:
    folder, state = saved
    before = (folder / "step-00000002" / "tensors.safetensors").stat()
    save_checkpoint(folder, 2, *state)
    assert (folder / "step-00000002" / "tensors.safetensors").stat().st_mtime_ns == before.st_mtime_ns


def test_any_module_can_be_saved(tmp_path: Path) -> None:
    layer = nn.Linear(3, 2)
    save_checkpoint(tmp_path, 1, layer, torch.optim.SGD(layer.parameters(), lr=0.1))
    other = nn.Linear(3, 2)
    assert load_latest(tmp_path, other, torch.optim.SGD(other.parameters(), lr=0.1)) == 1
    assert other.weight.equal(layer.weight)
