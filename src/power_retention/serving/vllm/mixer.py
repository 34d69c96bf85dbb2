"""The mixer over vLLM's pages: prompts are read in chunks into the state, decoding goes through the ring."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from vllm.config import VllmConfig, get_current_vllm_config
from vllm.distributed import get_tensor_model_parallel_rank
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import ColumnParallelLinear, QKVParallelLinear, RowParallelLinear
from vllm.model_executor.layers.mamba.abstract import MambaBase
from vllm.utils.torch_utils import direct_register_custom_op
from vllm.v1.kv_cache_interface import KVCacheSpec

from power_retention.errors import ArgumentError
from power_retention.layers.mixer import rotate
from power_retention.models import PowerRetentionConfig
from power_retention.ops import PowerState, power_retention, power_retention_decode
from power_retention.serving.vllm.engine import page_layout
from power_retention.serving.vllm.metadata import PowerRetentionMetadata
from power_retention.serving.vllm.page import BASE, LOADED, SEEN, Pages
from power_retention.serving.vllm.plugin import register_metadata

PROMPTS_AT_ONCE = 16
"""Prompts whose states are worked on together: more would take more memory, and hardly less time."""


class PowerRetentionMixer(nn.Module, MambaBase):
    """:class:`power_retention.layers.PowerRetentionMixer` in vLLM's parallel layers, its memory in vLLM's pages.

    Args:
        config: of the model.
        vllm_config: of the engine.
        prefix: name of this layer.
    """

    def __init__(self, config: PowerRetentionConfig, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__()
        assert config.num_key_value_heads is not None  # filled in by the configuration
        assert config.head_dim is not None
        self.prefix, self.chunk_size = prefix, config.operator_chunk_size
        self.layout = page_layout(vllm_config)
        self.head_dim, self.p = config.head_dim, config.power
        hidden, quantized = config.hidden_size, vllm_config.quant_config
        query_heads, heads = config.num_attention_heads, config.num_key_value_heads
        self.heads = self.layout.heads
        self.qkv_proj = QKVParallelLinear(
            hidden,
            self.head_dim,
            query_heads,
            heads,
            config.qkv_bias,
            quant_config=quantized,
            prefix=f"{prefix}.qkv_proj",
        )
        # So few rows that no quantisation is worth their precision.
        self.g_proj = ColumnParallelLinear(hidden, heads, config.gate_bias, prefix=f"{prefix}.g_proj")
        self.o_proj = RowParallelLinear(
            query_heads * self.head_dim, hidden, config.out_bias, quant_config=quantized, prefix=f"{prefix}.o_proj"
        )
        self.q_norm = RMSNorm(self.head_dim, eps=config.rms_norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(self.head_dim, eps=config.rms_norm_eps) if config.qk_norm else None
        self.k_bias = nn.Parameter(torch.zeros(self.heads, self.head_dim)) if config.key_bias else None
        if self.k_bias is not None:
            self.k_bias.weight_loader = _load_own_heads  # type: ignore[attr-defined]
        layers = get_current_vllm_config().compilation_config.static_forward_context
        if prefix in layers:
            raise ArgumentError(f"Two layers are called {prefix!r}; every layer needs a name of its own.")
        layers[prefix] = self
        self.model: Callable[[], nn.Module | None] = lambda: None
        """The whole model, where this is its first layer."""
        self._bound: tuple[Any, Pages | None] = ((), None)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """``[N, hidden]`` → ``[N, hidden]`` for N tokens of any requests; cos and sin ``[N, r]``."""
        qkv, _ = self.qkv_proj(x)
        width = self.heads * self.head_dim
        q, k, v = (
            part.unflatten(-1, (-1, self.head_dim)) for part in qkv.split((qkv.shape[-1] - 2 * width, width, width), -1)
        )
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q.contiguous()), self.k_norm(k.contiguous())
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if self.k_bias is not None:
            k = k + self.k_bias.to(k.dtype)
        gates, _ = self.g_proj(x)
        y = torch.empty_like(q)
        torch.ops.vllm.power_retention_read(q, k, v.contiguous(), F.logsigmoid(gates.float()), y, self.prefix)
        out: Tensor = self.o_proj(y.flatten(-2))[0]
        return out

    @property
    def kv_cache(self) -> Any:
        """The parts of all pages, as vLLM binds them."""
        return self._bound[0]

    @kv_cache.setter
    def kv_cache(self, parts: Any) -> None:
        # Named at once: a graph that is being captured is no place to allocate in.
        named = Pages.of(tuple(parts), self.layout) if len(parts) == len(self.layout.parts) else None
        self._bound = (parts, named)

    @property
    def pages(self) -> Pages:
        """This layer's memory."""
        pages = self._bound[1]
        assert pages is not None
        return pages

    def begin(self, pages: Tensor) -> None:
        """Forget what the last owners of pages ``[R]`` left there, unless a state was loaded for their new ones."""
        ring, record = self.pages.ring, self.pages.record
        foreign = record[pages, LOADED] == 0
        for part in (ring.cursor, ring.normalizer, ring.memory, record):
            part[pages] = part[pages].masked_fill(foreign.view(-1, *(1,) * (part.dim() - 1)), 0)
        record[pages, LOADED] = 0

    def read(self, q: Tensor, k: Tensor, v: Tensor, log_g: Tensor, y: Tensor, metadata: PowerRetentionMetadata) -> None:
        """Answer all tokens of a step into ``y``, and remember them."""
        decoding, prompts = metadata.num_decode_tokens, metadata.num_prefill_tokens
        if decoding:
            self._read_rows(q[:decoding], k[:decoding], v[:decoding], log_g[:decoding], y[:decoding], metadata)
        if prompts:
            assert metadata.query_start_loc_p is not None
            assert metadata.state_indices_tensor_p is not None
            fresh = ~continues(self.pages.record, metadata)
            pages, ends = metadata.state_indices_tensor_p.long(), metadata.seq_lens[-metadata.num_prefills :]
            untrue = rejected(self.pages.record, pages, ends, metadata.query_start_loc_p.diff())
            for first in range(0, metadata.num_prefills, PROMPTS_AT_ONCE):
                group = slice(first, min(first + PROMPTS_AT_ONCE, metadata.num_prefills))
                start, end = metadata.prompt_borders[group.start], metadata.prompt_borders[group.stop]
                span = slice(decoding + start, decoding + end)
                q_1THD, k_1THD, v_1THD, g_1TH = (x[span].unsqueeze(0) for x in (q, k, v, log_g))
                borders = metadata.query_start_loc_p[group.start : group.stop + 1] - start
                rows = pages[group], borders, fresh[group], untrue[group]
                y[span] = self._read_prompts(q_1THD, k_1THD, v_1THD, g_1TH, *rows).squeeze(0)

    def _read_rows(
        self, q: Tensor, k: Tensor, v: Tensor, log_g: Tensor, y: Tensor, metadata: PowerRetentionMetadata
    ) -> None:
        """Decoding rows, ``[N, …]``: tokens and their drafts, after the last step's rejected drafts are taken back."""
        slots, ragged, record = decoding_slots(metadata), metadata.ragged, self.pages.record
        pages, borders = slots.clamp(min=0).long(), metadata.query_start_loc_d
        read: Tensor | int = 1
        untrue = None
        if borders is not None:  # there may be drafts
            lengths = borders.diff()[: len(slots)]
            untrue = rejected(record, pages, metadata.seq_lens[: len(slots)], lengths).masked_fill(slots < 0, 0)
            read = lengths - untrue
        if ragged is None:
            q, k, v, log_g = (x.unflatten(0, (-1, metadata.row_length)) for x in (q, k, v, log_g))
            y.copy_(self._decode(q, k, v, log_g, slots, untrue).flatten(0, 1))
        else:
            q, k, v, log_g = (x[ragged.token] for x in (q, k, v, log_g))
            y.copy_(self._decode(q, k, v, log_g, slots, untrue, ragged.there)[ragged.row, ragged.place])
        record[pages, SEEN] += read

    def _decode(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        log_g: Tensor,
        slots: Tensor,
        untrue: Tensor | None = None,
        there: Tensor | None = None,
    ) -> Tensor:
        """``[R, T, …]`` tokens of R rows, T ≤ L.

        Args:
            q, k, v, log_g: of the tokens.
            slots: ``[R]``, their pages; negative where a row is none.
            untrue: ``[R]``, how many of the newest tokens of each page are to be taken back first, at most L.
            there: ``[R, T]``: False behind the end of a row.
        """
        ring = self.pages.ring
        # A kernel wants the cursors of all pages side by side.
        beside = replace(ring, cursor=ring.cursor.contiguous())
        pages = slots.clamp(min=0)
        if untrue is not None:
            beside.roll_back(untrue, pages, check=False)
        y = power_retention_decode(q, k, v, log_g, beside, slot_indices=slots, mask=there)
        if there is not None:
            beside.roll_back((~there).sum(-1).masked_fill(slots < 0, 0), pages, check=False)
        ring.cursor.copy_(beside.cursor)
        return y

    def _read_prompts(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        log_g: Tensor,
        slots: Tensor,
        borders: Tensor,
        fresh: Tensor,
        untrue: Tensor,
    ) -> Tensor:
        """Prompts, or pieces of them, packed along T: every token goes into the state, and rings are left empty.

        Args:
            q, k, v, log_g: ``[1, T, …]``.
            slots: ``[R]``, the pages of R prompts.
            borders: ``[R + 1]``, where each begins.
            fresh: ``[R]``, which of them have no past.
            untrue: ``[R]``, how many of the newest tokens in the pages of the others are to be taken back first.
        """
        ring, record = self.pages.ring, self.pages.record
        before = ring.select(slots)
        before.roll_back(untrue, check=False)
        # Pages are handed on as their last owner left them, and what stands there may be anything.
        before.cursor.masked_fill_(fresh.view(-1, 1, 1), 0)
        before.normalizer.masked_fill_(fresh.view(-1, 1, 1), 0)
        before.memory.masked_fill_(fresh.view(-1, 1, 1, 1), 0)
        state = before.to_state()
        out = power_retention(
            q, k, v, log_g, p=self.p, chunk_size=self.chunk_size, cu_seqlens=borders,
            initial_state=state._replace(memory=state.memory.float()), return_state=True,
        )  # fmt: skip
        assert isinstance(out, tuple)
        y, after = out
        self._store(slots, after)
        record[slots] = record[slots].masked_fill(fresh.unsqueeze(-1), 0)
        record[slots, SEEN] += borders.diff() - untrue.masked_fill(fresh, 0)
        record[slots, LOADED] = 0
        return y

    def _store(self, slots: Tensor, state: PowerState) -> None:
        ring = self.pages.ring
        ring.memory[slots] = state.memory.to(ring.memory.dtype)
        ring.normalizer[slots] = state.normalizer
        ring.cursor[slots] = 0

    def put(self, slot: int, state: PowerState, tokens_seen: int, *, whole: bool = True) -> None:
        """Put a state ``[1, H, …]`` into a page; the request that has the page goes on from it.

        Args:
            slot: the page.
            state: of all heads, or of this worker's.
            tokens_seen: what it has read.
            whole: whether it is of all heads.
        """
        record = self.pages.record
        first = get_tensor_model_parallel_rank() * self.heads if whole else 0
        memory, normalizer = (x[:, first : first + self.heads].to(record.device) for x in state[:2])
        self._store(torch.tensor([slot], device=record.device), state._replace(memory=memory, normalizer=normalizer))
        record[slot] = 0
        for place, value in ((BASE, tokens_seen), (SEEN, tokens_seen), (LOADED, 1)):
            record[slot, place] = value

    def take(self, slot: int, untrue: int = 0) -> PowerState:
        """Everything that the request of a page has read but for its newest ``untrue`` tokens; a copy ``[1, H, …]``."""
        ring = self.pages.ring.select(torch.tensor([slot], device=self.pages.record.device))
        ring.roll_back(untrue)
        return ring.to_state()

    # ── what vLLM asks a layer with states ───────────────────────────────────────────────────────────────────────────

    def get_state_shape(self) -> Iterable[tuple[int, ...]]:
        return self.layout.shapes

    def get_state_dtype(self) -> tuple[torch.dtype, ...]:
        return self.layout.dtypes

    @property
    def mamba_type(self) -> Any:
        return register_metadata()

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> KVCacheSpec | None:
        # Room for drafts would be whole states; what drafts need is in the ring.
        return replace(super().get_kv_cache_spec(vllm_config), num_speculative_blocks=0)


def decoding_slots(metadata: PowerRetentionMetadata) -> Tensor:
    """``[rows]`` pages of the decoding rows, −1 where a row is filling: the first page belongs to nobody."""
    assert metadata.state_indices_tensor_d is not None
    rows = metadata.num_decodes if metadata.ragged else metadata.num_decode_tokens // metadata.row_length
    slots = metadata.state_indices_tensor_d[:rows, 0]
    return torch.where(slots > 0, slots, -1)


def rejected(record: Tensor, pages: Tensor, ends: Tensor, lengths: Tensor) -> Tensor:
    """``[R]``: how many of the newest tokens in each page were drafts that nobody accepted.

    Args:
        record: of all pages.
        pages: ``[R]``.
        ends: ``[R]``: tokens that each request will have read after this step.
        lengths: ``[R]``: how many of them it reads in this step.
    """
    read: Tensor = record[pages, SEEN] - record[pages, BASE]
    return read - (ends - lengths)


def continues(record: Tensor, metadata: PowerRetentionMetadata) -> Tensor:
    """``[prompts]``: which prompts go on from what stands in their page."""
    assert metadata.state_indices_tensor_p is not None
    assert metadata.has_initial_states_p is not None
    loaded: Tensor = record[metadata.state_indices_tensor_p.long(), LOADED] > 0
    return torch.logical_or(loaded, metadata.has_initial_states_p)


def _load_own_heads(parameter: nn.Parameter, loaded: Tensor) -> None:
    heads = parameter.shape[0]
    parameter.data.copy_(loaded.narrow(0, get_tensor_model_parallel_rank() * heads, heads))


def _layer_and_metadata(name: str) -> tuple[PowerRetentionMixer, PowerRetentionMetadata | None]:
    context = get_forward_context()
    layer = context.no_compile_layers[name]
    metadata = context.attn_metadata
    assert isinstance(layer, PowerRetentionMixer)
    return layer, metadata[name] if isinstance(metadata, dict) else None


def _read(q: Tensor, k: Tensor, v: Tensor, log_g: Tensor, y: Tensor, layer_name: str) -> None:
    layer, metadata = _layer_and_metadata(layer_name)
    if metadata is None:  # vLLM measures the memory that a step takes: states before, folded and after
        torch.empty(3 * PROMPTS_AT_ONCE, layer.layout.nbytes, dtype=torch.uint8, device=y.device)
        y.zero_()
        return
    layer.read(q, k, v, log_g, y, metadata)


def _positions(positions: Tensor, shifted: Tensor, layer_name: str) -> None:
    layer, metadata = _layer_and_metadata(layer_name)
    shifted.copy_(positions)
    if metadata is None:
        return
    record, decoding, prompts = layer.pages.record, metadata.num_decode_tokens, metadata.num_prefill_tokens
    if decoding:
        base, ragged = record[decoding_slots(metadata).clamp(min=0).long(), BASE], metadata.ragged
        shifted[:decoding] += base.repeat_interleave(metadata.row_length) if ragged is None else base[ragged.row]
    if prompts:
        slots, borders = metadata.state_indices_tensor_p, metadata.query_start_loc_p
        assert slots is not None
        assert borders is not None
        base = record[slots.long(), BASE] * continues(record, metadata)
        rows = torch.arange(prompts, device=positions.device, dtype=borders.dtype)
        owner = torch.searchsorted(borders, rows, right=True) - 1
        shifted[decoding : decoding + prompts] += base[owner]


def _nothing(*arguments: Any) -> None:
    return None


direct_register_custom_op("power_retention_read", _read, mutates_args=["y"], fake_impl=_nothing)
direct_register_custom_op("power_retention_positions", _positions, mutates_args=["shifted"], fake_impl=_nothing)
