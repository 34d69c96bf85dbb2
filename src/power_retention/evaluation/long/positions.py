"""Loss by position: text streamed through a model in segments, in constant memory, to a million tokens and beyond."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from power_retention.errors import DataError
from power_retention.evaluation.long.asking import Effort, next_token_losses
from power_retention.evaluation.long.context import Encoder
from power_retention.evaluation.long.readers import Reader
from power_retention.training.text import tokenize

BLOCK = 64
"""Tokens whose mean loss counts as one observation: losses of neighbours are not independent."""


@dataclass(frozen=True)
class PositionLoss:
    """Loss of tokens at positions from ``start`` up to ``stop``.

    Attributes:
        start, stop: positions.
        loss: mean, nats a token.
        error: its standard error over blocks of 64 tokens; not a number for a single block.
        tokens: how many.
    """

    start: int
    stop: int
    loss: float
    error: float
    tokens: int

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            "start": self.start,
            "stop": self.stop,
            "loss": self.loss,
            "error": None if math.isnan(self.error) else self.error,
            "tokens": self.tokens,
        }


def make_streams(documents: Sequence[str], encoder: Encoder, *, streams: int, tokens: int) -> Tensor:
    """``[S, n]``: rows of documents one after another; no token is in two of them.

    Args:
        documents: in the order in which they shall come.
        encoder: of the models.
        streams: S.
        tokens: n, or fewer where the text is shorter: a power of two times 64.

    Raises:
        DataError: there are fewer than 128 tokens a row.
    """
    ids = torch.from_numpy(tokenize(documents, encoder.tokenizer, max_tokens=streams * tokens).ids).long()
    length = min(tokens, len(ids) // streams)
    if length < 2 * BLOCK:
        raise DataError(f"The text makes {length} tokens a stream; losses by position take at least {2 * BLOCK}.")
    length = BLOCK << int(math.log2(length // BLOCK))
    return ids[: streams * length].view(streams, length)


@torch.inference_mode()
def losses_by_position(
    reader: Reader, streams: Tensor, effort: Effort, progress: Callable[[int, int], None] | None = None
) -> list[PositionLoss]:
    """Loss in bins that double: 0–64, 64–128, 128–256, … tokens; as far as the reader goes.

    Args:
        reader: the model.
        streams: int64 ``[S, n]``.
        effort: how much at once.
        progress: called with (tokens read, tokens to read).
    """
    rows, length = streams.shape
    if reader.longest is not None and reader.longest < length:
        length = BLOCK << int(math.log2(max(reader.longest // BLOCK, 1)))
    memory, losses = reader.begin(rows), []
    segment = reader.segment(rows, effort.tokens) or length
    for start in range(0, length - 1, segment):
        part = streams[:, start : min(start + segment, length)].to(reader.device)
        hidden = reader.read(memory, part)
        targets = streams[:, start + 1 : min(start + segment + 1, length)].to(reader.device)
        losses.append(next_token_losses(reader, hidden[:, : targets.shape[1]], targets).cpu())
        if progress:
            progress(min(start + segment, length), length)
    # The first token is predicted from nothing and has no loss: its place is left empty.
    every = torch.cat((torch.full((rows, 1), torch.nan), *losses), 1)
    return _bins(every.view(rows, -1, BLOCK).nanmean(-1))


def _bins(blocks: Tensor) -> list[PositionLoss]:
    """``[S, blocks]`` means of blocks → bins."""
    bins, start = [], 0
    while start < blocks.shape[1]:
        stop = max(1, 2 * start)
        values = blocks[:, start:stop].flatten().double()
        error = float(values.std()) / math.sqrt(len(values)) if len(values) > 1 else math.nan
        bins.append(PositionLoss(start * BLOCK, stop * BLOCK, float(values.mean()), error, len(values) * BLOCK))
        start = stop
    return bins


def rise(bins: Sequence[PositionLoss], reference: int) -> dict[str, float] | None:
    """How much higher the loss of the last bin is than of the last one that ends within ``reference`` tokens, and its error.

    None where these are the same.
    """
    near = [x for x in bins if x.stop <= reference]
    if not near or near[-1] is bins[-1]:
        return None
    last, first = bins[-1], near[-1]
    return {
        "from": first.stop,
        "to": last.stop,
        "value": last.loss - first.loss,
        "error": math.hypot(last.error, first.error),
    }
