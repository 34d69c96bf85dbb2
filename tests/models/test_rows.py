"""Sequences that come and go between steps are read as if each were alone."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from power_retention import PowerRetentionCache
from power_retention.errors import StateError
from power_retention.models import PowerRetentionForCausalLM
from power_retention.models.rows import PowerRetentionRows
from tiny_models import VARIANTS, assert_close, tiny_model, tokens


def read_alone(model: PowerRetentionForCausalLM, ids: Tensor) -> PowerRetentionCache:
    cache = PowerRetentionCache(model.config.num_hidden_layers)
    model(ids, past_key_values=cache, use_cache=True)
    return cache


def step(model: PowerRetentionForCausalLM, rows: PowerRetentionRows, ids: list[Tensor], at: list[int]) -> Tensor:
    column = torch.stack([one[place] for one, place in zip(ids, at, strict=True)]).unsqueeze(1)
    return model(column, position_ids=torch.tensor(at).unsqueeze(1), past_key_values=rows, use_cache=True).logits[:, 0]


@torch.inference_mode()
@pytest.mark.parametrize(
    "variant", ["llama", "tied, every bias", "qwen3, wide heads", "p = 4", "bare gates", "qwen3-moe", "glm-4.5"]
)
def test_rows_that_come_and_go(variant: str) -> None:
    model, moves = tiny_model(**VARIANTS[variant]), random.Random(0)
    texts = [tokens(150, seed=seed) for seed in range(9)]
    expected = [model(text.unsqueeze(0)).logits[0] for text in texts]
    rows = PowerRetentionRows(model.config.num_hidden_layers, 4)
    here: list[int] = []  # the text in each row
    places: list[int] = []
    waiting, checked = list(range(9)), 0
    while waiting or here:
        if waiting and rows.taken < 4 and moves.random() < 0.4:
            text = waiting.pop()
            start = moves.choice((1, 2, 31, 64, 70))
            assert rows.join(read_alone(model, texts[text][:start].unsqueeze(0))) == len(here)
            here.append(text)
            places.append(start)
        if not here:
            continue
        logits = step(model, rows, [texts[text] for text in here], places)
        for row, (text, place) in enumerate(zip(here, places, strict=True)):
            assert_close(logits[row], expected[text][place])
            checked += 1
        places = [place + 1 for place in places]
        for row in reversed(range(len(here))):
            if places[row] == 150 or moves.random() < 0.01:
                rows.leave(row)
                here[row], places[row] = here[-1], places[-1]
                here.pop()
                places.pop()
    assert checked > 300


@torch.inference_mode()
def test_a_row_taken_out_goes_on_alone() -> None:
    model, texts = tiny_model(), [tokens(90, seed=seed) for seed in range(3)]
    rows = PowerRetentionRows(model.config.num_hidden_layers, 3)
    for length, text in zip((10, 40, 5), texts, strict=True):
        rows.join(read_alone(model, text[:length].unsqueeze(0)))
    for more in range(35):
        step(model, rows, texts, [10 + more, 40 + more, 5 + more])
    cache = rows.cache_of(1, 75)
    step(model, rows, texts, [45, 75, 40])  # does not touch the copy
    logits = model(texts[1][None, 75:], past_key_values=cache, use_cache=True).logits
    assert_close(logits[0], model(texts[1].unsqueeze(0)).logits[0, 75:])


@torch.inference_mode()
def test_what_cannot_join_or_leave() -> None:
    model, rows = tiny_model(), PowerRetentionRows(2, 1)
    with pytest.raises(StateError, match="read the prompt first"):
        rows.join(PowerRetentionCache(2))
    with pytest.raises(StateError, match="Row 0 is not taken"):
        rows.leave(0)
    cache = read_alone(model, tokens(1, 3))
    rows.join(cache)
    with pytest.raises(StateError, match="All 1 rows are taken"):
        rows.join(cache)
