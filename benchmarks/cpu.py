"""CPU figures: the chunk form's arithmetic, decode against context, prefill against length.

    python benchmarks/cpu.py TEACHER_DIR STUDENT_DIR [--parts operator,decode,prefill]

TEACHER_DIR is a Transformer in Hugging Face format, STUDENT_DIR its power-retention conversion.  Everything is a ratio
against a peer in the same run: the machine's own matmul rate, or the same model in transformers with SDPA.  Contexts of
the decode part are simulated (see power_retention.evaluation.decode).  Writes benchmarks/results/cpu.json and
docs/figures/cpu-*.png; run it on an otherwise idle machine.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # as the command sets it

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

import power_retention.models
from power_retention import power_retention
from power_retention.cli.env import collect
from power_retention.evaluation.decode import DecodePoint, measure_in_own_process
from power_retention.evaluation.drawing import STUDENT_COLOUR, TEACHER_COLOUR, figure_file, tidy
from power_retention.evaluation.figure import draw_decode_figure
from power_retention.files import write_json
from power_retention.machine import matmul_rate
from power_retention.ops import state_width

ROOT = Path(__file__).parents[1]
RESULTS, FIGURES = ROOT / "benchmarks" / "results", ROOT / "docs" / "figures"
DECODE_CONTEXTS = (1024, 4096, 16384, 32768, 65536, 131072)
PREFILL_LENGTHS = (2048, 4096, 8192, 16384)


def seconds(run: Callable[[], object], repeats: int) -> list[float]:
    """Times of ``repeats`` runs after one that warms up."""
    run()
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        run()
        times.append(time.perf_counter() - started)
    return times


def useful_operations(tokens: int, query_heads: int, heads: int, width: int, chunk: int) -> float:
    """Arithmetic that the chunk form cannot do without: state query, state update, causal half of the attention in a chunk."""
    state = 2 * state_width(width) * (width + 1)
    within = chunk / 2 * 2 * (2 * width + 1)
    return tokens * (query_heads * (state + within) + heads * state)


def measure_operator() -> list[dict[str, Any]]:
    """The chunk form's share of the matmul rate, measured before and after in the same process."""
    rows = []
    for query_heads, heads, width, tokens, chunk in (
        (9, 3, 64, 16384, 512),
        (9, 3, 64, 65536, 512),
        (8, 2, 128, 8192, 1024),
    ):
        q, k, v = (torch.randn(1, tokens, h, width) for h in (query_heads, heads, heads))
        log_g = -torch.rand(1, tokens, heads) * 0.01

        def run(q: Any = q, k: Any = k, v: Any = v, log_g: Any = log_g, chunk: int = chunk) -> object:
            return power_retention(q, k, v, log_g, chunk_size=chunk)

        rate_before = matmul_rate(torch.float32)
        times = seconds(run, 5 if tokens < 50_000 else 3)
        rate = statistics.mean((rate_before, matmul_rate(torch.float32)))
        median = statistics.median(times)
        achieved = useful_operations(tokens, query_heads, heads, width, chunk) / median / 1e9
        rows.append(
            {
                "query_heads": query_heads,
                "heads": heads,
                "head_width": width,
                "tokens": tokens,
                "chunk": chunk,
                "seconds": times,
                "gflops": achieved,
                "matmul_gflops": rate,
                "share": achieved / rate,
            }
        )
        print(
            f"operator {query_heads}/{heads}/{width}, T={tokens}: {median:.2f} s, {achieved / rate:.0%} of the matmul rate"
        )
    return rows


def measure_decode(teacher: Path, student: Path) -> dict[str, list[DecodePoint]]:
    measured = {}
    for name, folder in (("teacher", teacher), ("student", student)):
        measured[name] = measure_in_own_process(
            folder,
            DECODE_CONTEXTS,
            progress=lambda p, name=name: print(f"decode {name} {p.context}: {p.milliseconds:.1f} ms"),  # type: ignore[misc]
        )
    draw_decode_figure(
        measured["teacher"],
        measured["student"],
        FIGURES / "cpu-decode.png",
        "Decoding one token of SmolLM2-135M, float32, 2 cores",
    )
    return measured


@torch.inference_mode()
def measure_prefill(teacher: Path, student: Path) -> list[dict[str, Any]]:
    """One prompt through each model into a fresh cache, last logits only, alternating."""
    models = {name: _open(folder) for name, folder in (("teacher", teacher), ("student", student))}
    rows = []
    for tokens in PREFILL_LENGTHS:
        ids = torch.randint(0, models["teacher"].config.vocab_size, (1, tokens))
        times: dict[str, list[float]] = {}
        for name, model in models.items():

            def run(model: PreTrainedModel = model, ids: torch.Tensor = ids) -> object:
                return model(input_ids=ids, use_cache=True, logits_to_keep=1)

            if tokens >= 16384:
                started = time.perf_counter()
                run()
                times[name] = [time.perf_counter() - started]
            else:
                times[name] = seconds(run, 3)
        ratio = statistics.median(times["teacher"]) / statistics.median(times["student"])
        rows.append({"tokens": tokens, "seconds": times, "ratio": ratio})
        print(f"prefill {tokens}: student {ratio:.2f} times as fast")
    _draw_prefill(rows)
    return rows


def _open(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def _draw_prefill(rows: list[dict[str, Any]]) -> None:
    with figure_file(FIGURES / "cpu-prefill.png", size=(5.5, 4.2)) as (_, axis):
        for name, label, colour in (
            ("teacher", "Transformer (SDPA)", TEACHER_COLOUR),
            ("student", "power retention", STUDENT_COLOUR),
        ):
            x = [row["tokens"] for row in rows]
            axis.plot(
                x,
                [row["tokens"] / statistics.median(row["seconds"][name]) for row in rows],
                "o-",
                color=colour,
                label=label,
            )
        axis.set_xscale("log", base=2)
        axis.set_xticks(x, [f"{value // 1024}k" for value in x])
        axis.minorticks_off()
        axis.set_ylim(bottom=0)
        axis.set_xlabel("prompt, tokens")
        axis.set_ylabel("prefill, tokens a second")
        tidy(axis)
        axis.legend(frameon=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("teacher", type=Path)
    parser.add_argument("student", type=Path)
    parser.add_argument("--parts", default="operator,decode,prefill")
    arguments = parser.parse_args()
    for folder in (RESULTS, FIGURES):
        folder.mkdir(parents=True, exist_ok=True)
    target = RESULTS / "cpu.json"
    report = json.loads(target.read_text(encoding="utf-8")) if target.exists() else {}
    report["command"] = " ".join(["python", *sys.argv[:1], "TEACHER_DIR", "STUDENT_DIR"])
    report["environment"] = collect()
    if "operator" in arguments.parts:
        report["operator"] = measure_operator()
    if "decode" in arguments.parts:
        measured = measure_decode(arguments.teacher, arguments.student)
        report["decode"] = {name: [point.to_dict() for point in points] for name, points in measured.items()}
    if "prefill" in arguments.parts:
        report["prefill"] = measure_prefill(arguments.teacher, arguments.student)
    write_json(target, report)


if __name__ == "__main__":
    main()
