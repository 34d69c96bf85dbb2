"""A conversation reads only what is new, and goes on from where it was kept as if it had not stopped."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from servers import TEMPLATE

from power_retention import swap_attention
from power_retention.conversion.source import Source, open_source
from power_retention.errors import ArgumentError, StateError
from power_retention.serving.conversation import Conversation
from power_retention.serving.sampling import Draw, draw_token
from power_retention.serving.states import StateDirectory
from power_retention.serving.text import TextStream


@pytest.fixture(scope="module")
def source(stories_dir: Path) -> Source:
    return open_source(str(stories_dir))


@pytest.fixture
def talk(source: Source) -> Conversation:
    tokenizer = copy.deepcopy(source.tokenizer)
    tokenizer.chat_template = TEMPLATE
    return Conversation(model_of(source), tokenizer, draw=Draw(), max_tokens=12)


def model_of(source: Source):  # type: ignore[no-untyped-def]
    return swap_attention(copy.deepcopy(source.model)).eval()


def test_every_turn_continues_the_template(talk: Conversation, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []
    original = talk._read
    monkeypatch.setattr(talk, "_read", lambda ids: (read.extend(ids), original(ids))[1])
    first, second = "".join(talk.say("Hello there")), "".join(talk.say("And then?"))
    messages = [("user", "Hello there"), ("assistant", first), ("user", "And then?"), ("assistant", second)]
    expected = "".join(f"[{role}] {text}\n" for role, text in messages).rstrip("\n")
    assert talk.tokenizer.decode(read) == "<s> " + expected
    assert talk.tokens_seen == len(read)


def test_what_ended_an_answer_is_not_said_twice(talk: Conversation) -> None:
    assert talk._next_turn("More", "") == "\n[user] More\n[assistant] "
    assert talk._next_turn("More", "\n") == "[user] More\n[assistant] "


def test_goes_on_as_if_it_had_not_stopped(talk: Conversation, source: Source, tmp_path: Path) -> None:
    directory = StateDirectory(tmp_path)
    "".join(talk.say("Hello there"))
    talk.save(directory, "kept")
    onward = "".join(talk.say("And then?"))
    logits = talk._read([5])
    other = Conversation(model_of(source), talk.tokenizer, draw=Draw(), max_tokens=12)
    assert other.load(directory, "kept").extra["chat_ending"] == talk.ending == ""
    assert "".join(other.say("And then?")) == onward
    torch.testing.assert_close(other._read([5]), logits, rtol=1e-4, atol=1e-4)


def test_what_was_said_to_others_is_refused(talk: Conversation, source: Source, tmp_path: Path) -> None:
    with pytest.raises(StateError, match="nothing was said"):
        talk.save(StateDirectory(tmp_path), "empty")
    "".join(talk.say("Hello"))
    talk.save(StateDirectory(tmp_path), "kept")
    stranger = model_of(source)
    torch.nn.init.normal_(stranger.model.norm.weight)
    with pytest.raises(StateError):
        Conversation(stranger, talk.tokenizer, draw=Draw()).load(StateDirectory(tmp_path), "kept")
    talk.tokenizer.chat_template = "{{ messages[-1].content }}"
    with pytest.raises(ArgumentError, match="drops earlier answers"):
        next(talk.say("More"))


@pytest.mark.parametrize("stop", [(), ("zz", "end")])
def test_streamed_text_is_that_of_the_tokens(source: Source, stop: tuple[str, ...]) -> None:
    tokenizer, text = source.tokenizer, " a cat; żółw 🐢 and more eneneen"
    ids = tokenizer("Once" + text, add_special_tokens=False)["input_ids"]
    start = len(tokenizer("Once", add_special_tokens=False)["input_ids"])
    stream = TextStream(tokenizer, ids[:start], stop)
    pieces = [stream.add(token) for token in ids[start:]] + [stream.finish()]
    assert "".join(pieces) == text
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)


def test_a_stop_string_across_tokens_is_never_shown(source: Source) -> None:
    tokenizer = source.tokenizer
    ids = tokenizer("one two three four", add_special_tokens=False)["input_ids"]
    stream = TextStream(tokenizer, [], ["o thr"])
    shown = ""
    for token in ids:
        shown += stream.add(token)
        if stream.stopped:
            break
    assert (shown + stream.finish(), stream.stopped) == ("one tw", True)


def test_draws_follow_the_probabilities() -> None:
    logits, generator = torch.tensor([0.5, 0.3, 0.15, 0.05]).log(), torch.Generator().manual_seed(0)
    for draw, wanted in (
        (Draw(1.0), [0.5, 0.3, 0.15, 0.05]),
        (Draw(1.0, 0.6), [0.625, 0.375, 0, 0]),
        (Draw(0.5), [0.25 / 0.365, 0.09 / 0.365, 0.0225 / 0.365, 0.0025 / 0.365]),
        (Draw(1e-9), [1, 0, 0, 0]),
        (Draw(1.0, 1e-9), [1, 0, 0, 0]),
    ):
        counts = torch.zeros(4)
        for _ in range(2000):
            counts[draw_token(logits, draw, generator)] += 1
        torch.testing.assert_close(counts / 2000, torch.tensor(wanted, dtype=torch.float32), rtol=0, atol=0.04)
        assert ((counts > 0) <= (torch.tensor(wanted) > 0)).all()
    assert draw_token(logits, Draw()) == 0
