"""The commands on a published checkpoint, and the model card."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from test_cli import Here, here  # noqa: F401 (a fixture)
from transformers import AutoModelForCausalLM, AutoTokenizer

from power_retention.models import BrumbyConfig, BrumbyForCausalLM
from tiny_models import SHAPE, randomise


@pytest.fixture
def brumby(tmp_path: Path, stories_dir: Path) -> Path:
    """A random model of the published format, with a real tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(stories_dir)
    sizes = {"vocab_size": 512, "pad_token_id": None, "head_dim": 16}
    randomise(BrumbyForCausalLM(BrumbyConfig(**{**SHAPE, **sizes}))).save_pretrained(tmp_path / "brumby")
    tokenizer.save_pretrained(tmp_path / "brumby")
    return tmp_path / "brumby"


def test_it_writes(brumby: Path, here: Here) -> None:  # noqa: F811
    result = here(
        "generate", brumby, "Once upon a time", "--max-new-tokens", "8", "--repetition-penalty", "1.0", "--json"
    )
    written = json.loads(result.out)["text"]
    model, tokenizer = AutoModelForCausalLM.from_pretrained(brumby).eval(), AutoTokenizer.from_pretrained(brumby)
    ids = tokenizer("Once upon a time", return_tensors="pt").input_ids
    with torch.no_grad():
        for _ in range(8):
            ids = torch.cat((ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)), 1)
    assert tokenizer.decode(ids[0], skip_special_tokens=True).endswith(written)
    assert len(written) > 5


def test_its_card(brumby: Path, here: Here) -> None:  # noqa: F811
    assert "has no recovery table" in " ".join(here("card", brumby).out.split())
    (brumby / "evaluation").mkdir()
    loss = {"loss": 3.5, "kl": 0.4, "recovered": 0.96}
    (brumby / "evaluation" / "evaluation.json").write_text(json.dumps({"losses": {"retrained": loss}}))
    made = json.loads(here("card", brumby, "--json").out)
    assert (made["written"], made["recovery"]) == (True, True)
    assert "| retrained | 3.500 | 0.400 | 96% |" in Path(made["card"]).read_text()
    (brumby / "README.md").write_text("All mine.")
    assert "is left as it is" in " ".join(here("card", brumby).out.split())
    assert (brumby / "README.md").read_text() == "All mine."


def test_a_transformer_gets_no_card(stories_dir: Path, tmp_path: Path, here: Here) -> None:  # noqa: F811
    assert "is not a power-retention model but a 'llama' one" in here.refusal("card", stories_dir)
    assert here.refusal("card", tmp_path).endswith("holds no model (no config.json).")
