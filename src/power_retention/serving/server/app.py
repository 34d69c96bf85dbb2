"""The HTTP side: OpenAI's routes and those of named states, in front of a batcher."""

from __future__ import annotations

import asyncio
import hmac
import json
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from power_retention.errors import ArgumentError, PowerRetentionError
from power_retention.ops.layout import state_width
from power_retention.serving.server.batcher import Batcher, Ended, Event, Question, ServerFailure, TooBusy
from power_retention.serving.server.fields import Wishes, messages_of, prompts_of, wishes_of
from power_retention.serving.server.replies import Reply, Written
from power_retention.serving.state_routes import error_body, error_response, state_routes, status_of
from power_retention.serving.states import MissingState, StateDirectory, check_fits, owner_of, verified


@dataclass(frozen=True)
class ServerOptions:
    """What a server allows.

    Attributes:
        name: what the model is called.
        states: folder of named states; None: none are kept.
        max_states, max_bytes: what one owner may keep there.
        keys: API keys, each with states of its own; none: everybody may ask, and all states are everybody's.
        max_prompt_tokens: of one prompt.
        max_tokens: of one answer.
        max_body: bytes of one request.
    """

    name: str
    states: Path | None = None
    max_states: int = 1000
    max_bytes: int | None = None
    keys: tuple[str, ...] = ()
    max_prompt_tokens: int = 1_000_000
    max_tokens: int = 4096
    max_body: int = 64_000_000


class MissingModel(ArgumentError):
    """A model that is not served here."""


class TooLarge(ArgumentError):
    """A request of more bytes than are read."""


def make_app(batcher: Batcher, options: ServerOptions) -> Starlette:
    """The application, which closes the batcher when it is shut down."""
    service = Service(batcher, options)

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        if options.states is not None:
            StateDirectory(options.states).remove_remains()
        yield
        await run_in_threadpool(batcher.close)

    routes = [
        Route("/health", service.health, methods=["GET"]),
        Route("/v1/models", service.models, methods=["GET"]),
        Route("/v1/completions", service.completions, methods=["POST"]),
        Route("/v1/chat/completions", service.chat_completions, methods=["POST"]),
        *state_routes(service.directory_of),
    ]
    app = Starlette(routes=routes, lifespan=lifespan, exception_handlers={404: _no_route, 405: _no_route})
    app.add_middleware(_Keys, keys=options.keys)
    return app


async def _no_route(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    routes = "/v1/completions, /v1/chat/completions (POST), /v1/models, /v1/states and /health (GET)"
    asked = f"{request.method} {request.url.path}"
    return error_response(ArgumentError(f"Nothing answers {asked} here; there are {routes}."), error.status_code)


class _Keys:
    """Lets those in who have a key, and notes whose states are theirs."""

    def __init__(self, app: ASGIApp, keys: Sequence[str]) -> None:
        self.app, self.keys = app, tuple(keys)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            request, owner = Request(scope), ""
            if self.keys and request.url.path != "/health":
                scheme, _, key = request.headers.get("authorization", "").partition(" ")
                # Every key is compared, so that the time taken tells nothing.
                known = [hmac.compare_digest(key.encode(), known.encode()) for known in self.keys]
                if scheme.lower() != "bearer" or not any(known):
                    refusal = ArgumentError("This server wants an API key; send it as a bearer token.")
                    await error_response(refusal, 401)(scope, receive, send)
                    return
                owner = owner_of(key)
            scope.setdefault("state", {})["owner"] = owner
        await self.app(scope, receive, send)


class Service:
    """The routes of the model."""

    def __init__(self, batcher: Batcher, options: ServerOptions) -> None:
        self.batcher, self.options = batcher, options
        self.started = int(time.time())

    async def health(self, request: Request) -> Response:
        """Whether it runs, and how busy it is."""
        return JSONResponse({"status": "ok", **self.batcher.load})

    async def models(self, request: Request) -> Response:
        """The one model there is."""
        card = {"id": self.options.name, "object": "model", "created": self.started, "owned_by": "power-retention"}
        return JSONResponse({"object": "list", "data": [card]})

    async def completions(self, request: Request) -> Response:
        """Continue prompts."""
        return await self._reply(request, chat=False)

    async def chat_completions(self, request: Request) -> Response:
        """Answer a conversation."""
        return await self._reply(request, chat=True)

    def directory_of(self, request: Request) -> StateDirectory:
        """The states that a request may use.

        Raises:
            ArgumentError: this server keeps none.
        """
        options = self.options
        if options.states is None:
            raise ArgumentError("This server keeps no states; start it with --states FOLDER.")
        return StateDirectory(
            options.states, max_states=options.max_states, max_bytes=options.max_bytes, owner=request.state.owner
        )

    async def _reply(self, request: Request, *, chat: bool) -> Response:
        questions: list[Question] = []
        try:
            body = await self._body(request)
            self._check_model(body.get("model"))
            wishes = wishes_of(body, chat=chat)
            prompts = await run_in_threadpool(self._prompts, body, wishes, chat)
            heard = _Heard()
            questions = await run_in_threadpool(self._questions, request, wishes, prompts, heard)
            self.batcher.ask(*questions)
        except ClientDisconnect:
            return Response(status_code=400)
        except PowerRetentionError as error:
            _withdraw(questions)
            return error_response(error, _status(error))
        reply = Reply(self.options.name, self.batcher.tokenizer, wishes, prompts, chat=chat)
        gone = asyncio.create_task(_abort_when_gone(request, questions, heard))
        if wishes.stream:
            return StreamingResponse(_stream(reply, heard, questions, gone), media_type="text/event-stream")
        return await _whole(reply, heard, questions, gone)

    async def _body(self, request: Request) -> dict[str, Any]:
        content = bytearray()
        async for part in request.stream():
            content += part
            if len(content) > self.options.max_body:
                raise TooLarge(f"The request has more than {self.options.max_body:,} bytes; send less.")
        try:
            body = json.loads(content)
        except (ValueError, RecursionError) as error:
            raise ArgumentError(f"The request is no JSON: {error}.") from None
        if not isinstance(body, dict):
            raise ArgumentError("The request is JSON, and no object; an object was expected.")
        return body

    def _check_model(self, name: Any) -> None:
        if name is not None and name != self.options.name:
            raise MissingModel(f"There is no model {name!r} here; {self.options.name!r} is served.")

    def _prompts(self, body: dict[str, Any], wishes: Wishes, chat: bool) -> list[list[int]]:
        tokenizer = self.batcher.tokenizer
        prompts: list[str | list[int]]
        if chat:
            if not tokenizer.chat_template:
                raise ArgumentError(
                    "This model has no chat template; ask it at /v1/completions, or start the server with --chat-template FILE."
                )
            try:
                text = tokenizer.apply_chat_template(messages_of(body), add_generation_prompt=True, tokenize=False)
            except ArgumentError:
                raise
            except Exception as error:  # templates raise what they like about roles they do not know
                raise ArgumentError(f"The model's chat template refuses these messages: {error}.") from error
            wishes, prompts = replace(wishes, special_tokens=False), [str(text)]
        else:
            prompts = prompts_of(body)
        return [self._tokens(prompt, wishes) for prompt in prompts]

    def _tokens(self, prompt: str | list[int], wishes: Wishes) -> list[int]:
        if isinstance(prompt, str):
            if any("\ud800" <= sign <= "\udfff" for sign in prompt):
                raise ArgumentError("A prompt holds half a character (a lone surrogate), which is no text.")
            prompt = list(self.batcher.tokenizer(prompt, add_special_tokens=wishes.special_tokens)["input_ids"])
        size, most = self.batcher.model.config.vocab_size, self.options.max_prompt_tokens
        if not prompt:
            raise ArgumentError("A prompt is empty; at least one token was expected.")
        if len(prompt) > most:
            raise ArgumentError(f"A prompt has {len(prompt):,} tokens; this server reads up to {most:,} a request.")
        if not all(0 <= token < size for token in prompt):
            raise ArgumentError(f"A prompt holds a token id that the model does not have: they are 0 to {size - 1:,}.")
        return prompt

    def _questions(self, request: Request, wishes: Wishes, prompts: list[list[int]], heard: _Heard) -> list[Question]:
        most = self.options.max_tokens
        if wishes.max_tokens is not None and wishes.max_tokens > most:
            raise ArgumentError(f"max_tokens={wishes.max_tokens:,}; this server writes up to {most:,} a request.")
        if wishes.answers > self.batcher.users:
            raise ArgumentError(f"n={wishes.answers}; this server writes up to {self.batcher.users} answers at a time.")
        save = self._place_to_save(request, wishes, prompts)
        questions: list[Question] = []
        try:
            for number, prompt in enumerate(prompts):
                questions.append(
                    Question(
                        prompt,
                        heard.of(number * wishes.answers),
                        answers=wishes.answers,
                        max_tokens=wishes.max_tokens or most,
                        draw=wishes.draw,
                        seed=wishes.seed,
                        stop=wishes.stop,
                        stop_tokens=wishes.stop_tokens,
                        ignore_eos=wishes.ignore_eos,
                        logprobs=wishes.logprobs,
                        start=self._start(request, wishes),
                        save=save,
                    )
                )
        except BaseException:
            _withdraw(questions)
            raise
        return questions

    def _start(self, request: Request, wishes: Wishes) -> Path | None:
        """The state to start from, checked and held on to."""
        if not wishes.state:
            return None
        pinned = self.directory_of(request).pin(wishes.state)
        try:
            check_fits(
                wishes.state, verified(wishes.state, pinned, self.batcher.fingerprint), self.batcher.model.config
            )
        except BaseException:
            pinned.unlink(missing_ok=True)
            raise
        return pinned

    def _place_to_save(
        self, request: Request, wishes: Wishes, prompts: list[list[int]]
    ) -> tuple[StateDirectory, str] | None:
        if not wishes.save_state:
            return None
        if len(prompts) > 1:
            raise ArgumentError(f"save_state keeps one answer, and {len(prompts)} prompts came: send one.")
        directory = self.directory_of(request)
        directory.check_room(wishes.save_state, self._state_bytes())
        return directory, wishes.save_state

    def _state_bytes(self) -> int:
        config = self.batcher.model.config
        d, heads = config.head_dim, config.num_key_value_heads
        assert d is not None  # filled in by the configuration
        assert heads is not None
        return 4 * config.num_hidden_layers * heads * state_width(d, config.power) * (d + 1)


class _Heard:
    """What the batcher tells of all answers to a request, handed over to the event loop."""

    def __init__(self) -> None:
        self.loop, self.queue = asyncio.get_running_loop(), asyncio.Queue[tuple[int, Event] | None]()

    def of(self, first: int) -> Callable[[Event], None]:
        """The ear of a question whose first answer has that number."""

        def tell(event: Event) -> None:
            with suppress(RuntimeError):  # the loop has ended: nobody is left to hear
                self.loop.call_soon_threadsafe(self.queue.put_nowait, (first + event.choice, event))

        return tell

    async def events(self, answers: int) -> AsyncIterator[tuple[int, Event]]:
        """Everything told, until all answers have ended or the client has gone."""
        while answers:
            told = await self.queue.get()
            if told is None:
                return
            answers -= isinstance(told[1], Ended)
            yield told


async def _abort_when_gone(request: Request, questions: Sequence[Question], heard: _Heard) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
    _abandon(questions)
    heard.queue.put_nowait(None)


def _abandon(questions: Sequence[Question]) -> None:
    for question in questions:
        question.abort()


def _withdraw(questions: Sequence[Question]) -> None:
    """Let go of what questions hold that the batcher never got."""
    for question in questions:
        question.forget_start()


async def _whole(reply: Reply, heard: _Heard, questions: Sequence[Question], gone: asyncio.Task[None]) -> Response:
    answers = [Written() for _ in reply.offsets]
    try:
        async for index, event in heard.events(len(answers)):
            if isinstance(event, Ended) and event.error:
                return error_response(event.error, _status(event.error))
            answers[index].add(event)
    finally:
        gone.cancel()
        _abandon(questions)
    return JSONResponse(reply.whole(answers))


async def _stream(
    reply: Reply, heard: _Heard, questions: Sequence[Question], gone: asyncio.Task[None]
) -> AsyncIterator[str]:
    try:
        for piece in reply.opening():
            yield _event(piece)
        async for index, event in heard.events(len(reply.offsets)):
            if isinstance(event, Ended) and event.error:
                yield _event(error_body(event.error, _status(event.error)))
                break
            if (grown := reply.piece(index, event)) is not None:
                yield _event(grown)
        else:
            for piece in reply.closing():
                yield _event(piece)
        yield "data: [DONE]\n\n"
    finally:
        gone.cancel()
        _abandon(questions)


def _event(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n"


def _status(error: PowerRetentionError) -> int:
    for kind, status in ((TooBusy, 503), (TooLarge, 413), (MissingModel, 404), (ServerFailure, 500)):
        if isinstance(error, kind):
            return status
    # In a request, a state that is not there is one wrong value among its fields; vLLM sees it the same way.
    return 400 if isinstance(error, MissingState) else status_of(error)
