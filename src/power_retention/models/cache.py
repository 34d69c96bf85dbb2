"""What generation keeps between calls: one fixed state a layer, whatever the number of tokens read."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from power_retention.ops import PowerState


class PowerRetentionLayerCache(CacheLayerMixin):
    """The state of one layer and the number of positions it has seen."""

    is_sliding = False

    def __init__(self) -> None:
        super().__init__()
        self.state: PowerState | None = None
        self.seen = 0

    def store(self, state: PowerState, tokens: int) -> None:
        """Keep the state after ``tokens`` more positions."""
        self.state, self.seen, self.is_initialized = state, self.seen + tokens, True

    @property
    def may_overwrite(self) -> bool:
        """Whether a step may write the state in place: no gradient needs the old one, and inference mode allows it."""
        if torch.is_grad_enabled() or self.state is None:
            return False
        return torch.is_inference_mode_enabled() or not self.state.memory.is_inference()

    def get_seq_length(self) -> int:
        """Positions seen, padding included."""
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(length, offset) of a mask over everything seen and ``query_length`` new tokens."""
        return self.seen + query_length, 0

    def get_max_length(self) -> int:
        """No maximum."""
        return -1

    def reset(self) -> None:
        """Forget everything."""
        self.state, self.seen, self.is_initialized = None, 0, False

    def _select(self, indices: Tensor) -> None:
        if self.state is not None:
            self.state = self.state.select(indices.to(self.state.memory.device))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Let each beam continue from the state of the beam it came from."""
        self._select(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the given rows."""
        self._select(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row; every copy owns its state."""
        if self.state is not None:
            self._select(torch.arange(self.state.memory.shape[0]).repeat_interleave(repeats))

    def crop(self, tokens_to_remove: int) -> None:
        """A state cannot forget its last tokens; only a no-op is possible."""
        if tokens_to_remove not in (0, self.seen):
            _no_rollback()

    def offload(self) -> None:
        """Move the state to host memory."""
        self._move("cpu")

    def prefetch(self) -> None:
        """Nothing to do: a state is moved back by the layer that reads it."""

    def _move(self, device: torch.device | str) -> None:
        if self.state is not None:
            self.state = self.state._replace(
                memory=self.state.memory.to(device), normalizer=self.state.normalizer.to(device)
            )

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Keys and values are never stored."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> NoReturn:
        """Refused: this cache belongs to a power-retention model."""
        raise TypeError(
            "A PowerRetentionCache keeps states, not keys and values: it serves a power-retention model only. Let the model "
            "make its own cache (past_key_values=None)."
        )


class PowerRetentionCache(Cache):
    """``past_key_values`` of a power-retention model: one :class:`PowerState` a layer.

    Args:
        num_layers: layers of the model.
    """

    # A compiled cache would hand the layers a 4-D mask in which padding can no longer be told apart.
    is_compileable = False

    def __init__(self, num_layers: int) -> None:
        super().__init__(layers=[PowerRetentionLayerCache() for _ in range(num_layers)])

    @property
    def states(self) -> list[PowerState]:
        """The state of every layer; empty before the first token."""
        return [layer.state for layer in self.layers if layer.state is not None]

    @property
    def nbytes(self) -> int:
        """Bytes held by all layers."""
        return sum(state.nbytes for state in self.states)

    def crop(self, tokens_to_remove: int) -> None:
        """Refused unless nothing is to be removed."""
        for layer in self.layers:
            layer.crop(tokens_to_remove)


def _no_rollback() -> NoReturn:
    raise NotImplementedError(
        "A power-retention state cannot drop its last tokens, so assisted and prompt-lookup decoding are not supported; "
        "generate without assistant_model and prompt_lookup_num_tokens."
    )
