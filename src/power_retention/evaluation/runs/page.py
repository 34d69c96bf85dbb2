"""One page that needs nothing but itself, and a server on this machine that keeps it up to date."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.resources import files
from typing import Any

from power_retention.errors import ArgumentError, PowerRetentionError

HOST = "127.0.0.1"


def render_page(value: dict[str, Any], *, live: bool = False) -> str:
    """The page as HTML: style, script and data are inside, and nothing is fetched from anywhere.

    Args:
        value: see :func:`~power_retention.evaluation.runs.records.read_runs`.
        live: ask the server it came from for newer data.
    """
    data = json.dumps(value, allow_nan=False).replace("<", "\\u003c")  # nothing in a name can end the element
    parts = {"style": _asset("page.css"), "data": data, "script": _asset("page.js"), "live": str(live).lower()}
    return re.sub(r"\{\{(\w+)\}\}", lambda mark: parts[mark[1]], _asset("page.html"))


class RunsServer(ThreadingHTTPServer):
    """Serves the page and its data to this machine alone.

    Args:
        read: gives the data as it is now.
        port: 0 for any that is free.

    Raises:
        ArgumentError: the port is taken.
    """

    daemon_threads = True

    def __init__(self, read: Callable[[], dict[str, Any]], port: int = 0) -> None:
        self.read = read
        try:
            super().__init__((HOST, port), _Handler)
        except (OSError, OverflowError) as error:
            raise ArgumentError(
                f"Port {port} cannot be served ({error}); choose another with --port, or 0 for any that is free."
            ) from error

    @property
    def url(self) -> str:
        return f"http://{HOST}:{self.server_address[1]}/"


class _Handler(BaseHTTPRequestHandler):
    server: RunsServer
    server_version, sys_version = "power-retention", ""

    def do_GET(self) -> None:
        # A page from elsewhere may have its own name resolved to this machine: only our own names are answered.
        if self.headers.get("Host", "").rpartition(":")[0] not in (HOST, "localhost"):
            self.send_error(HTTPStatus.FORBIDDEN)
        elif self.path == "/":
            self._answer("text/html", lambda: render_page(self.server.read(), live=True))
        elif self.path == "/data.json":
            self._answer("application/json", lambda: json.dumps(self.server.read(), allow_nan=False))
        else:
            self.send_error(HTTPStatus.NOT_FOUND)

    def log_message(self, format: str, *args: Any) -> None:
        """A line for each question of each page would bury what the command says."""

    def _answer(self, kind: str, content: Callable[[], str]) -> None:
        try:
            body = content().encode()
        except PowerRetentionError as error:
            self.send_error(HTTPStatus.SERVICE_UNAVAILABLE, explain=str(error))
            return
        tag = f'"{hashlib.sha256(body).hexdigest()[:32]}"'
        fresh = self.headers.get("If-None-Match") != tag
        self.send_response(HTTPStatus.OK if fresh else HTTPStatus.NOT_MODIFIED)
        self.send_header("ETag", tag)
        self.send_header("Cache-Control", "no-cache")
        if fresh:
            self.send_header("Content-Type", f"{kind}; charset=utf-8")
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if fresh:
            self.wfile.write(body)


def _asset(name: str) -> str:
    return files("power_retention.evaluation.runs").joinpath(name).read_text(encoding="utf-8")
