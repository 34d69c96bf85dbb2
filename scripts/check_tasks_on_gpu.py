"""Benchmarks on a GPU: the CPU's scores and likelihoods, whatever the batch, and answers a second beside the parent's.

``PYTHONPATH=src python scripts/check_tasks_on_gpu.py --out tasks-gpu.json`` takes about two minutes, prints a line a check
and ends with status 1 if one fails.  It needs ``power-retention[tasks]``; nothing is downloaded.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.instance import Instance
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from power_retention.conversion.convert import convert
from power_retention.conversion.source import open_source
from power_retention.conversion.swap import swap_attention
from power_retention.evaluation.harness import Reader, Suite

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from gpu_checks import SMOLLM2, Checked, place, run_checks

from real_models import STORIES_TEXT, write_stories_model
from story_tasks import write_story_tasks
from tiny_models import randomise


def check_scores(stories: Path, tasks: Path) -> Checked:
    """A real model's scores: float32 as on the CPU to an answer in forty; bfloat16 to four."""
    student = convert(open_source(stories), None).student.eval()
    tokenizer = AutoTokenizer.from_pretrained(stories)
    suite = Suite(["story_cloze", "story_word"], task_folder=tasks)
    right = {}
    for name, model, batch in (
        ("cpu", student, 8),
        ("float32", place(student, torch.float32), 8),
        ("float32, one by one", place(student, torch.float32), 1),
        ("bfloat16", place(student, torch.bfloat16), 8),
    ):
        right[name] = [int(scores.values.sum()) for scores in suite.run(model, tokenizer, batch_size=batch).values()]
    allowed = {"float32": 1, "float32, one by one": 1, "bfloat16": 4}
    same = all(
        abs(got - wanted) <= most
        for name, most in allowed.items()
        for got, wanted in zip(right[name], right["cpu"], strict=True)
    )
    return same, right


def check_likelihoods(stories: Path) -> Checked:
    """A random model of SmolLM2-135M's shape, ragged texts of up to 700 tokens: log-likelihoods, batches of 1 and of 8."""
    tokenizer = AutoTokenizer.from_pretrained(stories)
    torch.manual_seed(0)
    student = randomise(swap_attention(LlamaForCausalLM(LlamaConfig(vocab_size=512, **SMOLLM2)).eval()))
    story = " ".join(json.loads(line)["text"] for line in STORIES_TEXT.read_text().splitlines()[:12])
    texts = [(story[: 31 * 3**i], story[31 * 3**i :][:120]) for i in range(4)]
    requests = [Instance("loglikelihood", {}, text, i) for i, text in enumerate(texts)]

    def ask(model: Any, batch: int) -> torch.Tensor:
        return torch.tensor([value for value, _ in Reader(model, tokenizer, batch).loglikelihood(requests)])

    wanted = ask(student, 1)
    found = {
        "float32, batch 1": ask(place(student, torch.float32), 1),
        "float32, batch 8": ask(place(student, torch.float32), 8),
        "bfloat16, batch 1": ask(place(student, torch.bfloat16), 1),
        "bfloat16, batch 8": ask(place(student, torch.bfloat16), 8),
    }
    errors = {name: float(((got - wanted) / wanted).abs().max()) for name, got in found.items()}
    return all(error < (1e-4 if "float32" in name else 2e-2) for name, error in errors.items()), errors


def measure_generation(stories: Path) -> Checked:
    """Answers a second of 128 tokens to prompts of some 1,500, 64 at once, beside the Transformer.  Not judged."""
    tokenizer = AutoTokenizer.from_pretrained(stories)
    torch.manual_seed(0)
    teacher = LlamaForCausalLM(LlamaConfig(vocab_size=512, eos_token_id=None, **SMOLLM2)).eval()
    story = " ".join(json.loads(line)["text"] for line in STORIES_TEXT.read_text().splitlines())
    answer = {"until": ["\n\n\n"], "max_gen_toks": 128, "min_new_tokens": 128, "do_sample": False}
    requests = [Instance("generate_until", {}, (story[200 * i :][:4000], answer), i) for i in range(128)]
    speeds = {}
    for name, model in (
        ("teacher", place(teacher, torch.bfloat16)),
        ("student", place(swap_attention(teacher), torch.bfloat16)),
    ):
        reader = Reader(model, tokenizer, 64)
        reader.generate_until(requests[:64])  # kernels are compiled
        torch.cuda.synchronize()
        started = time.perf_counter()
        reader.generate_until(requests)
        speeds[f"{name}, answers/s"] = round(len(requests) / (time.perf_counter() - started), 2)
    return True, speeds


def main() -> int:
    """Run every check; 0 if all are right."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="JSON file of the results")
    out: Path | None = parser.parse_args().out
    torch.backends.cuda.matmul.allow_tf32 = False
    with tempfile.TemporaryDirectory() as folder:
        stories = write_stories_model(Path(folder) / "stories260k")
        (Path(folder) / "tasks").mkdir()
        tasks = write_story_tasks(Path(folder) / "tasks", STORIES_TEXT)
        checks: dict[str, Callable[[], Checked]] = {
            "scores": lambda: check_scores(stories, tasks),
            "likelihoods": lambda: check_likelihoods(stories),
            "generation": lambda: measure_generation(stories),
        }
        return run_checks(checks, out)


if __name__ == "__main__":
    sys.exit(main())
