"""The process that serves: who hears where it listens, and how it ends.

Asked to end, it takes no further requests and gives answers that are being written some seconds; asked again, none.  Those that
are not complete by then end with status 503 and a sentence, and nothing is left to be cut off.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from types import FrameType
from typing import Any

import uvicorn
from starlette.applications import Starlette

from power_retention.serving.server.batcher import Batcher

_SECONDS_TO_SAY_IT = 10
"""How long clients may take to hear that their answers have ended."""


class ServerProcess(uvicorn.Server):
    """Serves until SIGINT or SIGTERM.

    Args:
        app: of the routes.
        batcher: of the answers.
        patience: seconds that answers have when the process is asked to end.
        listening: called with the socket's address when requests are taken.
        ending: called with the number of answers that are waited for, where there are some.
    """

    def __init__(
        self,
        app: Starlette,
        batcher: Batcher,
        *,
        patience: float,
        listening: Callable[[tuple[Any, ...]], None],
        ending: Callable[[int], None],
    ) -> None:
        # Where the limit is reached, uvicorn cancels requests and shows tracebacks of that.
        limit = int(patience) + _SECONDS_TO_SAY_IT
        super().__init__(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=limit))
        self.batcher, self.patience, self.listening, self.ending = batcher, patience, listening, ending
        self.impatient = False

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to listen."""
        await super().startup(sockets)
        if self.started:
            self.listening(self.servers[0].sockets[0].getsockname())

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """End; asked a second time, soon."""
        if self.should_exit:
            self.impatient = True
        else:
            super().handle_exit(sig, frame)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Wait for answers, and end those that take too long."""
        if answers := self._answers():
            self.ending(answers)
        closing = asyncio.create_task(self._close())
        await super().shutdown(sockets)
        await closing

    def _answers(self) -> int:
        load = self.batcher.load
        return sum(load[what] for what in ("writing", "reading", "waiting", "saving"))

    async def _close(self) -> None:
        deadline = asyncio.get_running_loop().time() + self.patience
        while self._answers() and not self.impatient and asyncio.get_running_loop().time() < deadline:
            await asyncio.sleep(0.05)
        await asyncio.to_thread(self.batcher.close)
