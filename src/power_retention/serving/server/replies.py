"""Answers in the words of OpenAI's API: whole ones and pieces of a stream, of completions and of chats."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedTokenizerBase

from power_retention.serving.sampling import Likelihood
from power_retention.serving.server.batcher import Ended, Event
from power_retention.serving.server.fields import Wishes


@dataclass
class Written:
    """What an answer, or a piece of one, consists of."""

    text: str = ""
    tokens: list[int] = field(default_factory=list)
    likelihoods: list[Likelihood] = field(default_factory=list)
    reason: str | None = None

    def add(self, event: Event) -> None:
        """Go on with what happened next."""
        self.text += event.text
        if isinstance(event, Ended):
            self.reason = event.reason
            return
        self.tokens.append(event.token)
        if event.likelihood is not None:
            self.likelihoods.append(event.likelihood)


class Reply:
    """The answer to one request.

    Args:
        model: the name that the model goes by.
        tokenizer: the model's.
        wishes: what was asked for.
        prompts: token ids of the prompts; each has ``wishes.answers`` answers, in order.
        chat: whether a chat was asked for.
    """

    def __init__(
        self,
        model: str,
        tokenizer: PreTrainedTokenizerBase,
        wishes: Wishes,
        prompts: Sequence[Sequence[int]],
        *,
        chat: bool,
    ) -> None:
        self.tokenizer, self.wishes, self.prompts, self.chat = tokenizer, wishes, prompts, chat
        prefix, kind = ("chatcmpl", "chat.completion") if chat else ("cmpl", "text_completion")
        self.head = {"id": f"{prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}
        self.kind = kind
        self.written = 0
        self.offsets = [0] * (len(prompts) * wishes.answers)

    def whole(self, answers: Sequence[Written]) -> dict[str, Any]:
        """The reply, once all answers are complete."""
        self.written = sum(len(answer.tokens) for answer in answers)
        choices = []
        for index, answer in enumerate(answers):
            said = {"message": {"role": "assistant", "content": answer.text}} if self.chat else {"text": answer.text}
            choices.append(self._choice(index, answer, said))
        return {**self.head, "object": self.kind, "choices": choices, "usage": self.usage()}

    def opening(self) -> list[dict[str, Any]]:
        """The first pieces of a stream: a chat says who speaks."""
        if not self.chat:
            return []
        said = {"delta": {"role": "assistant", "content": ""}}
        return [self._piece(index, Written(), said) for index in range(len(self.offsets))]

    def piece(self, index: int, event: Event) -> dict[str, Any] | None:
        """A piece of a stream, or None where there is nothing to say yet."""
        piece = Written()
        piece.add(event)
        self.written += len(piece.tokens)
        told = piece.likelihoods or (self.wishes.token_ids and piece.tokens)
        if not (piece.text or piece.reason or told):
            return None
        return self._piece(index, piece, {"delta": {"content": piece.text}} if self.chat else {"text": piece.text})

    def closing(self) -> list[dict[str, Any]]:
        """The last piece of a stream, where its usage was asked for."""
        if not self.wishes.usage:
            return []
        return [{**self.head, "object": self._piece_kind, "choices": [], "usage": self.usage()}]

    def usage(self) -> dict[str, int]:
        """Numbers of tokens."""
        read = sum(map(len, self.prompts))
        return {"prompt_tokens": read, "completion_tokens": self.written, "total_tokens": read + self.written}

    @property
    def _piece_kind(self) -> str:
        return f"{self.kind}.chunk" if self.chat else self.kind

    def _piece(self, index: int, piece: Written, said: dict[str, Any]) -> dict[str, Any]:
        return {**self.head, "object": self._piece_kind, "choices": [self._choice(index, piece, said)]}

    def _choice(self, index: int, answer: Written, said: dict[str, Any]) -> dict[str, Any]:
        told = {"token_ids": answer.tokens} if self.wishes.token_ids else {}
        if told and not self.chat:
            told["prompt_token_ids"] = list(self.prompts[index // self.wishes.answers])
        logprobs = None
        if self.wishes.logprobs is not None and answer.likelihoods:
            logprobs = self._chat_logprobs(answer) if self.chat else self._logprobs(index, answer)
        return {"index": index, **said, "logprobs": logprobs, "finish_reason": answer.reason, **told}

    def _logprobs(self, index: int, answer: Written) -> dict[str, Any]:
        tokens, offsets = [self._text(token) for token in answer.tokens], []
        for text in tokens:
            offsets.append(self.offsets[index])
            self.offsets[index] += len(text)
        best = [{self._text(token): value for token, value in one.best} for one in answer.likelihoods]
        return {
            "tokens": tokens,
            "token_logprobs": [one.logprob for one in answer.likelihoods],
            "top_logprobs": best if self.wishes.logprobs else None,
            "text_offset": offsets,
        }

    def _chat_logprobs(self, answer: Written) -> dict[str, Any]:
        return {
            "content": [
                {**self._entry(token, one.logprob), "top_logprobs": [self._entry(*best) for best in one.best]}
                for token, one in zip(answer.tokens, answer.likelihoods, strict=True)
            ]
        }

    def _entry(self, token: int, logprob: float) -> dict[str, Any]:
        text = self._text(token)
        return {"token": text, "logprob": logprob, "bytes": list(text.encode())}

    def _text(self, token: int) -> str:
        return str(self.tokenizer.decode([token]))
