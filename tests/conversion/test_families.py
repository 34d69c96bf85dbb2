"""Every family, as a whole: with the softmax put back the swapped model is its parent, and a wrong mapping is not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from power_retention import swap_attention
from power_retention.conversion.convert import Conversion, convert, save_conversion
from power_retention.conversion.source import open_source
from power_retention.conversion.swap import softmax_put_back
from power_retention.errors import ArgumentError, SourceError
from power_retention.evaluation.loss import held_out_loss
from power_retention.models import PowerRetentionForCausalLM
from tiny_models import PADDING, PARENTS, assert_close, tiny_parent, tokens

every_family = pytest.mark.parametrize("kind", PARENTS)
LARGEST_KL = 1e-7
"""Nats a token; rounding in float32 leaves less."""


def swapped(kind: str) -> PowerRetentionForCausalLM:
    """A swap whose key biases and gates are not those that softmax would never notice."""
    student = swap_attention(tiny_parent(kind), key_bias=True).eval()
    for mixer in student.mixers:
        nn.init.normal_(mixer.k_bias, generator=torch.Generator().manual_seed(3))
        nn.init.constant_(mixer.g_proj.bias, 0.5)
    return student


def softmax_kl(parent: PreTrainedModel, student: PowerRetentionForCausalLM) -> float:
    with softmax_put_back(student):
        return held_out_loss(student, tokens(3, 40), teacher=parent).kl


@every_family
def test_with_softmax_put_back_it_is_the_parent(kind: str) -> None:
    parent, student = tiny_parent(kind), swapped(kind)
    assert softmax_kl(parent, student) < LARGEST_KL
    assert held_out_loss(student, tokens(3, 40), teacher=parent).kl > 0.01, "the power was never there"


def permuted_queries(model: PowerRetentionForCausalLM) -> None:
    """Query rows in llama.c's order of rotary pairs."""
    for mixer in model.mixers:
        heads = mixer.q_proj.weight.view(-1, mixer.head_dim // 2, 2, mixer.q_proj.in_features)
        mixer.q_proj.weight.copy_(heads.transpose(1, 2).reshape_as(mixer.q_proj.weight))


def exchanged_heads(model: PowerRetentionForCausalLM) -> None:
    for mixer in model.mixers:
        mixer.v_proj.weight.copy_(mixer.v_proj.weight.unflatten(0, (-1, mixer.head_dim)).flip(0).flatten(0, 1))


def forgotten_norm_bias(model: PowerRetentionForCausalLM) -> None:
    model.model.norm.bias.zero_()


def forgotten_norm_of_keys(model: PowerRetentionForCausalLM) -> None:
    for mixer in model.mixers:
        mixer.q_norm = mixer.k_norm = None


def exchanged_gate_and_up(model: PowerRetentionForCausalLM) -> None:
    experts = model.model.layers[1].mlp.experts.gate_up_proj
    experts.copy_(experts.roll(experts.shape[1] // 2, 1))


def exchanged_experts(model: PowerRetentionForCausalLM) -> None:
    experts = model.model.layers[1].mlp.experts.down_proj
    experts.copy_(experts.flip(0))


def weights_of_experts_not_normalised(model: PowerRetentionForCausalLM) -> None:
    model.model.layers[1].mlp.gate.norm_topk_prob = False


def forgotten_shared_expert(model: PowerRetentionForCausalLM) -> None:
    model.model.layers[1].mlp.shared_experts.down_proj.weight.zero_()


def whole_head_turned(model: PowerRetentionForCausalLM) -> None:
    model.config.rope_parameters = {**model.config.rope_parameters, "partial_rotary_factor": 1.0}
    model.model.rotary_emb = type(model.model.rotary_emb)(model.config)


@pytest.mark.parametrize(
    ("kind", "mistake"),
    [
        *((kind, mistake) for kind in PARENTS for mistake in (permuted_queries, exchanged_heads)),
        ("starcoder2", forgotten_norm_bias),
        ("qwen3", forgotten_norm_of_keys),
        *(
            (kind, mistake)
            for kind in ("qwen3_moe", "glm4_moe")
            for mistake in (exchanged_gate_and_up, exchanged_experts, weights_of_experts_not_normalised)
        ),
        ("glm4_moe", forgotten_shared_expert),
        ("glm4_moe", whole_head_turned),
    ],
)
def test_a_wrong_mapping_is_seen(kind: str, mistake: Callable[[PowerRetentionForCausalLM], None]) -> None:
    """Negative control: each of these has happened to somebody, and none changes a shape."""
    parent, student = tiny_parent(kind), swapped(kind)
    with torch.no_grad():
        mistake(student)
    assert softmax_kl(parent, student) > 1e-3


@pytest.mark.parametrize("kind", ["llama", "glm4_moe", "starcoder2"])
@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_softmax_of_padded_rows(kind: str, side: str) -> None:
    parent, student = tiny_parent(kind), swapped(kind)
    ids = tokens(2, 12)
    ids[1, slice(0, 5) if side == "left" else slice(7, 12)] = PADDING
    mask = (ids != PADDING).long()
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with softmax_put_back(student):
        got = student(ids, attention_mask=mask, use_cache=False).logits
    wanted = parent(ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
    assert_close(got[mask.bool()], wanted[mask.bool()])


@torch.no_grad()
def test_softmax_of_packed_rows() -> None:
    student, rows = swapped("llama"), tokens(1, 20)
    with softmax_put_back(student):
        packed = student(rows, cu_seqlens=torch.tensor([0, 7, 20]), use_cache=False).logits
        alone = [student(row, use_cache=False).logits for row in rows.split([7, 13], dim=1)]
    assert_close(packed, torch.cat(alone, 1))


def test_softmax_keeps_no_state(tmp_path: Path) -> None:
    student = swapped("llama")
    with softmax_put_back(student), pytest.raises(ArgumentError, match="keeps no state: pass use_cache=False"):
        student(tokens(1, 5), use_cache=True)
    assert not any(mixer.softmax for mixer in student.mixers)
    student.config.use_exp = True
    student.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert all(mixer.softmax for mixer in loaded.mixers)
    out = loaded.generate(tokens(1, 5), max_new_tokens=4, do_sample=False)
    with softmax_put_back(student), torch.no_grad():
        assert loaded(out).logits.equal(student(out, use_cache=False).logits)


@pytest.mark.parametrize("kind", ["starcoder2", "qwen3_moe", "glm4_moe"])
def test_from_a_folder_to_a_folder_with_calibration(kind: str, stories_dir: Path, tmp_path: Path) -> None:
    """Files of experts hold each by itself, as the parents' do; calibration brings the layers closer."""
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        if (stories_dir / name).exists():
            (tmp_path / name).write_bytes((stories_dir / name).read_bytes())
    parent = tiny_parent(kind)
    torch.manual_seed(0)
    parent.resize_token_embeddings(512, mean_resizing=False)
    parent.save_pretrained(tmp_path)
    source = open_source(tmp_path)
    conversion: Conversion = convert(source, torch.randint(3, 500, (4, 128)), key_bias=True)
    before, after = (
        sum(getattr(layer, f"error_{when}") for layer in conversion.layers) for when in ("before", "after")
    )
    assert after < 0.9 * before
    save_conversion(conversion, tmp_path / "out")
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values()), info
    wanted = conversion.student.state_dict()
    assert all(value.equal(wanted[name]) for name, value in loaded.state_dict().items())
    kept = names_in(tmp_path) & names_in(tmp_path / "out")
    assert kept == names_in(tmp_path)
    assert kind == "starcoder2" or "model.layers.1.mlp.experts.3.down_proj.weight" in kept


def names_in(folder: Path) -> set[str]:
    from safetensors import safe_open

    with safe_open(folder / "model.safetensors", "pt") as file:
        return set(file.keys())


@pytest.mark.parametrize("model_type", ["power_retention", "brumby", "powercoder"])
def test_what_is_converted_already_is_refused(model_type: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(f'{{"model_type": "{model_type}"}}')
    with pytest.raises(SourceError, match="is already a power-retention model"):
        open_source(tmp_path)


@torch.no_grad()
def test_a_layer_without_experts_keeps_its_mlp() -> None:
    student = swapped("qwen3_moe")
    assert [type(layer.mlp).__name__ for layer in student.model.layers] == ["LlamaMLP", "Qwen3MoeSparseMoeBlock"]
    chosen: list[Tensor] = []
    student.model.layers[1].mlp.gate.register_forward_hook(lambda *args: chosen.append(args[2][2]))
    student(tokens(1, 64))
    assert chosen[0].shape == (64, 2)
    assert set(chosen[0].unique().tolist()) == {0, 1, 2, 3}
