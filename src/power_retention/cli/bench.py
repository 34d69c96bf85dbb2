"""``power-retention bench``."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from power_retention.cli.display import print_json, progress_bar, results, table
from power_retention.cli.options import Json

if TYPE_CHECKING:
    import torch

    from power_retention.evaluation.bench.settings import Settings

_OUT = Path("bench.json")


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(bench)


def bench(
    shape: Annotated[
        list[str] | None, typer.Option(help="Query heads/key heads x width, such as 40/8x128; may be repeated.")
    ] = None,
    lengths: Annotated[str, typer.Option(help="Tokens, comma-separated.")] = "",
    contexts: Annotated[str | None, typer.Option(help="Contexts of decoding, comma-separated; '' for none.")] = None,
    batches: Annotated[str, typer.Option(help="Batches of decoding, comma-separated.")] = "",
    contender: Annotated[list[str] | None, typer.Option(help="Only this one, by name; may be repeated.")] = None,
    cpu: Annotated[bool, typer.Option("--cpu", help="Bench the CPU even where there is a GPU.")] = False,
    quick: Annotated[bool, typer.Option("--quick", help="Few and small calls: seconds instead of minutes.")] = False,
    out: Annotated[Path, typer.Option(help="Report; the figures stand beside it.")] = _OUT,
    redraw: Annotated[
        Path | None, typer.Option(help="Draw the figures of this report again, measuring nothing.")
    ] = None,
    json: Json = False,
) -> None:
    """Time power retention against attention and whoever else is installed, each held against float64 first.

    Forward and backward over T, decoding over context, our kernels' share of what a matrix product reaches. What fails
    its check gets no speed-up. Examples:

        power-retention bench --out h200.json

        power-retention bench --shape 32/8x128 --lengths 8192,65536 --contexts ''

        power-retention bench --quick --cpu --json

        power-retention bench --redraw h200.json
    """
    from power_retention.evaluation.bench.figures import draw_figures

    if redraw is not None:
        report, out = _read(redraw), redraw
    else:
        device = _device(cpu)
        report = _measure(_settings(device, quick, shape, lengths, contexts, batches), device, contender or [], out)
    figures = draw_figures(report, out.parent, out.stem)
    if json:
        print_json(report)
        return
    _show(report)
    names = ", ".join(str(path) for path in ([out] if redraw is None else []) + figures)
    results.print(f"\nWritten: [bold]{escape(names)}[/]", highlight=False)


def _device(cpu: bool) -> torch.device:
    import torch

    return torch.device("cpu" if cpu or not torch.cuda.is_available() else "cuda")


def _settings(
    device: torch.device, quick: bool, shape: list[str] | None, lengths: str, contexts: str | None, batches: str
) -> Settings:
    from power_retention.evaluation.bench.settings import Settings
    from power_retention.ops.triton.samples import HeadShape

    settings = Settings.usual(device, quick=quick)
    if shape:
        shapes = tuple(HeadShape.parse(text) for text in shape)
        settings = replace(settings, shapes=shapes, decode_shape=shapes[-1])
    if lengths:
        settings = replace(settings, lengths=_numbers("--lengths", lengths))
        settings = replace(settings, stages_at=min(settings.stages_at, settings.lengths[-1]))
    if contexts is not None:
        settings = replace(settings, contexts=_numbers("--contexts", contexts))
    return replace(settings, batches=_numbers("--batches", batches)) if batches else settings


def _numbers(option: str, text: str) -> tuple[int, ...]:
    from power_retention.errors import ArgumentError

    try:
        numbers = sorted({int(part) for part in text.split(",") if part.strip()})
    except ValueError:
        numbers = [0]
    if any(number < 1 for number in numbers):
        raise ArgumentError(f"{option} must be positive whole numbers separated by commas, not {text!r}.")
    return tuple(numbers)


def _measure(settings: Settings, device: torch.device, only: list[str], out: Path) -> dict[str, Any]:
    from power_retention.errors import ArgumentError
    from power_retention.evaluation.bench.contenders import contenders
    from power_retention.evaluation.bench.measure import count, measure
    from power_retention.files import clear_write_errors, write_json

    here, absent = contenders(device)
    unknown = [name for name in only if name not in [c.name for c in here]]
    if unknown:
        why = f" ({absent[unknown[0]]})" if unknown[0] in absent else ""
        raise ArgumentError(
            f"{unknown[0]!r} cannot be benched here{why}; there are: {', '.join(c.name for c in here)}."
        )
    with clear_write_errors(out):
        out.parent.mkdir(parents=True, exist_ok=True)
    report: dict[str, Any] = {}
    with progress_bar("Bench") as update:
        done, total = 0, count(settings, device, only)

        def note(text: str) -> None:
            nonlocal done
            done += 1
            update(done, total, text)

        for report in measure(settings, device, note, only):
            write_json(out, report)
    return report


def _read(path: Path) -> dict[str, Any]:
    import json

    from power_retention.errors import DataError
    from power_retention.evaluation.bench.measure import FORMAT

    try:
        report = json.loads(path.read_text(encoding="utf-8"))
        known = report["format"] == FORMAT
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} is no report of `power-retention bench` ({type(error).__name__}: {error}).") from error
    if not known:
        raise DataError(f"{path} has format {report['format']}, {FORMAT} was expected; run the bench again.")
    return dict(report)


def _show(report: dict[str, Any]) -> None:
    from power_retention.evaluation.bench.report import crossover, speed_ups

    rows = speed_ups(report)
    table(
        "Milliseconds: power retention against the fastest attention that is right",
        ("heads, pass", "tokens", "ours", "attention", "faster", "over our best form", "memory"),
        [
            (
                f"{r['shape']}, {r['pass']}",
                f"{r['tokens']:,}",
                _ms(r["ours"]),
                _ms(r["attention"]),
                "not shown: unchecked" if r["ratio"] is None else f"{r['ratio']:.2f}×",
                "" if r["over_best_form"] is None else f"{r['over_best_form']:.2f}×",
                "" if r["memory"] is None else f"{r['memory']:.2f}×",
            )
            for r in rows
        ],
    )
    for shape, what in dict.fromkeys((r["shape"], r["pass"]) for r in rows):
        crossing = crossover(report, shape, what)
        where = "not faster than attention at these lengths"
        if crossing is not None:
            where = f"faster than attention from {crossing:,.0f} tokens on"
        results.print(f"{shape}, {what}: {where}.", highlight=False)
    _show_decode(report)
    ceiling = report["ceilings"]["matmul_tflops"]
    shares = [
        (
            f"{s['shape']}, {s['pass']}: {s['stage']}",
            f"{s['milliseconds']:.3f}",
            f"{100 * s['useful_tflops'] / ceiling:.0f} %",
        )
        for s in report["stages"]
        if s["useful_tflops"] is not None
    ]
    if shares:
        table(f"Useful arithmetic over a matrix product's {ceiling:.3g} TFLOP/s", ("stage", "ms", "share"), shares)
    for check in report["checks"]:
        if check["verdict"] != "right":
            bad = [name for name, x in check["errors"].items() if x is None or x > check["tolerance"]]
            why = check.get("why") or f"errors of {', '.join(bad)} are above {check['tolerance']:.0e}"
            results.print(
                f"{check['verdict']}, so not timed: {check['contender']}, {check['shape']}: {why}", highlight=False
            )
    for name, why in report["absent"].items():
        results.print(f"not here: {name}, {why}", highlight=False)


def _show_decode(report: dict[str, Any]) -> None:
    from power_retention.evaluation.bench.contenders import OURS

    if not report["decode"]:
        return
    right = {(r["contender"], r["batch"], r["context"]): r for r in report["decode"] if r.get("verdict") == "right"}
    rows = []
    for (name, batch, context), row in right.items():
        ours = right.get((OURS, batch, None))
        faster = "" if ours is None or name == OURS else f"{row['ms']['median'] / ours['ms']['median']:.2f}×"
        where = "any" if context is None else f"{context:,}"
        rows.append((f"{name}, batch {batch}", where, _ms(row["ms"]["median"]), faster))
    table("Decoding, milliseconds a token and layer", ("who", "context", "ms", "we are faster"), rows)
    for row in report["decode"]:
        if row.get("verdict") != "right":
            why = row.get("failed") or f"relative error {row['error']}"
            name = f"{row['contender']}, batch {row['batch']}, context {row['context']}"
            results.print(f"not shown: {name}: {why}", highlight=False)


def _ms(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"
