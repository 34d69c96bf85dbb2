"""The token mixer: projections around the operator, with the parameter names of the attention it replaces."""

from __future__ import annotations

import math
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from power_retention.errors import ArgumentError
from power_retention.layers.pieces import Piece, begin_exchange, retain_piece
from power_retention.layers.softmax import softmax_attention
from power_retention.ops import PowerState, power_retention
from power_retention.ops.heads import FORGET

OPEN_GATE_BIAS = 6.0
"""Gate bias of an uncalibrated mixer with biased gates: a half-life of 280 tokens."""


class TokenMemory(Protocol):
    """What a mixer has read before, kept by its caller."""

    def read(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        log_g: Tensor,
        *,
        p: int,
        mask: Tensor | None = None,
        chunk_size: int | None = None,
    ) -> Tensor:
        """Read T tokens and answer their queries; arguments as of :func:`power_retention.power_retention`."""
        ...


class PowerRetentionMixer(nn.Module):
    """q, k, v and gate projections → rotary embedding → power retention → output projection.

    A learned bias added to the rotated keys shifts the scores: (q·(k + b))^p = (q·k + q·b)^p.  Softmax ignores a shift,
    an even power does not, so a converted model needs one.

    Args:
        hidden_size: width of the residual stream.
        query_heads: Hq.
        heads: key/value heads H; Hq is a multiple of it.
        head_dim: width d of a head.
        p: even power.
        qkv_bias: biases on the q, k and v projections.
        out_bias: a bias on the output projection.
        gate_bias: a bias on the gate projection.
        key_bias: the bias b on rotated keys, one a key/value head.
        qk_norm_eps: epsilon of an RMS norm over each query and key before the rotation; None for no norm.
        chunk_size: see :func:`power_retention.power_retention`.
        softmax: compute the softmax attention that the power stands in for; there is no state then.
    """

    def __init__(
        self,
        hidden_size: int,
        query_heads: int,
        heads: int,
        head_dim: int,
        *,
        p: int = 2,
        qkv_bias: bool = False,
        out_bias: bool = False,
        gate_bias: bool = True,
        key_bias: bool = True,
        qk_norm_eps: float | None = None,
        chunk_size: int | None = None,
        softmax: bool = False,
    ) -> None:
        super().__init__()
        self.head_dim, self.p, self.chunk_size, self.softmax = head_dim, p, chunk_size, softmax
        self.q_proj = nn.Linear(hidden_size, query_heads * head_dim, bias=qkv_bias)
        self.k_proj = nn.Linear(hidden_size, heads * head_dim, bias=qkv_bias)
        self.v_proj = nn.Linear(hidden_size, heads * head_dim, bias=qkv_bias)
        self.g_proj = nn.Linear(hidden_size, heads, bias=gate_bias)
        self.o_proj = nn.Linear(query_heads * head_dim, hidden_size, bias=out_bias)
        self.q_norm = None if qk_norm_eps is None else nn.RMSNorm(head_dim, eps=qk_norm_eps)
        self.k_norm = None if qk_norm_eps is None else nn.RMSNorm(head_dim, eps=qk_norm_eps)
        self.k_bias = nn.Parameter(torch.empty(heads, head_dim)) if key_bias else None
        self.reset_mixer_parameters()

    @torch.no_grad()
    def reset_mixer_parameters(self) -> None:
        """Initialise what attention does not have: no key bias, and gates that start open where they have a bias."""
        if self.k_bias is not None:
            nn.init.zeros_(self.k_bias)
        if self.g_proj.bias is not None:
            nn.init.zeros_(self.g_proj.weight)
            nn.init.constant_(self.g_proj.bias, OPEN_GATE_BIAS)
        else:
            nn.init.normal_(self.g_proj.weight, std=1 / math.sqrt(self.g_proj.in_features))

    def queries_and_keys(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """Normed and rotated queries ``[B, T, Hq, d]`` and keys ``[B, T, H, d]``, before the key bias."""
        return self.queries(x, cos, sin), self.keys(x, cos, sin)

    def queries(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Normed and rotated, ``[B, T, Hq, d]``."""
        return rotate(_normed(self.q_proj(x).unflatten(-1, (-1, self.head_dim)), self.q_norm), cos, sin)

    def keys(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Normed and rotated, ``[B, T, H, d]``, before the key bias."""
        return rotate(_normed(self.k_proj(x).unflatten(-1, (-1, self.head_dim)), self.k_norm), cos, sin)

    def log_gates(self, x: Tensor) -> Tensor:
        """``[B, T, H]`` in float32 (float64 in a float64 model)."""
        gates: Tensor = self.g_proj(x)
        return F.logsigmoid(gates.to(torch.promote_types(gates.dtype, torch.float32)))

    def forward(
        self,
        x: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        *,
        mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        starts: Tensor | None = None,
        memory: TokenMemory | None = None,
        piece: Piece | None = None,
        state: PowerState | None = None,
    ) -> tuple[Tensor, PowerState | None]:
        """Mix tokens.

        Args:
            x: ``[B, T, hidden]``.
            position_embeddings: cosines and sines of the rotary embedding, ``[B or 1, T, d]``.
            mask: ``[B, T]``, False at padding.
            cu_seqlens: borders of packed sequences, where there is no memory.
            starts: ``[B, T]``, True at tokens that begin a document: their gates close, and what came before is forgotten.
            memory: what was read before; these tokens are added to it.
            piece: the tokens are a piece of a longer sequence, with these borders (``cu_seqlens`` is not looked at).
            state: what the first sequence of a piece has read before; gradients flow into it.

        Returns:
            ``[B, T, hidden]``, and, where attention would return its weights, the state that leaves a piece, else None.
        """
        k = self.keys(x, *position_embeddings)
        v = self.v_proj(x).unflatten(-1, (-1, self.head_dim))
        if self.k_bias is not None:
            k = k + self.k_bias.to(k.dtype)
        k, log_g = k.to(v.dtype), self.log_gates(x)
        if starts is not None:
            log_g = log_g.masked_fill(starts[..., None], FORGET)
        exchange = None
        if piece is not None and not self.softmax:
            # Before the queries: the other ranks' states come in while these are made.
            exchange = begin_exchange(k, v, log_g, piece, state, p=self.p)
        q = self.queries(x, *position_embeddings).to(v.dtype)
        leaving: PowerState | None = None
        if self.softmax:
            if memory is not None or piece is not None:
                raise ArgumentError(
                    "Softmax attention (use_exp=True) keeps no state: pass use_cache=False, and sequences in one piece."
                )
            if starts is not None:
                raise ArgumentError("Softmax attention (use_exp=True) has no gates to close; pack with cu_seqlens.")
            y = softmax_attention(q, k, v, mask=mask, cu_seqlens=cu_seqlens)
        elif memory is not None:
            y = memory.read(q, k, v, log_g, p=self.p, mask=mask, chunk_size=self.chunk_size)
        elif piece is not None:
            sizes = {"p": self.p, "chunk_size": self.chunk_size}
            y, leaving = retain_piece(q, k, v, log_g, piece, state, **sizes, mask=mask, exchange=exchange)  # type: ignore[arg-type]
        else:
            out = power_retention(
                q, k, v, log_g, p=self.p, chunk_size=self.chunk_size, cu_seqlens=cu_seqlens, mask=mask
            )
            assert isinstance(out, Tensor)
            y = out
        return self.o_proj(y.flatten(-2)), leaving


def _normed(x: Tensor, norm: nn.RMSNorm | None) -> Tensor:
    """Under autocast the projections are narrower than the norms' weights."""
    return x if norm is None else norm(x.to(norm.weight.dtype))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding in the half-split convention: x ``[B, T, heads, d]``, cos and sin ``[B or 1, T, r]``.

    Where r < d (GLM), only the first r channels turn.
    """
    turning, resting = x.split((cos.shape[-1], x.shape[-1] - cos.shape[-1]), dim=-1)
    first, second = turning.chunk(2, dim=-1)
    turned = turning * cos.unsqueeze(-2) + torch.cat((-second, first), -1) * sin.unsqueeze(-2)
    return torch.cat((turned, resting), -1) if resting.shape[-1] else turned
