"""Real runs, a few steps long, for what shows runs."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import torch

from power_retention.conversion.source import open_source
from power_retention.conversion.swap import swap_attention
from power_retention.errors import RunInterrupted
from power_retention.evaluation.benchmarks import Benchmark
from power_retention.evaluation.comparison import Scores, compare
from power_retention.files import write_json
from power_retention.training.domains import TrainedOnText, read_domains
from power_retention.training.folder import RunFolder
from power_retention.training.probes import Probes
from power_retention.training.recipe import Recipe
from power_retention.training.retraining import Retraining
from power_retention.training.run import execute
from power_retention.training.text import read_documents, split_held_out, tokenize

RATES = {"align_lr": 4e-3, "mixer_lr": 2e-3, "other_lr": 1e-3}
ALIGNED = Recipe(steps=6, align_share=0.5, batch=2, length=64, **RATES)
PLAIN = Recipe(steps=8, align_share=0.0, batch=2, length=64, **RATES)
HOSTILE = "no-align <b>&lt;{{script}}"
"""A folder may have any name."""


def evaluate_as_if(run: Path) -> None:
    """The report of an evaluation by tasks, of answers drawn at random."""
    generator = np.random.default_rng(0)
    benchmark = Benchmark("cloze", "Story cloze", ("story_cloze",))
    prompts = tuple(map(str, range(200)))
    models = {
        name: {
            "cloze": Scores(
                (generator.random(200) < right).astype(float), np.full(200, 0.5), prompts, "acc", "likelihood", 0
            )
        }
        for name, right in (("teacher", 0.9), ("student", 0.8))
    }
    report = run.parent / "evaluation" / "evaluation.json"
    report.parent.mkdir()
    write_json(report, {"tasks": {row.benchmark.name: row.to_dict() for row in compare([benchmark], models)}})


def make_runs(folder: Path, stories_dir: Path, stories_text: Path) -> tuple[Path, Path]:
    """Two runs of one student, on two kinds of text: one finished, the other stopped after 5 of 8 steps."""
    source = open_source(stories_dir)
    train = split_held_out(read_documents([stories_text]))[0]
    letters = folder / "letters.txt"
    letters.write_text("\n".join(chr(97 + i % 26) * (i % 7 + 1) for i in range(400)))
    tokens = tokenize(train, source.tokenizer)
    paths = {"stories": stories_text, "letters": letters}
    domains = read_domains(paths, source.tokenizer, TrainedOnText(train), windows=2, length=128)
    for name, recipe in (("aligned", ALIGNED), (HOSTILE, PLAIN)):
        torch.manual_seed(0)
        student = swap_attention(copy.deepcopy(source.model))
        retraining = Retraining(student, copy.deepcopy(source.model), tokens, recipe)
        run = RunFolder(folder / name / "run")
        run.begin(recipe, {"model": "/models/stories", "text": [str(stories_text)]})
        probes = Probes(retraining, domains, every=2)
        try:
            execute(retraining, run, probes=probes, stop_after=5)
        except RunInterrupted:
            if recipe is ALIGNED:
                execute(retraining, run, probes=probes)
    return folder / "aligned" / "run", folder / HOSTILE / "run"
