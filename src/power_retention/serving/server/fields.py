"""The fields of a request, read strictly: what is not served is refused by name instead of being passed over."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from power_retention.errors import ArgumentError
from power_retention.serving.sampling import Draw

Body = Mapping[str, Any]

_REMARKS = {"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"}
"""Fields that change no answer."""

_NEUTRAL: dict[str, Sequence[Any]] = {
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "repetition_penalty": (1,),
    "logit_bias": ({},),
    "top_k": (0, -1),
    "min_p": (0,),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
}
"""Fields that are not served, and the values at which they ask for nothing."""

_SERVED = {
    "model", "n", "max_tokens", "max_completion_tokens", "temperature", "top_p", "seed", "stop", "stop_token_ids",
    "ignore_eos", "logprobs", "stream", "stream_options", "return_token_ids", "add_special_tokens", "state", "save_state",
    "vllm_xargs",
}  # fmt: skip

MOST_LOGPROBS = 20


@dataclass(frozen=True)
class Wishes:
    """What a request asks for, beside its prompt.

    Attributes:
        answers: a prompt's.
        max_tokens: of each answer; None: as many as the server lets it have.
        logprobs: how many likely tokens to tell with each; None for no likelihoods.
        usage: end a stream with the numbers of tokens.
        token_ids: tell the tokens themselves, too.
        state: name to start from, or "".
        save_state: name to save to, or "".
    """

    answers: int
    max_tokens: int | None
    draw: Draw
    seed: int | None
    stop: tuple[str, ...]
    stop_tokens: frozenset[int]
    ignore_eos: bool
    logprobs: int | None
    stream: bool
    usage: bool
    token_ids: bool
    special_tokens: bool
    state: str
    save_state: str


def wishes_of(body: Body, *, chat: bool) -> Wishes:
    """Read a request's fields.

    Raises:
        ArgumentError: one of them is not served, or has a value that it cannot have.
    """
    _refuse_others(body, chat=chat)
    wishes = Wishes(
        answers=_integer(body, "n", 1, low=1),
        max_tokens=_max_tokens(body, chat=chat),
        draw=Draw(_number(body, "temperature", 1.0, 0, 100), _number(body, "top_p", 1.0, 0, 1, open_below=True)),
        seed=None if body.get("seed") is None else _integer(body, "seed", 0, low=-(2**63), high=2**63 - 1),
        stop=_strings(body, "stop"),
        stop_tokens=frozenset(_token_ids(body.get("stop_token_ids") or [], "stop_token_ids")),
        ignore_eos=_flag(body, "ignore_eos"),
        logprobs=_chat_logprobs(body) if chat else _logprobs(body, "logprobs"),
        stream=_flag(body, "stream"),
        usage=_flag(_object(body, "stream_options"), "include_usage"),
        token_ids=_flag(body, "return_token_ids"),
        special_tokens=_flag(body, "add_special_tokens", default=True),
        state=_name(body, "state"),
        save_state=_name(body, "save_state"),
    )
    if wishes.save_state and wishes.answers > 1:
        raise ArgumentError(f"save_state keeps one answer, and n={wishes.answers} were asked for: ask for one.")
    if wishes.save_state and wishes.stop:
        raise ArgumentError(
            "save_state cannot be used with stop strings, which are found after more was written than they end: use "
            "stop_token_ids, or max_tokens."
        )
    return wishes


def prompts_of(body: Body) -> list[str | list[int]]:
    """The prompts of a completion: one or several, as text or as token ids.

    Raises:
        ArgumentError: it is neither.
    """
    prompt = body.get("prompt")
    if isinstance(prompt, str):
        return [prompt]
    if isinstance(prompt, list) and prompt:
        if all(isinstance(part, str) for part in prompt):
            return list(prompt)
        if all(isinstance(part, list) for part in prompt):
            return [_token_ids(part, "prompt") for part in prompt]
        return [_token_ids(prompt, "prompt")]
    raise ArgumentError(f"prompt is {_shown(prompt)}; a text, token ids, or a list of either was expected.")


def messages_of(body: Body) -> list[dict[str, Any]]:
    """The messages of a chat, their contents as text.

    Raises:
        ArgumentError: they are none.
    """
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise ArgumentError(f"messages is {_shown(messages)}; a list of at least one message was expected.")
    return [_message(message) for message in messages]


def _message(message: Any) -> dict[str, Any]:
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise ArgumentError(f'A message is {_shown(message)}; {{"role": …, "content": …}} was expected.')
    content = message.get("content")
    if isinstance(content, list):
        if not all(isinstance(part, dict) and isinstance(part.get("text"), str) for part in content):
            raise ArgumentError("A message holds something that is no text; this server reads text only.")
        content = "".join(part["text"] for part in content)
    if not isinstance(content, str):
        raise ArgumentError(f"A message's content is {_shown(content)}; a text was expected.")
    return {"role": message["role"], "content": content}


def _refuse_others(body: Body, *, chat: bool) -> None:
    own = {"messages", "top_logprobs"} if chat else {"prompt"}
    for field, value in body.items():
        if field in _SERVED or field in own or field in _REMARKS or value is None:
            continue
        if field not in _NEUTRAL:
            raise ArgumentError(f"The field {field!r} is not served; served are {', '.join(sorted(_SERVED | own))}.")
        if value not in _NEUTRAL[field]:
            raise ArgumentError(f"{field}={_shown(value)} is not served; leave it out.")


def _integer(body: Body, field: str, default: int, *, low: int, high: int = 2**31) -> int:
    value = body.get(field)
    value = default if value is None else value
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise ArgumentError(f"{field} is {_shown(value)}; an integer of at least {low} was expected.")
    return value


def _number(body: Body, field: str, default: float, low: float, high: float, *, open_below: bool = False) -> float:
    value = body.get(field)
    value = default if value is None else value
    fits = isinstance(value, int | float) and not isinstance(value, bool)
    if not fits or not low <= value <= high or (open_below and value == low):
        beyond = "above" if open_below else "from"
        raise ArgumentError(f"{field} is {_shown(value)}; a number {beyond} {low} to {high} was expected.")
    return float(value)


def _max_tokens(body: Body, *, chat: bool) -> int | None:
    for field in ("max_completion_tokens", "max_tokens") if chat else ("max_tokens",):
        if body.get(field) is not None:
            return _integer(body, field, 0, low=1)
    return None if chat else 16  # as OpenAI has it


def _flag(body: Body, field: str, *, default: bool = False) -> bool:
    value = body.get(field)
    value = default if value is None else value
    if not isinstance(value, bool):
        raise ArgumentError(f"{field} is {_shown(value)}; true or false was expected.")
    return value


def _object(body: Body, field: str) -> Body:
    value = body.get(field)
    if value is not None and not isinstance(value, dict):
        raise ArgumentError(f"{field} is {_shown(value)}; an object was expected.")
    return value or {}


def _strings(body: Body, field: str) -> tuple[str, ...]:
    value = body.get(field)
    values = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(values, list) or not all(isinstance(one, str) and one for one in values) or len(values) > 16:
        raise ArgumentError(f"{field} is {_shown(value)}; a text or up to 16 of them, none empty, were expected.")
    return tuple(values)


def _token_ids(value: Any, field: str) -> list[int]:
    if not isinstance(value, list) or not all(isinstance(one, int) and not isinstance(one, bool) for one in value):
        raise ArgumentError(f"{field} is {_shown(value)}; a list of token ids was expected.")
    return value


def _logprobs(body: Body, field: str) -> int | None:
    return None if body.get(field) is None else _integer(body, field, 0, low=0, high=MOST_LOGPROBS)


def _chat_logprobs(body: Body) -> int | None:
    best = _logprobs(body, "top_logprobs") or 0
    if not _flag(body, "logprobs"):
        if best:
            raise ArgumentError(f"top_logprobs={best} needs logprobs=true.")
        return None
    return best


def _name(body: Body, field: str) -> str:
    """A state's name, given directly or where vLLM expects it."""
    given = [place[field] for place in (body, _object(body, "vllm_xargs")) if place.get(field) not in (None, "")]
    if not all(isinstance(name, str) for name in given) or len(set(given)) > 1:
        raise ArgumentError(f"{field} is {_shown(given)}; one name of a state was expected.")
    return str(given[0]) if given else ""


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "…"
