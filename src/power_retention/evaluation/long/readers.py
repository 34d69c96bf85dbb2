"""Reading a context once into a memory that many questions share, whatever the memory is.

A power-retention model reads in segments into its states and forks them.  Its Transformer parent reads as far as its window
goes and forks its keys and values.  The same parent with a window over the newest tokens, as large in bytes as our states, goes
on for as long as we do: what a Transformer can do with our memory.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin

from power_retention.layers.mixer import rotate
from power_retention.models import PowerRetentionCache, PowerRetentionForCausalLM
from power_retention.models.sizes import head_width, state_bytes

SINKS = 4
"""First tokens that a sliding window keeps: without them a trained Transformer falls silent (Xiao et al. 2024)."""


@dataclass
class Memory:
    """What rows of a batch have read.

    Attributes:
        cache: the model's own.
        lengths: int64 ``[B]``, tokens read, padding left out: the position of the next one.
        places: int64 ``[B, K]``, position of each kept key, −1 at padding; None where keys are not kept, or all are.
    """

    cache: Any
    lengths: Tensor
    places: Tensor | None = None


class Reader(ABC):
    """A model, and the way it keeps what it has read.

    Args:
        model: on its device and in its dtype.
    """

    longest: int | None = None
    """Most tokens of context and question; None for no limit."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model.eval()
        self.device = next(model.parameters()).device

    @abstractmethod
    def bytes_a_row(self, tokens: int) -> int:
        """Bytes that one row keeps after so many tokens."""

    @abstractmethod
    def begin(self, rows: int) -> Memory:
        """Nothing read yet."""

    @abstractmethod
    def fork(self, memory: Memory, rows: Tensor) -> Memory:
        """A memory of the given rows, int64 ``[N]``, each as often as it is named; the one it comes from stays as it is."""

    @abstractmethod
    def segment(self, rows: int, tokens_at_once: int) -> int | None:
        """Tokens of each row that are read at a time; None: all of them, for the model has no other way."""

    @abstractmethod
    def _hidden(self, memory: Memory, ids: Tensor, valid: Tensor | None) -> Tensor:
        """The trunk's output, ``memory`` being advanced."""

    @torch.inference_mode()
    def read(self, memory: Memory, ids: Tensor, valid: Tensor | None = None) -> Tensor:
        """Read tokens.

        Args:
            memory: of B rows, changed in place.
            ids: int64 ``[B, T]``.
            valid: ``[B, T]``, False at padding, which stands on the right; None where there is none.

        Returns:
            ``[B, T, hidden]``, what predicts each next token; at padding, anything.
        """
        hidden = self._hidden(memory, ids, valid)
        memory.lengths = memory.lengths + (ids.shape[1] if valid is None else valid.sum(-1))
        return hidden

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """float32 ``[…, vocab]``."""
        logits: Tensor = self.model.lm_head(hidden).float()
        return logits

    def _positions(self, memory: Memory, tokens: int) -> Tensor:
        """``[B, T]``: padding stands on the right, so valid tokens count on from what was read."""
        return memory.lengths[:, None] + torch.arange(tokens, device=self.device)


class StateReader(Reader):
    """A power-retention model: states of a fixed size.

    Args:
        model: the model.
    """

    model: PowerRetentionForCausalLM

    def bytes_a_row(self, tokens: int) -> int:
        return state_bytes(self.model.config, activation_bytes=_element_bytes(self.model))

    def begin(self, rows: int) -> Memory:
        cache = PowerRetentionCache(self.model.config.num_hidden_layers)
        return Memory(cache, torch.zeros(rows, dtype=torch.long, device=self.device))

    def fork(self, memory: Memory, rows: Tensor) -> Memory:
        cache = PowerRetentionCache(0)
        for layer in memory.cache.layers:
            other = copy.copy(layer)
            other.batch_select_indices(rows)
            cache.layers.append(other)
        return Memory(cache, memory.lengths[rows])

    def segment(self, rows: int, tokens_at_once: int) -> int | None:
        return _even(tokens_at_once // rows)

    def _hidden(self, memory: Memory, ids: Tensor, valid: Tensor | None) -> Tensor:
        hidden: Tensor = self.model.model(
            input_ids=ids,
            attention_mask=valid,
            position_ids=self._positions(memory, ids.shape[1]),
            past_key_values=memory.cache,
            use_cache=True,
        ).last_hidden_state
        return hidden


class AttentionReader(Reader):
    """A Transformer with all its keys and values, within the window it was made for.

    Args:
        model: the Transformer.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__(model)
        self.longest = int(model.config.max_position_embeddings)

    def bytes_a_row(self, tokens: int) -> int:
        return tokens * kept_bytes(self.model)

    def begin(self, rows: int) -> Memory:
        return Memory(DynamicCache(config=self.model.config), torch.zeros(rows, dtype=torch.long, device=self.device))

    def fork(self, memory: Memory, rows: Tensor) -> Memory:
        cache = copy.copy(memory.cache)
        cache.layers = []
        for layer in memory.cache.layers:
            other = copy.copy(layer)
            other.keys, other.values = layer.keys[rows], layer.values[rows]
            cache.layers.append(other)
        return Memory(cache, memory.lengths[rows], None if memory.places is None else memory.places[rows])

    def segment(self, rows: int, tokens_at_once: int) -> int | None:
        return None

    def _hidden(self, memory: Memory, ids: Tensor, valid: Tensor | None) -> Tensor:
        positions = self._positions(memory, ids.shape[1])
        mask = self._mask(memory, ids, valid)
        hidden: Tensor = self.model.model(
            input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=memory.cache, use_cache=True
        ).last_hidden_state
        return hidden

    def _mask(self, memory: Memory, ids: Tensor, valid: Tensor | None) -> Tensor | None:
        """``[B, seen + T]`` where anything was padding; the places of ``memory`` are brought up to date."""
        if memory.places is None and valid is None:
            return None
        seen = memory.cache.get_seq_length()
        before = ids.new_zeros(len(ids), seen) if memory.places is None else memory.places
        now = torch.zeros_like(ids) if valid is None else valid.long() - 1
        memory.places = torch.cat((before, now), 1)
        return memory.places >= 0


class WindowReader(Reader):
    """A Transformer that sees the newest ``window`` tokens and the first four, at any length.

    The first tokens are turned by the rotary embedding to stand right before the window, so that no distance is longer than
    those the model was trained on (StreamingLLM, Xiao et al. 2024).

    Args:
        model: the Transformer.
        window: tokens whose keys and values are kept, the first four among them.
    """

    def __init__(self, model: PreTrainedModel, window: int) -> None:
        super().__init__(model)
        self.window = min(window, int(model.config.max_position_embeddings))
        self.sinks = min(SINKS, self.window - 1)

    def bytes_a_row(self, tokens: int) -> int:
        return min(tokens, 2 * self.window) * kept_bytes(self.model)

    def begin(self, rows: int) -> Memory:
        layers = [_KeptKeys() for _ in range(self.model.config.num_hidden_layers)]
        places = torch.zeros(rows, 0, dtype=torch.long, device=self.device)
        return Memory(Cache(layers=layers), torch.zeros(rows, dtype=torch.long, device=self.device), places)

    def fork(self, memory: Memory, rows: Tensor) -> Memory:
        assert memory.places is not None
        layers = [layer.of_rows(rows) for layer in memory.cache.layers]
        return Memory(Cache(layers=layers), memory.lengths[rows], memory.places[rows])

    def segment(self, rows: int, tokens_at_once: int) -> int | None:
        return _even(min(tokens_at_once // rows, self.window // 2))

    def _hidden(self, memory: Memory, ids: Tensor, valid: Tensor | None) -> Tensor:
        assert memory.places is not None
        positions = self._positions(memory, ids.shape[1])
        self._drop_old(memory, int(memory.lengths.min()))
        now = positions if valid is None else positions.masked_fill(~valid, -1)
        memory.places = torch.cat((memory.places, now), 1)
        same = bool((memory.places == memory.places[:1]).all())
        rows = slice(0, 1) if same else slice(None)
        hidden: Tensor = self.model.model(
            input_ids=ids,
            attention_mask=self._mask(memory.places[rows], positions[rows]),
            position_ids=positions,
            past_key_values=memory.cache,
            use_cache=True,
        ).last_hidden_state
        return hidden

    def _mask(self, places: Tensor, positions: Tensor) -> Tensor:
        """``[B or 1, 1, T, K]``, what is added to the scores."""
        key, query = places[:, None, :], positions[:, :, None]
        recent = query - key < self.window - self.sinks
        seen = (key >= 0) & (key <= query) & (recent | (key < self.sinks))
        dtype = next(self.model.parameters()).dtype
        return torch.zeros(seen.shape, dtype=dtype, device=self.device).masked_fill(~seen, torch.finfo(dtype).min)[
            :, None
        ]

    def _drop_old(self, memory: Memory, start: int) -> None:
        """Forget what no token from ``start`` on sees, and let the sinks catch up: not for a few tokens, it costs a copy."""
        assert memory.places is not None
        first = start - (self.window - self.sinks) + 1
        kept = ((memory.places < self.sinks) | (memory.places >= first)).any(0).nonzero().squeeze(-1)
        if memory.places.shape[1] - len(kept) < min(64, self.window // 4):
            return
        cos, sin = self._turn(first - self.sinks)
        for layer in memory.cache.layers:
            layer.keep(kept, self.sinks, cos, sin)
        memory.places = memory.places[:, kept]

    def _turn(self, by: int) -> tuple[Tensor, Tensor]:
        """Cosines and sines of a turn by so many positions, ``[1, 1, r]``."""
        rotary: nn.Module = self.model.model.rotary_emb
        position = torch.tensor([[by]], device=self.device)
        cos, sin = rotary(torch.zeros(1, device=self.device), position)
        return cos / rotary.attention_scaling, sin / rotary.attention_scaling


class _KeptKeys(CacheLayerMixin):
    """Keys and values of one layer, which grow until they are told what to keep."""

    is_sliding = False

    def __init__(self) -> None:
        super().__init__()
        self.first: Tensor | None = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.keys, self.values = key_states[:, :, :0], value_states[:, :, :0]
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.keys = torch.cat((self.keys, key_states), 2)
        self.values = torch.cat((self.values, value_states), 2)
        return self.keys, self.values

    def keep(self, places: Tensor, sinks: int, cos: Tensor, sin: Tensor) -> None:
        """Drop all other places; the first keys are turned from where they stood at the beginning."""
        keys, self.values = self.keys[:, :, places], self.values[:, :, places]
        if self.first is None:
            self.first = keys[:, :, :sinks].float()
        turned = rotate(self.first.transpose(1, 2), cos, sin).transpose(1, 2)
        self.keys = torch.cat((turned.to(keys.dtype), keys[:, :, sinks:]), 2)

    def of_rows(self, rows: Tensor) -> _KeptKeys:
        """A layer of the given rows."""
        other = copy.copy(self)
        other.keys, other.values = self.keys[rows], self.values[rows]
        other.first = None if self.first is None else self.first[rows]
        return other

    def get_seq_length(self) -> int:
        return self.keys.shape[2] if self.is_initialized else 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        return -1

    def crop(self, *args: Any) -> NoReturn:
        raise NotImplementedError


def _even(tokens: int) -> int:
    """A segment that kernels like: a multiple of 256 where it is long enough."""
    return tokens - tokens % 256 if tokens >= 256 else max(tokens, 16)


def matched_window(student: PowerRetentionForCausalLM, teacher: PreTrainedModel) -> int:
    """Tokens whose keys and values, two bytes an element, take as much memory as the states of a converted model do."""
    return max(SINKS + 1, state_bytes(student.config) // kept_bytes(teacher, element_bytes=2))


def kept_bytes(model: PreTrainedModel, element_bytes: int | None = None) -> int:
    """Bytes of a token's keys and values in all layers; None: in the dtype of the model."""
    config = model.config
    elements: int = config.num_hidden_layers * config.num_key_value_heads * 2 * head_width(config)
    return elements * (element_bytes or _element_bytes(model))


def _element_bytes(model: PreTrainedModel) -> int:
    size: int = next(model.parameters()).element_size()
    return size
