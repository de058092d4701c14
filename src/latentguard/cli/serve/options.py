"""Every option of ``serve``, once: command line, environment and file read this record."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum, auto
from pathlib import Path
from typing import Annotated

import typer

from latentguard.serve.config import ServeConfig

# Panels of ``--help``.
GUARD = "Guard and model"
TRAFFIC = "What is done"
LIMITS = "Limits"
UPSTREAM = "Upstream"
RECORD = "Audit log"
NETWORK = "Network"


class Policy(StrEnum):
    """What happens to a flagged chat."""

    block = auto()
    annotate = auto()
    shadow = auto()


OnReview = StrEnum("OnReview", ["pass", "annotate", "block"])
"""What happens to a chat in the band to review."""


class ReplyPolicy(StrEnum):
    """What happens to a flagged reply."""

    cut = auto()
    block = auto()
    annotate = auto()
    shadow = auto()


class Tools(StrEnum):
    """What happens to tools and schemas in chats."""

    read = auto()
    refuse = auto()
    trust = auto()


class ControlTokens(StrEnum):
    """What happens to control tokens in chats for an upstream."""

    refuse = auto()
    escape = auto()
    forward = auto()


class Fsync(StrEnum):
    """When audit lines are forced to the disk."""

    never = auto()
    interval = auto()
    always = auto()


class LogFormat(StrEnum):
    """How lines on standard error are written."""

    text = auto()
    json = auto()


@dataclass(frozen=True, kw_only=True)
class ServeOptions:
    """What ``serve`` is given; documented where it is said: in the help of each option."""

    guard: Annotated[
        str | None,
        typer.Argument(help="Folder that 'latentguard fit' wrote, or a Hub id as org/guard."),
    ] = None
    config: Annotated[
        Path | None,
        typer.Option(
            help="TOML file with these options by their names, as max-tokens = 2048. The "
            "environment (LATENTGUARD_SERVE_MAX_TOKENS) comes before it, options before both."
        ),
    ] = None
    check: Annotated[
        bool,
        typer.Option(
            "--check", help="Check guard, model, keys, audit log and options; exit 0 or 2."
        ),
    ] = False
    guards: Annotated[
        list[str],
        typer.Option(
            help="More guards of the same model, as strict=guards/strict: a request's 'model' "
            "names one of them. Who sets it picks the guard.",
            rich_help_panel=GUARD,
        ),
    ] = ()  # type: ignore[assignment]
    model: Annotated[
        str | None, typer.Option(help="If the model has moved.", rich_help_panel=GUARD)
    ] = None
    verify_key: Annotated[
        Path | None,
        typer.Option(
            help="Public key that guards have to be signed with ('latentguard sign').",
            rich_help_panel=GUARD,
        ),
    ] = None
    allow_mismatch: Annotated[
        bool,
        typer.Option(
            "--allow-mismatch",
            help="Go on with another model; logs how far scores move.",
            rich_help_panel=GUARD,
        ),
    ] = False
    device_map: Annotated[
        str | None,
        typer.Option(
            help="'auto' spreads a large model over GPUs, then memory.", rich_help_panel=GUARD
        ),
    ] = None
    reference: Annotated[
        Path | None,
        typer.Option(
            help="Verdicts to compare scores with, by 'latentguard score --out'; default: the "
            "scores that calibrated the guard.",
            rich_help_panel=GUARD,
        ),
    ] = None
    policy: Annotated[Policy, typer.Option(help="Of flagged chats.", rich_help_panel=TRAFFIC)] = (
        Policy.block
    )
    on_review: Annotated[
        OnReview,
        typer.Option(
            help="Of chats in the band to review: pass (answered, only logged), annotate (answered "
            "with their decision) or block.",
            rich_help_panel=TRAFFIC,
        ),
    ] = OnReview.annotate
    reply_policy: Annotated[
        ReplyPolicy | None,
        typer.Option(
            help="Of flagged replies, if the guard was fitted with --replies: cut (it ends there), "
            "block (it is read whole before any is shown), annotate or shadow; default: cut, or as "
            "--policy if that is softer.",
            rich_help_panel=TRAFFIC,
        ),
    ] = None
    hold_tokens: Annotated[
        int,
        typer.Option(
            min=0,
            help="Tokens of a reply that are read beyond one until it is shown.",
            rich_help_panel=TRAFFIC,
        ),
    ] = ServeConfig.hold_tokens
    refusal: Annotated[
        str, typer.Option(help="What a blocked chat is answered with.", rich_help_panel=TRAFFIC)
    ] = ServeConfig.refusal
    trust_roles: Annotated[
        list[str],
        typer.Option(
            help="Roles whose messages your gateway writes, as system,developer: these are read in "
            "context only. Every other message is read by itself, too.",
            rich_help_panel=TRAFFIC,
        ),
    ] = ()  # type: ignore[assignment]
    sources: Annotated[
        list[str],
        typer.Option(
            help="Whose texts are read: user, system, assistant, tool (what tools return), call "
            "(arguments of calls), schema (tools and schemas). A guard calibrated with segments "
            "of these names has a threshold for each.",
            rich_help_panel=TRAFFIC,
        ),
    ] = ServeConfig.sources  # type: ignore[assignment]
    tools: Annotated[
        Tools, typer.Option(help="Of tools and schemas in chats.", rich_help_panel=TRAFFIC)
    ] = Tools.read
    control_tokens: Annotated[
        ControlTokens,
        typer.Option(
            help="Of control tokens as <|im_end|> in chats for --upstream: refuse, escape (with a "
            "blank), or forward if the upstream takes them for text.",
            rich_help_panel=TRAFFIC,
        ),
    ] = ControlTokens.refuse
    allow_parameter: Annotated[
        list[str],
        typer.Option(
            help="A parameter that the upstream is sent unread; repeatable.",
            rich_help_panel=TRAFFIC,
        ),
    ] = ()  # type: ignore[assignment]
    on_error: Annotated[str, typer.Option(hidden=True)] = "block"
    segment_header: Annotated[
        str | None,
        typer.Option(
            help="Request header with the traffic segment, for a guard calibrated by segments. "
            "Have your gateway set it: who sets it picks the threshold.",
            rich_help_panel=TRAFFIC,
        ),
    ] = None
    upstream: Annotated[
        str | None,
        typer.Option(
            help="OpenAI-compatible URL that answers chats, as http://h/v1; a query is kept.",
            rich_help_panel=UPSTREAM,
        ),
    ] = None
    upstream_hosts: Annotated[
        list[str],
        typer.Option(
            help="Hosts that --upstream may name; any by default.", rich_help_panel=UPSTREAM
        ),
    ] = ()  # type: ignore[assignment]
    upstream_chat_path: Annotated[
        str,
        typer.Option(
            help="Below the URL; {model} is the request's model, as Azure's deployments need it.",
            rich_help_panel=UPSTREAM,
        ),
    ] = ServeConfig.upstream_chat_path
    upstream_responses_path: Annotated[
        str,
        typer.Option(
            help="Below the URL, for /v1/responses; {model} as above.", rich_help_panel=UPSTREAM
        ),
    ] = ServeConfig.upstream_responses_path
    upstream_models_path: Annotated[
        str,
        typer.Option(
            help="Below the URL; also asked whether it is there.", rich_help_panel=UPSTREAM
        ),
    ] = ServeConfig.upstream_models_path
    upstream_key_file: Annotated[
        Path | None,
        typer.Option(
            help="File with its key; or the variable LATENTGUARD_UPSTREAM_KEY.",
            rich_help_panel=UPSTREAM,
        ),
    ] = None
    upstream_key_header: Annotated[
        str, typer.Option(help="Header of its key, as api-key.", rich_help_panel=UPSTREAM)
    ] = ServeConfig.upstream_key_header
    upstream_connect_seconds: Annotated[
        float, typer.Option(min=0.1, help="To connect.", rich_help_panel=UPSTREAM)
    ] = ServeConfig.upstream_connect_seconds
    upstream_read_seconds: Annotated[
        float,
        typer.Option(
            min=0.1,
            help="Until its answer begins, or the next piece of it comes.",
            rich_help_panel=UPSTREAM,
        ),
    ] = ServeConfig.upstream_read_seconds
    audit: Annotated[
        str | None,
        typer.Option(
            help="Audit log, JSON Lines: a file, a pipe, '-' (standard output), syslog, or an "
            "OpenTelemetry collector as http://collector:4318/v1/logs.",
            rich_help_panel=RECORD,
        ),
    ] = None
    audit_max_bytes: Annotated[
        int,
        typer.Option(
            min=0,
            help="When the audit file is rotated; 0 leaves that to others.",
            rich_help_panel=RECORD,
        ),
    ] = 64 << 20
    audit_keep: Annotated[
        int, typer.Option(min=0, help="Older audit files that are kept.", rich_help_panel=RECORD)
    ] = 10
    audit_fsync: Annotated[
        Fsync, typer.Option(help="When lines are on the disk.", rich_help_panel=RECORD)
    ] = Fsync.interval
    audit_texts: Annotated[
        bool, typer.Option(help="Write prompts into the audit log.", rich_help_panel=RECORD)
    ] = False
    log_format: Annotated[
        LogFormat, typer.Option(help="Of lines on standard error.", rich_help_panel=RECORD)
    ] = LogFormat.text
    host: Annotated[str, typer.Option(help="Address to listen on.", rich_help_panel=NETWORK)] = (
        "127.0.0.1"
    )
    port: Annotated[
        int,
        typer.Option(min=0, max=65535, help="Port; 0 takes a free one.", rich_help_panel=NETWORK),
    ] = 8400
    allowed_hosts: Annotated[
        list[str],
        typer.Option(
            help="Names that the Host header may have; any by default.", rich_help_panel=NETWORK
        ),
    ] = ()  # type: ignore[assignment]
    tls_cert: Annotated[
        Path | None,
        typer.Option(help="Certificate chain, PEM: serve HTTPS.", rich_help_panel=NETWORK),
    ] = None
    tls_key: Annotated[
        Path | None, typer.Option(help="Its private key, PEM.", rich_help_panel=NETWORK)
    ] = None
    api_keys: Annotated[
        Path | None,
        typer.Option(
            help="File of keys; or the variable LATENTGUARD_API_KEYS.", rich_help_panel=NETWORK
        ),
    ] = None
    otel: Annotated[
        bool,
        typer.Option(
            "--otel",
            help="Send traces and metrics by OTLP, where OTEL_EXPORTER_OTLP_ENDPOINT says.",
            rich_help_panel=RECORD,
        ),
    ] = False
    health_port: Annotated[
        int | None,
        typer.Option(
            min=0,
            max=65535,
            help="Serve health and metrics on a port of their own, too; without TLS.",
            rich_help_panel=NETWORK,
        ),
    ] = None
    health_host: Annotated[
        str, typer.Option(help="Address of that port.", rich_help_panel=NETWORK)
    ] = ServeConfig.health_host
    close_delay: Annotated[
        float,
        typer.Option(
            min=0,
            help="Seconds of not being ready before it closes on SIGTERM; a second one closes at "
            "once.",
            rich_help_panel=NETWORK,
        ),
    ] = 5.0
    drain: Annotated[
        float,
        typer.Option(
            min=0, help="Seconds that requests then have to finish.", rich_help_panel=NETWORK
        ),
    ] = ServeConfig.drain
    concurrency: Annotated[
        int,
        typer.Option(
            min=1, help="Requests of one client that may be under way.", rich_help_panel=LIMITS
        ),
    ] = ServeConfig.concurrency
    rate: Annotated[
        float | None,
        typer.Option(min=0.001, help="Requests of one client in a second.", rich_help_panel=LIMITS),
    ] = None
    burst: Annotated[
        int,
        typer.Option(
            min=1, help="Requests that may come at once, with --rate.", rich_help_panel=LIMITS
        ),
    ] = ServeConfig.burst
    redis: Annotated[
        str | None,
        typer.Option(
            help="Count the requests of clients for several processes together, as "
            "redis://host:6379/0. Without it, each counts for itself.",
            rich_help_panel=LIMITS,
        ),
    ] = None
    max_connections: Annotated[
        int, typer.Option(min=1, help="Open connections.", rich_help_panel=LIMITS)
    ] = ServeConfig.max_connections
    max_connections_per_address: Annotated[
        int, typer.Option(min=1, help="Open connections from one address.", rich_help_panel=LIMITS)
    ] = ServeConfig.max_connections_per_address
    queue: Annotated[
        int, typer.Option(min=1, help="Prompts that may wait.", rich_help_panel=LIMITS)
    ] = ServeConfig.queue
    wait_ms: Annotated[
        float, typer.Option(min=0, help="A batch waits so long for more.", rich_help_panel=LIMITS)
    ] = 3.0
    max_tokens: Annotated[
        int, typer.Option(min=1, help="Tokens of the longest prompt.", rich_help_panel=LIMITS)
    ] = ServeConfig.max_tokens
    max_reply: Annotated[
        int, typer.Option(min=1, help="Tokens of the longest reply.", rich_help_panel=LIMITS)
    ] = ServeConfig.max_reply
    deadline: Annotated[
        float,
        typer.Option(min=0.1, help="Seconds that a verdict may take.", rich_help_panel=LIMITS),
    ] = ServeConfig.deadline
