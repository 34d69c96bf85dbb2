"""``power-retention serve``."""

from __future__ import annotations

import socket
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from power_retention.cli.display import print_json, status
from power_retention.cli.options import Json, open_student, quiet_libraries
from power_retention.cli.placement import choose_device


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(no_args_is_help=True)(serve)


def serve(
    model: Annotated[Path, typer.Argument(help="A power-retention model.")],
    host: Annotated[
        str, typer.Option(help="Address to listen at; 0.0.0.0 is every one of this machine.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen at; 0 takes a free one.")] = 8000,
    name: Annotated[str | None, typer.Option(help="What the model is called; the folder's name unless given.")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, or auto: a GPU where there is one.")] = "auto",
    users: Annotated[int, typer.Option(min=1, help="Answers written at a time; others wait.")] = 8,
    waiting: Annotated[int, typer.Option(min=1, help="Requests that may wait; further ones are refused.")] = 100,
    prefill_chunk_size: Annotated[
        int, typer.Option(min=1, help="Tokens of a prompt read at a time, while other answers stand still.")
    ] = 256,
    max_prompt_tokens: Annotated[int, typer.Option(min=1, help="Tokens that one request may send.")] = 1_000_000,
    max_tokens: Annotated[int, typer.Option(min=1, help="Tokens that one answer may have.")] = 4096,
    states: Annotated[Path | None, typer.Option(help="Folder of states with names; none are kept without it.")] = None,
    max_states: Annotated[int, typer.Option(min=1, help="States that one owner may keep.")] = 1000,
    max_state_bytes: Annotated[int | None, typer.Option(min=1, help="Bytes that one owner's states may take.")] = None,
    api_key: Annotated[
        list[str] | None,
        typer.Option(
            envvar="POWER_RETENTION_API_KEYS", help="A key that lets in, with states of its own; may be repeated."
        ),
    ] = None,
    chat_template: Annotated[Path | None, typer.Option(help="A template in place of the tokenizer's.")] = None,
    json: Json = False,
) -> None:
    """Serve a model over OpenAI's API, many requests at a time, with states that have names.

    Routes: /v1/models, /v1/completions, /v1/chat/completions, /v1/states, /health.
    With --json, a line says where, once it listens.

    Examples:

        power-retention serve my-model-retrained

        power-retention serve my-model-retrained --port 8080 --users 16 --states states --api-key "$KEY"

        curl localhost:8000/v1/completions -d '{"prompt": "The whale", "max_tokens": 60}'

        curl localhost:8000/v1/completions -d '{"prompt": "The whole book", "max_tokens": 1, "save_state": "book"}'
    """
    quiet_libraries()
    from power_retention.errors import ArgumentError, SourceError

    try:
        from power_retention.serving.server.app import ServerOptions, make_app
        from power_retention.serving.server.process import ServerProcess
    except ImportError as error:
        raise ArgumentError(
            f"Serving needs {error.name}, which is not installed: pip install 'power-retention[serve]'."
        ) from error
    from power_retention.serving.generate import open_tokenizer
    from power_retention.serving.server.batcher import Batcher

    # What can be refused at once is, before a large model is opened.
    place = choose_device(device)
    if states is not None:
        _check_states(states)
    listening = _listen(host, port)
    with status.status(f"Opening {escape(str(model))}"):
        student, tokenizer = open_student(model).eval().to(place), open_tokenizer(model)
    if not student.config.keeps_state:
        raise SourceError(
            f"{model} keeps no state (p = {student.config.power}, or softmax), so it cannot be served here."
        )
    if chat_template is not None:
        try:
            tokenizer.chat_template = chat_template.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise SourceError(f"The chat template {chat_template} cannot be read: {error}") from error
    options = ServerOptions(
        name or model.resolve().name,
        states,
        max_states,
        max_state_bytes,
        tuple(api_key or ()),
        max_prompt_tokens,
        max_tokens,
    )
    batcher = Batcher(student, tokenizer, users=users, waiting=waiting, piece=prefill_chunk_size)
    process = ServerProcess(
        make_app(batcher, options),
        batcher,
        patience=_PATIENCE,
        listening=lambda address: _say_where(address, options.name, users, json=json),
        ending=_say_that_it_ends,
    )
    process.run(sockets=[listening])


_PATIENCE = 10
"""Seconds that answers have when the server is asked to end."""


def _check_states(folder: Path) -> None:
    """Make the folder of states, and see that files can be made in it."""
    from power_retention.errors import OutputError
    from power_retention.files import clear_write_errors

    if folder.exists() and not folder.is_dir():
        raise OutputError(f"--states {folder} is a file; a folder was expected.")
    with clear_write_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()


def _listen(host: str, port: int) -> socket.socket:
    """The address is taken before the model is opened."""
    from power_retention.errors import ArgumentError

    with ExitStack() as unless_bound:
        try:
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
            family, _, _, _, address = found[0]
            listening = unless_bound.enter_context(socket.socket(family))
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listening.bind(address)
        except OSError as error:
            raise ArgumentError(
                f"Nobody can listen at {host}, port {port}: {error.strerror or error}. Choose another --port (0 takes a free "
                "one) or --host."
            ) from error
        unless_bound.pop_all()
    return listening


def _say_that_it_ends(answers: int) -> None:
    waited_for = f"{answers} answers have" if answers > 1 else "One answer has"
    status.print(f"{waited_for} {_PATIENCE} seconds to end.  Ctrl-C again ends at once.", highlight=False)


def _say_where(address: tuple[Any, ...], name: str, users: int, *, json: bool) -> None:
    host = f"[{address[0]}]" if ":" in address[0] else address[0]
    url = f"http://{host}:{address[1]}/v1"
    if json:
        print_json({"url": url, "model": name, "users": users})
    else:
        status.print(f"{escape(name)} answers at {url}, {users} at a time.  Stop with Ctrl-C.", highlight=False)
