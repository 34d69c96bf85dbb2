"""Several GPUs share one document: gradients against one GPU's, bytes received, time of a step, time of the exchange alone.

    torchrun --nproc-per-node 2 benchmarks/shared_context.py results.json [--quick]

Weights are random, in the shape of SmolLM2-135M.  Every rank first takes the step alone, in segments as long as what a rank
has of a segment then, so that both do the same work at a time; then all share it.  Without GPUs the ranks talk through gloo.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from power_retention.files import write_json
from power_retention.training.context import bytes_received, share_context, sum_gradients
from power_retention.training.segments import backward_in_segments, next_tokens, share_of_rank, trunk_of
from training_models import random_ids, random_model


def timed(call: Callable[[], Any], device: torch.device) -> float:
    """Seconds, the slowest rank's."""
    dist.barrier()
    started = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize()
    seconds = torch.tensor(time.perf_counter() - started, device=device)
    dist.all_reduce(seconds, dist.ReduceOp.MAX)
    return float(seconds)


def gradients(model: nn.Module) -> Tensor:
    """All of them in one row, which are removed."""
    flat = torch.cat([p.grad.flatten() for p in model.parameters()])
    model.zero_grad(set_to_none=True)
    return flat


def measure(device: torch.device, quick: bool) -> dict[str, Any]:
    ranks = dist.get_world_size()
    tokens, segment = (64 * ranks, 16 * ranks) if quick else (1 << 18, 16384 * ranks)
    precision = torch.bfloat16 if device.type == "cuda" else None
    model = random_model("ours", "tiny" if quick else "135m", device)
    ids = random_ids(model, 1, tokens, device)
    for x in (*model.parameters(), ids):
        dist.broadcast(x.data, 0)
    labels = next_tokens(ids)

    def alone() -> None:
        backward_in_segments(model, ids, labels, segment=segment // ranks, precision=precision)

    alone()  # tunes and compiles
    model.zero_grad(set_to_none=True)
    seconds_alone = timed(alone, device)
    wanted = gradients(model)
    context = share_context(model, dist.group.WORLD)
    mine = [share_of_rank(x, segment, context) for x in (ids, labels)]

    def shared() -> None:
        backward_in_segments(model, *mine, segment=segment, precision=precision)

    shared()
    model.zero_grad(set_to_none=True)
    before = context.traffic.received_bytes, context.traffic.exchanges
    seconds_shared = timed(shared, device)
    received = context.traffic.received_bytes - before[0]
    exchanges = context.traffic.exchanges - before[1]
    seconds_sum = timed(lambda: sum_gradients(model, context), device)
    got = gradients(model)
    # As many bytes in half as many calls: about so many gather states, the others decays, which are all but nothing.
    one = torch.zeros(received // max(exchanges, 1) * 2 // max(ranks - 1, 1) // 4, device=device)
    seconds_exchange = timed(lambda: [context.begin_gather(one).wait() for _ in range(exchanges // 2)], device)
    trunk_of(model).context_parallel = None
    return {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "CPU",
        "ranks": ranks,
        "tokens": tokens,
        "segment": segment,
        "relative error of the gradients": float((got - wanted).norm() / wanted.norm()),
        "seconds alone": seconds_alone,
        "seconds shared": seconds_shared,
        "speed-up": seconds_alone / seconds_shared,
        "efficiency": seconds_alone / seconds_shared / ranks,
        "received bytes a rank": received,
        "predicted bytes of a forward pass": bytes_received(model.config, ranks),
        "exchanges": exchanges,
        "seconds of the exchanges alone": seconds_exchange,
        "share of the step": seconds_exchange / seconds_shared,
        "seconds of summing the gradients": seconds_sum,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--quick", action="store_true", help="a tiny model and a short document")
    arguments = parser.parse_args()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        found = measure(device, arguments.quick)
        if dist.get_rank() == 0:
            write_json(arguments.out, found)
            print(*(f"{name}: {value}" for name, value in found.items()), sep="\n")
        dist.barrier()
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
