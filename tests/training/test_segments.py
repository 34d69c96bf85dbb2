"""Gradients in segments: however a sequence is cut, they are those of the whole."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from power_retention.errors import ArgumentError, StateError
from power_retention.layers.pieces import Piece
from power_retention.models import PowerRetentionForCausalLM
from power_retention.training.next_token import next_token_loss
from power_retention.training.segments import Carry, backward_in_segments, next_tokens
from tiny_models import VARIANTS, tiny_model, tokens

Gradients = dict[str, Tensor]


def model_of(variant: str = "llama", dtype: torch.dtype = torch.float64) -> PowerRetentionForCausalLM:
    model = tiny_model(**VARIANTS[variant]).to(dtype).train()
    if dtype == torch.float64:
        model.set_experts_implementation("eager")  # PyTorch's grouped products know no float64
    return model


def taken(model: nn.Module) -> Gradients:
    """The gradients, which are removed."""
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return grads


def whole(model: nn.Module, ids: Tensor, labels: Tensor, cu_seqlens: Tensor | None = None) -> tuple[float, Gradients]:
    """Loss and gradients of ordinary back-propagation, logits and all."""
    logits = model(ids, cu_seqlens=cu_seqlens, use_cache=False).logits
    loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100)
    loss.backward()
    return float(loss.detach()), taken(model)


def largest_error(got: Gradients, wanted: Gradients) -> float:
    assert got.keys() == wanted.keys()
    assert all(float(x.norm()) > 0 for x in wanted.values())
    return max(float((got[name] - x).norm() / x.norm()) for name, x in wanted.items())


def borders(*lengths: int) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0)


class TestExact:
    @pytest.mark.parametrize("variant", VARIANTS)
    def test_every_family(self, variant: str) -> None:
        model, ids = model_of(variant), tokens(2, 40)
        labels = next_tokens(ids)
        loss, wanted = whole(model, ids, labels)
        done = backward_in_segments(model, ids, labels, segment=16)
        assert abs(float(done.loss) - loss) < (1e-6 if variant == "glm-4.5" else 1e-12)
        # GLM's router computes in float32 whatever the model's dtype.
        assert largest_error(taken(model), wanted) < (1e-6 if variant == "glm-4.5" else 1e-12)
        assert (done.segments, done.labelled) == (3, 78)

    @settings(max_examples=12)
    @given(
        lengths=st.lists(st.sampled_from([1, 2, 3, 7, 8, 12, 16, 30]), min_size=1, max_size=8).filter(
            lambda x: sum(x) > 1
        ),
        segment=st.sampled_from([1, 3, 8, 10, 16, 50]),
        seed=st.integers(0, 3),
    )
    def test_packed_documents_cut_anywhere(self, lengths: list[int], segment: int, seed: int) -> None:
        model, ids, cu_seqlens = model_of(), tokens(1, sum(lengths), seed=seed), borders(*lengths)
        labels = next_tokens(ids, cu_seqlens)
        labels[:, :: seed + 2] = -100
        if not (labels >= 0).any():
            return
        loss, wanted = whole(model, ids, labels, cu_seqlens)
        done = backward_in_segments(model, ids, labels, segment=segment, cu_seqlens=cu_seqlens)
        assert abs(float(done.loss) - loss) < 1e-12
        got = taken(model)
        # Of all together: where documents have a token or two, some gradients are all but zero.
        size = float(torch.stack([x.norm() for x in wanted.values()]).norm())
        assert max(float((got[name] - x).norm()) for name, x in wanted.items()) <= 1e-12 * size

    def test_segments_without_any_label(self) -> None:
        model, ids = model_of(), tokens(1, 64)
        labels = torch.full_like(ids, -100)
        labels[:, 40:44] = ids[:, 41:45]
        _, wanted = whole(model, ids, labels)
        backward_in_segments(model, ids, labels, segment=8)
        assert largest_error(taken(model), wanted) < 1e-12

    def test_with_checkpointed_layers(self) -> None:
        model, ids = model_of(), tokens(1, 48)
        labels = next_tokens(ids)
        _, wanted = whole(model, ids, labels)
        model.activation_checkpointing_enable()
        backward_in_segments(model, ids, labels, segment=16)
        assert largest_error(taken(model), wanted) < 1e-12

    def test_reentrant_checkpointing_is_refused(self) -> None:
        model, ids = model_of(), tokens(1, 48)
        model.activation_checkpointing_enable({"use_reentrant": True})
        with pytest.raises(ArgumentError, match="Reentrant checkpointing loses"):
            backward_in_segments(model, ids, next_tokens(ids), segment=16)

    def test_frozen_below_a_layer(self) -> None:
        model, ids = model_of(), tokens(1, 48)
        model.requires_grad_(False)
        model.model.layers[1].self_attn.requires_grad_(True)
        labels = next_tokens(ids)
        _, wanted = whole(model, ids, labels)
        backward_in_segments(model, ids, labels, segment=16)
        assert largest_error(taken(model), wanted) < 1e-12

    def test_offloaded_states(self) -> None:
        model, ids = model_of(), tokens(1, 48)
        labels = next_tokens(ids)
        _, wanted = whole(model, ids, labels)
        done = backward_in_segments(model, ids, labels, segment=16, offload=True)
        assert largest_error(taken(model), wanted) < 1e-12
        # Two borders of two layers with two heads of width 8: 36 rows of eight values and a normaliser.
        assert done.border_bytes == 2 * 2 * 2 * 36 * 9 * 8

    def test_dropout_is_the_same_both_times(self) -> None:
        """Segments read twice see the same dropout, and the next sequence sees another."""
        model, ids = model_of(), tokens(1, 48)
        labels = next_tokens(ids)
        for layer in model.model.layers:
            layer.mlp = nn.Sequential(layer.mlp, nn.Dropout(0.3))
        reads = []
        model.model.layers[0].mlp[1].register_forward_hook(lambda module, args, out: reads.append(out.detach() == 0))
        torch.manual_seed(0)
        for _ in range(2):
            backward_in_segments(model, ids, labels, segment=16)
        first, second, third, second_again, first_again, *others = reads
        assert first.equal(first_again)
        assert second.equal(second_again)
        assert not any(x.equal(y) for x, y in zip((first, second, third), others, strict=False))

    def test_bfloat16_is_as_close_as_its_rounding(self) -> None:
        """To the float64 gradient, as close as ordinary back-propagation in bfloat16, give or take a tenth."""
        exact, ids = model_of(), tokens(1, 256)
        labels = next_tokens(ids)
        _, wanted = whole(exact, ids, labels)
        model = model_of(dtype=torch.float32)
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(ids, use_cache=False).logits
        F.cross_entropy(logits.float().flatten(0, 1), labels.flatten()).backward()
        ordinary = largest_error(taken(model), wanted)
        backward_in_segments(model, ids, labels, segment=64, precision=torch.bfloat16)
        assert largest_error(taken(model), wanted) < 1.1 * ordinary < 0.2

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"segment": 0}, "positive number of tokens"),
            ({"segment": 8, "bptt": "exactly"}, "must be one of exact, truncated, state_passing"),
            ({"segment": 8, "cu_seqlens": borders(3, 4)}, "must rise from 0 to 20"),
        ],
    )
    def test_what_does_not_fit_is_refused(self, arguments: dict, message: str) -> None:
        ids = tokens(1, 20)
        with pytest.raises(ArgumentError, match=message):
            backward_in_segments(model_of(), ids, ids, **arguments)


class TestTruncated:
    def test_gradients_end_at_a_segments_beginning(self) -> None:
        """Each segment by itself from the states before it, which are constants; and that is not the exact gradient."""
        model, ids = model_of(), tokens(1, 48)
        labels = next_tokens(ids)
        _, exact = whole(model, ids, labels)
        states = None
        for start in range(0, 48, 16):
            span = slice(start, start + 16)
            out = model(
                ids[:, span],
                position_ids=torch.arange(start, start + 16)[None],
                states=states,
                return_states=True,
                use_cache=False,
            )
            (F.cross_entropy(out.logits.flatten(0, 1), labels[:, span].flatten(), reduction="sum") / 47).backward()
            states = [s._replace(memory=s.memory.detach(), normalizer=s.normalizer.detach()) for s in out.states]
        wanted = taken(model)
        done = backward_in_segments(model, ids, labels, segment=16, bptt="truncated", keep_carry=True)
        got = taken(model)
        assert largest_error(got, wanted) < 1e-12
        assert largest_error(got, exact) > 1e-3
        assert done.carry is not None
        assert done.carry.position == 48
        assert all(a.memory.equal(b.memory) for a, b in zip(done.carry.states, states, strict=True))

    def test_states_pass_from_document_to_document(self) -> None:
        """Packed or not, the row is one stream; where gradients may go anywhere it is that of a single document."""
        model, ids = model_of(), tokens(1, 48)
        labels = next_tokens(ids)
        backward_in_segments(model, ids, labels, segment=16, bptt="truncated")
        wanted = taken(model)
        backward_in_segments(model, ids, labels, segment=16, bptt="state_passing", cu_seqlens=borders(10, 20, 18))
        assert largest_error(taken(model), wanted) < 1e-12


class TestCarry:
    @pytest.mark.parametrize("bptt", ["exact", "truncated"])
    def test_a_document_in_two_calls(self, bptt: str) -> None:
        """Segments of 16 in calls of 48 and 32 tokens are truncated between the calls, and only there if they are exact."""
        model, ids = model_of(), tokens(1, 80)
        labels, both = next_tokens(ids), [slice(0, 48), slice(48, 80)]
        carry: Carry | None = None
        losses = []
        for span in both:
            options = {"carry": carry, "keep_carry": True, "total": 79.0}
            done = backward_in_segments(model, ids[:, span], labels[:, span], segment=16, bptt=bptt, **options)
            carry = done.carry
            losses.append(float(done.loss))
        got = taken(model)
        segment = {"exact": 48, "truncated": 16}[bptt]
        alone = backward_in_segments(model, ids, labels, segment=segment, bptt="truncated", keep_carry=True)
        assert largest_error(got, taken(model)) < 1e-12
        assert abs(sum(losses) - float(alone.loss)) < 1e-12
        assert carry is not None
        assert alone.carry is not None
        assert carry.position == alone.carry.position == 80
        for a, b in zip(carry.states, alone.carry.states, strict=True):
            torch.testing.assert_close(a.memory, b.memory, rtol=1e-12, atol=1e-12)

    def test_a_carried_document_ends_within_the_row(self) -> None:
        model, ids = model_of(), tokens(1, 60)
        labels = next_tokens(ids, borders(40, 20))
        first = backward_in_segments(model, ids[:, :30], labels[:, :30], segment=16, keep_carry=True, total=58.0)
        second = backward_in_segments(
            model,
            ids[:, 30:],
            labels[:, 30:],
            segment=16,
            carry=first.carry,
            cu_seqlens=borders(10, 20),
            keep_carry=True,
            total=58.0,
        )
        taken(model)
        loss, _ = whole(model, ids, labels, borders(40, 20))
        assert abs(float(first.loss + second.loss) - loss) < 1e-12
        assert second.carry is not None
        assert second.carry.position == 20


class TestLoss:
    @pytest.mark.parametrize("bias", [False, True])
    def test_it_is_cross_entropy(self, bias: bool) -> None:
        """Of a bare head and of any other; rows without a label take no part."""
        torch.manual_seed(0)
        hidden, head = (
            torch.randn(2, 9, 16, dtype=torch.float64, requires_grad=True),
            nn.Linear(16, 50, bias=bias).double(),
        )
        labels = torch.randint(0, 50, (2, 9)).masked_fill(torch.rand(2, 9) < 0.4, -100)
        results = []
        for loss in (
            F.cross_entropy(head(hidden).flatten(0, 1), labels.flatten(), reduction="sum") / 7,
            next_token_loss(hidden, head, labels, 7),
        ):
            results.append((loss, *torch.autograd.grad(3 * loss, (hidden, *head.parameters()))))
        for got, wanted in zip(*results, strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-13, atol=1e-15)

    def test_rows_without_a_label_never_meet_the_vocabulary(self) -> None:
        seen = []
        head = nn.Linear(16, 50)
        head.register_forward_hook(lambda module, args, out: seen.append(len(out)))
        labels = torch.full((1, 100), -100)
        labels[0, 7:9] = 3
        next_token_loss(torch.randn(1, 100, 16), nn.Sequential(head), labels, 2.0)
        assert seen == [2]

    def test_nothing_labelled_is_still_connected(self) -> None:
        hidden, head = torch.randn(1, 4, 16, requires_grad=True), nn.Linear(16, 50, bias=False)
        loss = next_token_loss(hidden, head, torch.full((1, 4), -100), 1.0)
        loss.backward()
        assert float(loss.detach()) == 0
        assert hidden.grad is not None
        assert head.weight.grad is not None


class TestTrunk:
    def test_states_of_a_cache_and_of_a_piece_are_the_same(self) -> None:
        model, ids = model_of().eval(), tokens(2, 30)
        with torch.no_grad():
            out = model(ids, return_states=True, use_cache=False)
            cache = model(ids, use_cache=True).past_key_values
        for got, wanted in zip(out.states, cache.states, strict=True):
            torch.testing.assert_close(got.memory, wanted.memory.to(got.memory.dtype), rtol=1e-5, atol=1e-5)

    def test_as_many_states_as_layers(self) -> None:
        model, ids = model_of(), tokens(1, 8)
        out = model(ids, return_states=True, use_cache=False)
        with pytest.raises(ArgumentError, match="holds 1 states; one for each of 2 layers"):
            model(ids, states=out.states[:1], use_cache=False)
        with pytest.raises(ArgumentError, match="exclude each other"):
            model(ids, states=out.states, use_cache=True)

    def test_a_narrowed_state_is_refused(self) -> None:
        """Rather than trained on: what FSDP's casting of inputs would do to it unseen."""
        model, ids = model_of(), tokens(1, 8)
        states = model(ids, return_states=True, use_cache=False).states
        narrow = [s._replace(memory=s.memory.bfloat16(), normalizer=s.normalizer.bfloat16()) for s in states]
        with pytest.raises(StateError, match="cast_forward_inputs"):
            model(ids, states=narrow, use_cache=False)

    @pytest.mark.parametrize("count", range(1, 6))
    def test_parts_of_a_piece_cover_it(self, count: int) -> None:
        piece = Piece(tuple(range(0, 3 * count + 1, 3)), returns_state=True)
        parts = piece.parts(torch.device("cpu"))
        covered = [b for span, _ in parts for b in (span.start, span.stop)]
        covered += [int(b) + span.start for span, cu_seqlens in parts if cu_seqlens is not None for b in cu_seqlens]
        assert sorted(set(covered)) == list(piece.borders)
        assert len(parts) == min(count, 3)
