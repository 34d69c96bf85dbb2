"""Which token comes next."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Draw:
    """How tokens are drawn: the likeliest at temperature 0, else from the likeliest that hold the share ``top_p``."""

    temperature: float = 0.0
    top_p: float = 1.0


def draw_token(logits: Tensor, how: Draw, generator: torch.Generator | None = None) -> int:
    """The next token from logits ``[V]`` on the CPU."""
    if how.temperature == 0:
        return int(logits.argmax())
    # The maximum first: a tiny temperature would make infinities of both signs.
    probabilities = ((logits.float() - logits.max()) / how.temperature).softmax(-1)
    if how.top_p < 1:
        ranked, order = probabilities.sort(descending=True)
        # A token stays if those before it do not hold the share yet: the likeliest always does.
        ranked[ranked.cumsum(-1) - ranked >= how.top_p] = 0
        return int(order[torch.multinomial(ranked, 1, generator=generator)])
    return int(torch.multinomial(probabilities, 1, generator=generator))


@dataclass(frozen=True)
class Likelihood:
    """What the model thought of a token, before temperature and ``top_p``.

    Attributes:
        logprob: natural log of its probability.
        best: the likeliest tokens and theirs, best first.
    """

    logprob: float
    best: tuple[tuple[int, float], ...] = ()


def likelihood_of(logits: Tensor, token: int, best: int) -> Likelihood:
    """The likelihood of a token by logits ``[V]``, with the ``best`` likeliest beside it."""
    logprobs = logits.float().log_softmax(-1)
    top = logprobs.topk(min(best, len(logprobs)))
    return Likelihood(float(logprobs[token]), tuple(zip(top.indices.tolist(), top.values.tolist(), strict=True)))
