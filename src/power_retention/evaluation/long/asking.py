"""Answers: every question of a context from one reading of it, by generation and by likelihood."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from power_retention.evaluation.long.context import Context, Encoder, Question
from power_retention.evaluation.long.readers import Memory, Reader

SPARE_TOKENS = 12
"""Tokens that an answer may have beyond the longest candidate: room for a model that says more than it is asked."""

_HEAD_ROWS = 2048

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Answer:
    """What one model made of one question.

    Attributes:
        context: what was read.
        question: what was asked.
        generated: what it wrote, greedily.
        likelihoods: log-likelihood of each candidate, nats a byte.
        nats: negative log-likelihood of the right candidate, all its tokens together.
    """

    context: Context
    question: Question
    generated: str
    likelihoods: tuple[float, ...]
    nats: float

    @property
    def recalled(self) -> float:
        """By generation: share of the answers that it wrote."""
        return self.question.score(self.generated)

    @property
    def chosen(self) -> float:
        """By likelihood: 1 if the right candidate is likelier than every other."""
        return float(all(self.likelihoods[0] > other for other in self.likelihoods[1:]))


@dataclass(frozen=True)
class Effort:
    """How much is done at once.

    Attributes:
        tokens: read by one call of the model, all rows together.
        memory_bytes: of all memories that are held at once.
    """

    tokens: int
    memory_bytes: int

    @classmethod
    def usual(cls, device: torch.device) -> Effort:
        """What suits a device: a third of the free memory of a GPU, and one gigabyte of a computer's."""
        if device.type == "cuda":
            torch.cuda.empty_cache()
            return cls(1 << 16, torch.cuda.mem_get_info(device)[0] // 3)
        return cls(1 << 11, 1 << 30)


@torch.inference_mode()
def ask(
    reader: Reader,
    contexts: Sequence[Context],
    encoder: Encoder,
    effort: Effort,
    progress: Progress | None = None,
) -> list[Answer]:
    """All questions of all contexts that are within the reader's reach; of the others there is no answer.

    Args:
        reader: the model.
        contexts: what to read.
        encoder: of the model.
        effort: how much at once.
        progress: called with (tokens of context read, tokens of context).
    """
    within = [x for x in contexts if reader.longest is None or x.length <= reader.longest]
    total, done = sum(len(context.ids) for context in within), 0
    answers: list[Answer] = []
    for _, equal in groupby(sorted(within, key=lambda x: len(x.ids)), key=lambda x: len(x.ids)):
        for group in _groups(reader, list(equal), effort):
            memory = reader.begin(len(group))
            for part in _segments(reader, torch.stack([context.ids for context in group]), effort):
                reader.read(memory, part)
                done += part.numel()
                if progress:
                    progress(done, total)
            answers += _answers(reader, memory, group, encoder, effort)
    return answers


def _groups(reader: Reader, contexts: list[Context], effort: Effort) -> Iterator[list[Context]]:
    """Contexts of one length, as many at once as may be: half of the memory is for the forks."""
    length = contexts[0].length
    rows = effort.memory_bytes // (2 * reader.bytes_a_row(length))
    if reader.segment(1, effort.tokens) is None:
        rows = min(rows, effort.tokens // length)
    step = max(1, rows)
    for at in range(0, len(contexts), step):
        yield contexts[at : at + step]


def _segments(reader: Reader, ids: Tensor, effort: Effort) -> Iterator[Tensor]:
    """``[R, n]`` in pieces of time, on the reader's device."""
    for part in ids.split(reader.segment(len(ids), effort.tokens) or ids.shape[1], dim=1):
        yield part.to(reader.device)


@dataclass(frozen=True)
class _Job:
    row: int
    context: Context
    question: Question
    prompt: list[int]
    candidates: list[list[int]]

    @property
    def new_tokens(self) -> int:
        return max(map(len, self.candidates)) + SPARE_TOKENS


def _answers(
    reader: Reader, memory: Memory, group: Sequence[Context], encoder: Encoder, effort: Effort
) -> list[Answer]:
    jobs = [
        _Job(row, context, question, encoder(question.text), _candidates(encoder, question))
        for row, context in enumerate(group)
        for question in context.questions
    ]
    jobs.sort(key=lambda job: job.new_tokens)  # those that write for long do it together
    # The questions' own memory, a fork that writes and one that is compared: three of each row.
    at_once = max(1, effort.memory_bytes // (6 * reader.bytes_a_row(group[0].length)))
    answers: list[Answer] = []
    for at in range(0, len(jobs), at_once):
        answers += _answer(reader, memory, jobs[at : at + at_once], encoder)
    return answers


def _candidates(encoder: Encoder, question: Question) -> list[list[int]]:
    return [encoder.after(question.text, candidate) for candidate in question.candidates]


def _answer(reader: Reader, memory: Memory, jobs: list[_Job], encoder: Encoder) -> list[Answer]:
    asked = reader.fork(memory, torch.tensor([job.row for job in jobs], device=reader.device))
    hidden = reader.read(asked, *padded([job.prompt for job in jobs], reader.device))
    ends = torch.tensor([len(job.prompt) - 1 for job in jobs], device=reader.device)
    first = reader.logits(hidden[torch.arange(len(jobs), device=reader.device), ends])
    sums = _log_likelihoods(reader, asked, first, jobs)
    written = write(reader, asked, first, max(job.new_tokens for job in jobs), encoder)
    return [
        Answer(
            job.context,
            job.question,
            encoder.decode(ids[: job.new_tokens]),
            tuple(
                value / max(1, len(candidate.encode()))
                for value, candidate in zip(values, job.question.candidates, strict=True)
            ),
            -values[0],
        )
        for job, ids, values in zip(jobs, written, sums, strict=True)
    ]


def padded(rows: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor | None]:
    """(ids ``[B, T]``, False at padding on the right or None where there is none)."""
    lengths = torch.tensor([len(row) for row in rows], device=device)
    most = int(lengths.max())
    ids = torch.tensor([[*row, *[0] * (most - len(row))] for row in rows], device=device)
    valid = torch.arange(most, device=device) < lengths[:, None]
    return ids, None if int(lengths.min()) == most else valid


def write(reader: Reader, memory: Memory, first: Tensor, tokens: int, encoder: Encoder) -> list[list[int]]:
    """Greedy continuations of what was read, each up to its end-of-sequence token; ``memory`` is used up.

    Args:
        reader: the model.
        memory: of B rows.
        first: ``[B, vocab]``, logits of the next token.
        tokens: most of a continuation.
        encoder: of the model.
    """
    eos = encoder.tokenizer.eos_token_id
    token = first.argmax(-1)
    columns = [token]
    ended = token == -1 if eos is None else token == eos
    while len(columns) < tokens and not bool(ended.all()):
        token = reader.logits(reader.read(memory, token[:, None])[:, -1]).argmax(-1)
        columns.append(token)
        if eos is not None:
            ended = ended | (token == eos)
    rows: list[list[int]] = torch.stack(columns, 1).tolist()
    return [row[: row.index(eos)] if eos in row else row for row in rows]


def _log_likelihoods(reader: Reader, asked: Memory, first: Tensor, jobs: list[_Job]) -> list[list[float]]:
    """Nats of each candidate of each job."""
    opening = first.log_softmax(-1)
    sums: list[list[float]] = [[] for _ in jobs]
    for number in range(max(len(job.candidates) for job in jobs)):
        mine = [i for i, job in enumerate(jobs) if number < len(job.candidates)]
        rows = torch.tensor(mine, device=reader.device)
        ids, valid = padded([jobs[i].candidates[number] for i in mine], reader.device)
        value = opening[rows].gather(-1, ids[:, :1]).squeeze(-1)
        if ids.shape[1] > 1:
            fed = None if valid is None else valid[:, 1:]
            hidden = reader.read(reader.fork(asked, rows), ids[:, :-1], fed)
            later = next_token_losses(reader, hidden, ids[:, 1:])
            value = value - (later if fed is None else later.masked_fill(~fed, 0)).sum(-1)
        for i, nats in zip(mine, value.tolist(), strict=True):
            sums[i].append(nats)
    return sums


def next_token_losses(reader: Reader, hidden: Tensor, targets: Tensor) -> Tensor:
    """``[B, T]`` float32, nats: a block of rows at a time, so that no full logits exist.

    Args:
        reader: the model.
        hidden: ``[B, T, hidden]``, what predicts the targets.
        targets: int64 ``[B, T]``.
    """
    losses = [
        torch.nn.functional.cross_entropy(reader.logits(rows), wanted, reduction="none")
        for rows, wanted in zip(
            hidden.flatten(0, 1).split(_HEAD_ROWS), targets.flatten().split(_HEAD_ROWS), strict=True
        )
    ]
    return torch.cat(losses).view(targets.shape)
