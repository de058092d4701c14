"""The verb ``serve``; what is heavy is imported inside."""

from __future__ import annotations

import inspect
import logging
import os
import re
from dataclasses import fields
from functools import partial
from typing import TYPE_CHECKING, Any, get_type_hints

import typer

from latentguard.cli.console import echo_err
from latentguard.cli.serve.options import ServeOptions
from latentguard.cli.serve.parts import ADMIN_KEY
from latentguard.cli.serve.settings import read_settings
from latentguard.errors import require_extra

if TYPE_CHECKING:
    from latentguard.serve.server import Server

log = logging.getLogger("latentguard.serve")

LOCAL = ("127.0.0.1", "::1", "localhost")
NAME = re.compile(r"[\w.:/-]+", re.ASCII)
ROLES = ("system", "developer", "assistant", "tool", "function")


def serve(context: typer.Context, **arguments: Any) -> None:
    """Serve GUARD: OpenAI's /v1/moderations and /v1/chat/completions, and a page at /.

    Chats are answered by the guard's own model, or by --upstream. The upstream's key is read from
    LATENTGUARD_UPSTREAM_KEY. A guard that was calibrated with --review-fpr has a third decision,
    'review', which --second-opinion can decide. Options can also be given in a file (--config) or
    in the environment.

    Example: latentguard serve guards/qwen --audit audit.jsonl
    """
    require_extra("latentguard.serve.server", "serve", "latentguard serve")
    explicit = {name: value for name, value in arguments.items() if _is_given(context, name)}
    options = read_settings(explicit)
    require_consistent(options)
    if options.check:
        from latentguard.cli.serve.check import find_problems

        problems = find_problems(options)
        for problem in problems:
            echo_err(f"Error: {problem}")
        if problems:
            raise typer.Exit(2)
        typer.echo("All is well: the service would start.")
        return
    _run(options)


def _is_given(context: typer.Context, name: str) -> bool:
    """Whether an option stands on the command line."""
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def _signature() -> inspect.Signature:
    """That of ``serve``: each field of ``ServeOptions`` is an option."""
    hints = get_type_hints(ServeOptions, include_extras=True)
    parameter = partial(inspect.Parameter, kind=inspect.Parameter.KEYWORD_ONLY)
    options = [
        parameter(field.name, default=field.default, annotation=hints[field.name])
        for field in fields(ServeOptions)
    ]
    return inspect.Signature([parameter("context", annotation=typer.Context), *options])


serve.__signature__ = _signature()  # type: ignore[attr-defined]


def require_consistent(options: ServeOptions) -> None:
    """Check what no single option shows.

    Raises:
        typer.BadParameter: if two options do not go together.
    """
    if options.guard is None:
        _refuse("expected a guard's folder or Hub id", "GUARD")
    if options.on_review == "block" and options.policy != "block":
        reason = f"--policy {options.policy} answers even flagged chats"
        _refuse(f"block needs --policy block; {reason}", "--on-review")
    if options.on_error != "block":
        reason = "a client can bring about an error; to answer every chat, use --policy shadow"
        _refuse(reason, "--on-error")
    for role in options.trust_roles:
        if role not in ROLES:
            _refuse(f"expected {', '.join(ROLES)}; found '{role}'", "--trust-roles")
    _require_sources(options)
    _require_names(options)
    if options.review_labels is not None and not os.environ.get(ADMIN_KEY):
        _refuse(f"expected the key of its page in {ADMIN_KEY}; found none", "--review-labels")
    if (options.tls_cert is None) != (options.tls_key is None):
        _refuse("expected both --tls-cert and --tls-key", "--tls-cert")
    if options.redis is not None:
        require_extra("redis", "redis", "--redis")
        if not options.redis.startswith(("redis://", "rediss://", "unix://")):
            _refuse(f"expected redis://host:6379/0; found '{options.redis}'", "--redis")
    _require_upstream(options)


def _require_sources(options: ServeOptions) -> None:
    from latentguard.serve.config import SOURCES

    for source in options.sources:
        if source not in SOURCES:
            _refuse(f"expected {', '.join(SOURCES)}; found '{source}'", "--sources")
    if "user" not in options.sources and options.upstream is None:
        _refuse("expected user among them: the guard's own model has no tools", "--sources")


def _require_names(options: ServeOptions) -> None:
    names = [entry.partition("=")[0] for entry in options.guards]
    for name, entry in zip(names, options.guards, strict=True):
        if not NAME.fullmatch(name) or name == "default" or not entry.partition("=")[2]:
            reason = f"expected a name and a guard, as strict=guards/strict; found '{entry}'"
            _refuse(reason, "--guards")
    if len(set(names)) < len(names):
        _refuse(f"expected each name once; found {', '.join(names)}", "--guards")


def _require_upstream(options: ServeOptions) -> None:
    if options.upstream is None:
        return
    import httpx

    try:
        url = httpx.URL(options.upstream)
    except httpx.InvalidURL:
        url = httpx.URL("")
    if url.scheme not in ("http", "https") or not url.host:
        _refuse(f"expected a URL as http://host:8000/v1; found '{options.upstream}'", "--upstream")
    if options.upstream_hosts and url.host not in options.upstream_hosts:
        hosts = ", ".join(options.upstream_hosts)
        _refuse(f"expected one of the hosts {hosts}; found '{url.host}'", "--upstream")


def _refuse(reason: str, option: str) -> None:
    raise typer.BadParameter(reason, param_hint=option)


def _run(options: ServeOptions) -> None:
    """Serve until a signal comes, then end the process."""
    from latentguard.serve import server

    with server.signals_before_serving():
        server.exit_process(server.run(_made_server(options)))


def _made_server(options: ServeOptions) -> Server:
    """A server that has its port."""
    from latentguard.cli.serve import parts
    from latentguard.serve import server
    from latentguard.serve.logs import configure_logs

    configure_logs(as_json=options.log_format == "json")
    files = parts.read_files(options)
    if not files.keys and options.host not in LOCAL:
        log.warning("No API keys, and %s can be reached from elsewhere.", options.host)
    second = parts.read_second_opinion(options, files.all_guards)
    service = server.create_server(
        parts.opener(files.guard, options, second),
        parts.config_of(options, files),
        keys=files.keys,
        audit=parts.open_audit(options),
        reference=files.reference,
        guards=server.GuardSource(
            files.named_guards,
            files.shadow,
            parts.binder(options, second),
            partial(parts.read_files, options),
            second,
        ),
        host=options.host,
        port=options.port,
        open_telemetry=parts.open_telemetry(options),
        **parts.read_certificate(options),
    )
    port = service.listen().getsockname()[1]
    scheme = "https" if options.tls_cert else "http"
    address = f"{scheme}://{options.host}:{port}"
    log.info("Serving %s on %s (see /readyz).", options.guard, address)
    return service
