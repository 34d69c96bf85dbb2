"""Accelerate places a model, torchao narrows its weights, the hub gets its card."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from huggingface_hub.errors import EntryNotFoundError
from transformers import AutoModelForCausalLM, PreTrainedModel

from power_retention.errors import SourceError
from power_retention.models import PowerRetentionForCausalLM
from power_retention.models.card import write_card
from tiny_models import VARIANTS, assert_close, tiny_config, tiny_model, tokens


class TestAccelerate:
    @pytest.fixture(autouse=True)
    def accelerate(self) -> None:
        pytest.importorskip("accelerate", reason="pip install power-retention[neighbours]")

    @pytest.mark.parametrize("variant", ["llama", "starcoder2", "qwen3-moe", "glm-4.5"])
    def test_a_sharded_checkpoint_with_layers_left_on_the_disk(self, variant: str, tmp_path: Path) -> None:
        model = tiny_model(**VARIANTS[variant])
        model.save_pretrained(tmp_path, max_shard_size="20KB")
        assert len(list(tmp_path.glob("*.safetensors"))) > 1
        places = dict.fromkeys(
            ("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head", "model.layers.1"), "cpu"
        )
        placed = AutoModelForCausalLM.from_pretrained(
            tmp_path, device_map={**places, "model.layers.0": "disk"}, offload_folder=tmp_path / "offload"
        )
        assert placed.model.layers[0].self_attn.q_proj.weight.is_meta
        ids = tokens(2, 15)
        with torch.no_grad():
            assert_close(placed(ids).logits, model(ids).logits)
        options = {"do_sample": False, "max_new_tokens": 5}
        assert placed.generate(ids, **options).equal(model.generate(ids, **options))

    def test_no_layer_is_split(self) -> None:
        """A map made for two small devices puts every layer on one of them as a whole."""
        from accelerate import infer_auto_device_map

        model = tiny_model(num_hidden_layers=6)
        size = sum(value.nbytes for value in model.parameters())
        places = infer_auto_device_map(
            model, {0: size // 2, 1: size}, no_split_module_classes=model._no_split_modules, verbose=False
        )
        assert set(places.values()) == {0, 1}
        layers = [name for name in places if name.startswith("model.layers.")]
        assert all(name.count(".") == 2 for name in layers), places


class TestTorchao:
    @pytest.fixture
    def int8(self) -> Any:
        """Weights in eight bits, on the fly or while loading."""
        pytest.importorskip("torchao", reason="pip install power-retention[neighbours]")
        from torchao.quantization import Int8WeightOnlyConfig

        return Int8WeightOnlyConfig()

    wide = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32}  # noqa: RUF012

    def quantized(self, config: Any, **options: Any) -> tuple[PowerRetentionForCausalLM, PowerRetentionForCausalLM]:
        from torchao.quantization import quantize_

        model, narrow = tiny_model(**self.wide, **options), tiny_model(**self.wide, **options)
        quantize_(narrow, config)
        return model, narrow

    @pytest.mark.parametrize("variant", ["llama", "starcoder2"])
    def test_int8_weights(self, variant: str, int8: Any) -> None:
        options = {name: value for name, value in VARIANTS[variant].items() if name != "head_dim"}
        model, narrow = self.quantized(int8, **options)
        ids = tokens(2, 30)
        with torch.no_grad():
            wanted, got = model(ids).logits, narrow(ids).logits
        error = float((got - wanted).norm() / wanted.norm())
        assert 1e-4 < error < 0.05
        generated = narrow.generate(
            ids, max_new_tokens=5, do_sample=False, output_logits=True, return_dict_in_generate=True
        )
        with torch.no_grad():
            again = narrow(generated.sequences, use_cache=False).logits[:, 29:-1]
        assert_close(torch.stack(generated.logits, 1), again)

    def test_loaded_in_eight_bits(self, int8: Any, tmp_path: Path) -> None:
        from transformers import TorchAoConfig

        model = tiny_model(**self.wide)
        model.save_pretrained(tmp_path)
        loaded = AutoModelForCausalLM.from_pretrained(
            tmp_path, quantization_config=TorchAoConfig(int8, modules_to_not_convert=["lm_head"]), device_map="cpu"
        )
        with torch.no_grad():
            wanted, got = model(tokens(1, 20)).logits, loaded(tokens(1, 20)).logits
        assert float((got - wanted).norm() / wanted.norm()) < 0.05
        weight = loaded.model.layers[0].self_attn.q_proj.weight
        assert type(weight).__name__ != "Parameter"


REPORT = {
    "held_out": {"windows": 24, "length": 512},
    "losses": {
        "teacher": {"loss": 3.3, "kl": 0.0, "recovered": 1.0},
        "hard swap": {"loss": 9.546, "kl": 6.328, "recovered": 0.0},
        "retrained": {"loss": 3.562, "kl": 0.443, "recovered": 0.958},
    },
    "decode": {
        "teacher": [{"context": 4096, "milliseconds": 77.0, "cache_mb": 94.4}],
        "student": [{"context": 4096, "milliseconds": 59.0, "cache_mb": 48.7}],
    },
}


class TestHub:
    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        model = tiny_model(parent={"name": "HuggingFaceTB/SmolLM2-135M", "model_type": "llama", "fingerprint": "0"})
        folder = tmp_path / "model"
        model.save_pretrained(folder)
        (folder / "evaluation").mkdir()
        (folder / "evaluation" / "evaluation.json").write_text(json.dumps(REPORT))
        return folder

    @pytest.fixture
    def uploaded(self, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
        """What would go to the hub: the names of the files, and the card."""
        found: dict[str, str] = {}

        class Api:
            def create_repo(self, repo_id: str, **_: Any) -> Any:
                self.repo_id = repo_id
                return self

        def upload(self: Any, working_dir: str, repo_id: str, *_: Any, **__: Any) -> str:
            found["files"] = " ".join(sorted(path.name for path in Path(working_dir).iterdir()))
            found["card"] = (Path(working_dir) / "README.md").read_text()
            return repo_id

        def no_card(*_: Any, **__: Any) -> None:
            raise EntryNotFoundError("there is none yet")

        monkeypatch.setattr("transformers.utils.hub.hf_api", Api)
        monkeypatch.setattr(PreTrainedModel, "_upload_modified_files", upload)
        monkeypatch.setattr(ModelCard, "load", no_card)
        return found

    def test_pushed_with_its_recovery_table(self, folder: Path, uploaded: dict[str, str]) -> None:
        AutoModelForCausalLM.from_pretrained(folder).push_to_hub("somebody/model")
        assert {"README.md", "config.json", "model.safetensors"} <= set(uploaded["files"].split())
        card = ModelCard(uploaded["card"])
        assert card.data.base_model == "HuggingFaceTB/SmolLM2-135M"
        assert card.data.library_name == "transformers"
        assert "| retrained | 3.562 | 0.443 | 96% |" in card.text
        assert "| 4,096 | 77.0 | 59.0 | 94.4 | 48.7 |" in card.text

    def test_pushed_before_any_evaluation(self, uploaded: dict[str, str]) -> None:
        tiny_model().push_to_hub("somebody/model")
        card = ModelCard(uploaded["card"])
        assert "whose memory does not grow" in card.text
        assert "recovered" not in card.text
        assert card.data.base_model is None

    def test_a_card_that_somebody_wrote_stays(
        self, folder: Path, uploaded: dict[str, str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        theirs = ModelCard("---\nlibrary_name: transformers\n---\nThe work of three winters.\n")
        monkeypatch.setattr(ModelCard, "load", lambda *_, **__: theirs)
        AutoModelForCausalLM.from_pretrained(folder).push_to_hub("somebody/model")
        assert "three winters" in uploaded["card"]
        assert "memory does not grow" not in uploaded["card"]

    def test_written_again_after_another_evaluation(self, folder: Path) -> None:
        config = tiny_config()
        first = write_card(config, folder).read_text()
        assert write_card(config, folder, records=folder).read_text() != first

    def test_a_damaged_report(self, folder: Path) -> None:
        (folder / "evaluation" / "evaluation.json").write_text('{"losses": {"teacher": {}}}')
        with pytest.raises(
            SourceError, match=r"evaluation.json is damaged \(KeyError: 'loss'\); evaluate the model again"
        ):
            write_card(tiny_config(), folder, records=folder)
        assert not (folder / "README.md").exists()
