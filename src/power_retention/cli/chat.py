"""``power-retention chat``."""

from __future__ import annotations

import io
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from power_retention.cli.display import status
from power_retention.cli.options import Json, Seed, open_student, quiet_libraries
from power_retention.cli.placement import choose_device
from power_retention.errors import ArgumentError, OutputError, PowerRetentionError, StateError
from power_retention.files import json_line

if TYPE_CHECKING:
    from power_retention.serving.conversation import Conversation
    from power_retention.serving.states import StateDirectory

_HELP = """\
/save NAME   keep where the conversation stands, instead of what was kept under that name
/fork NAME   keep a copy under a name that is free, and go on here
/load NAME   go on from what was kept; nothing is read again
/states      what is kept
/reset       begin anew
/help        this
/quit        the end, as is Ctrl-D; Ctrl-C stops an answer"""


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(no_args_is_help=True)(chat)


def chat(
    model: Annotated[Path, typer.Argument(help="A power-retention model.")],
    states: Annotated[Path, typer.Option(help="Folder in which conversations are kept.")] = Path("states"),
    load: Annotated[str | None, typer.Option(help="Go on from the state of this name.")] = None,
    system: Annotated[str, typer.Option(help="A system message before the first one.")] = "",
    device: Annotated[str, typer.Option(help="cpu, cuda, or auto: a GPU where there is one.")] = "auto",
    max_tokens: Annotated[int, typer.Option(min=1, help="Tokens that an answer may have.")] = 512,
    temperature: Annotated[float, typer.Option(min=0, help="0 takes the likeliest token each time.")] = 0.7,
    top_p: Annotated[
        float, typer.Option(min=0.01, max=1, help="Draw from the likeliest tokens that hold this share.")
    ] = 0.95,
    seed: Seed = 0,
    json: Json = False,
) -> None:
    """Talk with a model; /save, /fork and /load keep conversations and take them up again without reading them.

    Messages are lines of standard input, in a terminal or from a pipe.  With --json every answer is a line of JSON.  A model
    without a chat template goes on with what is written.

    Examples:

        power-retention chat my-model-retrained

        power-retention chat my-model-retrained --load book --temperature 0

        printf 'Once upon a time\\n/save story\\n' | power-retention chat my-model-retrained
    """
    quiet_libraries()
    from power_retention.serving.conversation import Conversation
    from power_retention.serving.generate import open_tokenizer
    from power_retention.serving.sampling import Draw
    from power_retention.serving.states import StateDirectory

    # What can be refused at once is, before a large model is opened or much is said.
    place, directory = choose_device(device), StateDirectory(states)
    if states.exists() and not states.is_dir():
        raise OutputError(f"--states {states} is a file; a folder was expected.")
    if load is not None:
        directory.existing(load)
    with status.status(f"Opening {escape(str(model))}"):
        student, tokenizer = open_student(model).eval().to(place), open_tokenizer(model)
    conversation = Conversation(
        student, tokenizer, draw=Draw(temperature, top_p), max_tokens=max_tokens, seed=seed, system=system
    )
    talk = _Talk(conversation, directory, json=json)
    if load is not None:
        talk.load(load)
    in_terminal = sys.stdin.isatty()
    if in_terminal:
        status.print("Write a message; /help says what else.  Ctrl-D ends.", highlight=False)
    for line in _lines(in_terminal):
        try:
            if not talk.hear(line):
                break
        except PowerRetentionError as error:
            if not in_terminal:
                raise
            status.print(f"[bold red]error:[/] {escape(str(error))}", highlight=False)


def _lines(in_terminal: bool) -> Iterator[str]:
    if not in_terminal:
        if isinstance(sys.stdin, io.TextIOWrapper):
            sys.stdin.reconfigure(encoding="utf-8", errors="surrogateescape")  # what is no text is told apart, below
        yield from sys.stdin
        return
    import readline  # noqa: F401 (lines can be edited then)

    while True:
        try:
            yield input("› ")
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print()


class _Talk:
    """What lines of input do."""

    def __init__(self, conversation: Conversation, directory: StateDirectory, *, json: bool) -> None:
        self.conversation, self.directory, self.json = conversation, directory, json
        self.commands = {"/save": self.save, "/fork": self.fork, "/load": self.load}

    def hear(self, line: str) -> bool:
        """Do what a line says; False for the end."""
        line = line.strip()
        if any("\ud800" <= sign <= "\udfff" for sign in line):
            raise ArgumentError("A line of the input is no UTF-8 text.")
        if not line.startswith("/"):
            if line:
                self.answer(line)
            return True
        command, _, name = line.partition(" ")
        if command in self.commands:
            if not name:
                raise ArgumentError(f"{command} needs a name: {command} NAME.")
            self.commands[command](name.strip())
        elif command == "/states":
            self.list_states()
        elif command == "/reset":
            self.conversation.reset()
            _say("Everything said is forgotten.")
        elif command == "/help":
            _say(_HELP)
        elif command != "/quit":
            raise ArgumentError(f"{command} is no command; /help lists them.")
        return command != "/quit"

    def answer(self, message: str) -> None:
        """Write the answer as it comes; Ctrl-C stops it."""
        said = []
        with _interrupts() as interrupted:
            for text in self.conversation.say(message, interrupted.is_set):
                said.append(text)
                if not self.json:
                    print(text, end="", flush=True)
        if interrupted.is_set():
            _say(" (stopped)")
        elif not said:
            _say("(an empty answer)")
        whole = {"answer": "".join(said), "tokens_seen": self.conversation.tokens_seen}
        print(json_line(whole) if self.json else "\n", end="", flush=True)

    def save(self, name: str) -> None:
        """Keep the conversation."""
        header = self.conversation.save(self.directory, name)
        _say(f"{name} has read {header.tokens_seen:,} tokens.")

    def fork(self, name: str) -> None:
        """Keep a copy under a name that is free."""
        if self.directory.path_of(name).exists():
            raise StateError(f"A state called {name!r} is kept already; fork to another name, or /save {name}.")
        self.save(name)

    def load(self, name: str) -> None:
        """Go on from what was kept."""
        header = self.conversation.load(self.directory, name)
        _say(f"Going on from {name}: {header.tokens_seen:,} tokens, none read again.")

    def list_states(self) -> None:
        """Say what is kept."""
        found = self.directory.list()
        for state in found:
            size = f"{state.nbytes / 1e6:.1f} MB" if state.nbytes >= 1e5 else f"{state.nbytes / 1e3:.1f} kB"
            other = "" if state.header.model == self.conversation.fingerprint else "  of another model"
            _say(f"{state.name}  {state.header.tokens_seen:,} tokens  {size}  {state.header.created}{other}")
        if not found:
            _say(f"Nothing is kept in {self.directory.path}.")


@contextmanager
def _interrupts() -> Iterator[threading.Event]:
    """Ctrl-C sets an event here, where an exception in the middle of a token would leave a state that is none."""
    interrupted = threading.Event()
    before = signal.signal(signal.SIGINT, lambda *_: interrupted.set())
    try:
        yield interrupted
    finally:
        signal.signal(signal.SIGINT, before)


def _say(text: str) -> None:
    status.print(escape(text), highlight=False, soft_wrap=True)
