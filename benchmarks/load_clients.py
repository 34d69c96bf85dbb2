"""Clients of the load test: plain HTTP, so that they can hang up at any byte, and what an answer must be."""

from __future__ import annotations

import http.client
import json
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from power_retention.models import PowerRetentionCache

CUTS = (10**6, 64, 32, 16, 1)
"""Pieces in which one user alone may read the same text."""

CLOSE = 1e-3
"""How far a log-probability may be from that of one user alone; a token forgotten, or one too many, is 1e-2 and more."""


@dataclass(frozen=True)
class Reply:
    """Status and body of an answer."""

    status: int
    text: str

    @property
    def body(self) -> Any:
        return json.loads(self.text)


@dataclass
class Written:
    """One answer: its tokens, how likely each was, and why it ended ("" where that was not heard)."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    text: str = ""
    reason: str = ""

    def hear(self, choice: dict[str, Any]) -> None:
        """Add a choice, or a piece of one in a stream."""
        self.tokens += choice.get("token_ids") or []
        self.reason = choice.get("finish_reason") or self.reason
        said = choice.get("delta") or choice.get("message") or {}
        self.text += said.get("content") or choice.get("text") or ""
        told = choice.get("logprobs") or {}
        self.logprobs += [one["logprob"] for one in told.get("content") or []] + (told.get("token_logprobs") or [])


class Refused(Exception):
    """The server said no: its status and words."""

    def __init__(self, reply: Reply) -> None:
        super().__init__(f"{reply.status}: {reply.text[:300]}")
        self.status = reply.status


class Lost(Exception):
    """The connection ended before the answer did."""


@dataclass(frozen=True)
class Client:
    """One user's client; each request has a connection of its own."""

    host: str
    port: int

    def call(self, method: str, path: str, body: Any = None, timeout: float = 120) -> Reply:
        """Ask, and wait for the whole answer."""
        connection = http.client.HTTPConnection(self.host, self.port, timeout=timeout)
        try:
            content = body if isinstance(body, bytes) else None if body is None else json.dumps(body).encode()
            connection.request(method, path, content, {"Content-Type": "application/json"})
            answer = connection.getresponse()
            return Reply(answer.status, answer.read().decode())
        finally:
            connection.close()

    def events(self, path: str, body: dict[str, Any], timeout: float = 120) -> Iterator[dict[str, Any]]:
        """The pieces of a stream; whoever stops listening hangs up.

        Raises:
            Refused: the server said no.
            Lost: the stream ended before its end.
        """
        connection = http.client.HTTPConnection(self.host, self.port, timeout=timeout)
        try:
            headers = {"Content-Type": "application/json"}
            connection.request("POST", path, json.dumps({**body, "stream": True}).encode(), headers)
            answer = connection.getresponse()
            if answer.status != 200:
                raise Refused(Reply(answer.status, answer.read().decode()))
            while line := answer.readline():
                said = line.decode().strip().removeprefix("data: ")
                if said == "[DONE]":
                    return
                if said:
                    piece = json.loads(said)
                    if "error" in piece:
                        raise Refused(Reply(int(piece["error"]["code"]), said))
                    yield piece
            raise Lost("The stream ended without saying so.")
        finally:
            connection.close()

    def hang_up(self, path: str, body: dict[str, Any], *, stream: bool) -> None:
        """Ask, and go away without a word heard."""
        connection = http.client.HTTPConnection(self.host, self.port, timeout=60)
        headers = {"Content-Type": "application/json"}
        connection.request("POST", path, json.dumps({**body, "stream": stream}).encode(), headers)
        connection.close()

    def answers(self, path: str, body: dict[str, Any], *, stream: bool) -> list[Written]:
        """All answers to a request, whole or from a stream.

        Raises:
            Refused: the server said no.
            Lost: the server went away.
        """
        written: dict[int, Written] = {}
        try:
            if stream:
                for piece in self.events(path, body):
                    for choice in piece["choices"]:
                        written.setdefault(choice["index"], Written()).hear(choice)
            else:
                reply = self.call("POST", path, body)
                if reply.status != 200:
                    raise Refused(reply)
                for choice in reply.body["choices"]:
                    written.setdefault(choice["index"], Written()).hear(choice)
        except (OSError, http.client.HTTPException) as error:
            raise Lost(str(error)) from error
        return [written[index] for index in sorted(written)]


_PROCESS = """
import http.client, sys
host, port, path, body = sys.argv[1:]
connection = http.client.HTTPConnection(host, int(port), timeout=120)
connection.request("POST", path, body, {"Content-Type": "application/json"})
answer = connection.getresponse()
while line := answer.readline():
    print(line.decode().strip(), flush=True)
"""


def killed_client(client: Client, path: str, body: dict[str, Any], lines: int) -> int:
    """A client in a process of its own hears so many lines of a stream and is killed; returns how many it heard."""
    content = json.dumps({**body, "stream": True})
    command = [sys.executable, "-I", "-S", "-c", _PROCESS, client.host, str(client.port), path, content]
    heard = 0
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdout is not None
        for _ in process.stdout:
            heard += 1
            if heard == lines:
                break
        process.kill()
    return heard


class Judge:
    """One user alone: a forward of our Hugging Face class over all that was read and written.

    In float64, so that what is judged is the server's rounding.  Where a query finds a few keys only that hardly answer it,
    float32 itself is far off, and how far hangs on where the text is cut between state and attention: an answer may be as far
    away as one user's is in float32, over several cuts, and with all of the prompt in the state.

    Args:
        folder: of the model.
    """

    def __init__(self, folder: Path) -> None:
        self.exact, self.rounded = (
            AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval() for dtype in (torch.float64, torch.float32)
        )
        self.lock = threading.Lock()
        self.checked, self.tokens, self.ties, self.delicate, self.worst = 0, 0, 0, 0, 0.0

    @torch.no_grad()
    def fault(self, before: Sequence[int], written: Written, *, greedy: bool) -> str:
        """What is wrong with an answer, or ""."""
        tokens, told = written.tokens, torch.tensor(written.logprobs, dtype=torch.float64)
        if not tokens or len(tokens) != len(told):
            return f"{len(tokens)} tokens with {len(told)} log-probabilities"
        if max(tokens) >= self.exact.config.vocab_size:
            return "a token that there is not"
        with self.lock:
            rows = self._likelihoods(self.exact, before, tokens, CUTS[0])
            own = rows[torch.arange(len(tokens)), torch.tensor(tokens)]
            apart, behind = float((own - told).abs().max()), float((rows.max(-1).values - own).max())
            allowed = CLOSE
            if apart > CLOSE:
                ways = [self._likelihoods(self.rounded, before, tokens, cut) for cut in CUTS]
                ways.append(self._likelihoods_from_state(self.rounded, before, tokens))
                allowed = max(CLOSE, *(2 * float((rounded - rows).abs().max()) for rounded in ways))
                self.delicate += apart <= allowed
            self.checked += 1
            self.tokens += len(tokens)
            self.worst = max(self.worst, apart if allowed == CLOSE else 0.0)
            self.ties += greedy and behind > 0
        if apart > allowed:
            return f"log-probabilities {apart:.2g} from those of one user alone"
        if greedy and behind > 2 * allowed:
            return f"a token {behind:.2g} less likely than the likeliest"
        return ""

    @staticmethod
    def _likelihoods(model: PreTrainedModel, before: Sequence[int], tokens: list[int], cut: int) -> Tensor:
        """Log-probabilities ``[T, V]`` of what could have been written, the text read in pieces of ``cut`` tokens."""
        cache = PowerRetentionCache(model.config.num_hidden_layers)
        pieces = torch.tensor([[*before, *tokens]]).split(cut, 1)
        logits = torch.cat([model(piece, past_key_values=cache, use_cache=True).logits[0] for piece in pieces])
        return logits.double()[len(before) - 1 : -1].log_softmax(-1)

    @staticmethod
    def _likelihoods_from_state(model: PreTrainedModel, before: Sequence[int], tokens: list[int]) -> Tensor:
        """The same where all that was read before is in the states and nothing in the rings, as vLLM's prompts are."""
        read, cache = (PowerRetentionCache(model.config.num_hidden_layers) for _ in range(2))
        first = model(torch.tensor([list(before)]), past_key_values=read, use_cache=True).logits[0, -1:]
        for layer, state in zip(cache.layers, read.states, strict=True):
            layer.store(state, len(before))
        rest = model(torch.tensor([tokens]), past_key_values=cache, use_cache=True).logits[0, :-1]
        return torch.cat((first, rest)).double().log_softmax(-1)
