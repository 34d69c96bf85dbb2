"""What generation keeps between calls: a state and a short ring of recent tokens a layer, however many were read."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, CacheLayerMixin

from power_retention.errors import ArgumentError, StateError
from power_retention.models.fingerprint import fingerprint_model
from power_retention.ops import PowerState, RingState, power_retention, power_retention_decode
from power_retention.ops.ring import FOLD_SIZE
from power_retention.ops.state_file import StateHeader, load_states, save_states


class PowerRetentionLayerCache(CacheLayerMixin):
    """What one layer has read, and how many positions that were.

    Args:
        fold_size: see :class:`PowerRetentionCache`.
        state_dtype: likewise.
    """

    is_sliding = False

    def __init__(self, fold_size: int = FOLD_SIZE, state_dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.fold_size, self.state_dtype = fold_size, state_dtype
        self.seen = 0
        self._ring: RingState | None = None
        self._held = 0  # tokens in the ring, known without asking the device: rows of a batch advance together
        self._recorded: PowerState | None = None  # instead of the ring, where gradients are recorded

    @property
    def state(self) -> PowerState | None:
        """Everything read, as one state; None before the first token.  A copy, unless gradients were recorded."""
        if self._recorded is not None or self._ring is None:
            return self._recorded
        return self._ring.to_state()

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(part.nbytes for part in (self._ring, self._recorded) if part is not None)

    def store(self, state: PowerState, tokens: int) -> None:
        """Continue from a state of ``tokens`` positions."""
        self._ring, self._held, self._recorded = None, 0, state
        self.seen, self.is_initialized = tokens, True

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
        tokens = q.shape[1]
        if torch.is_grad_enabled():
            out = power_retention(
                q, k, v, log_g, p=p, mask=mask, chunk_size=chunk_size, initial_state=self._state_on(q.device),
                return_state=True,
            )  # fmt: skip
            assert isinstance(out, tuple)
            y, state = out
            self._ring, self._held, self._recorded = None, 0, state
        else:
            ring = self._ring_for(q, k, v, p)
            y = power_retention_decode(q, k, v, log_g, ring, mask=mask, chunk_size=chunk_size, fresh=not self.seen)
            self._held = ring.fill_after(self._held, tokens)
        self.seen += tokens
        self.is_initialized = True
        return y

    def _state_on(self, device: torch.device) -> PowerState | None:
        self._move(device)
        return self.state

    def _ring_for(self, q: Tensor, k: Tensor, v: Tensor, p: int) -> RingState:
        """The ring, on the device of the tokens and writable."""
        dtype = self.state_dtype or (torch.float64 if q.dtype == torch.float64 else torch.float32)
        options: dict[str, Any] = {"fold_size": self.fold_size, "dtype": k.dtype, "state_dtype": dtype}
        if self._recorded is not None:
            state = self._recorded
            self._ring, self._recorded = RingState.from_state(state, **options).to(k.device), None
        if self._ring is None:
            (batch, _, heads, d), e = k.shape, v.shape[-1]
            self._ring = RingState.empty(batch, heads, d, e, p=p, device=k.device, **options)
        self._move(k.device)
        return self._writable_ring()

    def _writable_ring(self) -> RingState:
        assert self._ring is not None
        # What was made in inference mode may only be changed in it.
        if self._ring.memory.is_inference() and not torch.is_inference_mode_enabled():
            self._ring = self._ring.clone()
        return self._ring

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
        self._ring, self._held, self._recorded, self.seen, self.is_initialized = None, 0, None, 0, False

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last ``-tokens_to_remove`` positions (a number ≤ 0, the library's convention), exactly.

        Raises:
            StateError: they are folded into the state already; nothing was changed.
        """
        count = -tokens_to_remove
        if count < 0:
            raise ArgumentError(f"crop takes minus the number of tokens to take back, not {tokens_to_remove}.")
        if count == 0:
            return
        if count == self.seen:
            self.reset()
            return
        if self._ring is None or count > self._held:
            raise StateError(
                f"The last {count} tokens cannot be taken back: {self._held} of the {self.seen} read are still in the "
                "ring, the others are folded into the state. Take back fewer, make the cache with a larger fold_size, or "
                "read the context again."
            )
        self._writable_ring().roll_back(count, check=False)
        self._held -= count
        self.seen -= count

    def _select(self, indices: Tensor) -> None:
        if self._ring is not None:
            self._ring = self._ring.select(indices)
        if self._recorded is not None:
            self._recorded = self._recorded.select(indices.to(self._recorded.memory.device))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Let each beam continue from what the beam it came from has read."""
        self._select(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the given rows."""
        self._select(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row; every copy owns its memory."""
        held = self._ring or self._recorded
        if held is not None:
            self._select(torch.arange(held.memory.shape[0]).repeat_interleave(repeats))

    def fork(self, copies: int) -> PowerRetentionLayerCache:
        """A layer that has read the same, each row ``copies`` times."""
        other = PowerRetentionLayerCache(self.fold_size, self.state_dtype)
        other.__dict__.update(self.__dict__)
        other.batch_repeat_interleave(copies)
        return other

    def offload(self) -> None:
        """Move everything to host memory."""
        self._move(torch.device("cpu"))

    def prefetch(self) -> None:
        """Nothing to do: it is moved back by the layer that reads it."""

    def _move(self, device: torch.device) -> None:
        if self._ring is not None and self._ring.memory.device != device:
            self._ring = self._ring.to(device)
        if self._recorded is not None and self._recorded.memory.device != device:
            memory, normalizer = (x.to(device) for x in self._recorded[:2])
            self._recorded = self._recorded._replace(memory=memory, normalizer=normalizer)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Keys and values are never stored."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> NoReturn:
        """Refused: this cache belongs to a power-retention model."""
        raise TypeError(
            "A PowerRetentionCache keeps states, not keys and values: it serves a power-retention model only. Let the model "
            "make its own cache (past_key_values=None)."
        )


class PowerRetentionCache(Cache):
    """``past_key_values`` of a power-retention model: as large after a million tokens as after a hundred.

    Args:
        num_layers: layers of the model.
        fold_size: L, tokens that a layer folds into its state at a time; the last L read can always be taken back
            (:meth:`crop`), which is what assisted and prompt-lookup decoding do with rejected drafts.
        state_dtype: dtype of the states: float32, or bfloat16 for half the memory.  None: float32.
    """

    # A compiled cache would hand the layers a 4-D mask in which padding can no longer be told apart.
    is_compileable = False

    def __init__(self, num_layers: int, *, fold_size: int = FOLD_SIZE, state_dtype: torch.dtype | None = None) -> None:
        super().__init__(layers=[PowerRetentionLayerCache(fold_size, state_dtype) for _ in range(num_layers)])

    @property
    def states(self) -> list[PowerState]:
        """The state of every layer, recent tokens folded in; empty before the first token."""
        states = (layer.state for layer in self.layers)
        return [state for state in states if state is not None]

    @property
    def nbytes(self) -> int:
        """Bytes held by all layers."""
        return sum(layer.nbytes for layer in self.layers)

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last ``-tokens_to_remove`` positions, exactly; possible for the last ``fold_size`` read.

        Raises:
            StateError: they are folded into the states already; nothing was changed.
        """
        for layer in self.layers:
            layer.crop(tokens_to_remove)

    def fork(self, copies: int = 1) -> PowerRetentionCache:
        """Another cache that has read the same, each row ``copies`` times; neither changes with the other."""
        if copies < 1:
            raise ArgumentError(f"fork makes at least one copy, not {copies}.")
        other = PowerRetentionCache(0)
        other.layers = [layer.fork(copies) for layer in self.layers]
        return other

    def save(
        self, path: str | os.PathLike[str], model: nn.Module, *, extra: Mapping[str, str] | None = None
    ) -> StateHeader:
        """Write everything read to a file that only ``model`` can go on from; see ``docs/state.md``.

        Args:
            path: destination, replaced once the new file is complete.
            model: the model that has read it.
            extra: more text for the header.

        Returns:
            The header written.

        Raises:
            StateError: nothing was read yet.
            OutputError: the file cannot be written; an earlier file at ``path`` is unchanged.
        """
        seen = self.get_seq_length()
        if not seen:
            raise StateError("There is nothing to save: this cache has read no token yet.")
        noted = {"position": str(seen), **(extra or {})}
        return save_states(path, self.states, model=fingerprint_model(model), tokens_seen=seen, extra=noted)

    @classmethod
    def load(
        cls, path: str | os.PathLike[str], model: nn.Module, *, verify: bool = True, **options: Any
    ) -> PowerRetentionCache:
        """A cache that has read what the one saved at ``path`` had.

        Args:
            path: of a file that :meth:`save` wrote.
            model: the model that will go on from it, the same that wrote it.
            verify: check the file's checksum, which reads every byte once more.
            options: of the cache, see :class:`PowerRetentionCache`.

        Raises:
            StateError: the file is missing, damaged or of another model.
        """
        device = next(model.parameters()).device
        states, header = load_states(path, model=fingerprint_model(model), device=device, verify=verify)
        cache = cls(header.layers, **options)
        for layer, state in zip(cache.layers, states, strict=True):
            layer.store(state, header.tokens_seen)
        return cache
