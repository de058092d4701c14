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
TRAFFIC = "Policy"
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


class RateOf(StrEnum):
    """What the false-positive rate is of."""

    chat = auto()
    text = auto()


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
            help="TOML file with these options, such as max-tokens = 2048. Variables of the "
            "environment (LATENTGUARD_SERVE_MAX_TOKENS) override it, and options override both."
        ),
    ] = None
    check: Annotated[
        bool,
        typer.Option(
            "--check",
            help="Only check guard, model, keys, audit log and options; exit code 0 or 2.",
        ),
    ] = False
    guards: Annotated[
        list[str],
        typer.Option(
            help="More guards of the same model, as NAME=FOLDER. A request whose 'model' is NAME "
            "is judged by that guard, so let your gateway set 'model'.",
            rich_help_panel=GUARD,
        ),
    ] = ()  # type: ignore[assignment]
    shadow: Annotated[
        str | None,
        typer.Option(
            help="Another guard of the same model, which judges the same prompts and decides "
            "nothing: differences are counted. POST /promote on the health port lets it decide, "
            "POST /rollback takes that back.",
            rich_help_panel=GUARD,
        ),
    ] = None
    model: Annotated[
        str | None,
        typer.Option(
            help="Folder or id of the guard's model, if it has moved.", rich_help_panel=GUARD
        ),
    ] = None
    verify_key: Annotated[
        Path | None,
        typer.Option(
            help="Public key, PEM: accept only guards that 'latentguard sign' signed for it.",
            rich_help_panel=GUARD,
        ),
    ] = None
    second_opinion: Annotated[
        str | None,
        typer.Option(
            help="Decides on prompts in the review band: a guard (folder, Hub id), a guard model "
            "such as Llama Guard, or an OpenAI-compatible URL, which is sent their texts: "
            "https://HOST/v1/moderations or http://HOST/v1#MODEL.",
            rich_help_panel=GUARD,
        ),
    ] = None
    allow_mismatch: Annotated[
        bool,
        typer.Option(
            "--allow-mismatch",
            help="Accept a model that differs from the guard's; logs how far scores move.",
            rich_help_panel=GUARD,
        ),
    ] = False
    device_map: Annotated[
        str | None,
        typer.Option(
            help="'auto' spreads a large model over GPUs and main memory.", rich_help_panel=GUARD
        ),
    ] = None
    reference: Annotated[
        Path | None,
        typer.Option(
            help="Verdicts ('latentguard score --out') to compare live scores with, for the drift "
            "metric; default: the scores that calibrated the guard.",
            rich_help_panel=GUARD,
        ),
    ] = None
    policy: Annotated[
        Policy, typer.Option(help="What happens to flagged chats.", rich_help_panel=TRAFFIC)
    ] = Policy.block
    on_review: Annotated[
        OnReview,
        typer.Option(
            help="What happens to chats between the review threshold and the threshold: pass "
            "(answered, only logged), annotate (answered with the decision) or block.",
            rich_help_panel=TRAFFIC,
        ),
    ] = OnReview.annotate
    reply_policy: Annotated[
        ReplyPolicy | None,
        typer.Option(
            help="What happens to flagged replies, if the guard was fitted with --replies: cut "
            "(the reply ends there), block (nothing is shown before all is read), annotate or "
            "shadow. "
            "Default: cut; with --policy annotate or shadow, the same as --policy.",
            rich_help_panel=TRAFFIC,
        ),
    ] = None
    hold_tokens: Annotated[
        int,
        typer.Option(
            min=0,
            help="Tokens of a reply held back: a token is shown after so many more are read.",
            rich_help_panel=TRAFFIC,
        ),
    ] = ServeConfig.hold_tokens
    refusal: Annotated[
        str, typer.Option(help="The answer to a blocked chat.", rich_help_panel=TRAFFIC)
    ] = ServeConfig.refusal
    trust_roles: Annotated[
        list[str],
        typer.Option(
            help="Roles whose messages your gateway writes, such as system,developer: read in "
            "context only; every other message is also read by itself.",
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
    rate_of: Annotated[
        RateOf,
        typer.Option(
            help="What the guard's false-positive rate is of. chat: of a whole chat. Its texts "
            "share the rate, so each has a higher threshold, and harmless texts around a harmful "
            "one may let it pass. text: of each text. They do not, but a harmless chat of k texts "
            "is flagged up to k times as often.",
            rich_help_panel=TRAFFIC,
        ),
    ] = RateOf.chat
    tools: Annotated[
        Tools,
        typer.Option(
            help="Tools and schemas in chats: read them, refuse them, or trust them (not read).",
            rich_help_panel=TRAFFIC,
        ),
    ] = Tools.read
    control_tokens: Annotated[
        ControlTokens,
        typer.Option(
            help="Control tokens such as <|im_end|> in chats for --upstream: refuse the chat, "
            "escape them with a space, or forward them if the upstream reads them as text.",
            rich_help_panel=TRAFFIC,
        ),
    ] = ControlTokens.refuse
    allow_parameter: Annotated[
        list[str],
        typer.Option(
            help="A request parameter that is sent to the upstream without being read; repeatable.",
            rich_help_panel=TRAFFIC,
        ),
    ] = ()  # type: ignore[assignment]
    on_error: Annotated[str, typer.Option(hidden=True)] = "block"
    segment_header: Annotated[
        str | None,
        typer.Option(
            help="Request header with the traffic segment, for a guard calibrated by segments. "
            "It picks the threshold, so let your gateway set it.",
            rich_help_panel=TRAFFIC,
        ),
    ] = None
    upstream: Annotated[
        str | None,
        typer.Option(
            help="OpenAI-compatible URL that answers chats, such as http://host/v1.",
            rich_help_panel=UPSTREAM,
        ),
    ] = None
    upstream_hosts: Annotated[
        list[str],
        typer.Option(
            help="Hosts that --upstream may name; default: any.", rich_help_panel=UPSTREAM
        ),
    ] = ()  # type: ignore[assignment]
    upstream_chat_path: Annotated[
        str,
        typer.Option(
            help="Path of chats below the URL; {model} is the request's model, as Azure needs it.",
            rich_help_panel=UPSTREAM,
        ),
    ] = ServeConfig.upstream_chat_path
    upstream_responses_path: Annotated[
        str,
        typer.Option(
            help="Path of /v1/responses below the URL; {model} as above.", rich_help_panel=UPSTREAM
        ),
    ] = ServeConfig.upstream_responses_path
    upstream_models_path: Annotated[
        str,
        typer.Option(
            help="Path of the model list below the URL; shows whether the upstream answers.",
            rich_help_panel=UPSTREAM,
        ),
    ] = ServeConfig.upstream_models_path
    upstream_key_file: Annotated[
        Path | None,
        typer.Option(
            help="File with the upstream's key; or set LATENTGUARD_UPSTREAM_KEY.",
            rich_help_panel=UPSTREAM,
        ),
    ] = None
    upstream_key_header: Annotated[
        str,
        typer.Option(
            help="Header for the upstream's key, such as api-key.", rich_help_panel=UPSTREAM
        ),
    ] = ServeConfig.upstream_key_header
    upstream_connect_seconds: Annotated[
        float, typer.Option(min=0.1, help="Seconds to connect.", rich_help_panel=UPSTREAM)
    ] = ServeConfig.upstream_connect_seconds
    upstream_read_seconds: Annotated[
        float,
        typer.Option(
            min=0.1,
            help="Seconds until its answer begins, and between two pieces of it.",
            rich_help_panel=UPSTREAM,
        ),
    ] = ServeConfig.upstream_read_seconds
    audit: Annotated[
        str | None,
        typer.Option(
            help="Audit log in JSON Lines: a file, a pipe, '-' (standard output), syslog, or an "
            "OpenTelemetry collector such as http://collector:4318/v1/logs.",
            rich_help_panel=RECORD,
        ),
    ] = None
    audit_max_bytes: Annotated[
        int,
        typer.Option(
            min=0,
            help="Size at which the audit file is rotated; 0: never, use logrotate.",
            rich_help_panel=RECORD,
        ),
    ] = 64 << 20
    audit_keep: Annotated[
        int, typer.Option(min=0, help="Rotated audit files to keep.", rich_help_panel=RECORD)
    ] = 10
    audit_fsync: Annotated[
        Fsync,
        typer.Option(
            help="When lines are forced to the disk; interval: each second.", rich_help_panel=RECORD
        ),
    ] = Fsync.interval
    audit_texts: Annotated[
        bool, typer.Option(help="Write prompt texts into the audit log.", rich_help_panel=RECORD)
    ] = False
    review_labels: Annotated[
        Path | None,
        typer.Option(
            help="Label file: keeps recent prompts in memory and serves a page at /review on "
            "which they are labelled. It needs LATENTGUARD_ADMIN_KEY.",
            rich_help_panel=RECORD,
        ),
    ] = None
    log_format: Annotated[
        LogFormat,
        typer.Option(help="Format of log lines on standard error.", rich_help_panel=RECORD),
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
            help="Names that the Host header may have; default: any.", rich_help_panel=NETWORK
        ),
    ] = ()  # type: ignore[assignment]
    tls_cert: Annotated[
        Path | None,
        typer.Option(help="Certificate chain, PEM: serve HTTPS.", rich_help_panel=NETWORK),
    ] = None
    tls_key: Annotated[
        Path | None,
        typer.Option(help="Private key of the certificate, PEM.", rich_help_panel=NETWORK),
    ] = None
    api_keys: Annotated[
        Path | None,
        typer.Option(
            help="File with one API key a line; or set LATENTGUARD_API_KEYS.",
            rich_help_panel=NETWORK,
        ),
    ] = None
    otel: Annotated[
        bool,
        typer.Option(
            "--otel",
            help="Send traces and metrics by OTLP to OTEL_EXPORTER_OTLP_ENDPOINT.",
            rich_help_panel=RECORD,
        ),
    ] = False
    health_port: Annotated[
        int | None,
        typer.Option(
            min=0,
            max=65535,
            help="Also serve health and metrics on this port, without TLS.",
            rich_help_panel=NETWORK,
        ),
    ] = None
    health_host: Annotated[
        str, typer.Option(help="Address of the health port.", rich_help_panel=NETWORK)
    ] = ServeConfig.health_host
    close_delay: Annotated[
        float,
        typer.Option(
            min=0,
            help="After SIGTERM, seconds for which it reports not to be ready before it closes; a "
            "second SIGTERM closes at once.",
            rich_help_panel=NETWORK,
        ),
    ] = 5.0
    drain: Annotated[
        float,
        typer.Option(
            min=0,
            help="Seconds that running requests then have to finish.",
            rich_help_panel=NETWORK,
        ),
    ] = ServeConfig.drain
    concurrency: Annotated[
        int,
        typer.Option(
            min=1, help="Running requests of one client, at most.", rich_help_panel=LIMITS
        ),
    ] = ServeConfig.concurrency
    rate: Annotated[
        float | None,
        typer.Option(
            min=0.001,
            help="Requests of one client a second, at most; default: no limit.",
            rich_help_panel=LIMITS,
        ),
    ] = None
    burst: Annotated[
        int,
        typer.Option(
            min=1, help="With --rate: requests that may come at once.", rich_help_panel=LIMITS
        ),
    ] = ServeConfig.burst
    redis: Annotated[
        str | None,
        typer.Option(
            help="Redis, such as redis://host:6379/0, that counts the requests of clients for "
            "several processes together. Without it each process counts for itself.",
            rich_help_panel=LIMITS,
        ),
    ] = None
    max_connections: Annotated[
        int, typer.Option(min=1, help="Open connections, at most.", rich_help_panel=LIMITS)
    ] = ServeConfig.max_connections
    max_connections_per_address: Annotated[
        int,
        typer.Option(
            min=1, help="Open connections from one address, at most.", rich_help_panel=LIMITS
        ),
    ] = ServeConfig.max_connections_per_address
    queue: Annotated[
        int,
        typer.Option(min=1, help="Waiting prompts, at most; more get 429.", rich_help_panel=LIMITS),
    ] = ServeConfig.queue
    wait_ms: Annotated[
        float,
        typer.Option(
            min=0, help="Milliseconds that a batch waits for more prompts.", rich_help_panel=LIMITS
        ),
    ] = 3.0
    max_tokens: Annotated[
        int,
        typer.Option(
            min=1, help="Tokens of a prompt, at most; longer ones get 413.", rich_help_panel=LIMITS
        ),
    ] = ServeConfig.max_tokens
    max_reply: Annotated[
        int,
        typer.Option(
            min=1,
            help="Tokens of a reply of the guard's own model, at most.",
            rich_help_panel=LIMITS,
        ),
    ] = ServeConfig.max_reply
    deadline: Annotated[
        float,
        typer.Option(
            min=0.1,
            help="Seconds that a verdict may take; then the request gets 503.",
            rich_help_panel=LIMITS,
        ),
    ] = ServeConfig.deadline
