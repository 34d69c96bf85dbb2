"""Everything the kernels must hold on a GPU, in one run: writes a JSON and a Markdown report.

    PYTHONPATH=src python tests/gpu/check.py --minutes 4 --out benchmarks/results/gpu-check

The most important comes first; what the time does not suffice for is reported as not run.  Every task runs in a process of
its own pool, so one that crashes costs one line.  The exit status counts what is wrong.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "ops"))

import torch
import triton_cases
from grid import grid, tolerance
from torch import Tensor

from power_retention.evaluation.exact import exact_attention, relative_error
from power_retention.files import write_json
from power_retention.ops import MemoryExhausted, PowerState, power_retention, power_retention_step
from power_retention.ops.backends import Call, TorchBackend
from power_retention.ops.triton.samples import poisoned_memory
from power_retention.workers import Failed, in_processes

HERE = Path(__file__).parent
FLAGSHIPS = {"12/12 heads of 64": (12, 12, 64), "40/8 heads of 128": (40, 8, 128)}
SANITIZED = ("states, grouped heads", "attention, p = 6, packed", "one token")
ON_HOPPER = ("wide heads in bfloat16",)
"""Not for racecheck: it reports how a kernel hands its arguments to its specialised warps, whatever the kernel does."""
REPEATS = 20
DEVICE = "cuda"


@dataclass(frozen=True)
class Task:
    """One check: a section, and what is checked in it; not begun after ``deadline`` (seconds since the epoch)."""

    section: str
    name: str
    deadline: float


@dataclass(frozen=True)
class Outcome:
    """What came of a task: right, wrong or not run; figures and words."""

    verdict: str
    detail: str
    figures: dict[str, Any]
    seconds: float = 0.0


def perform(task: Task) -> Outcome:
    """Run one task in this process."""
    started = time.time()
    if started > task.deadline:
        return Outcome("not run", "out of time", {})
    outcome = SECTIONS[task.section](task.name)
    gc.collect()
    torch.cuda.empty_cache()  # what a process keeps for its next task the others lack
    return Outcome(outcome.verdict, outcome.detail, outcome.figures, time.time() - started)


def judge(wrong: str, figures: dict[str, Any], detail: str = "") -> Outcome:
    return Outcome("wrong" if wrong else "right", wrong or detail, figures)


# ── the checks ───────────────────────────────────────────────────────────────────────────────────────────────────────


def check_grid(name: str, device: str = DEVICE) -> Outcome:
    """Outputs and all gradients of one kind of call against float64, memory poisoned with NaN."""
    case = grid(small=device == "cpu")[name]
    with poisoned_memory():
        found = triton_cases.errors(case, device, device)
    wrong = [f"{what}: relative error {x:.1e}" for what, x in found.items() if not x <= tolerance(case, what)]
    worst = max(found, key=lambda what: found[what])
    return judge("; ".join(wrong), found, f"largest error {found[worst]:.1e}, of {worst}")


def draw(tokens: int, query_heads: int, heads: int, width: int, gate: float = 6.0) -> list[Tensor]:
    """bfloat16 q, k, v and float32 log_g on the GPU; a larger ``gate`` forgets more slowly."""
    generator = torch.Generator(DEVICE).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(1, tokens, *shape, device=DEVICE, dtype=torch.bfloat16, generator=generator)

    log_g = torch.nn.functional.logsigmoid(normal(heads).float() + gate)
    return [normal(query_heads, width), normal(heads, width), normal(heads, width), log_g]


def check_repeats(name: str) -> Outcome:
    """Forward, backward and decoding of the same inputs, again and again, bit for bit."""
    query_heads, heads, width = FLAGSHIPS[name]
    inputs = [x.requires_grad_() for x in draw(3000, query_heads, heads, width)]
    first: list[Tensor] = []
    for repeat in range(REPEATS):
        results = everything(inputs)
        first = first or results
        different = [i for i, (a, b) in enumerate(zip(first, results, strict=True)) if not torch.equal(a, b)]
        if different:
            return judge(f"repeat {repeat} differs in results {different}", {})
    return judge("", {"repeats": REPEATS, "results": len(first)}, f"{REPEATS} repeats are bitwise equal")


def everything(inputs: list[Tensor]) -> list[Tensor]:
    """y, the final state, all gradients, and a decoded token with the state it leaves."""
    y, state = power_retention(*inputs, chunk_size=1024, return_state=True)
    grads = torch.autograd.grad(y.float().square().sum() + state.memory.square().mean(), inputs)
    kept = PowerState(state.memory.detach().clone(), state.normalizer.detach().clone(), state.p, state.head_width)
    token = [x[:, -1].detach() for x in inputs]
    decoded, kept = power_retention_step(*token, kept, inplace=True)
    return [y.detach(), state.memory.detach(), state.normalizer.detach(), *grads, decoded, kept.memory, kept.normalizer]


def check_precision(name: str) -> Outcome:
    """Errors of outputs, states and gradients beside those of bfloat16 attention on the same data."""
    width, tokens = (int(part) for part in name.replace(" tokens", "").split(" wide, "))
    query_heads, heads = (2, 1) if width < 128 else (3, 1)
    inputs = [x.requires_grad_() for x in draw(tokens, query_heads, heads, width, gate=9.0)]
    rows = torch.arange(tokens, device=DEVICE)
    y, state = power_retention(*inputs, return_state=True)
    dy = torch.randn_like(y)
    grads = torch.autograd.grad(y, inputs, dy)
    found = dict(zip(("y", "dq", "dk", "dv", "dlog_g"), (y.detach(), *grads), strict=True))
    exact = exact_attention(*(x.detach() for x in inputs), rows, dy)
    ours = {what: relative_error(x, exact[what]) for what, x in found.items()}
    ours |= state_errors(inputs, state)
    theirs = attention_errors(inputs[:3], rows, dy)
    beside = {what: theirs.get(what, theirs["y"]) for what in ours}
    wrong = [
        f"{what}: {error:.2e}, attention has {beside[what]:.2e}"
        for what, error in ours.items()
        if not error <= beside[what]
    ]
    detail = ", ".join(f"{what} {error / beside[what]:.2f}" for what, error in ours.items())
    return judge("; ".join(wrong), {"ours": ours, "attention": theirs}, f"error over attention's: {detail}")


def state_errors(inputs: list[Tensor], state: PowerState) -> dict[str, float]:
    q, k, v, log_g = (x.detach().double() for x in inputs)
    call = Call(q[:, :, : k.shape[2]], k, v, log_g, None, None, None, 2, 1024, True)
    _, memory, normalizer = TorchBackend().forward(call)
    return {
        "memory": relative_error(state.memory.detach(), memory),
        "normalizer": relative_error(state.normalizer.detach(), normalizer),
    }


def attention_errors(inputs: list[Tensor], rows: Tensor, dy: Tensor) -> dict[str, float]:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    q, k, v = inputs
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        y = torch.nn.functional.scaled_dot_product_attention(
            *(x.transpose(1, 2) for x in inputs), is_causal=True, enable_gqa=True
        ).transpose(1, 2)
        found = {"y": y.detach(), **dict(zip(("dq", "dk", "dv"), torch.autograd.grad(y, inputs, dy), strict=True))}
    exact = exact_attention(q.detach(), k.detach(), v.detach(), None, rows, dy, p=None)
    return {what: relative_error(x, exact[what]) for what, x in found.items()}


def check_far_offsets(name: str) -> Outcome:
    """A call whose queries have more than 2³¹ elements, checked at some rows and through their gradients."""
    query_heads, heads, width = FLAGSHIPS["40/8 heads of 128"]
    tokens = (1 << 31) // (query_heads * width) // 1024 * 1024 + 2048
    inputs = [x.requires_grad_() for x in draw(tokens, query_heads, heads, width, gate=9.0)]
    rows = torch.cat((torch.arange(3, tokens - 67, tokens // 61), torch.arange(tokens - 67, tokens))).to(DEVICE)
    y = power_retention(*inputs)
    dy = torch.zeros_like(y)
    dy[:, rows] = torch.randn(1, len(rows), query_heads, width, device=DEVICE).to(dy.dtype)
    found = dict(zip(("y", "dq", "dk", "dv", "dlog_g"), (y.detach(), *torch.autograd.grad(y, inputs, dy)), strict=True))
    groups, errors = query_heads // heads, {}
    for head in (0, heads - 1):
        own, shared = slice(head * groups, (head + 1) * groups), slice(head, head + 1)
        parts = [x.detach()[:, :, own if x.shape[2] == query_heads else shared] for x in inputs]
        exact = exact_attention(*parts, rows, dy[:, rows, own])
        for what, got in found.items():
            mine = got[:, :, own if got.shape[2] == query_heads else shared]
            mine = mine[:, rows] if what == "y" else mine
            errors[f"{what}, key head {head}"] = relative_error(mine, exact[what])
    wrong = [f"{what}: {x:.1e}" for what, x in errors.items() if not x <= triton_cases.TOLERANCES[torch.bfloat16]]
    return judge("; ".join(wrong), errors, f"{tokens:,} tokens, {inputs[0].numel():,} query elements")


def check_compile(name: str) -> Outcome:
    """One graph with forward and backward, equal to eager, for two lengths."""
    query_heads, heads, width = FLAGSHIPS["12/12 heads of 64"]
    compiled = torch.compile(lambda *x: power_retention(*x), fullgraph=True)
    errors = {}
    for tokens in (777, 30000):
        inputs = [x.requires_grad_() for x in draw(tokens, query_heads, heads, width)]
        eager = power_retention(*inputs)
        dy = torch.randn_like(eager)
        wanted = [eager, *torch.autograd.grad(eager, inputs, dy)]
        y = compiled(*inputs)
        got = [y, *torch.autograd.grad(y, inputs, dy)]
        errors[f"{tokens} tokens"] = max(relative_error(a, b) for a, b in zip(got, wanted, strict=True))
    return judge("" if not max(errors.values()) else f"differs from eager: {errors}", errors, "equal to eager")


def check_deterministic(name: str) -> Outcome:
    """The deterministic mode refuses nothing and changes nothing: there is nothing to switch off."""
    inputs = [x.requires_grad_() for x in draw(3000, *FLAGSHIPS["12/12 heads of 64"])]
    usual = everything(inputs)
    torch.use_deterministic_algorithms(True)
    strict = everything(inputs)
    same = all(torch.equal(a, b) for a, b in zip(usual, strict, strict=True))
    return judge("" if same else "another result", {"results": len(usual)}, "same bits, no refusal")


def check_memory(name: str) -> Outcome:
    """An out-of-memory names the sizes, and still is PyTorch's own kind of error."""
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(3e9 / total)
    inputs = draw(65536, *FLAGSHIPS["40/8 heads of 128"])
    try:
        power_retention(*inputs, chunk_size=128)
    except torch.cuda.OutOfMemoryError as error:
        said = str(error)
        wrong = "" if isinstance(error, MemoryExhausted) and "states at chunk borders" in said else f"it says: {said}"
        return judge(wrong, {"message": said}, said)
    return judge("3 GB sufficed", {})


def check_sanitizer(tool: str) -> Outcome:
    """compute-sanitizer over small calls: no bad access, no race in shared memory, no uninitialised read."""
    program = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
    if program is None:
        return Outcome("not run", "compute-sanitizer is not installed", {})
    command = [
        program,
        "--tool",
        tool,
        "--error-exitcode",
        "86",
        "--print-limit",
        "8",
        sys.executable,
        __file__,
        "--cases",
    ]
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    done = subprocess.run(
        [*command, *SANITIZED, *(ON_HOPPER if tool != "racecheck" else ())],
        capture_output=True,
        text=True,
        env=environment,
        timeout=280,
        check=False,
    )
    lines = [line for line in (done.stdout + done.stderr).splitlines() if line.startswith("=========")]
    figures = {"status": done.returncode, "said": lines[-24:]}
    if any("not supported" in line for line in lines):
        return Outcome("not run", "compute-sanitizer does not support this device", figures)
    if done.returncode:
        return judge(f"status {done.returncode}: {' '.join(lines[-24:])[:800] or done.stderr[-800:]}", figures)
    return judge("", figures, lines[-1].strip("= ") if lines else "")


def run_cases(names: list[str]) -> int:
    """What runs under compute-sanitizer: no reference on the GPU, no poison, which would count as initialised."""
    bad = 0
    for name in names:
        wrong = triton_cases.failures((triton_cases.CASES | triton_cases.GPU_CASES)[name], "cuda")
        bad += bool(wrong)
        print(f"{name}: {'; '.join(wrong) or 'right'}", flush=True)
    return bad


FIRST = """
import json, sys, time
import torch
from power_retention import power_retention
imported = time.time()
query_heads, heads, width = map(int, sys.argv[1:])
q, k, v = (torch.randn(1, 65536, h, width, device="cuda", dtype=torch.bfloat16) for h in (query_heads, heads, heads))
inputs = [q, k, v, torch.nn.functional.logsigmoid(torch.randn(1, 65536, heads, device="cuda") + 6)]
torch.cuda.synchronize()
drawn = time.time()
power_retention(*inputs)
torch.cuda.synchronize()
forward = time.time()
y = power_retention(*[x.requires_grad_() for x in inputs])
torch.autograd.grad(y, inputs, torch.ones_like(y))
torch.cuda.synchronize()
print(json.dumps({"imported": imported, "drawn": drawn, "forward": forward, "backward": time.time()}))
"""


def check_first_result(name: str) -> Outcome:
    """Seconds to the first output and the first gradients in a fresh process with an empty Triton cache."""
    with tempfile.TemporaryDirectory() as cache:
        environment = os.environ | {"TRITON_CACHE_DIR": cache}
        started = time.time()
        command = [sys.executable, "-c", FIRST, *map(str, FLAGSHIPS[name])]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=280, check=False)
    if done.returncode:
        return judge(done.stderr[-500:], {})
    at = json.loads(done.stdout.splitlines()[-1])
    figures = {
        "import": at["imported"] - started,
        "first call": at["forward"] - at["drawn"],
        "first output": at["forward"] - started,
        "first gradients": at["backward"] - started,
    }
    detail = ", ".join(f"{what} {seconds:.1f} s" for what, seconds in figures.items())
    return judge("" if figures["first output"] <= 10 else f"over 10 s: {detail}", figures, detail)


SECTIONS: dict[str, Callable[[str], Outcome]] = {
    "first result": check_first_result,
    "grid": check_grid,
    "repeats": check_repeats,
    "precision": check_precision,
    "offsets past 2³¹": check_far_offsets,
    "torch.compile": check_compile,
    "deterministic mode": check_deterministic,
    "out of memory": check_memory,
    "compute-sanitizer": check_sanitizer,
}


# ── the run ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def tasks(deadline: float, sections: list[str]) -> tuple[list[Task], list[Task]]:
    """(tasks that need the machine to themselves, the others): long ones early, so that they do not come last."""
    names = list(grid())
    first = [("grid", name) for name in names[:20]]
    heavy = [
        *(("repeats", name) for name in FLAGSHIPS),
        *(("precision", f"{width} wide, {tokens} tokens") for tokens in (1024, 131072) for width in (64, 128)),
        ("torch.compile", "forward and backward"),
        *(("compute-sanitizer", tool) for tool in ("memcheck", "racecheck", "initcheck")),
        ("deterministic mode", "forward, backward, decoding"),
        ("out of memory", "chunks of 128 in 3 GB"),
    ]
    rest = [("grid", name) for name in names[20:]]
    alone = [("first result", name) for name in FLAGSHIPS] + [("offsets past 2³¹", "40/8 heads of 128")]
    wanted = [
        [Task(section, name, deadline) for section, name in group if section in sections]
        for group in (alone, first[:5] + heavy[:2] + first[5:10] + heavy[2:] + first[10:] + rest)
    ]
    return wanted[0], wanted[1]


def run(minutes: float, workers: int, sections: list[str], out: Path) -> int:
    started = time.time()
    alone, shared = tasks(started + 60 * minutes, sections)
    outcomes: dict[Task, Outcome] = {}

    def note(task: Task, outcome: Any) -> None:
        if isinstance(outcome, Failed):
            outcome = Outcome("wrong", str(outcome), {})
        outcomes[task] = outcome
        place = f"[{len(outcomes)}/{len(alone) + len(shared)}, {time.time() - started:.0f} s]"
        print(f"{place} {outcome.verdict}: {task.section}, {task.name}: {outcome.detail}", flush=True)
        write_report(outcomes, out, time.time() - started)

    for tasks_at_a_time, processes in ((alone, 1), (shared, workers)):
        for task, outcome in in_processes(perform, tasks_at_a_time, workers=processes, timeout=300):
            note(task, outcome)
    counts = Counter(outcome.verdict for outcome in outcomes.values())
    print(f"{dict(counts)} in {time.time() - started:.0f} s; report in {out}.json and {out}.md", flush=True)
    return counts["wrong"]


def write_report(outcomes: dict[Task, Outcome], out: Path, seconds: float) -> None:
    machine = {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": __import__("triton").__version__,
        "python": platform.python_version(),
        "seconds": round(seconds),
    }
    rows = [
        {"section": t.section, "name": t.name, "verdict": o.verdict, "detail": o.detail, "seconds": round(o.seconds, 1)}
        | {"figures": o.figures}
        for t, o in sorted(outcomes.items(), key=lambda pair: list(SECTIONS).index(pair[0].section))
    ]
    write_json(out.with_suffix(".json"), {"machine": machine, "checks": rows})
    out.with_suffix(".md").write_text(markdown(machine, rows), encoding="utf-8")


def markdown(machine: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    counts = Counter(row["verdict"] for row in rows)
    lines = [
        f"# GPU check: {counts['right']} right, {counts['wrong']} wrong, {counts['not run']} not run",
        "",
        f"{machine['gpu']}, torch {machine['torch']}, Triton {machine['triton']}, Python {machine['python']}; "
        f"{machine['seconds']} s. Made by `tests/gpu/check.py`; figures in the JSON beside it.",
        "",
        "| section | what | verdict | |",
        "|---|---|---|---|",
    ]
    for row in rows:
        verdict = row["verdict"] if row["verdict"] == "right" else f"**{row['verdict']}**"
        detail = " ".join(row["detail"].replace("|", "/").split())
        lines.append(f"| {row['section']} | {row['name']} | {verdict} | {detail[:240]} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=4.0, help="no task begins later than this")
    parser.add_argument("--workers", type=int, default=min(14, os.cpu_count() or 1))
    parser.add_argument("--sections", default=",".join(SECTIONS), help="comma-separated")
    parser.add_argument("--out", type=Path, default=Path("gpu-check"), help="path of the reports, without ending")
    parser.add_argument("--cases", nargs="+", help="only run these small cases here; compute-sanitizer watches them")
    arguments = parser.parse_args()
    if arguments.cases:
        return run_cases(arguments.cases)
    return run(arguments.minutes, arguments.workers, arguments.sections.split(","), arguments.out)


if __name__ == "__main__":
    sys.exit(main())
