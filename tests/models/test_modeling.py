"""The model as a whole: however its tokens are cut, padded, packed or saved, the logits are the same."""

from __future__ import annotations

import functools
import logging
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

from power_retention.errors import ArgumentError
from power_retention.models import PowerRetentionCache, PowerRetentionForCausalLM
from tiny_models import PADDING, VARIANTS, assert_close, tiny_config, tiny_model, tokens

every_variant = pytest.mark.parametrize("variant", VARIANTS)


@functools.cache
def model_of(variant: str, dtype: torch.dtype = torch.float32) -> PowerRetentionForCausalLM:
    """Built once; not to be changed."""
    model = tiny_model(**VARIANTS[variant]).to(dtype)
    if dtype == torch.float64:
        model.set_experts_implementation("eager")  # PyTorch's grouped products know no float64
    return model


@pytest.fixture
def model() -> PowerRetentionForCausalLM:
    return tiny_model()


@torch.no_grad()
def full_logits(model: PowerRetentionForCausalLM, ids: Tensor) -> Tensor:
    return model(ids, use_cache=False).logits


def padded(rows: list[Tensor], side: str) -> tuple[Tensor, Tensor]:
    """(ids, attention mask) of sequences of unequal length."""
    longest = max(map(len, rows))
    pads = [torch.full((longest - len(row),), PADDING) for row in rows]
    ids = torch.stack(
        [torch.cat((pad, row) if side == "left" else (row, pad)) for row, pad in zip(rows, pads, strict=True)]
    )
    return ids, (ids != PADDING).long()


class TestFile:
    @every_variant
    def test_saved_and_loaded_it_is_the_same(self, variant: str, tmp_path: Path) -> None:
        model = model_of(variant)
        model.save_pretrained(tmp_path)
        loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
        assert not any(info.values()), info
        assert type(loaded) is PowerRetentionForCausalLM
        assert AutoConfig.from_pretrained(tmp_path).to_diff_dict() == loaded.config.to_diff_dict()
        assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == model.config.tie_word_embeddings
        assert full_logits(loaded, tokens(1, 20)).equal(full_logits(model, tokens(1, 20)))

    def test_a_missing_weight_is_initialised_as_documented(
        self, model: PowerRetentionForCausalLM, tmp_path: Path
    ) -> None:
        """What attention has not is given its documented start, whoever builds the model."""
        kept = {
            name: value for name, value in model.state_dict().items() if "g_proj" not in name and "k_bias" not in name
        }
        model.save_pretrained(tmp_path, state_dict=kept)
        loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
        assert len(info["missing_keys"]) == 3 * len(model.model.layers)
        mixer = loaded.model.layers[0].self_attn
        assert (mixer.g_proj.bias == 6).all()
        assert not mixer.g_proj.weight.any()
        assert not mixer.k_bias.any()

    @pytest.mark.parametrize(
        ("changes", "message"),
        [({"power": 3}, "even"), ({"num_attention_heads": 3, "num_key_value_heads": 2}, "must be a multiple of")],
    )
    def test_numbers_that_do_not_fit_are_refused(self, changes: dict[str, int], message: str) -> None:
        with pytest.raises(Exception, match=message):
            tiny_config(**changes)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_rotary_frequencies_keep_their_digits(model: PowerRetentionForCausalLM, dtype: torch.dtype) -> None:
    wanted = model.model.rotary_emb.inv_freq.clone()
    model.to(dtype)
    assert model.model.rotary_emb.inv_freq.equal(wanted)
    assert model.lm_head.weight.dtype == dtype
    assert model.to("meta").model.rotary_emb.inv_freq.is_meta


class TestCuts:
    @staticmethod
    @torch.no_grad()
    def in_pieces(model: PowerRetentionForCausalLM, ids: Tensor, pieces: list[int]) -> Tensor:
        cache, logits = PowerRetentionCache(2), []
        for piece in ids.split(pieces, dim=1):
            logits.append(model(piece, past_key_values=cache).logits)
        assert cache.get_seq_length() == ids.shape[1]
        return torch.cat(logits, 1)

    @every_variant
    @settings(max_examples=8)
    @given(lengths=st.lists(st.sampled_from([1, 1, 2, 3, 5, 8, 13]), min_size=1, max_size=10))
    def test_any_pieces_through_the_cache(self, variant: str, lengths: list[int]) -> None:
        """In float64: after two or three tokens a random query may have next to no weight, and float32 shows it."""
        model, ids = model_of(variant, torch.float64), tokens(2, sum(lengths))
        assert_close(self.in_pieces(model, ids, lengths), full_logits(model, ids))

    @every_variant
    def test_a_prompt_in_two_pieces_then_steps(self, variant: str) -> None:
        model, ids = model_of(variant), tokens(2, 40)
        assert_close(self.in_pieces(model, ids, [11, 21, *[1] * 8]), full_logits(model, ids))

    @every_variant
    def test_the_logits_that_generation_sees(self, variant: str) -> None:
        model, prompt = model_of(variant), tokens(2, 21)
        out = model.generate(
            prompt, max_new_tokens=12, do_sample=False, output_logits=True, return_dict_in_generate=True
        )
        assert_close(torch.stack(out.logits, 1), full_logits(model, out.sequences)[:, 20:-1])

    def test_gradients_flow_through_the_cache(self, model: PowerRetentionForCausalLM) -> None:
        ids = tokens(1, 24)
        model(ids, use_cache=False).logits.square().mean().backward()
        wanted = {name: value.grad for name, value in model.named_parameters()}
        model.zero_grad()
        cache, squares = PowerRetentionCache(2), []
        for piece in ids.split([10, 1, 13], dim=1):
            squares.append(model(piece, past_key_values=cache).logits.square())
        torch.cat(squares, 1).mean().backward()
        for name, value in model.named_parameters():
            assert value.grad.norm() > 0, name
            assert_close(value.grad, wanted[name])

    def test_embeddings_instead_of_ids(self, model: PowerRetentionForCausalLM) -> None:
        ids = tokens(1, 9)
        embedded = model.get_input_embeddings()(ids)
        assert model(inputs_embeds=embedded).logits.equal(model(ids).logits)
        with pytest.raises(ArgumentError, match="exactly one of input_ids and inputs_embeds"):
            model(ids, inputs_embeds=embedded)

    def test_only_the_last_logits(self, model: PowerRetentionForCausalLM) -> None:
        assert_close(model(tokens(2, 9), logits_to_keep=1).logits, model(tokens(2, 9)).logits[:, -1:])

    def test_without_a_cache_none_is_made(self, model: PowerRetentionForCausalLM) -> None:
        assert model(tokens(1, 4), use_cache=False).past_key_values is None
        out = model.generate(tokens(1, 4), max_new_tokens=3, use_cache=False, return_dict_in_generate=True)
        assert out.past_key_values is None


class TestPadding:
    rows = tuple(tokens(length, seed=length) for length in (7, 19, 30))

    @every_variant
    @pytest.mark.parametrize("side", ["left", "right"])
    def test_ragged_rows_equal_each_row_alone(self, variant: str, side: str) -> None:
        model = model_of(variant)
        ids, mask = padded(list(self.rows), side)
        logits = model(ids, attention_mask=mask).logits
        for row, got, kept in zip(self.rows, logits, mask.bool(), strict=True):
            assert_close(got[kept], full_logits(model, row[None])[0])

    @pytest.mark.parametrize("side", ["left", "right"])
    def test_steps_after_a_padded_prompt(self, side: str) -> None:
        """The state after a padded prompt is the state after the prompt alone, on either side."""
        model, more = model_of("llama"), tokens(3, 4, seed=9)
        ids, mask = padded(list(self.rows), side)
        got = []
        with torch.no_grad():
            cache = model(ids, attention_mask=mask).past_key_values
            for step in more.split(1, dim=1):
                mask = torch.cat((mask, torch.ones(3, 1, dtype=torch.long)), 1)
                got.append(model(step, attention_mask=mask, past_key_values=cache).logits)
        for i, row in enumerate(self.rows):
            wanted = full_logits(model, torch.cat((row, more[i]))[None])[0, -4:]
            assert_close(torch.cat(got, 1)[i], wanted)

    def test_generation_from_a_left_padded_batch(self) -> None:
        model = model_of("llama")
        ids, mask = padded(list(self.rows), "left")
        options = {"max_new_tokens": 6, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
        together = torch.stack(model.generate(ids, attention_mask=mask, **options).logits, 1)
        for row, got in zip(self.rows, together, strict=True):
            assert_close(got, torch.cat(model.generate(row[None], **options).logits))

    def test_the_padding_is_what_the_mask_says(self) -> None:
        """Negative control: without its mask, padding is read like any other token."""
        model = model_of("llama")
        ids, mask = padded(list(self.rows), "left")
        difference = model(ids).logits[0, -1] - model(ids, attention_mask=mask).logits[0, -1]
        assert difference.abs().max() > 0.1

    @pytest.mark.parametrize("shape", [(1, 1, 6, 6), (1, 5)])
    def test_other_masks_are_refused(self, model: PowerRetentionForCausalLM, shape: tuple[int, ...]) -> None:
        with pytest.raises(ArgumentError, match=r"attention_mask must be \[B, T\] with 0 at padding and T ≥ 6"):
            model(tokens(1, 6), attention_mask=torch.ones(shape))


class TestPacking:
    @every_variant
    @pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
    def test_packed_sequences_equal_each_alone(self, variant: str, dtype: torch.dtype) -> None:
        model, rows = model_of(variant), TestPadding.rows
        borders = torch.tensor([0, 7, 26, 56], dtype=dtype)
        packed = model(torch.cat(rows)[None], cu_seqlens=borders).logits[0]
        for row, got in zip(rows, packed.split([7, 19, 30]), strict=True):
            assert_close(got, full_logits(model, row[None])[0])

    def test_a_packed_row_leaves_no_cache(self, model: PowerRetentionForCausalLM) -> None:
        assert model(tokens(1, 8), cu_seqlens=torch.tensor([0, 3, 8]), use_cache=True).past_key_values is None


class TestRefusals:
    def test_a_cache_of_keys_and_values(self, model: PowerRetentionForCausalLM) -> None:
        with pytest.raises(
            ArgumentError, match="is a DynamicCache; a power-retention model needs a PowerRetentionCache"
        ):
            model(tokens(1, 4), past_key_values=DynamicCache())
        with pytest.raises(ArgumentError, match="is a DynamicCache"):
            model.generate(tokens(1, 4), past_key_values=DynamicCache(), max_new_tokens=2)

    @pytest.mark.parametrize("implementation", ["static", "quantized", "offloaded"])
    def test_another_cache_implementation(self, model: PowerRetentionForCausalLM, implementation: str) -> None:
        with pytest.raises(ArgumentError, match=f"cache_implementation='{implementation}' is a key/value cache"):
            model.generate(tokens(1, 4), cache_implementation=implementation, max_new_tokens=2)

    def test_packed_rows_with_a_cache(self, model: PowerRetentionForCausalLM) -> None:
        with pytest.raises(ArgumentError, match="read without a cache"):
            model(tokens(1, 8), cu_seqlens=torch.tensor([0, 3, 8]), past_key_values=PowerRetentionCache(2))


class TestTraining:
    @staticmethod
    def gradients(model: PowerRetentionForCausalLM) -> dict[str, Tensor]:
        model.train().zero_grad()
        ids = tokens(2, 33)
        model(ids, labels=ids, use_cache=False).loss.backward()
        return {name: value.grad.clone() for name, value in model.named_parameters()}

    @pytest.mark.parametrize("reentrant", [False, True])
    def test_checkpointing_changes_no_gradient(self, model: PowerRetentionForCausalLM, reentrant: bool) -> None:
        wanted = self.gradients(model)
        model.activation_checkpointing_enable({"use_reentrant": reentrant})
        if reentrant:
            model.enable_input_require_grads()
        calls = 0

        def count(*_: object) -> None:
            nonlocal calls
            calls += 1

        model.model.layers[0].self_attn.register_forward_pre_hook(count)
        got = self.gradients(model)
        assert calls == 2, "the layer was not computed again"
        for name, value in got.items():
            assert_close(value, wanted[name])

    def test_labels_give_the_usual_loss(self, model: PowerRetentionForCausalLM) -> None:
        ids = tokens(2, 15)
        labels = ids.masked_fill(ids % 3 == 0, -100)
        logits = full_logits(model, ids)[:, :-1].flatten(0, 1)
        assert_close(model(ids, labels=labels).loss, torch.nn.functional.cross_entropy(logits, labels[:, 1:].flatten()))

    @pytest.mark.parametrize("variant", ["qwen3-moe", "glm-4.5"])
    @pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
    def test_every_way_of_computing_experts(self, variant: str, implementation: str) -> None:
        model, ids = tiny_model(**VARIANTS[variant]), tokens(2, 20)
        model.set_experts_implementation(implementation)
        with torch.no_grad():
            assert_close(model(ids, use_cache=False).logits, full_logits(model_of(variant), ids))

    @pytest.mark.parametrize("variant", ["llama", "qwen3, wide heads", "starcoder2", "qwen3-moe", "glm-4.5"])
    def test_compiled_without_a_graph_break(self, variant: str) -> None:
        model, ids = model_of(variant), tokens(2, 20)
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        with torch.no_grad():
            assert_close(compiled(ids, use_cache=False).logits, full_logits(model, ids))

    @pytest.mark.parametrize("variant", ["llama", "p = 4"])
    @torch.no_grad()
    def test_compiled_with_a_cache(self, variant: str) -> None:
        """A prompt and steps through a compiled forward."""
        model, ids = model_of(variant), tokens(1, 44)
        compiled, cache, logits = torch.compile(model, backend="aot_eager"), PowerRetentionCache(2), []
        for piece in ids.split([40, 1, 1, 2], dim=1):
            logits.append(compiled(piece, past_key_values=cache).logits)
        assert_close(torch.cat(logits, 1), full_logits(model, ids))


@pytest.mark.parametrize(("key_bias", "length", "said"), [(True, 256, 0), (True, 258, 1), (False, 258, 0)])
def test_a_key_bias_beyond_its_positions_is_said_once(
    key_bias: bool, length: int, said: int, caplog: pytest.LogCaptureFixture
) -> None:
    logging.Logger.warning_once.cache_clear()  # type: ignore[attr-defined]
    model = tiny_model(key_bias=key_bias)  # made for 256 positions
    cache = PowerRetentionCache(model.config.num_hidden_layers)
    for part in (*tokens(1, length - 2).split(100, 1), *tokens(1, 2).split(1, 1)):
        model(part, past_key_values=cache, use_cache=True)
    heard = [record for record in caplog.records if "without --key-bias" in record.getMessage()]
    assert len(heard) == said
