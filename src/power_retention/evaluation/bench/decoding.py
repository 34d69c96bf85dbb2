"""What one token of one layer costs, against the context read before it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend

from power_retention.evaluation.bench.contenders import OURS, attend, draw_inputs
from power_retention.evaluation.bench.settings import TOLERANCES, Settings, first_line
from power_retention.evaluation.exact import exact_attention, relative_error
from power_retention.machine import Timing, time_call
from power_retention.ops import RingState, power_retention_decode
from power_retention.ops.ring import FOLD_SIZE
from power_retention.ops.triton.samples import HeadShape


def attention_backends(device: torch.device) -> dict[str, SDPBackend | None]:
    """PyTorch's attentions that are decoded with."""
    if device.type != "cuda":
        return {"PyTorch attention": None}
    return {"cuDNN attention": SDPBackend.CUDNN_ATTENTION, "FlashAttention": SDPBackend.FLASH_ATTENTION}


def decode(settings: Settings, device: torch.device) -> Iterator[dict[str, Any]]:
    """A row for each batch of ours, and for each attention, batch and context; none where there are no contexts."""
    if not settings.contexts:
        return
    shape, dtype = settings.decode_shape, settings.dtype
    for batch in settings.batches:
        yield _row(OURS, batch, None, shape, dtype, device, partial(_our_tokens, shape, batch, dtype, device))
    for name, backend in attention_backends(device).items():
        for batch in settings.batches:
            for context in settings.contexts:
                prepare = partial(_attention_tokens, backend, shape, batch, context, dtype, device)
                yield _row(name, batch, context, shape, dtype, device, prepare)


def _row(
    name: str,
    batch: int,
    context: int | None,
    shape: HeadShape,
    dtype: torch.dtype,
    device: torch.device,
    prepare: Callable[[], tuple[Callable[[], object], int, float]],
) -> dict[str, Any]:
    """Milliseconds of one token of one layer, replayed from a CUDA graph on a GPU; no ``context``: any."""
    row: dict[str, Any] = {"contender": name, "batch": batch, "context": context, "shape": str(shape)}
    try:
        call, copies, error = prepare()
        row["error"] = error
        took = time_call(_graphed(call, device), device, repeats=50, seconds=0.1)
        row["ms"] = Timing(took.median / copies, took.p10 / copies, took.p90 / copies, took.repeats).to_dict()
        row["verdict"] = "right" if error <= TOLERANCES[dtype] else "wrong"
    except Exception as error:  # out of memory at a long context: a line of the report
        row["failed"] = first_line(error)
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return row


def _copies(nbytes: int, device: torch.device) -> int:
    """So many that one copy is not found in the cache when its turn comes again."""
    return max(1, math.ceil(256e6 / nbytes)) if device.type == "cuda" else 1


def _our_tokens(
    shape: HeadShape, batch: int, dtype: torch.dtype, device: torch.device
) -> tuple[Callable[[], object], int, float]:
    """(as many tokens as are folded at a time for each copy of the state, tokens, error of decoding)."""
    error = _decoding_error(shape, dtype, device)
    rings = [_full_ring(shape, batch, dtype, device)]
    rings += [_full_ring(shape, batch, dtype, device) for _ in range(_copies(rings[0].memory.nbytes, device) - 1)]
    q, k, v, log_g = draw_inputs(shape, 1, dtype, device, batch=batch)

    def all_copies() -> None:
        for _ in range(FOLD_SIZE):
            for ring in rings:
                power_retention_decode(q, k, v, log_g, ring)

    return all_copies, len(rings) * FOLD_SIZE, error


def _ring(shape: HeadShape, batch: int, dtype: torch.dtype, device: torch.device) -> RingState:
    """Nothing read yet; the state in the dtype of the inputs where that can hold one."""
    kept = dtype if dtype in (torch.bfloat16, torch.float32) else torch.float32
    return RingState.empty(
        batch, shape.heads, shape.width, shape.value_width, dtype=dtype, state_dtype=kept, device=device
    )


def _full_ring(shape: HeadShape, batch: int, dtype: torch.dtype, device: torch.device) -> RingState:
    """A state of random numbers."""
    ring = _ring(shape, batch, dtype, device)
    ring.memory.normal_()
    ring.normalizer.uniform_(1, 2)
    return ring


def _decoding_error(shape: HeadShape, dtype: torch.dtype, device: torch.device) -> float:
    """A prompt and tokens one by one until some were folded, against float64."""
    prompt, tokens = 64, 64 + 2 * FOLD_SIZE
    q, k, v, log_g = draw_inputs(shape, tokens, dtype, device)
    ring = _ring(shape, 1, dtype, device)
    y = [power_retention_decode(q[:, :prompt], k[:, :prompt], v[:, :prompt], log_g[:, :prompt], ring)]
    for t in range(prompt, tokens):
        now = slice(t, t + 1)
        y.append(power_retention_decode(q[:, now], k[:, now], v[:, now], log_g[:, now], ring))
    rows = torch.arange(prompt, tokens, device=device)
    return relative_error(torch.cat(y[1:], 1), exact_attention(q, k, v, log_g, rows)["y"])


def _attention_tokens(
    backend: SDPBackend | None, shape: HeadShape, batch: int, context: int, dtype: torch.dtype, device: torch.device
) -> tuple[Callable[[], object], int, float]:
    """(one token against each copy of a key/value cache, copies, error against float64 in one sequence)."""
    size = (batch, shape.heads, context)
    nbytes = batch * shape.heads * context * (shape.width + shape.value_width) * dtype.itemsize
    caches = [
        (
            torch.randn(*size, shape.width, dtype=dtype, device=device),
            torch.randn(*size, shape.value_width, dtype=dtype, device=device),
        )
        for _ in range(_copies(nbytes, device))
    ]
    q = torch.randn(batch, shape.query_heads, 1, shape.width, dtype=dtype, device=device)
    k, v = caches[0]
    y = attend(q, k, v, backend, causal=False)
    error = relative_error(y[0, :, 0], _exact_token(q[0, :, 0], k[0], v[0]))

    def all_copies() -> None:
        for k, v in caches:
            attend(q, k, v, backend, causal=False)

    return all_copies, len(caches), error


def _exact_token(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """One query's softmax attention in float64: q ``[Hq, d]``, k ``[H, S, d]``, v ``[H, S, e]`` → ``[Hq, e]``."""
    out = []
    for head, (keys, values) in enumerate(zip(k, v, strict=True)):
        queries = q.unflatten(0, (k.shape[0], -1))[head].double()
        scores = queries @ keys.double().T / q.shape[-1] ** 0.5
        out.append(scores.softmax(-1) @ values.double())
    return torch.cat(out)


def _graphed(call: Callable[[], object], device: torch.device) -> Callable[[], object]:
    if device.type != "cuda":
        return call
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        call()
    torch.cuda.current_stream(device).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay
