"""The server as its clients meet it: a real process, a real model, many requests at a time."""

from __future__ import annotations

import json
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2
import pytest
import torch
from servers import TEMPLATE, Served, distance, open_model, prompts_of, serving

from power_retention import PowerRetentionCache
from power_retention.cli import main
from power_retention.conversion.convert import calibration_windows, convert, save_conversion
from power_retention.conversion.source import open_source
from power_retention.serving.states import StateDirectory, owner_of

CLOSE = 1e-4
KEYS = ("key-of-anna", "key-of-ben")


@pytest.fixture(scope="module")
def folder(stories_dir: Path, stories_text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    source = open_source(str(stories_dir))
    with open(stories_text, encoding="utf-8") as lines:
        text = " ".join(json.loads(next(lines))["text"] for _ in range(10))
    ids = source.tokenizer(text, return_tensors="pt")["input_ids"][0]
    converted = tmp_path_factory.mktemp("served") / "stories"
    save_conversion(convert(source, calibration_windows(ids, count=2, length=64)), converted)
    (converted / "chat.jinja").write_text(TEMPLATE)
    return converted


@pytest.fixture(scope="module")
def served(folder: Path) -> Iterator[Served]:
    options = ("--users", "3", "--prefill-chunk-size", "32", "--chat-template", folder / "chat.jinja")
    with serving(folder, *options, "--max-tokens", "2000", "--max-prompt-tokens", "20000") as server:
        yield server


@pytest.fixture(scope="module")
def states(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("named") / "states"


@pytest.fixture(scope="module")
def keeping(folder: Path, states: Path) -> Iterator[Served]:
    keys = [part for key in KEYS for part in ("--api-key", key)]
    with serving(folder, "--states", states, "--max-states", "3", *keys) as server:
        yield server.as_(KEYS[0])


def until(true: Any, seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_ragged_requests_at_once_are_answered_as_if_alone(served: Served, folder: Path) -> None:
    prompts = prompts_of((1, 300, 2, 33, 64, 150, 7, 31))
    with ThreadPoolExecutor(len(prompts)) as pool:  # more than there are rows
        answers = list(pool.map(lambda prompt: served.complete(prompt, 20 + 5 * (len(prompt) % 7)), prompts))
    assert max(distance(folder, *pair) for pair in zip(answers, prompts, strict=True)) < CLOSE
    assert served.health() == {"status": "ok", "users": 3, "writing": 0, "reading": 0, "waiting": 0, "saving": 0}


def test_greedy_answers_are_those_of_generate(served: Served, folder: Path) -> None:
    prompt = prompts_of((40,))[0]
    answer = served.complete(prompt, 40)
    ids = torch.tensor([prompt])
    expected = open_model(folder).generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=40, eos_token_id=None
    )
    assert answer["choices"][0]["token_ids"] == expected[0, 40:].tolist()
    assert answer["usage"] == {"prompt_tokens": 40, "completion_tokens": 40, "total_tokens": 80}


def test_several_answers_and_prompts_draw_by_their_seeds(served: Served, folder: Path) -> None:
    prompts = prompts_of((5, 70))
    many = served.complete(prompts, 15, n=3, temperature=0.8, top_p=0.9, seed=7)
    assert [choice["index"] for choice in many["choices"]] == list(range(6))
    assert distance(folder, many, *[prompts[0]] * 3, *[prompts[1]] * 3) < CLOSE
    written = [tuple(choice["token_ids"]) for choice in many["choices"]]
    assert len(set(written)) == 6
    alone = served.complete(prompts[1], 15, temperature=0.8, top_p=0.9, seed=8)
    assert tuple(alone["choices"][0]["token_ids"]) == written[4]


@pytest.mark.parametrize("fields", [{}, {"stop": ["the "]}, {"temperature": 1.2, "seed": 3}])
def test_a_stream_says_the_same(served: Served, fields: dict[str, Any]) -> None:
    wanted = {"prompt": "Once upon a time", "max_tokens": 60, "temperature": 0, **fields}
    whole = served.post("completions", **wanted).json()
    pieces = served.stream("completions", **wanted, stream_options={"include_usage": True})
    assert pieces[-1]["usage"] == whole["usage"]
    choices = [piece["choices"][0] for piece in pieces[:-1]]
    assert "".join(choice["text"] for choice in choices) == whole["choices"][0]["text"]
    assert choices[-1]["finish_reason"] == whole["choices"][0]["finish_reason"]
    assert len(choices) > 3


def test_stop_strings_end_an_answer_and_are_no_part_of_it(served: Served) -> None:
    fields = {"prompt": "Once upon a time", "max_tokens": 80, "temperature": 0}
    free = served.post("completions", **fields).json()["choices"][0]["text"]
    word = free.split()[5]
    stopped = served.post("completions", **fields, stop=["never written", word]).json()["choices"][0]
    assert (stopped["text"], stopped["finish_reason"]) == (free[: free.index(word)], "stop")


def test_a_chat(served: Served) -> None:
    messages = [{"role": "user", "content": "Tell me about a dog."}]
    fields = {"messages": messages, "max_tokens": 30, "temperature": 0, "logprobs": True, "top_logprobs": 2}
    whole = served.post("chat/completions", **fields).json()
    rendered = "<s>[user] Tell me about a dog.\n[assistant] "
    plain = served.complete(rendered, 30, add_special_tokens=False, ignore_eos=False)
    assert whole["choices"][0]["message"] == {"role": "assistant", "content": plain["choices"][0]["text"]}
    told = whole["choices"][0]["logprobs"]["content"]
    assert [one["logprob"] for one in told] == pytest.approx(
        plain["choices"][0]["logprobs"]["token_logprobs"], abs=CLOSE
    )
    assert all(one["top_logprobs"][0]["logprob"] == one["logprob"] for one in told)  # greedy
    pieces = served.stream("chat/completions", **fields)
    assert pieces[0]["choices"][0]["delta"]["role"] == "assistant"
    assert "".join(p["choices"][0]["delta"]["content"] for p in pieces) == plain["choices"][0]["text"]


def test_nobody_waits_for_a_long_prompt(served: Served, folder: Path) -> None:
    long, short = prompts_of((6000, 20))
    ended: dict[str, float] = {}

    def ask(name: str, prompt: list[int]) -> dict[str, Any]:
        answer = served.complete(prompt, 10)
        ended[name] = time.monotonic()
        return answer

    with ThreadPoolExecutor(2) as pool:
        slow = pool.submit(ask, "long", long)
        until(lambda: served.health()["reading"])
        ask("short", short)
        assert distance(folder, slow.result(), long) < CLOSE
    assert ended["short"] < ended["long"]


def test_a_client_that_goes_away_frees_its_rows(served: Served, folder: Path) -> None:
    long, other = prompts_of((15000, 30))
    with served.client() as client:
        body = {"prompt": other, "max_tokens": 2000, "n": 2, "ignore_eos": True, "stream": True}
        with client.stream("POST", "completions", json=body) as answer:
            lines = answer.iter_lines()  # collected, it would close the connection
            next(lines)
            assert served.health()["writing"] == 2
    until(lambda: served.health()["writing"] == 0)
    # Also one that waits for the whole answer, while its prompt is being read.
    with pytest.raises(httpx2.TimeoutException), served.client() as client:
        client.post("completions", json={"prompt": long, "max_tokens": 2000}, timeout=1.0)
    until(lambda: served.health()["reading"] + served.health()["writing"] == 0, 3)
    assert distance(folder, served.complete(other), other) < CLOSE


def test_what_is_too_much_waits_or_is_refused(folder: Path) -> None:
    with serving(folder, "--users", "1", "--waiting", "1") as tight:
        prompt = prompts_of((10,))[0]
        stop = threading.Event()

        def occupy() -> None:
            body = {"prompt": prompt, "max_tokens": 4000, "ignore_eos": True, "stream": True}
            with tight.client() as client, client.stream("POST", "completions", json=body) as answer:
                lines = answer.iter_lines()  # collected, it would close the connection
                next(lines)
                stop.wait(60)

        with ThreadPoolExecutor(2) as pool:
            first = pool.submit(occupy)
            until(lambda: tight.health()["writing"] == 1)
            second = pool.submit(tight.complete, prompt)
            until(lambda: tight.health()["waiting"] == 1)
            third = tight.post("completions", prompt=prompt)
            assert (third.status_code, "1 requests wait already" in third.text) == (503, True)
            stop.set()
            first.result()
            assert distance(folder, second.result(), prompt) < CLOSE


REFUSED = {
    "no prompt": ({}, "prompt is None"),
    "an empty prompt": ({"prompt": []}, "prompt is"),
    "no such token": ({"prompt": [5, 512]}, "0 to 511"),
    "a long prompt": ({"prompt": [5] * 20001}, "20,001 tokens"),
    "a long answer": ({"prompt": "A", "max_tokens": 2001}, "max_tokens=2,001"),
    "no answer": ({"prompt": "A", "max_tokens": 0}, "max_tokens is 0"),
    "many answers": ({"prompt": "A", "n": 4}, "up to 3 answers"),
    "a cold temperature": ({"prompt": "A", "temperature": -1}, "temperature is -1"),
    "a temperature in words": ({"prompt": "A", "temperature": "hot"}, "temperature is 'hot'"),
    "an immense temperature": ({"prompt": "A", "temperature": 10**400}, "temperature is 1"),
    "half a character": ({"prompt": "A\ud800"}, "lone surrogate"),
    "no share": ({"prompt": "A", "top_p": 0}, "top_p is 0"),
    "an empty stop": ({"prompt": "A", "stop": ""}, "stop is ''"),
    "too many likelihoods": ({"prompt": "A", "logprobs": 21}, "logprobs is 21"),
    "an unknown field": ({"prompt": "A", "colour": "red"}, "'colour' is not served"),
    "a penalty": ({"prompt": "A", "presence_penalty": 0.5}, "presence_penalty=0.5 is not served"),
    "another model": ({"prompt": "A", "model": "gpt"}, "no model 'gpt'"),
    "a state where none are kept": ({"prompt": "A", "state": "book"}, "keeps no states"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_in_a_sentence(served: Served, case: str) -> None:
    body, sentence = REFUSED[case]
    answer = served.post("completions", **body)
    assert answer.status_code == (404 if case == "another model" else 400)
    assert sentence in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--device", "nonsense"], "--device nonsense cannot be used here"),
        (["--device", "meta"], "--device meta cannot be used here"),
        (["--states", __file__], "is a file; a folder was expected"),
        (["--host", "192.0.2.1"], "Nobody can listen at 192.0.2.1"),
    ],
)
def test_refused_before_the_model_is_opened(
    options: list[str], sentence: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["power-retention", "serve", "no-such-model", *options])
    with pytest.raises(SystemExit, match="1"):
        main()
    assert sentence in " ".join(capsys.readouterr().err.split())


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
def test_ctrl_c_twice_ends_answers_with_a_sentence(folder: Path) -> None:
    """The terminal shows no traceback, and a client that waits learns why."""
    command = [
        sys.executable,
        "-m",
        "power_retention.cli",
        "serve",
        str(folder),
        "--port",
        "0",
        "--max-tokens",
        "1000000",
    ]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as server:
        assert server.stderr is not None
        url = re.search(r"http://\S+/v1", server.stderr.readline())
        assert url
        body = {"prompt": [5, 6], "max_tokens": 1_000_000, "ignore_eos": True, "stream": True}
        with (
            httpx2.Client(base_url=url[0], timeout=60) as client,
            client.stream("POST", "completions", json=body) as answer,
        ):
            lines = answer.iter_lines()
            next(lines)
            server.send_signal(signal.SIGINT)
            said = [server.stderr.readline()]
            server.send_signal(signal.SIGINT)
            last = [line for line in lines if line][-2:]
        said.append(server.stderr.read())
        assert server.wait(30) == 130
    assert said == ["One answer has 10 seconds to end.  Ctrl-C again ends at once.\n", ""]
    assert last[1] == "data: [DONE]"
    error = json.loads(last[0].removeprefix("data: "))["error"]
    assert (error["code"], error["message"]) == (503, "The server is being stopped; ask again when it is back.")


def test_a_port_that_is_taken_is_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        monkeypatch.setattr(sys, "argv", ["power-retention", "serve", "no-such-model", "--port", port])
        with pytest.raises(SystemExit, match="1"):
            main()
    assert f"Nobody can listen at 127.0.0.1, port {port}" in " ".join(capsys.readouterr().err.split())


def test_what_is_no_request(served: Served) -> None:
    with served.client() as client:
        assert client.post("completions", content=b"{").status_code == 400
        assert client.post("completions", content=b"[1]").status_code == 400
        assert client.get("models").json()["data"][0]["id"] == "stories"
        elsewhere = client.get("completions"), client.get("nothing")
        assert [answer.status_code for answer in elsewhere] == [405, 404]
        assert all("/v1/chat/completions" in answer.json()["error"]["message"] for answer in elsewhere)
    picture = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]
    assert "reads text only" in served.post("chat/completions", messages=picture).text


def test_a_book_read_once(keeping: Served, folder: Path, states: Path) -> None:
    book, question, more = prompts_of((120, 8, 20))
    read = book + keeping.complete(book, save_state="book")["choices"][0]["token_ids"]
    assert StateDirectory(states, owner=owner_of(KEYS[0])).inspect("book").header.tokens_seen == len(read)
    answer = keeping.complete(question, vllm_xargs={"state": "book", "save_state": "book-2"})
    assert distance(folder, answer, read + question) < CLOSE
    read_on = read + question + answer["choices"][0]["token_ids"]
    with ThreadPoolExecutor(6) as pool:
        forks = list(pool.map(lambda _: keeping.complete(more, state="book-2"), range(6)))
    assert max(distance(folder, fork, read_on + more) for fork in forks) < CLOSE
    # Another process goes on, as if nothing had stopped; so does the Hugging Face class.
    with serving(folder, "--states", states, "--api-key", KEYS[0]) as second:
        assert distance(folder, second.as_(KEYS[0]).complete(more, state="book-2"), read_on + more) < CLOSE
    model = open_model(folder)
    path = StateDirectory(states, owner=owner_of(KEYS[0])).existing("book-2")
    with torch.no_grad():
        logits = model(torch.tensor([more]), past_key_values=PowerRetentionCache.load(path, model)).logits
        whole = model(torch.tensor([read_on + more])).logits
    assert (logits - whole[:, -len(more) :]).abs().max() < CLOSE * whole.abs().max()
    assert not list(states.rglob("*.pinned"))


def test_keys_see_nothing_of_each_other(keeping: Served) -> None:
    keeping.complete([5] * 30, save_state="mine")
    ben = keeping.as_(KEYS[1])
    refused = ben.post("completions", prompt="And?", state="mine")
    assert (refused.status_code, "no state called 'mine'" in refused.text) == (400, True)
    assert "mine" in {state["id"] for state in keeping.get("states").json()["data"]}
    assert ben.get("states").json()["data"] == []
    assert ben.get("states/mine").status_code == 404
    with ben.client() as client:
        assert client.delete("states/mine").status_code == 404
        assert client.post("states/mine/fork", json={"to": "stolen"}).status_code == 404
    for stranger in ("", "key-of-eve"):
        assert keeping.as_(stranger).get("states").status_code == 401
        assert keeping.as_(stranger).post("completions", prompt="A").status_code == 401


def test_states_are_looked_at_forked_and_deleted(keeping: Served) -> None:
    with keeping.client() as client:
        for state in client.get("states").json()["data"]:
            assert client.delete(f"states/{state['id']}").json()["deleted"]
        keeping.complete([5] * 30, save_state="one")
        found = client.get("states/one").json()
        assert found["tokens_seen"] == 40
        forked = client.post("states/one/fork", json={"to": "two"}).json()
        assert forked["extra"]["forked_from"] == found["checksum"]
        assert client.post("states/one/fork", json={"to": "../two"}).status_code == 400
        taken = client.post("states/one/fork", json={"to": "two"})
        assert (taken.status_code, "A state called 'two' is kept already" in taken.text) == (409, True)
        assert client.post("states/one/fork", json={}).status_code == 400
        assert client.post("states/one/fork", json={"to": "three"}).status_code == 200
        assert client.post("states/one/fork", json={"to": "four"}).status_code == 507
        full = keeping.post("completions", prompt="A", save_state="four")
        assert (full.status_code, "3 are kept already" in full.text) == (507, True)
        assert client.get("states/..%2F..%2Fetc").status_code in (400, 404)


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"state": "../book"}, "no name of a state"),
        ({"save_state": "/etc/passwd"}, "no name of a state"),
        ({"state": 5}, "one name of a state"),
        ({"state": "a", "vllm_xargs": {"state": "b"}}, "one name of a state"),
        ({"state": "nowhere"}, "no state called 'nowhere'"),
        ({"save_state": "one", "n": 2}, "ask for one"),
        ({"save_state": "one", "stop": "x"}, "stop strings"),
        ({"save_state": "one", "prompt": ["A", "B"]}, "2 prompts"),
    ],
)
def test_names_are_refused(keeping: Served, fields: dict[str, Any], sentence: str) -> None:
    answer = keeping.post("completions", **{"prompt": "A", **fields})
    assert (answer.status_code, sentence in answer.text) == (400, True), answer.text


def test_a_state_that_was_tampered_with(keeping: Served, states: Path) -> None:
    own = StateDirectory(states, owner=owner_of(KEYS[0]))
    name, *others = [state.name for state in own.list()]
    for other in others:
        own.delete(other)
    path = own.existing(name)
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)
    answer = keeping.post("completions", prompt="A", state=name)
    assert (answer.status_code, f"The state '{name}' was altered" in answer.text) == (400, True), answer.text
    path.write_bytes(content[:1000])
    with keeping.client() as client:
        looked, forked = client.get(f"states/{name}"), client.post(f"states/{name}/fork", json={"to": "copy"})
    for answer in (looked, forked):
        assert (answer.status_code, f"The state '{name}' is cut short" in answer.text) == (400, True), answer.text
    assert not list(states.rglob("*.pinned"))
