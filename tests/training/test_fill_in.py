"""Fill-in-the-middle: nothing of a document is lost, and what happens to it depends on it and the seed alone."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from power_retention.conversion.source import open_tokenizer
from power_retention.errors import ArgumentError, DataError, OutputError
from power_retention.training.fill_in import MARKS, FillIn, marks_of, tokenize_filling_in
from power_retention.training.sharding import make_shards
from power_retention.training.shards import open_shards, read_plan
from small_tokenizer import write_code_tokenizer

DOCUMENTS = [f"def plus_{i}(x):\n    # größer: {'x' * (i % 7)}\n    return x + {i}\n" for i in range(400)]


@pytest.fixture(scope="module")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_code_tokenizer(tmp_path_factory.mktemp("tokenizer"), DOCUMENTS)


@pytest.fixture(scope="module")
def tokenizer(tokenizer_dir: Path) -> PreTrainedTokenizerBase:
    return open_tokenizer(tokenizer_dir)


def restored(ids: np.ndarray, tokenizer: PreTrainedTokenizerBase) -> str:
    """The document in its own order."""
    text = tokenizer.decode(ids)
    assert text.endswith(tokenizer.eos_token)
    text = text.removesuffix(tokenizer.eos_token)
    prefix, suffix, middle = MARKS[0]
    if not text.startswith(prefix):
        return text
    before, rest = text.removeprefix(prefix).split(suffix)
    behind, between = rest.split(middle)
    return before + between + behind


def test_every_document_can_be_put_together_again(tokenizer: PreTrainedTokenizerBase) -> None:
    made = tokenize_filling_in(DOCUMENTS, tokenizer, FillIn(0.5, seed=3))
    assert [restored(ids, tokenizer) for ids in made] == DOCUMENTS
    prefix, suffix, middle = marks_of(tokenizer)
    marked = [ids for ids in made if prefix in ids]
    assert 150 < len(marked) < 250
    for ids in marked:
        assert [int((ids == mark).sum()) for mark in (prefix, suffix, middle)] == [1, 1, 1]
        assert ids[0] == prefix
    gaps = [len(FillIn(1.0).parts(text)[1]) / len(text) for text in DOCUMENTS]
    assert 0.28 < np.mean(gaps) < 0.38  # two uniform cuts are a third apart


def test_company_and_place_do_not_matter(tokenizer: PreTrainedTokenizerBase) -> None:
    fill_in = FillIn(0.5, seed=3)
    together = tokenize_filling_in(DOCUMENTS, tokenizer, fill_in)
    backwards = tokenize_filling_in(DOCUMENTS[::-1], tokenizer, fill_in)[::-1]
    alone = [tokenize_filling_in([text], tokenizer, fill_in)[0] for text in DOCUMENTS[:20]]
    for a, b in zip(together, backwards, strict=True):
        np.testing.assert_array_equal(a, b)
    for a, b in zip(together, alone, strict=False):
        np.testing.assert_array_equal(a, b)


def test_a_larger_share_takes_more_of_the_same_and_another_seed_others() -> None:
    def taken(fill_in: FillIn) -> set[str]:
        return {text for text in DOCUMENTS if fill_in.parts(text)}

    few, many, other = taken(FillIn(0.2)), taken(FillIn(0.6)), taken(FillIn(0.2, seed=1))
    assert few < many
    assert len(few & other) < len(few)
    assert FillIn(1.0).parts(DOCUMENTS[0]) != FillIn(1.0, seed=1).parts(DOCUMENTS[0])


def test_shards_hold_them_in_their_order(tokenizer_dir: Path, tmp_path: Path) -> None:
    corpus = tmp_path / "code.jsonl"
    corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in DOCUMENTS))
    fill_in = FillIn(0.5, seed=7)
    make_shards([str(corpus)], str(tokenizer_dir), tmp_path / "one", held_out=0, fill_in=fill_in, shard_bytes=9000)
    tokenizer, shards = open_tokenizer(tokenizer_dir), open_shards(tmp_path / "one")
    assert len(shards.shards) > 2
    ids = np.concatenate([np.asarray(shard.ids) for shard in shards.shards])
    ends = np.flatnonzero(ids == tokenizer.eos_token_id) + 1
    documents = np.split(ids, ends[:-1])
    assert [restored(row, tokenizer) for row in documents] == DOCUMENTS
    assert read_plan(tmp_path / "one").content["fill_in"] == {"share": 0.5, "seed": 7}
    with pytest.raises(OutputError, match="begun with other fill in"):
        make_shards([str(corpus)], str(tokenizer_dir), tmp_path / "one", held_out=0, shard_bytes=9000)


def test_what_cannot_be_filled_in_is_refused(stories_dir: Path, stories_text: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="this tokenizer has none"):
        make_shards([str(stories_text)], str(stories_dir), tmp_path / "out", fill_in=FillIn(0.5))
    assert not (tmp_path / "out").exists()
    for share in (0.0, 1.5):
        with pytest.raises(ArgumentError, match="must be above 0"):
            FillIn(share)
