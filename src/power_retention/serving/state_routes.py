"""States with names over HTTP, the same routes at every server of ours.

GET    /v1/states                 list
GET    /v1/states/NAME            inspect
POST   /v1/states/NAME/fork       {"to": "OTHER"}
DELETE /v1/states/NAME
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from power_retention.errors import ArgumentError, OutputError, PowerRetentionError
from power_retention.serving.states import FullDirectory, MissingState, NamedState, StateDirectory, TakenName

FindDirectory = Callable[[Request], StateDirectory]
"""The states that a request may use; an error of ours where there are none."""


def state_routes(find: FindDirectory) -> list[Route]:
    """The routes, for any Starlette application."""

    async def list_states(request: Request) -> JSONResponse:
        return await _answer(lambda: {"object": "list", "data": [_described(state) for state in find(request).list()]})

    async def inspect_state(request: Request) -> JSONResponse:
        return await _answer(lambda: _described(find(request).inspect(_name(request))))

    async def fork_state(request: Request) -> JSONResponse:
        body = await request.body()

        def fork() -> dict[str, Any]:
            states, copy = find(request), _copy_named_in(body)
            states.fork(_name(request), copy)
            return _described(states.inspect(copy))

        return await _answer(fork)

    async def delete_state(request: Request) -> JSONResponse:
        def delete() -> dict[str, Any]:
            find(request).delete(_name(request))
            return {"id": _name(request), "object": "state", "deleted": True}

        return await _answer(delete)

    return [
        Route("/v1/states", list_states, methods=["GET"]),
        Route("/v1/states/{name}", inspect_state, methods=["GET"]),
        Route("/v1/states/{name}/fork", fork_state, methods=["POST"]),
        Route("/v1/states/{name}", delete_state, methods=["DELETE"]),
    ]


def error_response(error: PowerRetentionError, status: int | None = None) -> JSONResponse:
    """An error of ours as OpenAI's clients expect it."""
    status = status or status_of(error)
    return JSONResponse(error_body(error, status), status)


def error_body(error: PowerRetentionError, status: int) -> dict[str, Any]:
    """What says an error in an answer, or in a stream that has begun."""
    return {"error": {"message": str(error), "type": type(error).__name__, "code": status}}


def status_of(error: PowerRetentionError) -> int:
    """The HTTP status that says whose fault it is."""
    for kind, status in ((MissingState, 404), (TakenName, 409), (FullDirectory, 507), (OutputError, 500)):
        if isinstance(error, kind):
            return status
    return 400


async def _answer(act: Callable[[], dict[str, Any]]) -> JSONResponse:
    try:
        return JSONResponse(await run_in_threadpool(act))
    except PowerRetentionError as error:
        return error_response(error)


def _name(request: Request) -> str:
    return str(request.path_params["name"])


def _copy_named_in(body: bytes) -> str:
    try:
        return str(json.loads(body)["to"])
    except (ValueError, KeyError, TypeError):
        raise ArgumentError('The body names no copy; {"to": "NAME"} was expected.') from None


def _described(state: NamedState) -> dict[str, Any]:
    return {"id": state.name, "object": "state", "bytes": state.nbytes, **asdict(state.header)}
