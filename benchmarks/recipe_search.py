"""How to spend six minutes of a laptop: recipes of equal CPU cost, run side by side on one GPU.

    python benchmarks/recipe_search.py TEACHER_DIR CORPUS.jsonl OUT.jsonl [--workers 12]

A recipe's steps follow from a cost model of a 2-core CPU: half a second a step for the optimiser, and 1.1 ms (align) or
3.0 ms (distil) a token.  Each line of OUT.jsonl is one recipe with the held-out loss and KL before, after aligning, and at
the end, on 64 windows of 512 tokens.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp
from transformers import AutoModelForCausalLM

from power_retention.conversion.calibrate import calibrate_mixers
from power_retention.conversion.convert import calibration_windows
from power_retention.conversion.source import open_source
from power_retention.conversion.swap import swap_attention
from power_retention.evaluation.loss import HeldOut
from power_retention.training.recipe import Recipe
from power_retention.training.retraining import Retraining
from power_retention.training.text import Tokens, read_documents, split_held_out, tokenize

STEP_SECONDS, ALIGN_SECONDS, DISTIL_SECONDS = 0.5, 0.0011, 0.003
TOKENS = 1_500_000
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@dataclass(frozen=True)
class Trial:
    """One recipe; ``align_time`` is the share of the seconds spent aligning."""

    align_time: float = 0.7
    align_lr: float = 8e-3
    mixer_lr: float = 5e-4
    other_lr: float = 1e-4
    batch: int = 4
    length: int = 256
    next_token_weight: float = 0.0
    seconds: float = 390.0

    def recipe(self) -> Recipe:
        tokens = self.batch * self.length
        align = int(self.seconds * self.align_time / (STEP_SECONDS + tokens * ALIGN_SECONDS))
        distil = int(self.seconds * (1 - self.align_time) / (STEP_SECONDS + tokens * DISTIL_SECONDS))
        return Recipe(
            align + distil,
            align_share=align / (align + distil),
            batch=self.batch,
            length=self.length,
            align_lr=self.align_lr,
            mixer_lr=self.mixer_lr,
            other_lr=self.other_lr,
            next_token_weight=self.next_token_weight,
            precision="bfloat16",
        )


def trials() -> list[Trial]:
    base = Trial()
    changes: list[dict[str, Any]] = [
        {},
        {"align_lr": 4e-3},
        {"align_lr": 2e-3},
        {"align_time": 0.0, "mixer_lr": 1e-3, "other_lr": 3e-4},
        {"align_time": 0.25, "align_lr": 1e-3, "mixer_lr": 1e-3, "other_lr": 3e-4},
        {"align_time": 0.25, "align_lr": 4e-3, "mixer_lr": 4e-3, "other_lr": 6e-4},
        {"align_time": 0.5, "align_lr": 4e-3},
        {"align_time": 0.85, "align_lr": 4e-3},
        {"align_lr": 4e-3, "mixer_lr": 1e-3, "other_lr": 2e-4},
        {"align_lr": 4e-3, "mixer_lr": 2e-4, "other_lr": 3e-5},
        {"align_lr": 4e-3, "batch": 8, "length": 128},
        {"align_lr": 4e-3, "align_time": 0.6, "seconds": 780.0},
    ]
    return [replace(base, **change) for change in changes]


def run(trial: Trial, teacher_folder: str, ids: torch.Tensor, held_out: torch.Tensor) -> dict[str, Any]:
    teacher, student = (
        AutoModelForCausalLM.from_pretrained(teacher_folder, dtype=torch.float32).to(DEVICE).eval() for _ in range(2)
    )
    swap_attention(student)
    calibrate_mixers(student, teacher, calibration_windows(ids, count=16, length=512).to(DEVICE))
    measured = HeldOut(teacher, held_out)
    recipe = trial.recipe()
    result: dict[str, Any] = {**vars(trial), "steps": recipe.steps, "start": measured.loss(student).to_dict()}
    tokens = Tokens(ids.int().numpy(), torch.tensor([0, len(ids)]).numpy())
    retraining = Retraining(student, copy.deepcopy(teacher), tokens, recipe)
    for step in range(recipe.steps):
        retraining.step(step)
        if step + 1 == recipe.align_steps:
            result["aligned"] = measured.loss(student).to_dict()
    result["end"] = measured.loss(student).to_dict()
    return result


def work(queue: Any, results: Any, teacher_folder: str, ids: torch.Tensor, held_out: torch.Tensor) -> None:
    torch.set_num_threads(1)
    while (trial := queue.get()) is not None:
        results.put(run(trial, teacher_folder, ids, held_out))
    results.put(None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("teacher")
    parser.add_argument("text", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--workers", type=int, default=12)
    arguments = parser.parse_args()
    tokenizer = open_source(arguments.teacher).tokenizer
    training, kept = split_held_out(read_documents([arguments.text]))
    ids = torch.from_numpy(tokenize(training, tokenizer, max_tokens=TOKENS).ids).long()
    held_out = calibration_windows(torch.from_numpy(tokenize(kept, tokenizer).ids).long(), count=64, length=512)
    context = mp.get_context("spawn")
    queue, results = context.Queue(), context.Queue()
    for job in (*trials(), *[None] * arguments.workers):
        queue.put(job)
    for _ in range(arguments.workers):
        context.Process(target=work, args=(queue, results, arguments.teacher, ids, held_out), daemon=True).start()
    started, finished = time.time(), 0
    with arguments.out.open("w", encoding="utf-8") as out:
        while finished < arguments.workers:
            if (result := results.get()) is None:
                finished += 1
                continue
            out.write(json.dumps(result) + "\n")
            print(f"{time.time() - started:.0f} s", result["end"], vars(Trial(**{k: result[k] for k in vars(Trial())})))


if __name__ == "__main__":
    main()
