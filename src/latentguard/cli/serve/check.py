"""What ``serve --check`` looks at: everything that would keep a service from starting."""

from __future__ import annotations

from collections.abc import Callable

from latentguard.cli.loading import require_model
from latentguard.cli.serve.options import ServeOptions
from latentguard.cli.serve.parts import (
    read_admin_key,
    read_certificate,
    read_guards,
    read_keys,
    read_second_opinion,
    read_shadow,
    read_upstream_key,
)
from latentguard.errors import LatentGuardError
from latentguard.serve.audit_sinks import require_writable
from latentguard.serve.connections import require_file_descriptors
from latentguard.serve.drift import DriftReference


def find_problems(options: ServeOptions) -> list[str]:
    """Each problem in a sentence; none if the service would start.

    The model is looked for, not loaded; the port is not taken, since a service may have it.
    """
    checks: list[Callable[[], object]] = [
        lambda: _check_guard(options),
        lambda: read_keys(options),
        lambda: read_upstream_key(options),
        read_admin_key,
        lambda: read_certificate(options),
        lambda: DriftReference.read(options.reference),
        lambda: _check_audit(options),
        lambda: require_file_descriptors(
            options.max_connections, has_upstream=options.upstream is not None
        ),
    ]
    problems = []
    for check in checks:
        try:
            check()
        except (LatentGuardError, OSError) as error:
            problems.append(str(error))
    return problems


def _check_guard(options: ServeOptions) -> None:
    guard, named_guards = read_guards(options)
    shadow = read_shadow(options, guard)
    others = [*named_guards.values(), *([shadow] if shadow else [])]
    read_second_opinion(options, [guard, *others])
    require_model(options.model or guard.fingerprint.model)


def _check_audit(options: ServeOptions) -> None:
    if options.audit is not None:
        require_writable(options.audit)
