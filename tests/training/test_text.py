from __future__ import annotations

import json
import lzma
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from power_retention.errors import ArgumentError, DataError
from power_retention.training.text import (
    Tokens,
    fingerprint_documents,
    read_documents,
    sample_batch,
    split_held_out,
    tokenize,
)
from real_models import STORIES_FILES, read_llama2c_tokenizer

POEM = "Der Mond ist aufgegangen,\ndie gold’nen Sternlein prangen\n"


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return read_llama2c_tokenizer(STORIES_FILES / "tokenizer.bin")


@pytest.fixture(scope="module")
def stories(stories_text: Path) -> list[str]:
    return read_documents([stories_text])


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def refusal(*paths: Path, text_field: str = "text") -> str:
    with pytest.raises(DataError) as caught:
        read_documents(paths, text_field=text_field)
    message = str(caught.value)
    assert "\n" not in message
    return message


def counting(count: int) -> Tokens:
    """A corpus whose every token is its own place."""
    return Tokens(np.arange(count, dtype=np.int32), np.array([0, count]))


class TestReading:
    @pytest.mark.parametrize("ending", ["txt", "md"])
    def test_a_text_file_is_one_document(self, tmp_path: Path, ending: str) -> None:
        assert read_documents([write(tmp_path / f"poem.{ending}", POEM)]) == [POEM]

    def test_byte_order_mark_and_windows_line_ends_go(self, tmp_path: Path) -> None:
        path = write(tmp_path / "poem.txt", b"\xef\xbb\xbf" + POEM.replace("\n", "\r\n").encode())
        assert read_documents([path]) == [POEM]

    @pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
    def test_a_record_a_line(self, tmp_path: Path, name: str) -> None:
        lines = [
            json.dumps({"text": POEM, "id": 1}),
            "",
            json.dumps("two\u2028lines", ensure_ascii=False),
            '{"text": ""}',
        ]
        assert read_documents([write(tmp_path / name, "\n".join(lines))]) == [POEM, "two\u2028lines"]

    def test_compressed(self, tmp_path: Path, stories_text: Path, stories: list[str]) -> None:
        assert read_documents([write(tmp_path / "a.jsonl.xz", lzma.compress(stories_text.read_bytes()))]) == stories
        assert len(stories) == 300

    @pytest.mark.parametrize("content", [[{"text": "one"}, "two"], {"text": "one"}, "one"])
    def test_one_json_value(self, tmp_path: Path, content: object) -> None:
        path = write(tmp_path / "a.json", json.dumps(content, indent=2))
        assert read_documents([path]) == ["one", "two"][: len(content) if isinstance(content, list) else 1]

    def test_another_field(self, tmp_path: Path) -> None:
        path = write(tmp_path / "a.jsonl", '{"content": "here"}')
        assert read_documents([path], text_field="content") == ["here"]

    def test_half_a_surrogate_pair_is_replaced(self, tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
        documents = read_documents([write(tmp_path / "a.jsonl", r'{"text": "a\ud83d b \ud83d\ude00"}')])
        assert documents == ["a? b 😀"]
        tokenize(documents, tokenizer)

    def test_a_directory_is_searched_in_order(self, tmp_path: Path) -> None:
        write(tmp_path / "b.txt", "third")
        write(tmp_path / "a" / "z.jsonl", '"second"')
        write(tmp_path / "a" / "b.md", "first")
        write(tmp_path / "a" / "empty.txt", "")
        write(tmp_path / "a" / "code.py", "not text")
        write(tmp_path / ".hidden" / "c.txt", "hidden")
        assert read_documents([tmp_path]) == ["first", "second", "third"]
        assert read_documents([tmp_path / "b.txt", tmp_path / "a"]) == ["third", "first", "second"]


class TestRefusals:
    def test_missing(self, tmp_path: Path) -> None:
        assert refusal(tmp_path / "nowhere.txt") == f"{tmp_path / 'nowhere.txt'} does not exist."

    def test_of_another_kind(self, tmp_path: Path) -> None:
        assert "is not a text file: it must end in .txt, .md," in refusal(write(tmp_path / "a.pdf", "%PDF"))

    @pytest.mark.parametrize("content", ["", " \n\n"])
    @pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
    def test_empty(self, tmp_path: Path, name: str, content: str) -> None:
        assert refusal(write(tmp_path / name, content)) == f"{tmp_path / name} is empty."

    def test_a_blank_text_is_left_out(self, tmp_path: Path) -> None:
        blank = write(tmp_path / "a.txt", " \n\n")
        assert refusal(blank) == f"No text was found in {blank}."
        assert read_documents([blank, write(tmp_path / "b.txt", POEM)]) == [POEM]

    @pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
    def test_not_utf8_names_the_byte(self, tmp_path: Path, name: str) -> None:
        path = write(tmp_path / name, "é".encode() * 617 + "déjà".encode("latin-1"))
        assert refusal(path) == f"{path} is not UTF-8 at byte 1,235 (0xe9): convert it to UTF-8 first."

    def test_broken_line_is_numbered(self, tmp_path: Path) -> None:
        path = write(tmp_path / "a.jsonl", '{"text": "one"}\n\n{"text": "two"\n')
        assert refusal(path).startswith(f"{path} is not JSON at line 3: ")

    def test_broken_value_names_the_line(self, tmp_path: Path) -> None:
        path = write(tmp_path / "a.json", '[\n{"text": "one"},\n{"text": two}\n]')
        assert refusal(path).startswith(f"{path} is not JSON at line 3: ")

    def test_no_text_field_lists_those_there_are(self, tmp_path: Path) -> None:
        path = write(tmp_path / "a.jsonl", '{"text": "one"}\n{"body": "two", "id": 2}')
        assert refusal(path) == (
            f"{path}, line 2 has no field 'text'; its fields are 'body', 'id': name the one with the text."
        )
        assert "record 1 has no field 'words'" in refusal(write(tmp_path / "b.json", '[{"a": 1}]'), text_field="words")

    @pytest.mark.parametrize("line", ['{"text": null}', '{"text": 3}', "[1]", "7"])
    def test_field_without_text(self, tmp_path: Path, line: str) -> None:
        assert "line 1 holds a" in refusal(write(tmp_path / "a.jsonl", line))

    @pytest.mark.parametrize("keep", [3, 40, -4])
    def test_truncated_archive(self, tmp_path: Path, stories_text: Path, keep: int) -> None:
        path = write(tmp_path / "a.jsonl.xz", lzma.compress(stories_text.read_bytes())[:keep])
        assert refusal(path).startswith(f"{path} is damaged or cut short")

    def test_nothing_found(self, tmp_path: Path) -> None:
        assert refusal(tmp_path) == f"No text was found in {tmp_path}."
        assert "No text was found in an empty list of files." in refusal()
        assert "No text was found" in refusal(write(tmp_path / "a.json", "[]"))


class TestHeldOut:
    def test_share_and_order(self, stories: list[str]) -> None:
        train, held_out = split_held_out(stories, fraction=0.2)
        assert 0.12 < len(held_out) / len(stories) < 0.28
        assert train == [story for story in stories if story not in held_out]
        assert held_out == [story for story in stories if story not in train]

    def test_a_document_keeps_its_side_in_other_company(self, stories: list[str]) -> None:
        _, held_out = split_held_out(stories)
        _, of_half = split_held_out(stories[::-2])
        assert of_half == [story for story in stories[::-2] if story in held_out]

    def test_copies_never_straddle(self, stories: list[str]) -> None:
        train, held_out = split_held_out(stories * 3, fraction=0.3)
        assert not set(train) & set(held_out)
        assert len(train) + len(held_out) == 900

    def test_seed(self, stories: list[str]) -> None:
        assert split_held_out(stories, seed=1) == split_held_out(stories, seed=1)
        assert split_held_out(stories, seed=1) != split_held_out(stories, seed=2)

    @given(documents=st.lists(st.text(max_size=3), min_size=1, max_size=6), fraction=st.floats(0.01, 0.99))
    def test_neither_side_is_empty_if_it_can_be(self, documents: list[str], fraction: float) -> None:
        train, held_out = split_held_out(documents, fraction=fraction)
        assert train
        assert bool(held_out) == (len(set(documents)) > 1)
        assert not set(train) & set(held_out)
        assert sorted(train + held_out) == sorted(documents)

    def test_none(self, stories: list[str]) -> None:
        assert split_held_out(stories, fraction=0) == (stories, [])

    @pytest.mark.parametrize("fraction", [-0.1, 1, 5])
    def test_senseless_share(self, fraction: float) -> None:
        with pytest.raises(ArgumentError, match="must be at least 0 and below 1"):
            split_held_out(["a"], fraction=fraction)


def test_the_fingerprint_of_documents() -> None:
    others = (["ab", "c"], ["a", "bc"], ["c", "ab"], ["ab", "c", ""], ["ab"])
    assert len({fingerprint_documents(documents) for documents in others}) == len(others)
    assert fingerprint_documents(["ab", "c"]) == fingerprint_documents(("ab", "c"))


class TestTokenize:
    def test_documents_follow_each_other_each_with_its_end(
        self, stories: list[str], tokenizer: PreTrainedTokenizerFast
    ) -> None:
        tokens = tokenize(stories, tokenizer)
        assert tokens.ids.dtype == np.int32
        assert len(tokens.starts) == len(stories) + 1
        assert tokens.starts[-1] == len(tokens)
        for number in (0, 63, 64, 299):
            ids = tokens.ids[tokens.starts[number] : tokens.starts[number + 1]]
            assert ids[-1] == tokenizer.eos_token_id
            assert tokenizer.decode(ids[:-1]) == stories[number]

    def test_the_tokenizer_s_own_special_tokens_stay(self, tokenizer: PreTrainedTokenizerFast) -> None:
        with_bos = PreTrainedTokenizerFast(
            tokenizer_object=tokenizer.backend_tokenizer,
            bos_token="<s>",
            eos_token="</s>",
            add_bos_token=True,
            add_eos_token=True,
        )
        ids = tokenize(["Lily"], with_bos).ids
        assert (ids[0], ids[-1]) == (1, 2)
        assert list(ids).count(2) == 1

    def test_without_an_end_token(self, tokenizer: PreTrainedTokenizerFast) -> None:
        bare = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, bos_token=None, eos_token=None)
        assert bare.eos_token_id is None
        assert list(tokenize(["Lily", "Lily"], bare).ids) == 2 * tokenizer("Lily").input_ids

    def test_max_tokens_cuts_exactly(self, stories: list[str], tokenizer: PreTrainedTokenizerFast) -> None:
        everything = tokenize(stories, tokenizer)
        for most in (1, 1000, int(everything.starts[5])):
            tokens = tokenize(stories, tokenizer, max_tokens=most)
            assert np.array_equal(tokens.ids, everything.ids[:most])
            assert tokens.starts[-1] == most
        assert len(tokens.starts) == 6

    def test_progress(self, stories: list[str], tokenizer: PreTrainedTokenizerFast) -> None:
        calls: list[tuple[int, int]] = []
        tokenize(stories, tokenizer, progress=lambda done, total: calls.append((done, total)))
        assert calls[-1] == (300, 300)
        assert calls == sorted(calls)

    def test_nothing(self, tokenizer: PreTrainedTokenizerFast) -> None:
        with pytest.raises(DataError, match="hold no tokens"):
            tokenize([], tokenizer)
        with pytest.raises(ArgumentError, match="at least 1"):
            tokenize(["a"], tokenizer, max_tokens=0)


class TestBatches:
    def test_windows_tile_the_tokens(self) -> None:
        tokens = counting(103)
        assert tokens.window_count(10) == 10
        assert torch.equal(torch.cat([tokens.window(index, 10) for index in range(10)]), torch.arange(100))
        assert tokens.window(0, 10).dtype == torch.int64
        with pytest.raises(IndexError):
            tokens.window(10, 10)

    @given(
        count=st.integers(1, 40),
        batch=st.integers(1, 9),
        length=st.integers(1, 5),
        seed=st.integers(-5, 2**70),
        first_epoch=st.integers(0, 3),
    )
    def test_an_epoch_sees_every_window_once(
        self, count: int, batch: int, length: int, seed: int, first_epoch: int
    ) -> None:
        tokens = counting(count * length + length - 1)
        # So many steps draw `batch` epochs exactly.
        steps = range(first_epoch * count, (first_epoch + 1) * count)
        drawn = torch.cat([sample_batch(tokens, batch=batch, length=length, seed=seed, step=step) for step in steps])
        for epoch in drawn.view(batch, count, length):
            assert torch.equal(epoch.sort(0).values.flatten(), torch.arange(count * length))

    def test_a_step_is_a_function_of_its_number(self) -> None:
        tokens = counting(1000)
        batches = [sample_batch(tokens, batch=4, length=10, seed=7, step=step) for step in range(60)]
        for step in (59, 3, 31):
            assert torch.equal(sample_batch(tokens, batch=4, length=10, seed=7, step=step), batches[step])

    def test_the_order_is_kept_between_versions(self) -> None:
        drawn = sample_batch(counting(100), batch=8, length=10, seed=0, step=0)
        assert (drawn[:, 0] // 10).tolist() == [3, 2, 1, 8, 6, 0, 7, 4]

    def test_seeds_and_epochs_differ(self) -> None:
        tokens = counting(640)
        epochs = [sample_batch(tokens, batch=64, length=10, seed=seed, step=step) for seed in (0, 1) for step in (0, 1)]
        for number, epoch in enumerate(epochs):
            assert not any(torch.equal(epoch, other) for other in epochs[:number])

    def test_fewer_tokens_than_a_window(self) -> None:
        with pytest.raises(DataError, match="has 99 tokens and one window takes 100"):
            sample_batch(counting(99), batch=1, length=100, seed=0, step=0)
        sample_batch(counting(100), batch=3, length=100, seed=0, step=0)

    @pytest.mark.parametrize("wrong", [{"batch": 0}, {"length": 0}, {"step": -1}])
    def test_senseless_numbers(self, wrong: dict[str, int]) -> None:
        with pytest.raises(ArgumentError):
            sample_batch(counting(10), **{"batch": 1, "length": 2, "seed": 0, "step": 0, **wrong})
