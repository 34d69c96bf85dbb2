"""``power-retention data``, and ``retrain --data``: from text to a model trained on its shards."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from test_cli import Here, here  # noqa: F401 (a fixture)


def build(here: Here, text: Path, model: Path, out: Path, *more: str) -> dict[str, object]:  # noqa: F811
    options = ("--tokenizer", model, "--out", out, "--shard-mb", "0.06", "--workers", "1", "--json", *more)
    result = here("data", text, *options)
    assert result.code == 0, result.err
    return result.json


def damage(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[7] ^= 16
    path.write_bytes(content)


def test_build_inspect_verify(here: Here, stories_text: Path, stories_dir: Path, tmp_path: Path) -> None:  # noqa: F811
    made = build(here, stories_text, stories_dir, tmp_path / "out", "--held-out", "0")
    assert made["documents"] == 300
    assert made["unusable"] == []
    assert made["kept_shards"] == 0
    assert int(str(made["shards"])) > 2
    again = build(here, stories_text, stories_dir, tmp_path / "out", "--held-out", "0")
    assert again["kept_shards"] == made["shards"]
    assert {**again, "kept_shards": 0, "seconds": 0} == {**made, "seconds": 0}
    inspected = here("data", "inspect", tmp_path / "out", "--json").json
    assert inspected == {name: value for name, value in made.items() if name not in ("kept_shards", "seconds")}
    assert "longest document" in here("data", "inspect", tmp_path / "out").out
    sound = here("data", "verify", tmp_path / "out")
    assert sound.code == 0
    assert "shards are as they were written" in " ".join(sound.out.split())
    damage(tmp_path / "out" / "shard-00001.bin")
    damaged = here("data", "verify", tmp_path / "out", "--json")
    assert damaged.code == 1
    assert damaged.json["sound"] == int(str(made["shards"])) - 1
    assert [sentence.split(":")[0] for sentence in damaged.json["damaged"]] == ["shard-00001"]
    assert "damaged: shard-00001" in damaged.err


def test_help_and_refusals(here: Here, stories_text: Path, stories_dir: Path, tmp_path: Path) -> None:  # noqa: F811
    help_text = here("data", "--help").out
    for word in ("build", "inspect", "verify", "--tokenizer my-model"):
        assert word in help_text
    assert "--shard-mb" in here("data", "build", "--help").out
    refused = here.refusal("data", tmp_path / "no.jsonl", "--tokenizer", stories_dir, "--out", tmp_path / "out")
    assert refused == f"{tmp_path / 'no.jsonl'} does not exist."
    assert "does not exist" in here.refusal("data", stories_text, "--tokenizer", "./no", "--out", tmp_path / "out")
    assert "already holds something else" in here.refusal(
        "data", stories_text, "--tokenizer", stories_dir, "--out", stories_dir
    )
    code = ("data", stories_text, "--tokenizer", stories_dir, "--out", tmp_path / "out", "--fill-in", "0.5")
    assert "this tokenizer has none" in here.refusal(*code)
    for size in ("nan", "inf", "0", "-1"):
        assert "--shard-mb is" in here.refusal(*code[:-2], "--shard-mb", size)
    for command in ("inspect", "verify"):
        assert "holds no token shards" in here.refusal("data", command, tmp_path)
    assert not (tmp_path / "out").exists()


@pytest.fixture
def converted(here: Here, stories_text: Path, stories_dir: Path, tmp_path: Path) -> Path:  # noqa: F811
    done = here("convert", stories_dir, tmp_path / "converted", "--text", stories_text, "--windows", "4", "--json")
    assert done.code == 0, done.err
    return tmp_path / "converted"


def test_retraining_on_a_mixture(
    here: Here,  # noqa: F811
    converted: Path,
    stories_text: Path,
    tmp_path: Path,
    smollm2_gguf: Path,
) -> None:
    build(here, stories_text, converted, tmp_path / "a")
    build(here, stories_text, converted, tmp_path / "b")
    (tmp_path / "mixture.toml").write_text(
        '[sources]\na = "a"\nb = "b"\n[[phase]]\ntokens = 512\nweights = {a = 1}\n[[phase]]\nweights = {a = 1, b = 3}'
    )
    options = ("--steps", "6", "--batch", "2", "--length", "64", "--precision", "float32")
    done = here("retrain", converted, tmp_path / "out", "--data", tmp_path / "mixture.toml", *options, "--json")
    assert done.code == 0, done.err
    assert done.json["tokens"] == 768
    lines = (tmp_path / "out" / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["skipped"] for line in lines] == [0] * 6

    assert "either --text" in here.refusal(
        "retrain", converted, tmp_path / "x", "--data", tmp_path / "a", "--text", stories_text
    )
    damage(tmp_path / "a" / "shard-00000.bin")
    again = ("retrain", converted, tmp_path / "again", "--data", tmp_path / "mixture.toml", *options)
    assert "shard-00000: " in here.refusal(*again)
    assert not (tmp_path / "again").exists()
    skipped = here(*again, "--on-damage", "skip")
    assert skipped.code == 0, skipped.err
    assert "skipped: shard-00000: " in skipped.err

    noted = (tmp_path / "mixture.toml").read_text()
    (tmp_path / "skipping.toml").write_text(f'on_damage = "skip"\n{noted}')
    skipping = ("retrain", converted, tmp_path / "third", "--data", tmp_path / "skipping.toml", *options)
    assert "shard-00000: " in here.refusal(*skipping, "--on-damage", "fail")
    assert "must be fail or skip, not 'ignore'" in here.refusal(*skipping, "--on-damage", "ignore")
    assert here(*skipping).code == 0

    (tmp_path / "out" / "config.json").unlink()  # as if it had not been finished
    resumed = here(
        "retrain", converted, tmp_path / "out", "--data", tmp_path / "mixture.toml", "--on-damage", "skip", "--resume"
    )
    assert resumed.code == 1
    assert "error: This run was begun with data of fingerprint" in resumed.err
    build(here, stories_text, smollm2_gguf, tmp_path / "c")
    assert "make the shards with the teacher's tokenizer" in here.refusal(
        "retrain", converted, tmp_path / "y", "--data", tmp_path / "c", *options
    )
