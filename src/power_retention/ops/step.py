"""One token of decoding: the state is read, the token added, and its size stays what it was."""

from __future__ import annotations

import torch
from torch import Tensor

from power_retention.ops.backends import fused_step
from power_retention.ops.chunk import state_noise
from power_retention.ops.heads import FORGET, compute_dtype, integer_power, ratio, scaled_queries
from power_retention.ops.layout import check_power, expand, multiplicity
from power_retention.ops.operator import check_heads
from power_retention.ops.state import PowerState, check_state


def power_retention_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_g: Tensor | None,
    state: PowerState,
    *,
    inplace: bool = False,
) -> tuple[Tensor, PowerState]:
    """Read and extend a state by one token; the power is the state's own.

    Equal to :func:`power_retention` with T = 1 and ``initial_state=state``.

    Args:
        q: ``[B, Hq, d]``.
        k: ``[B, H, d]``.
        v: ``[B, H, e]``.
        log_g: ``[B, H]``, ≤ 0, or None.
        state: of B sequences.
        inplace: overwrite the tensors of ``state`` (without gradients) instead of returning new ones.

    Returns:
        y ``[B, Hq, e]`` in the dtype of v, and the new state.
    """
    check_heads(q, k, v, log_g, axes="B")
    batch, heads, d = k.shape
    check_power(state.p)
    check_state(state, batch=batch, heads=heads, head_width=d, value_width=v.shape[-1], p=state.p, device=q.device)
    if inplace and state.p == 2 and not torch.compiler.is_compiling():
        y = fused_step(q, k, v, log_g, state.memory, state.normalizer)
        if y is not None:
            return y, state
    dtype, p = compute_dtype(q.dtype), state.p
    queries, _ = scaled_queries(q.unsqueeze(1), heads, dtype)  # [N, r, d]
    keys, values = k.to(dtype).flatten(0, 1), v.to(dtype).flatten(0, 1)  # [N, d], [N, e]
    memory, normalizer = state.memory.flatten(0, 1), state.normalizer.flatten(0, 1)
    gate = None if log_g is None else log_g.to(dtype).clamp(min=FORGET).exp().flatten()[:, None]

    phi = expand(queries, p) * multiplicity(d, p, queries)
    read = phi @ memory.to(dtype)
    total = (phi @ normalizer.to(dtype).unsqueeze(-1)).squeeze(-1)
    noise = state_noise(queries, normalizer.to(dtype), p)
    if gate is not None:
        read, total, noise = read * gate.unsqueeze(-1), total * gate, noise * gate
    weight = integer_power((queries @ keys.unsqueeze(-1)).squeeze(-1), p)  # the token itself, undiscounted
    out = torch.cat((read + weight.unsqueeze(-1) * values.unsqueeze(1), (total + weight).unsqueeze(-1)), -1)
    y = ratio(out, noise).unflatten(0, (batch, heads)).flatten(1, 2).to(v.dtype)
    return y, _extend(state, gate, expand(keys, p), values, inplace)


def _extend(state: PowerState, gate: Tensor | None, phi: Tensor, values: Tensor, inplace: bool) -> PowerState:
    """S ← g·S + φ(k)vᵀ,  s ← g·s + φ(k)."""
    memory, normalizer = state.memory, state.normalizer
    if not inplace:
        memory, normalizer = memory.to(phi.dtype, copy=True), normalizer.to(phi.dtype, copy=True)
    # [B, H, …] throughout: flattening a state that is a view would update a copy of it.
    phi, values = phi.view(normalizer.shape), values.view(*memory.shape[:2], 1, -1)
    if gate is not None:
        gate = gate.view(*memory.shape[:2], 1)
        memory, normalizer = memory.mul_(gate.unsqueeze(-1)), normalizer.mul_(gate)
    memory.addcmul_(phi.unsqueeze(-1).to(memory.dtype), values.to(memory.dtype))
    normalizer.add_(phi)
    return state._replace(memory=memory, normalizer=normalizer)
