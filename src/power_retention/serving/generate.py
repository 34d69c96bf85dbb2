"""Text from a prompt, streamed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer

from power_retention.errors import ArgumentError, SourceError
from power_retention.models import PowerRetentionCache
from power_retention.serving.text import TextStream


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn: greedily at temperature 0."""

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 0.95
    repetition_penalty: float = 1.0
    seed: int = 0


class _Listener(BaseStreamer):
    """Collects the text of an answer, and hands over what is certain of it as it comes."""

    def __init__(self, stream: TextStream, emit: Callable[[str], None] | None) -> None:
        self.stream, self.emit, self.text, self._asked = stream, emit, "", False

    def put(self, value: Tensor) -> None:
        """Take the prompt, which comes first, and then tokens."""
        tokens, self._asked = (value.flatten().tolist() if self._asked else []), True
        for token in tokens:
            self._say(self.stream.add(token))

    def end(self) -> None:
        """Say what was held back."""
        self._say(self.stream.finish())

    def _say(self, text: str) -> None:
        self.text += text
        if self.emit and text:
            self.emit(text)


def generate_text(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    sampling: Sampling,
    *,
    chat: bool = False,
    emit: Callable[[str], None] | None = None,
    cache: PowerRetentionCache | None = None,
    prefill_chunk_size: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> str:
    """Continue a prompt, or answer it as a chat message.

    Args:
        model: a power-retention model, or a Transformer (without the last three arguments).
        tokenizer: its tokenizer.
        prompt: what to continue.
        sampling: how; with ``max_new_tokens=0`` the prompt is only read.
        chat: put the prompt into the tokenizer's chat template.
        emit: is given the text as it comes.
        cache: what was read before; afterwards it has read the prompt and the answer too.
        prefill_chunk_size: read the prompt in pieces of so many tokens, so that memory does not grow with it.
        progress: is called with (tokens of the prompt read, tokens of the prompt) after each piece.
    """
    if chat and not tokenizer.chat_template:
        raise SourceError("This model has no chat template; generate without --chat.")
    seen = 0 if cache is None else cache.get_seq_length()
    if chat:
        inputs = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
    else:
        inputs = tokenizer(prompt, return_tensors="pt", add_special_tokens=not seen)
    ids = inputs["input_ids"]
    if not ids.shape[1]:
        raise ArgumentError("The prompt is empty; at least one token was expected.")
    listener = _Listener(TextStream(tokenizer, ids[0].tolist()), emit)
    torch.manual_seed(sampling.seed)
    random = {"do_sample": True, "temperature": sampling.temperature, "top_p": sampling.top_p}
    with torch.inference_mode(), _reading(model, ids.shape[1], progress):
        if sampling.max_new_tokens == 0:
            read_tokens(model, ids, cache, prefill_chunk_size)
            return ""
        output = model.generate(
            input_ids=ids,
            # As long as everything read, it says that these tokens are new.
            attention_mask=torch.ones(1, seen + ids.shape[1], dtype=torch.long),
            max_new_tokens=sampling.max_new_tokens,
            repetition_penalty=sampling.repetition_penalty,
            streamer=listener,
            pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
            prefill_chunk_size=prefill_chunk_size,
            **({} if cache is None else {"past_key_values": cache}),
            **(random if sampling.temperature > 0 else {"do_sample": False, "temperature": None, "top_p": None}),
        )
        if cache is not None:  # generation does not read the last token it writes
            read_tokens(model, output[:, -1:], cache)
    return listener.text


def read_tokens(
    model: PreTrainedModel, ids: Tensor, cache: PowerRetentionCache | None, piece: int | None = None
) -> None:
    """Read ``ids`` ``[B, T]`` into a cache, ``piece`` tokens at a time."""
    for part in ids.split(piece or ids.shape[1], dim=1):
        model(part.to(model.device), past_key_values=cache, use_cache=True, logits_to_keep=1)


@contextmanager
def _reading(model: PreTrainedModel, tokens: int, progress: Callable[[int, int], None] | None) -> Iterator[None]:
    """Report how much of a prompt has been read, forward by forward."""
    if progress is None:
        yield
        return
    read = 0

    def count(embedding: object, arguments: tuple[Tensor], output: Tensor) -> None:
        nonlocal read
        if read < tokens:
            read += arguments[0].shape[1]
            progress(min(read, tokens), tokens)

    handle = model.get_input_embeddings().register_forward_hook(count)
    try:
        yield
    finally:
        handle.remove()


def open_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer saved beside a model.

    Raises:
        SourceError: there is none.
    """
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise SourceError(f"{folder} holds no tokenizer that can be read: {error}") from error
    return tokenizer
