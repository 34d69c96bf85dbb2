"""The cache: as large after a thousand tokens as after one, and rows of it can be copied, reordered and kept."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from power_retention.models import PowerRetentionCache, PowerRetentionForCausalLM
from tiny_models import SHAPE, assert_close, tiny_model, tokens


@pytest.fixture(scope="module")
def model() -> PowerRetentionForCausalLM:
    return tiny_model(chunk_size=8)


@torch.no_grad()
def read(
    model: PowerRetentionForCausalLM, ids: Tensor, cache: PowerRetentionCache | None = None
) -> PowerRetentionCache:
    return model(ids, past_key_values=cache, use_cache=True).past_key_values


@torch.no_grad()
def next_logits(model: PowerRetentionForCausalLM, ids: Tensor, cache: PowerRetentionCache) -> Tensor:
    """The logits after reading ``ids`` from the cache on, which is advanced."""
    return model(ids, past_key_values=cache).logits[:, -1]


@torch.no_grad()
def alone(model: PowerRetentionForCausalLM, *pieces: Tensor) -> Tensor:
    return model(torch.cat(pieces, 1), use_cache=False).logits[:, -1]


def test_its_size_does_not_grow(model: PowerRetentionForCausalLM) -> None:
    cache = PowerRetentionCache(2)
    assert cache.nbytes == 0
    read(model, tokens(2, 1), cache)
    width = 8 * 9 // 2
    assert cache.nbytes == 2 * 2 * 2 * width * (8 + 1) * 4  # layers, rows, heads, D, values and normaliser, float32
    size = cache.nbytes
    for piece in (1, 30, 200):
        read(model, tokens(2, piece), cache)
        assert cache.nbytes == size
    assert cache.get_seq_length() == 232
    assert sum(state.memory.untyped_storage().nbytes() for state in cache.states) <= size


def test_a_fork_goes_its_own_way(model: PowerRetentionForCausalLM) -> None:
    prompts, branches = tokens(2, 11), tokens(4, 5, seed=3)
    cache = read(model, prompts)
    fork = copy.deepcopy(cache)
    fork.batch_repeat_interleave(2)
    for step in branches.split(1, dim=1):
        got = next_logits(model, step, fork)
    assert_close(got, alone(model, prompts.repeat_interleave(2, 0), branches))
    assert cache.get_seq_length() == 11
    assert_close(next_logits(model, branches[:2, :1], cache), alone(model, prompts, branches[:2, :1]))


def test_copies_of_a_row_do_not_share_memory(model: PowerRetentionForCausalLM) -> None:
    cache = read(model, tokens(1, 6))
    before = [state.memory.clone() for state in cache.states]
    fork = copy.deepcopy(cache)
    fork.batch_repeat_interleave(3)
    fork.states[0].memory[1].zero_()
    assert fork.states[0].memory[0].equal(before[0][0])
    assert fork.states[0].memory[2].equal(before[0][0])
    assert cache.states[0].memory.equal(before[0])


def test_rows_reordered_and_selected(model: PowerRetentionForCausalLM) -> None:
    prompts, more = tokens(3, 9), tokens(3, 2, seed=4)
    order = torch.tensor([2, 0, 0])
    cache = read(model, prompts)
    cache.reorder_cache(order)
    assert_close(next_logits(model, more, cache), alone(model, prompts[order], more))
    cache = read(model, prompts)
    cache.batch_select_indices(torch.tensor([1]))
    assert_close(next_logits(model, more[:1], cache), alone(model, prompts[1:2], more[:1]))


def test_a_conversation_in_turns(model: PowerRetentionForCausalLM) -> None:
    """Each turn reads what is new only, and its logits are those of the whole conversation."""
    cache, history, positions_read = PowerRetentionCache(2), tokens(1, 0), []
    handle = model.model.embed_tokens.register_forward_hook(lambda _, args, __: positions_read.append(args[0].shape[1]))
    for turn in range(3):
        said = torch.cat((history, tokens(1, 7 + turn, seed=turn)), 1)
        options = {"max_new_tokens": 5, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
        out = model.generate(said, past_key_values=cache, **options)
        assert out.past_key_values is cache
        history = out.sequences
        with torch.no_grad():
            wanted = model(history, use_cache=False).logits[:, -6:-1]
        positions_read.pop()
        assert_close(torch.stack(out.logits, 1), wanted)
    handle.remove()
    assert sum(positions_read) == history.shape[1] - 1 == cache.get_seq_length()


@torch.no_grad()
def test_beams(model: PowerRetentionForCausalLM) -> None:
    prompts = tokens(2, 10)
    options = {"max_new_tokens": 6, "do_sample": False, "output_scores": True, "return_dict_in_generate": True}
    out = model.generate(prompts, num_beams=4, num_return_sequences=3, **options)
    assert out.sequences.shape == (6, 16)
    assert len(out.sequences.unique(dim=0)) == 6
    logs = model(out.sequences, use_cache=False).logits.log_softmax(-1)[:, 9:-1]
    wanted = logs.gather(-1, out.sequences[:, 10:, None])[..., 0].mean(-1)
    assert_close(out.sequences_scores, wanted)


@torch.no_grad()
def test_several_samples_of_one_prompt(model: PowerRetentionForCausalLM) -> None:
    torch.manual_seed(0)
    options = {"max_new_tokens": 6, "do_sample": True, "output_logits": True, "return_dict_in_generate": True}
    out = model.generate(tokens(2, 10), num_return_sequences=3, **options)
    assert len(out.sequences.unique(dim=0)) == 6
    assert_close(torch.stack(out.logits, 1), model(out.sequences, use_cache=False).logits[:, 9:-1])


def test_a_cache_made_in_inference_mode_serves_outside_of_it(model: PowerRetentionForCausalLM) -> None:
    prompt, more = tokens(1, 8), tokens(1, 3, seed=5)
    with torch.inference_mode():
        cache = model(prompt, use_cache=True).past_key_values
    for step in more.split(1, dim=1):
        got = next_logits(model, step, cache)
    assert_close(got, alone(model, prompt, more))


def test_a_step_keeps_the_old_state_while_gradients_are_recorded(model: PowerRetentionForCausalLM) -> None:
    cache = read(model, tokens(1, 8))
    kept = cache.states[0]
    before = kept.memory.clone()
    model(tokens(1, 1), past_key_values=cache)
    assert kept.memory.equal(before)
    assert not cache.states[0].memory.equal(before)


def test_reset_forgets_everything(model: PowerRetentionForCausalLM) -> None:
    cache = read(model, tokens(1, 8))
    cache.reset()
    assert (cache.get_seq_length(), cache.nbytes) == (0, 0)
    assert_close(next_logits(model, tokens(1, 5, seed=6), cache), alone(model, tokens(1, 5, seed=6)))


@pytest.mark.parametrize("removed", [-1, -8, 3])
def test_the_last_tokens_cannot_be_dropped(model: PowerRetentionForCausalLM, removed: int) -> None:
    cache = read(model, tokens(1, 8))
    with pytest.raises(NotImplementedError, match="cannot drop its last tokens"):
        cache.crop(removed)
    cache.crop(0)
    assert cache.get_seq_length() == 8


def test_a_transformer_cannot_use_it() -> None:
    with pytest.raises(TypeError, match="it serves a power-retention model only"):
        LlamaForCausalLM(LlamaConfig(**SHAPE))(tokens(1, 4), past_key_values=PowerRetentionCache(2))
