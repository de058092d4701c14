"""The verb ``serve``; what is heavy is imported inside."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from latentguard.errors import require_extra

if TYPE_CHECKING:
    from latentguard.guard.latent_guard import LatentGuard
    from latentguard.serve.audit_log import AuditLog
    from latentguard.serve.engine import Opener

log = logging.getLogger("latentguard.serve")


def serve(  # noqa: PLR0913, PLR0917 (each is an option of the command line)
    guard: Annotated[Path, typer.Argument(help="Folder that 'latentguard fit' wrote.")],
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 takes a free one.")] = 8400,
    upstream: Annotated[
        str | None, typer.Option(help="OpenAI-compatible URL that answers chats, as http://h/v1.")
    ] = None,
    policy: Annotated[
        str, typer.Option(help="Of flagged chats: block, annotate or shadow.")
    ] = "block",
    on_review: Annotated[
        str,
        typer.Option(
            help="Of chats in the band to review: pass (answered, only logged), annotate (answered "
            "with their decision) or block."
        ),
    ] = "annotate",
    trust_roles: Annotated[
        str,
        typer.Option(
            help="Roles whose messages your gateway writes, as system,developer: these are read in "
            "context only. Every other message is read by itself, too."
        ),
    ] = "",
    tools: Annotated[
        str, typer.Option(help="Of tools and schemas in chats: read, refuse or trust.")
    ] = "read",
    control_tokens: Annotated[
        str,
        typer.Option(
            help="Of control tokens as <|im_end|> in chats for --upstream: refuse, escape (with a "
            "blank), or forward if the upstream takes them for text."
        ),
    ] = "refuse",
    allow_parameter: Annotated[
        list[str] | None,
        typer.Option(help="A parameter that the upstream is sent unread; repeatable."),
    ] = None,
    on_error: Annotated[str, typer.Option(hidden=True)] = "block",
    refusal: Annotated[str, typer.Option(help="What a blocked chat is answered with.")] = (
        "I can't help with that."
    ),
    segment_header: Annotated[
        str | None,
        typer.Option(
            help="Request header with the traffic segment, for a guard calibrated by segments. "
            "Have your gateway set it: who sets it picks the threshold."
        ),
    ] = None,
    audit: Annotated[
        str | None,
        typer.Option(
            help="Audit log, JSON Lines: a file, a pipe, '-' (standard output) or syslog."
        ),
    ] = None,
    audit_max_bytes: Annotated[
        int, typer.Option(min=0, help="When the audit file is rotated; 0 leaves that to others.")
    ] = 64 << 20,
    audit_keep: Annotated[int, typer.Option(min=0, help="Older audit files that are kept.")] = 10,
    audit_fsync: Annotated[str, typer.Option(help="never, interval or always.")] = "interval",
    audit_texts: Annotated[bool, typer.Option(help="Write prompts into the audit log.")] = False,
    api_keys: Annotated[
        Path | None, typer.Option(help="File of keys; or the variable LATENTGUARD_API_KEYS.")
    ] = None,
    reference: Annotated[
        Path | None,
        typer.Option(
            help="Verdicts to compare scores with, by 'latentguard score --out'; default: the "
            "scores that calibrated the guard."
        ),
    ] = None,
    health_port: Annotated[
        int | None, typer.Option(help="Serve health and metrics on a port of their own, too.")
    ] = None,
    health_host: Annotated[str, typer.Option(help="Address of that port.")] = "127.0.0.1",
    concurrency: Annotated[
        int, typer.Option(min=1, help="Requests of one client that may be under way.")
    ] = 512,
    rate: Annotated[
        float | None, typer.Option(min=0.001, help="Requests of one client in a second.")
    ] = None,
    max_connections: Annotated[int, typer.Option(min=1, help="Open connections.")] = 1024,
    max_connections_per_address: Annotated[
        int, typer.Option(min=1, help="Open connections from one address.")
    ] = 512,
    close_delay: Annotated[
        float, typer.Option(min=0, help="Seconds of not being ready before it closes on SIGTERM.")
    ] = 0.0,
    queue: Annotated[int, typer.Option(min=1, help="Prompts that may wait.")] = 256,
    wait_ms: Annotated[float, typer.Option(min=0, help="A batch waits so long for more.")] = 3.0,
    max_tokens: Annotated[int, typer.Option(min=1, help="Tokens of the longest prompt.")] = 4096,
    max_reply: Annotated[int, typer.Option(min=1, help="Tokens of the longest reply.")] = 1024,
    deadline: Annotated[
        float, typer.Option(min=0.1, help="Seconds that a verdict may take.")
    ] = 30.0,
    model: Annotated[str | None, typer.Option(help="If the model has moved.")] = None,
    allow_mismatch: Annotated[
        bool,
        typer.Option(
            "--allow-mismatch", help="Go on with another model; logs how far scores move."
        ),
    ] = False,
    device_map: Annotated[
        str | None, typer.Option(help="'auto' spreads a large model over GPUs, then memory.")
    ] = None,
) -> None:
    """Serve GUARD: OpenAI's /v1/moderations and /v1/chat/completions, and a page at /.

    Chats are answered by the guard's own model, or by --upstream. The upstream's key is read from
    LATENTGUARD_UPSTREAM_KEY. A band to review is there if the guard was calibrated with
    --review-fpr.

    Example: latentguard serve guards/qwen --audit audit.jsonl
    """
    from latentguard.guard.latent_guard import LatentGuard
    from latentguard.serve.config import ServeConfig

    server = require_extra("latentguard.serve.server", "serve", "latentguard serve")
    from latentguard.serve.drift import DriftReference
    from latentguard.serve.keys import VARIABLE, load_keys

    _require(policy, ("block", "annotate", "shadow"), "--policy")
    _require_review(on_review, policy)
    _require_block(on_error)
    _require(tools, ("read", "refuse", "trust"), "--tools")
    _require(control_tokens, ("refuse", "escape", "forward"), "--control-tokens")
    _require_url(upstream)
    loaded = LatentGuard.load(guard)  # so that a wrong folder is said at once
    _require_segments(loaded, segment_header)
    options = ServeConfig(
        policy=policy,  # type: ignore[arg-type]
        on_review=on_review,  # type: ignore[arg-type]
        trusted_roles=_roles(trust_roles),
        tools=tools,  # type: ignore[arg-type]
        control_tokens=control_tokens,  # type: ignore[arg-type]
        unread_parameters=tuple(allow_parameter or ()),
        refusal=refusal,
        segment_header=segment_header,
        name=Path(loaded.fingerprint.model).name or "latentguard",
        upstream=upstream,
        upstream_key=os.environ.get("LATENTGUARD_UPSTREAM_KEY"),
        health_port=health_port,
        health_host=health_host,
        concurrency=concurrency,
        rate=rate,
        max_connections=max_connections,
        max_connections_per_address=max_connections_per_address,
        close_delay=close_delay,
        wait=wait_ms / 1000,
        queue=queue,
        max_tokens=max_tokens,
        max_reply=max_reply,
        deadline=deadline,
    )
    keys = load_keys(api_keys, os.environ.get(VARIABLE))
    if not keys and host not in ("127.0.0.1", "::1", "localhost"):
        typer.echo(f"Warning: no API keys, and {host} can be reached from elsewhere.", err=True)
    made = server.create_server(
        _opener(loaded, model, device_map=device_map, allow_mismatch=allow_mismatch),
        options,
        keys=keys,
        audit=_audit(audit, audit_fsync, texts=audit_texts, sizes=(audit_max_bytes, audit_keep)),
        reference=DriftReference.of(loaded, reference),
        host=host,
        port=port,
    )
    port = made.listen().getsockname()[1]
    typer.echo(f"Serving {guard} on http://{host}:{port} (see /readyz)", err=True)
    server.exit_process(server.run(made))


def _opener(
    guard: LatentGuard,
    model: str | None,
    *,
    device_map: str | None = None,
    allow_mismatch: bool = False,
) -> Opener:
    """What loads the guard's model, on the scoring thread, and checks that it is the guard's own.

    Allowed another model, the guard is bound to it: its canaries score from then on as they do now.
    """
    from transformers.utils import logging as transformers_logging

    from latentguard.models.chat_model import ChatModel

    source = model or guard.fingerprint.model
    placing = {"device_map": device_map} if device_map else {}

    def opener() -> tuple[LatentGuard, ChatModel]:
        transformers_logging.disable_progress_bar()
        backend = ChatModel.load(source, dtype=guard.fingerprint.dtype, **placing)
        if not allow_mismatch:
            guard.verify_model(backend)
            return guard, backend
        met = guard.accept_model(backend)
        if met is not guard:
            log.warning("%s", guard.shift_to(met))
        return met, backend

    return opener


def _audit(
    target: str | None, fsync: str, *, texts: bool, sizes: tuple[int, int]
) -> AuditLog | None:
    from latentguard.serve.audit_log import AuditLog

    _require(fsync, ("never", "interval", "always"), "--audit-fsync")
    if target is None:
        return None
    max_bytes, keep = sizes
    how: dict[str, Any] = dict(fsync=fsync, texts=texts, max_bytes=max_bytes, keep=keep)
    return AuditLog(target, **how)


def _require(word: str, known: tuple[str, ...], option: str) -> None:
    if word not in known:
        raise typer.BadParameter(f"expected {', '.join(known)}; found '{word}'", param_hint=option)


def _require_block(on_error: str) -> None:
    if on_error != "block":
        reason = "a client can bring about an error; to answer every chat, use --policy shadow"
        raise typer.BadParameter(reason, param_hint="--on-error")


def _roles(text: str) -> tuple[str, ...]:
    roles = tuple(filter(None, (role.strip() for role in text.split(","))))
    for role in roles:
        _require(role, ("system", "developer", "assistant", "tool", "function"), "--trust-roles")
    return roles


def _require_review(on_review: str, policy: str) -> None:
    _require(on_review, ("pass", "annotate", "block"), "--on-review")
    if on_review == "block" and policy != "block":
        reason = f"block needs --policy block; --policy {policy} answers even flagged chats"
        raise typer.BadParameter(reason, param_hint="--on-review")


def _require_segments(guard: LatentGuard, header: str | None) -> None:
    if header is not None and not (guard.thresholds and guard.thresholds.segments):
        reason = "this guard has no segments; calibrate it with --segment-column"
        raise typer.BadParameter(reason, param_hint="--segment-header")


def _require_url(upstream: str | None) -> None:
    if upstream is not None and not upstream.startswith(("http://", "https://")):
        raise typer.BadParameter(
            f"expected a URL as http://host:8000/v1; found '{upstream}'", param_hint="--upstream"
        )
