"""Questions in a file, answered by generating: needs no harness, so it runs wherever the model does."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch

from power_retention.errors import DataError
from power_retention.evaluation.benchmarks import Benchmark
from power_retention.evaluation.comparison import Scores
from power_retention.evaluation.long.asking import SPARE_TOKENS, Answer, Effort, ask
from power_retention.evaluation.long.context import Context, Encoder, Question
from power_retention.evaluation.long.readers import AttentionReader, Reader

METRIC = "begins with an answer"
_AT_ONCE = 64
_BEGINNING = r"""\s*["'“‘]?(?:(?:the|an?)\s+)?"""


@dataclass(frozen=True)
class Free(Question):
    """A question whose answer is written freely: right if what is written begins with one of the answers.

    Case does not matter, nor white space, a quotation mark or an article before it; the answer must end where a word ends.
    """

    task: str = ""

    def score(self, generated: str) -> float:
        """1 or 0."""
        wanted = "|".join(re.escape(answer.strip()) for answer in self.answers)
        return float(bool(re.match(rf"{_BEGINNING}(?:{wanted})(?!\w)", generated, re.IGNORECASE)))


def read_questions(paths: Sequence[Path], *, limit: int | None = None) -> list[Free]:
    """The questions of JSONL files, a line each: ``{"prompt": …, "answers": [ … ], "task": …, "guess": …}``.

    Args:
        paths: ``task`` is the file's name where a line has none, ``guess``, what guessing is expected to score, 0.
        limit: of each task, the first ones.

    Raises:
        DataError: a file cannot be read, or has something else in it.
    """
    questions: list[Free] = []
    for path in paths:
        try:
            # Not splitlines: JSON strings may hold the other characters that it takes for line ends.
            lines = path.read_text(encoding="utf-8-sig").split("\n")
        except (OSError, ValueError) as error:
            raise DataError(f"{path} cannot be read ({error}); questions are JSON Lines in UTF-8.") from error
        questions += [_question(line, path, number) for number, line in enumerate(lines, 1) if line.strip()]
    counts: dict[str, int] = {}
    kept = []
    for question in questions:
        counts[question.task] = counts.get(question.task, 0) + 1
        if limit is None or counts[question.task] <= limit:
            kept.append(question)
    if not kept:
        raise DataError(f"No question was found in {', '.join(map(str, paths))}.")
    return kept


def _question(line: str, path: Path, number: int) -> Free:
    try:
        record: Any = json.loads(line)
        prompt, answers = record["prompt"], record["answers"]
        guess = float(record.get("guess", 0.0))
        task = record.get("task", path.name.split(".")[0])
        strings = all(isinstance(text, str) and text.strip() for text in (prompt, task, *answers))
        if not (strings and isinstance(answers, list) and answers and 0 <= guess < 1):
            raise ValueError("a field is empty or of another kind")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f'{path}, line {number}: {{"prompt": "…", "answers": ["…"]}} was expected, and at will "task" and "guess" (from 0, '
            f"below 1); this is none ({type(error).__name__}: {error})."
        ) from error
    prompt, task, *answers = (_without_halves(text) for text in (prompt, task, *answers))
    space = "" if prompt[-1].isspace() else " "
    longest = max(answers, key=len)
    return Free(prompt, tuple(answers), (f"{space}{longest.strip()}",), guess, task=task)


def _without_halves(text: str) -> str:
    # JSON can spell half of a surrogate pair, which is no character and which no tokenizer takes.
    return text.encode("utf-8", "replace").decode("utf-8")


def check_lengths(questions: Sequence[Free], encoder: Encoder, positions: int) -> None:
    """Refuse prompts that leave a model no position to answer at.

    Raises:
        DataError: some are too long.
    """
    long = sum(_length(question, encoder) > positions for question in questions)
    if long:
        raise DataError(
            f"{long} of {len(questions)} prompts are longer than the {positions} positions that the model was made for: leave "
            "them out."
        )


def generate_answers(
    reader: Reader,
    questions: Sequence[Free],
    encoder: Encoder,
    effort: Effort,
    progress: Callable[[int, int], None] | None = None,
) -> list[str]:
    """What a model writes greedily after each prompt; a prompt stands after a line break, as it would in a text.

    Args:
        reader: the model.
        questions: what to ask.
        encoder: of the model.
        effort: how much at once.
        progress: called with (questions done, questions).
    """
    lengths = {question: _length(question, encoder) for question in questions}
    beginning = torch.tensor(encoder.start + encoder("\n"))
    answers: dict[str, str] = {}
    by_length = sorted(dict.fromkeys(questions), key=lengths.__getitem__)  # so that little is padded
    at_once = 1 if _window_is_short(reader, max(lengths.values())) else _AT_ONCE
    for at in range(0, len(by_length), at_once):
        group = by_length[at : at + at_once]
        context = Context("generated", lengths[group[-1]], 0, beginning, tuple(group))
        given: list[Answer] = ask(reader, [context], encoder, effort)
        answers |= {answer.question.text: answer.generated for answer in given}
        if progress:
            progress(at + len(group), len(by_length))
    return [answers[question.text] for question in questions]


def _window_is_short(reader: Reader, tokens: int) -> bool:
    """Whether padding would take the place of tokens in a cache that keeps the newest only."""
    window = getattr(reader.model.config, "sliding_window", None)
    return isinstance(reader, AttentionReader) and window is not None and tokens + SPARE_TOKENS >= window


def _length(question: Free, encoder: Encoder) -> int:
    return len(encoder.start) + 1 + len(encoder(question.text)) + len(encoder(question.candidates[0]))


def score_answers(questions: Sequence[Free], answers: Sequence[str]) -> dict[str, Scores]:
    """Scores by task, of answers in the questions' order."""
    pairs = sorted(zip(questions, answers, strict=True), key=lambda pair: pair[0].task)
    return {task: _scores(list(group)) for task, group in groupby(pairs, key=lambda pair: pair[0].task)}


def _scores(pairs: list[tuple[Free, str]]) -> Scores:
    return Scores(
        np.array([question.score(answer) for question, answer in pairs]),
        np.array([question.guess for question, _ in pairs]),
        tuple(hashlib.sha256(question.text.encode()).hexdigest()[:16] for question, _ in pairs),
        METRIC,
        "generation",
        None,
    )


def benchmarks_of(questions: Sequence[Free]) -> list[Benchmark]:
    """One a task."""
    names = sorted({question.task for question in questions})
    return [Benchmark(name, name, (name,), source="as the file of questions says") for name in names]
