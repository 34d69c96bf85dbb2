"""Multi-query associative recall (MQAR, Arora et al. 2023, "Zoology"): what a mixer alone can remember with the state it has.

A sequence begins with pairs of a key and a value, all different; later each key comes once more, and its value is to be
predicted.  Between the queries stand random tokens.  How long a key takes to come back follows a power law.  Small models are
trained for it from nothing: an embedding, a mixer that sees each token and the one before it, a head.  There is no position
embedding and no MLP, so that what is remembered is in the mixer's state.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from power_retention.errors import ArgumentError
from power_retention.layers import PowerRetentionMixer
from power_retention.ops.layout import state_width
from power_retention.training.schedule import warmed_cosine

IGNORED = -100
EXPONENT = 0.01
"""Of the power law: the probability of a gap of n places is proportional to n^(exponent − 1)."""

_FLOAT_BYTES = 4


class RecallLength(NamedTuple):
    """So many pairs in a sequence of so many tokens."""

    pairs: int
    tokens: int


LENGTHS = tuple(RecallLength(pairs, max(64, 4 * pairs)) for pairs in (4, 8, 16, 32, 64, 128, 256))


def draw_recall(batch: int, length: RecallLength, vocabulary: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Random sequences.

    Args:
        batch: B.
        length: pairs and tokens T, at least four times as many.
        vocabulary: keys are drawn from 1 … V/2 − 1, values from V/2 … V − 1.
        generator: on the device of the sequences.

    Returns:
        ids int64 ``[B, T]``, and labels ``[B, T]``: the value at each query, −100 elsewhere.

    Raises:
        ArgumentError: the vocabulary or the sequence is too small for the pairs.
    """
    pairs, tokens = length
    if tokens < 4 * pairs or vocabulary // 2 <= pairs:
        raise ArgumentError(
            f"{pairs} pairs need at least {4 * pairs} tokens and a vocabulary of {2 * pairs + 2}, not {tokens} and "
            f"{vocabulary}."
        )
    device, half, stored = generator.device, vocabulary // 2, 2 * pairs

    def different(low: int, high: int) -> Tensor:
        return low + torch.rand(batch, high - low, device=device, generator=generator).topk(pairs, dim=1).indices

    keys, values = different(1, half), different(half, vocabulary)
    ids = torch.randint(vocabulary, (batch, tokens), device=device, generator=generator)
    ids[:, 0:stored:2], ids[:, 1:stored:2] = keys, values
    gaps = torch.arange(1, (tokens - stored) // 2 + 1, device=device) ** (EXPONENT - 1)
    places = stored + 2 * torch.multinomial(gaps.expand(batch, -1), pairs, replacement=False, generator=generator)
    labels = torch.full_like(ids, IGNORED)
    return ids.scatter(1, places, keys), labels.scatter(1, places, values)


@dataclass(frozen=True)
class Contender:
    """One kind of mixer.

    Attributes:
        name: for people.
        head_dim: width d of queries, keys and values.
        power: p; None for softmax attention.
        window: tokens that softmax attention sees; None for all.
    """

    name: str
    head_dim: int
    power: int | None = None
    window: int | None = None

    def state_bytes(self, heads: int, layers: int, tokens: int) -> int:
        """Kept after so many tokens, in float32."""
        if self.power is None:
            kept = 2 * self.head_dim * min(tokens, self.window or tokens)
        else:
            kept = state_width(self.head_dim, self.power) * (self.head_dim + 1)
        return layers * heads * kept * _FLOAT_BYTES

    def matched_window(self) -> Contender:
        """Softmax attention over as many of the newest tokens as weigh what this state weighs."""
        assert self.power is not None
        window = state_width(self.head_dim, self.power) * (self.head_dim + 1) // (2 * self.head_dim)
        return Contender(f"window of {window}, d {self.head_dim}", self.head_dim, window=window)


def usual_contenders() -> list[Contender]:
    """States of six sizes, a window of each size that is shorter than the longest sequence, and attention."""
    states = [Contender(f"p {p}, d {d}", d, power=p) for p, d in ((2, 8), (2, 16), (2, 32), (2, 64), (4, 8), (4, 16))]
    windows = [state.matched_window() for state in states]
    longest = max(length.tokens for length in LENGTHS)
    return [*states, *(x for x in windows if (x.window or 0) < longest), Contender("attention, d 64", 64)]


@dataclass(frozen=True)
class RecallSettings:
    """Sizes and training of all contenders.

    Attributes:
        vocabulary: tokens.
        width: of the residual stream.
        heads: of every mixer.
        layers: mixers, one after the other.
        lengths: trained on in turn, and tested.
        steps: of AdamW.
        tokens: a step.
        learning_rate: the highest; warmed up over a twentieth of the steps, then a cosine to nothing.
        tested: sequences of each length.
    """

    vocabulary: int = 8192
    width: int = 128
    heads: int = 2
    layers: int = 1
    lengths: tuple[RecallLength, ...] = LENGTHS
    steps: int = 4000
    tokens: int = 16384
    learning_rate: float = 3e-3
    tested: int = 256

    @classmethod
    def quick(cls) -> RecallSettings:
        """Small enough for one core of a computer: half a minute a contender."""
        return cls(
            128, 32, 2, 2, (RecallLength(4, 32), RecallLength(16, 64)), steps=600, tokens=2048, learning_rate=5e-3
        )


class WindowMixer(PowerRetentionMixer):
    """Softmax attention over the newest tokens, with the power mixer's own projections."""

    def __init__(self, *args: Any, window: int | None, **kwargs: Any) -> None:
        super().__init__(*args, softmax=True, **kwargs)
        self.window = window

    def forward(self, x: Tensor, position_embeddings: tuple[Tensor, Tensor], **kwargs: Any) -> tuple[Tensor, None]:
        """``[B, T, hidden]`` → ``[B, T, hidden]``."""
        q, k = (part.transpose(1, 2) for part in self.queries_and_keys(x, *position_embeddings))
        v = self.v_proj(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        tokens = x.shape[1]
        if self.window is None or self.window >= tokens:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            place = torch.arange(tokens, device=x.device)
            back = place[:, None] - place
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=(back >= 0) & (back < self.window))
        return self.o_proj(y.transpose(1, 2).flatten(-2)), None


class RecallModel(nn.Module):
    """Embedding, mixers, head; see the module."""

    def __init__(self, contender: Contender, settings: RecallSettings) -> None:
        super().__init__()
        self.embedding = nn.Embedding(settings.vocabulary, settings.width)
        nn.init.normal_(self.embedding.weight, std=settings.width**-0.5)
        self.layers = nn.ModuleList(_Layer(contender, settings) for _ in range(settings.layers))
        self.norm = nn.RMSNorm(settings.width)
        self.head_dim = contender.head_dim

    def forward(self, ids: Tensor, rows: Tensor) -> Tensor:
        """Logits ``[N, vocab]`` of the chosen places: ids ``[B, T]``, rows bool ``[B, T]``."""
        x = self.embedding(ids)
        still = x.new_ones(1, 1, self.head_dim), x.new_zeros(1, 1, self.head_dim)  # a rotation by nothing
        for layer in self.layers:
            x = layer(x, still)
        logits: Tensor = self.norm(x[rows]) @ self.embedding.weight.T
        return logits


class _Layer(nn.Module):
    def __init__(self, contender: Contender, settings: RecallSettings) -> None:
        super().__init__()
        width = settings.width
        self.norm = nn.RMSNorm(width)
        sizes = (2 * width, settings.heads, settings.heads, contender.head_dim)
        self.mixer: PowerRetentionMixer = (
            WindowMixer(*sizes, window=contender.window)
            if contender.power is None
            else PowerRetentionMixer(*sizes, p=contender.power)
        )

    def forward(self, x: Tensor, position_embeddings: tuple[Tensor, Tensor]) -> Tensor:
        """``[B, T, width]`` → ``[B, T, width]``."""
        here = self.norm(x)
        before = F.pad(here, (0, 0, 1, -1))
        mixed, _ = self.mixer(torch.cat((here, before), -1), position_embeddings)
        out: Tensor = x + mixed[..., : x.shape[-1]]
        return out


def train(
    contender: Contender,
    settings: RecallSettings,
    *,
    seed: int,
    device: torch.device,
    progress: Callable[[int, float], None] | None = None,
) -> RecallModel:
    """A model trained for recall.

    Args:
        contender: its mixer.
        settings: sizes, steps and rates.
        seed: of weights and sequences.
        device: where to train.
        progress: called with (steps done, loss of the last), now and then.
    """
    torch.manual_seed(seed)
    model = RecallModel(contender, settings).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.learning_rate, betas=(0.9, 0.95), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, partial(warmed_cosine, steps=settings.steps, warmup_share=0.05)
    )
    generator = torch.Generator(device).manual_seed(seed)
    for step in range(settings.steps):
        length = settings.lengths[step % len(settings.lengths)]
        ids, labels = draw_recall(max(1, settings.tokens // length.tokens), length, settings.vocabulary, generator)
        rows = labels != IGNORED
        loss = F.cross_entropy(model(ids, rows), labels[rows])
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
        if progress and (step + 1) % max(1, settings.steps // 20) == 0:
            progress(step + 1, float(loss.detach()))
    return model


@torch.no_grad()
def examine(model: RecallModel, settings: RecallSettings, *, seed: int, device: torch.device) -> list[dict[str, Any]]:
    """Share of values that are recalled, by length, with its standard error over sequences."""
    generator = torch.Generator(device).manual_seed(10**6 + seed)
    found = []
    for length in settings.lengths:
        shares: list[Tensor] = []
        batch = max(1, settings.tokens // length.tokens)
        for start in range(0, settings.tested, batch):
            ids, labels = draw_recall(min(batch, settings.tested - start), length, settings.vocabulary, generator)
            rows = labels != IGNORED
            right = model(ids, rows).argmax(-1) == labels[rows]
            shares.append(right.view(len(ids), length.pairs).float().mean(-1))
        every = torch.cat(shares).double()
        error = float(every.std()) / math.sqrt(len(every))
        found.append({**length._asdict(), "accuracy": float(every.mean()), "error": error})
    return found


def measure(
    contender: Contender,
    settings: RecallSettings,
    *,
    seed: int,
    device: torch.device,
    progress: Callable[[int, float], None] | None = None,
) -> list[dict[str, Any]]:
    """Train and test one contender: a row a length, with what its states weigh there."""
    model = train(contender, settings, seed=seed, device=device, progress=progress)
    return [
        {
            **asdict(contender),
            "seed": seed,
            "state_bytes": contender.state_bytes(settings.heads, settings.layers, row["tokens"]),
            **row,
        }
        for row in examine(model, settings, seed=seed, device=device)
    ]


def smallest_states(rows: Sequence[dict[str, Any]], wanted: float = 0.95) -> list[dict[str, Any]]:
    """For each number of pairs the smallest fixed state that recalls the wanted share, on average over seeds.

    Args:
        rows: of :func:`measure`, of several contenders.
        wanted: share of values.

    Returns:
        Rows of pairs, and the contender's name and bytes; these are None where no state suffices.
    """
    found = []
    for pairs in sorted({row["pairs"] for row in rows}):
        enough = []
        for name in dict.fromkeys(row["name"] for row in rows if row["power"] is not None):
            mine = [row for row in rows if (row["name"], row["pairs"]) == (name, pairs)]
            if mine and sum(row["accuracy"] for row in mine) >= wanted * len(mine):
                enough.append((mine[0]["state_bytes"], name))
        size, name = min(enough, default=(None, None))
        found.append({"pairs": pairs, "name": name, "state_bytes": size})
    return found
