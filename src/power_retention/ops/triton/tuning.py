"""The verified sweep: candidate settings are held against float64 before they are timed; a wrong one is never chosen.

A new kernel joins by one :class:`Tunable` in :data:`TUNABLES` and a line in ``tuned.KERNEL_FILES``: the sweep runs whole passes
of the operator with the candidate in place (``tuned.setting_for``), so it needs to know nothing else about the kernel.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from itertools import product
from statistics import median
from typing import Any

import torch
from torch import Tensor

from power_retention.errors import ArgumentError
from power_retention.machine import launch_times, time_call
from power_retention.ops.backends import Call, TorchBackend
from power_retention.ops.cost import ATTENTION, Costs, Measured, fit_costs, regret
from power_retention.ops.triton.backend import TritonBackend
from power_retention.ops.triton.plan import WIDTHS
from power_retention.ops.triton.samples import (
    HeadShape,
    draw_call,
    draw_gradients,
    empty_output,
    in_float64,
    poisoned_memory,
    results,
)
from power_retention.ops.triton.sizes import work_of
from power_retention.ops.triton.tuned import Setting, ShapeClass, now_on_trial, on_trial, own_key, setting_for
from power_retention.workers import Failed, Workers

TOLERANCES = {torch.float32: 5e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
"""Largest relative error of an output or gradient; a right candidate stays well below."""

_SLACK = 1.25
"""An error may exceed the same error's median over the candidates by this factor: right ones differ by a few per cent."""


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

    ``checked`` tokens, fewer than ``tokens`` on a GPU, are what a candidate is held against float64 on; with ``states``, from a
    state and with the final one wanted, which are other specialisations of the kernels.
    """

    shape: HeadShape
    dtype: torch.dtype
    device: str
    tokens: int
    chunk: int
    checked: int
    checked_chunk: int
    states: bool = False

    @classmethod
    def usual(cls, shape: HeadShape, dtype: torch.dtype, device: torch.device, tokens: int | None = None) -> Job:
        """Sizes at which every kernel has work for the whole GPU; tiny ones where Triton is interpreted."""
        if device.type == "cpu":
            return cls(shape, dtype, "cpu", tokens or 40, 16, 60, 32)
        return cls(shape, dtype, str(device), tokens or 32768, 1024, 1500, 512)

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

    def timed_call(self) -> Call:
        """The call that is timed."""
        return draw_call(self.shape, self.dtype, self.device, self.tokens, self.chunk)

    def checked_call(self) -> Call:
        """The call that is checked: ragged, of two key/value heads."""
        small = replace(self.shape, query_heads=2 * self.shape.query_heads // self.shape.heads, heads=2)
        return draw_call(small, self.dtype, self.device, self.checked - 3, self.checked_chunk, states=self.states)


@dataclass(frozen=True)
class Check:
    """A candidate held against float64: its relative error in every result, and why it may not be used (None: it may)."""

    errors: dict[str, float]
    wrong: str | None

    @property
    def error(self) -> float:
        """The largest error; infinite where there was no result."""
        return max(self.errors.values(), default=float("inf"))


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


def kernels_launched(job: Job) -> set[str]:
    """Names of the kernels that a call's two passes launch on this GPU; a family may have others for the same work."""
    call, backend = job.timed_call(), TritonBackend()
    with launch_times() as totals:
        backend.forward(call)
        backend.backward(call, torch.randn_like(empty_output(call)), None, None)
        return set(totals())


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
        _tell(progress, f"{name} {brief(setting)}: {found.wrong or 'right'}")
    checks = _against_the_others(checks, job.dtype)
    with _timer(job, tunable) as timed:
        tried = []
        for setting in settings:
            found = checks[str(setting)]
            tried.append(Trial(setting, found, timed(setting) if found.wrong is None else None))
            _tell(progress, f"{name} {brief(setting)}: {_time(tried[-1])}")
    return _confirmed(Sweep(name, str(job.shape_class), tuple(tried)), replace(job, states=True), check)


def _confirmed(found: Sweep, job: Job, check: Checker) -> Sweep:
    """The sweep whose best is right with states too; those that were not count as wrong."""
    while (best := found.best) is not None:
        ((_, again),) = check(job, found.kernel, [best.setting])
        if again.wrong is None:
            break
        refused = Trial(best.setting, replace(again, wrong=f"with states: {again.wrong}"), None)
        found = replace(found, trials=tuple(refused if trial is best else trial for trial in found.trials))
    return found


def _against_the_others(checks: dict[str, Check], dtype: torch.dtype) -> dict[str, Check]:
    """Also refuse what is within the tolerance and yet clearly worse than most: a wrong result may be a small one."""
    right = [check for check in checks.values() if check.wrong is None]
    if not right:
        return checks
    usual = {name: median(check.errors[name] for check in right) for name in right[0].errors}
    floor = TOLERANCES[dtype] / 10  # below it errors are a matter of the order of summation

    def judged(check: Check) -> Check:
        for name, error in check.errors.items() if check.wrong is None else ():
            if error > max(floor, _SLACK * usual[name]):
                return replace(check, wrong=f"relative error of {name} {error:.1e}, {usual[name]:.1e} with most others")
        return check

    return {setting: judged(check) for setting, check in checks.items()}


def check_here(job: Job, name: str, settings: Sequence[Setting]) -> Iterator[tuple[Setting, Check]]:
    """Check candidates in this process, one after another."""
    checker = _CheckedCall(job)
    for setting in settings:
        yield setting, checker.check(name, setting)


def check_by(pool: Workers) -> Checker:
    """Checks many candidates at a time; that compiles them too, and one that kills its process is only wrong."""

    def check(job: Job, name: str, settings: Sequence[Setting]) -> Iterator[tuple[Setting, Check]]:
        tasks = [(job, {**now_on_trial(), name: setting}, name) for setting in settings]
        for (_, used, _), found in pool.run(tasks):
            yield used[name], Check({}, str(found)[:160]) if isinstance(found, Failed) else found

    return check


def check_one(task: tuple[Job, dict[str, Setting], str]) -> Check:
    """Check one candidate, named last, among others that are on trial.

    The call and its expected results are kept for the next candidate of the same job.
    """
    global _checked
    job, used, name = task
    if _checked is None or _checked.job != job:
        _checked = _CheckedCall(job)
    with ExitStack() as others:
        for other, setting in used.items():
            others.enter_context(on_trial(other, setting))
        return _checked.check(name, used[name])


class _CheckedCall:
    """A call, its gradients to come, and everything expected of it in float64."""

    def __init__(self, job: Job) -> None:
        self.job, self.call = job, job.checked_call()
        self.dy, self.d_states = draw_gradients(self.call)
        d_memory, d_normalizer = (None if x is None else x.double() for x in self.d_states)
        self.expected = results(TorchBackend(), in_float64(self.call), self.dy.double(), d_memory, d_normalizer)
        self.size = {name: x.norm() for name, x in self.expected.items()}

    def check(self, name: str, setting: Setting) -> Check:
        try:
            with on_trial(name, setting), poisoned_memory():
                got = results(TritonBackend(), self.call, self.dy, *self.d_states)
            errors = {key: float((got[key].double() - x).norm() / self.size[key]) for key, x in self.expected.items()}
        except Exception as error:  # whatever a compiler says about a candidate, the sweep goes on
            if "CUDA error" in str(error):
                raise  # nothing more can be run in this process
            return Check({}, _one_line(error))
        allowed = TOLERANCES[self.call.q.dtype]
        wrong = [f"relative error of {key} {error:.1e}" for key, error in errors.items() if not error <= allowed]
        return Check(errors, wrong[0] if wrong else None)


def _one_line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:120]}"


_checked: _CheckedCall | None = None


@contextmanager
def _timer(job: Job, tunable: Tunable) -> Iterator[Callable[[Setting], float]]:
    """Yields what times a candidate: the kernel alone on a GPU, the whole pass where Triton is interpreted."""
    call, device, backend = job.timed_call(), torch.device(job.device), TritonBackend()
    dy = torch.randn_like(empty_output(call))

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
        return {
            "setting": self.costs.to_dict(),
            "regret": max(self.regret.values()),
            "found": time.strftime("%Y-%m-%d"),
        }


def measure_costs(
    job: Job,
    backward: bool,
    lengths: Sequence[int],
    chunks: Sequence[int],
    progress: Callable[[str], None] | None = None,
) -> CostFit:
    """Time whole passes in both forms over lengths and chunk sizes, and fit the cost model to them.

    The attention form is left out where it would take ten times as long as the chunks of the length before.
    """
    backend, device = TritonBackend(), torch.device(job.device)
    measured: list[Measured] = []
    for tokens in lengths:
        call = draw_call(job.shape, job.dtype, job.device, tokens, ATTENTION)
        dy = torch.randn_like(empty_output(call))
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


def family_file(base: Mapping[str, Any], gpu: str, sweeps: Sequence[Sweep], fits: Sequence[CostFit]) -> dict[str, Any]:
    """The file shipped for a GPU family with these winners and costs put in; ``base`` is the one shipped now.

    Winners of grouped heads stand beside those of single ones only where they differ.
    """
    winners: dict[str, dict[str, Any]] = {group: dict(table) for group, table in base.get("winners", {}).items()}
    for found in sweeps:
        general, grouped = found.shape.rsplit("/", 1)
        if found.best is None:
            continue
        if grouped == "single" or found.kernel not in winners.get(general, {}):
            winners.setdefault(general, {})[found.kernel] = dict(found.best.setting)
        elif winners[general][found.kernel] != dict(found.best.setting):
            winners.setdefault(found.shape, {})[found.kernel] = dict(found.best.setting)
    costs: dict[str, dict[str, Any]] = {width: dict(table) for width, table in base.get("costs", {}).items()}
    for fit in fits:
        costs.setdefault(str(fit.width), {})[fit.kind] = fit.costs.to_dict()
    source = f"power-retention tune, {time.strftime('%Y-%m-%d')}"
    return {**base, "gpu": gpu, "source": source, "winners": winners, "costs": costs}


def _tell(progress: Callable[[str], None] | None, note: str) -> None:
    if progress:
        progress(note)


def _time(trial: Trial) -> str:
    return "not timed" if trial.milliseconds is None else f"{trial.milliseconds:.3f} ms"


def brief(setting: Setting) -> str:
    """A setting in a few words."""
    return " ".join(f"{name} {value}" for name, value in setting.items())
