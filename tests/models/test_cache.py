"""The cache: as large after a thousand tokens as after one, and rows of it can be copied, reordered and kept."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

from power_retention.errors import ArgumentError, StateError
from power_retention.models import PowerRetentionCache, PowerRetentionForCausalLM
from tiny_models import SHAPE, assert_close, randomise, tiny_config, tiny_model, tiny_parent, tokens


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
    cache = PowerRetentionCache(2, fold_size=4)
    assert cache.nbytes == 0
    read(model, tokens(2, 1), cache)
    width = 8 * 9 // 2
    a_head = width * (8 + 1) + 8 * (8 + 8 + 1) + 3  # values and normaliser, the ring of 8 places, its cursor
    assert cache.nbytes == 2 * 2 * 2 * a_head * 4  # layers, rows, heads, four bytes a number
    size = cache.nbytes
    for piece in (1, 30, 200):
        read(model, tokens(2, piece), cache)
        assert cache.nbytes == size
    assert cache.get_seq_length() == 232
    ring = cache.layers[0]._ring
    assert sum(x.untyped_storage().nbytes() for x in ring._tensors().values()) == size / 2


def test_a_fork_goes_its_own_way(model: PowerRetentionForCausalLM) -> None:
    prompts, branches = tokens(2, 11), tokens(4, 5, seed=3)
    cache = read(model, prompts)
    fork = cache.fork(2)
    for step in branches.split(1, dim=1):
        got = next_logits(model, step, fork)
    assert_close(got, alone(model, prompts.repeat_interleave(2, 0), branches))
    assert cache.get_seq_length() == 11
    assert_close(next_logits(model, branches[:2, :1], cache), alone(model, prompts, branches[:2, :1]))


def test_copies_do_not_share_memory(model: PowerRetentionForCausalLM) -> None:
    more = tokens(1, 2, seed=4)
    cache = read(model, tokens(1, 40))
    kept = next_logits(model, more, cache.fork())
    for other in (cache.fork(3), copy.deepcopy(cache)):
        for tensor in other.layers[0]._ring._tensors().values():
            tensor[0] = 1
        rows = other.layers[0]._ring.memory.shape[0]
        if rows > 1:
            assert_close(next_logits(model, more.expand(rows, 2), other)[2:], kept)
    assert_close(next_logits(model, more, cache), kept)


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


class TestCrop:
    @pytest.mark.parametrize(
        ("pieces", "dropped"), [((6, 3), 3), ((40, 5), 5), ((40,), 32), ((20, *[1] * 30), 1), ((9,), 9)]
    )
    def test_dropped_tokens_were_never_read(
        self, model: PowerRetentionForCausalLM, pieces: tuple[int, ...], dropped: int
    ) -> None:
        ids, more, cache = tokens(2, sum(pieces)), tokens(2, 3, seed=7), PowerRetentionCache(2)
        for piece in ids.split(list(pieces), dim=1):
            read(model, piece, cache)
        cache.crop(-dropped)
        kept = ids[:, : ids.shape[1] - dropped]
        assert cache.get_seq_length() == kept.shape[1]
        assert_close(next_logits(model, more, cache), alone(model, kept, more))

    def test_folded_tokens_stay(self, model: PowerRetentionForCausalLM) -> None:
        cache = read(model, tokens(1, 40))
        before = next_logits(model, tokens(1, 1), cache.fork())
        with pytest.raises(
            StateError, match="last 33 tokens cannot be taken back: 32 of the 40 read are still in the ring"
        ):
            cache.crop(-33)
        cache.crop(0)
        assert next_logits(model, tokens(1, 1), cache).equal(before)
        with pytest.raises(ArgumentError, match="minus the number of tokens"):
            cache.crop(3)

    def test_tokens_read_with_gradients_stay(self, model: PowerRetentionForCausalLM) -> None:
        cache = PowerRetentionCache(2)
        model(tokens(1, 8), past_key_values=cache)
        with pytest.raises(StateError, match="0 of the 8 read are still in the ring"):
            cache.crop(-1)
        cache.crop(-8)
        assert cache.get_seq_length() == 0

    def test_what_inference_mode_made_is_cropped_outside_of_it(self, model: PowerRetentionForCausalLM) -> None:
        with torch.inference_mode():
            cache = model(tokens(1, 8), use_cache=True).past_key_values
        cache.crop(-2)
        assert_close(
            next_logits(model, tokens(1, 2, seed=3), cache), alone(model, tokens(1, 8)[:, :6], tokens(1, 2, seed=3))
        )


class TestSpeculation:
    """Drafts are rejected by rolling back; what is written, and its logits, are those of greedy decoding."""

    prompt = torch.cat([tokens(1, 5)] * 4, 1)

    def check(self, model: PowerRetentionForCausalLM, monkeypatch: pytest.MonkeyPatch, **options: object) -> None:
        dropped, crop = [], PowerRetentionCache.crop
        monkeypatch.setattr(PowerRetentionCache, "crop", lambda self, n: (dropped.append(-n), crop(self, n))[1])
        out = model.generate(
            self.prompt, max_new_tokens=20, do_sample=False, output_logits=True, return_dict_in_generate=True, **options
        )
        assert sum(dropped) > 3
        assert out.sequences.equal(model.generate(self.prompt, max_new_tokens=20, do_sample=False))
        with torch.no_grad():
            wanted = model(out.sequences, use_cache=False).logits[:, 19:-1]
        assert_close(torch.stack(out.logits, 1), wanted)

    def test_prompt_lookup(self, model: PowerRetentionForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
        self.check(model, monkeypatch, prompt_lookup_num_tokens=5)

    def test_a_small_assistant(self, model: PowerRetentionForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
        assistant = randomise(PowerRetentionForCausalLM(tiny_config(num_hidden_layers=1)), seed=3).eval()
        self.check(model, monkeypatch, assistant_model=assistant)

    def test_a_transformer_as_assistant(
        self, model: PowerRetentionForCausalLM, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        self.check(model, monkeypatch, assistant_model=tiny_parent("llama"))

    def test_more_drafts_than_the_usual_ring_holds(
        self, model: PowerRetentionForCausalLM, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(self, "prompt", torch.cat([tokens(1, 60)] * 2, 1), raising=False)
        out = model.generate(self.prompt, max_new_tokens=60, do_sample=False, prompt_lookup_num_tokens=50)
        assert out.equal(model.generate(self.prompt, max_new_tokens=60, do_sample=False))


class TestPrefillInPieces:
    @pytest.mark.parametrize("size", [1, 7, 32, 33, 50, 1000])
    def test_generate_in_pieces_of_any_size(self, model: PowerRetentionForCausalLM, size: int) -> None:
        rows = [tokens(length, seed=length) for length in (41, 100)]
        ids = torch.stack([torch.cat((torch.zeros(100 - len(row), dtype=torch.long), row)) for row in rows])
        options = {"max_new_tokens": 4, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
        out = model.generate(ids, attention_mask=(ids != 0).long(), prefill_chunk_size=size, **options)
        for row, got in zip(rows, torch.stack(out.logits, 1), strict=True):
            assert_close(got, torch.cat(model.generate(row[None], **options).logits))

    def test_nothing_of_the_prompt_is_kept_but_the_state(self, model: PowerRetentionForCausalLM) -> None:
        """The largest tensor alive while a prompt is read does not grow with it."""

        class Largest(TorchDispatchMode):
            size = 0

            def __torch_dispatch__(self, function, types, arguments=(), options=None):  # type: ignore[no-untyped-def]
                out = function(*arguments, **(options or {}))
                for x in out if isinstance(out, (tuple, list)) else [out]:
                    if isinstance(x, Tensor):
                        Largest.size = max(Largest.size, x.untyped_storage().nbytes())
                return out

        sizes = []
        for length in (512, 2048):
            Largest.size = 0
            with Largest():
                model.generate(tokens(1, length), prefill_chunk_size=64, max_new_tokens=1, do_sample=False)
            sizes.append(Largest.size)
        assert sizes[0] == sizes[1]


class TestFile:
    def test_a_saved_cache_goes_on_where_it_was(self, model: PowerRetentionForCausalLM, tmp_path: Path) -> None:
        prompt, more = tokens(2, 45), tokens(2, 3, seed=8)
        cache = read(model, prompt)
        header = cache.save(tmp_path / "book.state", model, extra={"title": "Moby Dick"})
        assert (header.tokens_seen, header.p, header.layers, header.batch) == (45, 2, 2, 2)
        assert header.extra == {"position": "45", "title": "Moby Dick"}
        loaded = PowerRetentionCache.load(tmp_path / "book.state", model)
        assert loaded.get_seq_length() == 45
        assert_close(next_logits(model, more.repeat_interleave(2, 0), loaded.fork(2))[::2], alone(model, prompt, more))
        assert_close(next_logits(model, more, loaded), next_logits(model, more, cache))

    def test_another_model_is_refused(self, model: PowerRetentionForCausalLM, tmp_path: Path) -> None:
        path, other = tmp_path / "book.state", tiny_model(chunk_size=8)
        read(model, tokens(1, 5)).save(path, model)
        PowerRetentionCache.load(path, other.bfloat16())
        with torch.no_grad():
            other.model.layers[1].self_attn.k_proj.weight[0, 0] += 1
        with pytest.raises(StateError, match="belongs to the model 'weights-sample:"):
            PowerRetentionCache.load(path, other)

    def test_generation_goes_on_from_a_file(self, model: PowerRetentionForCausalLM, tmp_path: Path) -> None:
        book, question = tokens(1, 60), tokens(1, 6, seed=2)
        read(model, book).save(tmp_path / "book.state", model)
        cache = PowerRetentionCache.load(tmp_path / "book.state", model)
        mask = torch.ones(1, 66, dtype=torch.long)
        options = {"max_new_tokens": 5, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
        out = model.generate(question, attention_mask=mask, past_key_values=cache, **options)
        wanted = model.generate(torch.cat((book, question), 1), **options)
        assert out.sequences[:, 6:].equal(wanted.sequences[:, 66:])
        assert_close(torch.stack(out.logits), torch.stack(wanted.logits))

    def test_an_empty_cache_is_not_saved(self, model: PowerRetentionForCausalLM, tmp_path: Path) -> None:
        with pytest.raises(StateError, match="has read no token yet"):
            PowerRetentionCache(2).save(tmp_path / "x.state", model)
        with pytest.raises(ArgumentError, match="at least one copy"):
            PowerRetentionCache(2).fork(0)


def test_bfloat16_states_take_half_the_memory(model: PowerRetentionForCausalLM) -> None:
    ids, halves = tokens(1, 60), PowerRetentionCache(2, state_dtype=torch.bfloat16)
    for piece in ids.split(1, dim=1):
        got = next_logits(model, piece, halves)
    assert halves.states[0].memory.dtype == torch.bfloat16
    wanted = alone(model, ids)
    assert 0 < (got - wanted).norm() / wanted.norm() < 2e-2


def test_host_memory_and_back(model: PowerRetentionForCausalLM) -> None:
    cache = read(model, tokens(1, 40))
    for layer in cache.layers:
        layer.offload()
        layer.prefetch()
    assert_close(next_logits(model, tokens(1, 2, seed=3), cache), alone(model, tokens(1, 40), tokens(1, 2, seed=3)))


def test_a_transformer_cannot_use_it() -> None:
    with pytest.raises(TypeError, match="it serves a power-retention model only"):
        LlamaForCausalLM(LlamaConfig(**SHAPE))(tokens(1, 4), past_key_values=PowerRetentionCache(2))
