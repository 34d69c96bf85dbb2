"""Published checkpoints, made here from nothing but their documented names and shapes, load, run and save as they are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, Qwen3Config, Starcoder2Config

from power_retention.conversion.swap import softmax_put_back
from power_retention.models import BrumbyForCausalLM, PowerCoderForCausalLM, PowerRetentionForCausalLM
from tiny_models import PADDING, assert_close, tokens

HIDDEN, INNER, LAYERS, QUERY_HEADS, HEADS, VOCABULARY = 32, 48, 3, 4, 2, 97

COMMON: dict[str, Any] = {
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_size": HIDDEN,
    "initializer_range": 0.02,
    "intermediate_size": INNER,
    "num_attention_heads": QUERY_HEADS,
    "num_hidden_layers": LAYERS,
    "num_key_value_heads": HEADS,
    "rope_scaling": None,
    "sliding_window": None,
    "use_cache": True,
    "vocab_size": VOCABULARY,
}
BRUMBY: dict[str, Any] = {
    **COMMON,
    "architectures": ["BrumbyForCausalLM"],
    "attention_bias": False,
    "auto_map": {
        "AutoConfig": "configuration_brumby.BrumbyConfig",
        "AutoModelForCausalLM": "modeling_brumby.BrumbyForCausalLM",
    },
    "chunk_size": 64,
    "head_dim": 16,
    "hidden_act": "silu",
    "max_position_embeddings": 32768,
    "max_window_layers": 3,
    "model_type": "brumby",
    "prefill_chunk_size": 1024,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000,
    "switch_over_seq_len": 8192,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.55.0",
    "use_exp": False,
    "use_sliding_window": False,
}
POWERCODER: dict[str, Any] = {
    **COMMON,
    "architectures": ["PowerCoderForCausalLM"],
    "embedding_dropout": 0.1,
    "hidden_act": "gelu_pytorch_tanh",
    "max_position_embeddings": 4096,
    "mlp_type": "default",
    "model_type": "powercoder",
    "norm_epsilon": 1e-05,
    "norm_type": "layer_norm",
    "residual_dropout": 0.1,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "transformers_version": "4.53.0",
    "use_bias": True,
}
FORMATS = {"brumby": BRUMBY, "powercoder": POWERCODER}
CLASSES = {"brumby": BrumbyForCausalLM, "powercoder": PowerCoderForCausalLM}
every_format = pytest.mark.parametrize("name", FORMATS)


def shapes(name: str) -> dict[str, tuple[int, ...]]:
    """Every weight of the published file."""
    d = FORMATS[name].get("head_dim", HIDDEN // QUERY_HEADS)
    linear = {
        "self_attn.q_proj": (QUERY_HEADS * d, HIDDEN),
        "self_attn.k_proj": (HEADS * d, HIDDEN),
        "self_attn.v_proj": (HEADS * d, HIDDEN),
        "self_attn.g_proj": (HEADS, HIDDEN),
        "self_attn.o_proj": (HIDDEN, QUERY_HEADS * d),
    }
    if name == "brumby":
        linear |= {"mlp.gate_proj": (INNER, HIDDEN), "mlp.up_proj": (INNER, HIDDEN), "mlp.down_proj": (HIDDEN, INNER)}
        norms = {"self_attn.q_norm": d, "self_attn.k_norm": d}
    else:
        linear |= {"mlp.c_fc": (INNER, HIDDEN), "mlp.c_proj": (HIDDEN, INNER)}
        norms = {}
    norms |= {"input_layernorm": HIDDEN, "post_attention_layernorm": HIDDEN}
    biased = name == "powercoder"
    found = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN), "lm_head.weight": (VOCABULARY, HIDDEN)}
    found |= {f"model.norm.{part}": (HIDDEN,) for part in ("weight", "bias")[: 1 + biased]}
    for i in range(LAYERS):
        for part, shape in linear.items():
            found[f"model.layers.{i}.{part}.weight"] = shape
            if biased:
                found[f"model.layers.{i}.{part}.bias"] = shape[:1]
        for part, width in norms.items():
            for kind in ("weight", "bias")[: 1 + biased]:
                found[f"model.layers.{i}.{part}.{kind}"] = (width,)
    return found


def weights(name: str) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    found = {}
    for key, shape in sorted(shapes(name).items()):
        scale = shape[-1] ** -0.5 if len(shape) == 2 and "embed" not in key else 1.0
        value = torch.randn(shape, generator=generator) * scale
        found[key] = (value.abs() + 0.5 if "norm.weight" in key else value).to(
            getattr(torch, FORMATS[name]["torch_dtype"])
        )
    return found


def write(name: str, folder: Path, *, shards: int = 1, **changes: Any) -> dict[str, Tensor]:
    """A checkpoint of the published format, written without any code of ours."""
    (folder / "config.json").write_text(json.dumps({**FORMATS[name], **changes}))
    tensors = weights(name)
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        return tensors
    files = {key: f"model-{i % shards + 1:05}-of-{shards:05}.safetensors" for i, key in enumerate(tensors)}
    for file in set(files.values()):
        save_file({key: tensors[key] for key in tensors if files[key] == file}, folder / file, {"format": "pt"})
    size = sum(value.nbytes for value in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": files}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return tensors


def read_weights(folder: Path) -> dict[str, Tensor]:
    found = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            found |= {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (it is no dict)
    return found


def opened(name: str, folder: Path, **changes: Any) -> PowerRetentionForCausalLM:
    write(name, folder, **changes)
    model: PowerRetentionForCausalLM = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.eval()


@every_format
@pytest.mark.parametrize("shards", [1, 3])
def test_it_loads_as_is(name: str, shards: int, tmp_path: Path) -> None:
    """With its auto_map in place, and no trust_remote_code: the code that it points at is not even there."""
    tensors = write(name, tmp_path, shards=shards)
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    assert type(model) is CLASSES[name]
    assert model.dtype == getattr(torch, FORMATS[name]["torch_dtype"])
    loaded = model.state_dict()
    assert loaded.keys() == tensors.keys()
    assert all(value.equal(tensors[key]) for key, value in loaded.items())
    trunk = AutoModel.from_pretrained(tmp_path)
    assert type(trunk).__name__ == {"brumby": "BrumbyModel", "powercoder": "PowerCoderModel"}[name]


@every_format
def test_the_documented_sizes_are_the_defaults(name: str) -> None:
    config = AutoConfig.for_model(name)
    widths = (config.hidden_size, config.intermediate_size, config.num_hidden_layers, config.num_attention_heads)
    heads = (config.num_key_value_heads, config.head_dim, config.vocab_size, config.max_position_embeddings)
    if name == "brumby":
        assert (*widths, *heads) == (5120, 17408, 40, 40, 8, 128, 151936, 32768)
        assert (config.chunk_size, config.prefill_chunk_size, config.switch_over_seq_len) == (64, 1024, 8192)
        assert config.rope_parameters["rope_theta"] == 1e4
    else:
        assert (*widths, *heads) == (3072, 12288, 30, 24, 2, 128, 49152, 4096)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    gate = model.model.layers[0].self_attn.g_proj
    assert (tuple(gate.weight.shape), gate.bias is None) == (
        (config.num_key_value_heads, config.hidden_size),
        name == "brumby",
    )


@every_format
@pytest.mark.parametrize("largest", ["10GB", "20KB"])
def test_it_saves_as_it_was(name: str, largest: str, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    tensors = write(name, tmp_path / "in")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "in")
    model.save_pretrained(tmp_path / "out", max_shard_size=largest)
    assert (len(list((tmp_path / "out").glob("*.safetensors"))) > 2) == (largest == "20KB")
    saved = read_weights(tmp_path / "out")
    assert saved.keys() == tensors.keys()
    assert all(value.equal(tensors[key]) and value.dtype == tensors[key].dtype for key, value in saved.items())
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert {**config, "transformers_version": ""} == {**FORMATS[name], "transformers_version": ""}
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    ids = tokens(1, 20)
    with torch.no_grad():
        assert again(ids).logits.equal(model(ids).logits)


@every_format
def test_a_scaled_rotary_embedding_survives(name: str, tmp_path: Path) -> None:
    scaling = {"rope_type": "linear", "factor": 4.0}
    model = opened(name, tmp_path, rope_scaling=scaling)
    assert model.model.rotary_emb.rope_type == "linear"
    model.config.save_pretrained(tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["rope_scaling"], config["rope_theta"]) == (scaling, FORMATS[name]["rope_theta"])


@every_format
def test_a_copied_configuration_is_whole(name: str) -> None:
    """The file leaves out what follows from its format; a copy in memory must not."""
    config = AutoConfig.for_model(**FORMATS[name])
    copied = type(config).from_dict(config.to_dict())
    assert copied.to_dict() == config.to_dict()
    assert (copied.norm_kind, copied.gate_bias) == (("rms", False) if name == "brumby" else ("layer", True))


@every_format
@torch.no_grad()
def test_every_weight_is_used(name: str, tmp_path: Path) -> None:
    model, ids = opened(name, tmp_path), tokens(1, 30)
    before = model(ids).logits
    for key, value in model.named_parameters():
        kept = value.clone()
        value.add_(torch.randn_like(value))
        assert (model(ids).logits - before).abs().max() > 1e-3, key
        value.copy_(kept)


@torch.no_grad()
def published_formula(name: str, w: dict[str, Tensor], ids: Tensor) -> Tensor:
    """The documented forward pass, written out token by token in float64 from the weights by their names."""
    settings, w = FORMATS[name], {key: value.double() for key, value in w.items()}
    d = settings.get("head_dim", HIDDEN // QUERY_HEADS)

    def linear(x: Tensor, part: str) -> Tensor:
        return F.linear(x, w[f"{part}.weight"], w.get(f"{part}.bias"))

    def norm(x: Tensor, part: str) -> Tensor:
        if name == "powercoder":
            return F.layer_norm(x, x.shape[-1:], w[f"{part}.weight"], w[f"{part}.bias"], settings["norm_epsilon"])
        return x * (x.square().mean(-1, keepdim=True) + settings["rms_norm_eps"]).rsqrt() * w[f"{part}.weight"]

    def turned(x: Tensor, position: int) -> Tensor:
        angle = position / settings["rope_theta"] ** (torch.arange(0, d, 2, dtype=torch.float64) / d)
        cos, sin = angle.cos().repeat(2), angle.sin().repeat(2)
        return x * cos + torch.cat((-x[..., d // 2 :], x[..., : d // 2]), -1) * sin

    def mixed(x: Tensor, part: str) -> Tensor:
        state = torch.zeros(HEADS, d * d, d, dtype=torch.float64)
        total = torch.zeros(HEADS, d * d, dtype=torch.float64)
        outputs = []
        for position, row in enumerate(x):
            q = linear(row, f"{part}.q_proj").view(QUERY_HEADS, d)
            k, v = (linear(row, f"{part}.{x}_proj").view(HEADS, d) for x in "kv")
            if name == "brumby":
                q, k = norm(q, f"{part}.q_norm"), norm(k, f"{part}.k_norm")
            q, k = turned(q, position), turned(k, position)
            gate = linear(row, f"{part}.g_proj").sigmoid()
            expanded = torch.einsum("ha,hb->hab", k, k).flatten(1)
            state = gate[:, None, None] * state + torch.einsum("hm,he->hme", expanded, v)
            total = gate[:, None] * total + expanded
            query = torch.einsum("ha,hb->hab", q, q).flatten(1).view(HEADS, -1, d * d)
            y = torch.einsum("hrm,hme->hre", query, state) / torch.einsum("hrm,hm->hr", query, total)[..., None]
            outputs.append(y.flatten())
        return linear(torch.stack(outputs), f"{part}.o_proj")

    def mapped(x: Tensor, part: str) -> Tensor:
        if name == "powercoder":
            return linear(F.gelu(linear(x, f"{part}.c_fc"), approximate="tanh"), f"{part}.c_proj")
        return linear(F.silu(linear(x, f"{part}.gate_proj")) * linear(x, f"{part}.up_proj"), f"{part}.down_proj")

    x = w["model.embed_tokens.weight"][ids]
    for i in range(LAYERS):
        layer = f"model.layers.{i}"
        x = x + mixed(norm(x, f"{layer}.input_layernorm"), f"{layer}.self_attn")
        x = x + mapped(norm(x, f"{layer}.post_attention_layernorm"), f"{layer}.mlp")
    return linear(norm(x, "model.norm"), "lm_head")


@every_format
@torch.no_grad()
def test_it_computes_the_published_formula(name: str, tmp_path: Path) -> None:
    model, ids = opened(name, tmp_path).double(), tokens(1, 25)
    wanted = published_formula(name, weights(name), ids[0])
    assert_close(model(ids, use_cache=False).logits[0], wanted)


@pytest.mark.parametrize("name", FORMATS)
@torch.no_grad()
def test_with_softmax_it_is_its_parent(name: str, tmp_path: Path) -> None:
    """``use_exp`` is a field of Brumby's own; PowerCoder's training mixes softmax in."""
    tensors = weights(name)
    parent_config = {"brumby": Qwen3Config, "powercoder": Starcoder2Config}[name](
        **{key: value for key, value in FORMATS[name].items() if key not in ("architectures", "auto_map", "model_type")}
    )
    parent = AutoModelForCausalLM.from_config(parent_config).float().eval()
    parent.load_state_dict({key: value.float() for key, value in tensors.items() if "g_proj" not in key})
    ids = tokens(2, 25)
    model = opened(name, tmp_path, **({"use_exp": True} if name == "brumby" else {}))
    with softmax_put_back(model):
        assert_close(model(ids, use_cache=False).logits, parent(ids).logits)
    if name == "brumby":
        assert all(mixer.softmax for mixer in model.mixers)


@every_format
class TestDefectsOfThePublishedCode:
    """What breaks there must work here."""

    def test_left_padding(self, name: str, tmp_path: Path) -> None:
        model, ids = opened(name, tmp_path), tokens(2, 12)
        ids[1, :5] = PADDING
        with torch.no_grad():
            padded = model(ids, attention_mask=(ids != PADDING).long()).logits[1, 5:]
            assert_close(padded, model(ids[1:, 5:]).logits[0])

    def test_a_second_turn_continues_the_first(self, name: str, tmp_path: Path) -> None:
        model, ids = opened(name, tmp_path), tokens(1, 30)
        with torch.no_grad():
            cache = model(ids[:, :13], use_cache=True).past_key_values
            second = model(ids[:, 13:], past_key_values=cache)
            assert_close(second.logits, model(ids, use_cache=False).logits[:, 13:])
        assert second.past_key_values.get_seq_length() == 30

    def test_the_first_decoded_token_reads_the_prompt_once(self, name: str, tmp_path: Path) -> None:
        model, ids = opened(name, tmp_path), tokens(1, 20)
        options = {"do_sample": False, "output_logits": True, "return_dict_in_generate": True, "eos_token_id": None}
        out = model.generate(ids, max_new_tokens=6, **options)
        with torch.no_grad():
            wanted = model(out.sequences, use_cache=False).logits[:, 19:-1]
        assert_close(torch.stack(out.logits, 1), wanted)

    def test_beams(self, name: str, tmp_path: Path) -> None:
        model, ids = opened(name, tmp_path), tokens(2, 10)
        options = {"num_beams": 3, "do_sample": False, "max_new_tokens": 5, "eos_token_id": None}
        assert model.generate(ids, **options).equal(model.generate(ids, use_cache=False, **options))


@pytest.mark.parametrize("piece", [1, 7, 64])
def test_the_prompt_is_read_in_pieces(piece: int, tmp_path: Path) -> None:
    """The library takes Brumby's prefill_chunk_size for its own; ragged batches and a single last token included."""
    model, ids = opened("brumby", tmp_path, prefill_chunk_size=piece), tokens(2, 22)
    ids[1, :9] = PADDING
    mask = (ids != PADDING).long()
    options = {"do_sample": False, "output_logits": True, "return_dict_in_generate": True, "eos_token_id": None}
    out = model.generate(ids, attention_mask=mask, max_new_tokens=4, **options)
    for row, start in ((0, 0), (1, 9)):
        with torch.no_grad():
            wanted = model(out.sequences[row : row + 1, start:], use_cache=False).logits[0, -5:-1]
        assert_close(torch.stack(out.logits, 1)[row], wanted)
