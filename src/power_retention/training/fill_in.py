"""Fill-in-the-middle: what stands before a gap and what stands behind it come first, what fills it last.

A model that only ever reads on learns to write into the middle of a text from documents in that order (Bavarian et al. 2022):
mark of the prefix, prefix, mark of the suffix, suffix, mark of the middle, middle.  The marks are tokens that the tokenizers
of code models bring along.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain

import numpy as np
import numpy.typing as npt
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from power_retention.errors import ArgumentError, DataError
from power_retention.training.text import hash_unit, tokenize_batch

MARKS = (
    ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),  # StarCoder
    ("<fim-prefix>", "<fim-suffix>", "<fim-middle>"),  # SantaCoder
    ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),  # Qwen, Granite
    ("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"),  # DeepSeek
)
"""Marks of prefix, suffix and middle, by family."""


@dataclass(frozen=True)
class FillIn:
    """Which documents are put into that order, and where each is cut: functions of the document and the seed alone.

    Attributes:
        share: of the documents, expected.
        seed: another seed takes others, and cuts elsewhere.
    """

    share: float
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise ArgumentError(f"The share of documents to fill in must be above 0 and at most 1, not {self.share}.")

    def parts(self, text: str) -> tuple[str, str, str] | None:
        """(prefix, middle, suffix), cut between any two characters; None for a document that stays as it is."""
        chosen, first, second = (hash_unit(f"{name} {text}", self.seed) for name in ("fill in", "one cut", "other cut"))
        if chosen >= self.share:
            return None
        start, stop = sorted(int(place * (len(text) + 1)) for place in (first, second))
        return text[:start], text[start:stop], text[stop:]


def marks_of(tokenizer: PreTrainedTokenizerBase) -> tuple[int, int, int]:
    """Ids of the marks of prefix, suffix and middle.

    Raises:
        DataError: the tokenizer has none.
    """
    vocabulary = tokenizer.get_vocab()
    for marks in MARKS:
        if all(mark in vocabulary for mark in marks):
            prefix, suffix, middle = (int(vocabulary[mark]) for mark in marks)
            return prefix, suffix, middle
    raise DataError(
        f"Filling in takes tokens for it, {', '.join(MARKS[0])} say, and this tokenizer has none: build the shards without "
        "--fill-in, or name the tokenizer of a code model."
    )


def tokenize_filling_in(
    texts: list[str], tokenizer: PreTrainedTokenizerBase, fill_in: FillIn | None
) -> list[npt.NDArray[np.int32]]:
    """The ids of each text as :func:`~power_retention.training.text.tokenize_batch` gives them, some put into the new order.

    Args:
        texts: documents.
        tokenizer: of code, byte-level: a piece of a text is encoded without anything added.
        fill_in: which; None for none.
    """
    if fill_in is None:
        return list(tokenize_batch(texts, tokenizer))
    marks, begin, end = marks_of(tokenizer), _beginning(tokenizer), tokenizer.eos_token_id
    cut = {i: parts for i, text in enumerate(texts) if (parts := fill_in.parts(text)) is not None}
    uncut = [text for i, text in enumerate(texts) if i not in cut]
    whole = iter(tokenize_batch(uncut, tokenizer) if uncut else ())
    pieces = iter(_plain(list(chain.from_iterable(cut.values())), tokenizer))
    ids: list[npt.NDArray[np.int32]] = []
    for i in range(len(texts)):
        if i not in cut:
            ids.append(next(whole))
            continue
        prefix, middle, suffix = next(pieces), next(pieces), next(pieces)
        row = [*begin, marks[0], *prefix, marks[1], *suffix, marks[2], *middle, *([] if end is None else [end])]
        ids.append(np.asarray(row, dtype=np.int32))
    return ids


def _beginning(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What the tokenizer puts before a text."""
    alone: list[int] = tokenizer("")["input_ids"]
    return alone[:1] if alone and alone[0] == tokenizer.bos_token_id != tokenizer.eos_token_id else []


def _plain(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    if not texts:
        return []
    encoded: list[list[int]] = tokenizer(
        texts, add_special_tokens=False, return_attention_mask=False, return_token_type_ids=False, verbose=False
    )["input_ids"]
    return encoded
