from __future__ import annotations

import json

import pytest

from power_retention.errors import ArgumentError
from power_retention.training.recipe import Recipe
from power_retention.training.retraining import fastest_precision, steps_within


def test_stages_follow_each_other() -> None:
    recipe = Recipe(steps=10, align_share=0.3, batch=3, length=7)
    assert [recipe.stage(step) for step in range(10)] == ["align"] * 3 + ["distil"] * 7
    assert (recipe.align_steps, recipe.tokens_per_step) == (3, 21)


@pytest.mark.parametrize(("share", "stage"), [(0.0, "distil"), (1.0, "align")])
def test_one_stage_alone(share: float, stage: str) -> None:
    recipe = Recipe(steps=5, align_share=share)
    assert {recipe.stage(step) for step in range(5)} == {stage}
    assert all(recipe.learning_rates(step)[0] > 0 for step in range(5))


def test_each_stage_warms_up_and_cools_down_to_a_tenth() -> None:
    recipe = Recipe(steps=400, align_share=0.5, align_lr=8.0, mixer_lr=4.0, other_lr=2.0, warmup_share=0.05)
    mixers, others = zip(*(recipe.learning_rates(step) for step in range(400)), strict=True)
    assert others[:200] == (0.0,) * 200
    for rates, peak in ((mixers[:200], 8.0), (mixers[200:], 4.0), (others[200:], 2.0)):
        assert rates[0] == pytest.approx(peak / 10)
        assert max(rates) == rates[9] == peak
        assert list(rates[:10]) == sorted(rates[:10])
        assert list(rates[10:]) == sorted(rates[10:], reverse=True)
        assert rates[-1] == pytest.approx(peak / 10, rel=1e-2)


@pytest.mark.parametrize("steps", range(1, 12))
def test_short_runs_have_finite_positive_rates(steps: int) -> None:
    recipe = Recipe(steps=steps)
    for step in range(steps):
        mixer, other = recipe.learning_rates(step)
        assert 0 < mixer <= recipe.align_lr
        assert (other > 0) == (recipe.stage(step) == "distil")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"steps": 0}, "at least 1 step, 1 sequence and 2 tokens, not 0, 4 and 256"),
        ({"steps": 1, "batch": 0}, "not 1, 0 and 256"),
        ({"steps": 1, "length": 1}, "not 1, 4 and 1"),
        ({"steps": 1, "clip": 0.0}, "finite norm above 0, not to 0.0"),
        ({"steps": 1, "clip": float("inf")}, "finite norm above 0, not to inf"),
        ({"steps": 1, "align_lr": float("nan")}, "align_lr must be a finite number above 0, not nan"),
        ({"steps": 1, "mixer_lr": -1e-3}, "mixer_lr must be a finite number above 0, not -0.001"),
        ({"steps": 1, "other_lr": float("inf")}, "other_lr must be a finite number and at least 0, not inf"),
        ({"steps": 1, "hidden_weight": -1.0}, "hidden_weight must be a finite number and at least 0, not -1.0"),
        ({"steps": 1, "align_share": 1.5}, r"align_share must lie in \[0, 1\], not 1.5"),
    ],
)
def test_numbers_that_make_no_recipe(fields: dict[str, float], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        Recipe(**fields)


def test_it_survives_json() -> None:
    recipe = Recipe(steps=7, seed=3, precision="bfloat16")
    assert Recipe(**json.loads(json.dumps(recipe.to_dict()))) == recipe


def test_steps_that_fit_into_minutes() -> None:
    seconds = {"align": 1.0, "distil": 3.0}
    assert steps_within(1.2, seconds, align_share=0.5) == 32
    assert steps_within(1.2, seconds, align_share=1.0) == 65
    assert steps_within(0.0, seconds, align_share=0.5) == 2


def test_the_precision_chosen_is_one_of_a_recipes() -> None:
    assert fastest_precision() in ("float32", "bfloat16")


def test_the_usual_recipe_follows_the_tokens() -> None:
    few, some, many = (Recipe.usual(steps, batch=8, length=1024) for steps in (20, 250, 8000))
    assert (few.align_share, few.mixer_lr, few.other_lr) == (0.8, 5e-4, 1e-4)
    assert (many.align_share, many.mixer_lr, many.other_lr) == (0.2, 1e-3, 3e-4)
    assert many.hidden_weight == 1
    assert 0.3 < some.align_share < 0.8
    assert 5e-4 < some.mixer_lr < 1e-3
    given = Recipe.usual(8000, batch=8, length=1024, align_share=0.0, mixer_lr=None, seed=3)
    assert (given.align_share, given.mixer_lr, given.seed) == (0.0, 1e-3, 3)
