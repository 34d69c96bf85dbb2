"""Random calls of the operator, what is expected of them, and memory that shows what a kernel left unwritten."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from power_retention.errors import ArgumentError
from power_retention.ops.backends import Backend, Call, TorchBackend

_OUTPUTS = ("y", "memory", "normalizer")
_GRADIENTS = ("dq", "dk", "dv", "dlog_g", "d_memory", "d_normalizer")


@dataclass(frozen=True)
class HeadShape:
    """Heads of a call, written ``40/8x128``: query heads, key/value heads, head width (and ``x`` value width if it differs)."""

    query_heads: int
    heads: int
    width: int
    value_width: int

    @classmethod
    def parse(cls, text: str) -> HeadShape:
        """From ``40/8x128`` or ``40/8x128x64``.

        Raises:
            ArgumentError: it is not of that form.
        """
        try:
            heads, *widths = text.lower().split("x")
            query_heads, _, shared = heads.partition("/")
            shape = cls(int(query_heads), int(shared or query_heads), int(widths[0]), int(widths[-1]))
            fits = len(widths) < 3 and min(shape.heads, *map(int, widths)) > 0 and shape.query_heads % shape.heads == 0
        except (ValueError, IndexError):
            fits = False
        if not fits:
            raise ArgumentError(f"A shape is query heads/key heads x width, such as 40/8x128, not {text!r}.")
        return shape

    def __str__(self) -> str:
        value = "" if self.value_width == self.width else f"x{self.value_width}"
        return f"{self.query_heads}/{self.heads}x{self.width}{value}"


def draw_call(
    shape: HeadShape, dtype: torch.dtype, device: str, tokens: int, chunk: int, *, states: bool = False
) -> Call:
    """A random call with gates that matter over a chunk; queries lean on keys, so that no row's weights cancel."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, device=device)

    k, v = normal(1, tokens, shape.heads, shape.width), normal(1, tokens, shape.heads, shape.value_width)
    q = normal(1, tokens, shape.query_heads, shape.width) + k.repeat_interleave(shape.query_heads // shape.heads, 2)
    log_g = logsigmoid(normal(1, tokens, shape.heads) + 4)
    memory = normalizer = None
    if states:
        entering = draw_call(shape, torch.float32, device, 64, 64)
        entering = replace(entering, return_state=True)
        _, memory, normalizer = TorchBackend().forward(entering)
    return Call(q.to(dtype), k.to(dtype), v.to(dtype), log_g, memory, normalizer, None, 2, chunk, states)


def in_float64(call: Call) -> Call:
    """The call with every tensor in float64."""

    def double(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.double()

    return replace(
        call,
        q=call.q.double(),
        k=call.k.double(),
        v=call.v.double(),
        log_g=double(call.log_g),
        memory=double(call.memory),
        normalizer=double(call.normalizer),
    )


def empty_output(call: Call) -> Tensor:
    """Memory in the shape of y."""
    return call.q.new_empty(*call.q.shape[:-1], call.v.shape[-1])


def draw_gradients(call: Call) -> tuple[Tensor, tuple[Tensor | None, Tensor | None]]:
    """Random gradients of y and, where it is wanted, of the final state, the latter no larger than what y adds to them."""
    dy = torch.randn_like(empty_output(call))
    if call.memory is None or call.normalizer is None or not call.return_state:
        return dy, (None, None)
    scale = 1 / call.q[0, 0, 0].float().norm() ** 2
    return dy, (torch.randn_like(call.memory) * scale, torch.randn_like(call.normalizer) * scale)


def results(
    backend: Backend, call: Call, dy: Tensor, d_memory: Tensor | None, d_normalizer: Tensor | None
) -> dict[str, Tensor]:
    """Every output and gradient of a call, by name; those that were not asked for are left out."""
    outputs = backend.forward(call)
    grads = backend.backward(call, dy, d_memory, d_normalizer)
    named = [*zip(_OUTPUTS, outputs, strict=True), *zip(_GRADIENTS, grads, strict=True)]
    return {name: x for name, x in named if x is not None and x.numel()}


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """``torch.empty`` gives NaN, so that what a kernel leaves unwritten is found out."""
    empty, empty_like = torch.empty, torch.empty_like

    def poisoned(make: Callable[..., Any]) -> Any:
        def filled(*args: Any, **kwargs: Any) -> Tensor:
            x: Tensor = make(*args, **kwargs)
            return x.fill_(torch.nan) if x.is_floating_point() else x

        return filled

    torch.empty, torch.empty_like = poisoned(empty), poisoned(empty_like)
    try:
        yield
    finally:
        torch.empty, torch.empty_like = empty, empty_like
