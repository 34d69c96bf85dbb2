"""Times decoding through the ring on one GPU against cuDNN attention and copy bandwidth; prints lines and writes JSON.

    python benchmarks/decode.py results.json [--quick | --compare]

Every launch shape is checked against the float64 recurrence, over two folds, before it is timed; a wrong one is
reported and not timed.  Times are a CUDA graph's: one token for each of several rings in turn, so that no state is read
from the L2 cache, averaged over whole fold periods.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from dataclasses import asdict
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import logsigmoid, scaled_dot_product_attention

from power_retention.ops import RingState
from power_retention.ops.reference import recurrent_form
from power_retention.ops.ring import FOLD_SIZE
from power_retention.ops.triton.backend import TritonBackend
from power_retention.ops.triton.hopper.ring import covers
from power_retention.ops.triton.plan import DecodeShape, decode_shape

QUERY_HEADS, HEADS, WIDTH = 40, 8, 128
BATCHES = (1, 8, 32)
CONTEXTS = {"64k": 65536, "256k": 262144, "1M": 1048576}
TARGETS_MS = {1: 0.012, 8: 0.045, 32: 0.165}
TOLERANCE = 1e-2
LARGEST_CACHE = 60e9

CANDIDATES = [
    DecodeShape(rows=128, resident=2, warps=4, stages=3),
    DecodeShape(rows=64, resident=2, warps=4, stages=4),
    DecodeShape(rows=64, resident=2, warps=4, stages=6),
    DecodeShape(rows=32, resident=4, warps=4, stages=6, registers=128),
    DecodeShape(rows=32, resident=3, warps=4, stages=8, registers=168),
    DecodeShape(rows=128, resident=1, warps=8, stages=4),
]
PORTABLE = decode_shape(WIDTH, WIDTH, 2)
backend = TritonBackend()


def draw(batch: int, tokens: int) -> list[Tensor]:
    def normal(heads: int) -> Tensor:
        return torch.randn(batch, tokens, heads, WIDTH, device="cuda", dtype=torch.bfloat16)

    k = normal(HEADS)
    q = normal(QUERY_HEADS) + k.repeat_interleave(QUERY_HEADS // HEADS, 2)
    return [q, k, normal(HEADS), logsigmoid(torch.randn(batch, tokens, HEADS, device="cuda") + 4)]


def new_ring(batch: int, fold_size: int, dtype: torch.dtype) -> RingState:
    return RingState.empty(
        batch, HEADS, WIDTH, fold_size=fold_size, dtype=torch.bfloat16, state_dtype=dtype, device="cuda"
    )


def step(
    tokens: list[Tensor], ring: RingState, shape: DecodeShape | None, slot_indices: Tensor | None = None
) -> Tensor:
    y = backend.decode(*tokens, ring, slot_indices, shape)
    assert y is not None, "no kernel took the call"
    return y


def decode_all(
    inputs: list[Tensor], ring: RingState, shape: DecodeShape | None, slot_indices: Tensor | None = None
) -> Tensor:
    tokens = ([x[:, t : t + 1].contiguous() for x in inputs] for t in range(inputs[0].shape[1]))
    return torch.cat([step(token, ring, shape, slot_indices) for token in tokens], 1)


def errors(batch: int, fold_size: int, dtype: torch.dtype, shape: DecodeShape | None) -> dict[str, float]:
    """Relative errors of outputs and final state of the first and the last sequence; NaN stands for a run that differs."""
    inputs = draw(batch, 3 * fold_size + 3)
    ring = new_ring(batch, fold_size, dtype)
    y = decode_all(inputs, ring, shape)
    rows = sorted({0, batch - 1})
    expected, final = recurrent_form(*(x[rows].double() for x in inputs))
    state = ring.select(torch.tensor(rows)).to_state()
    pairs = {
        "y": (y[rows], expected),
        "memory": (state.memory, final.memory),
        "s": (state.normalizer, final.normalizer),
    }
    out = {name: float((got.double() - want).norm() / want.norm()) for name, (got, want) in pairs.items()}
    again = new_ring(batch, fold_size, dtype)
    same = decode_all(inputs, again, shape).equal(y) and again.memory.equal(ring.memory)
    out["second run differs"] = 0.0 if same else float("nan")
    return out


def two_streams_agree(fold_size: int = 16) -> bool:
    """Two rings decoded at once on two streams give what each gives alone."""
    inputs, rings = [draw(4, 40) for _ in range(2)], [new_ring(4, fold_size, torch.bfloat16) for _ in range(2)]
    alone = [decode_all(x, new_ring(4, fold_size, torch.bfloat16), None) for x in inputs]
    streams = [torch.cuda.Stream() for _ in range(2)]
    outputs: list[list[Tensor]] = [[], []]
    torch.cuda.synchronize()
    for t in range(40):
        for i, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                outputs[i].append(step([x[:, t : t + 1].contiguous() for x in inputs[i]], rings[i], None))
    torch.cuda.synchronize()
    return all(torch.cat(got, 1).equal(want) for got, want in zip(outputs, alone, strict=True))


def roll_back_is_exact(fold_size: int = 16) -> bool:
    """Other tokens after a roll-back give, bit for bit, what they give where the dropped ones never came."""
    first, dropped, then = draw(2, 20), draw(2, 5), draw(2, 30)
    a, b = (new_ring(2, fold_size, torch.bfloat16) for _ in range(2))
    decode_all(first, a, None)
    decode_all(first, b, None)
    decode_all(dropped, a, None)
    a.roll_back(5, check=False)
    return decode_all(then, a, None).equal(decode_all(then, b, None))


def slots_are_only_places(fold_size: int = 16) -> bool:
    """Sequences in slots out of order, one row without a slot, give what they give in order, bit for bit."""
    inputs, slots = draw(4, 2 * fold_size + 5), torch.tensor([4, -1, 0, 2], device="cuda")
    wanted, there = decode_all(inputs, new_ring(4, fold_size, torch.bfloat16), None), slots >= 0
    ring = new_ring(6, fold_size, torch.bfloat16)
    ring.memory[[1, 3, 5]] = torch.nan
    got = decode_all(inputs, ring, None, slots)
    untouched = bool(ring.memory[[1, 3, 5]].isnan().all())
    return untouched and got[there].equal(wanted[there]) and not got[~there].any()


def kernels_differ_by(fold_size: int = 16) -> float:
    """Relative difference of outputs between the kernel chosen and the portable one where some rows fold and some do not."""
    first, then = draw(3, 9), draw(3, 2 * fold_size + 9)
    outputs = []
    for shape in (None, PORTABLE):
        ring = new_ring(3, fold_size, torch.bfloat16)
        decode_all(first, ring, shape)
        ring.roll_back(torch.tensor([0, 4, 7], device="cuda"))
        outputs.append(decode_all(then, ring, shape).double())
    got, want = outputs
    return float((got - want).norm() / want.norm())


def replay_times(call: Callable[[], Any], replays: int, warm_up: int) -> list[float]:
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    for _ in range(warm_up):
        graph.replay()
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(replays + 1)]
    marks[0].record()
    for mark in marks[1:]:
        graph.replay()
        mark.record()
    torch.cuda.synchronize()
    return [a.elapsed_time(b) for a, b in pairwise(marks)]


def timing(batch: int, fold_size: int, dtype: torch.dtype, shape: DecodeShape | None, copy: float) -> dict[str, float]:
    """Milliseconds a token and layer: mean over four fold periods, and the median, which is that of a step without a fold."""
    copies = max(2, 16 // batch)
    rings = [new_ring(batch, fold_size, dtype) for _ in range(copies)]
    for ring in rings:
        ring.memory.normal_()
        ring.normalizer.uniform_(1, 2)
    inputs = draw(batch, 1)

    def tokens() -> None:
        for ring in rings:
            step(inputs, ring, shape)

    times = [x / copies for x in replay_times(tokens, 4 * fold_size, 3 * fold_size)]
    held = rings[0].memory.nbytes + rings[0].normalizer.nbytes
    mean = statistics.mean(times)
    return {
        "ms": mean,
        "ms without a fold": statistics.median(times),
        "ms with a fold": max(times),
        "state MB": held / 1e6,
        "TB/s read": held / mean / 1e9,
        "share of copy bandwidth": held / mean / 1e9 / copy,
    }


def bandwidths() -> dict[str, float]:
    """TB/s of kernels that copy (read and written bytes) and that only read, and of the copy engine."""
    a, b = (torch.ones(1 << 29, device="cuda") for _ in range(2))
    calls = {
        "copy": (2, lambda: torch.add(a, 1, out=b)),
        "read": (1, lambda: a.view(1 << 14, -1).amax(1)),
        "copy engine": (2, lambda: b.copy_(a)),
    }
    times = {name: (passes, statistics.median(replay_times(call, 20, 20))) for name, (passes, call) in calls.items()}
    return {name: passes * a.nbytes / taken / 1e9 for name, (passes, taken) in times.items()}


def attention(batch: int, context: int) -> float | str:
    """Milliseconds of cuDNN attention for one token a sequence, or why there is no figure."""
    if 4 * batch * context * HEADS * WIDTH > LARGEST_CACHE:
        return "does not fit"
    q = torch.randn(batch, QUERY_HEADS, 1, WIDTH, device="cuda", dtype=torch.bfloat16)
    k, v = (torch.randn(batch, HEADS, context, WIDTH, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    try:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return statistics.median(
                replay_times(lambda: scaled_dot_product_attention(q, k, v, enable_gqa=True), 20, 3)
            )
    except RuntimeError as error:
        return str(error).splitlines()[0]


def kernel_name(batch: int, shape: DecodeShape | None, dtype: torch.dtype) -> str:
    q, _, v, _ = draw(batch, 1)
    return "hopper" if shape is None and covers(q, v, new_ring(1, FOLD_SIZE, dtype)) else "portable"


def compare(report: dict[str, Any], copy: float) -> None:
    """The kernel chosen and the portable one, at every batch."""
    report["slots are only places"] = slots_are_only_places()
    report["kernels differ by"] = kernels_differ_by()
    print({name: report[name] for name in ("slots are only places", "kernels differ by")}, flush=True)
    for batch in BATCHES:
        rows = [measure(report, batch, FOLD_SIZE, torch.bfloat16, shape, copy) for shape in (None, PORTABLE)]
        times = [f"{row['kernel']} {row['ms']:.4f}" for row in rows if "ms" in row]
        print(f"batch {batch}: {', '.join(times)} ms, target {TARGETS_MS[batch]}", flush=True)


def measure(
    report: dict[str, Any], batch: int, fold_size: int, dtype: torch.dtype, shape: DecodeShape | None, copy: float
) -> dict[str, Any]:
    row: dict[str, Any] = {"batch": batch, "L": fold_size, "state": str(dtype).removeprefix("torch.")}
    row["kernel"] = kernel_name(batch, shape, dtype)
    if row["kernel"] == "portable":
        row["shape"] = asdict(shape or decode_shape(WIDTH, WIDTH, dtype.itemsize))
    try:
        row["errors"] = errors(batch, fold_size, dtype, shape)
        if all(x <= TOLERANCE for x in row["errors"].values()):
            row |= timing(batch, fold_size, dtype, shape, copy)
        else:
            row["refused"] = "wrong, so not timed"
    except Exception as error:  # a shape that does not compile or fit is a result
        row["refused"] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    report["decode"].append(row)
    figures = {name: round(x, 4) for name, x in row.items() if isinstance(x, float)}
    worst = max(row.get("errors", {"": float("nan")}).values())
    print(
        batch,
        f"L={fold_size}",
        row["state"],
        row["kernel"],
        *row.get("shape", {}).values(),
        figures,
        f"error {worst:.1e}",
        flush=True,
    )
    if "refused" in row:
        print("  refused:", row["refused"], row.get("errors"), flush=True)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path")
    parser.add_argument("--quick", action="store_true", help="Few launch shapes, one fold size, no attention.")
    parser.add_argument("--compare", action="store_true", help="Only Hopper's kernel beside the portable one.")
    options = parser.parse_args()
    torch.manual_seed(0)
    report: dict[str, Any] = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "decode": []}
    report["TB/s"] = bandwidths()
    copy = report["TB/s"]["copy"]
    print("TB/s", {name: round(x, 3) for name, x in report["TB/s"].items()}, flush=True)
    report["roll-back is exact"], report["two streams agree"] = roll_back_is_exact(), two_streams_agree()
    print(
        "roll-back is exact", report["roll-back is exact"], "two streams agree", report["two streams agree"], flush=True
    )
    if options.compare:
        compare(report, copy)
    for batch in () if options.compare else BATCHES:
        for shape in (None, PORTABLE, *CANDIDATES[: 1 if options.quick else None]):
            measure(report, batch, FOLD_SIZE, torch.bfloat16, shape, copy)
        timed = [row for row in report["decode"] if row["batch"] == batch and "ms" in row]
        if not timed:
            continue
        best = min(timed, key=lambda row: float(row["ms"]))
        print(
            f"batch {batch}: best {best['ms']:.4f} ms, target {TARGETS_MS[batch]}",
            best["kernel"],
            best.get("shape"),
            flush=True,
        )
        if not options.quick:
            shape = DecodeShape(**best["shape"]) if "shape" in best else None
            for fold_size in (16, 64):
                measure(report, batch, fold_size, torch.bfloat16, shape, copy)
            measure(report, batch, FOLD_SIZE, torch.float32, None, copy)
    if not (options.quick or options.compare):
        report["cudnn ms"] = {f"batch {b}, {name}": attention(b, n) for b in BATCHES for name, n in CONTEXTS.items()}
        print(report["cudnn ms"], flush=True)
    with open(options.path, "w") as file:
        json.dump(report, file, indent=1)


if __name__ == "__main__":
    main()
