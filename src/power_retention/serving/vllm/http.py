"""Named states over HTTP, beside vLLM's own routes: ``vllm serve … --middleware power_retention.serving.vllm.http.States``.

The routes are those of :mod:`power_retention.serving.state_routes`.
Where the server has API keys, each key has states of its own.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from fastapi import FastAPI
from starlette.requests import Request

from power_retention.serving.state_routes import state_routes
from power_retention.serving.states import StateDirectory, owner_of
from power_retention.serving.vllm.admission import OWNER, directory_of

_AUTHENTICATION = "AuthenticationMiddleware"


class States:
    """Says whose states a request may use, and adds the routes to the server when the first request comes."""

    def __init__(self, app: Callable[..., Awaitable[None]]) -> None:
        self.app = app
        self.has_routes = False

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        server: FastAPI = scope["app"]
        if not self.has_routes:
            self.has_routes = True
            server.router.routes.extend(state_routes(_directory))
        # Without keys of its own the server checks none, and clients send what they like.
        has_keys = any(getattr(part.cls, "__name__", "") == _AUTHENTICATION for part in server.user_middleware)
        token = OWNER.set(owner_of(_key(scope)) if has_keys else "")
        try:
            await self.app(scope, receive, send)
        finally:
            OWNER.reset(token)


def _key(scope: dict[str, Any]) -> str:
    header = dict(scope["headers"]).get(b"authorization", b"").decode("latin-1")
    return str(header.partition(" ")[2])


def _directory(request: Request) -> StateDirectory:
    return directory_of(request.app.state.vllm_config, OWNER.get())
