"""Real pretrained models for the tests: stories260K, which lies here, and SmolLM2-135M, which is fetched once.

stories260K is small enough for whole recipes on one CPU core; ``write_stories_model`` turns its llama2.c files into a
Hugging Face directory. It wrote its own training text, ``data/stories260k/stories.jsonl``, which is kept because the
sampling takes a minute; run this file as a script to sample it anew.
"""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from tokenizers import AddedToken, Tokenizer, decoders, normalizers
from tokenizers.models import BPE
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

if TYPE_CHECKING:
    import gguf

STORIES_FILES = Path(__file__).parent / "data" / "stories260k"
STORIES_TEXT = STORIES_FILES / "stories.jsonl"
SPECIAL_TOKENS = ("<unk>", "<s>", "</s>")
FIRST_PIECE = 259  # after the special tokens and one for each byte


def write_stories_model(directory: Path) -> Path:
    """Write stories260K as a Hugging Face directory, its tokenizer included."""
    read_llama2c_model(STORIES_FILES / "checkpoint.bin").save_pretrained(directory)
    read_llama2c_tokenizer(STORIES_FILES / "tokenizer.bin").save_pretrained(directory)
    return directory


def write_stories_gguf(path: Path, **metadata: int | str) -> Path:
    """Write stories260K as a GGUF file the way llama.cpp lays it out, with further metadata if given."""
    import gguf  # an extra of the package

    model = read_llama2c_model(STORIES_FILES / "checkpoint.bin")
    writer = gguf.GGUFWriter(path, "llama")
    _add_gguf_config(writer, model.config)
    _add_gguf_tokenizer(writer)
    for key, value in metadata.items():
        (writer.add_string if isinstance(value, str) else writer.add_uint32)(f"llama.{key.replace('__', '.')}", value)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, model.config.num_hidden_layers)
    for name, weight in model.state_dict().items():
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            weight = _pairs(weight, model.config.head_dim)
        if name != "lm_head.weight":
            writer.add_tensor(names.get_name(name, (".weight",)), weight.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add_gguf_config(writer: gguf.GGUFWriter, config: LlamaConfig) -> None:
    writer.add_name("stories260K")
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(10000.0)


def _add_gguf_tokenizer(writer: gguf.GGUFWriter) -> None:
    from gguf import TokenType

    pieces, scores = _llama2c_pieces((STORIES_FILES / "tokenizer.bin").read_bytes())
    special = [TokenType.UNKNOWN, TokenType.CONTROL, TokenType.CONTROL, *[TokenType.BYTE] * 256]
    writer.add_tokenizer_model("llama")
    writer.add_token_list(pieces)
    writer.add_token_scores(scores)
    writer.add_token_types([*special, *[TokenType.NORMAL] * (len(pieces) - len(special))])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)


def sample_stories(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, stories: int, seed: int) -> list[str]:
    """Let the model write: temperature 1, from the beginning-of-story token to the next one or 500 tokens."""
    start = torch.full((stories, 1), tokenizer.bos_token_id)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        rows = model.generate(start, attention_mask=torch.ones_like(start), do_sample=True, top_k=0, max_new_tokens=500)
    return [text.strip() for text in tokenizer.batch_decode(rows, skip_special_tokens=True)]


def write_stories_text(path: Path, *, stories: int = 300, seed: int = 0) -> Path:
    """Sample stories into a file of one ``{"text": …}`` a line."""
    model = read_llama2c_model(STORIES_FILES / "checkpoint.bin")
    documents = sample_stories(model, read_llama2c_tokenizer(STORIES_FILES / "tokenizer.bin"), stories, seed)
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents), encoding="utf-8")
    return path


def read_llama2c_model(path: Path) -> LlamaForCausalLM:
    """Read llama2.c's legacy ``checkpoint.bin``: a header of seven int32, then float32 weights in a fixed order."""
    content = path.read_bytes()
    width, ffn, layers, heads, kv_heads, vocabulary, context = struct.unpack_from("<7i", content)
    config = LlamaConfig(
        hidden_size=width,
        intermediate_size=ffn,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=abs(vocabulary),
        max_position_embeddings=context,
        rms_norm_eps=1e-5,
        tie_word_embeddings=vocabulary > 0,
        bos_token_id=1,
        eos_token_id=1,
        pad_token_id=2,
    )
    model = LlamaForCausalLM(config)
    missing, unexpected = model.load_state_dict(_llama2c_weights(content[28:], config), strict=False)
    assert not unexpected
    assert missing == (["lm_head.weight"] if config.tie_word_embeddings else [])
    model.tie_weights()
    return model.eval()


def _llama2c_weights(content: bytes, config: LlamaConfig) -> dict[str, Tensor]:
    stream, position = torch.from_numpy(np.frombuffer(content, dtype="<f4").copy()), 0

    def take(*shape: int) -> Tensor:
        nonlocal position
        size = int(np.prod(shape))
        position += size
        return stream[position - size : position].reshape(shape)

    width, ffn, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    kv_width = config.head_dim * config.num_key_value_heads
    weights = {"model.embed_tokens.weight": take(config.vocab_size, width)}
    for name, *shape in (
        ("input_layernorm", width),
        ("self_attn.q_proj", width, width),
        ("self_attn.k_proj", kv_width, width),
        ("self_attn.v_proj", kv_width, width),
        ("self_attn.o_proj", width, width),
        ("post_attention_layernorm", width),
        ("mlp.gate_proj", ffn, width),
        ("mlp.down_proj", width, ffn),
        ("mlp.up_proj", ffn, width),
    ):
        for layer, weight in enumerate(take(layers, *shape)):
            rotary = name in ("self_attn.q_proj", "self_attn.k_proj")
            weights[f"model.layers.{layer}.{name}.weight"] = _halves(weight, config.head_dim) if rotary else weight
    weights["model.norm.weight"] = take(width)
    take(2, config.max_position_embeddings, config.head_dim // 2)  # the rotary table
    if not config.tie_word_embeddings:
        weights["lm_head.weight"] = take(config.vocab_size, width)
    assert position == len(stream)
    return weights


def _halves(weight: Tensor, head_dim: int) -> Tensor:
    """Reorder rows from llama2.c's rotary pairs (0, 1), (2, 3), … to transformers' (0, d/2), (1, d/2 + 1), …"""
    rows, columns = weight.shape
    return weight.view(rows // head_dim, head_dim // 2, 2, columns).transpose(1, 2).reshape(rows, columns)


def _pairs(weight: Tensor, head_dim: int) -> Tensor:
    """Undo ``_halves``: GGUF files keep the pairs too."""
    rows, columns = weight.shape
    return weight.view(rows // head_dim, 2, head_dim // 2, columns).transpose(1, 2).reshape(rows, columns)


def read_llama2c_tokenizer(path: Path) -> PreTrainedTokenizerFast:
    """Read llama2.c's ``tokenizer.bin``: sentencepiece's BPE with byte fallback, its merges ranked by the scores.

    The model was trained on stories set apart by ``<s>`` alone and never saw ``</s>``, so ``<s>`` both starts and ends.
    """
    pieces, scores = _llama2c_pieces(path.read_bytes())
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    bpe = BPE(vocab=vocabulary, merges=_merges(pieces, scores), byte_fallback=True, fuse_unk=True, unk_token="<unk>")
    tokenizer = Tokenizer(bpe)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken(piece, special=True, normalized=False) for piece in SPECIAL_TOKENS])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="<s>",
        pad_token="</s>",
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )


def _llama2c_pieces(content: bytes) -> tuple[list[str], list[float]]:
    pieces, scores, position = [], [], 4
    while position < len(content):
        score, length = struct.unpack_from("<fi", content, position)
        position += 8 + length
        pieces.append(content[position - length : position].decode("utf-8").replace(" ", "▁"))
        scores.append(score)
    return [*SPECIAL_TOKENS, *pieces[len(SPECIAL_TOKENS) :]], scores


def _merges(pieces: list[str], scores: list[float]) -> list[tuple[str, str]]:
    """Every way to make a piece of two others, best piece first."""
    known = set(pieces[FIRST_PIECE:])
    ranked = sorted(range(FIRST_PIECE, len(pieces)), key=lambda index: -scores[index])
    splits = ((pieces[index][:cut], pieces[index][cut:]) for index in ranked for cut in range(1, len(pieces[index])))
    return [(left, right) for left, right in splits if left in known and right in known]


if __name__ == "__main__":
    torch.set_num_threads(1)
    write_stories_text(STORIES_TEXT)
