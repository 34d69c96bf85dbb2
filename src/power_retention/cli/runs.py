"""``power-retention runs``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from power_retention.cli.display import print_json, results, status, table
from power_retention.cli.options import Json


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(runs)


def runs(
    folders: Annotated[
        list[Path] | None, typer.Argument(help="Outputs of `retrain`, or folders of them; by default this one.")
    ] = None,
    html: Annotated[
        Path | None, typer.Option("--html", help="Write the page to a file that needs nothing else, and stop.")
    ] = None,
    price: Annotated[
        float | None, typer.Option(help="Dollars an hour of one device; by default what its GPU usually costs.")
    ] = None,
    port: Annotated[int, typer.Option(help="Serve the page at this port of this machine; 0 for any.")] = 8321,
    browser: Annotated[bool, typer.Option("--open", help="Open the page in a browser.")] = False,
    json: Json = False,
) -> None:
    """Compare retrainings in a local web page: losses by domain, the teacher, hours, dollars, half-lives, recipes.

    The page follows runs that are still going on; Ctrl-C ends it. Examples:

        power-retention runs experiments

        power-retention runs out-a out-b --price 2.10 --open

        power-retention runs experiments --html runs.html
    """
    from power_retention.evaluation.runs.page import RunsServer, render_page
    from power_retention.evaluation.runs.records import read_runs
    from power_retention.files import clear_write_errors, replacement

    places = folders or [Path()]
    with status.status("Reading runs"):
        value = read_runs(places, price=price)
    for sentence in value["unreadable"]:
        status.print(f"[bold]unreadable:[/] {escape(sentence)}", soft_wrap=True, highlight=False)
    if json:
        print_json(value)
    else:
        _show(value)
    if html is not None:
        with clear_write_errors(html), replacement(html) as partial:
            partial.write_text(render_page(value), encoding="utf-8")
        if not json:
            results.print(f"Page in [bold]{escape(str(html))}[/]", highlight=False)
    if json or html is not None:
        return
    with RunsServer(lambda: read_runs(places, price=price), port) as server:
        results.print(f"Page at [bold]{server.url}[/], up to date while this runs; Ctrl-C ends it", highlight=False)
        if browser:
            typer.launch(server.url)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            status.print("Ended.")


def _show(value: dict[str, Any]) -> None:
    if not value["runs"]:
        status.print("No runs here yet: `power-retention retrain … --held-out NAME=PATH` begins one.", highlight=False)
        return
    rows = [
        [
            escape(run["name"]),
            run["state"],
            f"{run['tokens']:,}",
            _number(run["device_hours"], "{:.2f}"),
            *(
                _number(((run["summary"] or {}).get(side) or {}).get(name), shape)
                for side in ("learnt", "kept_out")
                for name, shape in (("kl", "{:.3f}"), ("above", "{:+.0%}"))
            ),
        ]
        for run in value["runs"]
    ]
    columns = ["run", "", "tokens", "hours", "KL", "above", "KL", "above"]
    table("Runs: KL and loss above the teacher's, of the mixture's text and of what is kept out", columns, rows)


def _number(value: float | None, shape: str) -> str:
    return "–" if value is None else shape.format(value)
