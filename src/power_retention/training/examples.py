"""What fine-tuning reads: conversations, prompts with completions, whole texts; tokens, some of which are to be learned."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from jinja2 import TemplateError
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from power_retention.errors import DataError
from power_retention.training.text import RECORD_ENDINGS, json_records, text_files, text_of_record

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_EVERY = 100
"""Examples between two words of progress."""


@dataclass(frozen=True)
class Example:
    """One document.

    Attributes:
        ids: ``[n]`` int32.
        learned: ``[n]`` boolean, True at tokens that the model is to write.
    """

    ids: npt.NDArray[np.int32]
    learned: npt.NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.ids)


def read_examples(
    paths: Sequence[Path],
    tokenizer: PreTrainedTokenizerBase,
    *,
    chat_template: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[Example]:
    """Read and tokenize every record of some files and folders, in order.

    A record has ``messages`` (a list of objects with ``role`` and ``content``, as chat templates take them; ``tools`` beside it
    are passed on): what the assistant says is learned.  Or ``prompt`` and ``completion``, two texts: the completion is learned.
    Or ``text``: everything is.  Completions and texts end with the end token, which is learned too.

    Args:
        paths: ``.jsonl``, ``.json`` or ``.jsonl.xz`` files, and folders of them.
        tokenizer: of the model, with its chat template.
        chat_template: another one, in Jinja.
        progress: called with (records done, records).

    Raises:
        DataError: a file or record is missing, damaged or of another kind, there is no chat template where one is needed, or
            nothing is to be learned at all.
    """
    records = [
        record for path in paths for file in text_files(Path(path), RECORD_ENDINGS) for record in json_records(file)
    ]
    examples = []
    for done, (where, record) in enumerate(records, 1):
        examples.append(_example(record, tokenizer, chat_template, where))
        if progress and (done % _EVERY == 0 or done == len(records)):
            progress(done, len(records))
    examples = [example for example in examples if example.learned[1:].any()]
    if not examples:
        raise DataError(f"{', '.join(map(str, paths))} hold nothing that a model could learn to write.")
    return examples


def fingerprint_examples(examples: Sequence[Example]) -> str:
    """Sixteen hex digits of all tokens and of what is learned."""
    digest = hashlib.sha256()
    for example in examples:
        digest.update(len(example).to_bytes(8, "little"))
        digest.update(example.ids.tobytes())
        digest.update(example.learned.tobytes())
    return digest.hexdigest()[:16]


def _example(record: Any, tokenizer: PreTrainedTokenizerBase, chat_template: str | None, where: str) -> Example:
    if not isinstance(record, dict):
        raise DataError(
            f"{where} holds a {type(record).__name__}; an object with messages, prompt or text was expected."
        )
    if "messages" in record:
        return _conversation(record, tokenizer, chat_template, where)
    if "prompt" in record or "completion" in record:
        prompt, completion = (text_of_record(record, name, where) for name in ("prompt", "completion"))
        return _completed(prompt, completion, tokenizer)
    if "text" in record:
        return _ended(tokenizer(text_of_record(record, "text", where))["input_ids"], 0, tokenizer)
    fields = ", ".join(map(repr, record)) or "none"
    raise DataError(f"{where} has the fields {fields}; messages, or prompt and completion, or text was expected.")


def _completed(prompt: str, completion: str, tokenizer: PreTrainedTokenizerBase) -> Example:
    """Both as one text: tokenized by itself, a completion would get the space that some tokenizers put before a text."""
    if not tokenizer.is_fast:
        ids = tokenizer(prompt + completion)["input_ids"]
        return _ended(ids, _shared(tokenizer(prompt)["input_ids"], ids), tokenizer)
    read = tokenizer(prompt + completion, return_offsets_mapping=True)
    # A token that joins the prompt's last space to the completion's first word is the completion's.
    reaching = (number for number, (_, stop) in enumerate(read["offset_mapping"]) if stop > len(prompt))
    return _ended(read["input_ids"], next(reaching, len(read["input_ids"])), tokenizer)


def _ended(ids: list[int], first: int, tokenizer: PreTrainedTokenizerBase) -> Example:
    """Tokens that are learned from number ``first`` on, and one end token after them, learned in any case."""
    end = tokenizer.eos_token_id
    whole = ids if end is None or ids[-1:] == [end] else [*ids, end]
    learned = np.arange(len(whole)) >= first
    learned[len(whole) - 1 :] |= end is not None
    return Example(np.asarray(whole, np.int32), learned)


def _repaired(value: Any) -> Any:
    """JSON without the halves of surrogate pairs that it can spell, which are no characters and which no tokenizer takes."""
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode("utf-8")
    if isinstance(value, list):
        return [_repaired(item) for item in value]
    if isinstance(value, dict):
        return {_repaired(name): _repaired(item) for name, item in value.items()}
    return value


def _conversation(
    record: dict[str, Any], tokenizer: PreTrainedTokenizerBase, chat_template: str | None, where: str
) -> Example:
    messages = _repaired(record["messages"])
    template = chat_template or tokenizer.chat_template
    if not isinstance(template, str):
        raise DataError(
            f"{where} is a conversation, and the tokenizer has no chat template for it: give one with --chat-template FILE."
        )
    if not isinstance(messages, list) or not all(
        isinstance(m, dict) and isinstance(m.get("role"), str) for m in messages
    ):
        raise DataError(f"{where} has messages that are no list of objects with a role and a content.")
    options = {"chat_template": template, "tools": _repaired(record.get("tools"))}
    try:
        if _GENERATION.search(template):
            read = tokenizer.apply_chat_template(
                messages, return_dict=True, return_assistant_tokens_mask=True, **options
            )
            return Example(np.asarray(read["input_ids"], np.int32), np.asarray(read["assistant_masks"], np.bool_))
        text = tokenizer.apply_chat_template(messages, tokenize=False, **options)
        spans = list(_spans(messages, text, tokenizer, options, where))
    except (TemplateError, TypeError, ValueError, KeyError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{where} does not fit the chat template: {error}.") from error
    read = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    starts, ends = np.asarray(read["offset_mapping"], np.int64).reshape(-1, 2).T
    learned = np.zeros(len(starts), np.bool_)
    for a, b in spans:
        # A token that joins the prompt's last space to the answer's first word is the answer's.
        learned[np.searchsorted(ends, a, "right") : np.searchsorted(starts, b, "left")] = True
    return Example(np.asarray(read["input_ids"], np.int32), learned)


def _spans(
    messages: list[dict[str, Any]],
    text: str,
    tokenizer: PreTrainedTokenizerBase,
    options: dict[str, Any],
    where: str,
) -> Iterator[tuple[int, int]]:
    """Where the assistant speaks in the rendered text: from where generation would begin to the end of the message."""
    for number, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = ""
        if number:
            before = tokenizer.apply_chat_template(
                messages[:number], tokenize=False, add_generation_prompt=True, **options
            )
        after = tokenizer.apply_chat_template(messages[: number + 1], tokenize=False, **options)
        if not after.startswith(before) or not text.startswith(after):
            raise DataError(
                f"{where}: the chat template writes earlier messages differently once later ones follow, so what the assistant "
                "says cannot be told apart; mark it with {% generation %} in a template of your own (--chat-template FILE)."
            )
        yield len(before), len(after)


def dump_examples(examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    """For people: each document, with what is learned between ⟦ and ⟧."""
    for example in examples:
        edges = [0, *(np.flatnonzero(np.diff(example.learned)) + 1).tolist(), len(example)]
        text, places = _decoded(example, edges, tokenizer)
        pieces = (text[a:b] for a, b in pairwise(places))
        parts = (f"⟦{piece}⟧" if example.learned[i] else piece for i, piece in zip(edges, pieces, strict=False))
        yield json.dumps("".join(parts), ensure_ascii=False)


def _decoded(example: Example, edges: list[int], tokenizer: PreTrainedTokenizerBase) -> tuple[str, list[int]]:
    """The text of a document, and the places in it of some of its tokens.

    Decoded by itself a piece may lose the space before its first word, and a character of several tokens may break.
    """
    beginnings = [tokenizer.decode(example.ids[:edge].tolist()) for edge in edges]
    return beginnings[-1], [_shared(beginning, beginnings[-1]) for beginning in beginnings]


def _shared(one: Sequence[Any], other: Sequence[Any]) -> int:
    """How many items both begin with."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((number for number, (a, b) in pairs if a != b), min(len(one), len(other)))
