"""Plans: the arithmetic of one user by hand, published figures, and what cannot be planned."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from power_retention.conversion.presets import preset
from power_retention.errors import ArgumentError
from power_retention.evaluation.figure import draw_plan_figure
from power_retention.evaluation.gpus import GPUS, Gpu
from power_retention.evaluation.plan import Assumptions, make_plan, parse_count, parse_gpus, state_traffic
from power_retention.models import BrumbyConfig
from power_retention.models.sizes import count_parameters, kv_bytes_per_token, state_bytes
from tiny_models import VARIANTS, tiny_config

H200 = GPUS["h200"]
BARE = Assumptions(ring=0)
EXACT = Assumptions(memory_share=1.0, bandwidth_share=1.0, ring=0)


def test_brumby_on_an_h200() -> None:
    """Sizes worked out elsewhere: 8256 rows of 128 in 40 layers of 8 heads; 160 KiB a token for its parent."""
    config = BrumbyConfig()
    made = make_plan(config, [4096, 32768, 1 << 20], H200, assumptions=BARE)
    assert made.state_bytes == 40 * 8 * 8256 * (128 * 4 + 4)
    assert made.kv_bytes_per_token == 160 * 1024
    assert made.weights_bytes == pytest.approx(29.54e9, rel=1e-3)
    narrow = make_plan(config, [4096], H200, assumptions=Assumptions(state_dtype="bfloat16", ring=0))
    ring = make_plan(config, [4096], H200, assumptions=Assumptions(state_dtype="bfloat16", ring=16))
    assert narrow.crossovers.decoding == pytest.approx(8400, rel=0.01)
    assert ring.crossovers.decoding == pytest.approx(4500, rel=0.01)
    assert ring.student[0].tokens_per_second > 1.6 * narrow.student[0].tokens_per_second
    assert len({serving.users for serving in made.student}) == 1
    assert [serving.users for serving in made.parent] == [155, 19, 0]


def test_the_arithmetic_of_one_small_model() -> None:
    """By hand: 2 groups of 1 GPU, each with room for 3 users."""
    config = tiny_config()
    weights, state = 2 * count_parameters(config), state_bytes(config, ring=0)
    gpu = Gpu("toy", (weights + 3.5 * state) / 1e9, 1e-6, 1e-6, 2.0)
    made = make_plan(config, [100], gpu, 2, EXACT)
    served = made.student[0]
    assert (served.gpus_per_group, served.users, served.users_per_gpu) == (1, 6, 3)
    embedding = 2 * config.vocab_size * config.hidden_size
    seconds = (weights - embedding + 3 * 2 * state) / 1e6
    assert served.tokens_per_second == pytest.approx(2 * 3 / seconds)
    assert served.tokens_per_second_alone == pytest.approx(1e6 / (weights - embedding + 2 * state))
    kept = 100 * kv_bytes_per_token(config)
    assert made.parent[0].users == 2 * int(3.5 * state // kept)


def test_at_the_crossovers_model_and_parent_are_even() -> None:
    made = make_plan(preset("qwen3-8b").config(), [4096], H200, assumptions=BARE)
    length = round(made.crossovers.decoding)
    even = make_plan(preset("qwen3-8b").config(), [length], H200, assumptions=BARE)
    assert even.parent[0].tokens_per_second_alone == pytest.approx(even.student[0].tokens_per_second_alone, rel=1e-3)
    assert even.crossovers.memory == pytest.approx(length / 2, rel=1e-3)


def test_a_model_too_large_for_one_gpu_is_spread() -> None:
    made = make_plan(preset("qwen3-235b-a22b").config(), [1 << 20], H200, 8)
    assert made.student[0].gpus_per_group == 4
    assert made.parent[0].gpus_per_group == 8, "a parent with a million tokens of cache needs more room"
    assert made.parameters_read < 0.1 * made.parameters
    with pytest.raises(ArgumentError, match="take 472 GB, and 2 × H200 hold 268 GB"):
        make_plan(preset("qwen3-235b-a22b").config(), [1 << 20], H200, 2)


def test_a_ring_spares_the_writing() -> None:
    config = BrumbyConfig()
    held = state_bytes(config, ring=0)
    assert state_traffic(config, BARE) == 2 * held
    with_ring = state_traffic(config, Assumptions(ring=16))
    assert held * 17 / 16 < with_ring < held * 1.07


def test_retraining_costs_what_its_operations_cost() -> None:
    config = preset("smollm2-135m").config()
    cheap, dear = (make_plan(config, [4096], H200, assumptions=Assumptions(train_tokens=n)) for n in (1e8, 1e9))
    assert dear.retraining.dollars == pytest.approx(10 * cheap.retraining.dollars)
    assert dear.retraining.dollars == pytest.approx(dear.retraining.gpu_hours * H200.dollars_per_hour)
    weights_alone = 8 * (count_parameters(config))
    assert weights_alone < dear.retraining.flops_per_token < 3 * weights_alone
    halved = make_plan(config, [4096], H200, assumptions=Assumptions(utilisation=0.2))
    assert halved.retraining.gpu_hours == pytest.approx(2 * dear.retraining.gpu_hours)


def test_the_published_retraining_is_of_that_order() -> None:
    """60 hours on 32 H100 for about $4,000 (its tokens are not published): 10 to 50 billion of them, by this account."""
    billion = make_plan(BrumbyConfig(), [4096], GPUS["h100"], 32, Assumptions(train_tokens=1e9)).retraining
    assert 10 < 60 * 32 / billion.gpu_hours < 50
    assert 60 * 32 * GPUS["h100"].dollars_per_hour == pytest.approx(4000, rel=0.1)


def test_what_keeps_no_state_cannot_be_planned() -> None:
    with pytest.raises(ArgumentError, match="keep no fixed state at p = 4, so there is nothing to plan"):
        make_plan(preset("qwen3-8b").config(p=4), [4096], H200)
    with pytest.raises(ArgumentError, match="with use_exp"):
        make_plan(tiny_config(use_exp=True), [4096], H200)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"state_dtype": "float16"}, "float32 or bfloat16, not 'float16'"),
        ({"utilisation": 1.5}, "utilisation is a share between 0 and 1"),
        ({"memory_share": 0.0}, "memory_share is a share"),
        ({"ring": -1}, "ring is a number of tokens"),
        ({"weight_bytes": 0}, "weight_bytes must be positive"),
    ],
)
def test_assumptions_are_checked(changes: dict[str, float], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        Assumptions(**changes)


def test_words_for_gpus_and_tokens() -> None:
    assert parse_gpus("4xH200") == (4, H200)
    assert parse_gpus("h100") == (1, GPUS["h100"])
    assert parse_gpus("2 × rtx4090", 0.25) == (2, replace(GPUS["rtx4090"], dollars_per_hour=0.25))
    for wrong in ("4xH300", "0xH200", "", "H200x4"):
        with pytest.raises(ArgumentError, match="GPUs are given as 4xH200"):
            parse_gpus(wrong)
    assert [parse_count(text) for text in ("4096", "128k", "1M", "1.5b")] == [4096, 131072, 1048576, 1_500_000_000]
    for wrong in ("", "0", "many", "-3k"):
        with pytest.raises(ArgumentError, match="A number of tokens is written"):
            parse_count(wrong)


@pytest.mark.parametrize("variant", ["llama", "glm-4.5"])
def test_plain_values_and_a_figure(variant: str, tmp_path: Path) -> None:
    made = make_plan(tiny_config(**VARIANTS[variant]), [256, 4096], GPUS["l40s"])
    assert json.loads(json.dumps(made.to_dict()))["student"][1]["context"] == 4096
    draw_plan_figure(made, tmp_path / "plan.png")
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")
