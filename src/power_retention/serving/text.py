"""Text as it comes, token by token: whole characters only, and nothing of a string that ends the answer."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

_BEFORE = 6
_UNFINISHED = "\N{REPLACEMENT CHARACTER}"


class TextStream:
    """Turns the tokens of one answer into pieces of text.

    Args:
        tokenizer: the model's.
        before: tokens before the answer: what a token's text is can depend on them (a leading space).
        stop: strings that end the answer and are not part of it.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, before: Sequence[int] = (), stop: Sequence[str] = ()
    ) -> None:
        self.tokenizer, self.stop = tokenizer, tuple(stop)
        self.stopped = False
        self._ids = list(before[-_BEFORE:])
        # Text of tokens [from, to) is out; a token's text is what it adds to that of the few before it.
        self._from, self._to = 0, len(self._ids)
        self._held = ""

    def add(self, token: int) -> str:
        """The text that is certain with one token more; afterwards ``stopped`` says whether a stop string was found."""
        self._ids.append(token)
        old, new = self._text(self._from, self._to), self._text(self._from, len(self._ids))
        if len(new) <= len(old) or new.endswith(_UNFINISHED):
            return ""
        self._from, self._to = self._to, len(self._ids)
        return self._release(new[len(old) :])

    def finish(self) -> str:
        """What was held back, at the end of an answer."""
        if self.stopped:
            return ""
        old, new = self._text(self._from, self._to), self._text(self._from, len(self._ids))
        rest, self._to = new[len(old) :], len(self._ids)
        text = self._release(rest)
        held, self._held = self._held, ""
        return text if self.stopped else text + held

    def _text(self, start: int, end: int) -> str:
        return str(self.tokenizer.decode(self._ids[start:end], skip_special_tokens=True))

    def _release(self, text: str) -> str:
        text = self._held + text
        found = [place for place in (text.find(stop) for stop in self.stop) if place >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        held = max((_overlap(text, stop) for stop in self.stop), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]


def _overlap(text: str, stop: str) -> int:
    """Characters at the end of the text that may be the beginning of a stop string."""
    return next((size for size in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:size])), 0)


def ending_tokens(model: object, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """The tokens that end an answer, by the model's generation settings, its configuration or its tokenizer."""
    places = (getattr(model, "generation_config", None), getattr(model, "config", None), tokenizer)
    for place in places:
        found = getattr(place, "eos_token_id", None)
        if found is not None:
            return frozenset(found if isinstance(found, list | tuple) else [found])
    return frozenset()
