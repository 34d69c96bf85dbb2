"""The retraining itself: a step is a pure function of the weights, the optimiser state, the seed and the step number."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from power_retention.conversion.calibrate import attention_visited, position_offsets
from power_retention.errors import ArgumentError
from power_retention.machine import matmul_rate
from power_retention.models import PowerRetentionForCausalLM
from power_retention.training.layers import compile_layers, outputs_kept, recompute_layers
from power_retention.training.losses import distillation_loss, hidden_state_loss
from power_retention.training.mixture import Mixture
from power_retention.training.parallel import ALONE, Ranks, Trunk, hand_out, hold_whole, make_root, parallelize
from power_retention.training.recipe import Recipe, Stage
from power_retention.training.recording import Figures, Recording
from power_retention.training.teaching import prepare_teacher, read_documents
from power_retention.training.text import Tokens, sample_batch

Metrics = dict[str, float]


@dataclass(frozen=True)
class _Reading:
    """What a step reads: ids, labels and positions ``[B, T]``; for packed documents also what keeps them apart."""

    ids: Tensor
    labels: Tensor
    positions: Tensor
    starts: Tensor  # [B, T] boolean, for the student
    cu_seqlens: Tensor | None = None  # borders in the flattened ids, for the teacher


class Retraining:
    """Student, teacher, tokens and optimiser of one run.

    Args:
        student: the converted model, in float32; it is trained in place.
        teacher: the Transformer it came from; it is only read.
        tokens: the training text: one row of it, or a mixture of token shards whose documents do not see each other.
        recipe: what to do.
        device: where; both models are moved there.  By default where the student is.
        compiled: fuse the layers and the loss by ``torch.compile``: the first step of a stage takes a minute longer then.
        recorded: replay a step's gradients from a CUDA graph, which a small model needs to keep a GPU busy; where every rank
            holds all weights.
        recompute: keep a layer's input only and compute the layer again in the backward pass: less memory, a third more work.
        ranks: the processes that share the work.  Both models are sharded over them, unless each is to hold all weights, with
            those of the first rank; the others may bring theirs on the meta device.  Every batch is the recipe's, whoever
            reads which part of it.

    Attributes:
        trunk: the student up to its last hidden state: what is called.
        taught: the same of the teacher.
        data_shift: step ``s`` reads the data of step ``s + data_shift``.
    """

    def __init__(
        self,
        student: PowerRetentionForCausalLM,
        teacher: PreTrainedModel,
        tokens: Tokens | Mixture,
        recipe: Recipe,
        *,
        device: torch.device | None = None,
        compiled: bool = False,
        recorded: bool = False,
        recompute: bool = False,
        ranks: Ranks = ALONE,
    ) -> None:
        if recorded and (recompute or not ranks.whole):
            raise ArgumentError(
                "A step can be recorded where every rank holds all weights, and without computing layers again."
            )
        self.student, self.teacher, self.tokens, self.recipe = student, teacher, tokens, recipe
        self.device, self.compiled, self.ranks = device or student.device, compiled, ranks
        self.rows, self.data_shift = ranks.rows(recipe.batch), 0
        self._ahead: tuple[int, _Reading] | None = None
        self._recordings: dict[Stage, Recording[_Reading]] | None = {} if recorded else None
        self._pool: Any = None  # of memory that the recordings share
        if recorded and ranks.size > 1:
            ranks.before_leaving.append(self._forget_recordings)
        self._pieces = 0
        self.dtype = torch.bfloat16 if recipe.precision == "bfloat16" else torch.float32
        prepare_teacher(teacher, self.dtype)
        student.train()
        if compiled:
            compile_layers(teacher.model.layers)
            compile_layers(student.model.layers, whole=ranks.whole)
        if recompute:
            recompute_layers(student.model.layers)
        self.taught = self._place(teacher)
        self.trunk = self._place(student, self.dtype if self.dtype != torch.float32 else None)
        mixer, other = _split_parameters(student)
        groups = [{"params": mixer}, {"params": other}]
        self.optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.0, fused=True)

    def step(self, step: int) -> Metrics:
        """Take optimiser step ``step`` (counted from 0); a step whose loss is not finite changes nothing."""
        stage, read = self.recipe.stage(step), self._read(step)
        for group, rate in zip(self.optimizer.param_groups, self.recipe.learning_rates(step), strict=True):
            group["lr"] = rate
        figures = self._computed(read, stage)
        if self._recordings is None:
            if torch.isfinite(figures["gradient_norm"]):
                self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        else:
            # Neither waits for the device: the optimiser looks there whether to do nothing, and the next data are read.
            self.optimizer.found_inf = 1 - torch.isfinite(figures["gradient_norm"]).float()  # type: ignore[attr-defined]
            self.optimizer.step()
            self._ahead = step + 1 + self.data_shift, self._read(step + 1)
        metrics = self._metrics(figures)
        return metrics | {"skipped": float(not math.isfinite(metrics["gradient_norm"]))}

    def gradients(self, step: int, stage: Stage | None = None) -> Metrics:
        """Compute the gradients of a step without taking it; of another stage's loss if one is named."""
        return self._metrics(self._gradients(self._read(step), stage or self.recipe.stage(step)))

    def _computed(self, read: _Reading, stage: Stage) -> Figures:
        """The clipped gradients of a step, replayed where they are recorded."""
        recorded = self._recordings is not None
        return self._recording(read, stage).replay(read) if recorded else self._clipped_gradients(read, stage)

    def _clipped_gradients(self, read: _Reading, stage: Stage) -> Figures:
        figures = self._gradients(read, stage)
        return figures | {"gradient_norm": _clip(self._trained, self.recipe.clip)}

    def _gradients(self, read: _Reading, stage: Stage) -> Figures:
        figures = self._align(read) if stage == "align" else self._distil(read)
        if self.ranks.whole:
            self.ranks.average_gradients(self._trained)
        return figures

    def _metrics(self, figures: Figures) -> Metrics:
        """Figures of this rank as numbers of all; the gradient's norm is everyone's already."""
        numbers = torch.stack([value.double() for value in figures.values()]).tolist()  # waits for the device once
        metrics = dict(zip(figures, numbers, strict=True))
        norm = {name: metrics.pop(name) for name in ("gradient_norm",) if name in metrics}
        metrics = self.ranks.mean_of(metrics)
        if "kl" not in metrics:
            metrics["alignment_error"] = math.sqrt(metrics["loss"])
        return metrics | norm

    def _recording(self, read: _Reading, stage: Stage) -> Recording[_Reading]:
        """The recorded gradients of a stage; recorded when first asked for, and again for more documents than had room."""
        assert self._recordings is not None
        if stage not in self._recordings or not self._recordings[stage].fits(read):
            self._recordings.pop(stage, None)
            if not self._recordings:
                self._pool = torch.cuda.graph_pool_handle()  # one that nothing recorded uses any more is gone
            compute = partial(self._clipped_gradients, stage=stage)
            self._recordings[stage] = Recording(compute, read, self._trained, self._pool)
        return self._recordings[stage]

    def _forget_recordings(self) -> None:
        assert self._recordings is not None
        for recording in self._recordings.values():
            recording.graph.reset()
        self._recordings.clear()

    @property
    def _trained(self) -> list[Tensor]:
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def _read(self, step: int) -> _Reading:
        recipe, ranks = self.recipe, self.ranks
        step += self.data_shift
        if self._ahead is not None and self._ahead[0] == step:
            return self._ahead[1]
        largest = self.student.config.max_position_embeddings - recipe.length
        offsets = position_offsets(recipe.batch, largest, seed=recipe.seed * 1_000_003 + step)[self.rows, None]
        if isinstance(self.tokens, Mixture):
            share = recipe.batch // ranks.size
            packed = self.tokens.batch(
                step, ranks.rank, ranks=ranks.size, batch=share, length=recipe.length, seed=recipe.seed
            )
            ids, labels, positions = packed.ids, packed.labels, packed.position_ids + offsets
            return self._sent(ids, labels, positions, packed.document_starts, self._with_room(packed.cu_seqlens))
        batch = sample_batch(self.tokens, batch=recipe.batch, length=recipe.length + 1, seed=recipe.seed, step=step)
        ids, labels = batch[self.rows, :-1], batch[self.rows, 1:]
        return self._sent(ids, labels, torch.arange(recipe.length) + offsets, torch.zeros_like(ids, dtype=torch.bool))

    def _sent(self, *parts: Tensor) -> _Reading:
        """A reading on the device; what it is busy with is not waited for."""
        if self.device.type == "cuda":
            parts = tuple(part.contiguous().pin_memory().to(self.device, non_blocking=True) for part in parts)
        return _Reading(*parts)

    def _with_room(self, cu_seqlens: Tensor) -> Tensor:
        """Borders of documents, so that nothing is recorded or compiled anew where another number of them comes.

        On a GPU their number seldom changes: pieces without tokens follow the last one.
        """
        if self.device.type != "cuda":
            torch._dynamo.maybe_mark_dynamic(cu_seqlens, 0)
            return cu_seqlens
        most = self.ranks.most(len(cu_seqlens))  # all ranks record anew, or none
        if most > self._pieces:
            self._pieces = 2 << most.bit_length()
        return F.pad(cu_seqlens, (0, self._pieces - len(cu_seqlens)), value=int(cu_seqlens[-1]))

    def _align(self, read: _Reading) -> Figures:
        errors: list[Tensor] = []
        mixers = self.student.mixers

        def visit(index: int, x: Tensor, position_embeddings: tuple[Tensor, Tensor], wanted: Tensor) -> None:
            # Backward layer by layer: only one mixer's activations exist at a time.
            with torch.enable_grad(), self.autocast():
                got, _ = mixers[index](x, position_embeddings, starts=read.starts)
                error = (got.float() - wanted.float()).square().mean() / self.ranks.mean(wanted.float().square().mean())
            error.backward()
            errors.append(error.detach())

        with attention_visited(self.teacher, visit), torch.no_grad():
            self._teach(read)
        return {"loss": torch.stack(errors).mean()}

    def _distil(self, read: _Reading) -> Figures:
        weight = self.recipe.hidden_weight
        teacher, student = ([*model.model.layers] if weight else [] for model in (self.teacher, self.student))
        with outputs_kept(teacher) as theirs, torch.no_grad():
            wanted = self._teach(read)
        with outputs_kept(student) as ours, self.autocast():
            hidden = self.trunk(
                input_ids=read.ids, position_ids=read.positions, document_starts=read.starts, use_cache=False
            )
        labels = read.labels.flatten()
        loss, kl, next_token = distillation_loss(
            hidden.to(self.dtype).flatten(0, 1),
            self.student.lm_head.weight,
            wanted.flatten(0, 1),
            self.teacher.lm_head.weight,
            labels,
            self.recipe.next_token_weight,
            labelled=self.ranks.mean((labels >= 0).sum().double()).clamp(min=1),
            compiled=self.compiled,
        )
        figures = {"kl": kl, "next_token_loss": next_token}
        if weight:
            pairs = zip(ours, theirs, strict=True)
            error = torch.stack([hidden_state_loss(*pair, compiled=self.compiled) for pair in pairs]).mean()
            loss = loss + weight * error
            figures["hidden_error"] = error.detach()
        loss.backward()
        return {"loss": loss.detach(), **figures}

    def _teach(self, read: _Reading) -> Tensor:
        """``[B, T, hidden]``: the teacher's last hidden state."""
        return read_documents(self.taught, read.ids, read.positions, read.cu_seqlens)

    def _place(self, model: PreTrainedModel, dtype: torch.dtype | None = None) -> Trunk:
        """Bring a model to where it is computed with, divided among the ranks; returns what is called."""
        trunk, mesh = Trunk(model), self.ranks.mesh
        if mesh is None:
            model.to(self.device)
        elif self.ranks.whole:
            hand_out(model, self.ranks, self.device, lambda: hold_whole(model, self.device))
        else:
            hand_out(model, self.ranks, self.device, lambda: parallelize(model, mesh, dtype, root=trunk))
            make_root(trunk)
        return trunk

    def autocast(self) -> AbstractContextManager[object]:
        """What the student computes in: bfloat16 if the recipe says so."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16)

    def seconds_per_step(self) -> dict[str, float]:
        """How long a step of each stage takes here; nothing is trained by asking."""
        seconds: dict[str, float] = {}
        stages: tuple[Stage, ...] = ("align", "distil")
        for stage in stages:
            passes = []
            for _ in range(3):
                started = time.perf_counter()
                self._metrics(self._computed(self._read(0), stage))
                passes.append(time.perf_counter() - started)
                self.optimizer.zero_grad(set_to_none=True)
            seconds[stage] = min(passes[1:])  # the first warms up caches and allocators, compiles and records
        return seconds


def steps_within(minutes: float, seconds_per_step: dict[str, float], align_share: float) -> int:
    """How many steps fit, given what a step of each stage takes; an optimiser step adds about a tenth."""
    mean = align_share * seconds_per_step["align"] + (1 - align_share) * seconds_per_step["distil"]
    return max(2, int(minutes * 60 / (1.1 * mean)))


def fastest_precision(device: torch.device | str = "cpu") -> str:
    """``bfloat16`` where ``device`` multiplies it clearly faster than float32, else ``float32``."""
    wide, narrow = (matmul_rate(dtype, device=device) for dtype in (torch.float32, torch.bfloat16))
    return "bfloat16" if 0.6 * narrow > wide else "float32"


def _clip(parameters: list[Tensor], largest: float) -> Tensor:
    """Scale gradients down to a total norm of ``largest``; returns the norm they had, over all ranks."""
    with_gradient = [p for p in parameters if p.grad is not None]
    norm = torch.nn.utils.get_total_norm([p.grad for p in with_gradient if p.grad is not None])
    if isinstance(norm, DTensor):
        norm = norm.full_tensor()
    torch.nn.utils.clip_grads_with_norm_(with_gradient, largest, norm)
    return norm


def _split_parameters(student: PowerRetentionForCausalLM) -> tuple[list[Tensor], list[Tensor]]:
    """(parameters of the mixers, all others), each once."""
    mixer: list[Tensor] = [p for each in student.mixers for p in each.parameters()]
    known = {id(p) for p in mixer}
    return mixer, [p for p in _trainable(student) if id(p) not in known]


def _trainable(student: PowerRetentionForCausalLM) -> Iterator[Tensor]:
    return (p for p in student.parameters() if p.requires_grad)
