"""What a call's shapes say before it runs: which chunk is cheapest, and what memory the kernels will ask for."""

from __future__ import annotations

from power_retention.ops.backends import Call
from power_retention.ops.cost import Work
from power_retention.ops.triton.plan import PAD
from power_retention.ops.triton.tuned import costs_for


def work_of(call: Call) -> Work:
    """The sizes of a call, for the cost model."""
    batch, tokens, query_heads, width = call.q.shape
    return Work(
        batch,
        tokens,
        query_heads,
        call.k.shape[2],
        width,
        call.v.shape[-1],
        from_state=call.memory is not None,
        to_state=call.return_state,
    )


def cheapest_chunk(call: Call, backward: bool) -> int:
    """Tokens a chunk, 0 for the attention form, by the costs measured on this GPU or its family."""
    costs = costs_for(max(call.q.shape[-1], call.v.shape[-1]), backward, call.q.device)
    return costs.best_chunk(work_of(call))


def workspace(call: Call, backward: bool) -> dict[str, int]:
    """Bytes of the large tensors besides inputs and results, by name; estimates from shapes, of unpadded heads."""
    (batch, length, query_heads, d), (heads, e) = call.q.shape, call.v.shape[2:]
    size = min(call.chunk_size or length, length)
    slots = batch * -(-length // size) if call.cu_seqlens is None else length // size + call.runs
    tokens, columns = batch * length, slots * -(-size // PAD) * PAD
    itemsize = 2 if call.q.element_size() == 2 else 4
    states = slots * heads * d * (d // 2 + 1) * e * itemsize
    named = {
        "cumulative gates": 8 * tokens * heads if call.log_g is not None else 0,
        "transposed queries and keys": columns * (query_heads + heads) * d * itemsize,
        "states at chunk borders": states,
        "second moments at chunk borders": 4 * slots * heads * d * d,
        "float32 partial sums": 4 * tokens * query_heads * max(d, e),
    }
    if backward:
        named["gradients of the states"] = states
        named["gradients of the numerators"] = tokens * query_heads * e * itemsize
    if slots == call.runs and call.memory is None and not call.return_state:
        return {"cumulative gates": named["cumulative gates"]}
    return named
