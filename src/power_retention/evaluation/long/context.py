"""Contexts of an exact number of tokens: what is asked about, at its depth in a haystack of other text."""

from __future__ import annotations

import random
import re
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from power_retention.errors import DataError

_SENTENCE = re.compile(r"(?<=[.!?])\s+")
_WORD = re.compile(r"\b[a-z]{4,9}\b")
_BATCH = 256
_LEAD = "\n"
ROOM_STEPS = {0: 16, 2048: 128}
"""From a length on, room for question and answer is rounded up to so many tokens: equally long contexts are read at once."""


class TooShortError(Exception):
    """A context of this many tokens cannot hold the task."""


@dataclass(frozen=True)
class Question:
    """What is asked after a context has been read.

    Attributes:
        text: what follows the context, up to the answer.
        answers: strings that a generated answer should contain; its score is the share that it does.
        candidates: possible continuations of ``text``, the right one first, whose likelihoods are compared.
        guess: expected score of a generated answer that names things of the right kind at random.
        depth: where in the context the answer stands, from 0 (its beginning) to 1; None where it is spread.
        variant: tells questions of one task apart; empty where all are of one kind.
    """

    text: str
    answers: tuple[str, ...]
    candidates: tuple[str, ...]
    guess: float = 0.0
    depth: float | None = None
    variant: str = ""

    def score(self, generated: str) -> float:
        """Share of the answers that a generated text contains, letters of either case (RULER's recall)."""
        text = generated.casefold()
        return sum(answer.casefold() in text for answer in self.answers) / len(self.answers)


@dataclass(frozen=True)
class Context:
    """Something to read, and what is asked about it afterwards.

    Attributes:
        task: its name.
        length: tokens of the context and the longest question with its answer.
        seed: what it was drawn with.
        ids: ``[n]`` int64, n < length.
        questions: each asked by itself, of the same memory.
    """

    task: str
    length: int
    seed: int
    ids: Tensor
    questions: tuple[Question, ...]


class Encoder:
    """Text to token ids, piece by piece: pieces that follow each other are what their joined text would be, but for merges
    across a border.

    Args:
        tokenizer: of the models that are asked.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        alone: list[int] = tokenizer("")["input_ids"]
        self.start = alone[:1] if alone and alone[0] == tokenizer.bos_token_id else []
        self._lead: list[int] = tokenizer(_LEAD, add_special_tokens=False)["input_ids"]

    def __call__(self, text: str) -> list[int]:
        """Ids of a piece that does not begin a text."""
        return self.many([text])[0]

    def many(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of several pieces."""
        encoded: list[list[int]] = []
        for first in range(0, len(texts), _BATCH):
            batch = [_LEAD + text for text in texts[first : first + _BATCH]]
            encoded += self.tokenizer(batch, add_special_tokens=False, verbose=False)["input_ids"]
        lead = len(self._lead)
        # A tokenizer that puts a space before every text does so before the line break, not before the piece.
        return [
            ids[lead:] if ids[:lead] == self._lead else self.tokenizer(text, add_special_tokens=False)["input_ids"]
            for ids, text in zip(encoded, texts, strict=True)
        ]

    def joined(self, words: Sequence[str]) -> list[int]:
        """Ids of words with a space before each; long lists are encoded in parallel."""
        chunks = ["".join(f" {word}" for word in words[at : at + _BATCH]) for at in range(0, len(words), _BATCH)]
        return flat(self.many(chunks))

    def after(self, text: str, continuation: str) -> list[int]:
        """Ids of a continuation of ``text``."""
        whole, begun = self(text + continuation), self(text)
        return whole[len(begun) :] if whole[: len(begun)] == begun else self(continuation)

    def decode(self, ids: Sequence[int] | Tensor) -> str:
        """Text of ids."""
        return str(self.tokenizer.decode(ids, skip_special_tokens=True))

    def room(self, questions: Iterable[Question], length: int) -> int:
        """Tokens that the longest question with its longest answer takes of ``length``, rounded up."""
        most = 0
        for question in questions:
            longest = max(len(self.after(question.text, candidate)) for candidate in question.candidates)
            most = max(most, len(self(question.text)) + longest)
        step = max((start, step) for start, step in ROOM_STEPS.items() if start <= length)[1]
        return -(-most // step) * step


class Haystack:
    """Sentences of ordinary text, and words taken from them.

    Args:
        documents: the texts; as many of them are read as ``tokens`` and ``words`` take.
        encoder: of the models that are asked.
        tokens: to have at hand; a longer context starts over.
        words: different ones to have at hand.

    Raises:
        DataError: there is no sentence, or fewer than two hundred words.
    """

    def __init__(
        self, documents: Iterable[str], encoder: Encoder, *, tokens: int = 1 << 16, words: int = 1 << 15
    ) -> None:
        self.encoder = encoder
        self.sentences: list[list[int]] = []
        found: dict[str, None] = {}
        held, pending = 0, list[str]()
        for document in documents:
            if held >= tokens and len(found) >= words:
                break
            found.update(dict.fromkeys(_WORD.findall(document)))
            if held < tokens:
                pending += [f" {sentence.strip()}" for sentence in _SENTENCE.split(document) if sentence.strip()]
                if len(pending) >= _BATCH:
                    held += self._take(pending)
                    pending.clear()
        self._take(pending)
        self.words = sorted(found)
        if not self.sentences or len(self.words) < 200:
            raise DataError(
                f"The haystack has {len(self.sentences):,} sentences and {len(self.words):,} different words of four to nine "
                "small letters; questions take at least 200 words: give more text with --haystack."
            )

    def _take(self, sentences: list[str]) -> int:
        new = [ids for ids in self.encoder.many(sentences) if ids]
        self.sentences += new
        return sum(map(len, new))

    def fill(self, tokens: int, rng: random.Random) -> list[list[int]]:
        """Sentences in their order, from a random one on, that have exactly so many tokens together: one is cut."""
        at, count = rng.randrange(len(self.sentences)), 0
        pieces: list[list[int]] = []
        while count < tokens:
            pieces.append(self.sentences[at % len(self.sentences)])
            count += len(pieces[-1])
            at += 1
        over = count - tokens
        if over and over < len(pieces[0]):
            pieces[0] = pieces[0][over:]
        elif over:  # always less than the last sentence
            pieces[-1] = pieces[-1][:-over]
        return pieces

    def compound(self, rng: random.Random) -> str:
        """Two words with a hyphen: a key that no text has."""
        return "-".join(rng.sample(self.words, 2))


def plant(filler: list[list[int]], planted: Sequence[tuple[float, list[int]]]) -> list[int]:
    """All pieces as one row: each planted one stands at the border between fillers that is nearest to its depth.

    Args:
        filler: ids of sentences.
        planted: (depth from 0 to 1, ids), in the order in which they shall stand where their places agree.
    """
    borders = [0, *accumulate(map(len, filler))]
    at_border: list[list[int]] = [[] for _ in borders]
    for depth, ids in planted:
        at_border[_nearest(borders, depth * borders[-1])] += ids
    row = at_border[0]
    for piece, ids in zip(filler, at_border[1:], strict=True):
        row += piece + ids
    return row


def _nearest(sorted_numbers: Sequence[int], target: float) -> int:
    """Index of the number nearest to the target."""
    after = min(bisect_left(sorted_numbers, target), len(sorted_numbers) - 1)
    before = max(after - 1, 0)
    return before if target - sorted_numbers[before] < sorted_numbers[after] - target else after


def flat(pieces: Iterable[list[int]]) -> list[int]:
    """All pieces as one row."""
    return [token for piece in pieces for token in piece]


def finish(
    task: str, length: int, seed: int, encoder: Encoder, ids: list[int], questions: Sequence[Question]
) -> Context:
    """A context that holds what is written, with the tokenizer's own beginning."""
    return Context(task, length, seed, torch.tensor(encoder.start + ids), tuple(questions))


def room_for(encoder: Encoder, length: int, questions: Sequence[Question], *written: list[int]) -> int:
    """Tokens left for filling up once the questions and everything that is written have their place.

    Raises:
        TooShortError: there are none.
    """
    left = length - encoder.room(questions, length) - len(encoder.start) - sum(map(len, written))
    if left < 0:
        raise TooShortError(f"{length} tokens are {-left} too few")
    return left
