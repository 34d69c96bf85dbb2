"""vLLM's configuration, looked over once before anything starts: our options, what is refused, how many users fit."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from vllm.config import CUDAGraphMode, KVTransferConfig, ModelConfig, VllmConfig
from vllm.logger import init_logger
from vllm.model_executor.models.config import MambaModelConfig
from vllm.platforms import current_platform

from power_retention.errors import ArgumentError
from power_retention.models import PowerRetentionConfig
from power_retention.models.sizes import count_parameters
from power_retention.serving.vllm.page import FOLD_SIZE, PageLayout
from power_retention.serving.vllm.versions import keep_states_at_ends_and_between

logger = init_logger(f"vllm.{__name__}")  # vLLM prints what its own loggers say

_STATE_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
WIDEST_KERNEL = 256
"""Head width up to which decoding has a kernel, at p = 2."""

LONGEST_FOLD = 128
"""Likewise for ``fold_size``."""

OVERHEAD = 1.5e9
"""Bytes that libraries and graphs take beside a model, a guess on the safe side."""

_MIDDLEWARE = "power_retention.serving.vllm.http.States"
_QUANTISED = ("compressed-tensors", "gptq", "auto_gptq", "gptq_marlin", "awq", "auto_awq", "awq_marlin")
_ROPE_BY_LENGTH = ("dynamic", "longrope")


@dataclass(frozen=True)
class ServingOptions:
    """What ``--additional-config '{"power_retention": {…}}'`` may hold.

    Attributes:
        states: folder of states with names; None: requests may name none.
        max_states: how many states one owner may keep.
        max_bytes: bytes that all states together may take; None: as the disk allows.
        state_dtype: of the states in memory, ``"float32"`` or ``"bfloat16"``.
        fold_size: L, tokens a decoding sequence keeps beside its state before it folds them in.
    """

    states: Path | None = None
    max_states: int = 1000
    max_bytes: int | None = None
    state_dtype: str = "float32"
    fold_size: int = FOLD_SIZE

    @classmethod
    def of(cls, vllm_config: VllmConfig) -> ServingOptions:
        """The options that an engine was started with."""
        given: Any = vllm_config.additional_config
        given = given.get("power_retention", {}) if isinstance(given, dict) else {}
        known = {item.name for item in fields(cls)}
        if not isinstance(given, dict) or not set(given) <= known:
            raise ArgumentError(
                f"--additional-config power_retention={given!r} is not understood; it may hold {', '.join(sorted(known))}."
            )
        options = cls(**given)
        if options.state_dtype not in _STATE_DTYPES:
            raise ArgumentError(
                f"state_dtype must be one of {', '.join(_STATE_DTYPES)}, not {options.state_dtype!r}: other dtypes cannot "
                "hold a state."
            )
        return options if options.states is None else cls(**{**given, "states": Path(options.states)})


def page_layout(vllm_config: VllmConfig) -> PageLayout:
    """What one sequence keeps in one layer of one worker."""
    options = ServingOptions.of(vllm_config)
    return PageLayout.of(
        vllm_config.model_config.hf_config,
        vllm_config.parallel_config.tensor_parallel_size,
        fold_size=options.fold_size,
        dtype=vllm_config.model_config.dtype,
        state_dtype=_STATE_DTYPES[options.state_dtype],
    )


class EngineConfig(MambaModelConfig):
    """vLLM's hook for models with states, and ours before and after it."""

    @classmethod
    def verify_and_update_config(cls, vllm_config: VllmConfig) -> None:
        """Refuse what would be wrong, in a sentence, and set what follows from the size of a state."""
        refuse_unsupported(vllm_config)
        keep_prefixes_of_conversations(vllm_config.cache_config)
        super().verify_and_update_config(vllm_config)
        if vllm_config.cache_config.mamba_cache_mode == "all":
            raise ArgumentError(
                "--mamba-cache-mode all would keep a state for every block of a prompt, which our prompts do not leave behind; "
                "use align."
            )
        fit_users(vllm_config)
        fit_drafts(vllm_config)
        connect_states(vllm_config)
        keep_out_of_graphs(vllm_config)


def refuse_unsupported(vllm_config: VllmConfig) -> None:
    """Raise an error for the first thing asked for that cannot be served right."""
    model, parallel, speculation = vllm_config.model_config, vllm_config.parallel_config, vllm_config.speculative_config
    config: PowerRetentionConfig = model.hf_config
    rope_type = (config.rope_parameters or {}).get("rope_type", "default")
    reasons = {
        "this model keeps no state (its power is too high for the width of its heads, or use_exp is set): serve it with "
        "transformers": not config.keeps_state,
        "models with experts cannot be served through vLLM yet: serve it with transformers": config.num_local_experts
        > 0,
        f"rotary embeddings of type {rope_type!r} depend on a sequence's length, which its state cannot follow: serve it with "
        "transformers": rope_type in _ROPE_BY_LENGTH,
        "speculative decoding takes drafts from the text itself only: use "
        '--speculative-config \'{"method": "ngram", …}\'': speculation is not None and speculation.method != "ngram",
        f"weights quantised as {model.quantization} are not supported: quantise them with compressed-tensors, GPTQ or AWQ, or "
        "serve the model in bfloat16": model.quantization not in (None, *_QUANTISED),
        "--pipeline-parallel-size is not supported: share the heads among GPUs with --tensor-parallel-size": (
            parallel.pipeline_parallel_size > 1
        ),
        "context parallelism makes no sense where nothing grows with the context: leave it out": (
            max(parallel.decode_context_parallel_size, getattr(parallel, "prefill_context_parallel_size", 1)) > 1
        ),
        "a state is no cache of keys and values: leave --kv-transfer-config out, and name states instead": (
            vllm_config.kv_transfer_config is not None
        ),
        "--kv-cache-dtype is for keys and values: use state_dtype in --additional-config": (
            vllm_config.cache_config.cache_dtype != "auto"
        ),
    }
    for reason, applies in reasons.items():
        if applies:
            raise ArgumentError(f"{model.model}: {reason}.")


def fit_drafts(vllm_config: VllmConfig) -> None:
    """Make sure that every draft can be taken back: that it stands in a ring."""
    speculation, scheduler = vllm_config.speculative_config, vllm_config.scheduler_config
    if speculation is None:
        return
    drafts, places = speculation.num_speculative_tokens, ServingOptions.of(vllm_config).fold_size
    if drafts >= places:
        raise ArgumentError(
            f"num_speculative_tokens={drafts} drafts and the token before them do not fit beside a state with fold_size "
            f"{places}: use at most {places - 1}, or a larger fold_size in --additional-config."
        )
    if vllm_config.use_v2_model_runner:
        raise ArgumentError(
            "Speculative decoding keeps one state a sequence, which vLLM's second model runner does not do: set "
            "VLLM_USE_V2_MODEL_RUNNER=0."
        )
    if scheduler.scheduler_cls is not None:
        raise ArgumentError("Speculative decoding needs a scheduler of ours: leave --scheduler-cls out.")
    scheduler.scheduler_cls = "power_retention.serving.vllm.scheduler.DraftScheduler"


def keep_out_of_graphs(vllm_config: VllmConfig) -> None:
    """Keep out of CUDA graphs of whole steps what they do not allow.

    Where decoding has no kernel, its plain form looks at values.  With drafts, rows differ in length; and where by chance they
    do not, vLLM would take a fresh prompt of that length for one of them.
    """
    model = vllm_config.model_config
    config: PowerRetentionConfig = model.hf_config
    folds = ServingOptions.of(vllm_config).fold_size
    has_kernel = config.power == 2 and (config.head_dim or 0) <= WIDEST_KERNEL and folds <= LONGEST_FOLD
    as_graphs = has_kernel and vllm_config.speculative_config is None
    if not as_graphs and not model.enforce_eager and current_platform.is_cuda():
        vllm_config.compilation_config.cudagraph_mode = CUDAGraphMode.PIECEWISE


def connect_states(vllm_config: VllmConfig) -> None:
    """Where states have names, let vLLM ask us before each step what to load and save."""
    if ServingOptions.of(vllm_config).states is None:
        return
    if vllm_config.parallel_config.data_parallel_size > 1:
        raise ArgumentError(
            "Named states are not shared among the engines of --data-parallel-size: start one server a GPU on one folder."
        )
    if vllm_config.lora_config is not None:
        raise ArgumentError(
            "Named states are of the model without adapters: leave --enable-lora out, or states in --additional-config."
        )
    has_keys = bool(os.environ.get("VLLM_API_KEY")) or any(word.startswith("--api-key") for word in sys.argv)
    if has_keys and not any(_MIDDLEWARE in word for word in sys.argv):
        raise ArgumentError(
            f"With API keys, each is to have states of its own: add --middleware {_MIDDLEWARE} to the command."
        )
    vllm_config.kv_transfer_config = KVTransferConfig(
        kv_connector="StateConnector",
        kv_connector_module_path="power_retention.serving.vllm.connector",
        kv_role="kv_both",
        kv_load_failure_policy="fail",
    )
    # A state is written between two steps, and the next must not have begun.
    vllm_config.scheduler_config.async_scheduling = False


def keep_prefixes_of_conversations(cache: Any) -> None:
    """With prefix caching, keep states of answers too: the next message of a conversation goes on from there.

    A state is large and copied at the border of a block, so blocks are larger than those of keys and values.
    """
    if not cache.enable_prefix_caching:
        return
    if not getattr(cache, "user_specified_block_size", False):
        cache.block_size = 128
    keep_states_at_ends_and_between(cache)


def fit_users(vllm_config: VllmConfig) -> None:
    """Let no more sequences run at once than there is memory for states, and say how many that is."""
    config: PowerRetentionConfig = vllm_config.model_config.hf_config
    scheduler = vllm_config.scheduler_config
    user = page_layout(vllm_config).nbytes * config.num_hidden_layers
    pages = int(memory_for_states(vllm_config) // user) - 1  # vLLM keeps the first page free
    if vllm_config.cache_config.num_gpu_blocks_override is not None:
        pages = vllm_config.cache_config.num_gpu_blocks_override - 1
    # With prefix caching a sequence moves from page to page, and needs both for a moment.
    users = pages // 2 if vllm_config.cache_config.enable_prefix_caching else pages
    if users < 1:
        raise ArgumentError(
            f"The state of one user takes {user / 1e6:,.0f} MB, and not one fits beside the weights: give the engine more "
            "memory (--gpu-memory-utilization, --kv-cache-memory-bytes), or use state_dtype bfloat16."
        )
    scheduler.max_num_seqs = min(scheduler.max_num_seqs, users)
    logger.info(
        "A user's state takes %.1f MB whatever was read: memory for about %d users, up to %d served at once.",
        user / 1e6,
        users,
        scheduler.max_num_seqs,
    )


def memory_for_states(vllm_config: VllmConfig) -> float:
    """Bytes a worker will have for pages: what was asked for, or else an estimate before anything is loaded."""
    cache, model = vllm_config.cache_config, vllm_config.model_config
    if cache.kv_cache_memory_bytes is not None:
        return float(cache.kv_cache_memory_bytes)
    if current_platform.is_cpu() and os.environ.get("VLLM_CPU_KVCACHE_SPACE"):
        return float(os.environ["VLLM_CPU_KVCACHE_SPACE"]) * (1 << 30)
    workers = vllm_config.parallel_config.tensor_parallel_size
    total: float = current_platform.get_device_total_memory() * cache.gpu_memory_utilization
    weights = bytes_of_weights(model) / workers
    width = max(model.hf_config.vocab_size, 8 * model.hf_config.hidden_size, 4 * model.hf_config.intermediate_size)
    activations = 4.0 * vllm_config.scheduler_config.max_num_batched_tokens * width / workers
    return float(0.97 * (total - weights - activations - OVERHEAD))


def bytes_of_weights(model: ModelConfig) -> float:
    """What a model's weights take on all workers together: of quantised ones, what their files do."""
    files = Path(model.model).glob("model*.safetensors") if model.quantization is not None else ()
    return sum(file.stat().st_size for file in files) or count_parameters(model.hf_config) * model.dtype.itemsize
