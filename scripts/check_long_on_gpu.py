"""Long contexts on a GPU: the CPU's answers and losses, constant memory to a million tokens, and how long a grid takes.

``PYTHONPATH=src python scripts/check_long_on_gpu.py --out long-gpu.json`` takes about four minutes, prints a line a check and
ends with status 1 if one fails.  Nothing is downloaded.
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
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from power_retention.conversion.convert import convert
from power_retention.conversion.source import open_source
from power_retention.conversion.swap import swap_attention
from power_retention.evaluation.long.asking import Effort, ask
from power_retention.evaluation.long.context import Encoder, Haystack
from power_retention.evaluation.long.positions import losses_by_position
from power_retention.evaluation.long.readers import AttentionReader, Reader, StateReader, WindowReader, matched_window
from power_retention.evaluation.long.recall import Contender, RecallLength, RecallSettings, measure
from power_retention.evaluation.long.suite import Grid, write_contexts

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from gpu_checks import SMOLLM2, Checked, place, run_checks

from real_models import STORIES_TEXT, write_stories_model
from tiny_models import randomise


def readers(teacher: Any, student: Any) -> dict[str, Reader]:
    """A reader of each kind; the window is short, so that much is dropped."""
    return {"state": StateReader(student), "attention": AttentionReader(teacher), "window": WindowReader(teacher, 160)}


def check_answers(stories: Path) -> Checked:
    """Likelihoods and losses of a real model: float32 as on the CPU to a thousandth, bfloat16 to a third, nats."""
    source = open_source(stories)
    student = convert(source, None).student.eval()
    for mixer in student.mixers:
        torch.nn.init.constant_(mixer.g_proj.bias, 5.0)
    encoder = Encoder(AutoTokenizer.from_pretrained(stories))
    texts = [json.loads(line)["text"] for line in STORIES_TEXT.read_text().splitlines()]
    grid = Grid(lengths=(480, 900), depths=2, seeds=2, tasks=("needle", "variable tracking", "facts"))
    contexts, _ = write_contexts(grid, Haystack(texts, encoder, tokens=20_000), None)
    stream = torch.tensor([token for ids in encoder.many(texts[:40]) for token in ids])[:4096].view(2, 2048)
    small = Effort(tokens=512, memory_bytes=1 << 28)
    wanted = {
        name: _measured(x, contexts, encoder, stream, small) for name, x in readers(source.model, student).items()
    }
    errors: dict[str, float] = {}
    for dtype in (torch.float32, torch.bfloat16):
        for name, reader in readers(place(source.model, dtype), place(student, dtype)).items():
            found = _measured(reader, contexts, encoder, stream, small)
            errors[f"{name}, {str(dtype)[6:]}"] = float((found - wanted[name]).abs().max())
    return all(error < (0.3 if "bfloat16" in name else 1e-3) for name, error in errors.items()), errors


def _measured(reader: Reader, contexts: Any, encoder: Encoder, stream: torch.Tensor, effort: Effort) -> torch.Tensor:
    answers = ask(reader, contexts, encoder, effort)
    answers.sort(key=lambda x: (x.context.task, x.context.length, x.context.seed, x.question.text))
    likelihoods = [value for answer in answers for value in answer.likelihoods]
    return torch.tensor(likelihoods + [x.loss for x in losses_by_position(reader, stream, effort)])


def check_memory() -> Checked:
    """A random model of SmolLM2-135M's shape, a million tokens: peak memory of the last eighth is that of the first."""
    torch.manual_seed(0)
    model = place(
        randomise(swap_attention(LlamaForCausalLM(LlamaConfig(vocab_size=49152, **SMOLLM2)).eval())), torch.bfloat16
    )
    reader, figures = StateReader(model), dict[str, Any]()
    for tokens in (1 << 17, 1 << 20):
        stream = torch.randint(49152, (1, tokens))
        torch.cuda.reset_peak_memory_stats()
        started = time.perf_counter()
        bins = losses_by_position(reader, stream, Effort.usual(reader.device))
        torch.cuda.synchronize()
        figures[f"{tokens}, tokens/s"] = round(tokens / (time.perf_counter() - started))
        figures[f"{tokens}, GB"] = round(torch.cuda.max_memory_allocated() / 1e9, 2)
        assert bins[-1].stop == tokens
    return figures["1048576, GB"] < 1.05 * figures["131072, GB"], figures


def measure_reading() -> Checked:
    """Tokens a second of each way of keeping, sixteen rows of 65,536 tokens (eight of 8,192 of attention).  Not judged."""
    torch.manual_seed(0)
    teacher = LlamaForCausalLM(LlamaConfig(vocab_size=49152, **SMOLLM2)).eval()
    student = randomise(swap_attention(copy.deepcopy(teacher)))
    window = matched_window(student, teacher)
    on_gpu = place(teacher, torch.bfloat16)
    speeds: dict[str, Any] = {"window": window}
    for name, reader, rows, tokens in (
        ("state", StateReader(place(student, torch.bfloat16)), 16, 1 << 16),
        ("window", WindowReader(on_gpu, window), 16, 1 << 16),
        ("attention", AttentionReader(on_gpu), 8, 1 << 13),
    ):
        ids = torch.randint(49152, (rows, tokens), device="cuda")
        segment = reader.segment(rows, 1 << 16) or tokens
        with torch.inference_mode():
            memory = reader.begin(rows)
            for part in ids[:, : 2 * segment].split(segment, dim=1):  # kernels are compiled
                reader.read(memory, part)
            memory = reader.begin(rows)
            torch.cuda.synchronize()
            started = time.perf_counter()
            for part in ids.split(segment, dim=1):
                reader.read(memory, part)
            torch.cuda.synchronize()
        speeds[f"{name}, tokens/s"] = round(ids.numel() / (time.perf_counter() - started))
    return True, speeds


def check_recall() -> Checked:
    """A state recalls 32 pairs that a window of its size has lost most of."""
    settings = RecallSettings(1024, 128, 2, 1, (RecallLength(32, 256),), steps=1500, tokens=16384)
    state = Contender("state", 16, power=2)
    found = {
        x.name: measure(x, settings, seed=0, device=torch.device("cuda"))[0]["accuracy"]
        for x in (state, state.matched_window())
    }
    first, second = found.values()
    return first > second + 0.2, found


def main() -> int:
    """Run every check; 0 if all are right."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="JSON file of the results")
    out: Path | None = parser.parse_args().out
    torch.backends.cuda.matmul.allow_tf32 = False
    with tempfile.TemporaryDirectory() as folder:
        stories = write_stories_model(Path(folder) / "stories260k")
        checks: dict[str, Callable[[], Checked]] = {
            "answers": lambda: check_answers(stories),
            "memory": check_memory,
            "reading": measure_reading,
            "recall": check_recall,
        }
        return run_checks(checks, out)


if __name__ == "__main__":
    sys.exit(main())
