"""Named states over HTTP, beside vLLM's own routes: ``vllm serve … --middleware power_retention.serving.vllm.http.States``.

    GET    /v1/states                 list
    GET    /v1/states/NAME            inspect
    POST   /v1/states/NAME/fork       {"to": "OTHER"}
    DELETE /v1/states/NAME

Where the server has API keys, each key has states of its own.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import asdict
from typing import Any

from fastapi import APIRouter, Body, FastAPI, Request
from fastapi.responses import JSONResponse

from power_retention.errors import PowerRetentionError
from power_retention.serving.states import FullDirectory, MissingState, NamedState, StateDirectory, owner_of
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
            server.include_router(router)
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


router = APIRouter(prefix="/v1/states")


@router.get("")
def list_states(request: Request) -> Any:
    """All states of the owner, newest first."""
    return _answer(request, lambda states: {"object": "list", "data": [_described(state) for state in states.list()]})


@router.get("/{name}")
def inspect_state(request: Request, name: str) -> Any:
    """What one state says about itself."""
    return _answer(request, lambda states: _described(states.inspect(name)))


@router.post("/{name}/fork")
def fork_state(request: Request, name: str, to: str = Body(embed=True)) -> Any:
    """A copy under another name."""

    def fork(states: StateDirectory) -> dict[str, Any]:
        states.fork(name, to)
        return _described(states.inspect(to))

    return _answer(request, fork)


@router.delete("/{name}")
def delete_state(request: Request, name: str) -> Any:
    """Forget a state."""

    def delete(states: StateDirectory) -> dict[str, Any]:
        states.delete(name)
        return {"id": name, "object": "state", "deleted": True}

    return _answer(request, delete)


def _answer(request: Request, act: Callable[[StateDirectory], dict[str, Any]]) -> Any:
    try:
        return act(directory_of(request.app.state.vllm_config, OWNER.get()))
    except PowerRetentionError as error:
        status = 404 if isinstance(error, MissingState) else 507 if isinstance(error, FullDirectory) else 400
        return JSONResponse({"error": {"message": str(error), "type": type(error).__name__, "code": status}}, status)


def _described(state: NamedState) -> dict[str, Any]:
    return {"id": state.name, "object": "state", "bytes": state.nbytes, **asdict(state.header)}
