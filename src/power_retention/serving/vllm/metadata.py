"""Which rows of a batch decode, which read a prompt, and in which page the state of each is: vLLM's own bookkeeping."""

from __future__ import annotations

from dataclasses import dataclass

from vllm.v1.attention.backend import AttentionBackend
from vllm.v1.attention.backends.mamba_attn import BaseMambaAttentionMetadata, BaseMambaAttentionMetadataBuilder


@dataclass
class PowerRetentionMetadata(BaseMambaAttentionMetadata):
    """Decoding rows come first, one token each; then the prompts, one after the other."""


class PowerRetentionMetadataBuilder(BaseMambaAttentionMetadataBuilder[PowerRetentionMetadata]):
    """vLLM's, without what a convolution needs."""

    metadata_cls = PowerRetentionMetadata
    needs_causal_conv1d_metadata = False


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
