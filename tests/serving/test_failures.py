"""What goes wrong while a request is served: said with the right status, in a sentence, and nothing is left behind."""

from __future__ import annotations

import errno
import json
import os
import shutil
import threading
from collections import namedtuple
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from servers import prompts_of
from starlette.testclient import TestClient

from power_retention.models import PowerRetentionForCausalLM
from power_retention.serving.server.app import ServerOptions, make_app
from power_retention.serving.server.batcher import Batcher
from power_retention.serving.states import StateDirectory
from real_models import STORIES_FILES, read_llama2c_tokenizer
from tiny_models import tiny_model

Usage = namedtuple("Usage", "total used free")


@pytest.fixture
def model() -> PowerRetentionForCausalLM:
    return tiny_model(vocab_size=512)


@pytest.fixture
def states(tmp_path: Path) -> StateDirectory:
    return StateDirectory(tmp_path / "states")


@pytest.fixture
def batcher(model: PowerRetentionForCausalLM) -> Batcher:
    return Batcher(model, read_llama2c_tokenizer(STORIES_FILES / "tokenizer.bin"), users=1)


@pytest.fixture
def client(batcher: Batcher, states: StateDirectory) -> Iterator[TestClient]:
    with TestClient(make_app(batcher, ServerOptions("tiny", states=states.path))) as client:
        yield client


def ask(client: TestClient, tokens: int = 5, **fields: Any) -> Any:
    prompt = prompts_of((9,))[0]
    body = {"prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True, **fields}
    return client.post("/v1/completions", json=body)


def no_space(*_: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def full_when_written(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(os, "fsync", no_space)


def full_to_begin_with(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(shutil, "disk_usage", lambda path: Usage(10**9, 10**9, 0))


@pytest.mark.parametrize("full", [full_when_written, full_to_begin_with])
def test_a_disk_that_is_full(
    client: TestClient, states: StateDirectory, monkeypatch: pytest.MonkeyPatch, full: Callable[..., None]
) -> None:
    assert ask(client, save_state="book").status_code == 200
    before = states.inspect("book")
    with monkeypatch.context() as patch:
        full(patch)
        refused = ask(client, tokens=7, state="book", save_state="book")
        forked = client.post("/v1/states/book/fork", json={"to": "other"})
        served = ask(client, state="book")
    for answer, name in ((refused, "book"), (forked, "other")):
        message = answer.json()["error"]["message"]
        assert (answer.status_code, answer.json()["error"]["code"]) == (507, 507), message
        assert f"The state '{name}' cannot be saved" in message
        assert "Delete some" in message
        assert str(states.path) not in message  # nobody's business
    assert served.status_code == 200
    assert states.inspect("book") == before
    assert os.listdir(states.path) == ["book.state"]
    assert ask(client, tokens=7, state="book", save_state="book").status_code == 200
    assert states.inspect("book").header.tokens_seen == before.header.tokens_seen + 16


def test_a_stream_ends_with_the_same_words(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    full_when_written(monkeypatch)
    said = ask(client, save_state="book", stream=True).text.split("\n\n")
    assert said[-2:] == ["data: [DONE]", ""]
    error = json.loads(said[-3].removeprefix("data: "))["error"]
    assert (error["code"], "The state 'book' cannot be saved" in error["message"]) == (507, True)


class Gate:
    """A model that reads nothing until it is let."""

    def __init__(self, model: PowerRetentionForCausalLM) -> None:
        self.reached, self.opened = threading.Event(), threading.Event()
        model.register_forward_pre_hook(self.wait, with_kwargs=True)

    def wait(self, model: object, ids: tuple[torch.Tensor, ...], _: object) -> None:
        if not self.opened.is_set():
            self.reached.set()
            assert self.opened.wait(60)


def in_the_background(act: Callable[[], Any]) -> Callable[[], Any]:
    """Begin; what is returned waits for the result."""
    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.append(act()))
    thread.start()

    def result() -> Any:
        thread.join(60)
        return results[0]

    return result


def until(true: Callable[[], bool]) -> None:
    for _ in range(1000):
        if true():
            return
        threading.Event().wait(0.01)
    raise AssertionError("it never came")


@pytest.mark.parametrize("what", ["the state", "the folder"])
def test_a_state_deleted_while_its_request_waits(
    client: TestClient, batcher: Batcher, model: PowerRetentionForCausalLM, states: StateDirectory, what: str
) -> None:
    """A state that is deleted is held on to; with its folder it is gone, which is the request's end and nobody else's."""
    expected = [ask(client, save_state="book").status_code, ask(client, state="book", save_state="next").json()]
    gate = Gate(model)
    first = in_the_background(lambda: ask(client))
    assert gate.reached.wait(60)
    second = in_the_background(lambda: ask(client, state="book"))
    until(lambda: batcher.load["waiting"] == 1)
    if what == "the folder":
        shutil.rmtree(states.path)
    else:
        assert client.delete("/v1/states/book").status_code == 200
    gate.opened.set()
    assert first().status_code == expected[0] == 200
    answer = second()
    if what == "the folder":
        assert answer.status_code == 400
        assert "was removed while the request waited" in answer.json()["error"]["message"]
        assert ask(client).status_code == 200
    else:
        assert answer.json()["choices"] == expected[1]["choices"]
        assert os.listdir(states.path) == ["next.state"]


def test_a_server_that_is_stopped_says_so(
    client: TestClient, batcher: Batcher, model: PowerRetentionForCausalLM
) -> None:
    gate = Gate(model)
    first = in_the_background(lambda: ask(client))
    assert gate.reached.wait(60)
    closed = in_the_background(batcher.close)
    until(lambda: batcher._closing)
    gate.opened.set()
    answer = first()
    closed()
    assert (answer.status_code, "being stopped" in answer.text) == (503, True)


@pytest.mark.parametrize(
    ("error", "status", "sentence"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), 503, "ran out of memory"),
        (RuntimeError("mat1 and mat2"), 500, "RuntimeError"),
    ],
)
def test_a_step_that_fails(
    client: TestClient, model: PowerRetentionForCausalLM, error: Exception, status: int, sentence: str
) -> None:
    def fail(*_: object) -> None:
        raise error

    hook = model.register_forward_pre_hook(fail)
    answer = ask(client)
    hook.remove()
    assert (answer.status_code, sentence in answer.json()["error"]["message"]) == (status, True)
    assert ask(client).status_code == 200
