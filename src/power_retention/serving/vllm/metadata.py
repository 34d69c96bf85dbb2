"""Which rows of a batch decode, which read a prompt, and in which page the state of each is: vLLM's own bookkeeping."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor
from vllm.v1.attention.backend import AttentionBackend
from vllm.v1.attention.backends.mamba_attn import BaseMambaAttentionMetadata, BaseMambaAttentionMetadataBuilder


@dataclass(frozen=True)
class Ragged:
    """Decoding rows of different lengths, side by side in a rectangle ``[R, T]`` of T = the longest.

    Attributes:
        token: int64 ``[R, T]``: which of the N decoding tokens stands there; any, where a row has ended.
        there: ``[R, T]``: whether one does.
        row, place: int64 ``[N]``: where in the rectangle each token stands.
    """

    token: Tensor
    there: Tensor
    row: Tensor
    place: Tensor

    @classmethod
    def of(cls, borders: Tensor, device: torch.device) -> Ragged:
        """Of ``[R + 1]`` places, on the CPU, at which the rows begin and the last ends."""
        lengths, first = borders.diff().long(), borders[:-1].long()
        within = torch.arange(int(lengths.max()))
        row = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
        token = (first.unsqueeze(1) + within).clamp(max=int(borders[-1]) - 1)
        parts = token, within < lengths.unsqueeze(1), row, torch.arange(len(row)) - first[row]
        return cls(*(part.to(device, non_blocking=True) for part in parts))


@dataclass
class PowerRetentionMetadata(BaseMambaAttentionMetadata):
    """Decoding rows come first, one token and its drafts each; then the prompts, one after the other.

    Attributes:
        prompt_borders: where each prompt begins among the prompts' tokens, and where the last ends; known without asking the
            device.
        row_length: tokens of the longest decoding row.
        ragged: how decoding rows stand among the tokens; None where all are as long.
    """

    prompt_borders: tuple[int, ...] = ()
    row_length: int = 1
    ragged: Ragged | None = None

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
        if self.use_spec_decode:
            # Only that there is such a count makes vLLM take drafts for decoding. How many were accepted our pages know.
            more["num_accepted_tokens"] = common_attn_metadata.query_start_loc.diff()
            begun = None
        else:
            common_attn_metadata, begun = one_token_each(common_attn_metadata)
        metadata: PowerRetentionMetadata = super().build(common_prefix_len, common_attn_metadata, fast_build, **more)
        if begun is not None:
            assert metadata.state_indices_tensor_d is not None
            pages = metadata.state_indices_tensor_d[begun.to(self.device), 0].long()
            for name in self.layer_names:
                self.vllm_config.compilation_config.static_forward_context[name].begin(pages)
        borders = common_attn_metadata.query_start_loc_cpu
        if metadata.num_decodes and self.use_spec_decode:
            metadata = self._with_drafts(metadata, borders[: metadata.num_decodes + 1])
        if not metadata.num_prefills:
            return metadata
        borders = borders[-metadata.num_prefills - 1 :] - metadata.num_decode_tokens
        return replace(metadata, prompt_borders=tuple(borders.tolist()))

    def _with_drafts(self, metadata: PowerRetentionMetadata, borders: Tensor) -> PowerRetentionMetadata:
        lengths = borders.diff()
        longest = int(lengths.max())
        even = bool(((lengths == longest) | (lengths == 0)).all())  # of no length: what fills a graph
        ragged = None if even else Ragged.of(borders, self.device)
        return replace(metadata, row_length=longest, ragged=ragged)


def one_token_each(common: Any) -> tuple[Any, Tensor | None]:
    """A step of one token a request is one of decoding, also where a prompt begins with it.

    vLLM replays the graph of a decoding step wherever the numbers of tokens fit, whatever the metadata says.

    Returns:
        The step, and which rows begin: their pages are to be emptied. None where none does.
    """
    prefilling = common.is_prefilling
    if common.max_query_len != 1 or prefilling is None or not bool(prefilling.any()):
        return common, None
    begun = (prefilling & (common.seq_lens_cpu_upper_bound <= 1)).nonzero().flatten()
    return common.replace(is_prefilling=torch.zeros_like(prefilling)), begun if len(begun) else None


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
