"""Aligning and distilling work for every family: biased layers, experts, heads that turn in part."""

from __future__ import annotations

import copy

import numpy as np
import pytest

from power_retention import swap_attention
from power_retention.training.recipe import Recipe
from power_retention.training.retraining import Retraining
from power_retention.training.text import Tokens
from tiny_models import PARENTS, tiny_parent, tokens


@pytest.mark.parametrize("kind", [kind for kind in PARENTS if kind not in ("mistral", "llama, every bias")])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_both_stages_learn(kind: str, precision: str) -> None:
    parent = tiny_parent(kind)
    student = swap_attention(copy.deepcopy(parent))
    ids = tokens(600).numpy().astype(np.int32)
    corpus = Tokens(ids, np.array([0, 300, 600]))
    recipe = Recipe(24, 0.5, 4, 32, align_lr=4e-3, mixer_lr=5e-4, other_lr=2e-4, precision=precision)  # type: ignore[arg-type]
    buffers = {name: value.clone() for name, value in parent.named_buffers()}
    retraining = Retraining(student, parent, corpus, recipe)
    assert all(value.equal(buffers[name]) for name, value in parent.named_buffers()), "rounded frequencies are others"
    for stage, error, steps in (("align", "alignment_error", range(12)), ("distil", "kl", range(12, 24))):
        before = retraining.gradients(0, stage)[error]
        retraining.optimizer.zero_grad()
        assert not any(retraining.step(step)["skipped"] for step in steps)
        assert retraining.gradients(0, stage)[error] < 0.99 * before
        retraining.optimizer.zero_grad()
