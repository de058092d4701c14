"""Runs a service: starts, drains on SIGTERM, and ends with the right exit code."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import ssl
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import uvicorn

from latentguard.errors import LatentGuardError
from latentguard.guard.latent_guard import LatentGuard
from latentguard.guard.second_opinion import SecondOpinion
from latentguard.serve.app import build_app, build_health_app
from latentguard.serve.audit_log import AuditLog
from latentguard.serve.config import ServeConfig
from latentguard.serve.connections import Connections, listen, require_file_descriptors
from latentguard.serve.drift import DriftReference
from latentguard.serve.engine import Opener, ScoringEngine
from latentguard.serve.errors import ReloadFailed
from latentguard.serve.keys import ApiKeys
from latentguard.serve.limits import TimedProtocol
from latentguard.serve.reload import Reloader, ServedFiles
from latentguard.serve.review import ServiceReview
from latentguard.serve.second_opinion import OpinionThreads
from latentguard.serve.served_guards import Binder, ServedGuards, verified
from latentguard.serve.service import Service
from latentguard.serve.telemetry import Telemetry

if TYPE_CHECKING:  # an extra
    from latentguard.serve.open_telemetry import OpenTelemetry


HEALTH_CONNECTIONS = 48
"""Open connections of the health port; half as many from one address."""


@dataclass(frozen=True)
class GuardSource:
    """Where guards come from, beside the one that is loaded with the model."""

    named_guards: Mapping[str, LatentGuard] = field(default_factory=dict)
    """Other guards of the same model."""

    shadow: LatentGuard | None = None
    """Judges what the default guard judges, and decides nothing until it is promoted."""

    bind: Binder = verified
    """Lets a guard meet the model."""

    read: Callable[[], ServedFiles] | None = None
    """Reads all guards and keys anew; None if that cannot be done."""

    second_opinion: SecondOpinion | None = None
    """Decides in the review band; whatever loads the first model loads it, too."""


class ListeningServer(uvicorn.Server):
    """Takes its port before anything is loaded."""

    _socket: socket.socket | None = None

    def __init__(self, config: uvicorn.Config, connections: Connections) -> None:
        """Prepare.

        Args:
            config: What is served, and where.
            connections: How many there may be.
        """
        super().__init__(config)
        self._connections = connections

    def listen(self) -> socket.socket:
        """Take the port, once.

        Raises:
            LatentGuardError: if it cannot be had.
        """
        if self._socket is None:
            self._socket = listen(self.config.host, self.config.port, self._connections)
        return self._socket

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        """Serve on the port."""
        await super().serve(sockets or [self.listen()])


class Server(ListeningServer):
    """Ends quietly on a signal, and with a failure if the scoring thread has ended."""

    failure: BaseException | None = None
    service: Service
    health: HealthServer | None = None
    """Health and metrics on a port of their own."""

    reloader: Reloader | None = None
    """Reads guards and keys anew."""

    _reloading: asyncio.Task[None] | None = None

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        """Serve until a signal comes, and health for as long."""
        if self.health is None:
            await super().serve(sockets)
            return
        health = asyncio.create_task(self.health.serve())
        try:
            await super().serve(sockets)
        finally:
            self.health.should_exit = True
            await health

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Drain on SIGTERM and SIGINT, reload on SIGHUP; do not raise a signal again.

        Afterwards they are ignored: the process is about to end by its own exit code.
        """
        loop = asyncio.get_running_loop()
        handlers: dict[signal.Signals, Callable[[], object]] = {
            signal.SIGTERM: self._close_soon,
            signal.SIGINT: partial(self.handle_exit, signal.SIGINT, None),
            signal.SIGHUP: self._reload,
        }
        if threading.current_thread() is not threading.main_thread():
            handlers = {}
        for number, handler in handlers.items():
            # by asyncio's own handlers a signal would kill for a moment, once they are removed
            signal.signal(number, partial(_call_soon, loop, handler))
        try:
            yield
        finally:
            for number in handlers:
                signal.signal(number, signal.SIG_IGN)

    def _close_soon(self) -> None:
        """Be not ready at once, and take no more connections a while later.

        A second signal closes at once, and so does the first while nobody was served yet.
        """
        is_served = self.service.is_ready
        self.service.is_closing = True
        delay = self.service.config.close_delay if is_served else 0.0
        asyncio.get_running_loop().call_later(delay, self.handle_exit, signal.SIGTERM, None)

    def _reload(self) -> None:
        """Open the audit log anew, then read guards and keys anew."""
        self._reloading = asyncio.create_task(self._reopen_and_reload())

    async def _reopen_and_reload(self) -> None:
        await asyncio.to_thread(self.service.reopen_audit)  # it waits for a line on its way
        if self.reloader is not None:
            with suppress(ReloadFailed):  # the reason is in the log
                await self.reloader.reload()

    def _renew_certificate(self) -> None:
        """Load the certificate; one that cannot be used would leave the context with half of it."""
        assert self.config.ssl is not None
        assert self.config.ssl_certfile is not None
        for context in (ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), self.config.ssl):
            context.load_cert_chain(self.config.ssl_certfile, self.config.ssl_keyfile, password="")

    def use_reloader(self, reloader: Reloader) -> None:
        """Let guards, keys and the certificate be read anew."""
        self.reloader = reloader
        if self.config.ssl_certfile is not None:
            reloader.renew_certificate = self._renew_certificate

    def fail(self, error: BaseException) -> None:
        """Stop serving: nobody may take the silence of a dead guard for consent."""
        self.failure, self.should_exit = error, True


def _call_soon(
    loop: asyncio.AbstractEventLoop, handler: Callable[[], object], _number: int, _frame: object
) -> None:
    loop.call_soon_threadsafe(handler)


class HealthServer(ListeningServer):
    """Serves health and metrics; it leaves signals to the other."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Do nothing."""
        yield


def create_server(
    opener: Opener,
    config: ServeConfig,
    *,
    keys: ApiKeys | None = None,
    audit: AuditLog | None = None,
    reference: DriftReference | None = None,
    guards: GuardSource = GuardSource(),
    open_telemetry: OpenTelemetry | None = None,
    **how: Any,
) -> Server:
    """A server that is ready to run.

    Args:
        opener: Loads the default guard and the model.
        config: Policies and limits.
        keys: Who may come in.
        audit: Where verdicts are written.
        reference: What scores are compared with.
        guards: The other guards, a second opinion, and how guards are read anew.
        open_telemetry: Where traces and metrics go, beside Prometheus.
        how: For uvicorn (``host``, ``port``).
    """
    reference = reference or DriftReference()
    telemetry = Telemetry(reference.scores, open_telemetry)
    meet = partial(
        ServedGuards.meet,
        named_guards=guards.named_guards,
        bind=guards.bind,
        shadow=guards.shadow,
        sources=(config.guard, config.shadow),
    )
    engine = ScoringEngine(opener, config, meet=meet, on_batch=telemetry.batch)
    service = Service(config, engine, telemetry, keys or ApiKeys(), audit, reference)
    if guards.second_opinion is not None:
        service.second_opinion = OpinionThreads(guards.second_opinion, config.deadline)
    if config.review_labels is not None:
        service.review = ServiceReview(service)
    _add_gauges(service)
    connections = Connections(config.max_connections, config.max_connections_per_address)
    server = Server(uvicorn.Config(build_app(service), **_settings(config), **how), connections)
    server.service = service
    if guards.read is not None:
        server.use_reloader(Reloader(service, guards.read, guards.bind))
    if config.health_port is not None:
        address: dict[str, Any] = dict(host=config.health_host, port=config.health_port)
        health = build_health_app(service, server.reloader)
        settings = _settings(config) | dict(lifespan="off") | address
        connections = Connections(HEALTH_CONNECTIONS, HEALTH_CONNECTIONS // 2)
        server.health = HealthServer(uvicorn.Config(health, **settings), connections)
    engine.on_death = server.fail
    return server


def _add_gauges(service: Service) -> None:
    engine = service.engine
    audit = service.audit
    gauge = service.telemetry.gauge
    gauge("queue_prompts", "Prompts that wait.", lambda: engine.waiting)
    gauge("chats", "Chats that are being answered.", lambda: engine.active_chats)
    gauge("ready", "1 when verdicts can be asked for.", lambda: service.is_ready)
    gauge("crashes", "Recent crashes of the thread.", lambda: len(engine.crashes))
    promoted = "1 while the guard of --shadow decides."
    gauge("promoted", promoted, lambda: engine.is_loaded and engine.guards.is_promoted)
    lost = "Lines that the disk did not take."
    gauge("audit_lost_lines", lost, lambda: audit.lost if audit else 0)


@contextmanager
def signals_before_serving() -> Iterator[None]:
    """End with exit code 0 on SIGTERM, as nobody is served yet; ignore SIGHUP: all is read anyway.

    By default SIGHUP would kill, and the first process of a container would not heed SIGTERM.
    """
    handlers: dict[signal.Signals, Any] = {
        signal.SIGTERM: lambda *_: exit_process(0),
        signal.SIGHUP: signal.SIG_IGN,
    }
    if threading.current_thread() is not threading.main_thread():
        handlers = {}
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def run(server: Server) -> int:
    """Serve until a signal comes or the guard fails; 0 or 1, for the exit code.

    Signals are ignored afterwards: the process is to end.
    """
    config = server.service.config
    try:
        require_file_descriptors(config.max_connections, has_upstream=config.upstream is not None)
        if server.health is not None:
            server.health.listen()
        server.listen()
        server.run()
    except LatentGuardError as error:
        server.failure = error
    if server.failure is None and server.started:
        return 0
    logging.getLogger("latentguard.serve").error("Stopped: %s", server.failure or "did not start")
    return 1


def exit_process(code: int) -> None:
    """End the process even if a thread is stuck inside the model."""
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _settings(config: ServeConfig) -> dict[str, Any]:
    class Protocol(TimedProtocol):
        read_seconds, write_seconds = config.read_seconds, config.write_seconds

    return dict(
        ws="none",
        loop="asyncio",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        log_level="warning",
        log_config=None,  # logs.py says where lines go
        http=Protocol,
        h11_max_incomplete_event_size=config.max_header,
        timeout_graceful_shutdown=int(config.drain),
        timeout_keep_alive=int(max(5, config.read_seconds)),
    )
