"""Readers that are no language models: one looks every answer up in what it has read, one says anything."""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Callable

import torch
from torch import Tensor

from power_retention.evaluation.long.context import Encoder
from power_retention.evaluation.long.readers import Memory, Reader

SURE = 50.0


class TextReader(Reader):
    """Keeps all tokens; a next token is predicted from the whole of them where logits are wanted."""

    def __init__(self, encoder: Encoder, longest: int | None = None) -> None:
        self.encoder, self.longest = encoder, longest
        self.device = torch.device("cpu")
        self.vocabulary = len(encoder.tokenizer)
        self.read_so_far: list[list[int]] = []
        self.tokens_read = 0

    def bytes_a_row(self, tokens: int) -> int:
        return 1 << 26  # a few rows at a time, so that groups and chunks of questions are met

    def begin(self, rows: int) -> Memory:
        return Memory([[] for _ in range(rows)], torch.zeros(rows, dtype=torch.long))

    def fork(self, memory: Memory, rows: Tensor) -> Memory:
        return Memory([list(memory.cache[row]) for row in rows.tolist()], memory.lengths[rows])

    def segment(self, rows: int, tokens_at_once: int) -> int | None:
        return 100

    def _hidden(self, memory: Memory, ids: Tensor, valid: Tensor | None) -> Tensor:
        places = torch.full((*ids.shape, 1), -1.0)
        for b, row in enumerate(memory.cache):
            for t in range(ids.shape[1] if valid is None else int(valid[b].sum())):
                row.append(int(ids[b, t]))
                self.tokens_read += 1
            if ids.shape[1] < 100:
                read = ids.shape[1] if valid is None else int(valid[b].sum())
                for t in range(read):
                    self.read_so_far.append(row[: len(row) - read + t + 1])
                    places[b, t] = len(self.read_so_far) - 1
        return places

    def logits(self, hidden: Tensor) -> Tensor:
        nothing = torch.zeros(self.vocabulary)
        flat = [self.next_token(self.read_so_far[int(i)]) if i >= 0 else nothing for i in hidden.flatten()]
        return torch.stack(flat).view(*hidden.shape[:-1], self.vocabulary)

    def next_token(self, ids: list[int]) -> Tensor:
        raise NotImplementedError


class LookUp(TextReader):
    """Knows where to look in the text for the answer to each kind of question."""

    def __init__(self, encoder: Encoder, answer: Callable[[str, str], str]) -> None:
        super().__init__(encoder)
        self.answer = answer

    def next_token(self, ids: list[int]) -> Tensor:
        context, _, question = self.encoder.decode(ids).rpartition("\n\nQuestion:")
        prompt = re.match(r"[^\n]*\nAnswer: .*?(:| is in the| last went to the| is| are)(?= |$)", question, re.DOTALL)
        assert prompt is not None, question
        wanted = self.encoder.after(prompt[0], self.answer(context, prompt[0]))
        said = max(k for k in range(len(wanted) + 1) if ids[len(ids) - k :] == wanted[:k])
        logits = torch.zeros(self.vocabulary)
        logits[wanted[said] if said < len(wanted) else self.encoder.tokenizer.eos_token_id] = SURE
        return logits


class Guesser(TextReader):
    """Any token is as likely as any other, and it is always sure."""

    def next_token(self, ids: list[int]) -> Tensor:
        generator = torch.Generator().manual_seed(hash(tuple(ids[-40:])) % (1 << 40))
        return 3 * torch.randn(self.vocabulary, generator=generator)


def secret_number(context: str, question: str) -> str:
    key = re.search(r"secret number of ([\w-]+)\?", question)
    assert key is not None
    (number,) = re.findall(rf"The secret number of {key[1]} is (\d+)\.", context)
    return f" {number}"


def variables(context: str, question: str) -> str:
    value = re.search(r"have the value (\d+)\?", question)
    assert value is not None
    assigned = re.findall(r"VAR (\w+) = (?:VAR )?(\w+)\.", context)
    found, names = [value[1]], []
    for name, source in assigned:
        if source in found:
            found.append(name)
            names.append(name)
    return " " + ", ".join(f"VAR {name}" for name in names)


def listed_words(context: str, question: str) -> str:
    words = re.findall(r"\d+\. ([a-z]+)", context.rpartition("remember those.")[2])
    common = [word for word, _ in Counter(words).most_common(10)]
    return " " + " ".join(f"{i}. {word}" for i, word in enumerate(common, 1))


def coded_words(context: str, question: str) -> str:
    words = re.findall(r"\b[a-z]{6}\b", context.rpartition("each of them comes.")[2])
    return " " + " ".join(word for word, _ in Counter(words).most_common(3))


def places(context: str, question: str) -> str:
    subject = re.search(r"Where is (?:the )?(\w+)\?", question)
    assert subject is not None
    at: dict[str, str] = {}
    carrier: dict[str, str] = {}
    for name, went, took, put in re.findall(
        r"([A-Z][a-z]+) (?:went to the (\w+)\.|took the (\w+) there|put down the (\w+) there)",
        context,
    ):
        if went:
            at[name] = went
            at.update({thing: went for thing, by in carrier.items() if by == name})
        elif took:
            carrier[took], at[took] = name, at[name]
        else:
            del carrier[put]
    return f" {at[subject[1]]}"


LOOK_UPS: dict[str, Callable[[str, str], str]] = {
    "needle": secret_number,
    "multi-key needle": secret_number,
    "variable tracking": variables,
    "common words": listed_words,
    "frequent words": coded_words,
    "facts": places,
}


def random_words(count: int, seed: int = 0) -> list[str]:
    """Pronounceable words."""
    rng = random.Random(seed)
    return ["".join(rng.choice("bdfgklmnprst") + rng.choice("aeiou") for _ in range(3)) for _ in range(count)]
