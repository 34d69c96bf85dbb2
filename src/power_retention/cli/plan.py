"""``power-retention plan``."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from power_retention.cli.display import print_json, results, status, table
from power_retention.cli.options import Json, quiet_libraries

if TYPE_CHECKING:
    from power_retention.evaluation.dry_run import Layout
    from power_retention.evaluation.gpus import Gpu
    from power_retention.evaluation.memory import TrainingMemory
    from power_retention.evaluation.plan import Plan, Serving

_FULL = 0.9
"""Share of a GPU's memory above which a retraining is told not to fit."""
_CONTEXTS = (4096, 32768, 131072, 1048576)


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(no_args_is_help=True)(plan)


def plan(
    model: Annotated[str, typer.Argument(help="A preset (qwen3-14b), a folder, or a hub id whose config is cached.")],
    context: Annotated[str, typer.Option(help="Tokens a user has read: 32768, 128k, 1M.")] = "1M",
    gpus: Annotated[str, typer.Option(help="How many of which GPU.")] = "1xH200",
    state_dtype: Annotated[str, typer.Option(help="Of the states: float32 or bfloat16.")] = "float32",
    ring: Annotated[int, typer.Option(help="Tokens folded at a time; 0 rewrites the state for each.")] = 32,
    weight_bytes: Annotated[
        float, typer.Option(min=0.1, max=16, help="Bytes a weight: 2 for bfloat16, 1 for int8.")
    ] = 2,
    train_tokens: Annotated[str, typer.Option(help="Tokens to retrain on.")] = "1B",
    long_training: Annotated[
        str | None, typer.Option("--long-training", help="Also the memory of training on documents so long: 64k,1M.")
    ] = None,
    segment: Annotated[str, typer.Option(help="Tokens between two borders of its back-propagation.")] = "32k",
    checkpointing: Annotated[
        bool, typer.Option("--activation-checkpointing", help="Its layers keep their inputs only.")
    ] = False,
    utilisation: Annotated[
        float, typer.Option(min=0.01, max=1, help="Share of the GPU's operations that training reaches.")
    ] = 0.4,
    price: Annotated[float | None, typer.Option(min=0, help="Dollars an hour of one GPU.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Also draw users and speed against context, as a PNG.")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Instead, lay a retraining out over the GPUs: what each has to hold.")
    ] = False,
    ranks: Annotated[int | None, typer.Option(min=1, help="Of the dry run: GPUs, where not as --gpus says.")] = None,
    replicas: Annotated[
        int, typer.Option(min=1, help="Of the dry run: groups of GPUs that hold all weights each.")
    ] = 1,
    batch: Annotated[
        int | None, typer.Option(min=1, help="Of the dry run: sequences a step; one a GPU by default.")
    ] = None,
    length: Annotated[int, typer.Option(min=1, help="Of the dry run: tokens a sequence.")] = 4096,
    recompute: Annotated[
        bool,
        typer.Option("--recompute/--no-recompute", help="Of the dry run: compute layers again in backward passes."),
    ] = True,
    json: Json = False,
) -> None:
    """Say what serving and retraining a model takes, before renting anything: memory, users, speed, cost.

    Speeds are bounds by memory bandwidth. Examples:

        power-retention plan qwen3-14b --context 1M --gpus 4xH200

        power-retention plan my-model --gpus 1xRTX4090 --state-dtype bfloat16 --ring 16 --plot plan.png

        power-retention plan glm-4.5-air --gpus 32xH200 --dry-run --length 8192

        power-retention plan smollm2-135m --long-training 64k,1M --segment 32k
    """
    quiet_libraries()
    from power_retention.evaluation.plan import Assumptions, make_plan, parse_count, parse_gpus

    count, gpu = parse_gpus(gpus, price)
    if dry_run:
        from power_retention.errors import ArgumentError
        from power_retention.evaluation.dry_run import Layout

        if plot is not None:
            raise ArgumentError("A dry run has no figure: leave out --plot, or --dry-run.")
        count = ranks or count
        _dry_run(model, Layout(count, replicas, batch or count, length, recompute), gpu, json)
        return
    contexts = sorted({*_CONTEXTS, parse_count(context)})
    assumptions = Assumptions(
        weight_bytes=weight_bytes,
        state_dtype=state_dtype,
        ring=ring,
        train_tokens=parse_count(train_tokens),
        utilisation=utilisation,
    )
    with status.status(f"Reading the configuration of {escape(model)}"):
        from power_retention.conversion.presets import resolve_config

        config = resolve_config(model)
        made = make_plan(config, contexts, gpu, count, assumptions, name=model)
    training: list[TrainingMemory] = []
    if long_training is not None:
        from power_retention.evaluation.memory import predict_training

        with status.status("Going through a training step"):
            options = {"segment": parse_count(segment), "checkpointed": checkpointing, "compiled": True}
            for tokens in long_training.split(","):
                training.append(predict_training(config, tokens=parse_count(tokens), **options))  # type: ignore[arg-type]
    if plot is not None:
        from power_retention.evaluation.figure import draw_plan_figure

        with status.status(f"Drawing {escape(str(plot))}"):
            draw_plan_figure(made, plot)
    if json:
        print_json(made.to_dict() | ({"long_training": [one.to_dict() for one in training]} if training else {}))
        return
    _show(made, parse_count(context))
    if training:
        _show_training(training, made)


def _dry_run(model: str, layout: Layout, gpu: Gpu, json: bool) -> None:
    from power_retention.conversion.presets import resolve_config
    from power_retention.evaluation.dry_run import lay_out, teacher_of

    with status.status(f"Laying {escape(model)} out over {layout.ranks} GPUs"):
        memory = lay_out(resolve_config(model), layout, teacher_of(model))
    if json:
        print_json({"model": model, "layout": asdict(layout), "gpu": gpu.name, "bytes": memory.to_dict()})
        return
    rows = [(name, f"{size / 1e9:,.2f} GB") for name, size in memory.to_dict().items()]
    table(f"Retraining {model} on {layout.ranks} × {gpu.name}: what the fullest holds", ("what", "how much"), rows)
    share = memory.total / (gpu.memory_gb * 1e9)
    verdict = f"{share:.0%} of the {gpu.memory_gb:g} GB of an {gpu.name}."
    advice = " Use more GPUs, fewer replicas, or shorter sequences." if share > _FULL else ""
    results.print(
        f"{verdict}{advice}\n[dim]Shards are exact, made by the code of a real run; the rest is reckoned for a distillation in "
        f"bfloat16, {layout.batch} × {layout.length:,} tokens a step, layers {'' if layout.recompute else 'not '}computed "
        "again. Kernels, the allocator and NCCL take some more.[/]",
        highlight=False,
    )


def _show(plan: Plan, context: int) -> None:
    gigabytes = plan.weights_bytes / 1e9
    rows = [
        ("parameters", f"{plan.parameters / 1e9:,.3f} B"),
        ("read for a token", f"{plan.parameters_read / 1e9:,.3f} B"),
        ("weights", f"{gigabytes:,.2f} GB"),
        ("state of a sequence, at any length", f"{plan.state_bytes / 1e6:,.1f} MB"),
        ("key/value cache of the parent, a token", f"{plan.kv_bytes_per_token / 1024:,.1f} KiB"),
        ("less memory than the parent from", _tokens(plan.crossovers.memory)),
        ("faster decoding from", _tokens(plan.crossovers.decoding)),
        ("fewer operations for a prompt from", _tokens(plan.crossovers.reading)),
        (f"retraining on {plan.retraining.tokens / 1e9:,.3g} B tokens", _cost(plan)),
    ]
    table(f"{plan.name} on {plan.gpus} × {plan.gpu.name}", ("what", "how much"), rows)
    pairs = [
        (_short(a.context) + (" ←" if a.context == context else ""), *_serving(a), *_serving(b))
        for a, b in zip(plan.student, plan.parent, strict=True)
    ]
    columns = ("context", "users", "a GPU", "tokens/s", "one alone", "parent: users", "a GPU", "tokens/s", "one alone")
    table("What fits, and how fast at most", columns, pairs)
    assume = plan.assumptions
    results.print(
        f"[dim]Assumed: {plan.gpu.memory_gb:g} GB, {plan.gpu.bandwidth_tb_s:g} TB/s, {plan.gpu.tflops:g} TFLOP/s and "
        f"${plan.gpu.dollars_per_hour:.2f} an hour for one {plan.gpu.name}; {assume.memory_share:.0%} of the memory and "
        f"{assume.bandwidth_share:.0%} of the bandwidth used; {assume.weight_bytes:g} bytes a weight, states in "
        f"{assume.state_dtype} with a ring folded {assume.ring} at a time; the parent's cache in 2 bytes; training by "
        f"distillation on {assume.train_length:,}-token sequences at {assume.utilisation:.0%} of the operations. "
        "Communication between GPUs is not counted.[/]",
        highlight=False,
    )


def _show_training(training: list[TrainingMemory], plan: Plan) -> None:
    columns = ("tokens of a document", "segment", "GPU memory", "of it a step", "host memory", "a step")
    speed = plan.gpu.tflops * 1e12 * plan.assumptions.utilisation
    rows = [
        (
            _short(one.tokens),
            _short(one.segment),
            f"{one.device_bytes / 1e9:,.1f} GB",
            f"{one.step / 1e9:,.1f} GB",
            f"{one.host_bytes / 1e9:,.1f} GB",
            f"{one.flops / speed:,.1f} s",
        )
        for one in training
    ]
    table(
        f"Training on one {plan.gpu.name}: exact gradients in segments, bfloat16, AdamW, layers compiled", columns, rows
    )


def _serving(serving: Serving) -> tuple[str, str, str, str]:
    if not serving.users:
        return "0", "–", "–", "–"
    return (
        f"{serving.users:,}",
        f"{serving.users_per_gpu:,.3g}",
        f"{serving.tokens_per_second:,.0f}",
        f"{serving.tokens_per_second_alone:,.0f}",
    )


def _cost(plan: Plan) -> str:
    return f"{plan.retraining.gpu_hours:,.0f} GPU-hours, ${plan.retraining.dollars:,.0f}"


def _tokens(count: float) -> str:
    return f"{count:,.0f} tokens"


def _short(count: int) -> str:
    for size, unit in ((1024**2, "M"), (1024, "k")):
        if count % size == 0:
            return f"{count // size} {unit}"
    return f"{count:,}"
