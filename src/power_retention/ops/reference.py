"""Power retention in float64, one function a form, each reading like its formula.

    w_ij = (q_i·k_j)^p · exp(L_i − L_j)   for j ≤ i,   L_i = Σ_{t ≤ i} log_g_t
    y_i  = Σ_j w_ij v_j / Σ_j w_ij                     (0 where every weight is 0)

These are what every faster form is compared with; they are written to be read, not to be fast.
The scale σ of the scores cancels in the ratio and is left out.
"""

from __future__ import annotations

import torch
from torch import Tensor

from power_retention.ops.layout import expand, multiplicity
from power_retention.ops.state import PowerState


def _prepare(q: Tensor, k: Tensor, v: Tensor, log_g: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """To float64 and head-major; keys, values and gates are repeated for the query heads that share them."""
    groups = q.shape[2] // k.shape[2]
    log_g = torch.zeros(k.shape[:3], device=k.device) if log_g is None else log_g
    q = q.double().transpose(1, 2)
    k, v = (x.double().repeat_interleave(groups, dim=2).transpose(1, 2) for x in (k, v))
    return q, k, v, log_g.double().repeat_interleave(groups, dim=2).transpose(1, 2)


def _ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    nothing = denominator == 0
    return torch.where(nothing[..., None], 0, numerator) / torch.where(nothing, 1, denominator)[..., None]


def attention_form(q: Tensor, k: Tensor, v: Tensor, log_g: Tensor | None = None, *, p: int = 2) -> Tensor:
    """Every weight written out.  q ``[B, T, Hq, d]``, k ``[B, T, H, d]``, v ``[B, T, H, e]`` → ``[B, T, Hq, e]``."""
    q, k, v, log_g = _prepare(q, k, v, log_g)
    causal = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool, device=q.device).tril()
    log_decay = log_g.cumsum(-1)[..., :, None] - log_g.cumsum(-1)[..., None, :]
    weights = (q @ k.mT) ** p * torch.where(causal, log_decay, -torch.inf).exp()
    return _ratio(weights @ v, weights.sum(-1)).transpose(1, 2)


def recurrent_form(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_g: Tensor | None = None,
    *,
    p: int = 2,
    initial_state: PowerState | None = None,
) -> tuple[Tensor, PowerState]:
    """One token at a time: S_t = g_t S_{t−1} + φ(k_t) v_tᵀ,  s_t = g_t s_{t−1} + φ(k_t),  y_t = φ(q_t)ᵀS_t / φ(q_t)ᵀs_t."""
    groups, d = q.shape[2] // k.shape[2], k.shape[-1]
    state = initial_state or PowerState.empty(
        q.shape[0], k.shape[2], d, v.shape[-1], p=p, dtype=torch.float64, device=q.device
    )
    memory = state.memory.double().repeat_interleave(groups, dim=1)
    normalizer = state.normalizer.double().repeat_interleave(groups, dim=1)
    q, k, v, log_g = _prepare(q, k, v, log_g)
    phi_q, phi_k = expand(q, p) * multiplicity(d, p, q), expand(k, p)
    outputs = []
    for t in range(q.shape[2]):
        gate = log_g[:, :, t].exp()
        memory = gate[..., None, None] * memory + phi_k[:, :, t, :, None] * v[:, :, t, None, :]
        normalizer = gate[..., None] * normalizer + phi_k[:, :, t]
        numerator = (phi_q[:, :, t, None] @ memory).squeeze(-2)
        outputs.append(_ratio(numerator, (phi_q[:, :, t] * normalizer).sum(-1)))
    return torch.stack(outputs, 1), PowerState(memory[:, ::groups], normalizer[:, ::groups], p, d)


def chunk_form(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_g: Tensor | None = None,
    *,
    p: int = 2,
    chunk_size: int = 16,
    initial_state: PowerState | None = None,
) -> tuple[Tensor, PowerState]:
    """Attention within chunks of c tokens, the recurrence between them.

    With G_i the cumulative log gate inside a chunk and G_c its total:  K'_j = K_j·exp((G_c − G_j)/p),
    Q'_i = Q_i·exp(G_i/p),  S_n = exp(G_c)·S_{n−1} + φ(K')ᵀV,  y = (W V + φ(Q')S_{n−1}) / (W 1 + φ(Q')s_{n−1}).
    """
    groups, d = q.shape[2] // k.shape[2], k.shape[-1]
    state = initial_state or PowerState.empty(
        q.shape[0], k.shape[2], d, v.shape[-1], p=p, dtype=torch.float64, device=q.device
    )
    memory = state.memory.double().repeat_interleave(groups, dim=1)
    normalizer = state.normalizer.double().repeat_interleave(groups, dim=1)
    q, k, v, log_g = _prepare(q, k, v, log_g)
    outputs = []
    for q_c, k_c, v_c, g_c in zip(*(x.split(chunk_size, dim=2) for x in (q, k, v, log_g)), strict=True):
        gate = g_c.cumsum(-1)
        causal = torch.ones(gate.shape[-1], gate.shape[-1], dtype=torch.bool, device=q.device).tril()
        log_decay = torch.where(causal, gate[..., :, None] - gate[..., None, :], -torch.inf)
        weights = (q_c @ k_c.mT) ** p * log_decay.exp()
        phi_q = expand(q_c * (gate / p).exp()[..., None], p) * multiplicity(d, p, q)
        numerator = weights @ v_c + phi_q @ memory
        denominator = weights.sum(-1) + (phi_q @ normalizer[..., None]).squeeze(-1)
        outputs.append(_ratio(numerator, denominator).transpose(1, 2))
        total = gate[..., -1]
        phi_k = expand(k_c * ((total[..., None] - gate) / p).exp()[..., None], p)
        memory = total.exp()[..., None, None] * memory + phi_k.mT @ v_c
        normalizer = total.exp()[..., None] * normalizer + phi_k.sum(-2)
    return torch.cat(outputs, 1), PowerState(memory[:, ::groups], normalizer[:, ::groups], p, d)
