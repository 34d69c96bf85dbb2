"""The family: built in seconds without memory, and as large as its parents are published to be."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from power_retention.conversion.presets import preset, presets, resolve_config
from power_retention.errors import SourceError
from power_retention.models import BrumbyConfig, PowerRetentionForCausalLM
from power_retention.models.sizes import count_parameters
from tiny_models import tiny_config, tiny_parent

every_preset = pytest.mark.parametrize("name", presets())


@every_preset
def test_the_parent_is_as_large_as_published_and_the_mixers_add_what_they_say(name: str) -> None:
    started, made = time.perf_counter(), preset(name)
    with torch.device("meta"):
        parent = AutoModelForCausalLM.from_config(made.parent_config())
        student = PowerRetentionForCausalLM(made.config())
    assert time.perf_counter() - started < 20
    assert all(value.is_meta for value in student.parameters())
    shapes = {key: value.shape for key, value in parent.named_parameters()}
    if made.parameters % 10**9:
        assert parent.num_parameters() == made.parameters
    else:
        assert parent.num_parameters() == pytest.approx(made.parameters, rel=0.01), "published as rounded"
    ours = {key: value.shape for key, value in student.named_parameters()}
    assert ours.items() >= shapes.items()
    config = made.config()
    assert not config.key_bias
    added = (config.hidden_size + 1) * config.num_key_value_heads * config.num_hidden_layers
    assert count_parameters(config) == parent.num_parameters() + added


def test_the_family_reaches_from_135_million_past_100_billion() -> None:
    sizes = [made.parameters for made in presets().values()]
    assert (min(sizes), len(sizes)) == (134_515_008, 13)
    assert sum(size > 1e11 for size in sizes) == 2


def test_a_wrong_field_would_be_seen() -> None:
    """Negative control: one layer less is another number of parameters."""
    made = preset("smollm2-135m")
    config = made.parent_config()
    config.num_hidden_layers -= 1
    with torch.device("meta"):
        assert AutoModelForCausalLM.from_config(config).num_parameters() != made.parameters


def test_experts_of_the_published_sizes() -> None:
    qwen, glm = preset("Qwen3-235B-A22B").config(), preset("glm-4.5-air").config()
    assert (qwen.num_experts, qwen.router, qwen.n_shared_experts, qwen.has_experts(0)) == (128, "softmax", 0, True)
    assert (glm.num_experts, glm.router, glm.n_shared_experts) == (128, "sigmoid", 1)
    assert [glm.has_experts(layer) for layer in (0, 1, 45)] == [False, True, True]
    assert glm.rope_parameters["partial_rotary_factor"] == 0.5


class TestResolving:
    def test_presets_folders_and_parents(self, tmp_path: Path) -> None:
        assert resolve_config("QWEN3-14B").hidden_size == 5120
        BrumbyConfig().save_pretrained(tmp_path / "brumby")
        assert isinstance(resolve_config(str(tmp_path / "brumby")), BrumbyConfig)
        tiny_config(power=4).save_pretrained(tmp_path / "ours")
        assert resolve_config(str(tmp_path / "ours")).power == 4
        tiny_parent("qwen3_moe").config.save_pretrained(tmp_path / "parent")
        assert resolve_config(str(tmp_path / "parent")).num_experts == 4

    def test_what_is_not_there(self, monkeypatch: pytest.MonkeyPatch) -> None:
        with pytest.raises(SourceError, match="There is no preset 'qwen3-9b'; there are smollm2-135m"):
            preset("qwen3-9b")
        with pytest.raises(SourceError, match=r"is no preset .*, no folder with a config.json, and no hub id"):
            resolve_config("nobody/nothing")
