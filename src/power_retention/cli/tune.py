"""``power-retention tune``."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from power_retention.cli.display import print_json, progress_bar, results, status, table
from power_retention.cli.options import Json

if TYPE_CHECKING:
    import torch

    from power_retention.ops.triton.tuning import Checker, CostFit, Job, Sweep

_SHAPES = ("12/12x64", "40/8x128")
_COSTS = "costs"
_LENGTHS = (1024, 2048, 4096, 8192, 16384, 32768)


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(tune)


def tune(
    shape: Annotated[
        list[str] | None,
        typer.Option(help="Query heads/key heads x width; may be repeated. 12/12x64 and 40/8x128 by default."),
    ] = None,
    only: Annotated[str, typer.Option("--pass", help="Kernels of this pass: forward, backward or both.")] = "both",
    kernel: Annotated[
        list[str] | None,
        typer.Option(
            help="Only this kernel; may be repeated. 'costs' measures what the choice of form and chunk rests on."
        ),
    ] = None,
    dtype: Annotated[str, typer.Option(help="bfloat16, float16 or float32.")] = "bfloat16",
    tokens: Annotated[int | None, typer.Option(help="Longest call that is timed; 32,768 on a GPU.")] = None,
    workers: Annotated[
        int | None, typer.Option(help="Processes that compile and check; as many as cores, 12 at most.")
    ] = None,
    keep: Annotated[bool, typer.Option(help="Keep the winners in the cache, where every later run finds them.")] = True,
    out: Annotated[
        Path | None, typer.Option(help="Also write the GPU family's settings with the winners in, as shipped.")
    ] = None,
    json: Json = False,
) -> None:
    """Find the fastest right settings of the GPU kernels on this machine.

    Every candidate is held against a float64 reference before it is timed; a wrong one is reported and never chosen.
    Winners belong to a shape class (head width, dtype, grouped or not), never to a sequence length. Examples:

        power-retention tune

        power-retention tune --shape 32/8x128 --pass forward --json

        power-retention tune --kernel costs --no-keep --out hopper.json
    """
    import torch

    from power_retention.errors import ArgumentError
    from power_retention.files import write_json
    from power_retention.ops.triton.samples import HeadShape
    from power_retention.ops.triton.tuned import family, keep_own, own_file, shipped
    from power_retention.ops.triton.tuning import Job, family_file, own_entries

    device, names = _device(), _names(only, kernel)
    if tokens is not None and (tokens < 1 or (device.type == "cuda" and tokens < 2 * _LENGTHS[0])):
        raise ArgumentError(
            f"--tokens must be at least {2 * _LENGTHS[0]:,}, not {tokens:,}: shorter calls show nothing."
        )
    jobs = [Job.usual(HeadShape.parse(text), _dtype(dtype), device, tokens) for text in shape or _SHAPES]
    sweeps: list[Sweep] = []
    fits: list[CostFit] = []
    with progress_bar("Tuning") as update, _checker(device, workers) as check:
        steps = _Steps(update, jobs, names)
        for job in jobs:
            used = _used(job, names)
            with ExitStack() as winners:  # they stay on trial, so that what is measured next is measured with them
                for name in used:
                    found, costs = _measure(job, name, check, steps, winners)
                    sweeps, fits = sweeps + found, fits + costs
                    if keep:
                        keep_own(device, own_entries(found, costs))
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else "interpreter"
    if out:
        write_json(out, family_file(shipped(family(device)), gpu, sweeps, fits))
    if json:
        print_json(_report(gpu, sweeps, fits))
        return
    _show(sweeps, fits)
    if keep:
        results.print(f"\nKept in [bold]{own_file(device)}[/].", highlight=False)


class _Steps:
    """Moves the bar on by one for every check and timing."""

    def __init__(self, update: Any, jobs: list[Job], names: list[str]) -> None:
        from power_retention.ops.triton.tuning import TUNABLES

        self.update, self.done = update, 0
        self.total = sum(
            2 * (1 + len(TUNABLES[name].candidates(job.shape_class))) if name != _COSTS else 2 * len(_LENGTHS)
            for job in jobs
            for name in names
        )

    def __call__(self, note: str) -> None:
        self.done += 1
        self.update(self.done, max(self.total, self.done), note)


def _used(job: Job, names: list[str]) -> list[str]:
    """Those whose kernels this GPU runs; says which it does not."""
    from power_retention.ops.triton.tuning import TUNABLES, kernels_launched

    if job.device == "cpu":
        return names
    launched = kernels_launched(job)
    used = [name for name in names if name == _COSTS or TUNABLES[name].kernel in (None, *launched)]
    if len(used) < len(names):
        idle = ", ".join(name for name in names if name not in used)
        status.print(f"{job.shape} runs other kernels in the place of: {idle}.", highlight=False)
    return used


def _measure(
    job: Job, name: str, check: Checker, steps: _Steps, winners: ExitStack
) -> tuple[list[Sweep], list[CostFit]]:
    from power_retention.ops.cost import CHUNKS
    from power_retention.ops.triton.tuned import on_trial
    from power_retention.ops.triton.tuning import measure_costs, sweep

    if name != _COSTS:
        found = sweep(job, name, check, steps)
        if found.best is not None:
            winners.enter_context(on_trial(name, found.best.setting))
        return [found], []
    small = job.device == "cpu"
    chunks = (8, 16, 32) if small else CHUNKS
    lengths = [n for n in ((16, 32, 40) if small else _LENGTHS) if n <= job.tokens]
    return [], [measure_costs(job, backward, lengths, chunks, steps) for backward in (False, True)]


def _device() -> torch.device:
    import torch

    from power_retention.errors import BackendError
    from power_retention.ops import backend_names
    from power_retention.ops.triton.plan import interpreted

    if "triton" in backend_names():
        if interpreted():
            return torch.device("cpu")
        if torch.cuda.is_available():
            return torch.device("cuda", torch.cuda.current_device())
    raise BackendError(
        "There is nothing to tune: the kernels need Triton and a GPU that it knows. Without a GPU, TRITON_INTERPRET=1 runs "
        "them in Triton's interpreter, to try the command."
    )


def _dtype(name: str) -> torch.dtype:
    import torch

    from power_retention.errors import ArgumentError

    known = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
    if name not in known:
        raise ArgumentError(f"--dtype must be one of {', '.join(known)}, not {name!r}.")
    return known[name]


def _names(only: str, kernels: list[str] | None) -> list[str]:
    from power_retention.errors import ArgumentError
    from power_retention.ops.triton.tuning import TUNABLES

    if only not in ("forward", "backward", "both"):
        raise ArgumentError(f"--pass must be forward, backward or both, not {only!r}.")
    unknown = [name for name in kernels or () if name not in (*TUNABLES, _COSTS)]
    if unknown:
        raise ArgumentError(f"{unknown[0]!r} is no kernel; there are: {', '.join((*TUNABLES, _COSTS))}.")
    if kernels:
        return kernels
    names = [name for name, t in TUNABLES.items() if only == "both" or t.backward == (only == "backward")]
    return [*names, _COSTS]


@contextmanager
def _checker(device: torch.device, workers: int | None) -> Iterator[Checker]:
    from power_retention.ops.triton.tuning import check_by, check_here, check_one
    from power_retention.workers import Workers

    if device.type == "cpu":
        yield check_here
        return
    with Workers(check_one, workers or min(12, os.cpu_count() or 1)) as pool:
        yield check_by(pool)


def _report(gpu: str, sweeps: list[Sweep], fits: list[CostFit]) -> dict[str, Any]:
    from dataclasses import asdict

    return {
        "gpu": gpu,
        "kernels": [
            {
                "kernel": s.kernel,
                "shape_class": s.shape,
                "before": asdict(s.before),
                "best": None if s.best is None else asdict(s.best),
                "wrong": [asdict(t) for t in s.wrong],
                "trials": [asdict(t) for t in s.trials],
            }
            for s in sweeps
        ],
        "costs": [
            {
                "width": f.width,
                "pass": f.kind,
                "costs": f.costs.to_dict(),
                "regret": f.regret,
                "measured": [
                    {"tokens": m.work.tokens, "chunk": m.chunk, "milliseconds": m.milliseconds} for m in f.measured
                ],
            }
            for f in fits
        ],
    }


def _show(sweeps: list[Sweep], fits: list[CostFit]) -> None:
    from power_retention.ops.triton.tuning import brief

    rows = []
    for s in sweeps:
        best, before = s.best, s.before.milliseconds
        now = None if best is None else best.milliseconds
        rows.append(
            (
                f"{s.kernel} {s.shape}",
                brief(s.before.setting),
                "wrong" if before is None else f"{before:.3f}",
                "none is right" if best is None else "kept" if best is s.before else brief(best.setting),
                "" if now is None else f"{now:.3f}",
                f"{before / now:.2f}×" if before and now else "",
                str(len(s.trials)),
                str(len(s.wrong)),
            )
        )
    if rows:
        columns = ("kernel", "before", "ms", "after", "ms", "faster", "tried", "wrong")
        table("Kernels, each right against float64 before it was timed", columns, rows)
    for s in sweeps:
        for trial in s.wrong:
            results.print(f"wrong, not chosen: {s.kernel} {brief(trial.setting)}: {trial.check.wrong}", highlight=False)
    if fits:
        costs = [(f"width {f.width}, {f.kind}", str(n), f"{r:.2f}×") for f in fits for n, r in f.regret.items()]
        table("Choice of form and chunk by the cost model", ("pass", "tokens", "over the best measured"), costs)
