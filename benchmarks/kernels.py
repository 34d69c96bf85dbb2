"""Times the operator against PyTorch's attention on one GPU; prints a table and writes JSON.

    python benchmarks/kernels.py results.json

Nothing is timed for a shape whose outputs or gradients fail the check against float64.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import logsigmoid, scaled_dot_product_attention

from power_retention.ops import PowerState, power_retention, power_retention_step
from power_retention.ops.layout import state_width

SHAPES = {"12/12 heads of 64": (12, 12, 64), "40/8 heads of 128": (40, 8, 128)}
LENGTHS = (8192, 16384, 32768, 65536, 131072, 262144)
LONGEST_BACKWARD = 65536
TOLERANCE = 1e-2


def draw(tokens: int, query_heads: int, heads: int, width: int, batch: int = 1) -> list[Tensor]:
    def normal(*shape: int) -> Tensor:
        return torch.randn(batch, tokens, *shape, device="cuda", dtype=torch.bfloat16)

    log_g = logsigmoid(torch.randn(batch, tokens, heads, device="cuda") + 6)
    return [normal(query_heads, width), normal(heads, width), normal(heads, width), log_g]


def milliseconds(call: Callable[[], Any], repeats: int = 5) -> float:
    """Median over CUDA events, after two calls to warm up."""
    times = []
    for repeat in range(repeats + 2):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        call()
        end.record()
        torch.cuda.synchronize()
        if repeat > 1:
            times.append(begin.elapsed_time(end))
    return statistics.median(times)


def reference(q: Tensor, k: Tensor, v: Tensor, log_g: Tensor) -> Tensor:
    """The attention form in float64, a head at a time."""
    log_decay = log_g.cumsum(1)
    causal = torch.ones(q.shape[1], q.shape[1], device="cuda", dtype=torch.bool).tril()
    out = []
    for head in range(q.shape[2]):
        shared = head // (q.shape[2] // k.shape[2])
        gate = log_decay[0, :, shared]
        weight = (q[0, :, head] @ k[0, :, shared].T) ** 2
        weight = weight * torch.where(causal, gate[:, None] - gate[None, :], -torch.inf).exp()
        out.append(weight @ v[0, :, shared] / weight.sum(-1, keepdim=True))
    return torch.stack(out, 1)[None]


def check(query_heads: int, heads: int, width: int, tokens: int) -> dict[str, float]:
    """Relative RMS errors of the output and of every gradient."""
    ours = [x.requires_grad_() for x in draw(tokens, query_heads, heads, width)]
    exact = [x.detach().double().requires_grad_() for x in ours]
    y, expected = power_retention(*ours), reference(*exact)
    dy = torch.randn_like(y)
    got = [y, *torch.autograd.grad(y, ours, dy)]
    want = [expected, *torch.autograd.grad(expected, exact, dy.double())]
    return {
        name: float((a.double() - b).norm() / b.norm())
        for name, a, b in zip(("y", "dq", "dk", "dv", "dlog_g"), got, want, strict=True)
    }


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return scaled_dot_product_attention(
            *(x.transpose(1, 2) for x in (q, k, v)), is_causal=True, enable_gqa=q.shape[2] != k.shape[2]
        )


def both_ways(forward: Callable[[], Tensor], inputs: list[Tensor]) -> Callable[[], Any]:
    dy = torch.randn_like(forward())
    return lambda: torch.autograd.grad(forward(), inputs, dy)


def times(tokens: int, query_heads: int, heads: int, width: int, backward: bool) -> dict[str, float]:
    """Milliseconds and peak memory of both contenders."""
    inputs = draw(tokens, query_heads, heads, width)
    if backward:
        inputs = [x.requires_grad_() for x in inputs]
    calls: dict[str, tuple[Callable[[], Tensor], list[Tensor]]] = {
        "ours": (lambda: power_retention(*inputs), inputs),
        "cudnn": (lambda: attention(*inputs[:3]), inputs[:3]),
    }
    out = {}
    for name, (call, leaves) in calls.items():
        torch.cuda.reset_peak_memory_stats()
        out[name] = milliseconds(both_ways(call, leaves) if backward else call, 3)
        out[f"{name} peak GB"] = torch.cuda.max_memory_allocated() / 1e9
    return out


def decode(batch: int, dtype: torch.dtype, query_heads: int = 40, heads: int = 8, width: int = 128) -> dict[str, float]:
    """One token replayed from a CUDA graph; several states in turn, so that none is read from the cache."""
    copies = max(1, 16 // batch)
    size = (batch, heads, state_width(width))
    states = [
        PowerState(torch.randn(*size, width, device="cuda").to(dtype), torch.rand(size, device="cuda") + 1, 2, width)
        for _ in range(copies)
    ]
    arguments = [x[:, 0].contiguous() for x in draw(1, query_heads, heads, width, batch)]

    def tokens() -> None:
        for state in states:
            power_retention_step(*arguments, state, inplace=True)

    tokens()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        tokens()
    taken = milliseconds(graph.replay, 20) / copies
    held = states[0].nbytes
    return {"ms": taken, "state MB": held / 1e6, "TB/s read and written": 2 * held / taken / 1e9}


def main(path: str) -> None:
    torch.manual_seed(0)
    report: dict[str, Any] = {
        "gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "errors": {}, "ms": {}, "decode": {}
    }  # fmt: skip
    for batch in (1, 8, 32):
        for dtype in (torch.bfloat16, torch.float32):
            row = report["decode"][f"batch {batch}, {dtype}"] = decode(batch, dtype)
            print("decode", batch, dtype, {k: round(x, 4) for k, x in row.items()}, flush=True)
    for name, (query_heads, heads, width) in SHAPES.items():
        errors = report["errors"][name] = check(query_heads // heads * 2, 2, width, 3000)
        print(name, {k: f"{x:.1e}" for k, x in errors.items()}, flush=True)
        if not max(errors.values()) <= TOLERANCE:
            print(f"{name}: wrong, so not timed", flush=True)
            continue
        for tokens in LENGTHS:
            for backward in (False, True) if tokens <= LONGEST_BACKWARD else (False,):
                key = f"{name}, {tokens} tokens, {'forward + backward' if backward else 'forward'}"
                row = report["ms"][key] = times(tokens, query_heads, heads, width, backward)
                print(key, {k: round(x, 3) for k, x in row.items()}, f"{row['cudnn'] / row['ours']:.2f}x", flush=True)
                torch.cuda.empty_cache()
    with open(path, "w") as file:
        json.dump(report, file, indent=1)


if __name__ == "__main__":
    main(sys.argv[1])
