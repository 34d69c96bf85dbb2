"""Probes on a GPU: a run that is watched ends as one that is not, bit for bit; what they say; what they cost.

``PYTHONPATH=src python scripts/check_probes_on_gpu.py --out probes-gpu.json`` takes some minutes, prints a line a check and
ends with status 1 if one fails.  Random weights of SmolLM2-135M's shape, and text of stories260K; nothing is downloaded.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from power_retention.conversion.swap import swap_attention
from power_retention.files import write_json
from power_retention.training.domains import Domain, TrainedOnText, read_domains
from power_retention.training.folder import RunFolder, read_records
from power_retention.training.probes import Probes
from power_retention.training.recipe import Recipe
from power_retention.training.retraining import Retraining
from power_retention.training.run import execute
from power_retention.training.text import Tokens, read_documents, split_held_out, tokenize

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from gpu_checks import SMOLLM2, Checked

from real_models import STORIES_TEXT, write_stories_model
from tiny_models import randomise

WAYS = {"plain": {}, "compiled": {"compiled": True}, "recorded": {"compiled": True, "recorded": True}}


class Bench:
    """One pair of models and one text, from which every check starts anew."""

    def __init__(self, folder: Path) -> None:
        write_stories_model(folder)
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        documents = split_held_out(read_documents([STORIES_TEXT]))[0]
        self.tokens: Tokens = tokenize(documents, self.tokenizer)
        torch.manual_seed(0)
        self.teacher = randomise(LlamaForCausalLM(LlamaConfig(vocab_size=49152, **SMOLLM2)))
        self.student = swap_attention(copy.deepcopy(self.teacher))
        python = folder / "python.txt"
        python.write_text(Path(__file__).read_text() * 4)
        paths = {"stories": STORIES_TEXT, "python": python}
        self.domains: list[Domain] = read_domains(paths, self.tokenizer, TrainedOnText(documents), length=512)

    def new(self, recipe: Recipe, device: str = "cuda", **options: bool) -> Retraining:
        models = copy.deepcopy(self.student), copy.deepcopy(self.teacher)
        return Retraining(*models, self.tokens, recipe, device=torch.device(device), **options)

    def run(self, recipe: Recipe, every: int | None, **options: bool) -> tuple[dict[str, Tensor], RunFolder]:
        torch._dynamo.reset()
        retraining, folder = self.new(recipe, **options), RunFolder(Path(tempfile.mkdtemp()) / "run")
        folder.begin(recipe, {})
        probes = Probes(retraining, self.domains, every=every) if every else None
        execute(retraining, folder, probes=probes)
        return {name: value.clone() for name, value in retraining.student.state_dict().items()}, folder


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    """Bit for bit."""
    return all(value.equal(other[name]) for name, value in one.items())


def check_nothing_changes(bench: Bench, way: str) -> Checked:
    """Two runs without probes agree, and so does one with a probe after every step."""
    recipe = Recipe(steps=8, align_share=0.5, batch=8, length=512, precision="bfloat16")
    alone, again = (bench.run(recipe, None, **WAYS[way])[0] for _ in range(2))
    watched, folder = bench.run(recipe, 1, **WAYS[way])
    probes = read_records(folder.held_out)
    details = {"repeatable": same(alone, again), "watched is the same": same(alone, watched), "probes": len(probes)}
    return same(alone, again) and same(alone, watched) and len(probes) == 9, details


def check_what_they_say(bench: Bench) -> Checked:
    """In float32 what the CPU says to four digits, in bfloat16 to a tenth (random weights magnify its rounding)."""
    measured = {
        name: Probes(bench.new(Recipe(steps=1, precision=precision), device), bench.domains).measure()  # type: ignore[arg-type]
        for name, precision, device in (
            ("cpu", "float32", "cpu"),
            ("float32", "float32", "cuda"),
            ("bfloat16", "bfloat16", "cuda"),
        )
    }
    wanted, worst = measured.pop("cpu"), {}
    for name, got in measured.items():
        off = [
            abs(got["domains"][domain][measure] / wanted["domains"][domain][measure] - 1)
            for domain in wanted["domains"]
            for measure in ("loss", "teacher_loss", "kl")
        ]
        norms = [
            abs(mine["state_norm"][1] / theirs["state_norm"][1] - 1)
            for mine, theirs in zip(got["layers"], wanted["layers"], strict=True)
        ]
        worst[name] = {"losses": max(off), "state norms": max(norms)}
    fine = worst["float32"]["losses"] < 1e-4 and worst["bfloat16"]["losses"] < 0.1
    return fine, worst


def check_cost(bench: Bench) -> Checked:
    """A probe of two domains (8 windows of 512 tokens each) takes less than two seconds after the first."""
    probes = Probes(bench.new(Recipe(steps=1, precision="bfloat16")), bench.domains)
    seconds = []
    for _ in range(4):
        torch.cuda.synchronize()
        started = time.perf_counter()
        probes.measure()
        seconds.append(time.perf_counter() - started)
    return min(seconds[1:]) < 2, {"seconds": seconds, "gigabytes": torch.cuda.max_memory_allocated() / 1e9}


def main() -> int:
    """Run every check; the number of those that failed decides the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("probes-gpu.json"))
    out = parser.parse_args().out
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder) / "stories")
        checks: dict[str, Callable[[], Checked]] = {
            **{f"nothing changes, {way}": lambda way=way: check_nothing_changes(bench, way) for way in WAYS},
            "what they say": lambda: check_what_they_say(bench),
            "cost": lambda: check_cost(bench),
        }
        report: dict[str, Any] = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__}
        for name, check in checks.items():
            try:
                passed, details = check()
            except Exception as error:  # the other checks are worth their time all the same
                passed, details = False, {"error": f"{type(error).__name__}: {error}"}
            report[name] = {"passed": passed, **details}
            print(f"{'ok  ' if passed else 'FAIL'} {name}  {json.dumps(details)}", flush=True)
    write_json(out, report)
    return int(not all(entry["passed"] for entry in report.values() if isinstance(entry, dict)))


if __name__ == "__main__":
    sys.exit(main())
