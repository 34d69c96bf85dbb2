"""Calls that the Triton kernels must get right.  Run as a program, under TRITON_INTERPRET=1 or on a GPU, it checks them.

A process of its own, because Triton decides when it is imported whether it interprets.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from power_retention.ops import PowerState, RingState, backends, expand, power_retention, power_retention_state
from power_retention.ops.backends import fused_step
from power_retention.ops.reference import recurrent_form


@dataclass(frozen=True)
class Case:
    """One call; ``runs`` are the lengths of packed sequences, ``strongest`` the gates' lower bound."""

    batch: int = 1
    tokens: int = 37
    heads: tuple[int, int] = (2, 1)
    widths: tuple[int, int] = (16, 16)
    chunk: int = 16
    p: int = 2
    dtype: torch.dtype = torch.float32
    strongest: float | None = -1.0
    state: bool = False
    runs: tuple[int, ...] = ()


CASES = {
    "attention": Case(batch=2, chunk=0),
    "attention without gates": Case(chunk=0, strongest=None),
    "attention, p = 4, grouped": Case(chunk=0, p=4, heads=(4, 2), widths=(16, 32)),
    "attention, p = 6, packed": Case(chunk=0, p=6, runs=(5, 25, 7)),
    "chunks": Case(batch=2),
    "chunks without gates, blocks in a head": Case(strongest=None, widths=(32, 16)),
    "one chunk, final state wanted": Case(chunk=37, state=True),
    "states, grouped heads": Case(heads=(4, 2), widths=(16, 32), state=True),
    "packed with states": Case(heads=(2, 2), state=True, runs=(5, 25, 7)),
    "odd widths": Case(widths=(12, 20), state=True),
    "gates that forget everything": Case(strongest=-300.0, state=True),
    "float16": Case(dtype=torch.float16, state=True),
    "one token": Case(tokens=1, state=True),
}
GPU_CASES = {
    "wide heads in bfloat16": Case(
        tokens=300, heads=(2, 1), widths=(64, 64), chunk=128, dtype=torch.bfloat16, state=True
    ),
}
"""Not for the interpreter, whose bfloat16 is not the GPU's."""
TOLERANCES = {torch.float32: 5e-5, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}


def drawn(case: Case) -> dict[str, Tensor]:
    """The case's inputs on the CPU."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    (query_heads, heads), (d, e) = case.heads, case.widths
    runs = len(case.runs) or case.batch
    inputs: dict[str, Tensor] = {}
    for name, shape in (("q", (query_heads, d)), ("k", (heads, d)), ("v", (heads, e))):
        inputs[name] = draw(case.batch, case.tokens, *shape).to(case.dtype)
    # The gradient of a row whose weights nearly cancel is all rounding, in every implementation.
    inputs["q"] = inputs["q"] + inputs["k"].repeat_interleave(query_heads // heads, 2)
    if case.strongest is not None:
        inputs["log_g"] = case.strongest * torch.rand(case.batch, case.tokens, heads, generator=generator) ** 3
    if case.state:
        phi = expand(draw(runs, heads, 20, d))
        inputs["memory"], inputs["normalizer"] = phi.mT @ draw(runs, heads, 20, e), phi.sum(-2)
    return inputs


def output_gradient(case: Case, y: Tensor) -> Tensor:
    """The gradient of y, in float64."""
    return torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).double().to(y.device)


def run(case: Case, device: str, reference: bool) -> dict[str, Tensor]:
    """Outputs and gradients of the case on the CPU, computed on ``device`` by the kernels or by plain PyTorch in float64."""
    inputs = {k: (x.double() if reference else x).to(device).detach().requires_grad_() for k, x in drawn(case).items()}
    borders = torch.tensor([0, *case.runs]).cumsum(0).to(device) if case.runs else None
    d = case.widths[0]
    state = PowerState(inputs["memory"], inputs["normalizer"], case.p, d) if case.state else None
    os.environ["POWER_RETENTION_BACKEND"] = "torch" if reference else "triton"
    out: Any = power_retention(
        inputs["q"], inputs["k"], inputs["v"], inputs.get("log_g"), p=case.p, chunk_size=case.chunk,
        initial_state=state, return_state=case.state, cu_seqlens=borders,
    )  # fmt: skip
    outputs = (
        {"y": out[0], "final memory": out[1].memory, "final normalizer": out[1].normalizer}
        if case.state
        else {"y": out}
    )
    loss = (outputs["y"].double() * output_gradient(case, outputs["y"])).sum()
    generator = torch.Generator().manual_seed(2)
    for name in list(outputs)[1:]:
        # A final state has far more entries than y: at full size its gradients are all that is seen, and those of the
        # gates, differences of them, all rounding.
        x = outputs[name].double()
        loss = loss + (x * torch.randn(x.shape, generator=generator).to(x.device)).sum() * d**-0.5
    grads = torch.autograd.grad(loss, list(inputs.values()))
    return {k: x.detach().cpu() for k, x in outputs.items()} | {
        f"d {k}": g.cpu() for k, g in zip(inputs, grads, strict=True)
    }


def errors(case: Case, device: str, reference_device: str = "cpu") -> dict[str, float]:
    """Relative error of every output and gradient of the kernels; in bfloat16 the gates' to what they are a difference of."""
    expected, got = run(case, reference_device, reference=True), run(case, device, reference=False)
    found = {}
    for name, want in expected.items():
        size = want.double().norm()
        if name == "d log_g" and case.dtype == torch.bfloat16:
            size = max(size, flows(case, expected))
        error = (got[name].double() - want).norm() / size if size > 1e-30 else got[name].double().norm()
        found[name] = float(error)
    return found


def flows(case: Case, exact: dict[str, Tensor]) -> Tensor:
    """What the gates' gradients are sums and differences of, as far as it does not cancel: the root of the summed squares.

    The gradient of token t's gate is Σ_{s<t} (k_s·dk_s/p − q_s·dq_s/p), and q_s·dq_s/p is a difference of terms as large as
    y_s·dy_s.  bfloat16 rounds each of them, whatever is left of their sum.
    """
    inputs, dy = drawn(case), output_gradient(case, exact["y"])
    heads = case.heads[1]
    columns = (inputs["k"].double() * exact["d k"]).sum(-1) / case.p
    rows = (exact["y"] * dy).sum(-1).unflatten(-1, (heads, -1))
    squares = columns.square() + rows.square().sum(-1)
    return torch.cat([run.cumsum(1) for run in squares.split(list(case.runs) or case.tokens, 1)], 1).sum().sqrt()


def failures(case: Case, device: str, reference_device: str = "cpu") -> list[str]:
    """What is wrong with the kernels' answer, in words."""
    found = errors(case, device, reference_device)
    return [f"{name}: relative error {x:.1e}" for name, x in found.items() if not x <= TOLERANCES[case.dtype]]


def state_failures(device: str, reference_device: str = "cpu") -> list[str]:
    """The state alone, without any output, and its gradients, against plain PyTorch in float64."""
    wrong = []
    cases = [((16, 16), True, torch.float32, 37, 16), ((12, 20), False, torch.float16, 37, 16)]
    if device == "cuda":
        cases.append(((64, 64), True, torch.bfloat16, 300, 128))
    for (d, e), begun, dtype, tokens, chunk in cases:
        results = []
        for backend, place in (("torch", reference_device), ("triton", device)):
            generator = torch.Generator().manual_seed(0)
            k, v = (torch.randn(2, tokens, 2, width, generator=generator).to(dtype) for width in (d, e))
            # Some of the state that it began with is left at the end: its gradient is not nothing.
            inputs = {"k": k, "v": v, "log_g": -torch.rand(2, tokens, 2, generator=generator) * 8 / tokens}
            if begun:
                inputs["memory"] = torch.randn(2, 2, d * (d + 1) // 2, e, generator=generator)
                inputs["normalizer"] = torch.randn(2, 2, d * (d + 1) // 2, generator=generator)
            exact = backend == "torch"
            inputs = {n: (x.double() if exact else x).to(place).requires_grad_() for n, x in inputs.items()}
            os.environ["POWER_RETENTION_BACKEND"] = backend
            state = PowerState(inputs["memory"], inputs["normalizer"], 2, d) if begun else None
            gates = inputs["log_g"]
            final = power_retention_state(inputs["k"], inputs["v"], gates, chunk_size=chunk, initial_state=state)
            loss = sum((x.double() * torch.randn(x.shape, generator=generator).to(x.device)).sum() for x in final[:2])
            grads = torch.autograd.grad(loss, list(inputs.values()))
            results.append(
                {"memory": final[0], "normalizer": final[1]} | {f"d {n}": g for n, g in zip(inputs, grads, strict=True)}
            )
        expected, got = results
        errors = {n: float((got[n].detach().cpu().double() - x.cpu()).norm() / x.norm()) for n, x in expected.items()}
        wrong += [f"state {d}x{e}, {name}: {x:.1e}" for name, x in errors.items() if not x <= TOLERANCES[dtype]]
    return wrong


def decoding_failures(device: str) -> list[str]:
    """Twelve tokens decoded in place by the fused kernel against the float64 recurrence."""
    generator = torch.Generator().manual_seed(0)
    wrong = []
    for d, e, gated, dtype in (
        (16, 16, True, torch.float32),
        (12, 20, False, torch.float32),
        (32, 16, True, torch.float16),
    ):
        q, k, v = (torch.randn(2, 12, n, w, generator=generator).to(dtype) for n, w in ((4, d), (2, d), (2, e)))
        log_g = -torch.rand(2, 12, 2, generator=generator) if gated else None
        expected, final = recurrent_form(q, k, v, log_g)
        state = PowerState.empty(2, 2, d, e, device=device)
        os.environ["POWER_RETENTION_BACKEND"] = "triton"
        for t in range(12):
            token = [x[:, t].to(device) for x in (q, k, v)]
            gates = None if log_g is None else log_g[:, t].to(device)
            y = fused_step(*token, gates, state.memory, state.normalizer)
            if y is None:
                return ["no kernel took the call"]
            pairs = [(y, expected[:, t])]
            if t == 11:
                pairs += [(state.memory, final.memory), (state.normalizer, final.normalizer)]
            errors = [float((x.cpu().double() - want).norm() / want.norm()) for x, want in pairs]
            wrong += [f"decoding {d}x{e}, token {t}: {x:.1e}" for x in errors if not x <= TOLERANCES[dtype]]
    return wrong


@dataclass(frozen=True)
class RingCase:
    """Decoding through a ring: ``pieces`` of tokens a call, slots out of order, one row of the batch without a slot."""

    heads: tuple[int, int] = (2, 1)
    widths: tuple[int, int] = (16, 16)
    fold_size: int = 4
    pieces: tuple[int, ...] = (1,) * 15
    dtype: torch.dtype = torch.float32
    state_dtype: torch.dtype = torch.float32
    strongest: float | None = -1.0
    taken_back: int = 0
    pages: int = 0


RING_CASES = {
    "five query heads a head": RingCase(heads=(5, 1)),
    "grouped, e ≠ d": RingCase(heads=(4, 2), widths=(16, 32)),
    "odd widths, no gates": RingCase(heads=(3, 1), widths=(12, 20), strongest=None),
    "several tiles a program": RingCase(widths=(64, 16), pieces=(1,) * 10),
    "gates that forget everything": RingCase(strongest=-300.0),
    "several tokens at once, taken back": RingCase(heads=(3, 1), pieces=(3, 1, 4, 2, 4, 4, 1), taken_back=2),
    "odd fold": RingCase(fold_size=5, pieces=(1,) * 17),
    "slots that are pages of a larger memory": RingCase(pages=24),
    "long ring": RingCase(fold_size=16, pieces=(8, 8, 8, 8, 8, 1)),
    "float16": RingCase(dtype=torch.float16),
    "bfloat16": RingCase(heads=(8, 1), dtype=torch.bfloat16),
    "bfloat16 states": RingCase(heads=(4, 2), dtype=torch.bfloat16, state_dtype=torch.bfloat16),
}

bf16 = torch.bfloat16
HOPPER_RING_CASES = {
    "width 64, a state ends with half a tile": RingCase((3, 1), (64, 64), 2, (1,) * 8, bf16, bf16),
    "two heads, folds of an odd size": RingCase((4, 2), (64, 64), 3, (1,) * 8, bf16, bf16),
    "width 128": RingCase((5, 1), (128, 128), 2, (1,) * 6, bf16, bf16),
    "no gates": RingCase((1, 1), (64, 64), 2, (1,) * 6, bf16, bf16, None),
    "taken back": RingCase((2, 1), (64, 64), 2, (1,) * 8, bf16, bf16, taken_back=2),
    "sixteen query heads a head": RingCase((16, 1), (64, 64), 2, (1,) * 6, bf16, bf16),
    "long ring, everything forgotten": RingCase((1, 1), (64, 64), 40, (1,) * 3, bf16, bf16, -300.0),
    "pages of a larger memory": RingCase((2, 1), (64, 64), 2, (1,) * 6, bf16, bf16, pages=128),
}
"""What the kernel for Hopper takes; elsewhere the portable one does."""


PAGED = ("memory", "normalizer", "keys", "values", "gates")


def paged(x: Tensor, between: int) -> Tensor:
    """The same, with so many numbers of somebody else's between one slot and the next."""
    width = x[0].numel()
    return torch.full((len(x), width + between), torch.nan).to(x)[:, :width].zero_().unflatten(1, x.shape[1:])


def ring_failures(case: RingCase, device: str) -> list[str]:
    """What is wrong with the ring kernel's answers and the state it leaves, in words."""
    generator = torch.Generator().manual_seed(0)
    (query_heads, heads), (d, e), slots = case.heads, case.widths, torch.tensor([3, -1, 1])
    ring = RingState.empty(
        5, heads, d, e, fold_size=case.fold_size, dtype=case.dtype, state_dtype=case.state_dtype, device=device
    )
    if case.pages:
        ring = replace(ring, **{name: paged(getattr(ring, name), case.pages) for name in PAGED})
    for name in PAGED:
        getattr(ring, name)[[0, 2, 4]] = torch.nan
    os.environ["POWER_RETENTION_BACKEND"] = "triton"
    read: list[list[Tensor]] = [[] for _ in range(4)]
    wrong, end = [], 0
    for call, tokens in enumerate(case.pieces):
        if case.taken_back and call == 2:
            ring.roll_back(case.taken_back, slots[slots >= 0].to(device))
            read = [[torch.cat(pieces, 1)[:, : -case.taken_back]] if pieces else [] for pieces in read]
            end -= case.taken_back
        shapes = ((query_heads, d), (heads, d), (heads, e))
        q, k, v = (torch.randn(3, tokens, *shape, generator=generator).to(case.dtype) for shape in shapes)
        q = q + k.repeat_interleave(query_heads // heads, 2)
        inputs = [q, k, v]
        if case.strongest is not None:
            inputs.append(case.strongest * torch.rand(3, tokens, heads, generator=generator) ** 3)
        for pieces, x in zip(read, inputs, strict=False):
            pieces.append(x)
        start, end = end, end + tokens
        log_g = inputs[3].to(device) if len(inputs) > 3 else None
        backend: Any = next(b for b in backends._BACKENDS if b.name == "triton")
        y = backend.decode(*(x.to(device) for x in inputs[:3]), log_g, ring, slots.to(device))
        if y is None:
            return ["no kernel took the call"]
        expected, final = recurrent_form(*(torch.cat(pieces, 1).double() for pieces in read if pieces))
        if y[1].any():
            wrong.append(f"call {call}: a row without a slot is not 0")
        pairs = {"y": (y[[0, 2]], expected[[0, 2], start:])}
        if call in (2, len(case.pieces) - 1):
            state = ring.to_state()
            pairs["memory"] = (state.memory[[3, 1]], final.memory[[0, 2]])
            pairs["normalizer"] = (state.normalizer[[3, 1]], final.normalizer[[0, 2]])
        tolerance = 2e-2 if case.state_dtype == torch.bfloat16 else TOLERANCES[case.dtype]
        for name, (got, want) in pairs.items():
            error = float((got.cpu().double() - want).norm() / want.norm())
            if not error <= tolerance:
                wrong.append(f"call {call}, {name}: relative error {error:.1e}")
    if bool(ring.arrived.any()):
        wrong.append("counters are not back at 0")
    if not ring.memory[[0, 2, 4]].isnan().all():
        wrong.append("another slot was written")
    return wrong


def poison(empty: Any) -> Any:
    """``torch.empty`` whose memory is NaN: a kernel that leaves something unwritten is found out."""

    def poisoned(*args: Any, **kwargs: Any) -> Tensor:
        x = empty(*args, **kwargs)
        return x.fill_(torch.nan) if x.is_floating_point() else x

    return poisoned


def main(device: str, names: list[str]) -> int:
    """Check the named cases, or all; the exit status counts the wrong ones."""
    torch.empty, torch.empty_like = poison(torch.empty), poison(torch.empty_like)
    bad = 0
    for name in [name for name in CASES if not names or name in names]:
        wrong = failures(CASES[name], device)
        bad += bool(wrong)
        print(f"{name}: {'; '.join(wrong) or 'right'}", flush=True)
    if not names:
        wrong = decoding_failures(device)
        bad += bool(wrong)
        print(f"decoding: {'; '.join(wrong) or 'right'}", flush=True)
        wrong = state_failures(device)
        bad += bool(wrong)
        print(f"state alone: {'; '.join(wrong) or 'right'}", flush=True)
    more = HOPPER_RING_CASES if device == "cuda" else {}
    for name, ring_case in (RING_CASES | more).items():
        if not names or name in names:
            wrong = ring_failures(ring_case, device)
            bad += bool(wrong)
            print(f"ring, {name}: {'; '.join(wrong) or 'right'}", flush=True)
    return bad


if __name__ == "__main__":
    if os.environ.get("TRITON_INTERPRET") == "1":
        import interpreter  # noqa: F401
    sys.exit(main(sys.argv[1], sys.argv[2:]))
