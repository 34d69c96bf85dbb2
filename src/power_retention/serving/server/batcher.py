"""Continuous batching on one thread: prompts are read piece by piece between the steps in which all answers grow by a token.

A question is admitted when there is a row for each of its answers, in the order of arrival.  Its prompt is read once, into a
cache of its own; then each answer takes a row of the batch, and gives it up when it ends or when nobody waits for it any more.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from power_retention.errors import PowerRetentionError
from power_retention.models import PowerRetentionCache, PowerRetentionForCausalLM
from power_retention.models.fingerprint import fingerprint_model
from power_retention.models.rows import PowerRetentionRows
from power_retention.ops.state_file import load_states
from power_retention.serving.sampling import Draw, Likelihood, draw_token, likelihood_of
from power_retention.serving.server.steps import Steps
from power_retention.serving.states import MissingState, StateDirectory
from power_retention.serving.text import TextStream, ending_tokens


@dataclass(frozen=True)
class Grown:
    """An answer has a token more: what it is, the text that is certain now, and how likely it was, if that was asked."""

    choice: int
    token: int
    text: str
    likelihood: Likelihood | None


@dataclass(frozen=True)
class Ended:
    """An answer is complete.

    Attributes:
        choice: which.
        text: the rest of its text.
        reason: "stop" or "length"; "error" where it could not be finished.
        error: why, then.
    """

    choice: int
    text: str = ""
    reason: str = "stop"
    error: PowerRetentionError | None = None

    @classmethod
    def by(cls, error: Exception, choice: int) -> Ended:
        """What is told of an answer that an error has ended."""
        return cls(choice, reason="error", error=_said(error))


Event = Grown | Ended


@dataclass(eq=False)
class Question:
    """A prompt, and the answers wanted.

    Attributes:
        prompt: token ids, at least one.
        tell: is given what happens, from the batcher's thread.
        answers: how many; the i-th draws with ``seed + i``.
        max_tokens: of each answer.
        draw: how tokens are drawn.
        seed: None for another each time.
        stop: strings that end an answer.
        stop_tokens: token ids that do, beside the model's own.
        ignore_eos: do not end at the model's own.
        logprobs: how many of the likeliest tokens are told with each token; None for no likelihoods.
        start: a state file to go on from, which is removed once it is read (see :meth:`StateDirectory.pin`).
        save: where to keep what was read and written, and under which name.
    """

    prompt: list[int]
    tell: Callable[[Event], None]
    answers: int = 1
    max_tokens: int = 16
    draw: Draw = Draw()  # noqa: RUF009 (frozen)
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_tokens: frozenset[int] = frozenset()
    ignore_eos: bool = False
    logprobs: int | None = None
    start: Path | None = None
    save: tuple[StateDirectory, str] | None = None
    aborted: bool = False
    cache: PowerRetentionCache | None = field(default=None, init=False)
    read: int = field(default=0, init=False)

    def abort(self) -> None:
        """Nobody waits for it any more; its rows are free before the next step."""
        self.aborted = True

    def forget_start(self) -> None:
        """Let go of the file to go on from."""
        if self.start is not None:
            self.start.unlink(missing_ok=True)
            self.start = None


class TooBusy(PowerRetentionError):
    """There is no room for a request now; there may be later, or elsewhere."""


class ServerFailure(PowerRetentionError):
    """Something broke that is nothing of the request's."""


class _Answer:
    """One answer being written, in a row of the batch."""

    def __init__(self, question: Question, choice: int, seen: int, tokenizer: PreTrainedTokenizerBase) -> None:
        self.question, self.choice, self.seen, self.written = question, choice, seen, 0
        self.text = TextStream(tokenizer, question.prompt, question.stop)
        self.generator = torch.Generator()
        if question.seed is None:
            self.generator.seed()
        else:
            self.generator.manual_seed(question.seed + choice)
        self.next = -1  # written, and not read yet
        self.ended: Ended | None = None  # but for the reading of its last token


class Batcher:
    """Answers questions, many at a time.

    Args:
        model: in evaluation mode.
        tokenizer: its tokenizer.
        users: answers written at a time; memory for all of them is taken when the first one starts.
        waiting: questions that may wait for a row.
        piece: tokens of a prompt read between two steps: what others wait for it at most.
    """

    def __init__(
        self,
        model: PowerRetentionForCausalLM,
        tokenizer: PreTrainedTokenizerBase,
        *,
        users: int = 8,
        waiting: int = 100,
        piece: int = 256,
    ) -> None:
        self.model, self.tokenizer, self.users, self.waiting, self.piece = model, tokenizer, users, waiting, piece
        self.fingerprint = fingerprint_model(model)
        self.endings = ending_tokens(model, tokenizer)
        self._begin_anew()
        self._new: deque[Question] = deque()  # guarded by _changed, as is _closing
        self._reading: deque[Question] = deque()
        self._writing: list[_Answer] = []  # one a row, in the order of the rows
        self._changed = threading.Condition()
        self._closing = False
        self._saving = ThreadPoolExecutor(1, thread_name_prefix="power-retention-states")
        self._saves = 0  # guarded by _changed
        self._thread = threading.Thread(target=self._run, name="power-retention-batcher", daemon=True)
        self._thread.start()

    def ask(self, *questions: Question) -> None:
        """Put questions in line; their ``tell`` hears of every token.

        Raises:
            TooBusy: too many wait already, or the batcher is closed; none of these was taken.
        """
        with self._changed:
            if self._closing:
                raise _stopped()
            if len(self._new) + len(questions) > self.waiting:
                raise TooBusy(f"{len(self._new):,} requests wait already, which is the limit; try again later.")
            self._new.extend(questions)
            self._changed.notify()

    def close(self) -> None:
        """Stop after the step being taken; answers that are not complete end with an error."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join()
        self._saving.shutdown()

    @property
    def load(self) -> dict[str, int]:
        """Answers there is room for, answers being written, prompts being read, questions waiting, states being saved."""
        counts = {"writing": len(self._writing), "reading": len(self._reading), "waiting": len(self._new)}
        return {"users": self.users, **counts, "saving": self._saves}

    def _begin_anew(self) -> None:
        self.rows = PowerRetentionRows(self.model.config.num_hidden_layers, self.users)
        self.steps = Steps.of(self.model, self.rows)

    def _run(self) -> None:
        with torch.inference_mode():
            while self._admit():
                self._drop_aborted()
                self._read_piece()
                self._step()
        for question in (*self._reading, *self._new):
            self._fail(question, _stopped())
        for answer in self._writing:
            answer.question.tell(Ended.by(_stopped(), answer.choice))

    def _admit(self) -> bool:
        """Take in what there is room for, waiting where there is nothing else to do; False at the end."""
        with self._changed:
            while not (self._closing or self._new or self._reading or self._writing):
                self._changed.wait()
            free = self.users - len(self._writing) - sum(question.answers for question in self._reading)
            for question in [question for question in self._new if question.aborted]:
                self._new.remove(question)
                question.forget_start()
            while self._new and self._new[0].answers <= free:
                question = self._new.popleft()
                free -= question.answers
                self._reading.append(question)
            return not self._closing

    def _drop_aborted(self) -> None:
        for question in [question for question in self._reading if question.aborted]:
            self._reading.remove(question)
            question.forget_start()
        for row in reversed(range(len(self._writing))):
            if self._writing[row].question.aborted:
                self._leave(row)

    def _leave(self, row: int) -> None:
        self.rows.leave(row)
        last = self._writing.pop()
        if row < len(self._writing):
            self._writing[row] = last

    def _read_piece(self) -> None:
        """A piece of one prompt; the next time it is another's turn."""
        if not self._reading:
            return
        question = self._reading[0]
        try:
            if question.cache is None:
                question.cache = self._open(question)
            part = question.prompt[question.read : question.read + self.piece]
            ids = torch.tensor([part], device=self.model.device)
            logits = self.model(ids, past_key_values=question.cache, use_cache=True, logits_to_keep=1).logits
            question.read += len(part)
            if question.read < len(question.prompt):
                self._reading.rotate(-1)
                return
            self._begin_answers(question, logits[0, -1].cpu())
        except Exception as error:  # one question must not end the others
            self._fail(question, error)
        self._reading.popleft()

    def _open(self, question: Question) -> PowerRetentionCache:
        cache = PowerRetentionCache(self.model.config.num_hidden_layers)
        if question.start is not None:
            if not question.start.exists():
                raise MissingState(
                    "The state to start from was removed while the request waited; name another, or send what it had read."
                )
            try:
                # Every byte was checked when the question was asked.
                states, header = load_states(
                    question.start, model=self.fingerprint, device=self.model.device, verify=False
                )
            finally:
                question.forget_start()
            for layer, state in zip(cache.layers, states, strict=True):
                layer.store(state, header.tokens_seen)
        return cache

    def _begin_answers(self, question: Question, logits: torch.Tensor) -> None:
        assert question.cache is not None
        seen = question.cache.get_seq_length()
        for choice in range(question.answers):
            answer = _Answer(question, choice, seen, self.tokenizer)
            self.rows.join(question.cache)
            self._writing.append(answer)
        question.cache = None
        for row in reversed(range(len(self._writing) - question.answers, len(self._writing))):
            self._grow(row, logits)

    def _step(self) -> None:
        """Every answer's newest token is read, and the next one drawn."""
        if not self._writing:
            return
        try:
            logits = self.steps.take(
                [answer.next for answer in self._writing], [answer.seen for answer in self._writing]
            ).cpu()
        except Exception as error:  # what the rows hold now is not known
            for answer in self._writing:
                answer.question.tell(Ended.by(error, answer.choice))
            self._writing.clear()
            self._begin_anew()
            return
        # From the last row to the first: where one leaves, the row that moves there has had its turn.
        for row in reversed(range(len(self._writing))):
            answer = self._writing[row]
            answer.seen += 1
            if answer.ended is not None:
                self._save(row)
            else:
                self._grow(row, logits[row])

    def _grow(self, row: int, logits: torch.Tensor) -> None:
        """Draw the next token of an answer, tell it, and see whether it was the last one."""
        answer = self._writing[row]
        question = answer.question
        try:
            token = draw_token(logits, question.draw, answer.generator)
            likelihood = None if question.logprobs is None else likelihood_of(logits, token, question.logprobs)
            answer.next, answer.written = token, answer.written + 1
            ends = token in question.stop_tokens or (token in self.endings and not question.ignore_eos)
            text = "" if ends else answer.text.add(token)
            question.tell(Grown(answer.choice, token, text, likelihood))
            if not (ends or answer.text.stopped or answer.written == question.max_tokens):
                return
            rest = answer.text.finish()
            answer.ended = Ended(answer.choice, rest, "stop" if ends or answer.text.stopped else "length")
        except Exception as error:
            question.tell(Ended.by(error, answer.choice))
            self._leave(row)
            return
        if question.save is None:
            question.tell(answer.ended)
            self._leave(row)

    def _save(self, row: int) -> None:
        """The last token is read too: the state is copied here, and written to disk while others go on."""
        answer = self._writing[row]
        question, ended, seen = answer.question, answer.ended, answer.seen
        assert question.save is not None
        assert ended is not None
        directory, name = question.save
        try:
            states = self.rows.cache_of(row, seen).states
        except Exception as error:
            question.tell(Ended.by(error, answer.choice))
            return
        finally:
            self._leave(row)

        def write() -> None:
            try:
                directory.save(name, states, model=self.fingerprint, tokens_seen=seen)
                question.tell(ended)
            except Exception as error:
                question.tell(Ended.by(error, answer.choice))
            finally:
                with self._changed:
                    self._saves -= 1

        with self._changed:
            self._saves += 1
        self._saving.submit(write)

    def _fail(self, question: Question, error: Exception) -> None:
        question.forget_start()
        for choice in range(question.answers):
            question.tell(Ended.by(error, choice))


def _stopped() -> TooBusy:
    return TooBusy("The server is being stopped; ask again when it is back.")


def _said(error: Exception) -> PowerRetentionError:
    if isinstance(error, PowerRetentionError):
        return error
    if isinstance(error, torch.OutOfMemoryError):
        return TooBusy("The server ran out of memory; ask again later.")
    return ServerFailure(f"The server failed ({type(error).__name__}: {error}).")
