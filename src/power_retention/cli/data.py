"""``power-retention data``: text into token shards, and a look at them."""

from __future__ import annotations

import math
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from typer.core import TyperGroup

from power_retention.cli.display import print_json, progress_bar, results, status, table
from power_retention.cli.options import Json, TextField, quiet_libraries

if TYPE_CHECKING:
    from power_retention.training.sharding import ShardingProgress

_EXAMPLES = """

    Examples:

        power-retention data corpus.jsonl books/ --tokenizer my-model --out shards/prose

        power-retention data 'crawl/**/*.parquet' --text-field content --tokenizer Qwen/Qwen3-14B-Base --out shards/web

        power-retention data Salesforce/wikitext --split train --tokenizer my-model --out shards/wiki

        power-retention data python.jsonl --tokenizer bigcode/starcoder2-3b --fill-in 0.5 --out shards/python

        power-retention data inspect shards/prose

        power-retention data verify shards/prose

    Stopped or killed, the same command continues: finished shards are kept. A twentieth of the documents stays out, the same
    that `retrain` and `evaluate` hold out. (`data build` is the first form by its full name, for sources called inspect.)
    """


class _BuildsByDefault(TyperGroup):
    """``data SOURCES`` means ``data build SOURCES``."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] not in {*self.commands, "--help"}:
            args = ["build", *args]
        return super().parse_args(ctx, args)


def register(app: typer.Typer) -> None:
    """Add the commands."""
    group = typer.Typer(cls=_BuildsByDefault, no_args_is_help=True, rich_markup_mode="markdown")
    for command in (build, inspect, verify):
        group.command(no_args_is_help=True)(command)
    app.add_typer(group, name="data", help="Turn text into token shards to retrain on." + _EXAMPLES)


def build(
    sources: Annotated[
        list[str],
        typer.Argument(
            help="Files (.txt, .md, .json, .jsonl, .jsonl.xz, .parquet), folders, globs, saved datasets or hub ids of datasets."
        ),
    ],
    tokenizer: Annotated[str, typer.Option(help="Model whose tokenizer to use: folder, hub id or GGUF.")],
    out: Annotated[Path, typer.Option(help="Folder for the shards.")],
    text_field: TextField = "text",
    split: Annotated[str, typer.Option(help="Split of a dataset that has several.")] = "train",
    held_out: Annotated[float, typer.Option(help="Share of the documents to leave out, for `evaluate`.")] = 0.05,
    fill_in: Annotated[
        float,
        typer.Option(
            min=0,
            max=1,
            help="Share of the documents to write with their middle last (fill-in-the-middle), for a code model whose "
            "tokenizer has tokens for it.",
        ),
    ] = 0.0,
    shard_mb: Annotated[float, typer.Option(help="Megabytes of source that make a shard.")] = 64.0,
    workers: Annotated[int | None, typer.Option(help="Processes; as many as cores by default.")] = None,
    seed: Annotated[int, typer.Option(help="Of --fill-in: which documents, and where they are cut.")] = 0,
    json: Json = False,
) -> None:
    """Turn text into token shards; run again, it makes only what is missing.

    Example:

        power-retention data corpus.jsonl books/ --tokenizer my-model --out shards/prose
    """
    quiet_libraries()
    from power_retention.errors import ArgumentError
    from power_retention.training.fill_in import FillIn
    from power_retention.training.sharding import make_shards

    if not (shard_mb > 0 and math.isfinite(shard_mb)):
        raise ArgumentError(f"--shard-mb is {shard_mb}; a finite number of megabytes above 0 was expected.")
    started = time.monotonic()

    def note(progress: ShardingProgress) -> str:
        seconds = max(time.monotonic() - started, 1e-9)
        rates = f"{progress.tokens / seconds:,.0f} tokens/s  {progress.source_bytes / seconds / 1e6:.1f} MB/s"
        return f"{progress.kept} kept" if progress.done == progress.kept else rates

    with progress_bar("Shards") as update:
        made = make_shards(
            sources,
            tokenizer,
            out,
            text_field=text_field,
            split=split,
            held_out=held_out,
            fill_in=FillIn(fill_in, seed) if fill_in else None,
            shard_bytes=int(shard_mb * 1e6),
            workers=workers or os.cpu_count() or 1,
            watch=lambda progress: update(progress.done, progress.shards, note(progress)),
        )
    described = _described(out) | {"kept_shards": made.kept, "seconds": round(time.monotonic() - started, 2)}
    if json:
        print_json(described)
        return
    results.print(
        f"[bold]{escape(str(out))}[/] holds {described['tokens']:,} tokens of {described['documents']:,} documents in "
        f"{described['shards']} shards ({made.kept} kept from before). Train on them:\n"
        f"  power-retention retrain MODEL OUT --data {escape(str(out))}",
        highlight=False,
    )


def inspect(
    folder: Annotated[Path, typer.Argument(help="A folder of token shards.")],
    json: Json = False,
) -> None:
    """Say what a folder of shards holds, from its indexes alone.

    Example:

        power-retention data inspect shards/prose
    """
    described = _described(folder)
    if json:
        print_json(described)
        return
    rows = [(name.replace("_", " "), _shown(value)) for name, value in described.items()]
    table(escape(str(folder)), ("", ""), rows)


def verify(
    folder: Annotated[Path, typer.Argument(help="A folder of token shards.")],
    json: Json = False,
) -> None:
    """Read every byte and compare it with the checksums; name each damaged shard, and end with status 1 if there is one.

    Example:

        power-retention data verify shards/prose
    """
    from power_retention.training.shards import healthy_shards, read_plan

    plan = read_plan(folder)
    with progress_bar("Checking") as update:
        shards, damage = healthy_shards(plan, progress=update)
    if json:
        print_json({"folder": str(folder), "shards": plan.shards, "sound": len(shards), "damaged": damage})
    elif not damage:
        results.print(f"{escape(str(folder))}: all {plan.shards} shards are as they were written.", highlight=False)
    for sentence in damage:
        status.print(f"[bold red]damaged:[/] {escape(sentence)}", soft_wrap=True, highlight=False)
    if damage:
        raise typer.Exit(1)


def _described(folder: Path) -> dict[str, Any]:
    from power_retention.training.shards import healthy_shards, read_plan

    plan = read_plan(folder)
    shards, damage = healthy_shards(plan, checksums=False)
    lengths = [int(length) for shard in shards for length in (shard.starts[1:] - shard.starts[:-1])]
    return {
        "folder": str(folder),
        "shards": plan.shards,
        "unusable": damage,
        "documents": len(lengths),
        "tokens": sum(lengths),
        "longest_document": max(lengths, default=0),
        "bytes_per_token": round(sum(shard.source_bytes for shard in shards) / max(sum(lengths), 1), 3),
        "dtype": plan.dtype,
        "tokenizer": plan.tokenizer,
        "tokenizer_source": plan.content["tokenizer_source"],
        "held_out": plan.content["held_out"],
        "fill_in": (plan.content.get("fill_in") or {}).get("share", 0.0),
        "files": len(plan.content["files"]),
    }


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return escape("\n".join(value) or "none")
    return f"{value:,}" if isinstance(value, int) else escape(str(value))
