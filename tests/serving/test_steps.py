"""Steps of a server's batch, recorded in a few sizes, say what each text says alone."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from power_retention import PowerRetentionCache
from power_retention.models import PowerRetentionForCausalLM
from power_retention.models.rows import PowerRetentionRows
from power_retention.serving.server.steps import Compute, Steps
from tiny_models import assert_close, tiny_model, tokens

ROWS, LENGTH = 5, 60


def come_and_go(model: PowerRetentionForCausalLM, record: Callable[[Compute], Compute] | None) -> None:
    """Texts join and leave between steps; every logit is that of the text read alone."""
    moves = random.Random(0)
    texts = [tokens(LENGTH, seed=seed) for seed in range(12)]
    expected = [model(text.unsqueeze(0)).logits[0] for text in texts]
    rows = PowerRetentionRows(model.config.num_hidden_layers, ROWS)
    steps = Steps(model, rows, record)
    here: list[tuple[int, int]] = []  # (text, tokens read) of each row
    waiting = list(range(12))
    while waiting or here:
        if waiting and rows.taken < ROWS and moves.random() < 0.3:
            text, start = waiting.pop(), moves.choice((1, 2, 31))
            cache = PowerRetentionCache(model.config.num_hidden_layers)
            model(texts[text][:start].unsqueeze(0), past_key_values=cache, use_cache=True)
            rows.join(cache)
            here.append((text, start))
        if not here:
            continue
        logits = steps.take([int(texts[text][place]) for text, place in here], [place for _, place in here])
        for row, (text, place) in enumerate(here):
            assert_close(logits[row], expected[text][place])
        here = [(text, place + 1) for text, place in here]
        for row in reversed(range(len(here))):
            if here[row][1] == LENGTH:
                rows.leave(row)
                here[row] = here[-1]
                here.pop()


class Recorder:
    """Keeps what is recorded in memory of its own, as a graph does."""

    def __init__(self) -> None:
        self.sizes: list[int] = []

    def __call__(self, compute: Compute) -> Compute:
        result: list[Tensor] = []

        def replay() -> Tensor:
            logits = compute()
            if not result:
                result.append(torch.empty_like(logits))
                self.sizes.append(len(logits))
            return result[0].copy_(logits)

        return replay


@torch.inference_mode()
def test_recorded_in_a_few_sizes() -> None:
    recorder = Recorder()
    come_and_go(tiny_model(), recorder)
    assert sorted(recorder.sizes) == [1, 2, 4, ROWS]


@torch.inference_mode()
def test_computed_anew() -> None:
    come_and_go(tiny_model(), None)


@torch.inference_mode()
def test_what_cannot_be_recorded_is_computed_and_said_once() -> None:
    def refuse(compute: Compute) -> Compute:
        raise RuntimeError("operation not permitted when stream is capturing")

    with pytest.warns(RuntimeWarning, match="cannot be recorded and will be slower: operation not permitted") as said:
        come_and_go(tiny_model(), refuse)
    assert len(said) == 1
