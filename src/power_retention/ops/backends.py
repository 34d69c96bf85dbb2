"""Who computes a call.  Backends stand in a list, fastest first; the first that accepts a call runs it.

A backend joins by :func:`register_backend`; nothing a caller writes changes.  ``POWER_RETENTION_BACKEND=name`` pins one,
and ``POWER_RETENTION_STRICT=1`` turns every fallback into an error.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from power_retention.errors import BackendError
from power_retention.ops import attention, chunk
from power_retention.ops.heads import compute_dtype

if TYPE_CHECKING:
    from power_retention.ops.ring import RingState


@dataclass(frozen=True)
class Call:
    """One call of the operator, already checked.

    Attributes:
        q: ``[B, T, Hq, d]``; no heads at all where only the final state is wanted.
        k: ``[B, T, H, d]``.
        v: ``[B, T, H, e]``.
        log_g: ``[B, T, H]`` or None.
        memory, normalizer: entering states ``[R, H, D, e]`` and ``[R, H, D]``, or None; R is the number of runs.
        cu_seqlens: ``[R + 1]`` borders of the packed runs (then B = 1), or None (then R = B).
        p: the power.
        chunk_size: tokens a chunk; 0 means the attention form.
        return_state: whether final states are wanted.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    log_g: Tensor | None
    memory: Tensor | None
    normalizer: Tensor | None
    cu_seqlens: Tensor | None
    p: int
    chunk_size: int
    return_state: bool

    @property
    def runs(self) -> int:
        """Number of independent sequences."""
        return self.q.shape[0] if self.cu_seqlens is None else self.cu_seqlens.numel() - 1


class Backend(Protocol):
    """What a backend provides; ``forward`` and ``backward`` see real tensors, never fake ones.

    It may also have ``devices``, the device types it serves: tensors elsewhere pass it by without a word; ``step`` and
    ``decode``, the kernels that :func:`fused_step` and :func:`fused_decode` look for; ``chunk_size(call, backward=…)``, its
    own choice where the caller left it open (the two passes may differ); and ``workspace(call, backward=…)``, the bytes an
    out-of-memory error names.
    """

    name: str

    def refusal(self, call: Call) -> str | None:
        """Why this backend cannot run the call, or None if it can."""
        ...

    def forward(self, call: Call) -> tuple[Tensor, Tensor, Tensor]:
        """(y ``[B, T, Hq, e]``, memory ``[R, H, D, e]``, normalizer ``[R, H, D]``); states have 0 runs if not wanted."""
        ...

    def backward(
        self, call: Call, dy: Tensor, d_memory: Tensor | None, d_normalizer: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
        """Gradients of q, k, v, log_g, memory, normalizer, each in its input's dtype."""
        ...


_BACKENDS: list[Backend] = []


def register_backend(backend: Backend, *, first: bool = True) -> None:
    """Add a backend, by default ahead of those already there; one of the same name is replaced."""
    _BACKENDS[:] = [known for known in _BACKENDS if known.name != backend.name]
    _BACKENDS.insert(0 if first else len(_BACKENDS), backend)


def backend_names() -> list[str]:
    """Names of the registered backends, in order of preference."""
    return [backend.name for backend in _BACKENDS]


def choose_backend(call: Call) -> Backend:
    """The first backend that accepts the call; says once a process why a preferred one did not."""
    wanted = os.environ.get("POWER_RETENTION_BACKEND")
    candidates = [b for b in _BACKENDS if wanted in (None, "", b.name)]
    if not candidates:
        raise BackendError(
            f"POWER_RETENTION_BACKEND={wanted!r} names no backend; there are: {', '.join(backend_names())}."
        )
    refusals: list[str] = []
    for backend in candidates:
        if not wanted and call.q.device.type not in getattr(backend, "devices", (call.q.device.type,)):
            continue
        reason = backend.refusal(call)
        if reason is None:
            _report_fallback(tuple(refusals), backend.name)
            return backend
        refusals.append(f"{backend.name}: {reason}")
    raise BackendError(f"No backend can run this call ({'; '.join(refusals)}).")


def fused_step(
    q: Tensor, k: Tensor, v: Tensor, log_g: Tensor | None, memory: Tensor, normalizer: Tensor
) -> Tensor | None:
    """One token of decoding at p = 2 by the first backend that has a kernel for it, extending the state in place.

    Shapes as in :func:`power_retention_step`.  None where no backend has one: nothing was touched then.
    """
    wanted = os.environ.get("POWER_RETENTION_BACKEND")
    for backend in _BACKENDS:
        step = getattr(backend, "step", None)
        if step is not None and wanted in (None, "", backend.name):
            y: Tensor | None = step(q, k, v, log_g, memory, normalizer)
            if y is not None:
                return y
    return None


def fused_decode(
    q: Tensor, k: Tensor, v: Tensor, log_g: Tensor | None, ring: RingState, slot_indices: Tensor | None
) -> Tensor | None:
    """Decoding through a ring at p = 2 by the first backend that has a kernel for it; shapes as in ``power_retention_decode``.

    None where no backend has one: nothing was touched then.
    """
    wanted = os.environ.get("POWER_RETENTION_BACKEND")
    for backend in _BACKENDS:
        decode = getattr(backend, "decode", None)
        if decode is not None and wanted in (None, "", backend.name):
            y: Tensor | None = decode(q, k, v, log_g, ring, slot_indices)
            if y is not None:
                return y
    return None


_reported: set[tuple[str, ...]] = set()


def _report_fallback(refusals: tuple[str, ...], chosen: str) -> None:
    if not refusals:
        return
    message = f"power retention runs on the {chosen!r} backend ({'; '.join(refusals)})."
    if os.environ.get("POWER_RETENTION_STRICT", "0") not in ("", "0"):
        raise BackendError(message + " POWER_RETENTION_STRICT makes this an error.")
    if refusals not in _reported:
        _reported.add(refusals)
        warnings.warn(message, RuntimeWarning, stacklevel=2)


class TorchBackend:
    """Plain PyTorch: every device, every dtype, every shape."""

    name = "torch"

    def refusal(self, call: Call) -> str | None:
        return None

    def forward(self, call: Call) -> tuple[Tensor, Tensor, Tensor]:
        y = call.q.new_empty(*call.q.shape[:-1], call.v.shape[-1], dtype=call.v.dtype)
        finals: list[Tensor] = []
        for rows, span in _runs(call):
            q, k, v, log_g = _cut(call, span)
            if call.chunk_size == 0:
                y[:, span] = attention.attention_forward(q, k, v, log_g, call.p)
                continue
            state = _entering(call, rows)
            y[:, span], final = chunk.chunk_forward(q, k, v, log_g, state, call.p, call.chunk_size, call.return_state)
            if final is not None:
                finals.append(final.unflatten(0, (-1, call.k.shape[2])))
        if not finals:
            nothing = call.k.new_empty(0, dtype=compute_dtype(call.q.dtype))
            return y, nothing, nothing.clone()
        final = torch.cat(finals)
        return y, _copy(final[..., :-1]), _copy(final[..., -1])

    def backward(
        self, call: Call, dy: Tensor, d_memory: Tensor | None, d_normalizer: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
        dq, dk, dv = torch.empty_like(call.q), torch.empty_like(call.k), torch.empty_like(call.v)
        dlog_g = None if call.log_g is None else torch.empty_like(call.log_g)
        d_entering: list[Tensor] = []
        for rows, span in _runs(call):
            q, k, v, log_g = _cut(call, span)
            if call.chunk_size == 0:
                dq[:, span], dk[:, span], dv[:, span], d_gates = attention.attention_backward(
                    dy[:, span], q, k, v, log_g, call.p
                )
            else:
                d_final = _join(d_memory, d_normalizer, rows)
                dq[:, span], dk[:, span], dv[:, span], d_gates, d_state = chunk.chunk_backward(
                    dy[:, span], d_final, q, k, v, log_g, _entering(call, rows), call.p, call.chunk_size
                )
                if d_state is not None:
                    d_entering.append(d_state.unflatten(0, (-1, call.k.shape[2])))
            if dlog_g is not None and d_gates is not None:
                dlog_g[:, span] = d_gates
        if call.memory is None or call.normalizer is None:
            return dq, dk, dv, dlog_g, None, None
        d_joined = torch.cat(d_entering)
        return (
            dq,
            dk,
            dv,
            dlog_g,
            _copy(d_joined[..., :-1].to(call.memory.dtype)),
            _copy(d_joined[..., -1].to(call.normalizer.dtype)),
        )


def _cut(call: Call, span: slice) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """q, k, v and log_g of one run."""
    return call.q[:, span], call.k[:, span], call.v[:, span], None if call.log_g is None else call.log_g[:, span]


def _runs(call: Call) -> Iterator[tuple[slice, slice]]:
    """(rows of the states, tokens) of each independent run."""
    if call.cu_seqlens is None:
        yield slice(0, call.q.shape[0]), slice(0, call.q.shape[1])
        return
    borders = call.cu_seqlens.tolist()
    for run in range(len(borders) - 1):
        yield slice(run, run + 1), slice(borders[run], borders[run + 1])


def _entering(call: Call, rows: slice) -> Tensor | None:
    state = _join(call.memory, call.normalizer, rows)
    return None if state is None else state.to(compute_dtype(call.q.dtype))


def _copy(x: Tensor) -> Tensor:
    """What a custom operator may return: contiguous, and no view of another result (states of width 1 would be)."""
    return x.clone(memory_format=torch.contiguous_format)


def _join(memory: Tensor | None, normalizer: Tensor | None, rows: slice) -> Tensor | None:
    """Memory and normaliser as one tensor ``[N, D, e + 1]``."""
    if memory is None or normalizer is None:
        return None
    dtype = torch.promote_types(memory.dtype, normalizer.dtype)
    return torch.cat((memory[rows].to(dtype), normalizer[rows].to(dtype).unsqueeze(-1)), -1).flatten(0, 1)


register_backend(TorchBackend())
