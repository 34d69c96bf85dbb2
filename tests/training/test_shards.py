"""Token shards: what goes in comes out, whatever the form of the text, the number of processes and the kills between."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from power_retention.conversion.source import fingerprint_tokenizer, open_tokenizer
from power_retention.errors import ArgumentError, DataError, OutputError, SourceError
from power_retention.files import held_folder
from power_retention.training.sharding import ShardingProgress, make_shards
from power_retention.training.shards import healthy_shards, open_shards, read_plan, read_shard
from power_retention.training.sources import find_pieces, read_piece
from power_retention.training.text import read_documents, split_held_out, tokenize

SHARD_BYTES = 40_000


@pytest.fixture(scope="module")
def stories(stories_text: Path) -> list[str]:
    return read_documents([stories_text])


@pytest.fixture(scope="module")
def tokenizer(stories_dir: Path) -> PreTrainedTokenizerBase:
    return open_tokenizer(stories_dir)


@pytest.fixture(scope="module")
def made(stories_text: Path, stories_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of all stories; not to be written to."""
    out = tmp_path_factory.mktemp("data") / "shards"
    make_shards([str(stories_text)], str(stories_dir), out, held_out=0, shard_bytes=SHARD_BYTES)
    return out


@pytest.fixture
def copy(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "shards"))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("shard-*"))}


def flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def texts_of(*sources: Path | str, field: str = "text", **options: object) -> list[str]:
    pieces = find_pieces([str(source) for source in sources], **options)  # type: ignore[arg-type]
    return [text for piece in pieces for text in read_piece(piece, field)]


class TestSources:
    @pytest.mark.parametrize("piece_bytes", [1, 7, 1000, 65_536, 1 << 30])
    def test_lines_are_read_once_wherever_the_file_is_cut(
        self, stories_text: Path, stories: list[str], tmp_path: Path, piece_bytes: int
    ) -> None:
        path = tmp_path / "few.jsonl"
        few = stories[:3] if piece_bytes < 1000 else stories
        path.write_bytes(b"\xef\xbb\xbf" + "\n\n".join(json.dumps({"text": text}) for text in few).encode())
        assert len(find_pieces([str(path)], piece_bytes=piece_bytes)) == -(-path.stat().st_size // piece_bytes)
        assert texts_of(path, piece_bytes=piece_bytes) == few

    def test_parquet(self, stories: list[str], tmp_path: Path) -> None:
        pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        path = tmp_path / "a" / "stories.parquet"
        path.parent.mkdir()
        table = pa.table({"content": [*stories, None, "  "], "id": range(len(stories) + 2)})
        parquet.write_table(table, path, row_group_size=32)
        assert texts_of(tmp_path, field="content", piece_bytes=1) == stories
        assert len(find_pieces([str(path)], piece_bytes=1)) == 10
        with pytest.raises(DataError, match=r"no column 'text'; its columns are 'content', 'id'"):
            texts_of(path)
        path.write_bytes(path.read_bytes()[:-100])
        with pytest.raises(DataError, match=r"stories\.parquet is not a Parquet file, or is damaged"):
            texts_of(path)

    def test_a_saved_dataset(self, stories: list[str], tmp_path: Path) -> None:
        datasets = pytest.importorskip("datasets")
        both = datasets.DatasetDict(
            {
                "train": datasets.Dataset.from_dict({"text": stories}),
                "test": datasets.Dataset.from_dict({"text": stories}).select([3, 1]),
            }
        )
        both.save_to_disk(tmp_path / "set", num_shards={"train": 2, "test": 1})
        assert texts_of(tmp_path / "set") == stories
        assert texts_of(tmp_path / "set", split="test") == [stories[3], stories[1]]
        assert texts_of(tmp_path / "set" / "train") == stories
        assert texts_of(f"{tmp_path}/s*") == stories
        assert texts_of(f"{tmp_path}/set/train/*.arrow") == stories
        with pytest.raises(DataError, match=r"no split 'dev'; it has test, train"):
            texts_of(tmp_path / "set", split="dev")

    def test_a_dataset_by_name(
        self, stories: list[str], stories_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        # What datasets loads by name from the working folder, it loads from the hub the same way.
        datasets = pytest.importorskip("datasets")
        (tmp_path / "owner" / "name").mkdir(parents=True)
        shutil.copy(stories_text, tmp_path / "owner" / "name" / "train.jsonl")
        load = datasets.load_dataset
        monkeypatch.setattr(
            datasets,
            "load_dataset",
            lambda name, split: load(str(tmp_path / name), split=split, cache_dir=str(tmp_path / "cache")),
        )
        assert texts_of("owner/name") == stories
        with pytest.raises(DataError, match="no dataset of that name could be fetched with split 'dev'"):
            texts_of("owner/name", split="dev")

    def test_folders_globs_and_order(self, tmp_path: Path) -> None:
        for name in ("b.txt", "a.md", "deep/c.txt", "deep/d.bin", ".hidden.txt"):
            path = tmp_path / name
            path.parent.mkdir(exist_ok=True)
            path.write_text(name)
        assert texts_of(tmp_path) == ["a.md", "b.txt", "deep/c.txt"]
        assert texts_of(f"{tmp_path}/**/*.txt") == ["b.txt", "deep/c.txt"]
        assert texts_of(f"{tmp_path}/*") == ["a.md", "b.txt", "deep/c.txt"]
        (tmp_path / "deep" / "d.bin").rename(tmp_path / "d.bin")
        assert texts_of(f"{tmp_path}/deep/**") == ["deep/c.txt"]  # matched twice
        (tmp_path / "d.bin").rename(tmp_path / "deep" / "d.bin")
        for source, message in (
            (f"{tmp_path}/*.nothing", "holds no file that ends in"),
            (f"{tmp_path}/deep/d.bin", "is not a text file"),
            (f"{tmp_path}/x.txt", "does not exist"),
        ):
            with pytest.raises(DataError, match=message):
                find_pieces([source])

    def test_a_damaged_line_is_named(self, tmp_path: Path) -> None:
        path = tmp_path / "a.jsonl"
        path.write_text('"one"\n{"text": \n')
        with pytest.raises(DataError, match=r"a\.jsonl, line at byte 6, is not JSON"):
            texts_of(path)


class TestMaking:
    def test_they_hold_the_tokens_of_the_text(
        self, made: Path, stories: list[str], tokenizer: PreTrainedTokenizerBase
    ) -> None:
        wanted, tokens = tokenize(stories, tokenizer), open_shards(made)
        ids, starts = tokens.read(0, len(tokens))
        assert ids.tolist() == wanted.ids.tolist()
        assert starts.tolist() == wanted.starts[:-1].tolist()
        assert len(tokens.shards) > 3
        assert {shard.dtype for shard in tokens.shards} == {"uint16"}
        assert tokens.tokenizer == fingerprint_tokenizer(tokenizer)
        for start, stop in ((0, 1), (5, 1000), (tokens.shards[0].tokens - 1, tokens.shards[0].tokens + 1)):
            ids, starts = tokens.read(start, stop)
            assert ids.tolist() == wanted.ids[start:stop].tolist()
            inside = wanted.starts[(wanted.starts >= start) & (wanted.starts < stop)]
            assert starts.tolist() == (inside - start).tolist()

    def test_a_large_vocabulary_takes_four_bytes(self, smollm2_gguf: Path, tmp_path: Path) -> None:
        tokenizer = open_tokenizer(smollm2_gguf)
        assert len(tokenizer) == 49152
        tokenizer.add_tokens([f"<extra-{i}>" for i in range(20_000)])
        tokenizer.save_pretrained(tmp_path / "large")
        (tmp_path / "a.txt").write_text("The whale <extra-19999>")
        make_shards([str(tmp_path / "a.txt")], str(tmp_path / "large"), tmp_path / "out", held_out=0)
        tokens = open_shards(tmp_path / "out")
        assert tokens.shards[0].dtype == "uint32"
        assert 69_151 in tokens.read(0, len(tokens))[0]

    def test_processes_change_nothing(
        self, made: Path, stories_text: Path, stories_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.delenv("TOKENIZERS_PARALLELISM", raising=False)
        seen: list[ShardingProgress] = []
        make_shards(
            [str(stories_text)],
            str(stories_dir),
            tmp_path / "out",
            held_out=0,
            shard_bytes=SHARD_BYTES,
            workers=2,
            watch=seen.append,
        )
        assert contents(tmp_path / "out") == contents(made)
        assert [progress.done for progress in seen] == list(range(1, seen[0].shards + 1))
        assert seen[-1].tokens == len(open_shards(made))
        assert "TOKENIZERS_PARALLELISM" not in os.environ

    def test_what_evaluate_holds_out_is_not_in_them(
        self,
        stories_text: Path,
        stories_dir: Path,
        stories: list[str],
        tokenizer: PreTrainedTokenizerBase,
        tmp_path: Path,
    ) -> None:
        make_shards([str(stories_text)], str(stories_dir), tmp_path / "out")
        tokens = open_shards(tmp_path / "out")
        train, held_out = split_held_out(stories)
        assert held_out
        assert tokens.read(0, len(tokens))[0].tolist() == tokenize(train, tokenizer).ids.tolist()

    def test_killed_it_goes_on_with_the_shard_it_was_in(
        self, made: Path, stories_text: Path, stories_dir: Path, tmp_path: Path
    ) -> None:
        out = tmp_path / "out"
        script = (
            "import sys; from power_retention.training.sharding import make_shards\n"
            f"make_shards([sys.argv[1]], sys.argv[2], __import__('pathlib').Path(sys.argv[3]), held_out=0, "
            f"shard_bytes={SHARD_BYTES}, watch=lambda progress: __import__('time').sleep(60))"
        )
        process = subprocess.Popen([sys.executable, "-c", script, stories_text, stories_dir, out])
        while not (out / "shard-00000.json").exists():
            assert process.poll() is None
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
        process.wait()
        first = (out / "shard-00000.bin").stat().st_mtime_ns
        (out / ".shard-00001.bin.0123abcd.tmp").write_bytes(b"half")  # as a kill amid writing leaves it
        shutil.copy(made / "shard-00002.bin", out)  # ids without an index: not finished
        flip(out / "shard-00002.bin", 10)
        progress = make_shards([str(stories_text)], str(stories_dir), out, held_out=0, shard_bytes=SHARD_BYTES)
        assert progress.kept == 1
        assert progress.done == progress.shards
        assert contents(out) == contents(made)
        assert (out / "shard-00000.bin").stat().st_mtime_ns == first
        assert not [name for name in os.listdir(out) if name.endswith(".tmp")]

    def test_a_damaged_shard_is_made_again(self, copy: Path, made: Path, stories_text: Path, stories_dir: Path) -> None:
        flip(copy / "shard-00001.bin", 100)
        progress = make_shards([str(stories_text)], str(stories_dir), copy, held_out=0, shard_bytes=SHARD_BYTES)
        assert progress.kept == progress.shards - 1
        assert contents(copy) == contents(made)

    def test_a_bad_piece_costs_only_its_shard(self, stories_text: Path, stories_dir: Path, tmp_path: Path) -> None:
        bad = tmp_path / "bad.jsonl"
        bad.write_text('{"text": 1}\n')
        with pytest.raises(DataError, match=r"shard-00000: DataError: .*bad\.jsonl, line at byte 0 holds a int"):
            make_shards([str(bad), str(stories_text)], str(stories_dir), tmp_path / "out", shard_bytes=SHARD_BYTES)
        shards, damage = healthy_shards(read_plan(tmp_path / "out"))
        assert len(shards) > 3
        assert len(damage) == 1
        assert "shard-00000.json is missing" in damage[0]

    def test_a_bad_piece_put_right_is_made(self, stories_text: Path, stories_dir: Path, tmp_path: Path) -> None:
        """It has another length then, and may fall into other parts."""
        bad, out = tmp_path / "bad.jsonl", tmp_path / "out"

        def make() -> ShardingProgress:
            sources = [str(bad), str(stories_text)]
            return make_shards(sources, str(stories_dir), out, held_out=0, shard_bytes=SHARD_BYTES)

        bad.write_text('{"text": 1}\n')
        with pytest.raises(DataError, match="put it right and run the same command again"):
            make()
        before = contents(out)
        bad.write_text('{"text": "Once upon a time there was a cat."}\n' * 2000)
        made = make()
        assert made.kept == made.shards - 1
        assert contents(out).items() > before.items()
        assert sum(shard.documents for shard in open_shards(out).shards) == 2300
        assert make().kept == made.shards
        bad.write_text('{"text": "Another."}\n')
        with pytest.raises(OutputError, match=r"begun with other files .*changed though a finished shard"):
            make()

    def test_white_space_is_no_damage(self, stories_dir: Path, tmp_path: Path) -> None:
        text = tmp_path / "text"
        text.mkdir()
        for name, content in (("a.txt", " \n\n"), ("b.md", "\t"), ("c.txt", "Once upon a time.")):
            (text / name).write_text(content)
        make_shards([str(text)], str(stories_dir), tmp_path / "out", held_out=0)
        assert sum(shard.documents for shard in open_shards(tmp_path / "out").shards) == 1

    @pytest.mark.parametrize(("name", "content"), [("a.txt", " \n"), ("a.jsonl", ""), ("a.jsonl", '{"text": ""}')])
    def test_no_token_at_all(self, stories_dir: Path, tmp_path: Path, name: str, content: str) -> None:
        (tmp_path / name).write_text(content)
        with pytest.raises(DataError, match=r"holds no document|no token: every document is empty or held out"):
            make_shards([str(tmp_path / name)], str(stories_dir), tmp_path / "out")

    def test_one_process_at_a_time(self, stories_text: Path, stories_dir: Path, tmp_path: Path) -> None:
        out = tmp_path / "out"
        with held_folder(out), pytest.raises(OutputError, match="is being written by another process"):
            make_shards([str(stories_text)], str(stories_dir), out)
        make_shards([str(stories_text)], str(stories_dir), out)

    def test_other_settings_do_not_mix(
        self, copy: Path, stories_text: Path, stories_dir: Path, smollm2_gguf: Path, tmp_path: Path
    ) -> None:
        def again(tokenizer: Path = stories_dir, out: Path = copy, **options: float) -> None:
            make_shards([str(stories_text)], str(tokenizer), out, **{"held_out": 0, **options})  # type: ignore[arg-type]

        before = contents(copy)
        with pytest.raises(OutputError, match="begun with other shards"):
            again(shard_bytes=SHARD_BYTES // 2)
        with pytest.raises(OutputError, match="begun with other held out"):
            again(held_out=0.1, shard_bytes=SHARD_BYTES)
        with pytest.raises(OutputError, match="begun with other tokenizer"):
            again(smollm2_gguf, shard_bytes=SHARD_BYTES)
        with pytest.raises(OutputError, match="already holds something else"):
            again(out=stories_dir)
        with pytest.raises(ArgumentError, match="below 1"):
            again(held_out=1.0)
        with pytest.raises(SourceError, match="has no tokenizer"):
            again(tmp_path)
        assert contents(copy) == before

    def test_a_full_disk(
        self, made: Path, stories_text: Path, stories_dir: Path, disk_of: Callable[[int], Path]
    ) -> None:
        beside = sum(path.stat().st_size for path in made.rglob("*") if path.is_file() and "shard-" not in path.name)
        out = disk_of(beside // 1000 + 120) / "out"
        with pytest.raises(OutputError, match=r"Could not write .*No space left"):
            make_shards([str(stories_text)], str(stories_dir), out, shard_bytes=SHARD_BYTES)
        assert not [name for name in os.listdir(out) if name.endswith(".tmp")]
        shards, damage = healthy_shards(read_plan(out))
        assert shards
        assert all("is missing" in sentence for sentence in damage)


class TestDamage:
    def test_every_flipped_bit_is_found_and_named(self, copy: Path) -> None:
        path = copy / "shard-00002.bin"
        for at in np.random.default_rng(0).integers(path.stat().st_size, size=20):
            flip(path, int(at))
            with pytest.raises(
                DataError, match=r"1 of \d+ shards cannot be used: shard-00002: .*do not match the checksum"
            ):
                open_shards(copy)
            flip(path, int(at))
        open_shards(copy)

    def test_in_the_index_too(self, copy: Path) -> None:
        path = copy / "shard-00001.json"
        index = json.loads(path.read_text())
        first, second, *rest = index["lengths"]
        for changes in (
            {"lengths": [first - 1, second + 1, *rest]},
            {"lengths": [first + 1, second, *rest]},
            {"lengths": "none"},
            {"tokenizer": "another"},
            {"dtype": "uint32"},
            {"tokens": None},
        ):
            path.write_text(json.dumps(index | changes))
            with pytest.raises(DataError, match="shard-00001"):
                open_shards(copy)
        path.write_text(path.read_text()[:100])
        with pytest.raises(DataError, match=r"shard-00001\.json is damaged"):
            open_shards(copy)

    @pytest.mark.parametrize("name", ["shard-00001.bin", "shard-00001.json"])
    def test_missing_or_cut_short(self, copy: Path, name: str) -> None:
        content = (copy / name).read_bytes()
        (copy / name).write_bytes(content[:-2])
        with pytest.raises(DataError, match=r"shard-00001.* is damaged"):
            open_shards(copy, checksums=False)
        (copy / name).unlink()
        with pytest.raises(DataError, match=rf"{name} is missing"):
            open_shards(copy, checksums=False)

    def test_skipping_goes_on_without_it(self, copy: Path, made: Path) -> None:
        flip(copy / "shard-00001.bin", 5)
        tokens, whole = open_shards(copy, on_damage="skip"), open_shards(made)
        lost = read_shard(read_plan(made), 1)
        assert len(tokens.damage) == 1
        assert tokens.damage[0].startswith("shard-00001: ")
        assert len(tokens) == len(whole) - lost.tokens
        assert tokens.fingerprint != whole.fingerprint
        at = tokens.shards[0].tokens
        assert tokens.read(at, at + 9)[0].tolist() == whole.read(at + lost.tokens, at + lost.tokens + 9)[0].tolist()

    def test_nothing_left(self, copy: Path, tmp_path: Path) -> None:
        for path in copy.glob("*.bin"):
            path.unlink()
        with pytest.raises(DataError, match="holds no tokens"):
            open_shards(copy, on_damage="skip")
        with pytest.raises(DataError, match="holds no token shards"):
            open_shards(tmp_path)
        (copy / "shards.json").write_text("[]")
        with pytest.raises(DataError, match=r"shards\.json is damaged"):
            open_shards(copy)
        with pytest.raises(ArgumentError, match="must be 'fail' or 'skip'"):
            open_shards(copy, on_damage="ignore")  # type: ignore[arg-type]
