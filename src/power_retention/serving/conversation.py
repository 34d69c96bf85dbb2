"""A conversation of one: only what is new is read, and where it stands can be kept and taken up again."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from power_retention.errors import ArgumentError, StateError
from power_retention.models import PowerRetentionCache, PowerRetentionForCausalLM
from power_retention.models.fingerprint import fingerprint_model
from power_retention.ops.state_file import StateHeader
from power_retention.serving.sampling import Draw, draw_token
from power_retention.serving.states import StateDirectory, check_fits
from power_retention.serving.text import TextStream, ending_tokens

_ANSWER = "an earlier answer 7b1f"
_ENDING = "chat_ending"


class Conversation:
    """Messages and answers, of which a state is all that is kept.

    Where the tokenizer has a chat template, messages are put into it; without one they are continued as they are.

    Args:
        model: in evaluation mode.
        tokenizer: its tokenizer.
        draw: how tokens are drawn.
        max_tokens: of an answer.
        seed: of what is random.
        system: a system message before the first one.
        piece: tokens of a message read at a time.

    Raises:
        ArgumentError: there is a system message, and no template to put it into.
    """

    def __init__(
        self,
        model: PowerRetentionForCausalLM,
        tokenizer: PreTrainedTokenizerBase,
        *,
        draw: Draw,
        max_tokens: int = 512,
        seed: int = 0,
        system: str = "",
        piece: int = 256,
    ) -> None:
        if system and not tokenizer.chat_template:
            raise ArgumentError(
                "This model has no chat template to put a system message into: say it in the first message."
            )
        self.model, self.tokenizer, self.draw = model, tokenizer, draw
        self.max_tokens, self.system, self.piece = max_tokens, system, piece
        self.generator = torch.Generator().manual_seed(seed)
        self.endings = ending_tokens(model, tokenizer)
        self.fingerprint = fingerprint_model(model)
        self.reset()

    def reset(self) -> None:
        """Forget everything said."""
        self.cache = PowerRetentionCache(self.model.config.num_hidden_layers)
        # The text of the token that ended the last answer, "" for one that was cut short, None before the first.
        self.ending: str | None = None

    @property
    def tokens_seen(self) -> int:
        """Tokens read and written so far."""
        return int(self.cache.get_seq_length())

    def say(self, message: str, stop: Callable[[], bool] = lambda: False) -> Iterator[str]:
        """Read a message and write the answer, piece by piece; all that was written until the caller stops is read too.

        Args:
            message: what is said.
            stop: asked between pieces and between tokens, whether that was enough.  An exception in the middle of either would
                leave some layers with a token more than others.

        Raises:
            ArgumentError: the message has no token, or the template cannot go on with it.
        """
        ids = self._ids_of(message)
        stream = TextStream(self.tokenizer, ids)
        self.ending = ""
        for start in range(0, len(ids), self.piece):
            if start and stop():
                return
            logits = self._read(ids[start : start + self.piece])
        for _ in range(self.max_tokens):
            if stop():
                break
            token = draw_token(logits, self.draw, self.generator)
            logits = self._read([token])
            if token in self.endings:
                self.ending = str(self.tokenizer.decode([token]))
                break
            if text := stream.add(token):
                yield text
        if text := stream.finish():
            yield text

    def save(self, directory: StateDirectory, name: str) -> StateHeader:
        """Keep where the conversation stands under a name."""
        if not self.tokens_seen:
            raise StateError("There is nothing to save: nothing was said yet.")
        extra = {} if self.ending is None else {_ENDING: self.ending}
        with torch.inference_mode():
            return directory.save(
                name, self.cache.states, model=self.fingerprint, tokens_seen=self.tokens_seen, extra=extra
            )

    def load(self, directory: StateDirectory, name: str) -> StateHeader:
        """Go on from a state: a conversation, or anything else this model has read.  Nothing is read again."""
        states, header = directory.load(name, model=self.fingerprint)
        check_fits(name, header, self.model.config)
        self.reset()
        for layer, state in zip(self.cache.layers, states, strict=True):
            layer.store(state, header.tokens_seen)
        self.ending = header.extra.get(_ENDING)
        return header

    def _ids_of(self, message: str) -> list[int]:
        if self.tokenizer.chat_template:
            if self.ending is None:
                ids = self._tokens(self._first_turn(message))
            else:
                ids = self._tokens_after_answer(self._next_turn(message, self.ending))
        else:
            ids = self.tokenizer(message, add_special_tokens=not self.tokens_seen)["input_ids"]
        if not ids:
            raise ArgumentError("The message is empty; at least one token was expected.")
        return list(ids)

    def _first_turn(self, message: str) -> str:
        system = [{"role": "system", "content": self.system}] if self.system else []
        text = self._rendered([*system, {"role": "user", "content": message}])
        # What was read before has begun the text already.
        return text.removeprefix(self.tokenizer.bos_token or "") if self.tokens_seen else text

    def _next_turn(self, message: str, ending: str) -> str:
        """What the template puts after an answer: its end, as far as that is not written yet, and the next message."""
        before = [{"role": "user", "content": "a question"}, {"role": "assistant", "content": _ANSWER}]
        _, answer, rest = self._rendered([*before, {"role": "user", "content": message}]).partition(_ANSWER)
        if not answer:
            raise ArgumentError("The chat template drops earlier answers, so a conversation cannot go on: use another.")
        return rest.removeprefix(ending)

    def _tokens(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _tokens_after_answer(self, text: str) -> list[int]:
        """Some tokenizers begin every text with a space, which does not belong in the middle of one."""
        before, both = self._tokens(_ANSWER), self._tokens(_ANSWER + text)
        return both[len(before) :] if both[: len(before)] == before else self._tokens(text)

    def _rendered(self, messages: list[dict[str, str]]) -> str:
        return str(self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False))

    @torch.inference_mode()
    def _read(self, ids: list[int]) -> Tensor:
        """Logits ``[V]`` after the last of the tokens."""
        part = torch.tensor([ids], device=self.model.device)
        out = self.model(part, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        logits: Tensor = out.logits[0, -1].cpu()
        return logits
