"""`power_retention`: the one call through which every form and every backend is reached."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise

import torch
from torch import Tensor

from power_retention.errors import ArgumentError, PowerRetentionError
from power_retention.ops.backends import Backend, Call, choose_backend
from power_retention.ops.heads import compute_dtype
from power_retention.ops.layout import WIDEST_STATE, check_power, has_state, state_width
from power_retention.ops.state import PowerState, check_state


class MemoryExhausted(PowerRetentionError, torch.OutOfMemoryError):
    """A pass did not fit into the device's memory; the message names the sizes."""


DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def power_retention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_g: Tensor | None = None,
    *,
    p: int = 2,
    scale: float | None = None,
    chunk_size: int | None = None,
    initial_state: PowerState | None = None,
    return_state: bool = False,
    cu_seqlens: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor | tuple[Tensor, PowerState]:
    """Causal power retention: y_i = Σ_{j≤i} w_ij v_j / Σ_{j≤i} w_ij,  w_ij = (σ q_i·k_j)^p · Π_{j<t≤i} g_t.

    Equal to attention whose softmax is replaced by an even power, and computable with a state of fixed size
    (arXiv 2507.04239).  Query head i reads key/value head i // (Hq / H).

    Args:
        q: queries ``[B, T, Hq, d]``, float32, bfloat16, float16 or float64.
        k: keys ``[B, T, H, d]``; Hq is a multiple of H.
        v: values ``[B, T, H, e]``; e may differ from d.
        log_g: natural logarithms of the gates, ``[B, T, H]``, each ≤ 0; best in float32.  Gate t discounts everything
            before token t.  None: nothing is forgotten.
        p: even power.  p = 2 has a state at any width, p ≥ 4 where its width stays within 65,536.
        scale: σ.  It cancels in the ratio; accepted so that calls read like attention's.
        chunk_size: tokens handled by attention between two states; None chooses, 0 asks for the attention form.
        initial_state: state to start from, one row a sequence.
        return_state: also return the state after the last token.
        cu_seqlens: borders ``[R + 1]`` of R sequences packed along T, starting at 0 and ending at T; needs B = 1.
        mask: ``[B, T]``, True at tokens and False at padding.  Padding neither is remembered nor forgets; y is 0 there.

    Returns:
        y ``[B, T, Hq, e]`` in the dtype of v, and with ``return_state`` a :class:`PowerState` in float32 (float64 for
        float64 inputs).  A query that no remembered key answers (all weights zero) gives y = 0.

    Raises:
        ArgumentError: an argument has the wrong shape, dtype or value.
        StateError: ``initial_state`` does not fit the call.
    """
    _check(q, k, v, log_g, p, scale, chunk_size, cu_seqlens, mask)
    runs = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    needs_state = return_state or initial_state is not None
    if needs_state or chunk_size:
        _check_has_state(k.shape[-1], p, chunk_size)
    if initial_state is not None:
        check_state(
            initial_state,
            batch=runs,
            heads=k.shape[2],
            head_width=k.shape[-1],
            value_width=v.shape[-1],
            p=p,
            device=q.device,
        )
    if mask is not None:
        q, k, v, log_g = without_padding(q, k, v, log_g, mask)
    memory, normalizer = (None, None) if initial_state is None else initial_state[:2]
    y, memory, normalizer = torch.ops.power_retention.retain(
        q, k, v, log_g, memory, normalizer, cu_seqlens, p, _CHOOSE if chunk_size is None else chunk_size, return_state
    )
    return (y, PowerState(memory, normalizer, p, k.shape[-1])) if return_state else y


def power_retention_state(
    k: Tensor,
    v: Tensor,
    log_g: Tensor | None = None,
    *,
    p: int = 2,
    chunk_size: int | None = None,
    initial_state: PowerState | None = None,
) -> PowerState:
    """The state after the last token, without any output: what there is to say of a stretch of tokens to those behind it.

    Args:
        k: keys ``[B, T, H, d]``.
        v: values ``[B, T, H, e]``.
        log_g, p, chunk_size, initial_state: as in :func:`power_retention`.

    Returns:
        One row a sequence, in float32 (float64 for float64 inputs), with gradients.

    Raises:
        ArgumentError: an argument has the wrong shape, dtype or value, or there is no state at this power and width.
        StateError: ``initial_state`` does not fit the call.
    """
    _check(k, k, v, log_g, p, None, chunk_size, None, None)
    _check_has_state(k.shape[-1], p, chunk_size)
    if initial_state is not None:
        sizes = {"batch": k.shape[0], "heads": k.shape[2], "head_width": k.shape[-1], "value_width": v.shape[-1]}
        check_state(initial_state, **sizes, p=p, device=k.device)
    memory, normalizer = (None, None) if initial_state is None else initial_state[:2]
    nobody = k[:, :, :0]
    _, memory, normalizer = torch.ops.power_retention.retain(
        nobody, k, v, log_g, memory, normalizer, None, p, _CHOOSE if chunk_size is None else chunk_size, True
    )
    return PowerState(memory, normalizer, p, k.shape[-1])


def usual_chunk_size(tokens: int, head_width: int, p: int, *, needs_state: bool) -> int:
    """Tokens a chunk, 0 for the attention form, where no backend knows better.

    A token costs about c·2d operations inside its chunk and D·2d at its border; chunks of about D/4 balance the two with
    the element-wise work that only the first has.  A sequence of up to two chunks is one chunk, and needs no border.
    """
    if not has_state(head_width, p):
        return 0
    size, width = 64, state_width(head_width, p)
    while size < 512 and 8 * size <= width:
        size *= 2
    return tokens if tokens <= 2 * size and not needs_state else size


def without_padding(
    q: Tensor, k: Tensor, v: Tensor, log_g: Tensor | None, mask: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """At padding q, k, v and log_g become 0: a weight of 0 for others, nothing remembered, nothing forgotten."""
    padding = ~mask.bool()[:, :, None]
    q, k, v = (x.masked_fill(padding.unsqueeze(-1), 0) for x in (q, k, v))
    return q, k, v, None if log_g is None else log_g.masked_fill(padding, 0)


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_g: Tensor | None,
    p: int,
    scale: float | None,
    chunk_size: int | None,
    cu_seqlens: Tensor | None,
    mask: Tensor | None,
) -> None:
    check_power(p)
    check_heads(q, k, v, log_g, axes="B, T")
    tokens = tuple(q.shape[:2])
    if scale is not None and not abs(scale) > 0:
        raise ArgumentError(f"scale must be a non-zero number, not {scale}: it would make every weight zero.")
    if chunk_size is not None and (not isinstance(chunk_size, int) or chunk_size < 0):
        raise ArgumentError(f"chunk_size must be a positive number of tokens, or 0 for attention, not {chunk_size!r}.")
    if mask is not None and tuple(mask.shape) != tokens:
        raise ArgumentError(f"mask must be [B, T] = {list(tokens)}, not {list(mask.shape)}.")
    if mask is not None and mask.device != q.device:
        raise ArgumentError(f"mask is on {mask.device}, q is on {q.device}: move one of them.")
    if cu_seqlens is not None:
        _check_borders(cu_seqlens, *tokens)


def check_heads(q: Tensor, k: Tensor, v: Tensor, log_g: Tensor | None, *, axes: str) -> None:
    """Shapes, dtypes, devices and gate signs of one call; ``axes`` names the leading dimensions."""
    rank = axes.count(",") + 3
    for name, tensor, last in (("q", q, "Hq, d"), ("k", k, "H, d"), ("v", v, "H, e")):
        if not isinstance(tensor, Tensor) or tensor.ndim != rank:
            got = f"shape {list(tensor.shape)}" if isinstance(tensor, Tensor) else type(tensor).__name__
            raise ArgumentError(f"{name} must be a tensor [{axes}, {last}], not {got}.")
        if tensor.dtype not in DTYPES:
            raise ArgumentError(f"{name} has dtype {tensor.dtype}; float32, bfloat16, float16 or float64 was expected.")
        if tensor.dtype != q.dtype:
            raise ArgumentError(f"q, k and v must share a dtype, not {q.dtype}, {k.dtype} and {v.dtype}: cast them.")
        if tensor.device != q.device:
            raise ArgumentError(f"{name} is on {tensor.device}, q is on {q.device}: move one of them.")
        if tensor.numel() == 0:
            raise ArgumentError(f"{name} is empty, {list(tensor.shape)}: at least one of everything was expected.")
    lead = q.shape[:-2]
    if k.shape[:-2] != lead or v.shape[:-1] != k.shape[:-1] or k.shape[-1] != q.shape[-1]:
        raise ArgumentError(
            f"q {list(q.shape)}, k {list(k.shape)} and v {list(v.shape)} do not fit together; expected q [{axes}, Hq, d], "
            f"k [{axes}, H, d] and v [{axes}, H, e] with equal {axes}."
        )
    if q.shape[-2] % k.shape[-2]:
        raise ArgumentError(
            f"{q.shape[-2]} query heads cannot share {k.shape[-2]} key/value heads; a multiple of them was expected."
        )
    if log_g is None:
        return
    if not isinstance(log_g, Tensor):
        raise ArgumentError(f"log_g must be a tensor [{axes}, H] or None, not {type(log_g).__name__}.")
    if log_g.device != q.device:
        raise ArgumentError(f"log_g is on {log_g.device}, q is on {q.device}: move one of them.")
    if log_g.shape != k.shape[:-1] or not log_g.is_floating_point():
        raise ArgumentError(
            f"log_g must be [{axes}, H] = {list(k.shape[:-1])} in a floating dtype, one gate a key/value head and token, "
            f"not {list(log_g.shape)} in {log_g.dtype}."
        )
    # A look at values: only where it costs no synchronisation and breaks no graph.
    real = type(log_g) in (Tensor, torch.nn.Parameter) and not torch.compiler.is_compiling()
    if log_g.device.type == "cpu" and real and bool((log_g > 0).any()):
        raise ArgumentError(
            f"log_g holds a gate above zero ({float(log_g.max()):.4g}): gates are natural logarithms of factors ≤ 1, "
            "log_g = logsigmoid(x) for example."
        )


def _check_borders(cu_seqlens: Tensor, batch: int, tokens: int) -> None:
    if cu_seqlens.ndim != 1 or cu_seqlens.numel() < 2 or cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise ArgumentError(
            f"cu_seqlens must be an integer tensor [R + 1] of borders, not {list(cu_seqlens.shape)} in {cu_seqlens.dtype}."
        )
    if batch != 1:
        raise ArgumentError(f"cu_seqlens packs sequences along T and needs a batch of 1, not {batch}.")
    if cu_seqlens.device.type == "cpu" and not torch.compiler.is_compiling():
        borders = cu_seqlens.tolist()
        if borders[0] != 0 or borders[-1] != tokens or any(a >= b for a, b in pairwise(borders)):
            raise ArgumentError(
                f"cu_seqlens must rise from 0 to T = {tokens} without an empty sequence, not {borders}."
            )


def _check_has_state(head_width: int, p: int, chunk_size: int | None) -> None:
    if not has_state(head_width, p):
        raise ArgumentError(
            f"p={p} at head width {head_width} would need a state of width {state_width(head_width, p):,}; the limit is "
            f"{WIDEST_STATE:,}. Without initial_state, return_state and chunk_size the attention form runs it."
        )
    if chunk_size == 0:
        raise ArgumentError("chunk_size=0 asks for the attention form, which has no state; leave chunk_size to None.")


# ── the custom operators behind the call: what autograd and torch.compile see ────────────────────────────────────────

_CHOOSE = -1
"""As a chunk size: to be chosen when the real sizes are known, so that one compiled graph serves every length."""


def _planned(call: Call, *, backward: bool) -> tuple[Backend, Call]:
    """The backend that runs the call, and the call with its chunk size chosen."""
    if call.chunk_size != _CHOOSE:
        return choose_backend(call), call
    needs_state = call.memory is not None or call.return_state
    usual = usual_chunk_size(call.q.shape[1], call.k.shape[-1], call.p, needs_state=needs_state)
    call = replace(call, chunk_size=usual)
    backend = choose_backend(call)
    if hasattr(backend, "chunk_size"):
        call = replace(call, chunk_size=backend.chunk_size(call, backward=backward))
    return backend, call


@contextmanager
def _sizes_named(backend: Backend, call: Call, *, backward: bool) -> Iterator[None]:
    """An out-of-memory inside says what was asked for and what took the memory."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        parts = backend.workspace(call, backward=backward) if hasattr(backend, "workspace") else {}
        raise MemoryExhausted(_explain_memory(call, parts, backward=backward)) from error


def _explain_memory(call: Call, parts: dict[str, int], *, backward: bool) -> str:
    form = f"chunks of {call.chunk_size:,} tokens" if call.chunk_size else "the attention form"
    largest = sorted(((size, name) for name, size in parts.items() if size), reverse=True)
    needs = (
        f" The kernels ask for {', '.join(f'{name} {size / 1e9:.2f} GB' for size, name in largest)}." if largest else ""
    )
    free = ""
    if call.q.device.type == "cuda":
        left, total = torch.cuda.mem_get_info(call.q.device)
        free = f" {left / 1e9:.1f} of {total / 1e9:.1f} GB are free outside PyTorch's cache."
    remedy = "Use fewer tokens a call (carry the state with return_state and initial_state), or a smaller batch"
    if largest and largest[0][1].endswith(("chunk borders", "the states")):
        remedy = (
            f"Use a larger chunk_size than {call.chunk_size:,} (fewer states), fewer tokens a call, or a smaller batch"
        )
    return (
        f"The {'backward' if backward else 'forward'} pass of power_retention ran out of memory in {form} with q "
        f"{list(call.q.shape)}, k {list(call.k.shape)} and v {list(call.v.shape)} in {call.q.dtype}.{needs}{free} {remedy}."
    )


@torch.library.custom_op("power_retention::retain", mutates_args=())
def _retain(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_g: Tensor | None,
    memory: Tensor | None,
    normalizer: Tensor | None,
    cu_seqlens: Tensor | None,
    p: int,
    chunk_size: int,
    return_state: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    call = Call(q, k, v, log_g, memory, normalizer, cu_seqlens, p, chunk_size, return_state)
    backend, call = _planned(call, backward=False)
    with _sizes_named(backend, call, backward=False):
        return backend.forward(call)


@_retain.register_fake
def _retain_fake(q, k, v, log_g, memory, normalizer, cu_seqlens, p, chunk_size, return_state):  # type: ignore[no-untyped-def]
    y = q.new_empty(*q.shape[:-1], v.shape[-1])
    dtype = compute_dtype(q.dtype)
    if not return_state:
        return y, q.new_empty(0, dtype=dtype), q.new_empty(0, dtype=dtype)
    runs = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    shape = (runs, k.shape[2], state_width(k.shape[-1], p), v.shape[-1])
    return y, q.new_empty(shape, dtype=dtype), q.new_empty(shape[:3], dtype=dtype)


@torch.library.custom_op("power_retention::retain_backward", mutates_args=())
def _retain_backward(
    dy: Tensor,
    d_memory: Tensor | None,
    d_normalizer: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_g: Tensor | None,
    memory: Tensor | None,
    normalizer: Tensor | None,
    cu_seqlens: Tensor | None,
    p: int,
    chunk_size: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    call = Call(q, k, v, log_g, memory, normalizer, cu_seqlens, p, chunk_size, d_memory is not None)
    backend, call = _planned(call, backward=True)
    with _sizes_named(backend, call, backward=True):
        grads = backend.backward(call, dy, d_memory, d_normalizer)
    # A custom operator returns tensors only: an input that was None gets an empty gradient, dropped by the caller.
    dq, dk, dv, dlog_g, d_memory_in, d_normalizer_in = (q.new_empty(0) if g is None else g.contiguous() for g in grads)
    return dq, dk, dv, dlog_g, d_memory_in, d_normalizer_in


@_retain_backward.register_fake
def _retain_backward_fake(  # type: ignore[no-untyped-def]
    dy, d_memory, d_normalizer, q, k, v, log_g, memory, normalizer, cu_seqlens, p, chunk_size
):
    inputs = (q, k, v, log_g, memory, normalizer)
    return tuple(q.new_empty(0) if x is None else x.new_empty(x.shape) for x in inputs)


def _save_for_backward(ctx, inputs, output):  # type: ignore[no-untyped-def]
    *tensors, ctx.p, ctx.chunk_size, ctx.return_state = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx, dy, d_memory, d_normalizer):  # type: ignore[no-untyped-def]
    saved = ctx.saved_tensors
    if not ctx.return_state:
        d_memory = d_normalizer = None
    grads = torch.ops.power_retention.retain_backward(
        dy.contiguous(), d_memory, d_normalizer, *saved, ctx.p, ctx.chunk_size
    )
    grads = [None if x is None else g for x, g in zip(saved, grads, strict=False)]
    return *grads, None, None, None, None


_retain.register_autograd(_backward, setup_context=_save_for_backward)
