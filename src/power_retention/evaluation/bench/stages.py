"""Our kernels one by one: useful arithmetic over what a matrix product reaches on the same machine."""

from __future__ import annotations

from typing import Any

import torch

from power_retention.evaluation.bench.contenders import OURS, Contender, Inputs, a_pass, draw_inputs, ours
from power_retention.evaluation.bench.settings import PASSES, Settings
from power_retention.machine import launch_times, time_call
from power_retention.ops.cost import Work
from power_retention.ops.triton.samples import HeadShape


def stages(shape: HeadShape, settings: Settings, device: torch.device) -> list[dict[str, Any]]:
    """Useful arithmetic of our passes, and of each kernel on a GPU, over what a matrix product reaches."""
    tokens = settings.stages_at
    if tokens > max(settings.lengths):
        return []
    rows = []
    inputs = draw_inputs(shape, tokens, settings.dtype, device, grad=True)
    contender = Contender(OURS, True, ours)
    dy = torch.randn_like(inputs.v[:, :, :1].expand(-1, -1, shape.query_heads, -1))
    for what, call in (
        (PASSES[0], a_pass(contender, Inputs(*(x.detach() for x in inputs)), None)),
        (PASSES[1], a_pass(contender, inputs, dy)),
    ):
        whole = time_call(call, device, seconds=settings.seconds).median
        rows.append(_stage(shape, tokens, what, "whole pass", whole, useful_pass(shape, tokens, what != PASSES[0])))
        if device.type == "cuda":
            with launch_times() as totals:
                call()
                taken = totals()
            for kernel, milliseconds in sorted(taken.items(), key=lambda item: -item[1]):
                useful = useful_operations(kernel, shape, tokens, what != PASSES[0])
                rows.append(_stage(shape, tokens, what, kernel, milliseconds, useful))
    return rows


def _stage(
    shape: HeadShape, tokens: int, what: str, stage: str, milliseconds: float, useful: float | None
) -> dict[str, Any]:
    rate = None if useful is None else useful / milliseconds * 1000
    return {
        "shape": str(shape),
        "tokens": tokens,
        "pass": what,
        "stage": stage,
        "milliseconds": milliseconds,
        "useful_tflops": rate,
    }


_CHUNK = 1024
"""Chunk that useful arithmetic is counted with, whatever chunk is run: near the cheapest at these lengths."""


def useful_operations(kernel: str, shape: HeadShape, tokens: int, backward: bool) -> float | None:
    """Operations that a kernel cannot do without in a pass, in 10¹², with the ideal D and each product counted once.

    None for a kernel that only prepares, or that this table does not know.
    """
    queries = Work(1, tokens, shape.query_heads, 0, shape.width, shape.value_width)
    keys = Work(1, tokens, 0, shape.heads, shape.width, shape.value_width)
    by_query, by_key, within = (
        queries.state_operations(_CHUNK),
        keys.state_operations(_CHUNK),
        queries.attention_operations(_CHUNK),
    )
    forward = {
        "accumulate_kernel": by_key,
        "read_state_kernel": by_query,
        "read_kernel": within,
        "attend_kernel": within,  # a family's own
    }
    # Gradients: of states by queries, of values by states, of queries and keys by states; within chunks five products.  The
    # states and scores that are computed again are not useful work.
    gradient = {
        "accumulate_kernel": by_query,
        "read_state_kernel": by_key,
        "contract_state_kernel": by_query + by_key,
        "query_grad_kernel": 1.5 * within,
        "key_grad_kernel": within,
    }
    if not backward:
        return forward.get(kernel)
    known = forward.keys() | gradient.keys()
    return forward.get(kernel, 0.0) + gradient.get(kernel, 0.0) if kernel in known else None


def useful_pass(shape: HeadShape, tokens: int, backward: bool) -> float:
    """Operations that a pass cannot do without, in 10¹²: the sum over its kernels, nothing computed twice."""
    queries = Work(1, tokens, shape.query_heads, shape.heads, shape.width, shape.value_width)
    states, within = queries.state_operations(_CHUNK), queries.attention_operations(_CHUNK)
    return 3 * states + 3.5 * within if backward else states + within
