"""``power-retention plan``: a table for people, JSON for machines, one sentence where it cannot be done."""

from __future__ import annotations

import json
from pathlib import Path

from test_cli import Here, here  # noqa: F401 (a fixture)

from power_retention.models import BrumbyConfig
from tiny_models import tiny_config


def test_a_preset(here: Here) -> None:  # noqa: F811
    out = here("plan", "qwen3-14b", "--context", "1M", "--gpus", "4xH200").out
    assert "qwen3-14b on 4 × H200" in out
    for line in ("1,373.8 MB", "160.0 KiB", "29.54 GB", "GPU-hours, $", "1 M ←", "Assumed: 141 GB"):
        assert line in out, line


def test_json_and_a_plot(tmp_path: Path, here: Here) -> None:  # noqa: F811
    BrumbyConfig(num_hidden_layers=2).save_pretrained(tmp_path / "model")
    options = ("--gpus", "2xH100", "--price", "3", "--ring", "16", "--state-dtype", "bfloat16")
    result = here("plan", tmp_path / "model", "--context", "48k", *options, "--plot", tmp_path / "plan.png", "--json")
    plan = json.loads(result.out)
    assert (plan["gpu"]["dollars_per_hour"], plan["gpus"]) == (3, 2)
    assert [serving["context"] for serving in plan["student"]] == [4096, 32768, 49152, 131072, 1048576]
    assert (plan["assumptions"]["ring"], plan["assumptions"]["state_dtype"]) == (16, "bfloat16")
    assert (tmp_path / "plan.png").stat().st_size > 10_000


def test_refusals(tmp_path: Path, here: Here) -> None:  # noqa: F811
    assert here.refusal("plan", "nobody/nothing").startswith("nobody/nothing is no preset (smollm2-135m, ")
    assert here.refusal("plan", "qwen3-8b", "--gpus", "4 cards").startswith("GPUs are given as 4xH200, not '4 cards'")
    assert here.refusal("plan", "qwen3-8b", "--context", "long").startswith("A number of tokens is written")
    assert "plan with more or larger GPUs" in here.refusal("plan", "llama-3.3-70b", "--gpus", "1xH200")


def test_a_dry_run(here: Here) -> None:  # noqa: F811
    options = ("--gpus", "64xH200", "--dry-run", "--json")
    plan = json.loads(here("plan", "glm-4.5-air", *options).out)
    assert plan["layout"] == {"ranks": 64, "dp_replicate": 1, "batch": 64, "length": 4096, "recompute": True}
    assert 6e9 < plan["bytes"]["weights"] < 7e9
    assert plan["bytes"]["total"] < 141e9
    crowded = here("plan", "glm-4.5-air", "--ranks", "8", "--dry-run").out
    assert "of the 141 GB of an H200. Use more GPUs" in " ".join(crowded.split())
    assert "cannot be divided into 3 groups" in here.refusal(
        "plan", "qwen3-8b", "--ranks", "8", "--replicas", "3", "--dry-run"
    )


def test_memory_of_long_training(here: Here, tmp_path: Path) -> None:  # noqa: F811
    """Longer documents take more host memory and no more of the GPU's."""
    tiny_config(num_attention_heads=2, num_key_value_heads=2).save_pretrained(tmp_path)
    options = ("--long-training", "64k,1M", "--segment", "4k")
    short, long = here("plan", tmp_path, *options, "--json").json["long_training"]
    assert (short["tokens"], long["tokens"], long["segment"]) == (65536, 1048576, 4096)
    assert long["device_bytes"] == short["device_bytes"]
    assert long["host_bytes"] == 17 * short["host_bytes"]
    assert "host memory" in here("plan", tmp_path, *options, "--activation-checkpointing").out
