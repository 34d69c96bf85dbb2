"""What a run looks like from outside: the student against its teacher on held-out text, and the health of its mixers.

A probe draws nothing at random and leaves weights, optimiser and modes as they are, so a run with probes ends with the same
weights, bit for bit, as one without.  Where a model is divided among ranks all of them probe together.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from power_retention.errors import ArgumentError
from power_retention.layers import PowerRetentionMixer
from power_retention.models import PowerRetentionForCausalLM
from power_retention.ops.heads import FORGET, integer_power
from power_retention.training.domains import Domain
from power_retention.training.losses import TokenComparison, compare_tokens
from power_retention.training.mixture import PackedBatch
from power_retention.training.recipe import Recipe
from power_retention.training.retraining import Retraining
from power_retention.training.teaching import read_documents

Record = dict[str, Any]
OCTAVES = 20
"""Bins of gate half-lives: [1, 2), [2, 4), …; shorter ones count in the first, longer ones in the last."""
_HEALTH_TOKENS = 512
_PROBES = 20


def probe_steps(recipe: Recipe, every: int | None = None) -> frozenset[int]:
    """After how many steps to probe: before the first, at the end of each stage, and in between.

    Args:
        recipe: of the run.
        every: steps between probes; None for a twentieth of the run.
    """
    if every is not None and every < 1:
        raise ArgumentError(f"Probes every {every} steps were asked for; at least 1 was expected.")
    every = every or -(-recipe.steps // _PROBES)
    borders = {step for step in range(1, recipe.steps) if recipe.stage(step) != recipe.stage(step - 1)}
    return frozenset({*range(0, recipe.steps, every), *borders, recipe.steps})


class Probes:
    """Measures the student of a run now and then.

    Args:
        retraining: the run.
        domains: held-out text.
        every: steps between probes; None for a twentieth of the run.
        progress: called with (domains read by the teacher, domains), which it does once.
    """

    def __init__(
        self,
        retraining: Retraining,
        domains: Sequence[Domain],
        *,
        every: int | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        if not domains:
            raise ArgumentError("Probes need at least one domain of held-out text; name one.")
        self.retraining, self.domains = retraining, list(domains)
        self._steps = probe_steps(retraining.recipe, every)
        self._wanted: list[list[Tensor]] = []
        for done, domain in enumerate(self.domains, start=1):
            self._wanted.append([self._teach(batch) for batch in domain.batches])
            if progress:
                progress(done, len(self.domains))

    def due(self, step: int) -> bool:
        """Whether to probe after ``step`` steps."""
        return step in self._steps

    def measure(self) -> Record:
        """Measure the student as it is.

        Returns:
            ``domains``: by name ``loss``, ``teacher_loss``, ``kl`` (nats a token), ``agreement`` (share of tokens for which
            both find the same one likeliest), ``tokens``, ``kept_out`` and ``by_position``, in which entry 0 is about tokens
            with nothing before them and entry i ≥ 1 about those with 2^(i−1) to 2^i − 1 tokens of their document before them.
            ``layers``: see :func:`mixer_health`; empty where the model computes softmax attention.
        """
        student = self.retraining.student
        with _uncompiled(), _reading(student), torch.no_grad(), self.retraining.autocast():
            domains = {
                domain.name: self._measure(domain, wanted)
                for domain, wanted in zip(self.domains, self._wanted, strict=True)
            }
            layers = mixer_health(student, self._health_text(), self.retraining.trunk)
        if isinstance(self.retraining.trunk, FSDPModule):
            self.retraining.trunk.reshard()  # as no backward pass does it: what is trained and saved are the parts
        return {"domains": domains, "layers": layers}

    def _measure(self, domain: Domain, wanted: Sequence[Tensor]) -> Record:
        parts: list[TokenComparison] = []
        contexts: list[Tensor] = []
        for batch, teacher_hidden in zip(domain.batches, wanted, strict=True):
            labels = batch.labels.flatten()
            known = labels >= 0
            hidden = self._read(batch)[known.to(self.retraining.device)]
            heads = self._head(self.retraining.student), self._head(self.retraining.teacher)
            teacher_hidden = teacher_hidden[known].to(hidden)
            parts.append(compare_tokens(hidden, heads[0], teacher_hidden, heads[1], labels[known]))
            contexts.append(batch.position_ids.flatten()[known])
        tokens = TokenComparison(*(torch.cat(each).double().cpu() for each in zip(*parts, strict=True)))
        return {**_means(tokens), "kept_out": domain.kept_out, "by_position": _by_position(tokens, torch.cat(contexts))}

    def _read(self, batch: PackedBatch) -> Tensor:
        """``[B·T, hidden]``: the student's last hidden state."""
        device = self.retraining.device
        hidden: Tensor = self.retraining.trunk(
            input_ids=batch.ids.to(device).flatten()[None],
            position_ids=batch.position_ids.to(device).flatten()[None],
            cu_seqlens=batch.cu_seqlens.to(device),
            use_cache=False,
        )
        return hidden[0].to(self.retraining.dtype)

    def _teach(self, batch: PackedBatch) -> Tensor:
        """``[B·T, hidden]`` in main memory: the teacher's last hidden state."""
        device = self.retraining.device
        read = (batch.ids.to(device), batch.position_ids.to(device), batch.cu_seqlens.to(device))
        with _uncompiled(), torch.no_grad():
            return read_documents(self.retraining.taught, *read).flatten(0, 1).cpu()

    def _head(self, model: PreTrainedModel) -> Callable[[Tensor], Tensor]:
        weight = model.lm_head.weight
        if isinstance(weight, DTensor):  # a part of it: all ranks put it together
            weight = weight.full_tensor()
        return partial(F.linear, weight=weight.to(self.retraining.dtype))

    def _health_text(self) -> Tensor:
        """``[domains, T]``: the start of each domain, read as one text."""
        return torch.stack([domain.batches[0].ids[0, :_HEALTH_TOKENS] for domain in self.domains])


@torch.no_grad()
def mixer_health(student: PowerRetentionForCausalLM, ids: Tensor, trunk: nn.Module | None = None) -> list[Record]:
    """What the mixers of each layer make of ``ids`` ``[B, T]``; empty for softmax attention, which has no gates or state.

    Args:
        student: the model.
        ids: token ids.
        trunk: what to call, if not the student's own trunk.

    Returns:
        A layer ``half_life``, the 10 %, 50 % and 90 % quantiles over tokens and heads of ln 2 / −log g, in tokens;
        ``octaves``, how many of them fall in [2^i, 2^(i+1)); ``state_norm``, mean and maximum over sequences and heads of
        the norm ‖S‖ = (Σ_ij decay_i decay_j (σ k_i·k_j)^p v_i·v_j)^½ of the state after T tokens, which does not depend on how
        φ is laid out; ``smallest_normalizer``, the smallest denominator of any query and head as a share of what it would be
        if the query pointed along every key: near float32's 1e-7, outputs are rounding errors.
    """
    layers: list[Record] = []

    def observe(mixer: PowerRetentionMixer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        layers.append(_observe(mixer, args[0], args[1]))

    # Before the call: after it, weights that are divided among ranks are put away.
    handles = [m.register_forward_pre_hook(observe, with_kwargs=True) for m in student.mixers if not m.softmax]
    try:
        (trunk or student.model)(input_ids=ids.to(next(student.parameters()).device), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return layers


def _observe(mixer: PowerRetentionMixer, x: Tensor, position_embeddings: tuple[Tensor, Tensor]) -> Record:
    q, k = mixer.queries_and_keys(x, *position_embeddings)
    if mixer.k_bias is not None:
        k = k + mixer.k_bias.to(k.dtype)
    v = mixer.v_proj(x).unflatten(-1, (-1, mixer.head_dim))
    log_g = mixer.log_gates(x)
    half_lives = math.log(2) / -log_g.clamp(max=-1e-9)
    octaves = half_lives.log2().floor().clamp(0, OCTAVES - 1).long().flatten().bincount(minlength=OCTAVES)
    quantiles = half_lives.flatten().quantile(torch.tensor([0.1, 0.5, 0.9], device=x.device))
    with torch.autocast(x.device.type, enabled=False):
        rows = [_state_of(q[i].float(), k[i].float(), v[i].float(), log_g[i], mixer.p) for i in range(len(x))]
    norms, normalizers = (torch.stack(each) for each in zip(*rows, strict=True))
    return {
        "half_life": quantiles.tolist(),
        "octaves": octaves.tolist(),
        "state_norm": [float(norms.mean()), float(norms.max())],
        "smallest_normalizer": float(normalizers.min()),
    }


def _state_of(q: Tensor, k: Tensor, v: Tensor, log_g: Tensor, p: int) -> tuple[Tensor, Tensor]:
    """(norm of the state ``[H]``, smallest share of the largest possible normaliser ``[H]``) after one sequence.

    q ``[T, Hq, d]``, k and v ``[T, H, d]``, log_g ``[T, H]``.
    """
    heads, scale = k.shape[1], q.shape[-1] ** -0.5
    cumulative = log_g.double().clamp(min=FORGET).cumsum(0).T  # [H, T]
    to_end = (cumulative[:, -1:] - cumulative).exp().float()
    decay = (cumulative[:, :, None] - cumulative[:, None, :]).tril().exp().tril().float()  # [H, T, T]
    similar = integer_power(scale * torch.einsum("ihd,jhd->hij", k, k), p)
    squared = torch.einsum("hi,hj,hij,hij->h", to_end, to_end, similar, torch.einsum("ihd,jhd->hij", v, v))
    q = q.unflatten(1, (heads, -1))
    weights = integer_power(torch.einsum("ihrd,jhd->hrij", F.normalize(q, dim=-1), k), p)
    largest = k.norm(dim=-1).T[:, None, None, :] ** p
    shares = (weights * decay[:, None]).sum(-1) / (largest * decay[:, None]).sum(-1)
    return squared.clamp(min=0).sqrt(), shares.flatten(1).amin(1)


def _means(tokens: TokenComparison) -> Record:
    return {
        "tokens": len(tokens.loss),
        "loss": float(tokens.loss.mean()),
        "teacher_loss": float(tokens.teacher_loss.mean()),
        "kl": float(tokens.kl.mean()),
        "agreement": float(tokens.agrees.mean()),
    }


def _by_position(tokens: TokenComparison, context: Tensor) -> Record:
    """The same, by powers of two of the tokens before; None where there are none."""
    octave = torch.where(context > 0, context.clamp(min=1).double().log2().floor().long() + 1, 0)
    size = int(octave.max()) + 1
    count = octave.bincount(minlength=size)

    def mean(values: Tensor) -> list[float | None]:
        sums = torch.zeros(size, dtype=torch.float64).index_add_(0, octave, values)
        return [float(total / n) if n else None for total, n in zip(sums, count, strict=True)]

    by_name = {"loss": tokens.loss, "teacher_loss": tokens.teacher_loss, "kl": tokens.kl}
    return {"tokens": count.tolist()} | {name: mean(values) for name, values in by_name.items()}


def _uncompiled() -> AbstractContextManager[object]:
    """While open, nothing is compiled or runs as it was: shapes met here must not change what a step is compiled to."""
    stance: AbstractContextManager[object] = torch.compiler.set_stance("force_eager")
    return stance


@contextmanager
def _reading(model: nn.Module) -> Iterator[None]:
    """Evaluation mode while open; afterwards every module is as it was."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
