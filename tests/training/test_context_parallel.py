"""Ranks that share a sequence, and ranks that shard the parameters: outputs and gradients are those of one rank."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from worlds import in_ranks

from power_retention.errors import ArgumentError
from power_retention.layers.scan import ContextParallel
from power_retention.models import PowerRetentionForCausalLM
from power_retention.models.sizes import state_bytes
from power_retention.training.context import bytes_received, share_context, sum_gradients, sum_when_sharded
from power_retention.training.next_token import next_token_loss
from power_retention.training.parallel import Ranks, make_mesh, parallelize
from power_retention.training.segments import backward_in_segments, next_tokens, share_of_rank
from tiny_models import VARIANTS, tiny_model, tokens

TOKENS = 48
CASES: dict[str, tuple[int, ...]] = {
    "one document": (48,),
    "a border at a rank's edge": (24, 24),
    "documents across ranks": (5, 30, 13),
    "more documents than ranks": (1, 2, 10, 20, 3, 12),
    "a rank in the middle of a document": (3, 40, 5),
}
VARIANT_NAMES = ("llama", "qwen3, wide heads", "p = 4", "bare gates")


def model_of(variant: str = "llama") -> PowerRetentionForCausalLM:
    return tiny_model(**VARIANTS[variant]).double().train()


def borders(lengths: tuple[int, ...]) -> Tensor | None:
    return None if len(lengths) == 1 else torch.tensor([0, *lengths]).cumsum(0)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    grads = {}
    for name, p in model.named_parameters():
        assert p.grad is not None, name
        grads[name] = p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad
    return grads


def worst(got: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    assert got.keys() == wanted.keys()
    return max(float((got[name] - x).norm() / x.norm()) for name, x in wanted.items())


def reference(
    variant: str, rows: Tensor, cu_seqlens: Tensor | None, labels: Tensor | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """Last hidden states and gradients of one rank that has everything, in one piece."""
    model, labels = model_of(variant), next_tokens(rows, cu_seqlens) if labels is None else labels
    hidden = model.model(rows, cu_seqlens=cu_seqlens, use_cache=False).last_hidden_state
    next_token_loss(hidden, model.lm_head, labels, float((labels >= 0).sum())).backward()
    return hidden.detach(), gradients(model)


def sharing(ranks: DeviceMesh, lengths: tuple[int, ...], variant: str, batch: int) -> dict[str, float]:
    """One call on all ranks, without any segments."""
    rows, cu_seqlens = tokens(batch, TOKENS), borders(lengths)
    hidden, wanted = reference(variant, rows, cu_seqlens)
    labels = next_tokens(rows, cu_seqlens)
    model = model_of(variant)
    context = share_context(model, ranks)
    span = slice(context.rank * TOKENS // context.size, (context.rank + 1) * TOKENS // context.size)
    got = model.model(rows[:, span], cu_seqlens=cu_seqlens, use_cache=False).last_hidden_state
    forward = context.traffic.received_bytes
    next_token_loss(got, model.lm_head, labels[:, span], float((labels >= 0).sum())).backward()
    sum_gradients(model, context)
    return {
        "hidden": float((got.detach() - hidden[:, span]).norm() / hidden[:, span].norm()),
        "gradients": worst(gradients(model), wanted),
        "bytes forward": forward - bytes_received(model.config, context.size, sequences=batch, wide=True),
        "bytes backward": context.traffic.received_bytes
        - forward
        - (context.size - 1) * batch * 2 * state_bytes(model.config, ring=0),
    }


def in_segments(
    ranks: DeviceMesh, lengths: tuple[int, ...], segment: int, checkpointed: bool, unlabelled: int = 0
) -> dict[str, float]:
    """On all ranks; ``unlabelled`` tokens at the beginning leave the first ranks nothing to learn."""
    rows, cu_seqlens = tokens(1, TOKENS), borders(lengths)
    labels = next_tokens(rows, cu_seqlens)
    labels[:, :unlabelled] = -100
    _, wanted = reference("llama", rows, cu_seqlens, labels)
    model = model_of()
    if checkpointed:
        model.activation_checkpointing_enable()
    context = share_context(model, ranks)
    mine = [share_of_rank(x, segment, context) for x in (rows, labels)]
    backward_in_segments(model, *mine, segment=segment, cu_seqlens=cu_seqlens)
    sum_gradients(model, context)
    return {"gradients": worst(gradients(model), wanted)}


def shard(model: nn.Module, mesh: Any, **options: Any) -> None:
    """FSDP2 as one uses it: every layer by itself, then the rest."""
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh, **options)
    fully_shard(model, mesh=mesh, **options)


def sharded_and_shared(ranks: DeviceMesh) -> dict[str, float]:
    """Parameters and sequences over the same ranks, in segments."""
    rows, cu_seqlens = tokens(1, TOKENS), borders((5, 30, 13))
    _, wanted = reference("llama", rows, cu_seqlens)
    model = model_of()
    context = share_context(model, ranks)
    shard(model, ranks)
    sum_when_sharded(model)
    mine = [share_of_rank(x, 16, context) for x in (rows, next_tokens(rows, cu_seqlens))]
    backward_in_segments(model, *mine, segment=16, cu_seqlens=cu_seqlens)
    return {"gradients": worst(gradients(model), wanted)}


def sharded(ranks: DeviceMesh, checkpointed: bool) -> dict[str, float]:
    """Parameters sharded, each rank with a row of its own: the mean of the ranks' gradients."""
    rank, size = ranks.get_local_rank(), ranks.size()
    rows = tokens(size, TOKENS)
    _, wanted = reference("llama", rows, None)
    model = model_of()
    if checkpointed:
        model.activation_checkpointing_enable()
    shard(model, ranks)
    own = rows[rank : rank + 1]
    backward_in_segments(model, own, next_tokens(own), segment=16)
    return {"gradients": worst(gradients(model), wanted)}


def parallelized(everyone: Ranks) -> dict[str, float]:
    """The same, sharded in two groups as runs do it."""
    rows = tokens(everyone.size, TOKENS)
    _, wanted = reference("llama", rows, None)
    model = model_of()
    parallelize(model, make_mesh("cpu", everyone.size, dp_replicate=2))
    own = rows[everyone.rank : everyone.rank + 1]
    backward_in_segments(model, own, next_tokens(own), segment=16)
    return {"gradients": worst(gradients(model), wanted)}


def narrowed(ranks: DeviceMesh) -> str:
    """What FSDP's casting of inputs comes to."""
    model = model_of().float()
    shard(model, ranks, mp_policy=MixedPrecisionPolicy(torch.bfloat16))
    try:
        backward_in_segments(model, tokens(1, 32), tokens(1, 32), segment=16)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def essentials(ranks: DeviceMesh) -> dict[str, dict[str, float]]:
    """Documents that cross ranks, by themselves, in segments, and with sharded parameters."""
    return {
        "documents across ranks": sharing(ranks, CASES["documents across ranks"], "llama", 1),
        "more documents than ranks": sharing(ranks, CASES["more documents than ranks"], "llama", 1),
        "in segments": in_segments(ranks, (5, 30, 13), 16, checkpointed=False),
        "sharded and shared": sharded_and_shared(ranks),
    }


def everything(ranks: DeviceMesh) -> dict[str, dict[str, float]]:
    """All checks among some ranks."""
    done = essentials(ranks)
    for name, lengths in CASES.items():
        done[name] = sharing(ranks, lengths, "llama", 1)
    for variant in VARIANT_NAMES:
        done[f"{variant}, two rows"] = sharing(ranks, (TOKENS,), variant, 2)
    done["a border at a segment's and a rank's edge"] = in_segments(ranks, (24, 24), 24, checkpointed=False)
    done["last segment shorter"] = in_segments(ranks, (5, 30, 13), 20, checkpointed=False)
    done["ranks with nothing to learn"] = in_segments(ranks, (5, 30, 13), 48, checkpointed=False, unlabelled=30)
    done["segments, checkpointed"] = in_segments(ranks, (5, 30, 13), 16, checkpointed=True)
    done["sharded"] = sharded(ranks, checkpointed=False)
    done["sharded, checkpointed"] = sharded(ranks, checkpointed=True)
    return done


def of_two_and_four(everyone: Ranks) -> tuple[list[dict[str, dict[str, float]]], str]:
    """In one start of the processes, which takes longer than the checks: first two pairs beside each other, then all four."""
    pair = init_device_mesh("cpu", (2, 2), mesh_dim_names=("pair", "cp"))["cp"]
    four = init_device_mesh("cpu", (4,), mesh_dim_names=("cp",))
    of_four = essentials(four) | {"sharded in two groups": parallelized(everyone)}
    return [everything(pair), of_four], narrowed(pair)


def test_two_and_four_ranks_give_what_one_gives() -> None:
    for checks, refused in in_ranks(of_two_and_four, 4):
        assert "StateError" in refused
        assert "cast_forward_inputs=False" in refused
        for done in checks:
            for name, errors in done.items():
                for what, error in errors.items():
                    assert abs(error) < (1e-12 if "bytes" not in what else 1), (name, what, error)


def test_what_cannot_be_shared_is_refused() -> None:
    context = ContextParallelOf(4)
    assert share_of_rank(torch.arange(16)[None], 8, context).tolist() == [[2, 3, 10, 11]]
    for tokens_, segment in ((16, 6), (18, 8)):
        with pytest.raises(ArgumentError, match="cannot be shared equally by 4 ranks"):
            share_of_rank(torch.arange(tokens_)[None], segment, context)
    with pytest.raises(ArgumentError, match="cu_seqlens ends at 12; 4 ranks with 4 tokens each hold 16"):
        context.scan(4, (0, 5, 12), continued=False)


def test_starts_of_documents_are_refused() -> None:
    model = model_of()
    model.model.context_parallel = ContextParallelOf(4)
    with pytest.raises(ArgumentError, match="say it with cu_seqlens"):
        model(tokens(1, 8), document_starts=torch.zeros(1, 8, dtype=torch.bool), use_cache=False)


@pytest.mark.parametrize("lengths", CASES.values())
@pytest.mark.parametrize("size", [2, 4, 8])
def test_ranks_know_what_crosses_them(lengths: tuple[int, ...], size: int) -> None:
    """By the definition: token by token."""
    own = TOKENS // size
    document = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).tolist()
    everything = (0, *torch.tensor(lengths).cumsum(0).tolist())
    scan = ContextParallelOf(size).scan(own, everything, continued=False)
    for rank in range(size):
        pieces = document[rank * own : (rank + 1) * own]
        enters = rank > 0 and document[rank * own - 1] == pieces[0]
        assert scan.enters[rank] == enters
        assert scan.passes[rank] == (enters and len(set(pieces)) == 1)
        local = ContextParallelOf(size, rank).borders(own, everything)
        assert [pieces[a] for a, _ in pairwise(local)] == sorted(set(pieces))


class ContextParallelOf(ContextParallel):
    """Of so many ranks, without any."""

    def __init__(self, size: int, rank: int = 1) -> None:
        object.__setattr__(self, "_sizes", (size, rank))

    @property
    def size(self) -> int:
        return self._sizes[0]

    @property
    def rank(self) -> int:
        return self._sizes[1]
