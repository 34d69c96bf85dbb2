"""Requests that come, go, wait, are thrown out and come back: every answer is that of a sequence alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import engines
import pytest
import torch
from vllm import LLM, RequestOutput, SamplingParams
from vllm.sampling_params import StructuredOutputsParams

from power_retention.errors import ArgumentError


def submit(engine: LLM, name: str, prompt: list[int], tokens: int) -> None:
    engine.llm_engine.add_request(name, {"prompt_token_ids": prompt}, engines.sampling(tokens))


def finish(engine: LLM) -> list[RequestOutput]:
    outputs = []
    while engine.llm_engine.has_unfinished_requests():
        outputs += [output for output in engine.llm_engine.step() if output.finished]
    return outputs


def poison(engine: LLM) -> None:
    """Leave in every page what the worst of its last owners could have left there."""
    (runner,) = (worker.model_runner for worker in [engine.llm_engine.model_executor.driver_worker.worker])
    for layer in runner.compilation_config.static_forward_context.values():
        ring, record = layer.pages.ring, layer.pages.record
        for tensor in (ring.memory, ring.normalizer, ring.keys, ring.values, ring.gates):
            tensor.fill_(torch.nan)
        ring.cursor.fill_(3)
        record[:, :2] = 12345


def test_recycled_pages_hold_nothing_of_their_last_owner(
    start: Callable[..., LLM], folder_of: Callable[..., Path]
) -> None:
    engine = start(folder_of(), num_gpu_blocks_override=4)  # one is vLLM's own
    poison(engine)
    outputs = engines.generate(engine, engines.prompts_of(engines.LENGTHS))
    assert engine.llm_engine.vllm_config.scheduler_config.max_num_seqs == 3
    assert engines.distance(engines.open_model(folder_of()), outputs) < engines.CLOSE


@pytest.mark.parametrize("caching", [False, True])
def test_preempted_and_aborted(caching: bool, start: Callable[..., LLM], folder_of: Callable[..., Path]) -> None:
    engine = start(folder_of(), enable_prefix_caching=caching, block_size=32)
    core = engine.llm_engine
    for i, prompt in enumerate(engines.prompts_of(engines.LENGTHS)):
        submit(engine, f"r{i}", prompt, 40)
    outputs = [output for _ in range(12) for output in core.step() if output.finished]
    assert core.reset_prefix_cache(reset_running_requests=True)
    outputs += [output for _ in range(10) for output in core.step() if output.finished]
    core.abort_request(["r1", "r5"])
    submit(engine, "late", engines.prompts_of([77], seed=5)[0], 30)
    outputs += finish(engine)
    assert len(outputs) == len(engines.LENGTHS) - 2 + 1
    assert engines.distance(engines.open_model(folder_of()), outputs) < engines.CLOSE


def test_cached_prefixes_of_conversations(start: Callable[..., LLM], folder_of: Callable[..., Path]) -> None:
    engine = start(folder_of(), enable_prefix_caching=True, block_size=16)
    model = engines.open_model(folder_of())
    histories = engines.prompts_of((50, 90, 130))
    news = engines.prompts_of((9, 14, 20), seed=3)
    for turn in range(3):
        outputs = engines.generate(engine, histories, tokens=21)
        assert engines.distance(model, outputs) < engines.CLOSE
        if turn:  # everything but the last page's worth was read before
            for history, new, output in zip(histories, news, outputs, strict=True):
                assert (output.num_cached_tokens or 0) >= len(history) - len(new) - 1 - 16
        histories = [
            history + list(output.outputs[0].token_ids) + new
            for history, output, new in zip(histories, outputs, news, strict=True)
        ]
    # One prefix, many ends.
    shared = engines.prompts_of([100], seed=9)[0]
    engines.generate(engine, [shared])
    outputs = engines.generate(engine, [shared + end for end in engines.prompts_of((3, 30, 70, 1), seed=10)])
    assert min(output.num_cached_tokens or 0 for output in outputs) >= 64
    assert engines.distance(model, outputs) < engines.CLOSE


def test_cache_full_of_prefixes(start: Callable[..., LLM], folder_of: Callable[..., Path]) -> None:
    engine = start(folder_of(), enable_prefix_caching=True, block_size=16, num_gpu_blocks_override=9)
    prompts = engines.prompts_of(engines.LENGTHS)
    model = engines.open_model(folder_of())
    for order in (prompts, prompts[::-1], prompts):
        outputs = engines.generate(engine, order)
        assert len(outputs) == len(prompts)
        assert engines.distance(model, outputs) < engines.CLOSE


def test_structured_output(start: Callable[..., LLM], folder_of: Callable[..., Path]) -> None:
    engine = start(folder_of())
    choice = StructuredOutputsParams(choice=["Yes, it is.", "No."])
    (output,) = engine.generate(["Is it?"], SamplingParams(max_tokens=60, structured_outputs=choice), use_tqdm=False)
    assert output.outputs[0].text in ("Yes, it is.", "No.")


def test_several_answers(start: Callable[..., LLM], folder_of: Callable[..., Path]) -> None:
    outputs = engines.generate(start(folder_of()), engines.prompts_of((70, 3)), 20, n=3, temperature=1.0)
    model = engines.open_model(folder_of())
    for output in outputs:
        assert len({tuple(answer.token_ids) for answer in output.outputs}) == 3
        for answer in output.outputs:
            output.outputs[0] = answer
            assert engines.distance(model, [output]) < engines.CLOSE


@pytest.mark.parametrize(
    ("changes", "options", "sentence"),
    [
        ({}, {"kv_cache_dtype": "fp8"}, "--kv-cache-dtype"),
        ({}, {"additional_config": {"power_retention": {"stats": "x"}}}, "may hold fold_size"),
        ({}, {"additional_config": {"power_retention": {"state_dtype": "float16"}}}, "state_dtype must be one of"),
        ({}, {"num_gpu_blocks_override": 1}, "not one fits"),
        ({"power": 4, "head_dim": 64}, {}, "keeps no state"),
        ({"num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}, {}, "experts"),
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, {}, "rotary"),
    ],
)  # fmt: skip
def test_refused_in_a_sentence(
    changes: dict[str, object],
    options: dict[str, object],
    sentence: str,
    start: Callable[..., LLM],
    folder_of: Callable[..., Path],
) -> None:
    with pytest.raises((ArgumentError, ValueError), match=sentence):
        start(folder_of(**changes), **options)
