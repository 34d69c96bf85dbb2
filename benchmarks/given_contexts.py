"""A connector for vLLM that says it has every context already, so that long ones can be timed without being read.

A request whose ``extra_args`` hold ``{"context": "given"}`` is taken to have its whole prompt but the last token in the
cache.  Nothing is loaded: its pages hold whatever they held, and attention over them takes the time it takes.
"""

from __future__ import annotations

from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1, KVConnectorMetadata


class GivenContexts(KVConnectorBase_V1):
    """Both halves, the scheduler's and the workers'."""

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int, bool]:
        """The tokens that need not be read, and that they are there at once."""
        extra = getattr(request.sampling_params, "extra_args", None) or {}
        given = request.num_prompt_tokens - 1 if extra.get("context") == "given" else 0
        return max(given - num_computed_tokens, 0), False

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        """There is nothing to load."""

    def build_connector_meta(self, scheduler_output: Any) -> KVConnectorMetadata:
        """Nothing for the workers to do."""
        return KVConnectorMetadata()

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        """There is nothing to load."""

    def wait_for_layer_load(self, layer_name: str) -> None:
        """There is nothing to load."""

    def save_kv_layer(self, layer_name: str, kv_layer: Any, attn_metadata: Any, **kwargs: Any) -> None:
        """Nothing is kept."""

    def wait_for_save(self) -> None:
        """Nothing is kept."""
