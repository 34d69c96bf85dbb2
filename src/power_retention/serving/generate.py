"""Text from a prompt, streamed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase, TextStreamer

from power_retention.errors import SourceError


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn: greedily at temperature 0."""

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 0.95
    repetition_penalty: float = 1.0
    seed: int = 0


class _Callback(TextStreamer):
    """Hands over finished words."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, emit: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.emit = emit

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Pass the text on."""
        self.emit(text)


def generate_text(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    sampling: Sampling,
    *,
    chat: bool = False,
    emit: Callable[[str], None] | None = None,
) -> str:
    """Continue a prompt, or answer it as a chat message; ``emit`` is given the text as it comes."""
    if chat and not tokenizer.chat_template:
        raise SourceError("This model has no chat template; generate without --chat.")
    if chat:
        inputs = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
    else:
        inputs = tokenizer(prompt, return_tensors="pt")
    torch.manual_seed(sampling.seed)
    random = {"do_sample": True, "temperature": sampling.temperature, "top_p": sampling.top_p}
    with torch.inference_mode():
        output = model.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            max_new_tokens=sampling.max_new_tokens,
            repetition_penalty=sampling.repetition_penalty,
            streamer=_Callback(tokenizer, emit) if emit else None,
            pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
            **(random if sampling.temperature > 0 else {"do_sample": False, "temperature": None, "top_p": None}),
        )
    return str(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))


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
