"""The trunk, as Hugging Face classes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils import logging
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from power_retention.errors import ArgumentError
from power_retention.layers import Piece, PowerRetentionMixer
from power_retention.layers.scan import ContextParallel
from power_retention.models.cache import PowerRetentionCache, PowerRetentionLayerCache
from power_retention.models.configuration import PowerRetentionConfig
from power_retention.models.parts import PowerRetentionRotaryEmbedding, build_mlp, build_norm, init_experts
from power_retention.ops import PowerState
from power_retention.ops.ring import FOLD_SIZE

logger = logging.get_logger(__name__)


def build_mixer(config: PowerRetentionConfig) -> PowerRetentionMixer:
    """The mixer that a configuration describes."""
    assert config.num_key_value_heads is not None  # filled in by the configuration
    assert config.head_dim is not None
    return PowerRetentionMixer(
        config.hidden_size,
        config.num_attention_heads,
        config.num_key_value_heads,
        config.head_dim,
        p=config.power,
        qkv_bias=config.qkv_bias,
        out_bias=config.out_bias,
        gate_bias=config.gate_bias,
        key_bias=config.key_bias,
        qk_norm_eps=config.rms_norm_eps if config.qk_norm else None,
        chunk_size=config.operator_chunk_size,
        softmax=config.use_exp,
    )


@dataclass
class PowerRetentionTrunkOutput(BaseModelOutputWithPast):
    """What the trunk returns.

    Attributes:
        states: the state after the last token of every layer, where asked for.
    """

    states: list[PowerState] | None = None


@dataclass
class PowerRetentionCausalLMOutput(CausalLMOutputWithPast):
    """What the language model returns.

    Attributes:
        states: see :class:`PowerRetentionTrunkOutput`.
    """

    states: list[PowerState] | None = None


HiddenLoss = Callable[[Tensor, nn.Module], Tensor | None]
"""A loss from the last hidden states ``[B, T, hidden]`` and the head, formed before any logits exist; None for none."""


class PowerRetentionDecoderLayer(GradientCheckpointingLayer):
    """Norm → mixer → residual, norm → MLP → residual."""

    def __init__(self, config: PowerRetentionConfig, layer: int) -> None:
        super().__init__()
        self.self_attn = build_mixer(config)
        self.mlp = build_mlp(config, layer)
        self.input_layernorm = build_norm(config)
        self.post_attention_layernorm = build_norm(config)

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        starts: Tensor | None = None,
        cache: PowerRetentionLayerCache | None = None,
        piece: Piece | None = None,
        state: PowerState | None = None,
    ) -> Tensor | tuple[Tensor, PowerState | None]:
        """``[B, T, hidden]`` → the same; the layer's cache, if any, is advanced.  With a piece also the state leaving it."""
        mixed, leaving = self.self_attn(
            self.input_layernorm(hidden_states),
            position_embeddings,
            mask=mask,
            cu_seqlens=cu_seqlens,
            starts=starts,
            memory=cache,
            piece=piece,
            state=state,
        )
        hidden_states = hidden_states + mixed
        mapped: Tensor = self.mlp(self.post_attention_layernorm(hidden_states))
        out = hidden_states + mapped
        return out if piece is None else (out, leaving)


class PowerRetentionPreTrainedModel(PreTrainedModel):
    """Loading, saving and initialisation."""

    config_class = PowerRetentionConfig
    config: PowerRetentionConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["PowerRetentionDecoderLayer"]  # noqa: RUF012
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _is_stateful = False  # its cache can take back what assisted decoding rejects
    _can_record_outputs = {"hidden_states": PowerRetentionDecoderLayer}  # noqa: RUF012

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, PowerRetentionMixer):
            module.reset_mixer_parameters()
        else:
            init_experts(module, self.config.initializer_range)

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        return True  # the library looks for its own decorator in our source; the experts are its own, elsewhere

    def _upload_modified_files(self, working_dir: str, *args: Any, **kwargs: Any) -> Any:
        """The last step of ``push_to_hub``: our card takes the place of the library's template."""
        from power_retention.models.card import write_card

        origin = self.config.name_or_path
        write_card(self.config, Path(working_dir), records=Path(origin) if origin else None)
        return super()._upload_modified_files(working_dir, *args, **kwargs)


class PowerRetentionModel(PowerRetentionPreTrainedModel):
    """Embedding, layers, final norm."""

    def __init__(self, config: PowerRetentionConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList(PowerRetentionDecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = build_norm(config)
        self.rotary_emb = PowerRetentionRotaryEmbedding(config)
        self.gradient_checkpointing = False
        self.context_parallel: ContextParallel | None = None
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: PowerRetentionCache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        cu_seqlens: Tensor | None = None,
        cu_seq_lens_q: Tensor | None = None,
        document_starts: Tensor | None = None,
        states: Sequence[PowerState] | None = None,
        return_states: bool = False,
        **kwargs: Any,
    ) -> PowerRetentionTrunkOutput:
        """Run the trunk.

        Args:
            input_ids: ``[B, T]``, or ``inputs_embeds`` ``[B, T, hidden]`` instead.
            attention_mask: ``[B, T]`` or, with a cache, ``[B, seen + T]``; 0 at padding, on whichever side.
            position_ids: ``[B or 1, T]``; by default they count the tokens that are no padding, on from the cache.
            past_key_values: the cache of earlier calls.
            use_cache: make a cache if there is none.
            cu_seqlens: borders of sequences packed into one row (without a cache).
            cu_seq_lens_q: the same, as the library's collators call it.  Without either, position ids that start again within
                a row, without a mask, say where its sequences begin (in a row that is no piece of something longer).
            document_starts: ``[B, T]``, True at tokens that begin a document.  Gates close there, so documents packed into the
                rows of any batch do not see each other, at the cost of unpacked rows; a first token need not be marked.
            states: what every layer has read of the row's sequence before (of the first one, if several are packed): the
                tokens are a piece of something longer, trained in pieces.  Gradients flow into them.  Give ``position_ids``
                too.  Generation keeps a cache instead.
            return_states: also return the states after the last token (of the last sequence); gradients flow out of them.

        Where ``context_parallel`` is set, the row is this rank's piece: all ranks hold equally many tokens, consecutive ones,
        ``cu_seqlens`` are the borders in all of them, ``position_ids`` those of this rank's, and ``states`` enter the
        first rank's piece and leave the last one's, given to and returned by every rank alike.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ArgumentError("Give exactly one of input_ids and inputs_embeds.")
        hidden_states = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        cu_seqlens = cu_seq_lens_q if cu_seqlens is None else cu_seqlens
        whole = states is None and not return_states and self.context_parallel is None
        unmarked = cu_seqlens is None and document_starts is None and whole
        if unmarked and position_ids is not None and past_key_values is None and attention_mask is None:
            cu_seqlens = packed_borders(position_ids)
        if past_key_values is None and use_cache and cu_seqlens is None:
            past_key_values = PowerRetentionCache(self.config.num_hidden_layers)
        check_cache(past_key_values)
        if past_key_values is not None and cu_seqlens is not None:
            raise ArgumentError(
                "Sequences packed with cu_seqlens are read without a cache; leave past_key_values to None."
            )
        tokens = hidden_states.shape[1]
        self._check_reach(tokens, past_key_values)
        mask = padding_mask(attention_mask, tokens)
        if position_ids is None:
            seen = 0 if past_key_values is None else past_key_values.get_seq_length()
            seen += 0 if self.context_parallel is None else self.context_parallel.rank * tokens
            positions = torch.arange(seen, seen + tokens, device=hidden_states.device).unsqueeze(0)
            position_ids = count_positions(positions, attention_mask, cu_seqlens, document_starts)
        position_embeddings = self.rotary_emb(hidden_states, position_ids)
        if not whole:
            if self.context_parallel is not None and document_starts is not None:
                raise ArgumentError(
                    "document_starts came with context parallelism, where no rank sees how far back a document began; say it "
                    "with cu_seqlens."
                )
            if past_key_values is not None:
                raise ArgumentError("States of pieces and a cache exclude each other; leave past_key_values to None.")
            return self._run_piece(
                hidden_states, position_embeddings, mask, cu_seqlens, document_starts, states, return_states
            )
        for i, layer in enumerate(self.layers):
            cache = None if past_key_values is None else past_key_values.layers[i]
            hidden_states = layer(hidden_states, position_embeddings, mask, cu_seqlens, document_starts, cache)
        return PowerRetentionTrunkOutput(last_hidden_state=self.norm(hidden_states), past_key_values=past_key_values)

    def _check_reach(self, tokens: int, cache: PowerRetentionCache | None) -> None:
        """Say once where a key bias is at positions that it may never have been trained at."""
        if not self.config.key_bias or torch.compiler.is_compiling():
            return
        reach, read = self.config.max_position_embeddings, tokens + (0 if cache is None else cache.get_seq_length())
        if read > reach:
            logger.warning_once(
                f"More than {reach:,} tokens are being read: the key biases of this model were learned at the positions of its "
                "parent, which are no more, and beyond them it gets worse unless it was trained there since. For long contexts "
                "convert its parent without them (power-retention convert, without --key-bias)."
            )

    def _run_piece(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        mask: Tensor | None,
        cu_seqlens: Tensor | None,
        starts: Tensor | None,
        states: Sequence[PowerState] | None,
        return_states: bool,
    ) -> PowerRetentionTrunkOutput:
        """The layers on a piece of a longer sequence."""
        self._check_states(states)
        tokens = hidden_states.shape[1]
        if self.context_parallel is None:
            piece = Piece.of(tokens, cu_seqlens, returns_state=return_states)
        else:
            piece = Piece.of_rank(
                self.context_parallel, tokens, cu_seqlens, continued=states is not None, returns_state=return_states
            )
        leaving: list[PowerState] = []
        for i, layer in enumerate(self.layers):
            state = None if states is None else states[i]
            hidden_states, left = layer(hidden_states, position_embeddings, mask, None, starts, None, piece, state)
            leaving.append(left)
        return PowerRetentionTrunkOutput(
            last_hidden_state=self.norm(hidden_states), states=leaving if return_states else None
        )

    def _check_states(self, states: Sequence[PowerState] | None) -> None:
        if states is not None and len(states) != len(self.layers):
            raise ArgumentError(
                f"states holds {len(states)} states; one for each of {len(self.layers)} layers was expected."
            )
        layer = self.layers[0]
        options = getattr(getattr(layer, "_gradient_checkpointing_func", None), "keywords", {})
        if self.training and layer.gradient_checkpointing and options.get("use_reentrant"):
            # It looks for tensors among a layer's own arguments only, and would drop the states' gradients in silence.
            raise ArgumentError(
                "Reentrant checkpointing loses the gradients of states; enable checkpointing with "
                '{"use_reentrant": False}.'
            )


class PowerRetentionForCausalLM(PowerRetentionPreTrainedModel, GenerationMixin):
    """A language model whose memory does not grow."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: PowerRetentionConfig) -> None:
        super().__init__(config)
        self.model = PowerRetentionModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @property
    def mixers(self) -> list[PowerRetentionMixer]:
        """The mixer of every layer, first to last."""
        layers = cast("list[PowerRetentionDecoderLayer]", list(self.model.layers))
        return [layer.self_attn for layer in layers]

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: PowerRetentionCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        hidden_loss: HiddenLoss | None = None,
        **kwargs: Any,
    ) -> PowerRetentionCausalLMOutput:
        """Next-token logits ``[B, T, vocab]`` and, with labels, their loss; other arguments as in the trunk.

        With ``hidden_loss`` there are no logits: it makes the loss from the last hidden states, here and not outside, for
        only here are the head's weights whole under FSDP.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        if hidden_loss is not None:
            return PowerRetentionCausalLMOutput(
                loss=hidden_loss(outputs.last_hidden_state, self.lm_head),
                hidden_states=outputs.hidden_states,
                states=outputs.states,
            )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return PowerRetentionCausalLMOutput(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            states=outputs.states,
        )

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> None:
        """Generation starts from our own cache, which can take back what speculation drafts; a kept one is continued."""
        if not self.config.keeps_state:
            generation_config.use_cache = False  # every token is read again: right, and as slow as that sounds
        if generation_config.use_cache is False or model_kwargs.get("inputs_embeds") is not None:
            # The library cannot cut these prompts, and Brumby's own field of that name would make it try.
            generation_config.prefill_chunk_size = None
        if generation_config.use_cache is False:
            return
        if generation_config.cache_implementation not in (None, "dynamic"):
            raise ArgumentError(
                f"cache_implementation={generation_config.cache_implementation!r} is a key/value cache; a power-retention "
                "model keeps a fixed state and makes its own cache: leave it unset."
            )
        cache = model_kwargs.get("past_key_values")
        if cache is None:
            drafts = max(generation_config.prompt_lookup_num_tokens or 0, generation_config.num_assistant_tokens or 0)
            fold_size = max(FOLD_SIZE, 1 << drafts.bit_length())
            model_kwargs["past_key_values"] = PowerRetentionCache(self.config.num_hidden_layers, fold_size=fold_size)
            return
        check_cache(cache)
        cache._is_user_defined = True


def check_cache(cache: object) -> None:
    """Refuse a cache of keys and values."""
    if cache is not None and not isinstance(cache, PowerRetentionCache):
        raise ArgumentError(
            f"past_key_values is a {type(cache).__name__}; a power-retention model needs a PowerRetentionCache. Pass None "
            "and keep the one that comes back."
        )


def padding_mask(attention_mask: Tensor | None, tokens: int) -> Tensor | None:
    """The mask of the last ``tokens`` positions as booleans ``[B, tokens]``, or None where nothing is padded."""
    if attention_mask is None:
        return None
    if attention_mask.ndim != 2 or attention_mask.shape[1] < tokens:
        raise ArgumentError(
            f"attention_mask must be [B, T] with 0 at padding and T ≥ {tokens}, not {list(attention_mask.shape)}: causality "
            "is built in, and other patterns have no recurrent form."
        )
    mask = attention_mask[:, -tokens:].bool()
    return None if not torch.compiler.is_compiling() and bool(mask.all()) else mask


def packed_borders(position_ids: Tensor) -> Tensor | None:
    """Borders of the sequences that position ids ``[B, T]`` start again for, ``[N + 1]``; None where each row is one sequence.

    Collators that pack without padding tell it this way only, and a state that is not cut there would leak.
    """
    if torch.compiler.is_compiling():
        return None  # a graph cannot depend on values: compiled training passes cu_seqlens
    starts = position_ids[:, 1:] <= position_ids[:, :-1]
    if not bool(starts.any()):
        return None
    if len(position_ids) > 1:
        raise ArgumentError(
            f"position_ids start again within rows of a batch of {len(position_ids)}; sequences can be packed into one row "
            "([1, T]) only."
        )
    borders = (starts[0].nonzero().flatten() + 1).tolist()
    return torch.tensor([0, *borders, position_ids.shape[1]], device=position_ids.device)


def count_positions(
    positions: Tensor, attention_mask: Tensor | None, cu_seqlens: Tensor | None, starts: Tensor | None = None
) -> Tensor:
    """``[B or 1, T]``: the given positions ``[1, T]``, less the padding or the packed sequences before each token.

    The key bias acts on rotated keys, so a token's own position matters and not only its distance to others.
    """
    if cu_seqlens is not None:
        borders = cu_seqlens.to(positions)
        return positions - borders[torch.bucketize(positions, borders, right=True) - 1]
    if starts is not None:
        return positions - torch.where(starts, positions, positions[:, :1]).cummax(-1).values
    if attention_mask is None:
        return positions
    padding = (attention_mask == 0).cumsum(-1)[:, -positions.shape[1] :]
    return (positions - padding).clamp(min=0)
