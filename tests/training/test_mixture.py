"""Mixtures: what comes when is a function of seed, step and rank; each window once an epoch; nothing leaks across documents."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from power_retention.conversion.swap import swap_attention
from power_retention.errors import ArgumentError, DataError
from power_retention.training.mixture import NO_LABEL, Mixture, Phase, read_mixture, shuffled
from power_retention.training.parallel import Trunk
from power_retention.training.sharding import make_shards
from power_retention.training.shards import Shard, ShardedTokens
from power_retention.training.teaching import prepare_teacher, read_documents

LENGTH = 16


def tokens_of(path: Path, first: int, *shards: list[int], tokenizer: str = "same") -> ShardedTokens:
    """Shards of documents of these lengths; every token is another number, counted from ``first``."""
    made: list[Shard] = []
    for number, lengths in enumerate(shards):
        starts = np.cumsum([0, *lengths], dtype=np.int64)
        file = path / f"{first}-{number}.bin"
        (first + np.arange(starts[-1])).astype("<u4").tofile(file)
        made.append(Shard(file, "uint32", starts, f"{first}-{number}", 0))
        first += int(starts[-1])
    return ShardedTokens(made, tokenizer)


@pytest.fixture
def sources(tmp_path: Path) -> dict[str, ShardedTokens]:
    """320 tokens of web, 400 of code, 161 of books, in documents of many lengths."""
    return {
        "web": tokens_of(tmp_path, 10_000, [3, 20, 1, 40], [100, 1, 1, 154]),
        "code": tokens_of(tmp_path, 20_000, [400]),
        "books": tokens_of(tmp_path, 30_000, [16, 16, 16, 1], [112]),
    }


@pytest.fixture
def mixture(sources: dict[str, ShardedTokens]) -> Mixture:
    phases = [
        Phase({"web": 3, "code": 1}, tokens=40 * LENGTH),
        Phase({"web": 1, "code": 1, "books": 2}, tokens=100 * LENGTH),
        Phase({"books": 1}, tokens=7 * LENGTH),
    ]
    return Mixture(sources, phases)


def ids_by_step(mixture: Mixture, steps: range, **options: int) -> torch.Tensor:
    return torch.cat(
        [mixture.batch(step, **{"batch": 4, "length": LENGTH, "seed": 0, **options}).ids for step in steps]
    )


class TestShuffling:
    @given(st.integers(1, 700), st.integers(0, 5))
    def test_it_is_a_permutation(self, count: int, key: int) -> None:
        assert sorted(shuffled(place, count, str(key)) for place in range(count)) == list(range(count))

    def test_it_mixes(self) -> None:
        order = [shuffled(place, 4096, "a") for place in range(4096)]
        assert abs(np.corrcoef(order, range(4096))[0, 1]) < 0.1
        assert abs(np.corrcoef(order[1:], order[:-1])[0, 1]) < 0.1
        assert sum(b - a == 1 for a, b in pairwise(order)) < 20
        assert order != [shuffled(place, 4096, "b") for place in range(4096)]


class TestOrder:
    def test_phases_hold_what_they_promise(self, mixture: Mixture) -> None:
        def shares(numbers: range) -> Counter[str]:
            return Counter(mixture.place(number, length=LENGTH, seed=1)[0] for number in numbers)

        assert shares(range(40)) == {"web": 30, "code": 10}
        assert shares(range(40, 140)) == {"web": 25, "code": 25, "books": 50}
        assert shares(range(140, 147)) == {"books": 7}
        assert shares(range(147, 200)) == {"books": 53}  # the last phase is repeated
        assert 10 < shares(range(20))["web"] < 20  # mixed, not one after the other

    def test_each_window_once_an_epoch_across_phases(self, mixture: Mixture) -> None:
        drawn = [mixture.place(number, length=LENGTH, seed=1) for number in range(300)]
        for end in (40, 140, 147, 154, 161):  # a phase or a repetition of the last one is over
            for name, source in mixture.sources.items():
                seen = Counter(window for source_name, window in drawn[:end] if source_name == name)
                times = [seen[window] for window in range(len(source) // LENGTH)]
                assert max(times) - min(times) <= 1, (end, name)

    def test_blocks_keep_shares_and_epochs_in_step(self, sources: dict[str, ShardedTokens]) -> None:
        mixture = Mixture(sources, [Phase({"web": 700, "code": 299, "books": 1}, tokens=5000 * LENGTH)])
        drawn = [mixture.place(number, length=LENGTH, seed=1) for number in range(5000)]
        assert Counter(name for name, _ in drawn) == {"web": 3500, "code": 1495, "books": 5}
        for end in range(0, 5000, 100):
            seen = Counter(window for name, window in drawn[:end] if name == "web")
            assert abs(seen.total() - 0.7 * end) < 0.7 * 256
            times = [seen[window] for window in range(20)]
            assert min(times) >= (0.7 * end - 256) // 20
            assert max(times) <= (0.7 * end + 256) // 20 + 1

    def test_it_needs_no_state(self, mixture: Mixture, sources: dict[str, ShardedTokens]) -> None:
        straight = ids_by_step(mixture, range(50))
        fresh = Mixture(sources, mixture.phases)
        assert ids_by_step(fresh, range(30, 50)).equal(straight[120:])
        assert ids_by_step(fresh, range(7, 8)).equal(straight[28:32])
        assert not ids_by_step(fresh, range(50), seed=1).equal(straight)

    @pytest.mark.parametrize("ranks", [2, 4])
    def test_ranks_share_one_order(self, mixture: Mixture, ranks: int) -> None:
        whole = ids_by_step(mixture, range(20))
        parts = [
            mixture.batch(step, rank, ranks=ranks, batch=4 // ranks, length=LENGTH, seed=0).ids
            for step in range(20)
            for rank in range(ranks)
        ]
        assert torch.cat(parts).equal(whole)

    def test_the_order_is_a_contract(self, mixture: Mixture) -> None:
        """A run begun today must go on the same with another version, system or library."""
        places = [mixture.place(number, length=LENGTH, seed=3) for number in (0, 1, 2, 39, 40, 41, 146, 147)]
        assert places == CONTRACT

    def test_an_open_end_is_one_epoch_after_another(self, sources: dict[str, ShardedTokens]) -> None:
        mixture = Mixture({"web": sources["web"]}, [Phase({"web": 1.0})])
        for epoch in range(3):
            windows = [mixture.place(20 * epoch + i, length=LENGTH, seed=0)[1] for i in range(20)]
            assert sorted(windows) == list(range(20))

    def test_the_fingerprint(self, mixture: Mixture, sources: dict[str, ShardedTokens], tmp_path: Path) -> None:
        assert Mixture(sources, mixture.phases).fingerprint == mixture.fingerprint
        others = (
            Mixture(sources, mixture.phases[1:]),
            Mixture(sources, [Phase({"web": 3, "code": 2}, 40 * LENGTH), *mixture.phases[1:]]),
            Mixture({**sources, "web": tokens_of(tmp_path, 50_000, [320])}, mixture.phases),
        )
        assert len({mixture.fingerprint, *(other.fingerprint for other in others)}) == 4


class TestPacking:
    def test_every_piece_is_of_one_document(self, mixture: Mixture) -> None:
        for step in range(60):
            batch = mixture.batch(step, batch=4, length=LENGTH, seed=0)
            ids, labels, positions = (x.flatten() for x in (batch.ids, batch.labels, batch.position_ids))
            borders = batch.cu_seqlens.tolist()
            assert borders[0] == 0
            assert borders[-1] == len(ids)
            assert set(range(0, len(ids), LENGTH)) <= set(borders)
            for start, stop in pairwise(borders):
                document = {document_of(mixture, int(token)) for token in ids[start:stop]}
                assert len(document) == 1
                assert ids[start:stop].diff().eq(1).all()
                assert positions[start:stop].tolist() == list(range(stop - start))
                for at in range(start, stop):
                    follower = int(ids[at]) + 1
                    same = document_of(mixture, follower) in document
                    assert int(labels[at]) == (follower if same else NO_LABEL)

    def test_a_model_reads_each_document_as_if_alone(
        self, stories_dir: Path, stories_text: Path, tmp_path: Path
    ) -> None:
        make_shards([str(stories_text)], str(stories_dir), tmp_path / "shards", held_out=0)
        batch = read_mixture(tmp_path / "shards").batch(3, batch=2, length=256, seed=0)
        assert len(batch.cu_seqlens) > 3
        theirs = AutoModelForCausalLM.from_pretrained(stories_dir).double().eval()
        teacher = AutoModelForCausalLM.from_pretrained(stories_dir)
        prepare_teacher(teacher, torch.float64)
        with torch.no_grad():
            packed = teacher.lm_head(
                read_documents(Trunk(teacher), batch.ids, batch.position_ids, batch.cu_seqlens)
            ).flatten(0, 1)
            student = swap_attention(AutoModelForCausalLM.from_pretrained(stories_dir).double())
            ours = student(batch.ids, position_ids=batch.position_ids, document_starts=batch.document_starts)
            ours = ours.logits.flatten(0, 1)
            for start, stop in zip(batch.cu_seqlens[:-1].tolist(), batch.cu_seqlens[1:].tolist(), strict=True):
                alone = batch.ids.flatten()[None, start:stop]
                assert torch.allclose(packed[start:stop], theirs(alone).logits[0], atol=1e-9)
                assert torch.allclose(ours[start:stop], student(alone, use_cache=False).logits[0], atol=1e-6)


def document_of(mixture: Mixture, token: int) -> tuple[int, int]:
    """(source, document of it) of a token that ``tokens_of`` made, whose number is its place."""
    number = token // 10_000
    source = mixture.sources[["web", "code", "books"][number - 1]]
    borders, total = [], 0
    for shard in source.shards:
        borders += [int(start) + total for start in shard.starts[:-1]]
        total += shard.tokens
    place = token - 10_000 * number
    return (number, sum(border <= place for border in borders)) if place < total else (number, -1)


class TestFile:
    @pytest.fixture
    def folder(self, stories_dir: Path, stories_text: Path, tmp_path: Path) -> Path:
        for name in ("a", "b"):
            make_shards([str(stories_text)], str(stories_dir), tmp_path / name, shard_bytes=100_000)
        return tmp_path

    def write(self, folder: Path, content: str) -> Path:
        (folder / "mixture.toml").write_text(content)
        return folder / "mixture.toml"

    def test_it_says_what_is_trained_on(self, folder: Path) -> None:
        path = self.write(
            folder,
            '[sources]\nx = "a"\ny = "b"\n[[phase]]\ntokens = 6_400\nweights = {x = 1}\n'
            '[[phase]]\nname = "then"\nweights = {x = 0.5, y = 0.5}',
        )
        mixture = read_mixture(path)
        assert [mixture.place(n, length=64, seed=0)[0] for n in range(100)] == ["x"] * 100
        assert {mixture.place(n, length=64, seed=0)[0] for n in range(100, 150)} == {"x", "y"}
        assert mixture.phases[1] == Phase({"x": 0.5, "y": 0.5}, None, "then")

    def test_damage_by_policy(self, folder: Path) -> None:
        with (folder / "b" / "shard-00001.bin").open("r+b") as file:
            file.write(b"\xff\xff\xff")
        content = '[sources]\nx = "a"\ny = "b"\n[[phase]]\nweights = {x = 1, y = 1}'
        with pytest.raises(DataError, match=r"shard-00001: .*damaged"):
            read_mixture(self.write(folder, content))
        mixture = read_mixture(self.write(folder, f'on_damage = "skip"\n{content}'))
        assert not mixture.sources["x"].damage
        assert len(mixture.sources["y"].damage) == 1
        assert len(mixture.sources["y"]) < len(mixture.sources["x"])
        mixture.batch(0, batch=1, length=64, seed=0)
        with pytest.raises(DataError, match=r"shard-00001: .*damaged"):
            read_mixture(folder / "mixture.toml", on_damage="fail")
        read_mixture(self.write(folder, content), on_damage="skip")
        read_mixture(self.write(folder, f'on_damage = "fail"\n{content}'), on_damage="skip")

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            ("[sources", "is not TOML"),
            ('[source]\na = "a"', "has 'source'; it may have"),
            ("[[phase]]\nweights = {a = 1}", r"needs a table \[sources\]"),
            ('[sources]\na = "a"', r"at least one table \[\[phase\]\]"),
            ('[sources]\na = "a"\n[[phase]]\nweigths = {a = 1}', "phase 1, has 'weigths'"),
            ('[sources]\na = "a"\n[[phase]]\ntokens = 5', "phase 1, needs weights such as"),
            ('[sources]\na = "a"\n[[phase]]\ntokens = 1.5\nweights = {a = 1}', "has tokens 1.5; a whole number"),
            ('[sources]\na = "a"\n[[phase]]\nweights = {b = 1}', "weight for 'b'; the sources are 'a'"),
            ('[sources]\na = "a"\n[[phase]]\nweights = {a = 0}', "one above it"),
            ('[sources]\na = "a"\n[[phase]]\nweights = {a = nan}', "at least 0"),
            ('[sources]\na = "a"\n[[phase]]\nweights = {a = inf}', "their sum finite"),
            ('[sources]\na = "a"\nb = "b"\n[[phase]]\nweights = {a = 1e308, b = 1e308}', "their sum finite"),
            ('[sources]\na = "a"\n[[phase]]\nweights = {a = 1}\n[[phase]]\nweights = {a = 1}', "only the last phase"),
            ('[sources]\na = "c"\n[[phase]]\nweights = {a = 1}', "holds no token shards"),
            ('on_damage = 1\n[sources]\na = "a"\n[[phase]]\nweights = {a = 1}', "must be 'fail' or 'skip'"),
        ],
    )
    def test_mistakes(self, folder: Path, content: str, message: str) -> None:
        with pytest.raises(DataError, match=message):
            read_mixture(self.write(folder, content))

    def test_no_file(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match="cannot be read: No such file"):
            read_mixture(tmp_path / "no.toml")


def test_what_cannot_be_drawn(mixture: Mixture, sources: dict[str, ShardedTokens], tmp_path: Path) -> None:
    with pytest.raises(DataError, match="'books' has 161 tokens and one sequence takes 162"):
        mixture.batch(0, batch=1, length=162, seed=0)
    with pytest.raises(DataError, match="shorter than one sequence"):
        Mixture(sources, [Phase({"web": 1}, 5)]).batch(0, batch=1, length=8, seed=0)
    with pytest.raises(DataError, match=r"'web' and 'other' were made with different tokenizers \(same, else\)"):
        Mixture({"web": sources["web"], "other": tokens_of(tmp_path, 0, [9], tokenizer="else")}, [Phase({"web": 1})])
    for options in ({"rank": 1}, {"ranks": 0}, {"step": -1}, {"length": 0}):
        with pytest.raises(ArgumentError, match="must be at least 1"):
            mixture.batch(**{"step": 0, "batch": 1, "length": 8, "seed": 0, **options})


CONTRACT = [("web", 16), ("web", 5), ("code", 20), ("web", 16), ("books", 0), ("web", 14), ("books", 6), ("books", 5)]
