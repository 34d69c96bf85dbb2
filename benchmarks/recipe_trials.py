"""Recipes side by side at equal tokens, on one GPU: prints and writes the KL to the teacher on held-out text by domain.

    python benchmarks/recipe_trials.py TEACHER mixture.toml OUT.jsonl --held-out wikipedia=wikipedia.jsonl … --tokens 6000000

Every trial starts from the same teacher and reads the same sequences in the same order.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from power_retention.conversion.convert import calibration_windows, convert, hard_swap
from power_retention.conversion.source import Source, open_source
from power_retention.conversion.swap import swap_attention
from power_retention.models import PowerRetentionForCausalLM
from power_retention.training.domains import TrainedOnShards, read_domains
from power_retention.training.mixture import read_mixture
from power_retention.training.probes import Probes
from power_retention.training.recipe import Recipe
from power_retention.training.retraining import Retraining

RATES = {"mixer_lr": 1e-3, "other_lr": 3e-4}


@dataclass(frozen=True)
class Trial:
    """A start and what a recipe says besides its length."""

    start: str = "calibrated"
    recipe: dict[str, Any] = field(default_factory=lambda: {"align_share": 0.3, **RATES})


TRIALS = {
    "align 30 %, then distil": Trial(),
    "the same, two to three times the rates": Trial(recipe={"align_share": 0.3, "mixer_lr": 2e-3, "other_lr": 1e-3}),
    "the same, rates down to nothing": Trial(recipe={"align_share": 0.3, "final_share": 0.0, **RATES}),
    "the published way: hard swap, next-token loss": Trial(
        "hard swap", {"align_share": 0.0, "next_token_weight": 1.0, **RATES}
    ),
    "without aligning": Trial(recipe={"align_share": 0.0, **RATES}),
    "with a key bias": Trial("key bias"),
    "without gate biases": Trial("no gate bias"),
}


def without_gate_bias(teacher: PreTrainedModel, calibrated: PowerRetentionForCausalLM) -> PowerRetentionForCausalLM:
    """A swap with bare gates that has of the calibration what it can hold."""
    student = swap_attention(copy.deepcopy(teacher), gate_bias=False)
    student.load_state_dict(calibrated.state_dict(), strict=False)
    return student


def starts(source: Source, windows: Tensor) -> dict[str, Callable[[], PowerRetentionForCausalLM]]:
    """What makes each start anew."""
    calibrated = convert(source, windows).student
    return {
        "calibrated": lambda: copy.deepcopy(calibrated),
        "hard swap": lambda: hard_swap(source.model),
        "key bias": lambda: convert(source, windows, key_bias=True).student,
        "no gate bias": lambda: without_gate_bias(source.model, calibrated),
    }


def run(retraining: Retraining, probes: Probes) -> list[dict[str, Any]]:
    """The probes at the end of aligning, half-way and at the end."""
    recipe, found, started = retraining.recipe, [], time.time()
    for step in range(recipe.steps):
        retraining.step(step)
        if step + 1 in (recipe.align_steps, recipe.steps // 2, recipe.steps):
            domains = {
                k: {"kl": d["kl"], "loss": d["loss"], "teacher_loss": d["teacher_loss"]}
                for k, d in probes.measure()["domains"].items()
            }
            found.append(
                {
                    "tokens": (step + 1) * recipe.tokens_per_step,
                    "seconds": round(time.time() - started),
                    "domains": domains,
                }
            )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("teacher")
    parser.add_argument("mixture", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--held-out", nargs="+", required=True, metavar="NAME=PATH")
    parser.add_argument("--tokens", type=int, default=6_000_000)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--only", nargs="+", choices=TRIALS, default=list(TRIALS))
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    on_gpu, precision = device.type == "cuda", "bfloat16" if device.type == "cuda" else "float32"
    source, mixture = open_source(arguments.teacher), read_mixture(arguments.mixture)
    paths = {name: Path(path) for name, _, path in (pair.partition("=") for pair in arguments.held_out)}
    domains = read_domains(
        paths, source.tokenizer, TrainedOnShards(mixture), windows=16, length=min(512, arguments.length)
    )
    length = min(512, arguments.length)
    ids = mixture.batch(0, batch=24, length=length, seed=1).ids.flatten()
    makers = starts(source, calibration_windows(ids, count=24, length=length))
    for name in arguments.only:
        trial = TRIALS[name]
        recipe = Recipe(
            arguments.tokens // (arguments.batch * arguments.length),
            batch=arguments.batch,
            length=arguments.length,
            precision=precision,  # type: ignore[arg-type]
            **trial.recipe,
        )
        retraining = Retraining(
            makers[trial.start](),
            copy.deepcopy(source.model),
            mixture,
            recipe,
            device=device,
            compiled=on_gpu,
            recorded=on_gpu,
        )
        found = run(retraining, Probes(retraining, domains))
        print(name, {k: round(d["kl"], 3) for k, d in found[-1]["domains"].items()}, flush=True)
        with arguments.out.open("a", encoding="utf-8") as out:
            out.write(json.dumps({"trial": name, "recipe": recipe.to_dict(), "probes": found}) + "\n")


if __name__ == "__main__":
    main()
