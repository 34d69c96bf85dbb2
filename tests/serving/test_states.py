"""A directory of states with names: what it gives back, what it refuses, who sees what."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path

import pytest
import torch

from power_retention.errors import OutputError, SourceError, StateError
from power_retention.files import UNFINISHED
from power_retention.models import BrumbyConfig, BrumbyForCausalLM, PowerRetentionCache, PowerRetentionForCausalLM
from power_retention.models.fingerprint import fingerprint_folder, fingerprint_model
from power_retention.ops import PowerState
from power_retention.serving.states import SUFFIX, FullDirectory, MissingState, StateDirectory, owner_of
from tiny_models import randomise, tiny_config, tiny_model, tokens

MODEL = "weights-sample:0"


def states(seed: int = 0, layers: int = 2) -> list[PowerState]:
    generator = torch.Generator().manual_seed(seed)
    shape = (1, 2, 36, 8)
    return [
        PowerState(torch.randn(shape, generator=generator), torch.randn(shape[:3], generator=generator), 2, 8)
        for _ in range(layers)
    ]


def save(directory: StateDirectory, name: str, seed: int = 0) -> None:
    directory.save(name, states(seed), model=MODEL, tokens_seen=seed + 1)


def test_saved_listed_forked_deleted(tmp_path: Path) -> None:
    directory = StateDirectory(tmp_path / "states")
    assert directory.list() == []
    save(directory, "book", seed=3)
    directory.fork("book", "for-anna")
    assert {state.name for state in directory.list()} == {"book", "for-anna"}
    found, header = directory.load("for-anna", model=MODEL)
    for one, other in zip(found, states(3), strict=True):
        assert torch.equal(one.memory, other.memory)
        assert torch.equal(one.normalizer, other.normalizer)
    assert header.tokens_seen == 4
    assert header.extra["forked_from"] == directory.inspect("book").header.checksum
    directory.delete("book")
    assert [state.name for state in directory.list()] == ["for-anna"]
    with pytest.raises(MissingState, match="no state called 'book'"):
        directory.load("book")


@pytest.mark.parametrize(
    "name", ["", ".", "..", "../x", "a/b", "/etc/passwd", ".hidden", "a\0b", "a" * 101, "ä", "a\n", 3]
)
def test_names_stay_in_the_directory(name: str, tmp_path: Path) -> None:
    directory = StateDirectory(tmp_path / "states")
    for use in (
        directory.path_of,
        directory.inspect,
        directory.load,
        directory.delete,
        lambda n: directory.fork(n, "x"),
    ):
        with pytest.raises(StateError, match="no name of a state"):
            use(name)
    with pytest.raises(StateError, match="no name of a state"):
        save(directory, name)


def test_links_are_not_followed(tmp_path: Path) -> None:
    outside, directory = StateDirectory(tmp_path / "outside"), StateDirectory(tmp_path / "states")
    save(outside, "secret")
    save(directory, "own")
    (directory.path / "link.state").symlink_to(outside.path / "secret.state")
    with pytest.raises(MissingState):
        directory.load("link")
    assert [state.name for state in directory.list()] == ["own"]


def test_owners_do_not_see_each_other(tmp_path: Path) -> None:
    shared = StateDirectory(tmp_path)
    anna, ben = (StateDirectory(tmp_path, owner=owner_of(key)) for key in ("key of anna", "key of ben"))
    save(anna, "diary")
    assert [state.name for state in anna.list()] == ["diary"]
    assert ben.list() == shared.list() == []
    for other in (ben, shared):
        with pytest.raises(MissingState):
            other.load("diary")
    assert "anna" not in str(anna.path)
    with pytest.raises(StateError, match="no owner"):
        StateDirectory(tmp_path, owner="../anna")


def test_counts_and_sizes_are_capped(tmp_path: Path) -> None:
    few = StateDirectory(tmp_path / "few", max_states=2)
    save(few, "a")
    save(few, "b")
    save(few, "b", seed=7)  # takes the place of the other
    for attempt in (lambda: save(few, "c"), lambda: few.fork("a", "c")):
        with pytest.raises(FullDirectory, match="2 are kept already"):
            attempt()
    size = few.inspect("a").nbytes
    small = StateDirectory(tmp_path / "small", max_bytes=2 * size)
    save(small, "a")
    save(small, "b")
    with pytest.raises(FullDirectory, match="Delete some states first"):
        save(small, "c")
    small.delete("a")
    save(small, "c")


def test_damaged_altered_and_foreign_states_are_refused(tmp_path: Path) -> None:
    directory = StateDirectory(tmp_path)
    save(directory, "book")
    path = directory.existing("book")
    assert directory.verify("book", model=MODEL).tokens_seen == 1
    with pytest.raises(StateError, match="belongs to the model"):
        directory.load("book", model="weights-sample:1")
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)  # checked a moment ago, but this is another version of it
    with pytest.raises(StateError, match="altered"):
        directory.load("book", model=MODEL)
    path.write_bytes(content[:-10])
    with pytest.raises(StateError, match="damaged"):
        directory.verify("book")
    assert directory.list() == []


def test_a_full_disk_leaves_what_was_there(tmp_path: Path, disk_of) -> None:
    directory = StateDirectory(disk_of(16) / "states")
    save(directory, "book")
    with pytest.raises(OutputError):
        directory.save("book", states(1, layers=6), model=MODEL, tokens_seen=9)
    assert directory.load("book", model=MODEL)[1].tokens_seen == 1


def test_one_format_with_the_cache(tmp_path: Path) -> None:
    model = tiny_model()
    directory = StateDirectory(tmp_path)
    cache = PowerRetentionCache(model.config.num_hidden_layers)
    with torch.inference_mode():
        model(tokens(1, 40), past_key_values=cache)
    cache.save(directory.path_of("book"), model)
    found, header = directory.load("book", model=fingerprint_model(model))
    assert header.tokens_seen == 40
    directory.save("copy", found, model=header.model, tokens_seen=header.tokens_seen)
    loaded = PowerRetentionCache.load(directory.existing("copy"), model)
    with torch.inference_mode():
        torch.testing.assert_close(
            model(tokens(1, 3), past_key_values=loaded).logits, model(tokens(1, 3), past_key_values=cache).logits
        )


@pytest.mark.parametrize("tied", [False, True])
def test_a_folder_has_the_fingerprint_of_its_model(tied: bool, tmp_path: Path) -> None:
    model = randomise(PowerRetentionForCausalLM(tiny_config(tie_word_embeddings=tied)))
    model.save_pretrained(tmp_path / "one")
    model.save_pretrained(tmp_path / "pieces", max_shard_size="10KB")
    model.bfloat16().save_pretrained(tmp_path / "half")
    # What converted folders keep beside the model is not the model.
    shutil.copy(tmp_path / "one" / "model.safetensors", tmp_path / "half" / "calibration.safetensors")
    assert len(list((tmp_path / "pieces").glob("*.safetensors"))) > 1
    for folder in ("one", "pieces", "half"):
        assert fingerprint_folder(tmp_path / folder) == fingerprint_model(model)
    other = randomise(PowerRetentionForCausalLM(tiny_config(tie_word_embeddings=tied)), seed=1)
    assert fingerprint_model(other) != fingerprint_model(model)


def test_a_published_folder_has_the_fingerprint_of_its_model(tmp_path: Path) -> None:
    shape = {name: value for name, value in tiny_config().to_dict().items() if name in ("vocab_size", "hidden_size")}
    config = BrumbyConfig(**shape, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2, head_dim=8)
    model = randomise(BrumbyForCausalLM(config))
    model.save_pretrained(tmp_path)
    assert fingerprint_folder(tmp_path) == fingerprint_model(model)


def test_folders_without_a_fingerprint_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="no model that can be read"):
        fingerprint_folder(tmp_path)
    model = randomise(
        PowerRetentionForCausalLM(tiny_config(num_local_experts=4, num_experts_per_tok=2, moe_intermediate_size=16))
    )
    model.save_pretrained(tmp_path)
    with pytest.raises(SourceError, match="experts"):
        fingerprint_folder(tmp_path)


def test_what_killed_processes_left_is_removed_once_it_is_old(tmp_path: Path) -> None:
    """Of all owners; what others are at work on stays, and so do states."""
    for owner in ("", owner_of("key")):
        directory = StateDirectory(tmp_path / "states", owner=owner)
        save(directory, "book")
        pinned, partial = directory.pin("book"), directory.path / f".book{SUFFIX}.1a2b3c4d{UNFINISHED}"
        partial.write_bytes(b"half of it")
    everything = StateDirectory(tmp_path / "states")
    everything.remove_remains()
    assert pinned.exists()
    assert partial.exists()
    time.sleep(0.05)
    everything.remove_remains(unfinished=0.01)
    assert pinned.exists()
    assert not list(everything.path.glob(f"**/*{UNFINISHED}"))
    everything.remove_remains(pinned=0.01)
    left = sorted(path.name for path in everything.path.glob("**/*") if path.is_file())
    assert left == ["book.state", "book.state"]


def test_a_file_that_could_not_be_finished_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk, seen where the file is made safe: refused, what was there is unchanged, nothing hidden stays."""
    directory = StateDirectory(tmp_path / "states")
    save(directory, "book", seed=1)

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    for attempt in (lambda: save(directory, "book", seed=2), lambda: directory.fork("book", "copy")):
        with pytest.raises(FullDirectory, match=r"the disk is full.*Delete some") as caught:
            attempt()
        assert str(tmp_path) not in str(caught.value)
    assert directory.inspect("book").header.tokens_seen == 2
    assert [path.name for path in directory.path.iterdir()] == ["book.state"]
