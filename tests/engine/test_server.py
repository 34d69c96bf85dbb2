"""vLLM's own OpenAI server in processes of its own, two workers that share the heads, and ordinary clients."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import engines
import httpx
import openai
import pytest

from power_retention.serving.states import StateDirectory, owner_of

KEYS = ("key-of-anna", "key-of-ben")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return engines.write_tiny_model(tmp_path_factory.mktemp("served") / "brumby", published="brumby", head_dim=16)


@pytest.fixture(scope="module")
def states(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("named") / "states"


@pytest.fixture(scope="module")
def address(folder: Path, states: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    template = tmp_path_factory.mktemp("template") / "plain.jinja"
    template.write_text("{% for message in messages %}{{ message.content }}{% endfor %}")
    command = [
        sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", folder, "--served-model-name", "tiny",
        "--host", "127.0.0.1", "--port", str(port), "--dtype", "float32", "--enforce-eager", "--max-model-len", "512",
        "--chat-template", template,
        "--max-num-batched-tokens", "64", "--max-num-seqs", "8", "--tensor-parallel-size", "2",
        "--enable-prefix-caching", "--block-size", "16",
        "--additional-config", f'{{"power_retention": {{"states": "{states}", "max_states": 3}}}}',
        "--middleware", "power_retention.serving.vllm.http.States", "--api-key", *KEYS,
    ]  # fmt: skip
    log = tmp_path_factory.mktemp("log") / "server.log"
    environment = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    with open(log, "w") as output, subprocess.Popen(command, stdout=output, stderr=output, env=environment) as server:
        try:
            for _ in range(800):
                assert server.poll() is None, log.read_text()[-5000:]
                try:
                    httpx.get(f"http://127.0.0.1:{port}/health").raise_for_status()
                    break
                except httpx.HTTPError:
                    time.sleep(0.5)
            else:
                pytest.fail(f"it never answered: {log.read_text()[-5000:]}")
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            server.terminate()


def client(address: str, key: str = KEYS[0]) -> openai.OpenAI:
    return openai.OpenAI(base_url=address, api_key=key, max_retries=0)


def complete(served: openai.OpenAI, prompt: list[int], tokens: int = 10, **names: str) -> Any:
    extra = {"ignore_eos": True, "return_token_ids": True, "vllm_xargs": names or None}
    return served.completions.create(
        model="tiny", prompt=prompt, max_tokens=tokens, temperature=0, logprobs=1, extra_body=extra
    )


def distance(folder: Path, answers: list[Any], prompts: list[list[int]]) -> float:
    import torch

    worst, model = 0.0, engines.open_model(folder)
    for answer, prompt in zip(answers, prompts, strict=True):
        tokens = answer.choices[0].token_ids
        with torch.no_grad():
            expected = model(torch.tensor([prompt + tokens])).logits[0].log_softmax(-1)
        for place, (token, value) in enumerate(zip(tokens, answer.choices[0].logprobs.token_logprobs, strict=True)):
            worst = max(worst, abs(value - expected[len(prompt) - 1 + place, token].item()))
    return worst


def test_concurrent_clients_and_one_that_goes_away(address: str, folder: Path) -> None:
    prompts = engines.prompts_of(engines.LENGTHS)
    with ThreadPoolExecutor(len(prompts)) as pool:
        waiting = [pool.submit(complete, client(address), prompt, 25) for prompt in prompts]
        stream = client(address).completions.create(model="tiny", prompt=prompts[2], max_tokens=300, stream=True)
        next(iter(stream))
        stream.close()
        assert distance(folder, [answer.result() for answer in waiting], prompts) < engines.CLOSE


def test_streamed_and_structured(address: str) -> None:
    whole = client(address).completions.create(model="tiny", prompt="Once upon", max_tokens=20, temperature=0)
    pieces = client(address).completions.create(
        model="tiny", prompt="Once upon", max_tokens=20, temperature=0, stream=True
    )
    assert "".join(piece.choices[0].text for piece in pieces) == whole.choices[0].text
    answer = client(address).chat.completions.create(
        model="tiny",
        messages=[{"role": "user", "content": "Yes or no?"}],
        max_tokens=20,
        extra_body={"structured_outputs": {"choice": ["Yes", "No"]}},
    )
    assert answer.choices[0].message.content in ("Yes", "No")


def test_a_book_read_once(address: str, folder: Path, states: Path) -> None:
    anna, ben = (client(address, key) for key in KEYS)
    book, question, more = engines.prompts_of((120, 8, 20))
    read = book + complete(anna, book, save_state="book").choices[0].token_ids
    answer = complete(anna, question, state="book", save_state="book-2")
    assert distance(folder, [answer], [read + question]) < engines.CLOSE
    # At once from the other process's file, forked by many.
    read_on = read + question + answer.choices[0].token_ids
    with ThreadPoolExecutor(6) as pool:
        forks = list(pool.map(lambda _: complete(anna, more, state="book-2"), range(6)))
    assert distance(folder, forks, [read_on + more] * 6) < engines.CLOSE
    own = StateDirectory(states, owner=owner_of(KEYS[0]))
    assert own.inspect("book").header.tokens_seen == len(read)
    # Nothing of it is another key's.
    with pytest.raises(openai.BadRequestError, match="no state called 'book'"):
        complete(ben, question, state="book")
    listed = [httpx.get(f"{address}/states", headers=_bearer(key)).json()["data"] for key in KEYS]
    assert [{state["id"] for state in found} for found in listed] == [{"book", "book-2"}, set()]


@pytest.mark.parametrize("stream", [False, True])
def test_a_state_that_was_promised_and_never_came(address: str, stream: bool) -> None:
    anna, extra = client(address), {"ignore_eos": True, "vllm_xargs": {"save_state": "gone"}}
    writes = anna.completions.create(model="tiny", prompt=[7] * 9, max_tokens=450, stream=True, extra_body=extra)
    next(iter(writes))

    def go_on() -> Any:
        extra = {"vllm_xargs": {"state": "gone"}}
        answer = anna.completions.create(model="tiny", prompt=[9], max_tokens=3, stream=stream, extra_body=extra)
        return list(answer) if stream else answer

    with ThreadPoolExecutor(1) as pool:
        waits = pool.submit(go_on)
        time.sleep(0.3)
        writes.close()  # hung up on: nothing is saved
        with pytest.raises(openai.APIError, match="no state called 'gone'") as refused:
            waits.result(60)
    assert refused.value.body["code"] == 400  # type: ignore[index]
    after = anna.completions.create(model="tiny", prompt=[9], max_tokens=3, extra_body={"ignore_eos": True})
    assert after.usage
    assert after.usage.completion_tokens == 3


def test_states_are_looked_at_forked_and_deleted(address: str) -> None:
    anna = _bearer(KEYS[0])
    complete(client(address), [5] * 30, save_state="one")
    deadline = time.time() + 20
    while (found := httpx.get(f"{address}/states/one", headers=anna)).status_code == 404:
        assert time.time() < deadline
        time.sleep(0.1)
    assert found.json()["tokens_seen"] == 40
    for name in ("book", "book-2"):
        httpx.delete(f"{address}/states/{name}", headers=anna)
    forked = httpx.post(f"{address}/states/one/fork", headers=anna, json={"to": "two"}).json()
    assert forked["extra"]["forked_from"] == found.json()["checksum"]
    assert httpx.post(f"{address}/states/one/fork", headers=anna, json={"to": "../two"}).status_code == 400
    assert httpx.post(f"{address}/states/one/fork", headers=anna, json={"to": "three"}).status_code == 200
    full = httpx.post(f"{address}/states/one/fork", headers=anna, json={"to": "four"})
    assert (full.status_code, "3 are kept already" in full.text) == (507, True)
    with pytest.raises(openai.APIStatusError, match="3 are kept already") as no_room:
        complete(client(address), [5] * 30, save_state="four")
    assert no_room.value.status_code == 507
    for name in ("one", "two", "three"):
        assert httpx.delete(f"{address}/states/{name}", headers=anna).json()["deleted"]
    assert httpx.delete(f"{address}/states/one", headers=anna).status_code == 404
    assert httpx.get(f"{address}/states", headers=anna).json()["data"] == []
    assert httpx.get(f"{address}/states").status_code == 401
    assert httpx.get(f"{address}/states/..%2F..%2Fetc", headers=anna).status_code in (400, 404)


def _bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}
