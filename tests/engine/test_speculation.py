"""Drafts taken from the text itself: what is answered, cached and saved is what an engine without drafts would."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import engines
import pytest
import torch
from vllm import LLM, RequestOutput
from vllm.exceptions import VLLMValidationError

from power_retention.errors import ArgumentError
from power_retention.models import PowerRetentionCache
from power_retention.serving.states import StateDirectory

DRAFTS = 4
FEW = [5, 6, 7, 8, 9]
"""Answers of these tokens alone repeat themselves, others hardly."""


def ngram(drafts: int = DRAFTS, **more: Any) -> dict[str, Any]:
    config = {"method": "ngram", "num_speculative_tokens": drafts, "prompt_lookup_min": 1, "prompt_lookup_max": 3}
    return {"speculative_config": config, "disable_log_stats": False, **more}


def answers(engine: LLM) -> list[RequestOutput]:
    """Answers to ragged prompts at once, some that repeat themselves and some that do not."""
    prompts = engines.prompts_of(engines.LENGTHS)
    return [
        *engines.generate(engine, prompts[:6], tokens=30),
        *engines.generate(engine, prompts[6:], tokens=50, allowed_token_ids=FEW),
    ]


def tokens_of(outputs: list[RequestOutput]) -> list[list[int]]:
    return [list(output.outputs[0].token_ids) for output in outputs]


def counts(engine: LLM) -> tuple[int, int]:
    """Drafts that were accepted, and those that were not."""
    found = {metric.name: getattr(metric, "value", 0) for metric in engine.get_metrics()}
    accepted = found["vllm:spec_decode_num_accepted_tokens"]
    return accepted, found["vllm:spec_decode_num_draft_tokens"] - accepted


def test_the_same_answers(start: Callable[..., LLM], folder_of: Callable[..., Path]) -> None:
    expected = tokens_of(answers(start(folder_of())))
    # The smallest ring that these drafts allow folds at almost every step.
    engine = start(folder_of(), **ngram(additional_config={"power_retention": {"fold_size": DRAFTS + 1}}))
    outputs = answers(engine)
    assert tokens_of(outputs) == expected
    assert min(counts(engine)) > 50
    assert engines.distance(engines.open_model(folder_of()), outputs) < engines.CLOSE


def test_thrown_out_and_aborted(start: Callable[..., LLM], folder_of: Callable[..., Path]) -> None:
    engine = start(folder_of(), enable_prefix_caching=True, block_size=16, **ngram())
    core = engine.llm_engine
    for i, prompt in enumerate(engines.prompts_of(engines.LENGTHS)):
        core.add_request(f"r{i}", {"prompt_token_ids": prompt}, engines.sampling(40, allowed_token_ids=FEW))
    outputs = [output for _ in range(12) for output in core.step() if output.finished]
    assert core.reset_prefix_cache(reset_running_requests=True)
    outputs += [output for _ in range(10) for output in core.step() if output.finished]
    core.abort_request(["r1", "r5"])
    for i, prompt in enumerate(([9], engines.prompts_of([65])[0])):  # of which one token is left to read
        core.add_request(f"late{i}", {"prompt_token_ids": prompt}, engines.sampling(40, allowed_token_ids=FEW))
    while core.has_unfinished_requests():
        outputs += [output for output in core.step() if output.finished]
    assert len(outputs) >= len(engines.LENGTHS)
    assert min(counts(engine)) > 50
    assert engines.distance(engines.open_model(folder_of()), outputs) < engines.CLOSE


def test_conversations_with_drafts(start: Callable[..., LLM], folder_of: Callable[..., Path]) -> None:
    engine = start(folder_of(), enable_prefix_caching=True, block_size=16, **ngram())
    model = engines.open_model(folder_of())
    with pytest.raises(VLLMValidationError, match="ask with temperature 0"):
        engines.generate(engine, [[5]], temperature=0.5)
    histories = engines.prompts_of((50, 90, 130))
    for turn in range(3):
        outputs = engines.generate(engine, histories, tokens=37, allowed_token_ids=FEW)
        assert engines.distance(model, outputs) < engines.CLOSE
        if turn:  # everything but the last page's worth was read before
            for history, output in zip(histories, outputs, strict=True):
                assert (output.num_cached_tokens or 0) >= len(history) - 9 - 1 - 16
        news = engines.prompts_of((9, 9, 9), seed=turn)
        histories = [
            history + answer + new for history, answer, new in zip(histories, tokens_of(outputs), news, strict=True)
        ]
    assert min(counts(engine)) > 50


@torch.inference_mode()
def test_saved_without_drafts_that_were_rejected(
    tmp_path: Path, start: Callable[..., LLM], folder_of: Callable[..., Path]
) -> None:
    directory = StateDirectory(tmp_path / "states")
    config = {"power_retention": {"states": str(directory.path)}}
    engine = start(folder_of(), enable_prefix_caching=True, block_size=16, additional_config=config, **ngram())
    model = engines.open_model(folder_of())
    book, question = engines.prompts_of((70, 8))
    # One answer for each length, and for each place at which a step's drafts may be cut short.
    names = [f"book-{tokens}" for tokens in range(9, 18)]
    params = [
        engines.sampling(9 + i, allowed_token_ids=FEW, extra_args={"save_state": name}) for i, name in enumerate(names)
    ]
    books = engine.generate([{"prompt_token_ids": book}] * len(names), params, use_tqdm=False)
    engine.llm_engine.step()
    forks = engine.generate(
        [{"prompt_token_ids": question}] * len(names),
        [engines.sampling(12, allowed_token_ids=FEW, extra_args={"state": name}) for name in names],
        use_tqdm=False,
    )
    assert min(counts(engine)) > 50
    for name, first, fork in zip(names, books, forks, strict=True):
        read = book + list(first.outputs[0].token_ids)
        assert directory.inspect(name).header.tokens_seen == len(read)
        assert engines.distance(model, [fork], before=read) < engines.CLOSE
    # An answer that ends among drafts that were accepted.
    last = tokens_of(books)[-1]
    stop = engines.sampling(40, allowed_token_ids=FEW, stop_token_ids=[last[7]], extra_args={"save_state": "cut"})
    (cut,) = engine.generate([{"prompt_token_ids": book}], stop, use_tqdm=False)
    engine.llm_engine.step()
    read = book + list(cut.outputs[0].token_ids)
    cache = PowerRetentionCache.load(directory.path_of("cut"), model)
    logits = model(torch.tensor([question]), past_key_values=cache).logits
    torch.testing.assert_close(
        logits, model(torch.tensor([read + question])).logits[:, len(read) :], rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (ngram(16), "do not fit beside a state with fold_size 16: use at most 15"),
        ({"speculative_config": {"method": "ngram_gpu", "num_speculative_tokens": 3}}, "from the text itself only"),
        (
            ngram(enable_prefix_caching=True, scheduler_cls="vllm.v1.core.sched.scheduler.Scheduler"),
            "scheduler of ours",
        ),
    ],
)
def test_refused_in_a_sentence(
    options: dict[str, Any], sentence: str, start: Callable[..., LLM], folder_of: Callable[..., Path]
) -> None:
    with pytest.raises((ArgumentError, ValueError), match=sentence):
        start(folder_of(), **options)
