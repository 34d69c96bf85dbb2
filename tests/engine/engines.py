"""Engines to test, and what they are held against: one sequence alone in our Hugging Face class."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import llvmlite.binding.ffi
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from vllm import LLM, RequestOutput, SamplingParams
from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

import real_models
import tiny_models
from power_retention.models import BrumbyConfig, BrumbyForCausalLM, PowerCoderConfig, PowerCoderForCausalLM

# An engine that starts looks for kernels in the __dict__ of everything in every module; for it, llvmlite's library (which
# drafting loads) gives a function of that name, and vLLM stumbles over it.
llvmlite.binding.ffi.lib._fntab["__dict__"] = {}

VOCABULARY = 512
LENGTHS = (1, 2, 65, 7, 64, 200, 33, 17, 128, 5, 63, 31)

CLOSE = 1e-4
"""How far log-probabilities may be from the Hugging Face class in float32.

Its own, of a sequence read at once and read in pieces, differ by 1e-5 mostly, and by more where a query has few keys to
answer it and none does well.  A token forgotten, or one too many, is a matter of 1e-2 and more.
"""

PUBLISHED = {"brumby": (BrumbyConfig, BrumbyForCausalLM), "powercoder": (PowerCoderConfig, PowerCoderForCausalLM)}


def write_tiny_model(folder: Path, published: str = "", **changes: Any) -> Path:
    """A random model with the real tokenizer of stories260K."""
    shape = {**tiny_models.SHAPE, "vocab_size": VOCABULARY, "max_position_embeddings": 4096, **changes}
    if published:
        config, kind = PUBLISHED[published]
        model = tiny_models.randomise(kind(config(**shape)))
    else:
        model = tiny_models.tiny_model(**shape)
    model.save_pretrained(folder)
    real_models.read_llama2c_tokenizer(real_models.STORIES_FILES / "tokenizer.bin").save_pretrained(folder)
    return folder


def start(folder: Path, **options: Any) -> LLM:
    """An engine that reads prompts in pieces of 64 tokens."""
    usual = {"dtype": "float32", "max_model_len": 1024, "max_num_batched_tokens": 64, "max_num_seqs": 8, "seed": 0}
    return LLM(str(folder), **{**usual, "enforce_eager": True, **options})


def stop(engines: list[LLM]) -> None:
    """End engines of this process, so that another can start."""
    while engines:
        engine = engines.pop()
        engine.llm_engine.engine_core.shutdown()
        del engine
        gc.collect()
        with contextlib.suppress(AssertionError):
            cleanup_dist_env_and_memory()
    # Older versions leave theirs behind where a model could not be loaded.
    torch.set_default_dtype(torch.float32)


@cache
def open_model(folder: Path) -> PreTrainedModel:
    """Our Hugging Face class."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.eval()


def prompts_of(lengths: Sequence[int], seed: int = 0) -> list[list[int]]:
    """Random prompts."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, VOCABULARY, (length,), generator=generator).tolist() for length in lengths]


def sampling(tokens: int, **changes: Any) -> SamplingParams:
    """Greedy, so many tokens, with the three best log-probabilities of each."""
    return SamplingParams(**{"temperature": 0, "max_tokens": tokens, "ignore_eos": True, "logprobs": 3, **changes})


def generate(engine: LLM, prompts: Sequence[Sequence[int]], tokens: int = 40, **changes: Any) -> list[RequestOutput]:
    """Answers to all prompts at once."""
    requests = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
    return engine.generate(requests, sampling(tokens, **changes), use_tqdm=False)


@torch.no_grad()
def distance(model: PreTrainedModel, outputs: Sequence[RequestOutput], before: Sequence[int] = ()) -> float:
    """The largest difference of a log-probability from those of the model reading that sequence alone.

    Args:
        model: our Hugging Face class.
        outputs: of the engine.
        before: what each request's state had read.
    """
    worst = 0.0
    for output in outputs:
        answer, prompt = output.outputs[0], list(before) + list(output.prompt_token_ids)
        expected = model(torch.tensor([prompt + list(answer.token_ids)])).logits[0].log_softmax(-1)
        assert answer.logprobs
        for place, found in enumerate(answer.logprobs):
            for token, value in found.items():
                worst = max(worst, abs(value.logprob - expected[len(prompt) - 1 + place, token].item()))
    return worst
