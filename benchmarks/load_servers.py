"""The servers that the load test loads: started, stopped in two ways, weighed, and asked whether anybody holds a slot."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import psutil

from load_clients import Client

NAME = "stories"
USERS = 4
PAGES = 100
"""Of vLLM: so few that they are soon given to others, and that all of them are soon resident."""


@dataclass(frozen=True)
class Limits:
    """Where states are kept, and how much of them."""

    states: Path
    most: int = 40
    most_bytes: int | None = None


@dataclass(frozen=True)
class Weight:
    """What a server's processes hold: resident bytes, open files, threads."""

    resident: int
    files: int
    threads: int


class Kind(Protocol):
    """How one kind of server is started and asked.

    Attributes:
        takes_seeds: vLLM 0.32 rewinds the generator of a seeded request whose prompt it reads in pieces, which PyTorch's
            generators on CPUs cannot: its engine ends.
    """

    takes_seeds: bool

    def command(self, folder: Path, port: int, template: Path, limits: Limits) -> list[str | Path]: ...

    def busy(self, client: Client) -> dict[str, float]:
        """What is held for requests, all 0 where nobody waits for an answer."""
        ...


class Own:
    """``power-retention serve``."""

    takes_seeds = True

    def command(self, folder: Path, port: int, template: Path, limits: Limits) -> list[str | Path]:
        options = ["--max-state-bytes", str(limits.most_bytes)] if limits.most_bytes else []
        return [
            sys.executable, "-m", "power_retention.cli", "serve", folder, "--port", str(port), "--name", NAME,
            "--users", str(USERS), "--waiting", "40", "--prefill-chunk-size", "32", "--chat-template", template,
            "--states", limits.states, "--max-states", str(limits.most), *options,
        ]  # fmt: skip

    def busy(self, client: Client) -> dict[str, float]:
        health = client.call("GET", "/health").body
        return {name: health[name] for name in ("writing", "reading", "waiting", "saving")}


class Vllm:
    """vLLM's own server with the plugin."""

    takes_seeds = False

    def command(self, folder: Path, port: int, template: Path, limits: Limits) -> list[str | Path]:
        ours: dict[str, Any] = {"states": str(limits.states), "max_states": limits.most}
        ours |= {"max_bytes": limits.most_bytes} if limits.most_bytes else {}
        return [
            sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", folder, "--served-model-name", NAME,
            "--host", "127.0.0.1", "--port", str(port), "--dtype", "float32", "--enforce-eager", "--max-model-len", "512",
            "--chat-template", template, "--max-num-batched-tokens", "64", "--max-num-seqs", str(USERS),
            "--enable-prefix-caching", "--block-size", "16", "--num-gpu-blocks-override", str(PAGES),
            "--shutdown-timeout", "20",  # without it vLLM ends its engine first, and waits for answers that never come
            "--additional-config", json.dumps({"power_retention": ours}),
            "--middleware", "power_retention.serving.vllm.http.States",
        ]  # fmt: skip

    def busy(self, client: Client) -> dict[str, float]:
        text = client.call("GET", "/metrics").text
        wanted = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
        found = {name: re.search(rf"^vllm:{name}\{{.*\}} (\S+)$", text, re.MULTILINE) for name in wanted}
        return {name: float(match[1]) for name, match in found.items() if match}


KINDS: dict[str, Kind] = {"own": Own(), "vllm": Vllm()}


@dataclass
class Server:
    """One server at one address, through as many lives as it is given."""

    kind: Kind
    folder: Path
    template: Path
    log: Path
    port: int = 0
    lives: int = 0
    process: subprocess.Popen[bytes] | None = None
    weighed: list[psutil.Process] = field(default_factory=list)

    def __post_init__(self) -> None:
        if not self.port:
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                self.port = free.getsockname()[1]

    @property
    def client(self) -> Client:
        return Client("127.0.0.1", self.port)

    def start(self, limits: Limits, seconds: float = 300) -> None:
        """Begin a life; returns when it answers."""
        self.lives += 1
        command = list(map(str, self.kind.command(self.folder, self.port, self.template, limits)))
        environment = {
            **os.environ, "OMP_NUM_THREADS": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1",
            "HF_HUB_OFFLINE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            # What is free goes back to the system: what is resident is what is held, and not what was held once.
            "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "2",
        }  # fmt: skip
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)
        deadline = time.monotonic() + seconds
        while True:
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"The server did not start:\n{self.log.read_text(errors='replace')[-3000:]}")
            try:
                if self.client.call("GET", "/health", timeout=5).status == 200:
                    return
            except OSError:
                time.sleep(0.1)

    def stop(self, how: signal.Signals, seconds: float = 60) -> int:
        """End this life, every process of it; returns its exit status, which is -9 where it had to be killed in the end."""
        assert self.process is not None
        family = self.family()
        self.process.send_signal(how)
        try:
            status = self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.process.kill()
            status = self.process.wait(seconds)
        # What a killed server leaves behind of itself must not serve on.
        _, alive = psutil.wait_procs(family, timeout=20)
        for process in alive:
            process.kill()
        psutil.wait_procs(alive, timeout=20)
        self.process = None
        return status

    def family(self) -> list[psutil.Process]:
        """Its processes."""
        assert self.process is not None
        own = psutil.Process(self.process.pid)
        return [own, *own.children(recursive=True)]

    def weigh(self) -> Weight:
        """What all its processes hold now."""
        resident = files = threads = 0
        for process in self.family():
            resident += process.memory_info().rss
            files += process.num_fds()
            threads += process.num_threads()
        return Weight(resident, files, threads)

    def wait_until_free(self, seconds: float = 30) -> dict[str, float]:
        """What is still held when everybody has gone; all 0 as soon as that is so."""
        deadline = time.monotonic() + seconds
        while True:
            held = self.kind.busy(self.client)
            if not any(held.values()) or time.monotonic() > deadline:
                return held
            time.sleep(0.05)
