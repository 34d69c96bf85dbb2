"""The swap: the same object, the same parameters, the same projections, another mixer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, PreTrainedModel
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from power_retention import swap_attention
from power_retention.conversion.convert import hard_swap
from power_retention.errors import ArgumentError, SourceError
from power_retention.layers import PowerRetentionMixer
from power_retention.models import PowerRetentionConfig, PowerRetentionForCausalLM
from tiny_models import PARENTS, assert_close, tiny_parent, tokens

every_family = pytest.mark.parametrize("kind", PARENTS)
FLAGS = {
    "llama, every bias": {"qkv_bias", "out_bias", "mlp_bias"},
    "qwen2": {"qkv_bias"},
    "qwen3": {"qk_norm"},
    "qwen3_moe": {"qk_norm"},
    "glm4_moe": {"qkv_bias", "qk_norm"},
    "starcoder2": {"qkv_bias", "out_bias", "mlp_bias"},
}
NEW = ["g_proj.weight", "g_proj.bias"]


@pytest.fixture
def parent() -> PreTrainedModel:
    return tiny_parent("llama")


@pytest.mark.parametrize("key_bias", [False, True])
@every_family
def test_it_stays_the_same_object_with_the_same_parameters(kind: str, key_bias: bool) -> None:
    model = tiny_parent(kind)
    before = dict(model.named_parameters())
    values = {name: value.detach().clone() for name, value in before.items()}
    assert swap_attention(model, **{"key_bias": True} if key_bias else {}) is model
    assert type(model) is PowerRetentionForCausalLM
    after = dict(model.named_parameters())
    assert {name for name in after if name not in before} == {
        f"model.layers.{i}.self_attn.{n}" for i in (0, 1) for n in NEW + ["k_bias"] * key_bias
    }
    for name, value in before.items():
        assert after[name] is value
        assert value.equal(values[name])
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == model.config.tie_word_embeddings
    assert not any(value.is_meta for value in (*model.parameters(), *model.buffers()))


@every_family
def test_the_configuration_is_the_parents(kind: str) -> None:
    parent = PARENTS[kind]
    config = swap_attention(tiny_parent(kind), p=4, chunk_size=16, parent={"name": "mother"}).config
    assert type(config) is PowerRetentionConfig
    assert (config.power, config.chunk_size, config.parent) == (4, 16, {"name": "mother"})
    for field in ("vocab_size", "hidden_size", "num_hidden_layers", "num_key_value_heads", "rope_parameters"):
        assert getattr(config, field) == getattr(parent, field)
    flags = ("qkv_bias", "out_bias", "mlp_bias", "qk_norm")
    assert {flag for flag in flags if getattr(config, flag)} == FLAGS.get(kind, set())
    assert config.rms_norm_eps == (1e-3 if kind == "starcoder2" else parent.rms_norm_eps)
    assert [config.has_experts(layer) for layer in (0, 1)] == [False, kind.endswith("_moe")]


def softmax_inputs(parent: PreTrainedModel, ids: Tensor, positions: Tensor) -> list[dict[str, Tensor]]:
    """Each layer's q, k, v as the parent's own softmax gets them, and what its attention reads, caught on the way."""
    caught: list[dict[str, Tensor]] = []

    def attention(module: Any, q: Tensor, k: Tensor, v: Tensor, *_: Any, **__: Any) -> tuple[Tensor, None]:
        caught[-1] |= {"q": q.transpose(1, 2), "k": k.transpose(1, 2), "v": v.transpose(1, 2)}
        return q.transpose(1, 2), None

    def before(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        caught.append({"x": kwargs["hidden_states"], **dict(zip("cs", kwargs["position_embeddings"], strict=True))})

    for layer in parent.model.layers:
        layer.self_attn.register_forward_pre_hook(before, with_kwargs=True)
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS.get_interface", lambda *_: attention, raising=True
        )
        parent.model(ids, position_ids=positions, use_cache=False)
    return caught


def differences(mixer: PowerRetentionMixer, caught: dict[str, Tensor]) -> list[float]:
    """Largest differences of the mixer's queries, keys and values from the softmax's."""
    with torch.no_grad():
        q, k = mixer.queries_and_keys(caught["x"], caught["c"], caught["s"])
        v = mixer.v_proj(caught["x"]).unflatten(-1, (-1, mixer.head_dim))
    return [float((got - caught[name]).abs().max()) for name, got in (("q", q), ("k", k), ("v", v))]


@every_family
def test_queries_keys_and_values_are_those_of_the_softmax(kind: str) -> None:
    parent = tiny_parent(kind)
    caught = softmax_inputs(parent, tokens(2, 17), torch.arange(17) + torch.tensor([[0], [100]]))
    student = swap_attention(tiny_parent(kind))
    for layer, inputs in zip(student.model.layers, caught, strict=True):
        assert max(differences(layer.self_attn, inputs)) < 1e-5
        assert inputs["q"].std() > 0.3


def test_a_permuted_mapping_would_be_seen(parent: PreTrainedModel) -> None:
    """Negative control: query rows in llama.c's order of rotary pairs give other scores."""
    caught = softmax_inputs(parent, tokens(2, 17), torch.arange(17)[None])
    mixer = swap_attention(tiny_parent("llama")).model.layers[0].self_attn
    with torch.no_grad():
        rows = mixer.q_proj.weight.view(4, 2, 4, 32).transpose(1, 2).reshape(32, 32)
        mixer.q_proj.weight.copy_(rows)
    assert differences(mixer, caught[0])[0] > 0.3
    assert max(differences(mixer, caught[0])[1:]) < 1e-5


@every_family
def test_the_whole_mixer_against_the_formula(kind: str) -> None:
    """Attention written out over the parent's own projections, with the squared score in the softmax's place."""
    parent, ids = tiny_parent(kind), tokens(1, 23)
    caught = softmax_inputs(parent, ids, torch.arange(23)[None])[0]
    mixer = swap_attention(parent, key_bias=True).model.layers[0].self_attn
    torch.nn.init.normal_(mixer.k_bias, generator=torch.Generator().manual_seed(0))
    torch.nn.init.normal_(mixer.g_proj.weight, std=0.1, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        groups = caught["q"].shape[2] // caught["k"].shape[2]
        q, k, v = caught["q"][0], caught["k"][0] + mixer.k_bias, caught["v"][0]
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
        gates = torch.sigmoid(mixer.g_proj(caught["x"][0])).repeat_interleave(groups, 1)
        kept = gates.log().cumsum(0)
        decay = (kept[:, None] - kept[None]).exp()
        weights = torch.einsum("ihd,jhd->ijh", q, k) ** 2 * decay * torch.ones(23, 23).tril()[..., None]
        mixed = torch.einsum("ijh,jhe->ihe", weights / weights.sum(1, keepdim=True), v)
        wanted = mixer.o_proj(mixed.flatten(1))
        assert_close(mixer(caught["x"], (caught["c"], caught["s"]))[0][0], wanted)


def test_an_optimizer_made_before_still_trains_it(parent: PreTrainedModel) -> None:
    optimizer = torch.optim.SGD(parent.parameters(), lr=0.05)
    ids, q_proj = tokens(2, 20), parent.model.layers[0].self_attn.q_proj.weight
    before = q_proj.detach().clone()
    model = swap_attention(parent).train()
    losses = []
    for _ in range(5):
        loss = model(ids, labels=ids, use_cache=False).loss
        loss.backward()
        losses.append(float(loss.detach()))
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0] - 0.1
    assert model.model.layers[0].self_attn.q_proj.weight is q_proj
    assert not q_proj.equal(before)


def test_frozen_parameters_stay_frozen(parent: PreTrainedModel) -> None:
    parent.model.embed_tokens.requires_grad_(False)
    frozen = {name for name, value in swap_attention(parent).named_parameters() if not value.requires_grad}
    assert frozen == {"model.embed_tokens.weight"}


@pytest.mark.parametrize("training", [True, False])
def test_mode_dtype_and_generation_settings_are_kept(parent: PreTrainedModel, training: bool) -> None:
    parent.generation_config.temperature = 0.3
    model = swap_attention(parent.to(torch.bfloat16).train(training))
    assert model.training is training
    assert model.model.layers[1].self_attn.training is training
    assert {value.dtype for value in model.parameters()} == {torch.bfloat16}
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32
    assert model.generation_config.temperature == 0.3
    assert torch.isfinite(model(tokens(1, 9)).logits).all()


@pytest.mark.parametrize("key_bias", [False, True])
@every_family
def test_saved_after_the_swap_it_loads_back(kind: str, key_bias: bool, tmp_path: Path) -> None:
    model = swap_attention(tiny_parent(kind), key_bias=key_bias)
    model.save_pretrained(tmp_path)
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    with torch.no_grad():
        assert loaded(tokens(1, 12)).logits.equal(model(tokens(1, 12)).logits)


def test_the_bias_of_gates_can_be_left_out(parent: PreTrainedModel) -> None:
    mixer = swap_attention(parent, gate_bias=False).model.layers[0].self_attn
    assert mixer.g_proj.bias is None
    assert mixer.g_proj.weight.any()


def test_the_hard_swap_is_a_copy_with_bare_mixers(parent: PreTrainedModel) -> None:
    student = hard_swap(parent, p=4)
    assert type(parent).__name__ == "LlamaForCausalLM"
    mixer = student.model.layers[0].self_attn
    assert (mixer.p, mixer.k_bias) == (4, None)
    assert mixer.log_gates(torch.randn(1, 3, 32)).exp().eq(0.5).all()
    assert mixer.q_proj.weight is not parent.model.layers[0].self_attn.q_proj.weight


def test_what_cannot_be_swapped_is_left_as_it_was(parent: PreTrainedModel) -> None:
    gpt2 = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=32, n_head=2, vocab_size=97, bos_token_id=1, eos_token_id=1))
    with pytest.raises(SourceError, match="A 'gpt2' model cannot be converted; supported are llama, mistral, qwen2, "):
        swap_attention(gpt2)
    assert type(gpt2) is GPT2LMHeadModel
    with pytest.raises(ArgumentError, match="p must be an even integer"):
        swap_attention(parent, p=3)
    assert parent(tokens(1, 5)).logits.shape == (1, 5, 97)
    swap_attention(parent)
    with pytest.raises(SourceError, match="already a power-retention model"):
        swap_attention(parent)


def test_rotary_convention_of_the_mixer() -> None:
    """The mixer's rotation is the one that transformers applies, for any angles."""
    from power_retention.layers.mixer import rotate

    angles = torch.rand(1, 5, 4).repeat(1, 1, 2) * 6
    q, k = torch.randn(1, 5, 3, 8), torch.randn(1, 5, 2, 8)
    wanted = apply_rotary_pos_emb(q, k, angles.cos(), angles.sin(), unsqueeze_dim=2)
    for got, other in zip((rotate(x, angles.cos(), angles.sin()) for x in (q, k)), wanted, strict=True):
        torch.testing.assert_close(got, other)
