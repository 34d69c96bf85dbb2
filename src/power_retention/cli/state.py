"""``power-retention state``: what state files hold, and copies of them."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from power_retention.cli.display import print_json, status, table
from power_retention.cli.options import Json

if TYPE_CHECKING:
    from power_retention.ops.state_file import StateHeader

_EXAMPLES = """

    Examples:

        power-retention state inspect book.state

        power-retention state list states

        power-retention state fork book.state for-anna.state for-ben.state
"""


def register(app: typer.Typer) -> None:
    """Add the commands."""
    group = typer.Typer(no_args_is_help=True, rich_markup_mode="markdown")
    for command in (inspect, list_states, fork):
        name = command.__name__.removesuffix("_states")
        group.command(name, no_args_is_help=True)(command)
    app.add_typer(group, name="state", help="Look at state files and fork them." + _EXAMPLES)


def inspect(
    file: Annotated[Path, typer.Argument(help="A state file.")],
    verify: Annotated[bool, typer.Option("--verify", help="Also check the checksum over every byte.")] = False,
    json: Json = False,
) -> None:
    """Say what a state file holds, from its header alone.

    Example:

        power-retention state inspect book.state --verify
    """
    from power_retention.ops.state_file import load_states, read_header

    header = read_header(file)
    if verify:
        with status.status(f"Checking {escape(str(file))}"):
            load_states(file)
    described = _described(file, header) | ({"verified": True} if verify else {})
    if json:
        print_json(described)
        return
    table(escape(str(file)), ("", ""), [(escape(name), escape(str(value))) for name, value in described.items()])


def list_states(
    folder: Annotated[Path, typer.Argument(help="A folder that holds state files.")], json: Json = False
) -> None:
    """List the state files of a folder, newest first; other files are passed over.

    Example:

        power-retention state list states --json
    """
    from power_retention.errors import StateError
    from power_retention.ops.state_file import read_header

    if not folder.is_dir():
        raise StateError(f"{folder} is not a folder; a folder that holds state files was expected.")
    found = []
    for file in sorted(folder.iterdir()):
        try:
            found.append(_described(file, read_header(file)))
        except StateError:
            continue
    found.sort(key=lambda one: str(one["created"]), reverse=True)
    if json:
        print_json(found)
        return
    columns = ("file", "tokens seen", "MB", "created", "model")
    rows = [
        (
            Path(one["file"]).name,
            f"{one['tokens_seen']:,}",
            f"{one['megabytes']:.1f}",
            one["created"],
            one["model"][-12:],
        )
        for one in found
    ]
    table(f"{len(found)} state files in {escape(str(folder))}", columns, [tuple(map(escape, row)) for row in rows])


def fork(
    file: Annotated[Path, typer.Argument(help="The state file to copy.")],
    copies: Annotated[list[Path], typer.Argument(help="The new files.")],
    json: Json = False,
) -> None:
    """Copy a state file, checked and complete; every copy notes what it came from and goes its own way.

    Example:

        power-retention state fork book.state for-anna.state for-ben.state
    """
    from power_retention.ops.state_file import fork_states

    made = []
    for copy in copies:
        with status.status(f"Writing {escape(str(copy))}"):
            made.append(_described(copy, fork_states(file, copy)))
    if json:
        print_json(made)
        return
    for one in made:
        print(f"{one['file']}: {one['tokens_seen']:,} tokens read, {one['megabytes']:.1f} MB")


def _described(file: Path, header: StateHeader) -> dict[str, Any]:
    fields = asdict(header)
    return {"file": str(file), "megabytes": file.stat().st_size / 1e6, **fields.pop("extra"), **fields}
