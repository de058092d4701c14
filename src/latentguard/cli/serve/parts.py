"""What a service is made of, read as its options say; what is heavy is imported inside."""

from __future__ import annotations

import logging
import os
import ssl
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from latentguard.cli.loading import read_guard
from latentguard.cli.serve.options import ServeOptions
from latentguard.errors import GuardError, LatentGuardError, require_extra

if TYPE_CHECKING:
    from latentguard.guard.latent_guard import LatentGuard
    from latentguard.guard.second_opinion import SecondOpinion
    from latentguard.models.chat_model import ChatModel
    from latentguard.serve.audit_log import AuditLog
    from latentguard.serve.config import ServeConfig
    from latentguard.serve.engine import Opener
    from latentguard.serve.keys import ApiKeys
    from latentguard.serve.open_telemetry import OpenTelemetry
    from latentguard.serve.reload import ServedFiles
    from latentguard.serve.served_guards import Binder

log = logging.getLogger("latentguard.serve")

UPSTREAM_KEY = "LATENTGUARD_UPSTREAM_KEY"
ADMIN_KEY = "LATENTGUARD_ADMIN_KEY"


def read_guards(options: ServeOptions) -> tuple[LatentGuard, dict[str, LatentGuard]]:
    """The default guard and the others, without their model; signatures are checked.

    Raises:
        GuardError: if one is not there, damaged, not signed, not of the same model, or cannot judge
            chats.
    """
    from latentguard.serve.chat_thresholds import ChatThresholds

    assert options.guard is not None
    guard = read_guard(options.guard, verify_key=options.verify_key)
    _require_segments(options, guard)
    named_guards: dict[str, LatentGuard] = {}
    for entry in options.guards:
        name, _, source = entry.partition("=")
        named_guards[name] = read_guard(source, verify_key=options.verify_key)
        if not options.allow_mismatch:
            guard.require_match(named_guards[name].fingerprint)
    for one in (guard, *named_guards.values()):
        ChatThresholds(one)  # says what is wrong before the model is loaded
    return guard, named_guards


def read_shadow(options: ServeOptions, guard: LatentGuard) -> LatentGuard | None:
    """The shadow guard, if one is wanted, without its model.

    Raises:
        GuardError: if it is not there, damaged, not signed, or not of the guard's model.
    """
    if options.shadow is None:
        return None
    shadow = read_guard(options.shadow, verify_key=options.verify_key)
    _require_segments(options, shadow)
    different = guard.fingerprint.differences(shadow.fingerprint)
    if different and not options.allow_mismatch:
        raise GuardError(
            f"--shadow {options.shadow}: expected a guard of the model of {options.guard}; found "
            f"other {'; '.join(different)}. Fit it on that model."
        )
    return shadow


def _require_segments(options: ServeOptions, guard: LatentGuard) -> None:
    if options.segment_header and not (guard.thresholds and guard.thresholds.segments):
        raise GuardError(
            "--segment-header: this guard has no segments; calibrate it with --segment-column."
        )


def read_second_opinion(
    options: ServeOptions, guards: Sequence[LatentGuard]
) -> SecondOpinion | None:
    """The second opinion, not loaded; warns of guards that promise nothing with it.

    Raises:
        LatentGuardError: if there is none of this name, or a guard has no review band.
    """
    if options.second_opinion is None:
        return None
    from latentguard.guard.cascade import Cascade, is_promised
    from latentguard.guard.second_opinion import open_second_opinion

    second = open_second_opinion(options.second_opinion)
    for guard in guards:
        Cascade.of(guard, second)  # says what is wrong before anything is loaded
        if not is_promised(guard, second):
            log.warning(
                "Guard %s was not calibrated with the second opinion %s, so nothing is promised of "
                "both together.",
                guard.digest[:12],
                second.name,
            )
    return second


def read_keys(options: ServeOptions) -> ApiKeys:
    """The API keys of the file and the environment.

    Raises:
        LatentGuardError: if one of them is given and holds no key.
    """
    from latentguard.serve.keys import VARIABLE, load_keys

    return load_keys(options.api_keys, os.environ.get(VARIABLE))


def read_upstream_key(options: ServeOptions) -> str | None:
    """The upstream's key: of the file, or of the environment.

    Raises:
        LatentGuardError: if the file or the variable holds none.
    """
    from latentguard.serve.keys import key_of_environment

    if options.upstream_key_file is None:
        return key_of_environment(UPSTREAM_KEY)
    key = options.upstream_key_file.read_text("utf-8").strip()
    if not key or len(key.splitlines()) > 1:
        raise LatentGuardError(f"{options.upstream_key_file} holds no key; expected one line.")
    return key


def read_admin_key() -> str | None:
    """The key of whoever may reload; None lets nobody.

    Raises:
        LatentGuardError: if the variable is there and empty.
    """
    from latentguard.serve.keys import key_of_environment

    return key_of_environment(ADMIN_KEY)


def read_certificate(options: ServeOptions) -> dict[str, Any]:
    """What uvicorn is given to serve HTTPS; nothing for HTTP.

    Raises:
        LatentGuardError: if certificate and key are none, or do not belong together.
    """
    if options.tls_cert is None or options.tls_key is None:
        return {}
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(
            options.tls_cert, options.tls_key, password=""
        )
    except OSError as error:  # SSLError, too
        raise LatentGuardError(
            f"{options.tls_cert} and {options.tls_key} cannot be used ({error}); expected a "
            "certificate chain and its key in PEM without a password."
        ) from None
    return dict(ssl_certfile=str(options.tls_cert), ssl_keyfile=str(options.tls_key))


def read_files(options: ServeOptions) -> ServedFiles:
    """Read guards, keys and known scores: at the start, and anew on SIGHUP.

    Raises:
        LatentGuardError: if something is not as it should be.
    """
    from latentguard.serve.drift import DriftReference
    from latentguard.serve.reload import ServedFiles

    read_certificate(options)  # so that a damaged one replaces nothing
    guard, named_guards = read_guards(options)
    return ServedFiles(
        guard=guard,
        named_guards=named_guards,
        shadow=read_shadow(options, guard),
        keys=read_keys(options),
        upstream_key=read_upstream_key(options),
        reference=DriftReference.of(guard, options.reference),
    )


def config_of(options: ServeOptions, files: ServedFiles) -> ServeConfig:
    """Policies and limits of a service."""
    from latentguard.serve.config import ServeConfig

    same = {field.name for field in fields(ServeConfig)} & {f.name for f in fields(ServeOptions)}
    values = {name: getattr(options, name) for name in same}
    plain = {name: str(v) for name, v in values.items() if isinstance(v, str)}
    lists = {name: tuple(v) for name, v in values.items() if isinstance(v, list)}
    return ServeConfig(
        **(values | plain | lists),
        trusted_roles=tuple(options.trust_roles),
        unread_parameters=tuple(options.allow_parameter),
        name=Path(files.guard.fingerprint.model).name or "latentguard",
        upstream_key=files.upstream_key,
        admin_key=read_admin_key(),
        wait=options.wait_ms / 1000,
    )


def opener(
    guard: LatentGuard, options: ServeOptions, second: SecondOpinion | None = None
) -> Opener:
    """What loads the guard's model, on the scoring thread, and lets the guard meet it.

    The second opinion is loaded there, too, so that the service is not ready before.
    """
    from transformers.utils import logging as transformers_logging

    from latentguard.models.chat_model import ChatModel
    from latentguard.models.threads import choose_threads

    source = options.model or guard.fingerprint.model
    placing = {"device_map": options.device_map} if options.device_map else {}
    bind = binder(options, second)

    def load() -> tuple[LatentGuard, ChatModel]:
        transformers_logging.disable_progress_bar()
        transformers_logging.disable_default_handler()
        transformers_logging.enable_propagation()
        backend = ChatModel.load(source, dtype=guard.fingerprint.dtype, **placing)
        choose_threads(backend)
        if second is not None:
            second.load()
        return bind(guard, backend), backend

    return load


def binder(options: ServeOptions, second: SecondOpinion | None = None) -> Binder:
    """What lets a guard meet the model.

    - Allowed another model, the guard is bound to it: its canaries score from then on as they do
      now.
    - Beside a second opinion that it was not calibrated with, it promises nothing.
    """
    from latentguard.guard.cascade import Cascade
    from latentguard.serve.served_guards import verified

    def accept(guard: LatentGuard, model: ChatModel) -> LatentGuard:
        met = guard.accept_model(model)
        if met is not guard:
            log.warning("%s", guard.shift_to(met))
        return met

    meet = accept if options.allow_mismatch else verified
    if second is None:
        return meet
    return lambda guard, model: Cascade.of(meet(guard, model), second).guard


def open_audit(options: ServeOptions) -> AuditLog | None:
    """The audit log, if one is wanted.

    Raises:
        OSError: if it cannot be opened, or another process writes it.
    """
    from latentguard.serve.audit_log import AuditLog

    if options.audit is None:
        return None
    return AuditLog(
        options.audit,
        max_bytes=options.audit_max_bytes,
        keep=options.audit_keep,
        fsync=str(options.audit_fsync),  # type: ignore[arg-type]
        texts=options.audit_texts,
    )


def open_telemetry(options: ServeOptions) -> OpenTelemetry | None:
    """What sends traces and metrics, if that is wanted.

    Raises:
        MissingExtra: if OpenTelemetry is not installed.
    """
    if not options.otel:
        return None
    require_extra("opentelemetry.sdk.trace", "otel", "--otel")
    require_extra("opentelemetry.exporter.otlp.proto.http", "otel", "--otel")
    from latentguard.serve.open_telemetry import OpenTelemetry

    return OpenTelemetry.from_environment()
