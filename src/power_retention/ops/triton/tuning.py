"""The verified sweep: candidate settings are held against float64 before they are timed; a wrong one is never chosen.

A new kernel joins by one :class:`Tunable` in :data:`TUNABLES` and a line in ``tuned.KERNEL_FILES``: the sweep runs whole passes
of the operator with the candidate in place (``tuned.setting_for``), so it needs to know nothing else about the kernel.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from power_retention.errors import ArgumentError
from power_retention.machine import launch_times, time_call
from power_retention.ops.backends import Backend, Call, TorchBackend
from power_retention.ops.cost import ATTENTION, Costs, Measured, Work, fit_costs, regret
from power_retention.ops.triton.backend import TritonBackend
from power_retention.ops.triton.plan import WIDTHS
from power_retention.ops.triton.sizes import work_of
from power_retention.ops.triton.tuned import Setting, ShapeClass, on_trial, own_key, setting_for

TOLERANCES = {torch.float32: 5e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
"""Largest relative error of an output or gradient; a right candidate stays well below."""

_SLACK = 1.25
"""A candidate's errors may exceed those of the setting in use by this factor: right ones differ by a few per cent."""

_OUTPUTS = ("y", "memory", "normalizer")
_GRADIENTS = ("dq", "dk", "dv", "dlog_g", "d_memory", "d_normalizer")


@dataclass(frozen=True)
class HeadShape:
    """Heads of a call, written ``40/8x128``: query heads, key/value heads, head width (and ``x`` value width if it differs)."""

    query_heads: int
    heads: int
    width: int
    value_width: int

    @classmethod
    def parse(cls, text: str) -> HeadShape:
        """From ``40/8x128`` or ``40/8x128x64``.

        Raises:
            ArgumentError: it is not of that form.
        """
        try:
            heads, *widths = text.lower().split("x")
            query_heads, _, shared = heads.partition("/")
            shape = cls(int(query_heads), int(shared or query_heads), int(widths[0]), int(widths[-1]))
            fits = len(widths) < 3 and min(shape.heads, *map(int, widths)) > 0 and shape.query_heads % shape.heads == 0
        except (ValueError, IndexError):
            fits = False
        if not fits:
            raise ArgumentError(f"A shape is query heads/key heads x width, such as 40/8x128, not {text!r}.")
        return shape

    def __str__(self) -> str:
        value = "" if self.value_width == self.width else f"x{self.value_width}"
        return f"{self.query_heads}/{self.heads}x{self.width}{value}"


@dataclass(frozen=True)
class Tunable:
    """Something a sweep can choose.

    Attributes:
        name: what ``tuned.setting_for`` knows it as.
        kernel: name of the kernel function whose time is compared; None for the whole pass.
        backward: whether the backward pass shows it.
        candidates: settings worth trying at a shape class.
    """

    name: str
    kernel: str | None
    backward: bool
    candidates: Callable[[ShapeClass], Sequence[Setting]]


def _grid(**choices: Sequence[int]) -> list[Setting]:
    return [dict(zip(choices, values, strict=True)) for values in product(*choices.values())]


def _streaming(shape: ShapeClass) -> list[Setting]:
    """State loops: many rows a program, more warps for more of them."""
    tall = _grid(rows=(128,), steps=(32, 64), warps=(4, 8), stages=(2, 3, 4))
    taller = _grid(rows=(256,), steps=(64,), warps=(8,), stages=(2, 3)) if shape.width >= 128 else []
    small = _grid(rows=(64,), steps=(32, 64), warps=(4,), stages=(2, 3, 4))
    return small if shape.operands == "float32" or shape.width > 128 else tall + taller + small


def _reading(shape: ShapeClass) -> list[Setting]:
    """As :func:`_streaming`, without the walk over tokens."""
    rows = (32, 64) if shape.operands == "float32" or shape.width > 128 else (64, 128, 256)
    return [{**s, "steps": 64} for s in _grid(rows=rows, warps=(4, 8), stages=(2, 3, 4))]


def _attending(shape: ShapeClass) -> list[Setting]:
    """Attention tiles: a whole number of key tiles in a query tile."""
    narrow = shape.operands == "float32" or shape.width > 128
    pairs = [(16, 16), (32, 32), (64, 32)] if narrow else [(64, 32), (64, 64), (128, 32), (128, 64), (128, 128)]
    return [{"rows": r, "steps": s, **rest} for r, s in pairs for rest in _grid(warps=(4, 8), stages=(2, 3))]


TUNABLES: dict[str, Tunable] = {
    t.name: t
    for t in (
        Tunable("block", None, True, lambda shape: _grid(width=(16, 32))),
        Tunable("accumulate", "accumulate_kernel", False, _streaming),
        Tunable("read", "read_state_kernel", False, _reading),
        Tunable("attend", "read_kernel", False, _attending),
        Tunable("contract", "contract_state_kernel", True, _reading),
        Tunable("query_grad", "query_grad_kernel", True, _attending),
        Tunable("key_grad", "key_grad_kernel", True, _attending),
        Tunable("value_grad", "key_grad_kernel", True, _attending),
    )
}
"""What a sweep chooses, in the order it does."""


@dataclass(frozen=True)
class Job:
    """What is tuned: heads of which shape, in which dtype, where, on how many tokens in how large chunks.

    ``checked`` tokens, fewer than ``tokens`` on a GPU, are what a candidate is held against float64 on.
    """

    shape: HeadShape
    dtype: torch.dtype
    device: str
    tokens: int
    chunk: int
    checked: int
    checked_chunk: int

    @classmethod
    def usual(cls, shape: HeadShape, dtype: torch.dtype, device: torch.device) -> Job:
        """Sizes at which every kernel has work for the whole GPU; tiny ones where Triton is interpreted."""
        if device.type == "cpu":
            return cls(shape, dtype, "cpu", 40, 16, 40, 16)
        return cls(shape, dtype, str(device), 32768, 1024, 1500, 512)

    @property
    def shape_class(self) -> ShapeClass:
        """The class that the winners are for.

        Raises:
            ArgumentError: no kernel is as wide.
        """
        width = max(self.shape.width, self.shape.value_width)
        if width > WIDTHS[-1]:
            raise ArgumentError(f"The kernels' heads are at most {WIDTHS[-1]} wide, these are {width} wide.")
        fit = next(w for w in WIDTHS if w >= width)
        return ShapeClass.of(fit, self.dtype, self.shape.query_heads // self.shape.heads)

    def calls(self) -> tuple[Call, Call]:
        """(the call that is timed, the one that is checked: ragged, from a state, with the final state wanted)."""
        timed = _draw(self.shape, self.dtype, self.device, self.tokens, self.chunk)
        small = replace(self.shape, query_heads=2 * self.shape.query_heads // self.shape.heads, heads=2)
        return timed, _draw(small, self.dtype, self.device, self.checked - 3, self.checked_chunk, states=True)


@dataclass(frozen=True)
class Check:
    """A candidate held against float64: its largest relative error over all results, and why it may not be used."""

    error: float
    wrong: str | None


@dataclass(frozen=True)
class Trial:
    """One candidate of one kernel: its check, and its milliseconds if it may be used."""

    setting: Setting
    check: Check
    milliseconds: float | None


@dataclass(frozen=True)
class Sweep:
    """All candidates of one kernel; the first trial is the setting that was in use."""

    kernel: str
    shape: str
    trials: tuple[Trial, ...]

    @property
    def before(self) -> Trial:
        """The setting that was in use."""
        return self.trials[0]

    @property
    def best(self) -> Trial | None:
        """The fastest right candidate; the one in use unless another is 2 % faster; None where nothing is right."""
        right = [t for t in self.trials if t.milliseconds is not None]
        if not right:
            return None
        fastest = min(right, key=lambda t: t.milliseconds or 0.0)
        kept = self.before.milliseconds
        return self.before if kept is not None and (fastest.milliseconds or 0.0) > 0.98 * kept else fastest

    @property
    def wrong(self) -> list[Trial]:
        """Candidates that failed their check."""
        return [t for t in self.trials if t.check.wrong]

    def entry(self) -> dict[str, Any]:
        """What is kept of it."""
        best = self.best
        assert best is not None
        return {
            "setting": dict(best.setting),
            "milliseconds": best.milliseconds,
            "before": self.before.milliseconds,
            "error": best.check.error,
            "found": time.strftime("%Y-%m-%d"),
        }


Checker = Callable[[Job, str, Sequence[Setting]], Iterator[tuple[Setting, Check]]]
"""Checks candidates in any order; :func:`check_here` does it in this process."""


def sweep(job: Job, name: str, check: Checker, progress: Callable[[str], None] | None = None) -> Sweep:
    """Check every candidate of one kernel, then time the right ones.

    Args:
        job: what is tuned.
        name: a key of :data:`TUNABLES`.
        check: how candidates are checked.
        progress: called with a note after every check and every timing.

    Raises:
        ArgumentError: there is no such kernel.
    """
    if name not in TUNABLES:
        raise ArgumentError(f"{name!r} is no kernel that can be tuned; there are: {', '.join(TUNABLES)}.")
    tunable, used = TUNABLES[name], dict(setting_for(name, job.shape_class, torch.device(job.device)))
    settings = [used, *(dict(s) for s in tunable.candidates(job.shape_class) if dict(s) != used)]
    checks: dict[str, Check] = {}
    for setting, found in check(job, name, settings):
        checks[str(setting)] = found
        _tell(progress, f"{name} {_brief(setting)}: {found.wrong or 'right'}")
    limit = _SLACK * min((c.error for c in checks.values() if c.wrong is None), default=0.0)
    with _timer(job, tunable) as timed:
        trials = []
        for setting in settings:
            found = _against(checks[str(setting)], limit)
            trials.append(Trial(setting, found, timed(setting) if found.wrong is None else None))
            _tell(progress, f"{name} {_brief(setting)}: {trials[-1].milliseconds or 'not timed'}")
    return Sweep(name, str(job.shape_class), tuple(trials))


def _against(check: Check, limit: float) -> Check:
    if check.wrong is None and check.error > limit:
        return replace(check, wrong=f"error {check.error:.1e} where others reach {limit / _SLACK:.1e}")
    return check


def check_here(job: Job, name: str, settings: Sequence[Setting]) -> Iterator[tuple[Setting, Check]]:
    """Check candidates in this process, one after another."""
    checker = _CheckedCall(job)
    for setting in settings:
        yield setting, checker.check(name, setting)


def check_one(job: Job, name: str, setting: Setting) -> Check:
    """Check one candidate; the call and its expected results are kept for the next one of the same job."""
    global _checked
    if _checked is None or _checked.job != job:
        _checked = _CheckedCall(job)
    return _checked.check(name, setting)


class _CheckedCall:
    """A call, its gradients to come, and everything expected of it in float64."""

    def __init__(self, job: Job) -> None:
        self.job = job
        timed, self.call = job.calls()
        # Compiles what the timed call needs: it has no states of its own, which is another specialisation.
        self.timed = replace(_narrow(timed, 2 * job.checked_chunk), chunk_size=job.checked_chunk)
        self.dy, self.d_states = _gradients(self.call)
        self.expected = _results(TorchBackend(), _double(self.call), self.dy.double(), *(x.double() for x in self.d_states))
        self.size = {name: x.norm() for name, x in self.expected.items()}

    def check(self, name: str, setting: Setting) -> Check:
        try:
            with on_trial(name, setting), _poisoned_memory():
                _results(TritonBackend(), self.timed, torch.zeros_like(_y_like(self.timed)), None, None)
                got = _results(TritonBackend(), self.call, self.dy, *self.d_states)
        except Exception as error:  # whatever a compiler or a GPU may say about a candidate, the sweep goes on
            return Check(float("inf"), f"{type(error).__name__}: {str(error).strip().splitlines()[0][:120]}")
        worst, where = 0.0, ""
        for key, want in self.expected.items():
            error = float((got[key].double() - want).norm() / self.size[key])
            if not error <= worst:
                worst, where = (error if error == error else float("inf")), key
        wrong = None if worst <= TOLERANCES[self.call.q.dtype] else f"relative error of {where} {worst:.1e}"
        return Check(worst, wrong)


_checked: _CheckedCall | None = None


@contextmanager
def _timer(job: Job, tunable: Tunable) -> Iterator[Callable[[Setting], float]]:
    """Yields what times a candidate: the kernel alone on a GPU, the whole pass where Triton is interpreted."""
    call, device, backend = job.calls()[0], torch.device(job.device), TritonBackend()
    dy = torch.randn_like(_y_like(call))

    def one_pass() -> None:
        backend.backward(call, dy, None, None) if tunable.backward else backend.forward(call)

    def whole(setting: Setting) -> float:
        with on_trial(tunable.name, setting):
            return time_call(one_pass, device, repeats=7, seconds=0.2).median

    if device.type == "cpu" or tunable.kernel is None:
        yield whole
        return
    kernel = tunable.kernel
    with launch_times() as totals:

        def alone(setting: Setting) -> float:
            with on_trial(tunable.name, setting):
                one_pass()
                totals()
                times = []
                for _ in range(5):
                    one_pass()
                    times.append(totals()[kernel])
            return sorted(times)[2]

        yield alone


# ── the cost model's numbers ─────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class CostFit:
    """Costs of one pass at one head width, what they were fitted to, and the regret of choosing by them."""

    width: int
    backward: bool
    costs: Costs
    measured: tuple[Measured, ...]

    @property
    def kind(self) -> str:
        """``"forward"`` or ``"backward"``."""
        return "backward" if self.backward else "forward"

    @property
    def regret(self) -> dict[int, float]:
        """By length: the chosen form's time over the best one's."""
        return regret(self.costs, self.measured)

    def entry(self) -> dict[str, Any]:
        """What is kept of it."""
        return {"setting": self.costs.to_dict(), "regret": max(self.regret.values()), "found": time.strftime("%Y-%m-%d")}


def measure_costs(
    job: Job, backward: bool, lengths: Sequence[int], chunks: Sequence[int], progress: Callable[[str], None] | None = None
) -> CostFit:
    """Time whole passes in both forms over lengths and chunk sizes, and fit the cost model to them.

    The attention form is left out where it would take ten times as long as the chunks of the length before.
    """
    backend, device = TritonBackend(), torch.device(job.device)
    measured: list[Measured] = []
    for tokens in lengths:
        call = _draw(job.shape, job.dtype, job.device, tokens, ATTENTION)
        dy = torch.randn_like(_y_like(call))
        for chunk in [ATTENTION, *(c for c in chunks if c < tokens)]:
            if chunk == ATTENTION and _hopeless(measured, tokens):
                continue
            sized = replace(call, chunk_size=chunk)

            def one_pass(sized: Call = sized, dy: Tensor = dy) -> None:
                backend.backward(sized, dy, None, None) if backward else backend.forward(sized)

            took = time_call(one_pass, device, repeats=7, seconds=0.2).median
            measured.append(Measured(work_of(sized), chunk, took))
            _tell(progress, f"{tokens:,} tokens, {f'chunks of {chunk:,}' if chunk else 'attention'}: {took:.2f} ms")
    return CostFit(max(job.shape.width, job.shape.value_width), backward, fit_costs(measured), tuple(measured))


def _hopeless(measured: Sequence[Measured], tokens: int) -> bool:
    attention = [m for m in measured if m.chunk == ATTENTION]
    chunked = [m.milliseconds / m.work.tokens for m in measured if m.chunk != ATTENTION]
    if len(attention) < 3 or not chunked:
        return False
    longest = attention[-1]
    return longest.milliseconds * (tokens / longest.work.tokens) ** 2 > 10 * min(chunked) * tokens


def own_entries(sweeps: Sequence[Sweep], fits: Sequence[CostFit]) -> dict[str, dict[str, Any]]:
    """What a user's own file keeps: every kernel with a right candidate, every fitted pass."""
    kept = {own_key(s.kernel, s.shape): s.entry() for s in sweeps if s.best is not None}
    return kept | {own_key("costs", f"{fit.width}/{fit.kind}"): fit.entry() for fit in fits}


# ── sample calls ─────────────────────────────────────────────────────────────────────────────────────────────────────


def _draw(
    shape: HeadShape, dtype: torch.dtype, device: str, tokens: int, chunk: int, *, states: bool = False
) -> Call:
    """A random call with gates that matter over a chunk; queries lean on keys, so that no row's weights cancel."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, device=device)

    k, v = normal(1, tokens, shape.heads, shape.width), normal(1, tokens, shape.heads, shape.value_width)
    q = normal(1, tokens, shape.query_heads, shape.width) + k.repeat_interleave(shape.query_heads // shape.heads, 2)
    log_g = logsigmoid(normal(1, tokens, shape.heads) + 4)
    memory = normalizer = None
    if states:
        entering = _draw(shape, torch.float32, device, 64, 64)
        entering = replace(entering, return_state=True)
        _, memory, normalizer = TorchBackend().forward(entering)
    return Call(q.to(dtype), k.to(dtype), v.to(dtype), log_g, memory, normalizer, None, 2, chunk, states)


def _narrow(call: Call, tokens: int) -> Call:
    log_g = None if call.log_g is None else call.log_g[:, :tokens].contiguous()
    return replace(call, **{x: getattr(call, x)[:, :tokens].contiguous() for x in "qkv"}, log_g=log_g)


def _double(call: Call) -> Call:
    tensors = {x: getattr(call, x) for x in ("q", "k", "v", "log_g", "memory", "normalizer")}
    return replace(call, **{name: None if x is None else x.double() for name, x in tensors.items()})


def _y_like(call: Call) -> Tensor:
    return call.q.new_empty(*call.q.shape[:-1], call.v.shape[-1])


def _gradients(call: Call) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Random gradients of y and of the final state, the latter no larger than what y adds to them."""
    assert call.memory is not None
    assert call.normalizer is not None
    dy = torch.randn_like(_y_like(call))
    scale = 1 / call.q[0, 0, 0].float().norm() ** 2
    return dy, (torch.randn_like(call.memory) * scale, torch.randn_like(call.normalizer) * scale)


def _results(
    backend: Backend, call: Call, dy: Tensor, d_memory: Tensor | None, d_normalizer: Tensor | None
) -> dict[str, Tensor]:
    """Every output and gradient of a call, by name; those that were not asked for are left out."""
    outputs = backend.forward(call)
    grads = backend.backward(call, dy, d_memory, d_normalizer)
    named = [*zip(_OUTPUTS, outputs, strict=True), *zip(_GRADIENTS, grads, strict=True)]
    return {name: x for name, x in named if x is not None and x.numel()}


@contextmanager
def _poisoned_memory() -> Iterator[None]:
    """``torch.empty`` gives NaN, so that what a candidate leaves unwritten is found out."""
    was = torch.empty, torch.empty_like

    def poisoned(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def filled(*args: Any, **kwargs: Any) -> Tensor:
            x = make(*args, **kwargs)
            return x.fill_(torch.nan) if x.is_floating_point() else x

        return filled

    torch.empty, torch.empty_like = map(poisoned, was)  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.empty, torch.empty_like = was


def _tell(progress: Callable[[str], None] | None, note: str) -> None:
    if progress:
        progress(note)


def _brief(setting: Setting) -> str:
    return " ".join(f"{name} {value}" for name, value in setting.items())
