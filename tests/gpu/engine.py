"""The plugin in vLLM on a GPU: log-probabilities against our Hugging Face class, CUDA graphs, prefix caching, named states.

    PYTHONPATH=src python tests/gpu/engine.py --out engine.json [--checks eager "named states"]

A random Brumby of a few layers is written to a temporary folder.  Each check runs in a process of its own, for what one
breaks on a GPU is broken for the rest of its process.  The exit status counts what is wrong.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")

import torch
from transformers import AutoModelForCausalLM

from power_retention.files import write_json
from power_retention.models import BrumbyConfig, BrumbyForCausalLM
from power_retention.serving.vllm.plugin import register

LENGTHS = (1, 2, 65, 700, 64, 1500, 33, 17, 3000, 5, 63, 31)
VOCABULARY = 4096


def write_model(folder: Path, layers: int) -> Path:
    """Random weights whose gates' half-lives span tens to hundreds of tokens."""
    torch.manual_seed(0)
    config = BrumbyConfig(
        vocab_size=VOCABULARY, hidden_size=2048, intermediate_size=4096, num_hidden_layers=layers,
        num_attention_heads=40, num_key_value_heads=8, head_dim=128, eos_token_id=None, bos_token_id=None,
    )  # fmt: skip
    BrumbyForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


def prompts_of(lengths: Sequence[int], seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, VOCABULARY, (length,), generator=generator).tolist() for length in lengths]


def start(folder: Path, **options: Any) -> Any:
    from vllm import LLM

    usual = {"max_model_len": 8192, "max_num_batched_tokens": 1024, "max_num_seqs": 64, "gpu_memory_utilization": 0.5}
    return LLM(str(folder), dtype="bfloat16", skip_tokenizer_init=True, **{**usual, **options})


def generate(engine: Any, prompts: Sequence[Sequence[int]], tokens: int, **changes: Any) -> list[Any]:
    from vllm import SamplingParams

    usual = {"temperature": 0, "max_tokens": tokens, "ignore_eos": True, "logprobs": 3, "detokenize": False}
    params = SamplingParams(**{**usual, **changes})
    return engine.generate([{"prompt_token_ids": list(p)} for p in prompts], params, use_tqdm=False)


@torch.no_grad()
def distances(folder: Path, outputs: Sequence[Any], before: Sequence[int] = ()) -> dict[str, float]:
    """Mean distance of log-probabilities from float32: the engine's, and those of the Hugging Face class in bfloat16."""
    models = {
        d: AutoModelForCausalLM.from_pretrained(folder, dtype=d).cuda().eval() for d in (torch.float32, torch.bfloat16)
    }
    engine, half = [], []
    for output in outputs:
        answer, prompt = output.outputs[0], [*before, *output.prompt_token_ids]
        ids = torch.tensor([prompt + list(answer.token_ids)], device="cuda")
        exact, rounded = (model(ids).logits[0].float().log_softmax(-1) for model in models.values())
        for place, found in enumerate(answer.logprobs):
            row = len(prompt) - 1 + place
            for token, value in found.items():
                engine.append(abs(value.logprob - exact[row, token].item()))
                half.append(abs(rounded[row, token].item() - exact[row, token].item()))
    return {"engine": sum(engine) / len(engine), "transformers": sum(half) / len(half), "worst": max(engine)}


def stop(engine: Any) -> None:
    import gc

    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

    engine.llm_engine.engine_core.shutdown()
    gc.collect()
    cleanup_dist_env_and_memory()


def check_logits(folder: Path, **options: Any) -> dict[str, Any]:
    engine = start(folder, **options)
    found: dict[str, Any] = distances(folder, generate(engine, prompts_of(LENGTHS), 60))
    found["right"] = found["engine"] < 2 * found["transformers"] + 1e-4
    stop(engine)
    return found


def check_states(folder: Path, states: Path) -> dict[str, Any]:
    engine = start(folder, additional_config={"power_retention": {"states": str(states)}})
    book, question = prompts_of((2500, 12))
    (first,) = generate(engine, [book], 10, extra_args={"save_state": "book"})
    begun = time.perf_counter()
    engine.llm_engine.step()
    saving = time.perf_counter() - begun
    begun = time.perf_counter()
    second = generate(engine, [question], 1, extra_args={"state": "book"})
    loading = time.perf_counter() - begun
    second = generate(engine, [question], 40, extra_args={"state": "book"})
    found: dict[str, Any] = distances(folder, second, before=[*book, *first.outputs[0].token_ids])
    found["right"] = found["engine"] < 2 * found["transformers"] + 1e-4
    found |= {"seconds to save": saving, "seconds to the first token from a file": loading}
    found["MB"] = (states / "book.state").stat().st_size / 1e6
    stop(engine)
    return found


def checks(model: Path, states: Path) -> dict[str, Callable[[], dict[str, Any]]]:
    bfloat16 = {"additional_config": {"power_retention": {"state_dtype": "bfloat16"}}}
    return {
        "eager": lambda: check_logits(model, enforce_eager=True),
        "compiled, with CUDA graphs": lambda: check_logits(model),
        "named states": lambda: check_states(model, states),
        "prefix caching": lambda: check_logits(model, enable_prefix_caching=True),
        "states in bfloat16": lambda: check_logits(model, **bfloat16),
    }


def run_check(name: str, folder: Path, log: Path, seconds: float) -> dict[str, Any]:
    """A check in a process of its own: what it found, or the end of what it said."""
    found = folder / "found.json"
    found.unlink(missing_ok=True)
    command = [sys.executable, __file__, "--out", str(found), "--folder", str(folder), "--checks", name]
    with log.open("ab") as file:
        begun = file.tell()
        try:
            subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, timeout=seconds, check=True)
            return dict(json.loads(found.read_text()))
        except subprocess.SubprocessError as error:
            said = log.read_bytes()[begun:].decode(errors="replace")
            return {"right": False, "error": f"{error}"[-200:], "said": said[-3000:]}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON to write; what the engines say goes beside it")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--checks", nargs="*", help="only these")
    parser.add_argument("--seconds", type=float, default=150, help="that a check may take")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.folder:  # the process of one check
        register()
        check = checks(arguments.folder / "model", arguments.folder / "states")[arguments.checks[0]]
        write_json(arguments.out, check())
        return 0
    versions = {name: version(name) for name in ("vllm", "torch", "triton", "transformers")}
    report: dict[str, Any] = {"gpu": torch.cuda.get_device_name(), "python": platform.python_version(), **versions}
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        write_model(folder / "model", arguments.layers)
        for name in arguments.checks or list(checks(folder, folder)):
            report[name] = run_check(name, folder, arguments.out.with_suffix(".log"), arguments.seconds)
            print(name, json.dumps(report[name])[:1500], flush=True)
            write_json(arguments.out, report)
    return sum(isinstance(found, dict) and found.get("right") is False for found in report.values())


if __name__ == "__main__":
    raise SystemExit(main())
