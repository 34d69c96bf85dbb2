"""Which rows of a batch decode, which read a prompt, and in which page the state of each is: vLLM's own bookkeeping."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor
from vllm.v1.attention.backend import AttentionBackend
from vllm.v1.attention.backends.mamba_attn import BaseMambaAttentionMetadata, BaseMambaAttentionMetadataBuilder


@dataclass
class PowerRetentionMetadata(BaseMambaAttentionMetadata):
    """Decoding rows come first, one token each; then the prompts, one after the other.

    Attributes:
        prompt_borders: where each prompt begins among the prompts' tokens, and where the last ends; known without asking the
            device.
    """

    prompt_borders: tuple[int, ...] = ()

    @classmethod
    def of_one_token(cls, page: int, device: torch.device) -> PowerRetentionMetadata:
        """One token that goes on from what stands in a page."""

        def numbers(*values: int) -> Tensor:
            return torch.tensor(values, dtype=torch.int32, device=device)

        given: dict[str, Any] = {
            "num_prefills": 1,
            "num_prefill_tokens": 1,
            "num_decodes": 0,
            "num_decode_tokens": 0,
            "num_reqs": 1,
            "has_initial_states_p": numbers(1).bool(),
            "query_start_loc_p": numbers(0, 1),
            "state_indices_tensor_p": numbers(page),
            "seq_lens": numbers(1),
            "prompt_borders": (0, 1),
        }
        # Versions of vLLM differ in what else there is, none of which we read.
        values: dict[str, Any] = dict.fromkeys(item.name for item in fields(cls))
        return cls(**(values | given))


class PowerRetentionMetadataBuilder(BaseMambaAttentionMetadataBuilder[PowerRetentionMetadata]):
    """vLLM's, without what a convolution needs."""

    metadata_cls = PowerRetentionMetadata
    needs_causal_conv1d_metadata = False

    def build(
        self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False, **more: Any
    ) -> PowerRetentionMetadata:
        """The rows of one step."""
        metadata: PowerRetentionMetadata = super().build(common_prefix_len, common_attn_metadata, fast_build, **more)
        if not metadata.num_prefills:
            return metadata
        borders = common_attn_metadata.query_start_loc_cpu[-metadata.num_prefills - 1 :]
        return replace(metadata, prompt_borders=tuple((borders - metadata.num_decode_tokens).tolist()))


class PowerRetentionBackend(AttentionBackend):
    """Names the builder; the computing is the layer's."""

    @staticmethod
    def get_name() -> str:
        return "POWER_RETENTION"

    @staticmethod
    def get_builder_cls() -> type[PowerRetentionMetadataBuilder]:
        return PowerRetentionMetadataBuilder

    @classmethod
    def is_ssm(cls) -> bool:
        return True
