"""Where the versions of vLLM that we claim differ in what the plugin uses; everything else they share.

| | 0.26 | 0.28 and later |
|---|---|---|
| names of metadata backends | one place for those of others, ``CUSTOM`` | any name can be registered |
| errors with a status | among the server's protocol | among vLLM's errors |
| prefix caching of states | keeps one for every block unless told not to | keeps those at the ends of prompts |
"""

from __future__ import annotations

from http import HTTPStatus
from typing import Any


def register_backend(name: str, path: str) -> Any:
    """Announce a metadata backend for states; harmless when called again.

    Returns:
        The member of vLLM's enumeration that stands for it.
    """
    from vllm.v1.attention.backends import registry

    members = registry.MambaAttentionBackendEnum
    if name in members.__members__:
        return members[name]
    takes_names = hasattr(members, "register")
    member: Any = name if takes_names else members.CUSTOM
    registry.register_backend(member, path, is_mamba=True)
    return members[name] if takes_names else member


def error_with_status(message: str, status: int) -> Exception:
    """An error that servers answer with a status of its own, in streams too."""
    try:
        from vllm.exceptions import GenerationError
    except ImportError:
        from vllm.entrypoints.openai.engine.protocol import GenerationError
    error: Exception = GenerationError(message)
    error.status_code = HTTPStatus(status)  # type: ignore[attr-defined]
    return error


def keep_states_at_ends_and_between(cache: Any) -> None:
    """With prefix caching, let vLLM keep the states it passes when a step ends, of answers too.

    Args:
        cache: vLLM's ``CacheConfig``.
    """
    if cache.mamba_cache_mode == "none":
        cache.mamba_cache_mode = "align"
    if getattr(cache, "prefix_cache_retention_interval", None) == 0:
        cache.prefix_cache_retention_interval = None
