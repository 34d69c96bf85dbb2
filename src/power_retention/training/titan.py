"""The same model in torchtitan, for tensor and pipeline parallelism: written for its version 0.3, imported by nobody else here.

A configuration of torchtitan's trainer takes :func:`titan_spec` as its ``model_spec``::

    # my_configs.py
    from power_retention.training.titan import titan_spec

    def my_model():
        return Trainer.Config(
            model_spec=titan_spec("my-model"),
            hf_assets_path="my-model",
            checkpoint=CheckpointManager.Config(enable=True, initial_load_in_hf=True),
            parallelism=ParallelismConfig(spmd_backend="partial_dtensor", tensor_parallel_degree=4, ...),
            ...
        )

What it trains there is the next-token loss: no teacher, no alignment.  Layers are those of the model itself; sharding,
schedules, activation checkpointing and the loop are torchtitan's.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from torchtitan.config import TORCH_DTYPE_MAP
from torchtitan.distributed.fsdp import apply_fsdp_to_decoder
from torchtitan.distributed.pipeline_parallel import pipeline_llm
from torchtitan.protocols.model import BaseModel
from torchtitan.protocols.model_spec import ModelSpec
from torchtitan.protocols.state_dict_adapter import StateDictAdapter
from transformers import AutoConfig

from power_retention.errors import ArgumentError, SourceError
from power_retention.layers import PowerRetentionMixer
from power_retention.models import PowerRetentionConfig, PowerRetentionForCausalLM
from power_retention.models.parts import PowerRetentionRotaryEmbedding
from power_retention.models.sizes import attention_flops, parameters_read
from power_retention.training.tensor_parallel import check_tensor_parallel, divide_layer

_OURS = {"tok_embeddings": "model.embed_tokens", "layers": "model.layers", "norm": "model.norm", "lm_head": "lm_head"}
"""Their names of the parts of a decoder, and ours."""


class TitanModel(BaseModel):
    """Embedding, our layers, norm and head under torchtitan's names; parts that another pipeline stage holds are None.

    Args:
        config: names the folder of a power-retention model.
    """

    _skip_lm_head = False  # set where the loss applies the head itself, in chunks

    @dataclass(kw_only=True, slots=True)
    class Config(BaseModel.Config):  # noqa: D106
        folder: str

        @property
        def ours(self) -> PowerRetentionConfig:
            """The model's own configuration."""
            return _read_config(self.folder)

        @property
        def layers(self) -> range:
            """As many as there are layers; torchtitan counts them."""
            return range(self.ours.num_hidden_layers)

        def update_from_config(self, *, config: Any, **kwargs: Any) -> None:
            """Refuse what the trainer's configuration asks for and this adapter does not do."""
            parallelism = config.parallelism
            check_tensor_parallel(self.ours, parallelism.tensor_parallel_degree)
            for name in ("context_parallel_degree", "expert_parallel_degree"):
                if getattr(parallelism, name) > 1:
                    raise ArgumentError(
                        f"{name} = {getattr(parallelism, name)}: this adapter has data, tensor and pipeline parallelism."
                    )
            if parallelism.spmd_backend != "partial_dtensor":
                raise ArgumentError(f'spmd_backend = {parallelism.spmd_backend!r}; set "partial_dtensor".')

        def get_nparams_and_flops(self, model: nn.Module, seq_len: int) -> tuple[int, int]:
            """(parameters, operations a token forward and backward)."""
            forward = 2 * parameters_read(self.ours) + attention_flops(self.ours, seq_len)
            return sum(value.numel() for value in model.parameters()), int(3 * forward)

    def __init__(self, config: TitanModel.Config) -> None:
        super().__init__()
        ours = config.ours
        model = PowerRetentionForCausalLM(ours)
        self.ours = ours
        self.enable_weight_tying = ours.tie_word_embeddings
        self.tok_embeddings: nn.Module | None = model.model.embed_tokens
        self.layers = nn.ModuleDict({str(i): layer for i, layer in enumerate(model.model.layers)})
        self.norm: nn.Module | None = model.model.norm
        self.lm_head: nn.Module | None = model.lm_head

    def forward(self, tokens: Tensor, positions: Tensor | None = None, attention_masks: Any = None) -> Tensor:
        """Next-token logits, or what the next pipeline stage goes on from.

        Args:
            tokens: ``[B, T]`` ids, or ``[B, T, hidden]`` from the stage before.
            positions: ``[B, T]``; where they start again, so does a document, which sees nothing of those before.
            attention_masks: there are none.
        """
        hidden: Tensor = tokens if self.tok_embeddings is None else self.tok_embeddings(tokens)
        starts = None if positions is None else positions == 0
        if positions is None:
            positions = torch.arange(hidden.shape[1], device=hidden.device)[None]
        embeddings = self._rotary(hidden.device)(hidden, positions)
        for layer in self.layers.values():
            hidden = layer(hidden, embeddings, None, None, starts)
        hidden = hidden if self.norm is None else self.norm(hidden)
        return hidden if self.lm_head is None or self._skip_lm_head else self.lm_head(hidden)

    def init_states(self, *, buffer_device: torch.device | None = None) -> None:
        """Random weights, which a checkpoint usually replaces."""
        std = self.ours.initializer_range
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=std)
                if getattr(module, "bias", None) is not None:
                    nn.init.zeros_(module.bias)  # type: ignore[arg-type]
            elif "Norm" in type(module).__name__:
                nn.init.ones_(module.weight)  # type: ignore[arg-type]
                if getattr(module, "bias", None) is not None:
                    nn.init.zeros_(module.bias)  # type: ignore[arg-type]
        for module in self.modules():
            if isinstance(module, PowerRetentionMixer):
                module.reset_mixer_parameters()

    def verify_module_protocol(self) -> None:
        """Our modules are PyTorch's own, which nothing here asks to be more."""

    def _rotary(self, device: torch.device) -> PowerRetentionRotaryEmbedding:
        # No part of the model: every stage needs it, it has no weights, and made on the meta device it would stay empty.
        found: PowerRetentionRotaryEmbedding | None = self.__dict__.get("rotary")
        if found is None or found.inv_freq.device != device:
            found = PowerRetentionRotaryEmbedding(self.ours).to(device)
            self.__dict__["rotary"] = found
        return found


class TitanWeights(StateDictAdapter):  # type: ignore[misc]
    """Weights under torchtitan's names and under ours."""

    def to_hf(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """To ours."""
        tied = self.model_config.ours.tie_word_embeddings
        return {
            _renamed(name, _OURS): value
            for name, value in state_dict.items()
            if not (tied and name == "lm_head.weight" and "tok_embeddings.weight" in state_dict)
        }

    def from_hf(self, hf_state_dict: dict[str, Any]) -> dict[str, Any]:
        """From ours."""
        theirs = {
            _renamed(name, {ours: name_ for name_, ours in _OURS.items()}): value
            for name, value in hf_state_dict.items()
        }
        if self.model_config.ours.tie_word_embeddings and "tok_embeddings.weight" in theirs:
            theirs["lm_head.weight"] = theirs["tok_embeddings.weight"]
        return theirs

    def get_hf_storage_reader(self, path: str, from_quantized: bool = False) -> HuggingFaceStorageReader:
        """Reads the safetensors of a folder."""
        if from_quantized:
            raise SourceError("Quantized weights cannot be trained here; give the model in bfloat16 or float32.")
        return HuggingFaceStorageReader(path)


def titan_spec(folder: str | Path) -> ModelSpec:
    """What torchtitan's trainer needs to know of a power-retention model without experts.

    Args:
        folder: of the model, as ``convert`` writes it.

    Raises:
        SourceError: there is none.
        ArgumentError: it has experts, whose weights have other names in files than in memory.
    """
    config = _read_config(str(folder))
    if config.num_local_experts:
        raise ArgumentError(
            "Models with experts are not handed to torchtitan; `retrain` under torchrun divides their data."
        )
    return ModelSpec(
        name="power_retention",
        flavor=Path(folder).name,
        model=TitanModel.Config(folder=str(folder)),
        parallelize_fn=parallelize_titan,
        pipelining_fn=pipeline_llm,
        post_optimizer_build_fn=None,
        state_dict_adapter=TitanWeights,
    )


def parallelize_titan(
    model: TitanModel,
    *,
    parallel_dims: Any,
    training: Any,
    parallelism: Any,
    compile_config: Any,
    ac_config: Any,
    dump_folder: str,
) -> TitanModel:
    """Tensor parallelism, activation checkpointing, compilation, then FSDP, in place; arguments as torchtitan gives them."""
    layers = list(model.layers.values())
    if parallel_dims.tp_enabled:
        for layer in layers:
            divide_layer(layer, parallel_dims.get_mesh("tp"))
    if ac_config is not None:
        ac_config.build(dump_folder=dump_folder).apply(model)
    if compile_config.enable and "model" in compile_config.components:
        for layer in model.layers.values():
            layer.compile(backend=compile_config.backend)
    replicated = ["dp_replicate"] if parallel_dims.dp_replicate_enabled else []
    apply_fsdp_to_decoder(
        model,
        parallel_dims.get_mesh([*replicated, "fsdp"]),
        param_dtype=TORCH_DTYPE_MAP[training.mixed_precision_param],
        reduce_dtype=TORCH_DTYPE_MAP[training.mixed_precision_reduce],
        pp_enabled=parallel_dims.pp_enabled,
        cpu_offload=training.enable_cpu_offload,
        reshard_after_forward_policy=parallelism.fsdp_reshard_after_forward,
    )
    return model


def _read_config(folder: str) -> PowerRetentionConfig:
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise SourceError(
            f"{folder} holds no model ({error}); `power-retention convert SOURCE {folder}` makes one."
        ) from error
    if not isinstance(config, PowerRetentionConfig):
        raise SourceError(
            f"{folder} is a {config.model_type!r} model; `power-retention convert` turns a Transformer into ours."
        )
    return config


def _renamed(name: str, names: Mapping[str, str]) -> str:
    for before, after in names.items():
        if re.match(rf"{re.escape(before)}\.", name):
            return after + name.removeprefix(before)
    return name
