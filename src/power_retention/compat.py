"""The two functions of the public `retention` package, with its names, argument order, shapes and state layout.

    from power_retention.compat import power_retention, power_retention_inference

Code written against `retention` runs by this one change of import, and states pass both ways: they are in the 16-block
layout, without the scale σ, which both packages apply to queries only.  What differs is what was broken: every argument
is honoured or refused, each query row is discounted by its own gate, and no query gives NaN.
"""

# ruff: noqa: N803 (the argument names are the other package's)
from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from power_retention import ops
from power_retention.errors import ArgumentError
from power_retention.ops import PowerState, expand, from_blocks16, multiplicity, to_blocks16
from power_retention.ops.chunk import state_noise
from power_retention.ops.heads import (
    compute_dtype,
    cumulative_gates,
    from_heads,
    integer_power,
    ratio,
    scaled_queries,
    to_heads,
    values_and_ones,
)
from power_retention.ops.layout import blocks16_width, check_power
from power_retention.ops.operator import check_heads


def power_retention(
    Q: Tensor,
    K: Tensor,
    V: Tensor,
    log_G: Tensor | None = None,
    initial_state: Tensor | None = None,
    sum_of_keys: Tensor | None = None,
    return_final_state: bool = False,
    deg: int = 2,
    scale: float | None = None,
    chunk_size: int | None = None,
    switch_over_seq_len: int | None = None,
) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    """Power retention over whole sequences; :func:`power_retention.ops.power_retention` under other names.

    Args:
        Q: ``[B, T, Hq, d]``.
        K: ``[B, T, H, d]``.
        V: ``[B, T, H, e]``.
        log_G: gates ``[B, T, H]``, per step and not cumulative, each ≤ 0, or None.
        initial_state: ``[B, H, D, e]`` in the 16-block layout, together with ``sum_of_keys``, or None.
        sum_of_keys: ``[B, H, D]``.
        return_final_state: also return the state after the last token, with or without a chunk size.
        deg: the even power.  States exist at 2 and at head widths divisible by 16.
        scale: σ; it cancels in the ratio.
        chunk_size: tokens a chunk; None chooses.
        switch_over_seq_len: sequences up to this length take the attention form where no state is involved.

    Returns:
        ``out`` ``[B, T, Hq, e]``, or with ``return_final_state`` (out, final_state, final_sum_of_keys): the state in
        the dtype of Q (in float16 it may overflow), the sum in float32 (float64 for float64 inputs).

    Raises:
        ArgumentError: an argument has the wrong shape, dtype or value, or no 16-block state exists for the call.
    """
    check_power(deg)
    check_heads(Q, K, V, log_G, axes="B, T")
    state = _entering_state(initial_state, sum_of_keys, Q, K.shape[2], V.shape[-1], deg)
    if return_final_state:
        _check_has_layout(deg, Q.shape[-1], "return_final_state=True asks for")
    elif state is None and switch_over_seq_len is not None and Q.shape[1] <= switch_over_seq_len:
        chunk_size = 0
    out = ops.power_retention(
        Q,
        K,
        V,
        log_G,
        p=deg,
        scale=scale,
        chunk_size=chunk_size,
        initial_state=state,
        return_state=return_final_state,
    )
    return (out[0], *_leaving_state(out[1], Q.dtype)) if isinstance(out, tuple) else out


def power_retention_inference(
    Q: Tensor,
    K: Tensor | None,
    V: Tensor | None,
    log_G: Tensor | None = None,
    initial_state: Tensor | None = None,
    sum_of_keys: Tensor | None = None,
    deg: int = 2,
    scale: float | None = None,
    switch_over_seq_len: int | None = 512,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Decoding from a state and a cache of the tokens that it does not hold yet.

    The caller appends each new token to the cache, and empties the cache when its length had reached
    ``switch_over_seq_len``: the state that came back then includes it.  Otherwise the state comes back as it was given.

    Args:
        Q: ``[B, Tq, Hq, d]``, the queries of the last Tq cached tokens (of any tokens, if the cache is empty).
        K: cached keys ``[B, Tk, H, d]``, Tk ≥ Tq, or None for an empty cache.
        V: cached values ``[B, Tk, H, e]``, or None with K.
        log_G: gates of the cached tokens ``[B, Tk, H]``, or None.
        initial_state: ``[B, H, D, e]`` in the 16-block layout, together with ``sum_of_keys``, or None.
        sum_of_keys: ``[B, H, D]``.
        deg: the even power.
        scale: σ; it cancels in the ratio.
        switch_over_seq_len: cache length from which the cache is folded into the state; None never folds.

    Returns:
        (Y ``[B, Tq, Hq, e]``, state, sum_of_keys), the last two None as long as there is no state.

    Raises:
        ArgumentError: an argument has the wrong shape, dtype or value, or no 16-block state exists for the call.
    """
    _check_decoding(Q, deg, scale, switch_over_seq_len)
    K, V, log_G = _cache(Q, K, V, log_G, initial_state)
    state = _entering_state(initial_state, sum_of_keys, Q, K.shape[2], V.shape[-1], deg)
    new, cached = Q.shape[1], K.shape[1]
    folds = switch_over_seq_len is not None and cached >= switch_over_seq_len
    if folds:
        _check_has_layout(
            deg, Q.shape[-1], f"{cached} cached tokens reach switch_over_seq_len={switch_over_seq_len} and ask for"
        )
    if not folds and new != cached:
        return _read(Q, K, V, log_G, state, deg), initial_state, sum_of_keys
    queries = F.pad(Q, (0, 0, 0, 0, cached - new, 0))
    out = ops.power_retention(queries, K, V, log_G, p=deg, initial_state=state, return_state=folds)
    if isinstance(out, tuple):
        return out[0][:, cached - new :], *_leaving_state(out[1], Q.dtype)
    return out, initial_state, sum_of_keys


def _entering_state(
    initial_state: Tensor | None, sum_of_keys: Tensor | None, Q: Tensor, heads: int, value_width: int, deg: int
) -> PowerState | None:
    """The canonical state, in the dtype that states are computed in."""
    if initial_state is None and sum_of_keys is None:
        return None
    if initial_state is None or sum_of_keys is None:
        given, missing = ("sum_of_keys", "initial_state") if initial_state is None else ("initial_state", "sum_of_keys")
        raise ArgumentError(f"{given} came without {missing}; pass both, as an earlier call returned them, or neither.")
    d = Q.shape[-1]
    _check_has_layout(deg, d, "initial_state holds")
    expected = (Q.shape[0], heads, blocks16_width(d), value_width)
    for name, tensor, shape in (("initial_state", initial_state, expected), ("sum_of_keys", sum_of_keys, expected[:3])):
        if tuple(tensor.shape) != shape or not tensor.is_floating_point():
            raise ArgumentError(
                f"{name} is {list(tensor.shape)} in {tensor.dtype}; this call needs {list(shape)} in a floating "
                "dtype, in the 16-block layout."
            )
        if tensor.device != Q.device:
            raise ArgumentError(f"{name} is on {tensor.device}, Q is on {Q.device}: move one of them.")
    dtype = compute_dtype(Q.dtype)
    memory, normalizer = (from_blocks16(x.to(dtype), d, 2) for x in (initial_state, sum_of_keys))
    return PowerState(memory, normalizer, deg, d)


def _leaving_state(state: PowerState, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    memory, normalizer = (to_blocks16(x, state.head_width, 2) for x in state[:2])
    return memory.to(dtype), normalizer


def _check_has_layout(deg: int, head_width: int, why: str) -> None:
    if deg != 2 or head_width % 16:
        raise ArgumentError(
            f"{why} a state in the 16-block layout, which exists at deg=2 and head widths divisible by 16 only, not at "
            f"deg={deg} and head width {head_width}. power_retention.ops.power_retention has states for both."
        )


def _check_decoding(Q: Tensor, deg: int, scale: float | None, switch_over_seq_len: int | None) -> None:
    check_power(deg)
    if not isinstance(Q, Tensor) or Q.ndim != 4 or Q.numel() == 0:
        got = f"shape {list(Q.shape)}" if isinstance(Q, Tensor) else type(Q).__name__
        raise ArgumentError(f"Q must be a tensor [B, Tq, Hq, d] of at least one token, not {got}.")
    if scale is not None and not abs(scale) > 0:
        raise ArgumentError(f"scale must be a non-zero number, not {scale}: it would make every weight zero.")
    if switch_over_seq_len is not None and switch_over_seq_len < 1:
        raise ArgumentError(
            f"switch_over_seq_len must be a positive number of tokens, or None (never fold), not {switch_over_seq_len}."
        )


def _cache(
    Q: Tensor, K: Tensor | None, V: Tensor | None, log_G: Tensor | None, initial_state: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """K, V and log_G, checked; K and V with Tk = 0 for an empty cache."""
    if (K is None) != (V is None):
        raise ArgumentError("K and V hold the same cached tokens: pass both or neither.")
    if K is None or V is None or K.numel() == 0:
        return *_empty_cache(Q, log_G, initial_state), None
    check_heads(Q[:, :1].expand(-1, K.shape[1], -1, -1), K, V, log_G, axes="B, T")
    if Q.shape[1] > K.shape[1]:
        raise ArgumentError(
            f"Q holds {Q.shape[1]} tokens and the cache {K.shape[1]}: queries belong to the last cached tokens, so "
            "append the keys and values of new tokens before the call."
        )
    return K, V, log_G


def _empty_cache(Q: Tensor, log_G: Tensor | None, initial_state: Tensor | None) -> tuple[Tensor, Tensor]:
    if initial_state is None:
        raise ArgumentError("There is nothing to read: K, V and initial_state are all None or empty.")
    if log_G is not None and log_G.numel():
        raise ArgumentError(f"log_G holds {log_G.shape[1]} tokens and the cache none: pass None with an empty cache.")
    if initial_state.ndim != 4 or Q.shape[2] % initial_state.shape[1]:
        raise ArgumentError(
            f"initial_state is {list(initial_state.shape)} and Q has {Q.shape[2]} heads; [B, H, D, e] was expected, "
            "with H a divisor of Q's heads."
        )
    batch, (_, heads, _, value_width) = Q.shape[0], initial_state.shape
    return Q.new_empty(batch, 0, heads, Q.shape[-1]), Q.new_empty(batch, 0, heads, value_width)


def _read(Q: Tensor, K: Tensor, V: Tensor, log_G: Tensor | None, state: PowerState | None, p: int) -> Tensor:
    """The last Tq rows of the operator's output over Tk cached tokens, without the cost of the rows before them."""
    batch, new, (cached, heads) = Q.shape[0], Q.shape[1], K.shape[1:3]
    dtype = compute_dtype(Q.dtype)
    queries, _ = scaled_queries(Q, heads, dtype)  # [N, r·Tq, d]
    keys, gates = to_heads(K, heads, dtype), cumulative_gates(log_G)
    if state is None:  # A common factor of all keys cancels: take it out before the power does harm.
        keys = keys / keys.detach().abs().amax((1, 2), keepdim=True).clamp(min=torch.finfo(dtype).tiny)
    decay = torch.ones(1, new, cached, dtype=dtype, device=Q.device)
    if gates is not None:
        decay = (gates[:, -new:, None] - gates[:, None, :]).clamp(max=0).exp().to(dtype)
    scores = (queries @ keys.mT).unflatten(1, (-1, new))  # [N, r, Tq, Tk]
    weights = integer_power(scores, p) * decay.tril(cached - new).unsqueeze(1)
    out, noise = weights.flatten(1, 2) @ values_and_ones(V, dtype), None
    if state is not None:
        read, noise = _read_state(queries, state)
        if gates is not None:
            from_start = gates[:, -new:].exp().to(dtype).repeat(1, Q.shape[2] // heads)
            read, noise = read * from_start.unsqueeze(-1), noise * from_start
        out = out + read
    return from_heads(ratio(out, noise), batch, new).to(Q.dtype)


def _read_state(queries: Tensor, state: PowerState) -> tuple[Tensor, Tensor]:
    """φ(q)·[S, s] ``[N, rows, e + 1]`` and the rounding error of its denominator ``[N, rows]``."""
    d, p = state.head_width, state.p
    table = torch.cat((state.memory, state.normalizer.unsqueeze(-1)), -1).flatten(0, 1)
    noise = state_noise(queries, state.normalizer.flatten(0, 1), p)
    return (expand(queries, p) * multiplicity(d, p, queries)) @ table, noise
