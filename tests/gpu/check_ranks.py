"""What many GPUs must hold of a retraining that tests with gloo cannot see: NCCL, kernels, compilation, memory, speed.

    PYTHONPATH=src python tests/gpu/check_ranks.py --gpus 2 --out /tmp/ranks.json

A model of SmolLM2-135M's shape (--preset for another) with random weights is retrained on random tokens for a few steps, by one
GPU, by all, in two groups, compiled, with layers computed again, stopped and resumed; what must be equal is compared.  The exit
status counts what is wrong.  The script itself is tried with --device cpu --layers 1 --batch 4 --length 32.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig

from power_retention.conversion.presets import preset
from power_retention.conversion.swap import swap_attention
from power_retention.errors import RunInterrupted
from power_retention.evaluation.dry_run import Layout, lay_out
from power_retention.files import write_json
from power_retention.training.folder import RunFolder
from power_retention.training.parallel import Ranks, joined_ranks, local_device
from power_retention.training.recipe import Recipe
from power_retention.training.retraining import Retraining
from power_retention.training.run import Progress, execute
from power_retention.training.text import Tokens

STEPS = 8
ROUNDING = {"float32": 2e-5, "bfloat16": 2e-2}
"""Relative difference of losses over the eight steps between numbers of GPUs; float32 without TF32."""


def work(models: Path, run: Path, options: dict[str, Any]) -> None:
    """One process of a run; the first one writes down what it saw."""
    device = local_device(options["device"])
    with joined_ranks(device, dp_replicate=options["replicas"]) as ranks:
        write_json(run.with_suffix(f".rank{ranks.rank}.json"), trained(ranks, device, models, run, options))


def trained(ranks: Ranks, device: torch.device, models: Path, run: Path, options: dict[str, Any]) -> dict[str, Any]:
    recipe = Recipe(**options["recipe"])
    student = AutoModelForCausalLM.from_pretrained(models / "student", dtype=torch.float32)
    teacher = AutoModelForCausalLM.from_pretrained(models / "teacher", dtype=torch.float32)
    ids = np.random.default_rng(0).integers(0, student.config.vocab_size, 4_000_000, dtype=np.int32)
    named = {name: options[name] for name in ("compiled", "recompute", "recorded")}
    retraining = Retraining(
        student, teacher, Tokens(ids, np.array([0, len(ids)])), recipe, device=device, ranks=ranks, **named
    )
    folder = RunFolder(run)
    if ranks.first and not folder.exists:
        folder.begin(recipe, {})
    ranks.wait()
    losses: list[float] = []
    times: list[float] = []

    def watch(progress: Progress) -> None:
        losses.append(progress.metrics["loss"])
        times.append(time.perf_counter())

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    with suppress(RunInterrupted):
        execute(retraining, folder, watch=watch, stop_after=options["stop_after"])
    distilled = [after - before for before, after in zip(times[-3:], times[-2:], strict=False)]
    return {
        "losses": losses,
        "tokens_per_second": recipe.tokens_per_step / min(distilled) if distilled else None,
        "peak_bytes": torch.cuda.max_memory_allocated() if device.type == "cuda" else 0,
    }


class Runs:
    """Runs of one model, each in processes of its own."""

    def __init__(self, folder: Path, parent: PreTrainedConfig, recipe: Recipe, device: str) -> None:
        self.folder, self.recipe, self.device = folder, recipe, device
        self.models = folder / "models"
        with torch.device(device):
            teacher = AutoModelForCausalLM.from_config(parent, dtype=torch.float32)
        teacher.cpu().save_pretrained(self.models / "teacher")
        student = swap_attention(copy.deepcopy(teacher))
        student.save_pretrained(self.models / "student")
        self.config = student.config
        self.count = 0

    def __call__(self, gpus: int, *, run: str | None = None, replicas: int = 1, **options: Any) -> list[dict[str, Any]]:
        """What each rank saw."""
        self.count += 1
        path = self.folder / (run or f"run{self.count}")
        recipe = replace(self.recipe, precision=options.pop("precision", self.recipe.precision))
        chosen = {"compiled": False, "recompute": False, "recorded": False, "stop_after": None, **options}
        asked = json.dumps({"device": self.device, "replicas": replicas, "recipe": asdict(recipe), **chosen})
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(gpus)]
        subprocess.run(
            [*launch, __file__, "--worker", self.models, path, asked],
            check=True,
            env={"OMP_NUM_THREADS": "4", **os.environ},
        )
        return [json.loads(path.with_suffix(f".rank{rank}.json").read_text()) for rank in range(gpus)]


def check(
    gpus: int, name: str, layers: int | None, batch: int, length: int, device: str, out: Path | None
) -> dict[str, Any]:
    """Every figure, and what is wrong; what is known so far is in ``out``."""
    recipe = Recipe(
        STEPS, align_share=0.5, batch=batch, length=length, precision="float32", align_lr=1e-3, mixer_lr=1e-4
    )
    parent = preset(name).parent_config()
    parent.num_hidden_layers = layers or parent.num_hidden_layers
    report: dict[str, Any] = {
        "gpus": gpus,
        "gpu": torch.cuda.get_device_name() if device == "cuda" else device,
        "model": name,
        "wrong": [],
    }
    with tempfile.TemporaryDirectory() as folder:
        runs = Runs(Path(folder), parent, recipe, device)

        def keep() -> None:
            if out:
                write_json(out, report)

        def compare(what: str, got: list[float], wanted: list[float], tolerance: float) -> None:
            worst = max(abs(a - b) / abs(b) for a, b in zip(got, wanted, strict=True))
            report[what] = {"difference": worst, "allowed": tolerance}
            if not worst <= tolerance:
                report["wrong"].append(what)
            keep()

        for precision in ("float32", "bfloat16"):
            alone, together = runs(1, precision=precision)[0], runs(gpus, precision=precision)
            compare(f"{gpus} GPUs and one, {precision}", together[0]["losses"], alone["losses"], ROUNDING[precision])
            report[f"tokens/s, {precision}"] = {
                "one": alone["tokens_per_second"],
                "all": together[0]["tokens_per_second"],
            }
        straight = together[0]["losses"]
        if gpus >= 4:
            grouped = runs(gpus, precision="bfloat16", replicas=2)[0]
            compare("two groups", grouped["losses"], straight, ROUNDING["bfloat16"])
        options = {"precision": "bfloat16", "compiled": True, "recompute": True}
        fast = runs(gpus, **options)
        compare("compiled, layers computed again", fast[0]["losses"], straight, ROUNDING["bfloat16"])
        report["tokens/s, compiled"] = fast[0]["tokens_per_second"]
        recorded = {"precision": "bfloat16", "compiled": device == "cuda", "recorded": device == "cuda"}
        alone, copies = runs(1, **recorded)[0], runs(gpus, replicas=gpus, **recorded)
        for what, got in (("one GPU, recorded", alone), ("all hold everything, recorded", copies[0])):
            compare(what, got["losses"], straight, ROUNDING["bfloat16"])
        report["tokens/s, recorded"] = {"one": alone["tokens_per_second"], "all": copies[0]["tokens_per_second"]}
        first = runs(gpus, run="resumed", precision="bfloat16", stop_after=5)[0]["losses"]
        rest = runs(gpus, run="resumed", precision="bfloat16")[0]["losses"]
        compare("stopped and resumed", first + rest, straight, 0.0)
        predicted = lay_out(runs.config, Layout(gpus, batch=batch, length=length), parent)
        measured = max(rank["peak_bytes"] for rank in fast)
        report["peak memory"] = {
            "predicted": predicted.total,
            "measured": measured,
            "ratio": measured / predicted.total,
        }
        keep()
    return report


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", type=int, default=torch.cuda.device_count())
    parser.add_argument("--preset", default="smollm2-135m")
    parser.add_argument("--layers", type=int, help="fewer than the model has")
    parser.add_argument("--batch", type=int, default=16, help="of all GPUs")
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.worker:
        models, run, options = given.worker
        work(Path(models), Path(run), json.loads(options))
        return 0
    report = check(given.gpus, given.preset, given.layers, given.batch, given.length, given.device, given.out)
    print(json.dumps(report, indent=2))
    return len(report["wrong"])


if __name__ == "__main__":
    raise SystemExit(main())
