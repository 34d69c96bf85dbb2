"""Servers in processes of their own, and the answers they must give."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import torch

from power_retention.models import PowerRetentionForCausalLM
from power_retention.serving.generate import open_tokenizer

TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ '[' + message.role + '] ' + message.content + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '[assistant] ' }}{% endif %}"
)
VOCABULARY = 512


@dataclass
class Served:
    url: str
    key: str = ""

    def client(self, **options: Any) -> httpx2.Client:
        headers = {"Authorization": f"Bearer {self.key}"} if self.key else {}
        return httpx2.Client(base_url=self.url, headers=headers, timeout=60, **options)

    def post(self, path: str, **body: Any) -> httpx2.Response:
        with self.client() as client:
            return client.post(path, content=json.dumps(body).encode())

    def complete(self, prompt: Any, tokens: int = 10, **fields: Any) -> dict[str, Any]:
        fields = {"temperature": 0, "logprobs": 1, "ignore_eos": True, "return_token_ids": True, **fields}
        answer = self.post("completions", prompt=prompt, max_tokens=tokens, **fields)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def get(self, path: str) -> httpx2.Response:
        with self.client() as client:
            return client.get(path)

    def health(self) -> dict[str, Any]:
        return httpx2.get(self.url.removesuffix("/v1") + "/health").json()

    def stream(self, path: str, **body: Any) -> list[dict[str, Any]]:
        with self.client() as client, client.stream("POST", path, json={**body, "stream": True}) as answer:
            lines = [line.removeprefix("data: ") for line in answer.iter_lines() if line]
        assert lines[-1] == "[DONE]"
        return [json.loads(line) for line in lines[:-1]]

    def as_(self, key: str) -> Served:
        return Served(self.url, key)


@contextmanager
def serving(folder: Path, *options: str | Path) -> Iterator[Served]:
    command = [sys.executable, "-m", "power_retention.cli", "serve", folder, "--port", "0", "--json", *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, env=environment, text=True) as server:
        try:
            assert server.stdout is not None
            said = ""
            while not said.rstrip().endswith("}"):
                line = server.stdout.readline()
                assert line, f"the server ended with status {server.wait()}"
                said += line
            yield Served(json.loads(said)["url"])
        finally:
            server.terminate()
            assert server.wait(30) in (0, -15, 143)


def prompts_of(lengths: Sequence[int], seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, VOCABULARY, (length,), generator=generator).tolist() for length in lengths]


def open_model(folder: Path) -> PowerRetentionForCausalLM:
    return PowerRetentionForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def distance(folder: Path, answer: dict[str, Any], *prompts: list[int]) -> float:
    """The worst difference of a logprob to one forward over prompt and answer; the i-th prompt is the i-th choice's."""
    worst, model = 0.0, open_model(folder)
    for choice, prompt in zip(answer["choices"], prompts, strict=True):
        tokens, told = choice["token_ids"], choice["logprobs"]["token_logprobs"]
        with torch.no_grad():
            expected = model(torch.tensor([prompt + tokens])).logits[0].log_softmax(-1)
        for place, (token, value) in enumerate(zip(tokens, told, strict=True)):
            worst = max(worst, abs(value - expected[len(prompt) - 1 + place, token].item()))
    return worst


def text_of(folder: Path, prompt: list[int], tokens: list[int]) -> str:
    tokenizer = open_tokenizer(folder)
    return tokenizer.decode(prompt + tokens)[len(tokenizer.decode(prompt)) :]
