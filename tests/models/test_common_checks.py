"""The library's own common model checks, on every variant and every published format.

``ModelTesterMixin``, ``GenerationTesterMixin`` and ``ConfigTester`` are not in the library's wheel; these are the checks of
theirs that a language model without attention weights can be asked, written anew.  Not among them: attention outputs, head
masks, attention implementations and their compilation, key/value cache formats (there are none), and encoder-decoder parts.
Left and right padding, packing, checkpointing and saving are in ``test_modeling.py``.
"""

from __future__ import annotations

import copy
import functools
import inspect
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from power_retention.models import BrumbyConfig, PowerCoderConfig, PowerRetentionConfig, PowerRetentionForCausalLM
from tiny_models import SHAPE, VARIANTS, assert_close, randomise, tiny_config, tokens

CONFIGS: dict[str, PowerRetentionConfig] = {
    **{name: tiny_config(**options) for name, options in VARIANTS.items()},
    "brumby": BrumbyConfig(**SHAPE, head_dim=16),
    "powercoder": PowerCoderConfig(**SHAPE),
}
every_kind = pytest.mark.parametrize("kind", CONFIGS)


@functools.cache
def shared(kind: str) -> PowerRetentionForCausalLM:
    """Not to be changed."""
    return fresh(kind)


def fresh(kind: str) -> PowerRetentionForCausalLM:
    model: PowerRetentionForCausalLM = randomise(AutoModelForCausalLM.from_config(copy.deepcopy(CONFIGS[kind]))).eval()
    return model


def logits(model: Any, *arguments: Any, **options: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(*arguments, **options).logits
    return found


@every_kind
class TestConfiguration:
    def test_json_and_back(self, kind: str, tmp_path: Path) -> None:
        config = copy.deepcopy(CONFIGS[kind])
        again = type(config).from_dict(json.loads(json.dumps(config.to_dict(), default=str)))
        assert again.to_dict() == config.to_dict()
        config.save_pretrained(tmp_path)
        assert AutoConfig.from_pretrained(tmp_path).to_dict() == {**config.to_dict(), "_name_or_path": str(tmp_path)}
        assert pickle.loads(pickle.dumps(config)).to_dict() == config.to_dict()

    def test_made_of_nothing(self, kind: str) -> None:
        """Defaults that fit together, and the library's common names."""
        config = type(CONFIGS[kind])()
        assert config.hidden_size % config.num_attention_heads == 0
        for name in ("vocab_size", "hidden_size", "num_attention_heads", "num_hidden_layers"):
            setattr(config, name, 12)
            assert getattr(config, name) == 12

    def test_unknown_fields_are_kept(self, kind: str, tmp_path: Path) -> None:
        config = type(CONFIGS[kind])(**SHAPE, somebody_elses_field=[1, 2])
        config.save_pretrained(tmp_path)
        assert AutoConfig.from_pretrained(tmp_path).somebody_elses_field == [1, 2]


@every_kind
class TestModel:
    def test_signature(self, kind: str) -> None:
        names = list(inspect.signature(shared(kind).forward).parameters)
        assert names[:4] == ["input_ids", "attention_mask", "position_ids", "past_key_values"]

    def test_determinism(self, kind: str) -> None:
        assert logits(shared(kind), tokens(2, 12)).equal(logits(shared(kind), tokens(2, 12)))

    def test_rows_do_not_depend_on_their_batch(self, kind: str) -> None:
        ids = tokens(3, 12)
        alone = torch.cat([logits(shared(kind), row[None]) for row in ids])
        assert_close(logits(shared(kind), ids), alone)

    def test_tuple_and_dictionary_say_the_same(self, kind: str) -> None:
        options = {"output_hidden_states": True, "labels": tokens(2, 9)}
        with torch.no_grad():
            named = shared(kind)(tokens(2, 9), return_dict=True, **options)
            plain = shared(kind)(tokens(2, 9), return_dict=False, **options)
        assert len(plain) == len(named.to_tuple())
        assert plain[0].equal(named.loss)
        assert plain[1].equal(named.logits)

    def test_hidden_states(self, kind: str) -> None:
        model = shared(kind)
        with torch.no_grad():
            states = model(tokens(2, 9), output_hidden_states=True).hidden_states
        assert len(states) == model.config.num_hidden_layers + 1
        assert {tuple(state.shape) for state in states} == {(2, 9, model.config.hidden_size)}
        assert_close(model.lm_head(states[-1]), logits(model, tokens(2, 9)))

    def test_gradients_reach_hidden_states_and_embeddings(self, kind: str) -> None:
        model = fresh(kind)
        outputs = model(tokens(1, 9), output_hidden_states=True, use_cache=False)
        for state in outputs.hidden_states:
            state.retain_grad()
        outputs.logits.square().mean().backward()
        assert all(state.grad.abs().sum() > 0 for state in outputs.hidden_states[:-1])
        used = [value for name, value in model.named_parameters() if "experts" not in name]
        assert all(value.grad is not None and value.grad.isfinite().all() for value in used)

    def test_training_lowers_the_loss(self, kind: str) -> None:
        model, ids = fresh(kind).train(), tokens(2, 16)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        losses = []
        for _ in range(6):
            loss = model(ids, labels=ids, use_cache=False).loss
            losses.append(float(loss.detach()))
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        assert losses[-1] < losses[0]

    def test_initial_weights(self, kind: str) -> None:
        """Linear layers, embeddings and experts around 0 with the configured spread; norms 1; biases of the trunk 0."""
        model = AutoModelForCausalLM.from_config(copy.deepcopy(CONFIGS[kind]))
        std = model.config.initializer_range
        for name, value in model.state_dict().items():
            if "g_proj" in name or "k_bias" in name:
                continue  # of the mixer, see its own tests
            if "norm" in name:
                assert (value == (1 if name.endswith("weight") else 0)).all(), name
            elif name.endswith("bias"):
                assert not value.any(), name
            else:
                assert abs(float(value.mean())) < 5 * std / value.numel() ** 0.5, name
                assert float(value.std()) == pytest.approx(std, rel=0.3), name

    def test_every_missing_weight_is_initialised(self, kind: str, tmp_path: Path) -> None:
        """A checkpoint without layers loads onto freshly initialised ones, not onto whatever memory held."""
        model = fresh(kind)
        kept = {name: value for name, value in model.state_dict().items() if "layers." not in name}
        model.save_pretrained(tmp_path, state_dict=kept)
        loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
        assert len(info["missing_keys"]) >= len([name for name, _ in model.named_parameters() if "layers." in name])
        for name, value in loaded.named_parameters():
            assert value.isfinite().all(), name
            assert value.abs().max() < 10, name
        assert logits(loaded, tokens(1, 9)).isfinite().all()

    def test_other_sizes_can_be_ignored_and_are_otherwise_refused(self, kind: str, tmp_path: Path) -> None:
        fresh(kind).save_pretrained(tmp_path)
        with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
            AutoModelForCausalLM.from_pretrained(tmp_path, vocab_size=50)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path, vocab_size=50, ignore_mismatched_sizes=True)
        assert logits(loaded, tokens(1, 9) % 50).shape == (1, 9, 50)

    def test_more_tokens_and_fewer(self, kind: str) -> None:
        model, ids = fresh(kind), tokens(1, 9)
        before = logits(model, ids)
        model.resize_token_embeddings(97 + 10, mean_resizing=False)
        assert model.config.vocab_size == model.lm_head.out_features == 107
        assert (model.lm_head.weight is model.model.embed_tokens.weight) == model.config.tie_word_embeddings
        assert_close(logits(model, ids)[..., :97], before)
        model.resize_token_embeddings(60)
        assert_close(logits(model, ids.clamp(max=59)), logits(fresh(kind), ids.clamp(max=59))[..., :60])

    def test_embeddings_can_be_put_in(self, kind: str) -> None:
        model = fresh(kind)
        model.set_input_embeddings(nn.Embedding(97, model.config.hidden_size))
        assert model.get_input_embeddings() is model.model.embed_tokens
        assert isinstance(model.get_output_embeddings(), nn.Linear)

    def test_tied_weights_are_one(self, kind: str, tmp_path: Path) -> None:
        model = fresh(kind)
        tied = model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
        assert tied == model.config.tie_word_embeddings
        model.save_pretrained(tmp_path)
        loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
        assert not any(info.values()), info
        assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_loaded_in_half_precision(self, kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
        fresh(kind).save_pretrained(tmp_path)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
        assert {value.dtype for value in loaded.parameters()} == {dtype}
        assert loaded.model.rotary_emb.inv_freq.dtype == torch.float32
        out = logits(loaded, tokens(1, 16))
        assert out.dtype == dtype
        assert out.isfinite().all()

    def test_copied_and_pickled(self, kind: str) -> None:
        model = fresh(kind)
        wanted = logits(model, tokens(1, 9))
        assert logits(copy.deepcopy(model), tokens(1, 9)).equal(wanted)
        assert logits(pickle.loads(pickle.dumps(model)), tokens(1, 9)).equal(wanted)

    def test_built_on_meta_and_filled(self, kind: str) -> None:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(copy.deepcopy(CONFIGS[kind]))
        assert all(value.is_meta for value in model.parameters())
        filled = shared(kind).state_dict()
        model.load_state_dict(filled, assign=True)
        assert {name for name, value in model.state_dict().items() if value.is_meta} == set()


@every_kind
class TestGeneration:
    options: dict[str, Any] = {"max_new_tokens": 5, "pad_token_id": 0, "eos_token_id": None}  # noqa: RUF012

    def rows(self, kind: str, **options: Any) -> torch.Tensor:
        torch.manual_seed(0)
        found: torch.Tensor = shared(kind).generate(tokens(2, 8), **{**self.options, **options})
        return found

    @pytest.mark.parametrize(
        "mode",
        [
            {"do_sample": False},
            {"do_sample": True, "top_k": 5},
            {"do_sample": False, "num_beams": 3},
            {"do_sample": True, "num_beams": 2},
            {"do_sample": False, "repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
        ],
        ids=["greedy", "sample", "beams", "beam sample", "penalties"],
    )
    def test_with_and_without_a_cache(self, kind: str, mode: dict[str, Any]) -> None:
        with_cache, without = self.rows(kind, **mode), self.rows(kind, use_cache=False, **mode)
        assert with_cache.shape == (2, 13)
        assert with_cache.equal(without)

    def test_several_sequences_each(self, kind: str) -> None:
        assert self.rows(kind, do_sample=True, num_return_sequences=3).shape == (6, 13)

    def test_continued_from_its_own_cache(self, kind: str) -> None:
        model, options = shared(kind), {**self.options, "do_sample": False, "return_dict_in_generate": True}
        whole = model.generate(tokens(2, 8), **{**options, "max_new_tokens": 8})
        first = model.generate(tokens(2, 8), **{**options, "max_new_tokens": 3})
        rest = model.generate(first.sequences, past_key_values=first.past_key_values, **options)
        assert rest.sequences.equal(whole.sequences)

    def test_from_embeddings(self, kind: str) -> None:
        model = shared(kind)
        embedded = model.get_input_embeddings()(tokens(2, 8))
        out = model.generate(inputs_embeds=embedded, **self.options, do_sample=False)
        assert out.equal(self.rows(kind, do_sample=False)[:, 8:])

    def test_hidden_states_of_every_step(self, kind: str) -> None:
        out = shared(kind).generate(
            tokens(2, 8), **self.options, do_sample=False, output_hidden_states=True, return_dict_in_generate=True
        )
        steps = [step[-1].shape[1] for step in out.hidden_states]
        assert steps == [8, 1, 1, 1, 1]

    def test_a_saved_generation_configuration(self, kind: str, tmp_path: Path) -> None:
        model = fresh(kind)
        model.generation_config = GenerationConfig(max_new_tokens=2, do_sample=False, pad_token_id=0)
        model.save_pretrained(tmp_path)
        assert AutoModelForCausalLM.from_pretrained(tmp_path).generate(tokens(1, 4)).shape == (1, 6)
