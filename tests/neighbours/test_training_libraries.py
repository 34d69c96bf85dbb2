"""PEFT and TRL train a converted model as they train any other."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from power_retention import swap_attention
from power_retention.errors import ArgumentError
from power_retention.models import PowerRetentionForCausalLM
from tiny_models import assert_close, tiny_model, tiny_parent, tokens

peft = pytest.importorskip("peft", reason="pip install power-retention[neighbours]")
# PEFT still asks the library for a name that it is giving up.
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")

PROJECTIONS = ["q_proj", "k_proj", "v_proj", "g_proj", "o_proj"]


def lora(**options: Any) -> Any:
    return peft.LoraConfig(r=4, lora_alpha=8, target_modules=PROJECTIONS, task_type="CAUSAL_LM", **options)


def train(model: Any, steps: int = 8) -> list[float]:
    ids = tokens(2, 24)
    optimizer = torch.optim.AdamW([value for value in model.parameters() if value.requires_grad], lr=1e-2)
    losses = []
    for _ in range(steps):
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        losses.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return losses


class TestPEFT:
    @pytest.mark.parametrize("kind", ["llama", "starcoder2", "qwen3_moe"])
    def test_lora_trains_the_adapters_and_nothing_else(self, kind: str, tmp_path: Path) -> None:
        student = swap_attention(tiny_parent(kind))
        frozen = {name: value.detach().clone() for name, value in student.state_dict().items()}
        model = peft.get_peft_model(student, lora())
        losses = train(model)
        assert losses[-1] < losses[0] - 0.1
        now = model.get_base_model().state_dict()
        for name, value in frozen.items():
            stored = name if name in now else name.replace("_proj.", "_proj.base_layer.")
            assert now[stored].equal(value), name
        with torch.no_grad():
            wanted = model(input_ids=tokens(1, 12)).logits
            model.save_pretrained(tmp_path)
            again = swap_attention(tiny_parent(kind))
            again.load_state_dict(frozen)
            loaded = peft.PeftModel.from_pretrained(again, tmp_path)
            assert_close(loaded(input_ids=tokens(1, 12)).logits, wanted)
            merged = loaded.merge_and_unload()
            assert type(merged) is PowerRetentionForCausalLM
            assert_close(merged(tokens(1, 12)).logits, wanted)

    def test_key_biases_and_gates_in_full_beside_the_adapters(self) -> None:
        """What is no linear layer, or too small to factor, is trained as it is: ``modules_to_save``, ``requires_grad``."""
        model = peft.get_peft_model(tiny_model(), lora(modules_to_save=["norm"]))
        for mixer in model.get_base_model().mixers:
            mixer.k_bias.requires_grad_(True)
        before = [mixer.k_bias.detach().clone() for mixer in model.get_base_model().mixers]
        train(model, steps=2)
        for mixer, value in zip(model.get_base_model().mixers, before, strict=True):
            assert not mixer.k_bias.equal(value)

    def test_generation_with_an_adapter(self) -> None:
        model = peft.get_peft_model(tiny_model(), lora(init_lora_weights=False)).eval()
        options = {"do_sample": False, "output_logits": True, "return_dict_in_generate": True, "max_new_tokens": 5}
        out = model.generate(input_ids=tokens(1, 9), **options)
        with torch.no_grad():
            assert_close(torch.stack(out.logits, 1), model(input_ids=out.sequences, use_cache=False).logits[:, 8:-1])


class TestPacking:
    """How packed batches arrive: borders under the library's name, or position ids that start again."""

    rows = tuple(tokens(length, seed=length) for length in (5, 9, 14))
    packed = torch.cat(rows)[None]
    positions = torch.cat([torch.arange(len(row)) for row in rows])[None]
    borders = torch.tensor([0, 5, 14, 28], dtype=torch.int32)

    @pytest.mark.parametrize(
        "arguments", [{"cu_seq_lens_q": borders}, {"position_ids": positions}, {"cu_seqlens": borders}]
    )
    @torch.no_grad()
    def test_no_sequence_reads_another(self, arguments: dict[str, Tensor]) -> None:
        model = tiny_model()
        got = model(self.packed, use_cache=False, **arguments).logits[0]
        alone = torch.cat([model(row[None], use_cache=False).logits[0] for row in self.rows])
        assert_close(got, alone)
        leaking = model(self.packed, use_cache=False).logits[0]
        assert (leaking - alone)[5:].abs().max() > 0.1, "the sequences would not have met"

    def test_several_packed_rows_are_refused(self) -> None:
        with pytest.raises(ArgumentError, match="start again within rows of a batch of 2"):
            tiny_model()(self.packed.repeat(2, 1), position_ids=self.positions.repeat(2, 1))


class TestTRL:
    @pytest.fixture
    def trainer_of(self, stories_dir: Path, stories_text: Path, tmp_path: Path) -> Any:
        trl = pytest.importorskip("trl", reason="pip install power-retention[neighbours]")
        from datasets import Dataset
        from transformers import AutoModelForCausalLM, AutoTokenizer

        stories = [json.loads(line)["text"][:300] for line in stories_text.read_text().splitlines()[:24]]

        def build(**options: Any) -> Any:
            model = swap_attention(AutoModelForCausalLM.from_pretrained(stories_dir))
            arguments = trl.SFTConfig(
                output_dir=str(tmp_path / "sft"),
                max_steps=6,
                per_device_train_batch_size=4,
                learning_rate=2e-3,
                max_length=96,
                packing=options.pop("packing", False),
                logging_steps=1,
                save_strategy="no",
                report_to=[],
                use_cpu=True,
                bf16=False,
                disable_tqdm=True,
                activation_checkpointing=options.pop("activation_checkpointing", False),
            )
            return trl.SFTTrainer(
                model=model,
                args=arguments,
                train_dataset=Dataset.from_dict({"text": stories}),
                processing_class=AutoTokenizer.from_pretrained(stories_dir),
                **options,
            )

        return build

    @staticmethod
    def losses(trainer: Any) -> list[float]:
        trainer.train()
        return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    @pytest.mark.parametrize("packing", [False, True])
    def test_fine_tuning(self, packing: bool, trainer_of: Any) -> None:
        losses = self.losses(trainer_of(packing=packing))
        assert sum(losses[-2:]) < sum(losses[:2]) - 0.5

    def test_packed_batches_do_not_leak(self, trainer_of: Any) -> None:
        """The very batch that the trainer makes, against its sequences one by one."""
        trainer = trainer_of(packing=True)
        batch = next(iter(trainer.get_train_dataloader()))
        model = trainer.model.eval()
        with torch.no_grad():
            packed = model(**{name: value for name, value in batch.items() if name != "labels"}, use_cache=False).logits
            sizes = batch["cu_seq_lens_q"].diff().tolist()
            alone = [model(row, use_cache=False).logits for row in batch["input_ids"].split(sizes, dim=1)]
        assert len(sizes) > 3
        assert_close(packed, torch.cat(alone, 1))

    def test_with_an_adapter_and_checkpointing(self, trainer_of: Any) -> None:
        losses = self.losses(trainer_of(peft_config=lora(), activation_checkpointing=True))
        assert losses[-1] < losses[0]
