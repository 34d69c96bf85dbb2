"""Real clients against a real server for as long as you like: ragged requests, people who hang up, restarts, a full disk.

    python benchmarks/load_test.py results.json --server own --minutes 60 [--figure load.png] [--seed 0]
    python benchmarks/load_test.py results.json --server vllm --minutes 60      # in an environment with vLLM

A converted stories260K is served by ``power-retention serve``, or by vLLM with our plugin, and six clients at a time ask what a
seeded schedule says: completions and chats, streamed and not, one answer or several, named states that are saved, gone on from,
forked and deleted; streams that are hung up in the middle, clients in processes of their own that are killed, requests that
must be refused; a folder of states that fills up (by number, by bytes, by a file system with no room); and the server ended by
SIGTERM and by SIGKILL while all of that goes on.  Every answer is compared with one user alone: a forward of the Hugging Face
class, in float64, over everything that its state, its prompt and itself consist of.  Whenever nobody asks, nothing may be held,
and resident memory is weighed.  The status is 0 only if no answer was wrong, nothing leaked and no state was lost.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import platform
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import torch
from transformers import AutoTokenizer

import real_models
from load_clients import CLOSE, Client, Judge, Lost, Refused, Written, killed_client
from load_servers import KINDS, NAME, USERS, Limits, Server
from power_retention.conversion.convert import calibration_windows, convert, save_conversion
from power_retention.conversion.source import open_source
from power_retention.evaluation.drawing import figure_file, tidy
from power_retention.files import write_json

CLIENTS = 6
MOST_NAMES = 4 * CLIENTS + 2
"""States that users and books come to."""
VOCABULARY = 512
LONGEST_HISTORY = 600
ABORTED = "aborted"
MOST_HEARD_LATE = 0.1
"""Share of answers that were hung up on whose end may have been written first: a client waits for its own processor too."""
SETTLING = 500
"""Requests in a server's life before its memory counts: until then it meets sizes for the first time."""
MOST_GROWTH = 2.0
"""MB in a thousand requests.  A state of this model that is never let go would be 26 kB a request; 0.7 are the headers of the
1,000 files checked last, and safetensors 0.8 keeps 60 bytes for each tensor of each file that it opens."""
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ '[' + message.role + '] ' + message.content + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '[assistant] ' }}{% endif %}"
)


@dataclass
class Tally:
    """What happened; shared by all clients."""

    requests: int = 0
    tokens: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def count(self, what: str, tokens: int = 0) -> None:
        with self.lock:
            self.requests += 1
            self.tokens += tokens
            self.counts[what] += 1

    def fault(self, what: str) -> None:
        with self.lock:
            self.faults.append(what)
        print("WRONG:", what, flush=True)


@dataclass
class World:
    """What all clients share."""

    server: Server
    judge: Judge
    tokenizer: Any
    words: list[str]
    tally: Tally
    ending: threading.Event = field(
        default_factory=threading.Event
    )  # the server is being ended: connections may be lost
    books: dict[str, list[int]] = field(default_factory=dict)  # states that nobody replaces, and what they have read
    hung_up_on: dict[str, set[int]] = field(
        default_factory=dict
    )  # names, and what they hold of answers written to the end
    alone: list[tuple[dict[str, Any], list[int], Written]] = field(default_factory=list)  # to be asked again, alone

    @property
    def client(self) -> Client:
        return self.server.client

    def text(self, rng: random.Random, words: int) -> str:
        start = rng.randrange(len(self.words) - words)
        return " ".join(self.words[start : start + words])


class User:
    """One client with states of its own; what each of them has read, or None where that is not known."""

    def __init__(self, world: World, number: int, seed: int) -> None:
        self.world, self.number, self.rng = world, number, random.Random(f"{seed} {number}")
        self.states: dict[str, list[int] | None] = {}

    def act(self, weights: dict[str, int]) -> None:
        """One thing that users do, drawn by weight."""
        (what,) = self.rng.choices(list(weights), list(weights.values()))
        try:
            getattr(self, what)()
        except Refused as refused:
            # A server that is being stopped says so; nobody else is refused what he may have.
            if not self.world.ending.is_set():
                self.world.tally.fault(f"{what} was refused: {refused}")
        except (Lost, OSError) as error:
            if not self.world.ending.is_set():
                self.world.tally.fault(f"{what} was lost: {type(error).__name__} {error}")
            self.world.tally.count("lost")

    # ── what users do ────────────────────────────────────────────────────────────────────────────────────────────────

    def complete(self) -> None:
        """One prompt or several, one answer or several, in tokens or text."""
        rng, prompts = self.rng, [self.prompt() for _ in range(self.rng.choice((1, 1, 1, 2)))]
        n = rng.choice((1, 1, 1, 2))  # several answers are drawn: vLLM refuses several likeliest ones
        drawn = {"n": n, "temperature": 0.8} if n > 1 else {"n": n}
        body = self.body(prompt=prompts[0] if len(prompts) == 1 else prompts, **drawn)
        if len(prompts) == 1 and rng.random() < 0.3:
            text = self.world.text(rng, rng.randint(1, 40))
            prompts, body["prompt"] = [self.world.tokenizer(text)["input_ids"]], text
        answers = self.world.client.answers("/v1/completions", body, stream=rng.random() < 0.5)
        self.judge_all("complete", [prompt for prompt in prompts for _ in range(body["n"])], answers, body)
        if len(prompts) == body["n"] == 1 and not body["temperature"]:
            self.world.alone.append((body, prompts[0], answers[0]))

    def chat(self) -> None:
        """A conversation of up to three turns, sent anew each time."""
        messages: list[dict[str, str]] = []
        for _ in range(self.rng.randint(1, 3)):
            messages.append({"role": "user", "content": self.world.text(self.rng, self.rng.randint(1, 15))})
            text = self.world.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
            prompt = self.world.tokenizer(text, add_special_tokens=False)["input_ids"]
            if len(prompt) > 400:
                return
            body = self.body(messages=messages, logprobs=True)
            answers = self.world.client.answers("/v1/chat/completions", body, stream=self.rng.random() < 0.5)
            self.judge_all("chat", [prompt], answers, body)
            messages.append({"role": "assistant", "content": answers[0].text})

    def remember(self) -> None:
        """Begin a state, or go on from one, under the same name or another."""
        known = [name for name, read in self.states.items() if read is not None]
        start = self.rng.choice([*known, ""]) if known else ""
        save = start if start and self.rng.random() < 0.6 else f"user-{self.number}-{self.rng.randrange(3)}"
        self.save(start, save, self.states.get(start) or [])

    def read_book(self) -> None:
        """Many go on from one state at once, some to states of their own."""
        book = self.rng.choice(sorted(self.world.books))
        self.save(book, f"user-{self.number}-{self.rng.randrange(3)}" if self.rng.random() < 0.4 else "",
                  self.world.books[book])  # fmt: skip

    def save(self, start: str, save: str, before: list[int], *, sure: bool = True) -> None:
        """Go on from a state to another; not ``sure``: where there may be no room, which vLLM says in its log only."""
        prompt = self.prompt(most=80)
        names = {"state": start, "save_state": save}
        body = self.body(prompt=prompt, vllm_xargs={name: value for name, value in names.items() if value})
        if save:
            kept, self.states[save] = self.states.get(save), None
        try:
            answers = self.world.client.answers("/v1/completions", body, stream=self.rng.random() < 0.5)
        except Refused:
            if save:
                self.states[save] = kept
            raise
        self.judge_all("state", [[*before, *prompt]], answers, body)
        if save:
            history = [*before, *prompt, *answers[0].tokens]
            if sure:
                self.expect_state(save, history)
            self.states[save] = history if len(history) < LONGEST_HISTORY else None

    def fork(self) -> None:
        """A copy by the route that makes one."""
        copy = f"user-{self.number}-fork"
        known = [name for name, read in self.states.items() if read is not None and name != copy]
        if not known:
            return self.remember()
        start = self.rng.choice(known)
        self.delete(copy)
        reply = self.world.client.call("POST", f"/v1/states/{start}/fork", {"to": copy})
        self.states[copy] = None
        if reply.status != 200:
            raise Refused(reply)
        self.states[copy] = self.states[start]
        self.world.tally.count("fork")
        return None

    def forget(self) -> None:
        """Delete a state, and see that it is gone."""
        if self.states:
            name = self.rng.choice(sorted(self.states))
            self.delete(name)
            if (status := self.world.client.call("GET", f"/v1/states/{name}").status) != 404:
                self.world.tally.fault(f"The deleted state {name} is answered with {status}.")
            self.world.tally.count("delete")

    def look(self) -> None:
        """The list of states holds this user's."""
        found = {state["id"] for state in self.world.client.call("GET", "/v1/states").body["data"]}
        missing = [name for name, read in self.states.items() if read is not None and name not in found]
        if missing:
            self.world.tally.fault(f"The list of states lacks {missing}.")
        self.world.tally.count("list")

    def hang_up(self) -> None:
        """Listen to the beginning of a long answer only, or not at all; nothing of it may be kept that is not whole."""
        name, prompt, tokens = f"{ABORTED}-{self.number}", self.prompt(most=100), 400
        names = {"save_state": name} if self.rng.random() < 0.5 else {}
        if names:
            self.world.hung_up_on.setdefault(name, set()).add(len(prompt) + tokens)
        body = self.body(prompt=prompt, max_tokens=tokens, ignore_eos=True, vllm_xargs=names)
        wanted = self.rng.randint(0, 20)
        if wanted:
            stream = self.world.client.events("/v1/completions", body)
            for _ in itertools.islice(stream, wanted):
                pass
            stream.close()
        else:
            self.world.client.hang_up("/v1/completions", body, stream=self.rng.random() < 0.5)
        self.world.tally.count("hung up")
        self.world.tally.counts["hung up, to be named"] += len(names)

    def be_killed(self) -> None:
        """A client process that is killed while it listens."""
        body = self.body(prompt=self.prompt(most=200), max_tokens=100)
        killed_client(self.world.client, "/v1/completions", body, self.rng.randint(1, 12))
        self.world.tally.count("killed")

    def ask_nonsense(self) -> None:
        """Something that must be refused, in a sentence."""
        bad: list[tuple[str, Any]] = [
            ("no JSON", b"{"),
            ("no prompt", self.body(prompt=[])),
            ("a token that there is not", self.body(prompt=[VOCABULARY + 7])),
            ("another model", self.body(prompt=[5], model="another")),
            ("a state that is not there", self.body(prompt=[5], vllm_xargs={"state": "nobody"})),
            ("no name", self.body(prompt=[5], vllm_xargs={"save_state": "../nobody"})),
            ("two answers in one state", self.body(prompt=[5], n=2, vllm_xargs={"save_state": "two"})),
            ("a temperature below 0", self.body(prompt=[5], temperature=-1)),
            ("more tokens than there may be", self.body(prompt=[5], max_tokens=10**6)),
        ]
        name, body = self.rng.choice(bad)
        reply = self.world.client.call("POST", "/v1/completions", body)
        if not 400 <= reply.status < 500:
            self.world.tally.fault(f"{name} was answered with {reply.status}: {reply.text[:200]}")
        elif not reply.body["error"]["message"]:
            self.world.tally.fault(f"{name} was refused without a word.")
        self.world.tally.count("refused")

    # ── what they need for it ────────────────────────────────────────────────────────────────────────────────────────

    def prompt(self, most: int = 300) -> list[int]:
        """Ragged: short ones mostly."""
        length = min(most, max(1, int(self.rng.lognormvariate(3.2, 1.1))))
        return [self.rng.randrange(3, VOCABULARY) for _ in range(length)]

    def body(self, **fields: Any) -> dict[str, Any]:
        """Greedy mostly."""
        drawn = self.rng.random() < 0.2
        usual = {
            "model": NAME, "max_tokens": self.rng.randint(1, 48), "temperature": 0.8 if drawn else 0, "logprobs": 1,
            "ignore_eos": self.rng.random() < 0.5, "return_token_ids": True,
        }  # fmt: skip
        if self.world.server.kind.takes_seeds:
            usual["seed"] = self.rng.randrange(1 << 30)
        if "messages" not in fields:
            usual["add_special_tokens"] = "vllm_xargs" not in fields
        return {**usual, **fields}

    def judge_all(self, what: str, before: Sequence[list[int]], answers: list[Written], body: dict[str, Any]) -> None:
        if len(answers) != len(before):
            self.world.tally.fault(f"{what}: {len(answers)} answers where {len(before)} were asked for.")
        for read, written in zip(before, answers, strict=False):
            fault = self.world.judge.fault(read, written, greedy=not body["temperature"])
            if fault:
                self.world.tally.fault(f"{what} after {len(read)} tokens: {fault}; asked {json.dumps(body)[:300]}")
        self.world.tally.count(what, sum(len(written.tokens) for written in answers))

    def expect_state(self, name: str, history: list[int], seconds: float = 10) -> None:
        """The state has read so much, an instant after the answer at the latest."""
        deadline = time.monotonic() + seconds
        while True:
            reply = self.world.client.call("GET", f"/v1/states/{name}")
            seen = reply.body["tokens_seen"] if reply.status == 200 else f"nothing ({reply.status})"
            if seen == len(history):
                return
            if time.monotonic() > deadline:
                self.world.tally.fault(f"The state {name} has read {seen} where {len(history)} was expected.")
                return
            time.sleep(0.02)

    def delete(self, name: str) -> None:
        self.states.pop(name, None)
        self.world.client.call("DELETE", f"/v1/states/{name}")

    def find_states_again(self) -> int:
        """After a restart every state is as it was left, and is gone on from."""
        for name, read in list(self.states.items()):
            reply = self.world.client.call("GET", f"/v1/states/{name}")
            if read is None:
                self.delete(name)
            elif reply.status != 200 or reply.body["tokens_seen"] != len(read):
                self.world.tally.fault(
                    f"After a restart {name} is {reply.status} {reply.text[:200]}, not {len(read)} tokens."
                )
            else:
                self.save(name, "", read)
        return len(self.states)


# ── phases ───────────────────────────────────────────────────────────────────────────────────────────────────────────

RAGGED = {"complete": 8, "chat": 3, "remember": 4, "read_book": 3, "fork": 1, "forget": 1, "look": 1}
MIXES: dict[str, dict[str, int]] = {
    "ragged": RAGGED,
    "hanging up": {**RAGGED, "hang_up": 20},
    "killed clients": {**RAGGED, "be_killed": 7},
    "refusals": {**RAGGED, "ask_nonsense": 20},
}


@dataclass
class Round:
    """A moment at which nobody asks.

    Attributes:
        life: of the server; its memory begins anew with each.
        requests: in this life so far.
        total: in all lives.
        milliseconds: of all clients' time a token since the last such moment; shared machines make it what it is.
    """

    life: int
    phase: str
    requests: int
    total: int
    resident_mb: float
    files: int
    threads: int
    milliseconds: float


class Load:
    """The test: its users, its server, and what was found."""

    def __init__(self, world: World, seed: int) -> None:
        self.world, self.users = world, [User(world, number, seed) for number in range(CLIENTS)]
        self.rounds: list[Round] = []
        self.remains: set[Path] = set()  # of servers that were killed, which later ones remove when they are old
        self.births = 0  # requests before this life

    def begin(self, limits: Limits) -> None:
        """Start the server, and read the books that are not there yet."""
        self.world.server.start(limits)
        self.births = self.world.tally.requests
        writer = User(self.world, 99, 1)
        for number in range(2):
            name = f"book-{number}"
            if self.world.client.call("GET", f"/v1/states/{name}").status == 404:
                prompt = [writer.rng.randrange(3, VOCABULARY) for _ in range(300)]
                body = writer.body(prompt=prompt, max_tokens=5, temperature=0, vllm_xargs={"save_state": name})
                answers = self.world.client.answers("/v1/completions", body, stream=False)
                writer.judge_all("book", [prompt], answers, body)
                self.world.books[name] = [*prompt, *answers[0].tokens]
                writer.expect_state(name, self.world.books[name])

    def run(self, phase: str, seconds: float, *, each: int = 8) -> None:
        """Rounds of a phase until the time is over; after each, nobody holds anything."""
        deadline = time.monotonic() + seconds
        while True:
            started, tokens = time.monotonic(), self.world.tally.tokens
            with ThreadPoolExecutor(CLIENTS) as pool:
                list(pool.map(lambda user: [user.act(MIXES[phase]) for _ in range(each)], self.users))
            self.rest(phase, 1000 * (time.monotonic() - started) / max(1, self.world.tally.tokens - tokens))
            if time.monotonic() > deadline:
                break
        self.ask_alone(phase)

    def rest(self, phase: str, milliseconds: float) -> None:
        """Nobody asks: nothing is held, and the server is weighed."""
        held = self.world.server.wait_until_free()
        if any(held.values()):
            self.world.tally.fault(f"After {phase}, nobody asks and the server holds {held}.")
        self.look_for_halves(phase)
        weight, tally = self.world.server.weigh(), self.world.tally
        self.rounds.append(
            Round(self.world.server.lives, phase, tally.requests - self.births, tally.requests,
                  weight.resident / 1e6, weight.files, weight.threads, milliseconds)
        )  # fmt: skip
        last = self.rounds[-1]
        print(
            f"{phase}: life {last.life}, {last.total} requests, {last.resident_mb:.1f} MB, {last.files} files",
            flush=True,
        )

    def look_for_halves(self, phase: str) -> None:
        """No state is there of a part of an answer; whole ones, written before that was heard, are counted and let go."""
        counts, too_late = self.world.tally.counts, "written before the hanging up was heard"
        for state in self.world.client.call("GET", "/v1/states").body["data"]:
            name, seen = state["id"], state["tokens_seen"]
            if not name.startswith(ABORTED):
                continue
            if seen not in self.world.hung_up_on[name]:
                self.world.tally.fault(
                    f"After {phase}, {name} has read {seen} tokens of an answer that was hung up on."
                )
            counts[too_late] += 1
            self.world.client.call("DELETE", f"/v1/states/{name}")
        late, all_named = counts[too_late], counts["hung up, to be named"]
        if late > max(3, MOST_HEARD_LATE * all_named):
            self.world.tally.fault(f"{late} of {all_named} answers that were hung up on were written to the end.")

    def ask_alone(self, phase: str) -> None:
        """Some of what was asked among others is asked again by one user alone, and answered in the same words."""
        user = self.users[0]
        for body, prompt, written in self.world.alone[-5:]:
            (again,) = self.world.client.answers("/v1/completions", body, stream=False)
            user.judge_all("alone", [prompt], [again], body)
            same = 0
            while same < min(len(again.tokens), len(written.tokens)) and again.tokens[same] == written.tokens[same]:
                same += 1
            # Until the likeliest two tie, tokens are the same; after that they are two texts.
            apart = [abs(a - b) for a, b in zip(again.logprobs[: same + 1], written.logprobs[: same + 1], strict=False)]
            if max(apart) > CLOSE:
                self.world.tally.fault(
                    f"{phase}: alone, token {same} of an answer is {max(apart):.2g} likelier or less."
                )
        self.world.alone.clear()

    def end_in_the_middle(self, how: signal.Signals, limits: Limits) -> None:
        """The server is ended while everybody asks; it comes back, and so does every state."""
        world = self.world
        asking = threading.Event()

        def ask(user: User) -> None:
            while not world.ending.is_set():
                user.act(RAGGED)
                asking.set()

        with ThreadPoolExecutor(CLIENTS) as pool:
            running = [pool.submit(ask, user) for user in self.users]
            asking.wait(60)
            time.sleep(1)
            world.ending.set()
            status = world.server.stop(how)
            for one in running:
                one.result()
        left = self.left_in(limits.states)
        world.tally.counts[f"hidden files after {how.name}"] += len(left)
        if how == signal.SIGKILL:
            self.remains.update(left)
        if how == signal.SIGTERM and status not in (0, -15, 143):
            world.tally.fault(f"The server that was asked to end left with status {status}.")
        if how == signal.SIGTERM and left:
            world.tally.fault(f"A server that was asked to end leaves {[path.name for path in left]}.")
        world.ending.clear()
        self.begin(limits)
        found = sum(user.find_states_again() for user in self.users)
        world.tally.counts[f"states found again after {how.name}"] += found

    def fill(self, what: str, limits: Limits) -> None:
        """States are saved until there is no more room: that is refused in a sentence, everything else goes on as before."""
        user, kept, no = self.users[0], [], None
        for number in range(10_000):
            name = f"filling-{number}"
            try:
                user.save("", name, [], sure=False)
            except Refused as refused:
                no = refused
                break
            if not appears(limits.states / f"{name}.state"):
                break
            kept.append(name)
        if no is not None and no.status != 507:
            self.world.tally.fault(f"{what}: a full folder is answered with {no}")
        self.world.tally.counts[f"states until {what}"] = len(kept)
        for other in self.users:
            other.complete()
            other.chat()
        whole = {path.name.removesuffix(".state") for path in limits.states.glob("*.state")}
        for name in kept:
            if name not in whole or self.world.client.call("GET", f"/v1/states/{name}").status != 200:
                self.world.tally.fault(f"{what}: the state {name} that was saved is not there.")
            user.delete(name)
        user.delete(f"filling-{len(kept)}")
        user.save("", "after-filling", [])
        user.delete("after-filling")
        if left := self.left_in(limits.states):
            self.world.tally.fault(f"{what}: {[path.name for path in left]} were left behind.")
        self.rest(what, math.nan)

    def left_in(self, folder: Path) -> list[Path]:
        """Hidden files, but for those that a killed server left earlier."""
        return [path for path in folder.glob("**/.*") if path not in self.remains]


def appears(path: Path, seconds: float = 3) -> bool:
    """Whether a file is there, or is soon."""
    deadline = time.monotonic() + seconds
    while not path.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    return path.exists()


@contextmanager
def small_disk(size: str = "1m") -> Iterator[Path | None]:
    """A file system with next to no room, where this machine lets one be made."""
    with tempfile.TemporaryDirectory(prefix="small-") as folder:
        made = (
            sys.platform == "linux"
            and not subprocess.run(
                ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], capture_output=True
            ).returncode
        )
        try:
            yield Path(folder) if made else None
        finally:
            if made:
                subprocess.run(["umount", folder], check=True)


def run_all(load: Load, states: Path, minutes: float) -> None:
    """Cycles of all phases, half of the time in one life of the server."""
    end = time.monotonic() + 60 * minutes
    cycles = max(1, round(minutes / 15))
    quick = minutes < 5
    usual, tight = Limits(states, most=MOST_NAMES + 3 if quick else 40), Limits(states, most_bytes=1_000_000)
    state_of_server = usual
    load.begin(state_of_server)
    for cycle in range(cycles):
        span = (end - time.monotonic()) / (cycles - cycle)
        for phase in MIXES:
            load.run(phase, 0.6 * span / len(MIXES), each=2 if quick else 8)
        load.fill("the number is reached", usual)
        if not quick:
            load.end_in_the_middle(signal.SIGTERM, tight)
            load.run("ragged", 0.1 * span)
            load.fill("the bytes are used up", tight)
        load.end_in_the_middle(signal.SIGKILL, usual)
        load.run("ragged", 0.1 * span, each=2 if quick else 8)
        if not quick:
            with small_disk() as disk:
                if disk is None:
                    load.world.tally.counts["no small file system could be made"] += 1
                    continue
                move(load, Limits(disk, most=1000))
                load.fill("the disk is full", Limits(disk))
                move(load, usual)
    load.world.server.stop(signal.SIGTERM)


def move(load: Load, limits: Limits) -> None:
    """A life with another folder: states of the last one stay where they are, unknown to this one."""
    load.world.server.stop(signal.SIGTERM)
    for user in load.users:
        user.states.clear()
    load.begin(limits)


# ── results ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def trend(rounds: Sequence[Round], of: Callable[[Round], float]) -> dict[str, float]:
    """Growth in a thousand requests, with its standard error: one slope, and a beginning of its own for each life."""
    settled = [one for one in rounds if one.requests > SETTLING]
    lives = sorted({one.life for one in settled})
    if len(settled) < len(lives) + 3:
        return {"slope": math.nan, "error": math.nan, "rounds": len(settled)}
    columns = [[one.requests / 1000, *(float(one.life == life) for life in lives)] for one in settled]
    design = torch.tensor(columns, dtype=torch.float64)
    values = torch.tensor([of(one) for one in settled], dtype=torch.float64)
    inverse = torch.linalg.pinv(design.T @ design)
    fitted = inverse @ design.T @ values
    variance = (values - design @ fitted).square().sum() / (len(values) - len(fitted))
    return {"slope": float(fitted[0]), "error": float((variance * inverse[0, 0]).sqrt()), "rounds": len(settled)}


def judge_growth(load: Load) -> dict[str, Any]:
    """A slope that is beyond its error, and matters, is a leak."""
    found = {
        "resident MB": trend(load.rounds, lambda one: one.resident_mb),
        "open files": trend(load.rounds, lambda one: one.files),
        "threads": trend(load.rounds, lambda one: one.threads),
    }
    for name, most in (("resident MB", MOST_GROWTH), ("open files", 1.0), ("threads", 1.0)):
        slope, error = found[name]["slope"], found[name]["error"]
        if slope > most and slope > 3 * error:
            load.world.tally.fault(f"{name} grow by {slope:.2g} ± {error:.1g} in a thousand requests.")
    return found


def draw(rounds: Sequence[Round], path: Path, title: str) -> None:
    """Resident memory and time a token against requests, a line for each life."""
    with figure_file(path, 1, 2, size=(10, 4), dpi=120) as (figure, axes):
        for life in sorted({one.life for one in rounds}):
            own = [one for one in rounds if one.life == life]
            axes[0].plot([one.total for one in own], [one.resident_mb for one in own], ".-", ms=3)
            axes[1].plot([one.total for one in own], [one.milliseconds for one in own], ".-", ms=3)
        for axis, label in zip(
            axes, ("resident memory of the server, MB", "milliseconds a token, all clients"), strict=True
        ):
            axis.set_ylim(0, 1.1 * axis.dataLim.y1)
            axis.set_xlabel("requests; a line for each start of the server")
            axis.set_ylabel(label)
            tidy(axis)
        figure.suptitle(title)


def stories() -> str:
    """Words to ask with."""
    lines = real_models.STORIES_TEXT.read_text(encoding="utf-8").splitlines()
    return " ".join(json.loads(line)["text"] for line in lines)


def write_model(folder: Path) -> Path:
    """stories260K, converted and calibrated."""
    source = open_source(str(real_models.write_stories_model(folder / "parent")))
    ids = source.tokenizer(stories()[:20000], return_tensors="pt")["input_ids"][0]
    save_conversion(convert(source, calibration_windows(ids, count=4, length=128)), folder / "model")
    return folder / "model"


def load_test(server: str, minutes: float, seed: int, folder: Path) -> tuple[dict[str, Any], list[Round]]:
    """All of it in a folder; returns the report and the rounds."""
    torch.set_num_threads(1)
    started, model = time.monotonic(), write_model(folder)
    template = folder / "chat.jinja"
    template.write_text(TEMPLATE)
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = TEMPLATE
    judge = Judge(model)
    served = Server(KINDS[server], model, template, folder / "server.log")
    load = Load(World(served, judge, tokenizer, stories().split(), Tally()), seed)
    try:
        run_all(load, folder / "states", minutes)
    finally:
        if served.process is not None:
            served.stop(signal.SIGKILL)
    growth, tally = judge_growth(load), load.world.tally
    report = {
        "server": server, "seed": seed, "minutes": (time.monotonic() - started) / 60, "clients": CLIENTS, "users": USERS,
        "python": platform.python_version(), "torch": torch.__version__,
        "requests": tally.requests, "tokens": tally.tokens, "lives": served.lives, "counts": dict(tally.counts),
        "answers compared": judge.checked, "tokens compared": judge.tokens, "ties": judge.ties, "delicate": judge.delicate,
        "worst log-probability difference": judge.worst, "growth in 1000 requests": growth, "faults": tally.faults,
        "rounds": [asdict(one) for one in load.rounds],
    }  # fmt: skip
    return report, load.rounds


def without_folder(word: str) -> str:
    """Where files lie is nobody's business."""
    return Path(word).name


def main(words: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("--server", choices=sorted(KINDS), default="own")
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--figure", type=Path, help="A PNG of memory and time against requests.")
    parser.add_argument("--keep", type=Path, help="A folder for the model, the states and the server's log.")
    arguments = parser.parse_args(words)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the server does not outlive its test
    with tempfile.TemporaryDirectory(prefix="load-") as scratch:
        folder = arguments.keep or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        report, rounds = load_test(arguments.server, arguments.minutes, arguments.seed, folder)
    report["command"] = " ".join(["python", "benchmarks/load_test.py", *map(without_folder, words)])
    write_json(arguments.results, report)
    if arguments.figure:
        names = {"own": "power-retention serve", "vllm": "vLLM with the plugin"}
        draw(rounds, arguments.figure, f"{names[arguments.server]}, {report['requests']:,} requests")
    shown = (
        "requests",
        "answers compared",
        "worst log-probability difference",
        "ties",
        "growth in 1000 requests",
        "counts",
    )
    print(json.dumps({name: report[name] for name in shown}, indent=1), flush=True)
    if report["faults"]:
        sys.exit(f"{len(report['faults'])} things went wrong; the first: {report['faults'][0]}")


if __name__ == "__main__":
    main(sys.argv[1:])
