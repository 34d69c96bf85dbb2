"""Who can compute attention or power retention here, each as a function of the same inputs."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import logsigmoid, scaled_dot_product_attention

from power_retention.ops import expand, multiplicity, power_retention
from power_retention.ops.triton.samples import HeadShape

OURS = "power retention"


class Inputs(NamedTuple):
    """q ``[B, T, Hq, d]``, k ``[B, T, H, d]``, v ``[B, T, H, e]``, log_g ``[B, T, H]``."""

    q: Tensor
    k: Tensor
    v: Tensor
    log_g: Tensor


@dataclass(frozen=True)
class Contender:
    """One implementation.

    Attributes:
        name: as the report calls it.
        power: whether it computes power retention (p = 2, gated); otherwise softmax attention, which has no gates.
        call: y ``[B, T, Hq, e]`` from :class:`Inputs`, differentiable.
    """

    name: str
    power: bool
    call: Callable[[Inputs], Tensor]

    def leaves(self, inputs: Inputs) -> tuple[Tensor, ...]:
        """The inputs it uses."""
        return tuple(inputs) if self.power else tuple(inputs[:3])


def draw_inputs(
    shape: HeadShape, tokens: int, dtype: torch.dtype, device: torch.device, *, batch: int = 1, grad: bool = False
) -> Inputs:
    """Random inputs; gates as models start them, about 1 − 1/400."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*size: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(batch, tokens, *size, device=device, dtype=dtype, generator=generator)

    log_g = logsigmoid(normal(shape.heads, dtype=torch.float32) + 6)
    drawn = (
        normal(shape.query_heads, shape.width),
        normal(shape.heads, shape.width),
        normal(shape.heads, shape.value_width),
        log_g,
    )
    return Inputs(*(x.requires_grad_(grad) for x in drawn))


def contenders(device: torch.device) -> tuple[list[Contender], dict[str, str]]:
    """(those that can run here, why others cannot)."""
    chunk = 1024 if device.type == "cuda" else 128
    here = [
        Contender(OURS, True, ours),
        Contender(f"{OURS}, attention form", True, lambda x: ours(x, chunk_size=0)),
        Contender(f"{OURS}, chunks of {chunk}", True, lambda x: ours(x, chunk_size=chunk)),
    ]
    if device.type == "cuda":
        here += [
            Contender("cuDNN attention", False, lambda x: causal_attention(x, SDPBackend.CUDNN_ATTENTION)),
            Contender("FlashAttention", False, lambda x: causal_attention(x, SDPBackend.FLASH_ATTENTION)),
        ]
    else:
        here.append(Contender("PyTorch attention", False, lambda x: causal_attention(x, None)))
    absent = {}
    for package, contender in (
        ("retention", Contender("retention", True, _retention)),
        ("fla", Contender("flash-linear-attention", True, _expanded_linear_attention)),
    ):
        if find_spec(package) is None:
            absent[contender.name] = f"the package {package} is not installed"
        elif device.type != "cuda":
            absent[contender.name] = "it needs a GPU"
        else:
            here.append(contender)
    return here, absent


def ours(inputs: Inputs, chunk_size: int | None = None) -> Tensor:
    """Our operator, in the form it chooses or with the given chunks."""
    y = power_retention(inputs.q, inputs.k, inputs.v, inputs.log_g, chunk_size=chunk_size)
    assert isinstance(y, Tensor)
    return y


def causal_attention(inputs: Inputs, backend: SDPBackend | None) -> Tensor:
    """PyTorch's attention by one of its backends; None lets it choose."""
    q, k, v = (x.transpose(1, 2) for x in inputs[:3])
    return attend(q, k, v, backend, causal=True).transpose(1, 2)


def attend(q: Tensor, k: Tensor, v: Tensor, backend: SDPBackend | None, *, causal: bool) -> Tensor:
    """q ``[B, Hq, T, d]``, k ``[B, H, S, d]``, v ``[B, H, S, e]`` → ``[B, Hq, T, e]``."""
    grouped = q.shape[1] != k.shape[1]
    with nullcontext() if backend is None else sdpa_kernel(backend):
        return scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=grouped)


def _retention(inputs: Inputs) -> Tensor:
    """Manifest AI's package."""
    from retention import power_retention as theirs

    y: Tensor = theirs(*inputs, deg=2, chunk_size=1024)
    return y


def _expanded_linear_attention(inputs: Inputs) -> Tensor:
    """Gated linear attention on φ(q) and φ(k) written out, the normaliser one more value column."""
    from fla.ops.simple_gla import chunk_simple_gla

    groups = inputs.q.shape[2] // inputs.k.shape[2]
    width = inputs.q.shape[-1]
    q = expand(inputs.q / width**0.5) * multiplicity(width, 2, inputs.q)
    k, v, log_g = (x.repeat_interleave(groups, 2) for x in (expand(inputs.k), inputs.v, inputs.log_g))
    out: Any = chunk_simple_gla(q, k, torch.cat((v, torch.ones_like(v[..., :1])), -1), g=log_g, scale=1.0)
    out = out[0] if isinstance(out, tuple) else out
    y: Tensor = (out[..., :-1].float() / out[..., -1:].float()).to(v.dtype)
    return y


def a_pass(contender: Contender, inputs: Inputs, dy: Tensor | None) -> Callable[[], object]:
    """The forward pass, or with ``dy`` forward and backward."""
    if dy is None:
        return lambda: contender.call(inputs)
    return lambda: torch.autograd.grad(contender.call(inputs), contender.leaves(inputs), dy)
