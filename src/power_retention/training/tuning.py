"""Fine-tuning on examples: phases of growing length, exact gradients over whole documents, states carried between steps.

A step is a pure function of weights, optimiser state, carried states, data and its number, so a run that is stopped and resumed
ends with the same weights bit for bit.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn

from power_retention.errors import ArgumentError, CheckpointError, DataError
from power_retention.files import clear_write_errors, read_toml, write_json
from power_retention.ops import PowerState
from power_retention.ops.heads import compute_dtype
from power_retention.training.examples import Example
from power_retention.training.folder import RunFolder
from power_retention.training.layers import compile_tokenwise, recompute_layers
from power_retention.training.parallel import ALONE
from power_retention.training.retraining import Metrics
from power_retention.training.schedule import warmed_cosine
from power_retention.training.segments import Bptt, Carry, backward_in_segments, trunk_of

NO_LABEL = -100


@dataclass(frozen=True)
class TuningPhase:
    """Steps of one length.

    Attributes:
        steps: how many.
        length: tokens of the longest document that is read whole; with ``carry``, tokens a step.
        rows: a step reads up to ``rows`` × ``length`` tokens, whole documents packed; 1 with ``carry``.
        segment: tokens between two borders of the back-propagation, see :mod:`power_retention.training.segments`.
        bptt: see :data:`power_retention.training.segments.Bptt`.
        carry: read documents of any length over several steps, each going on from the states that the step before left.
        name: for people.
    """

    steps: int
    length: int
    rows: int = 1
    segment: int = 32768
    bptt: Bptt = "exact"
    carry: bool = False
    name: str = ""

    def __post_init__(self) -> None:
        for name in ("steps", "length", "rows", "segment"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ArgumentError(f"{name} of a phase must be a positive whole number, not {value!r}.")
        for name, kind, wanted in (("carry", bool, "true or false"), ("name", str, "a text")):
            if not isinstance(value := getattr(self, name), kind):
                raise ArgumentError(f"{name} of a phase must be {wanted}, not {value!r}.")
        if self.bptt not in get_args(Bptt):
            raise ArgumentError(f"bptt of a phase must be one of {', '.join(get_args(Bptt))}, not {self.bptt!r}.")
        if self.carry and self.rows > 1:
            raise ArgumentError("A phase that carries states reads one row; leave rows to 1 and raise its length.")

    @property
    def continues(self) -> bool:
        """Whether steps leave states to one another."""
        return self.carry or self.bptt == "state_passing"


@dataclass(frozen=True)
class TuningRecipe:
    """What a fine-tuning does, as numbers.

    Attributes:
        phases: one after another.
        lr: peak learning rate: warm-up, then a cosine down to a tenth.
        warmup_share: share of all steps spent warming up.
        clip: largest gradient norm.
        seed: of the order of documents.
        precision: of the matrix products; trained weights and optimiser state are float32.
        lora: rank of the adapters that are trained instead of the weights; 0 trains the weights.
        lora_alpha: their scale.
        checkpointed: whether layers keep their inputs only.
    """

    phases: tuple[TuningPhase, ...]
    lr: float = 2e-5
    warmup_share: float = 0.03
    clip: float = 1.0
    seed: int = 0
    precision: Literal["float32", "bfloat16"] = "float32"
    lora: int = 0
    lora_alpha: float = 16.0
    checkpointed: bool = False

    def __post_init__(self) -> None:
        if not self.phases:
            raise ArgumentError("A fine-tuning needs at least one phase, and none was given.")
        if not 0 < self.lr < math.inf:
            raise ArgumentError(f"The learning rate must be a finite number above 0, such as 2e-5, not {self.lr}.")
        if not 0 < self.clip < math.inf:
            raise ArgumentError(f"Gradients can be clipped to a finite norm above 0, not to {self.clip}.")
        if self.lora < 0:
            raise ArgumentError(
                f"The rank of adapters must be at least 1, or 0 to train the weights themselves, not {self.lora}."
            )

    @property
    def steps(self) -> int:
        """In all."""
        return sum(phase.steps for phase in self.phases)

    @property
    def tokens_per_step(self) -> int:
        """Tokens read in a step at most, on average."""
        return sum(phase.steps * phase.rows * phase.length for phase in self.phases) // self.steps

    def place(self, step: int) -> tuple[int, int]:
        """(number of its phase, number within the phase) of a step, all counted from 0."""
        within = step
        for number, phase in enumerate(self.phases):
            if within < phase.steps:
                return number, within
            within -= phase.steps
        raise ArgumentError(f"The run has {self.steps} steps; there is no step {step}.")

    def phase(self, step: int) -> TuningPhase:
        """The one that a step (counted from 0) belongs to."""
        return self.phases[self.place(step)[0]]

    def stage(self, step: int) -> str:
        """The name of its phase."""
        return self.phase(step).name

    def learning_rate(self, step: int) -> float:
        """Of a step."""
        return self.lr * warmed_cosine(step, self.steps, warmup_share=self.warmup_share, final_share=0.1)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TuningRecipe:
        """What :meth:`to_dict` gave."""
        return cls(**{**values, "phases": tuple(TuningPhase(**phase) for phase in values["phases"])})


@dataclass(frozen=True)
class Span:
    """Tokens ``start`` to ``stop`` of one example."""

    example: int
    start: int
    stop: int


def read_curriculum(path: Path) -> tuple[list[Path], list[TuningPhase]]:
    """(data files, phases) of a TOML file.

    It has ``data``, a list of files or folders beside it, and a table ``[[phase]]`` for each phase, with the fields of
    :class:`TuningPhase`; ``steps`` and ``length`` have no default.

    Raises:
        DataError: it cannot be read, or has something else in it.
    """
    content = read_toml(path)
    data, tables = content.get("data"), content.get("phase")
    if sorted(content) != ["data", "phase"] or not isinstance(tables, list):
        raise DataError(
            f"{path} has {', '.join(map(repr, sorted(content))) or 'nothing'}; data and [[phase]] were expected."
        )
    if not isinstance(data, list) or not data or not all(isinstance(name, str) for name in data):
        raise DataError(f'{path} needs data = ["chats.jsonl"], a list of files or folders.')
    if not tables:
        raise DataError(f"{path} has no phase; at least one table [[phase]] with steps and length was expected.")
    phases = [_phase(path, number, table) for number, table in enumerate(tables, 1)]
    return [path.parent / name for name in data], phases


def _phase(path: Path, number: int, table: Any) -> TuningPhase:
    where = f"{path}, phase {number}"
    if not isinstance(table, dict):
        raise DataError(f"{where}, is {table!r}; a table with steps and length was expected.")
    known = [field.name for field in fields(TuningPhase)]
    if unknown := sorted(table.keys() - set(known)):
        raise DataError(f"{where}, has {', '.join(map(repr, unknown))}; it may have {', '.join(known)}.")
    if missing := {"steps", "length"} - table.keys():
        raise DataError(f"{where}, lacks {' and '.join(sorted(missing))}.")
    try:
        return TuningPhase(**{"name": f"phase {number}", **table})
    except ArgumentError as error:
        raise DataError(f"{where}: {error}") from error


def plan_phase(lengths: Sequence[int], phase: TuningPhase, *, seed: int) -> list[list[Span]]:
    """What each step of a phase reads.

    Documents come in an order drawn anew for each time through all of them.  Without ``carry`` they are packed whole, those
    longer than the phase's length left out; with it they are one stream, cut wherever a step ends.

    Raises:
        DataError: no document is short enough.
    """
    order = _stream(lengths, phase, seed)
    return [_carried(order, phase) for _ in range(phase.steps)] if phase.carry else _packed(order, phase)


class _Stream:
    """Whole documents without end, of which the next can be looked at, and be taken in part."""

    def __init__(self, spans: Iterator[Span]) -> None:
        self._spans = spans
        self.next = next(spans)

    def take(self, tokens: int) -> Span:
        span = self.next
        if span.stop - span.start <= tokens:
            self.next = next(self._spans)
            return span
        self.next = Span(span.example, span.start + tokens, span.stop)
        return Span(span.example, span.start, span.start + tokens)


def _stream(lengths: Sequence[int], phase: TuningPhase, seed: int) -> _Stream:
    usable = [i for i, length in enumerate(lengths) if phase.carry or length <= phase.length]
    if not usable:
        raise DataError(
            f"{phase.name or 'A phase'} reads documents of up to {phase.length:,} tokens, and the shortest has "
            f"{min(lengths):,}: raise its length, or let it carry = true."
        )

    def forever() -> Iterator[Span]:
        epoch = 0
        while True:
            # numpy takes no negative seeds; those of 64 bits, times the million of Tuning._plan, stay as they are.
            for i in np.random.default_rng([seed % 2**128, epoch]).permutation(len(usable)):
                yield Span(usable[i], 0, lengths[usable[i]])
            epoch += 1

    return _Stream(forever())


def _packed(stream: _Stream, phase: TuningPhase) -> list[list[Span]]:
    rows = []
    for _ in range(phase.steps):
        row, left = [stream.take(phase.length)], phase.rows * phase.length
        left -= row[0].stop
        while stream.next.stop <= left:
            row.append(stream.take(left))
            left -= row[-1].stop
        rows.append(row)
    return rows


def _carried(stream: _Stream, phase: TuningPhase) -> list[Span]:
    row, left = [], phase.length
    while left:
        row.append(stream.take(left))
        left -= row[-1].stop - row[-1].start
    return row


class TuningFolder(RunFolder):
    """The files of a fine-tuning."""

    def begin_tuning(self, recipe: TuningRecipe, inputs: dict[str, Any]) -> None:
        """Write down what the run will do."""
        with clear_write_errors(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
        write_json(self.settings, {"tuning": recipe.to_dict(), "inputs": inputs})

    def read_tuning(self) -> tuple[TuningRecipe, dict[str, Any]]:
        """(recipe, inputs) of the run begun here.

        Raises:
            CheckpointError: it is damaged, or no fine-tuning.
        """
        try:
            settings = json.loads(self.settings.read_text(encoding="utf-8"))
            return TuningRecipe.from_dict(settings["tuning"]), settings["inputs"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(
                f"{self.settings} cannot be read as a fine-tuning's ({type(error).__name__}: {error}); start in a new folder."
            ) from error


class Tuning:
    """Model, examples and optimiser of one run.

    Args:
        model: what is called: a power-retention model, or PEFT's around one; what of it needs gradients is trained.
        examples: the data.
        recipe: what to do.
        device: where; the model is moved there.
        compiled: fuse what layers do to each token by ``torch.compile``: the first steps take a minute longer.
    """

    def __init__(
        self,
        model: nn.Module,
        examples: Sequence[Example],
        recipe: TuningRecipe,
        device: torch.device | None = None,
        *,
        compiled: bool = False,
    ) -> None:
        self.model, self.examples, self.recipe = model.train(), examples, recipe
        self.device = device or next(model.parameters()).device
        model.to(self.device)
        layers = trunk_of(model).layers
        if compiled:
            compile_tokenwise(layers)
        if recipe.checkpointed:
            recompute_layers(layers)
        self.ranks, self.data_shift = ALONE, 0
        self._lengths = [len(example) for example in examples]
        self._plans = [self._plan(number, phase.steps) for number, phase in enumerate(recipe.phases)]
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        carries = any(phase.continues for phase in recipe.phases)
        self.student = Kept(trained, empty_states(model, self.device) if carries else [])
        self.optimizer = torch.optim.AdamW(trained.values(), betas=(0.9, 0.95), weight_decay=0.0, fused=True)

    def step(self, step: int) -> Metrics:
        """Take optimiser step ``step`` (counted from 0); a step whose gradient is not finite changes no weight."""
        metrics = self.gradients(step)
        trained = list(self.student.trained.values())
        norm = torch.nn.utils.clip_grad_norm_(trained, self.recipe.clip)
        metrics["gradient_norm"] = float(norm)
        self.optimizer.param_groups[0]["lr"] = self.recipe.learning_rate(step)
        metrics["skipped"] = float(not torch.isfinite(norm))
        if metrics["skipped"]:
            self.student.keep(None)  # states that are not finite would make every later step so
        elif metrics["labelled"]:
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return metrics

    def _plan(self, number: int, steps: int) -> list[list[Span]]:
        """What so many steps of a phase read; a longer plan begins like a shorter one."""
        phase = replace(self.recipe.phases[number], steps=steps)
        return plan_phase(self._lengths, phase, seed=self.recipe.seed * 1_000_003 + number)

    def row(self, step: int) -> list[Span]:
        """What a step reads; where data were left out since the last checkpoint, what comes after them in its phase."""
        number, within = self.recipe.place(step)
        within += self.data_shift
        if within >= len(self._plans[number]):
            self._plans[number] = self._plan(number, 2 * within)
        return self._plans[number][within]

    def gradients(self, step: int) -> Metrics:
        """Compute the gradients of a step without taking it; carried states move on."""
        phase, row = self.recipe.phase(step), self.row(step)
        ids, labels, cu_seqlens = (x.to(self.device) for x in self.read(row))
        first, last = row[0], row[-1]
        passing = phase.bptt == "state_passing"
        cut = last.stop < len(self.examples[last.example])
        carry = self.student.carry if phase.continues and (passing or self.student.stopped_at(first)) else None
        done = backward_in_segments(
            self.model,
            ids,
            labels,
            segment=phase.segment,
            bptt=phase.bptt,
            cu_seqlens=cu_seqlens,
            carry=carry,
            keep_carry=phase.continues and (cut or passing),
            precision=torch.bfloat16 if self.recipe.precision == "bfloat16" else None,
        )
        if phase.continues:
            self.student.keep(done.carry, last)
        return {
            "loss": float(done.loss),
            "labelled": float(done.labelled),
            "tokens_read": float(ids.numel()),
            "segments": float(done.segments),
            "border_mb": done.border_bytes / 1e6,
        }

    def read(self, row: Sequence[Span]) -> tuple[Tensor, Tensor, Tensor]:
        """Ids and labels ``[1, T]`` and borders ``[documents + 1]`` of what a step reads."""
        ids, labels = [], []
        for span in row:
            example = self.examples[span.example]
            ids.append(example.ids[span.start : span.stop].astype(np.int64))
            # What follows a cut document's last token is known, and learned with it.
            following = np.full(span.stop - span.start, NO_LABEL, np.int64)
            after = slice(span.start + 1, span.stop + 1)
            count = len(example.ids[after])
            following[:count] = np.where(example.learned[after], example.ids[after], NO_LABEL)
            labels.append(following)
        borders = np.cumsum([0, *(len(x) for x in ids)])
        return (
            torch.from_numpy(np.concatenate(ids))[None],
            torch.from_numpy(np.concatenate(labels))[None],
            torch.from_numpy(borders),
        )


class Kept(nn.Module):
    """What a run must not lose: the trained parameters and the carried states, as parameters of one module.

    Args:
        trained: by name; shared with the model.
        states: of each layer, to be overwritten; none where no phase carries any.
    """

    def __init__(self, trained: dict[str, nn.Parameter], states: list[PowerState]) -> None:
        super().__init__()
        self.trained = nn.ParameterDict({name.replace(".", ":"): p for name, p in trained.items()})
        self._states = states
        tensors = [x for state in states for x in state[:2]]
        self.carried = nn.ParameterList([nn.Parameter(x, requires_grad=False) for x in tensors])
        # Position of the next token, and the example and the place in it where the last step stopped.
        place = torch.full((3,), -1.0, dtype=torch.float64)
        self.place = nn.Parameter(place, requires_grad=False) if states else None

    @property
    def carry(self) -> Carry | None:
        """What the last step left, if it left anything."""
        if self.place is None or float(self.place[0].detach()) < 0:
            return None
        tensors = [x.detach().clone() for x in self.carried]
        states = [
            state._replace(memory=memory, normalizer=normalizer)
            for state, memory, normalizer in zip(self._states, tensors[::2], tensors[1::2], strict=True)
        ]
        return Carry(states, int(self.place[0].detach()))

    def stopped_at(self, span: Span) -> bool:
        """Whether a span goes on where the last step stopped."""
        return self.place is not None and span.start > 0 and self.place[1:].tolist() == [span.example, span.start]

    @torch.no_grad()
    def keep(self, carry: Carry | None, last: Span | None = None) -> None:
        """Overwrite what was left, after the last tokens read; None leaves nothing."""
        if self.place is None:
            return
        if carry is None or last is None:
            self.place.fill_(-1)
            return
        self.place.copy_(torch.tensor([carry.position, last.example, last.stop], dtype=self.place.dtype))
        for kept, x in zip(self.carried, (x for state in carry.states for x in state[:2]), strict=True):
            kept.copy_(x)


def empty_states(model: nn.Module, device: torch.device) -> list[PowerState]:
    """States of one sequence before its first token."""
    trunk = trunk_of(model)
    heads, d = trunk.config.num_key_value_heads, trunk.config.head_dim
    assert heads is not None
    assert d is not None
    dtype = compute_dtype(trunk.embed_tokens.weight.dtype)
    options: dict[str, Any] = {"p": trunk.config.power, "dtype": dtype, "device": device}
    return [PowerState.empty(1, heads, d, **options) for _ in trunk.layers]


def with_adapters(model: nn.Module, rank: int, alpha: float) -> nn.Module:
    """The model with low-rank adapters on every projection of its mixers and MLPs, which alone are trained; gates are small,
    and trained as they are.

    Raises:
        ArgumentError: PEFT is not installed.
    """
    try:
        import peft
    except ImportError as error:
        raise ArgumentError('Adapters take PEFT: pip install "power-retention[neighbours]".') from error
    projections = r".*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj|c_fc|c_proj)"
    options: dict[str, Any] = {"r": rank, "lora_alpha": alpha, "task_type": "CAUSAL_LM"}
    options |= {"target_modules": projections, "modules_to_save": ["g_proj"]}
    wrapped: nn.Module = peft.get_peft_model(model, peft.LoraConfig(**options))
    return wrapped
