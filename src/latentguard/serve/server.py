"""Runs a service: starts, drains on SIGTERM, and ends with the right exit code."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn

from latentguard.errors import LatentGuardError
from latentguard.serve.app import build_app
from latentguard.serve.audit_log import AuditLog
from latentguard.serve.config import ServeConfig
from latentguard.serve.drift import DriftReference
from latentguard.serve.engine import Opener, ScoringEngine
from latentguard.serve.keys import ApiKeys
from latentguard.serve.limits import TimedProtocol
from latentguard.serve.service import Service
from latentguard.serve.telemetry import Telemetry

CONNECTIONS = 1024
"""Open connections; more get 503."""


class Server(uvicorn.Server):
    """Ends quietly on a signal, and with a failure if the scoring thread has ended."""

    failure: BaseException | None = None
    _taken: socket.socket | None = None

    def listen(self) -> socket.socket:
        """Take the port, once, before anything is loaded.

        Raises:
            LatentGuardError: if it cannot be had.
        """
        if self._taken is None:
            host, port = self.config.host, self.config.port
            family = socket.AF_INET6 if ":" in host else socket.AF_INET
            try:
                self._taken = socket.create_server((host, port), family=family)
            except OSError as error:
                reason = str(error.strerror).split(" (")[0]  # Python says the address once more
                raise LatentGuardError(
                    f"Cannot listen on {host}, port {port} ({reason}); free it, or give another."
                ) from None
        return self._taken

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Drain on SIGTERM and SIGINT; unlike the parent's, do not raise the signal again."""
        loop = asyncio.get_running_loop()
        main = threading.current_thread() is threading.main_thread()
        signals = (signal.SIGTERM, signal.SIGINT) if main else ()
        for one in signals:
            loop.add_signal_handler(one, self.handle_exit, one, None)
        try:
            yield
        finally:
            for one in signals:
                loop.remove_signal_handler(one)

    def fail(self, error: BaseException) -> None:
        """Stop serving: nobody may take the silence of a dead guard for consent."""
        self.failure, self.should_exit = error, True


def create_server(
    opener: Opener,
    config: ServeConfig,
    *,
    keys: ApiKeys | None = None,
    audit: AuditLog | None = None,
    reference: DriftReference | None = None,
    **how: Any,
) -> Server:
    """A server that is ready to run; ``how`` goes to uvicorn (``host``, ``port``)."""
    reference = reference or DriftReference()
    telemetry = Telemetry(reference.scores)
    engine = ScoringEngine(opener, config, on_batch=telemetry.batch)
    service = Service(config, engine, telemetry, keys or ApiKeys(), audit, reference)
    telemetry.gauge("queue_prompts", "Prompts that wait.", lambda: engine.waiting)
    telemetry.gauge("chats", "Chats that are being answered.", lambda: engine.active_chats)
    telemetry.gauge("ready", "1 when verdicts can be asked for.", lambda: engine.state == "ready")
    telemetry.gauge("crashes", "Recent crashes of the thread.", lambda: len(engine.crashes))
    telemetry.gauge(
        "audit_lost_lines", "Lines that the disk did not take.", lambda: audit.lost if audit else 0
    )
    server = Server(uvicorn.Config(build_app(service), **_settings(config), **how))
    engine.on_death = server.fail
    return server


def run(server: Server) -> int:
    """Serve until a signal comes or the guard fails; 0 or 1, for the exit code."""
    try:
        server.run([server.listen()])
    except LatentGuardError as error:
        server.failure = error
    if server.failure is None and server.started:
        return 0
    logging.getLogger("latentguard.serve").error("Stopped: %s", server.failure or "did not start")
    return 1


def exit_process(code: int) -> None:
    """ReplyEnd the process even if a thread is stuck inside the model."""
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _settings(config: ServeConfig) -> dict[str, Any]:
    class Protocol(TimedProtocol):
        read_seconds, write_seconds = config.read_seconds, config.write_seconds

    return dict(
        http=Protocol,
        ws="none",
        loop="asyncio",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        log_level="warning",
        limit_concurrency=CONNECTIONS,
        h11_max_incomplete_event_size=config.max_header,
        timeout_graceful_shutdown=int(config.drain),
        timeout_keep_alive=int(max(5, config.read_seconds)),
    )
