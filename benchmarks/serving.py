"""What serving costs: users that fit, time of a step and tokens a second against batch and context, ours beside the parent's.

    python benchmarks/serving.py results.json --figure serving.png [--minutes 4] [--shapes 135m,14b] [--quick]

Weights are random, in the shapes of SmolLM2-135M and of Brumby-14B (all of its layers: nothing is extrapolated).  Ours is the
server's batch (``PowerRetentionRows``), with states in float32 and bfloat16; the parent is transformers' own class with a
key/value cache in memory taken once, whose attention is cuDNN's or PyTorch's FlashAttention, the faster of the two.  Contexts
are simulated: random states, random keys and values.  Before anything is timed, a batch of real prompts is decoded and
compared with the plain model, which is shown the whole text.  A step is a CUDA graph on a GPU; ``batcher`` is what the server
makes of it.  ``--quick`` runs all of it in small on any machine.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import statistics
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import (
    AutoModelForCausalLM,
    Cache,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
)
from transformers.cache_utils import DynamicLayer

from power_retention.cli.env import collect
from power_retention.conversion.families import parent_config_to_ours
from power_retention.evaluation.drawing import STUDENT_COLOUR, TEACHER_COLOUR, figure_file
from power_retention.evaluation.figure import against_context
from power_retention.files import write_json
from power_retention.machine import copy_rate
from power_retention.models import PowerRetentionCache, PowerRetentionConfig, PowerRetentionForCausalLM
from power_retention.models.rows import PowerRetentionRows
from power_retention.models.sizes import kv_bytes_per_token, state_bytes
from power_retention.ops import PowerState, RingState
from power_retention.ops.ring import FOLD_SIZE
from power_retention.serving.sampling import Draw
from power_retention.serving.server.batcher import Batcher, Ended, Event, Grown, Question

SHAPES: dict[str, PreTrainedConfig] = {
    "135m": LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, tie_word_embeddings=True,
    ),
    "14b": Qwen3Config(
        vocab_size=151936, hidden_size=5120, intermediate_size=17408, num_hidden_layers=40, num_attention_heads=40,
        num_key_value_heads=8, head_dim=128, tie_word_embeddings=False,
    ),
    "tiny": LlamaConfig(
        vocab_size=128, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, tie_word_embeddings=True,
    ),
}  # fmt: skip
NAMES = {"135m": "SmolLM2-135M", "14b": "Brumby-14B", "tiny": "a tiny model"}
STATE_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
PARENT = "Transformer"
TOLERANCE = {torch.bfloat16: 1e-1, torch.float32: 1e-3}
"""Of logits, relative: what rounding makes of a random model (in bfloat16 1.5 % of 30 layers, 5 to 6 % of 40 wide ones, whoever
computes them, cuDNN and FlashAttention included); another context is 140 % away."""
PARENT_STEPS = 12


@dataclass(frozen=True)
class Settings:
    """What is measured.

    Attributes:
        memory: bytes that users may take on a CPU; on a GPU it is what is free beside the weights.
    """

    shapes: tuple[str, ...]
    batches: tuple[int, ...]
    contexts: tuple[int, ...]
    device: torch.device
    dtype: torch.dtype
    memory: int
    answer: int


@dataclass
class Report:
    """Rows as they are found, printed at once; ``deadline`` in seconds of the clock."""

    deadline: float
    rows: list[dict[str, Any]] = field(default_factory=list)

    def add(self, kind: str, **row: Any) -> None:
        self.rows.append({"kind": kind, **row})
        shown = {name: f"{value:.4g}" if isinstance(value, float) else value for name, value in row.items()}
        print(kind, *(f"{name}={value}" for name, value in shown.items() if not isinstance(value, dict)), flush=True)

    @property
    def late(self) -> bool:
        return time.monotonic() > self.deadline


# ── one step ─────────────────────────────────────────────────────────────────────────────────────────────────────────


class Step:
    """One token for every sequence of a batch; each ``run`` is one, the third and later ones from a CUDA graph."""

    def __init__(
        self,
        model: PreTrainedModel,
        cache: Cache,
        ids: Tensor,
        positions: Tensor,
        backend: SDPBackend | None = None,
    ) -> None:
        self.model, self.cache, self.ids, self.positions, self.backend = model, cache, ids, positions, backend
        self.graph: torch.cuda.CUDAGraph | None = None
        self.eager_runs, self.refused = 0, ""

    def run(self) -> Tensor:
        """Logits ``[B, vocab]`` of the token in ``ids`` at ``positions``."""
        if self.ids.device.type != "cuda" or self.refused or self.eager_runs < 2:
            self.eager_runs += 1
            return self._compute()
        if self.graph is None:
            self._capture()
        if self.graph is None:
            return self._compute()
        self.graph.replay()
        return self.logits

    @torch.inference_mode()
    def _compute(self) -> Tensor:
        with nullcontext() if self.backend is None else sdpa_kernel(self.backend):
            out = self.model(
                self.ids, position_ids=self.positions, past_key_values=self.cache, use_cache=True, logits_to_keep=1
            )
        return out.logits[:, -1]

    def _capture(self) -> None:
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        try:
            with torch.cuda.graph(graph):
                self.logits = self._compute()
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # a model that cannot be recorded is timed as it is, and its row says so
            self.refused = f"{type(error).__name__}: {first_line(error)}"
            return
        self.graph = graph


def step_times(run: Callable[[], object], warm_up: int, steps: int, device: torch.device) -> list[float]:
    """Milliseconds of each step."""
    for _ in range(warm_up):
        run()
    if device.type != "cuda":
        marks = [time.perf_counter()]
        for _ in range(steps):
            run()
            marks.append(time.perf_counter())
        return [1000 * (b - a) for a, b in pairwise(marks)]
    torch.cuda.synchronize()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(steps + 1)]
    events[0].record()
    for event in events[1:]:
        run()
        event.record()
    torch.cuda.synchronize()
    return [a.elapsed_time(b) for a, b in pairwise(events)]


def figures(times: list[float], batch: int) -> dict[str, float]:
    """Of the mean step, folds included; and how steps spread."""
    deciles = statistics.quantiles(times, n=10)
    mean = statistics.mean(times)
    return {
        "ms": mean,
        "p10": deciles[0],
        "p90": deciles[-1],
        "most": max(times),
        "tokens_per_second": 1000 * batch / mean,
    }


# ── memory ───────────────────────────────────────────────────────────────────────────────────────────────────────────


class KeptLayer(DynamicLayer):
    """Keys and values in memory taken once; the newest token is written in the last place, over the one before it."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        super().__init__()
        self.keys, self.values = keys, values
        self.dtype, self.device, self.is_initialized = keys.dtype, keys.device, True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        self.keys[:, :, -1:].copy_(key_states)
        self.values[:, :, -1:].copy_(value_states)
        return self.keys, self.values

    def get_seq_length(self) -> int:
        return self.keys.shape[-2] - 1

    def get_mask_sizes(self, query_length: Any) -> tuple[int, int]:
        return self.keys.shape[-2], 0


def kept_cache(config: PreTrainedConfig, batch: int, context: int, dtype: torch.dtype, device: torch.device) -> Cache:
    """Random keys and values of ``context`` tokens, the one that is read next included."""

    def draw() -> Tensor:
        return torch.randn(batch, config.num_key_value_heads, context, config.head_dim, dtype=dtype, device=device)

    return Cache(layers=[KeptLayer(draw(), draw()) for _ in range(config.num_hidden_layers)])


@torch.inference_mode()
def filled_rows(
    model: PowerRetentionForCausalLM, batch: int, context: int, state_dtype: torch.dtype
) -> PowerRetentionRows:
    """A batch of random states, their rings filled unequally, as those of users who came at different times are."""
    config, device = model.config, model.device
    cache = PowerRetentionCache(config.num_hidden_layers, state_dtype=state_dtype)
    for layer in cache.layers:
        state = PowerState.empty(1, config.num_key_value_heads, config.head_dim, p=config.power, device=device)
        layer.store(state._replace(memory=state.memory.normal_(), normalizer=state.normalizer.uniform_(1, 2)), context)
    rows, token, held = PowerRetentionRows(config.num_hidden_layers, batch), torch.ones(1, 1, dtype=torch.long), 0
    for row in range(batch):
        while held < 1 + row * FOLD_SIZE // batch:
            model(token.to(device), past_key_values=cache, use_cache=True, logits_to_keep=1)
            held += 1
        rows.join(cache)
    return rows


def free_memory(settings: Settings) -> int:
    """Bytes that users may take."""
    forget()
    return torch.cuda.mem_get_info()[0] if settings.device.type == "cuda" else settings.memory


def forget() -> None:
    """Give back what nobody holds any more: to the device, and to the system, which counts it as ours until then."""
    gc.collect()
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def users_that_fit(allocate: Callable[[int], object], predicted: int, settings: Settings) -> int:
    """Memory is taken for users until there is no more, at last for one at a time."""
    forget()
    before = psutil.Process().memory_info().rss
    held: list[object] = []
    users, block = 0, max(1, predicted // 8)
    while block:
        try:
            piece = allocate(block)
            taken = psutil.Process().memory_info().rss - before
            if settings.device.type != "cuda" and taken > settings.memory:
                raise MemoryError
        except (torch.OutOfMemoryError, MemoryError):
            piece, block = None, block // 2
            continue
        held.append(piece)
        users += block
    del held
    forget()
    return users


def states_of(config: Any, settings: Settings, dtype: torch.dtype) -> Callable[[int], object]:
    sizes = (config.num_key_value_heads, config.head_dim)

    def allocate(users: int) -> list[RingState]:
        options: dict[str, Any] = {"dtype": settings.dtype, "state_dtype": dtype, "device": settings.device}
        rings = [RingState.empty(users, *sizes, **options) for _ in range(config.num_hidden_layers)]
        for ring in rings:
            ring._map(lambda tensor: tensor.fill_(1))  # memory of zeros may be promised only
        return rings

    return allocate


def caches_of(config: PreTrainedConfig, settings: Settings, context: int) -> Callable[[int], object]:
    def allocate(users: int) -> list[Tensor]:
        shape = (2, users, config.num_key_value_heads, context, config.head_dim)
        options: dict[str, Any] = {"dtype": settings.dtype, "device": settings.device}
        return [torch.ones(shape, **options) for _ in range(config.num_hidden_layers)]

    return allocate


def our_config(parent: PreTrainedConfig) -> PowerRetentionConfig:
    """The same shape with our mixers."""
    return parent_config_to_ours(parent, p=2, gate_bias=True, key_bias=False, chunk_size=None, parent=None)


def measure_users(report: Report, shape: str, settings: Settings) -> None:
    """Users that fit beside the weights: as the sizes predict, and as memory was given."""
    parent = SHAPES[shape]
    ours = our_config(parent)
    element = settings.dtype.itemsize
    cases: list[tuple[str, int | None, int, Callable[[int], object]]] = [
        (name, None, state_bytes(ours, dtype.itemsize, activation_bytes=element), states_of(ours, settings, dtype))
        for name, dtype in STATE_DTYPES.items()
    ]
    for context in settings.contexts:
        cases.append(
            (PARENT, context, kv_bytes_per_token(ours, element) * context, caches_of(parent, settings, context))
        )
    for who, context, size, allocate in cases:
        if report.late:
            report.add("users", shape=shape, who=who, context=context, refused="not run: out of time")
            continue
        free = free_memory(settings)
        measured = users_that_fit(allocate, free // size, settings)
        report.add("users", shape=shape, who=who, context=context, bytes_a_user=size, free_bytes=free,
                   predicted=free // size, measured=measured)  # fmt: skip


# ── first: is it right? ──────────────────────────────────────────────────────────────────────────────────────────────


def relative(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm())


def judged(report: Report, shape: str, who: str, got: Tensor, want: Tensor, graphed: bool, dtype: torch.dtype) -> bool:
    """The rows end in the same token, so that only what was read before tells them apart: that must be seen, too."""
    error, other = relative(got, want), relative(got, want.roll(1, 0))
    right = error <= TOLERANCE[dtype] and other > 4 * error
    report.add("check", shape=shape, who=who, right=right, error=error, error_of_other_rows=other, graphed=graphed)
    return right


@torch.inference_mode()
def check_ours(report: Report, shape: str, model: PowerRetentionForCausalLM, state_dtype: str) -> bool:
    """Ragged prompts, decoded together past a fold, against one forward over each."""
    device, steps = model.device, FOLD_SIZE + 5
    prompts = [torch.randint(1, model.config.vocab_size, (1, n), device=device) for n in (3, 40, 77)]
    answers = torch.randint(1, model.config.vocab_size, (len(prompts), steps), device=device)
    answers[:, -1] = 1
    rows = PowerRetentionRows(model.config.num_hidden_layers, len(prompts))
    for prompt in prompts:
        cache = PowerRetentionCache(model.config.num_hidden_layers, state_dtype=STATE_DTYPES[state_dtype])
        model(prompt, past_key_values=cache, use_cache=True)
        rows.join(cache)
    ids = torch.zeros(len(prompts), 1, dtype=torch.long, device=device)
    positions = torch.tensor([[prompt.shape[1]] for prompt in prompts], device=device)
    step = Step(model, rows, ids, positions)
    for t in range(steps):
        ids.copy_(answers[:, t : t + 1])
        got = step.run()
        positions.add_(1)
    whole = [
        model(torch.cat((p, a[None]), 1), use_cache=False).logits[0, -1] for p, a in zip(prompts, answers, strict=True)
    ]
    return judged(report, shape, state_dtype, got, torch.stack(whole), step.graph is not None, model.dtype)


@torch.inference_mode()
def check_parent(report: Report, shape: str, model: PreTrainedModel, backend: SDPBackend | None) -> bool:
    """The same of the parent: its cache is filled by itself, and a step is compared with one forward."""
    device, tokens = model.device, 64
    ids = torch.randint(1, model.config.vocab_size, (3, tokens), device=device)
    ids[:, -1] = 1
    read = model(ids[:, :-1], use_cache=True).past_key_values
    layers = [KeptLayer(*(torch.cat((x, x[:, :, :1]), 2) for x in (one.keys, one.values))) for one in read.layers]
    positions = torch.full((3, 1), tokens - 1, device=device)
    step = Step(model, Cache(layers=layers), ids[:, -1:].clone(), positions, backend)
    for _ in range(3):
        got = step.run()
    want = model(ids, use_cache=False).logits[:, -1]
    name = PARENT if backend is None else f"{PARENT}, {backend.name}"
    return judged(report, shape, name, got, want, step.graph is not None, model.dtype)


# ── time ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def attempt(report: Report, row: dict[str, Any], measure: Callable[[], dict[str, Any]], kind: str = "step") -> None:
    """One measurement; out of memory and out of time are results of it."""
    try:
        found = {"refused": "not run: out of time"} if report.late else measure()
    except (torch.OutOfMemoryError, MemoryError):
        found = {"refused": "does not fit"}
    except Exception as error:
        found = {"refused": f"{type(error).__name__}: {first_line(error)}"}
    report.add(kind, **row, **found)


def first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0]


def time_ours(report: Report, shape: str, model: PowerRetentionForCausalLM, who: str, settings: Settings) -> None:
    """Whole periods of folding at every batch; to ours a context is a position and nothing else."""
    for batch in settings.batches:
        made: list[Step] = []

        def measure(context: int, batch: int = batch, made: list[Step] = made) -> dict[str, Any]:
            if not made:
                made.append(our_step(model, batch, STATE_DTYPES[who], settings))
            step = made[0]
            step.positions.fill_(context)
            times = step_times(step.run, 2, FOLD_SIZE, settings.device)
            return {**figures(times, batch), "graphed": step.refused or step.graph is not None}

        for context in settings.contexts:
            attempt(report, {"shape": shape, "who": who, "batch": batch, "context": context}, partial(measure, context))
        made.clear()
        forget()


def our_step(model: PowerRetentionForCausalLM, batch: int, state_dtype: torch.dtype, settings: Settings) -> Step:
    """A batch of random states, after so many steps that everything is compiled and recorded."""
    size = state_bytes(model.config, state_dtype.itemsize, activation_bytes=settings.dtype.itemsize)
    if batch * size > free_memory(settings):
        raise MemoryError
    rows = filled_rows(model, batch, settings.contexts[0], state_dtype)
    ids = torch.ones(batch, 1, dtype=torch.long, device=settings.device)
    step = Step(model, rows, ids, torch.zeros_like(ids))
    for _ in range(4):
        step.run()
    return step


def time_parent(
    report: Report, shape: str, model: PreTrainedModel, backends: list[SDPBackend | None], settings: Settings
) -> None:
    """The faster of the attentions at every batch and context."""
    for context in settings.contexts:
        for batch in settings.batches:
            row = {"shape": shape, "who": PARENT, "batch": batch, "context": context}
            attempt(report, row, partial(time_parent_at, model, batch, context, backends, settings))
            forget()


def time_parent_at(
    model: PreTrainedModel, batch: int, context: int, backends: list[SDPBackend | None], settings: Settings
) -> dict[str, Any]:
    size = kv_bytes_per_token(our_config(model.config), settings.dtype.itemsize) * context
    if batch * size > free_memory(settings):
        raise MemoryError
    cache = kept_cache(model.config, batch, context, settings.dtype, settings.device)
    ids = torch.ones(batch, 1, dtype=torch.long, device=settings.device)
    found: dict[str, Any] = {}
    refused: dict[str, str] = {}
    for backend in backends:
        name = "SDPA" if backend is None else backend.name
        step = Step(model, cache, ids, torch.full_like(ids, context - 1), backend)
        try:
            times = step_times(step.run, 4, PARENT_STEPS, settings.device)
        except RuntimeError as error:  # too much memory for one of them, or a size that it does not have
            refused[name] = first_line(error)
            continue
        row = {**figures(times, batch), "graphed": step.refused or step.graph is not None, "attention": name}
        found = row if not found or row["ms"] < found["ms"] else found
    if not found:
        found["refused"] = "; ".join(f"{name}: {reason}" for name, reason in refused.items())
    return found


def time_batcher(report: Report, shape: str, model: PowerRetentionForCausalLM, settings: Settings) -> None:
    """The server's own loop: tokens a second while all rows are taken."""
    words = {f"w{i}": i for i in range(model.config.vocab_size)}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(words, unk_token="w0")))
    for batch in settings.batches:
        row = {"shape": shape, "who": "float32", "batch": batch}
        attempt(report, row, partial(served, model, tokenizer, batch, settings), "batcher")
        forget()


def served(
    model: PowerRetentionForCausalLM, tokenizer: PreTrainedTokenizerFast, users: int, settings: Settings
) -> dict[str, Any]:
    if users * state_bytes(model.config, activation_bytes=settings.dtype.itemsize) > free_memory(settings):
        raise MemoryError
    heard: list[tuple[float, int, Event]] = []  # appended to by one thread
    over = threading.Event()
    ended: list[int] = []

    def hear(user: int, event: Event) -> None:
        heard.append((time.perf_counter(), user, event))
        if isinstance(event, Ended):
            ended.append(user)
            if len(ended) == users:
                over.set()

    batcher = Batcher(model, tokenizer, users=users, waiting=users)
    # One prompt is read between two steps: the first must still be writing when the last begins.
    batcher.ask(
        *(
            Question([1 + user % 50] * 16, partial(hear, user), max_tokens=users + settings.answer, draw=Draw(0.0),
                     ignore_eos=True)
            for user in range(users)
        )
    )  # fmt: skip
    try:
        if not over.wait(120):
            raise TimeoutError("answers took more than two minutes")
    finally:
        batcher.close()
    errors = [event.error for _, _, event in heard if isinstance(event, Ended) and event.error]
    if errors:
        raise MemoryError if "out of memory" in str(errors[0]) else RuntimeError(errors[0])
    begun: dict[int, float] = {}
    for at, user, _ in heard:
        begun.setdefault(user, at)
    begin, end = max(begun.values()), min(at for at, _, event in heard if isinstance(event, Ended))
    tokens = sum(isinstance(event, Grown) and begin < at < end for at, _, event in heard)
    return {"tokens_per_second": tokens / (end - begin), "ms": 1000 * users * (end - begin) / tokens}


# ── all of it ────────────────────────────────────────────────────────────────────────────────────────────────────────


def build(config: PreTrainedConfig, settings: Settings) -> PreTrainedModel:
    """Random weights, made where they are used."""
    torch.manual_seed(0)
    with settings.device:
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=settings.dtype)
    return model.eval().requires_grad_(False)


def measure_shape(report: Report, shape: str, settings: Settings) -> None:
    """Ours, then the parent, then what the server makes of ours, each with the memory to itself."""
    ours = build(our_config(SHAPES[shape]), settings)
    assert isinstance(ours, PowerRetentionForCausalLM)
    right = {who: check_ours(report, shape, ours, who) for who in STATE_DTYPES}
    measure_users(report, shape, settings)
    for who in STATE_DTYPES:
        if right[who]:
            time_ours(report, shape, ours, who, settings)
    del ours
    forget()
    parent = build(SHAPES[shape], settings)
    on_gpu = settings.device.type == "cuda"
    backends = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION] if on_gpu else [None]
    usable: list[SDPBackend | None] = []
    for backend in backends:
        row = {"shape": shape, "who": PARENT, "attention": getattr(backend, "name", "SDPA")}
        try:
            usable += [backend] if check_parent(report, shape, parent, backend) else []
        except Exception as error:  # an attention that this PyTorch does not have
            report.add("check", **row, right=False, refused=f"{type(error).__name__}: {first_line(error)}")
    if usable:
        time_parent(report, shape, parent, usable, settings)
    del parent
    forget()
    if right["float32"]:
        ours = build(our_config(SHAPES[shape]), settings)
        assert isinstance(ours, PowerRetentionForCausalLM)
        time_batcher(report, shape, ours, settings)
        del ours
        forget()


def draw(rows: list[dict[str, Any]], shapes: tuple[str, ...], path: Path, title: str) -> None:
    """A line of three figures a shape: users, time of a step, most tokens a second, against context."""
    with figure_file(path, len(shapes), 3, size=(15, 4.2 * len(shapes)), squeeze=False, dpi=120) as (figure, axes):
        for line, shape in zip(axes, shapes, strict=True):
            own = [row for row in rows if row["shape"] == shape]
            draw_users(line[0], own)
            draw_times(line[1], own)
            draw_rates(line[2], own)
            for axis, label in zip(
                line, ("users that fit", "milliseconds a step", "tokens a second, all users"), strict=True
            ):
                axis.set_yscale("log")
                against_context(axis, sorted({row["context"] for row in own if row.get("context")}), label)
                axis.legend(frameon=False, fontsize=8)
            line[1].set_title(NAMES[shape])
        figure.suptitle(title)


COLOURS = {"float32": STUDENT_COLOUR, "bfloat16": "#7fb7d9", PARENT: TEACHER_COLOUR}


def label(who: str) -> str:
    return who if who == PARENT else f"power retention, {who} state"


def draw_users(axis: Any, rows: list[dict[str, Any]]) -> None:
    contexts = sorted({row["context"] for row in rows if row.get("context")})
    for who, colour in COLOURS.items():
        found = [row for row in rows if row["kind"] == "users" and row["who"] == who and row.get("measured")]
        if not found:
            continue
        lengths = [row["context"] for row in found] if who == PARENT else contexts
        found = found if who == PARENT else found * len(contexts)
        axis.plot(lengths, [row["predicted"] for row in found], "-", color=colour, label=f"{label(who)}, predicted")
        axis.plot(lengths, [row["measured"] for row in found], "o", color=colour)
    axis.plot([], [], "o", color="#777777", label="measured")


def draw_times(axis: Any, rows: list[dict[str, Any]]) -> None:
    timed = [row for row in rows if row["kind"] == "step" and "ms" in row]
    batches = sorted({row["batch"] for row in timed})
    shown = sorted({batches[0], batches[len(batches) // 2], batches[-1]}) if batches else []
    for who, colour in COLOURS.items():
        for batch, style in zip(shown, ("-", "--", ":"), strict=False):
            found = [row for row in timed if row["who"] == who and row["batch"] == batch]
            if found:
                points = zip(*((row["context"], row["ms"]) for row in found), strict=True)
                axis.plot(*points, f"o{style}", color=colour, ms=3, label=f"{label(who)}, batch {batch}")


def draw_rates(axis: Any, rows: list[dict[str, Any]]) -> None:
    for who, colour in COLOURS.items():
        best: dict[int, float] = {}
        for row in rows:
            if row["kind"] == "step" and row["who"] == who and "ms" in row:
                best[row["context"]] = max(best.get(row["context"], 0.0), row["tokens_per_second"])
        if best:
            axis.plot(*zip(*sorted(best.items()), strict=True), "o-", color=colour, label=label(who))


def settings_of(arguments: argparse.Namespace) -> Settings:
    on_gpu = torch.cuda.is_available()
    if arguments.quick:
        shapes, batches, contexts, answer = ("tiny",), (1, 3), (64, 256), 4
    else:
        shapes = tuple(arguments.shapes.split(","))
        batches, contexts, answer = (1, 8, 32, 75, 150), tuple(1 << n for n in (10, 13, 15, 17, 20)), 32
    device = torch.device("cuda" if on_gpu else "cpu")
    dtype = torch.bfloat16 if on_gpu else torch.float32
    return Settings(shapes, batches, contexts, device, dtype, int(arguments.memory_gb * 1e9), answer)


def without_folder(word: str) -> str:
    """Where files lie is nobody's business."""
    return Path(word).name


def main(words: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("--figure", type=Path, help="A PNG of the figures.")
    parser.add_argument("--minutes", type=float, default=4.0, help="What is not begun by then is not run.")
    parser.add_argument("--shapes", default="135m,14b", help="Some of 135m, 14b and tiny, with commas.")
    parser.add_argument("--memory-gb", type=float, default=0.1, help="For users, on a CPU; a GPU's is its own.")
    parser.add_argument("--quick", action="store_true", help="A tiny model, in seconds.")
    arguments = parser.parse_args(words)
    started, settings = time.monotonic(), settings_of(arguments)
    print(f"{len(settings.shapes)} shapes on {settings.device}, {arguments.minutes:g} minutes at most", flush=True)
    environment = collect()
    copied = copy_rate(settings.device, 2048 if settings.device.type == "cuda" else 64) / 1000
    rows: list[dict[str, Any]] = []
    for place, shape in enumerate(settings.shapes):
        # Each shape gets its share of the time left, so that a slow one does not starve those after it.
        end = started + 60 * arguments.minutes
        now = time.monotonic()
        report = Report(now + (end - now) / (len(settings.shapes) - place))
        try:
            measure_shape(report, shape, settings)
        except (torch.OutOfMemoryError, MemoryError):
            report.add("check", shape=shape, who="weights", right=False, refused="does not fit")
        rows += report.rows
        command = " ".join(["python", "benchmarks/serving.py", *map(without_folder, words)])
        found = {"command": command, "environment": environment, "copy TB/s": copied, "rows": rows}
        write_json(arguments.results, {**found, "seconds": time.monotonic() - started})
    if arguments.figure:
        where = torch.cuda.get_device_name() if settings.device.type == "cuda" else "a CPU"
        draw(rows, settings.shapes, arguments.figure, f"Serving on {where}, {settings.dtype}".replace("torch.", ""))
    wrong = [row for row in rows if row["kind"] == "check" and not row["right"] and "refused" not in row]
    if wrong:
        sys.exit(f"{len(wrong)} checks were wrong.")


if __name__ == "__main__":
    main(sys.argv[1:])
