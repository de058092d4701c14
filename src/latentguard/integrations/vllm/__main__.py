"""``python -m latentguard.integrations.vllm GUARD [options of vLLM]``: the guarded server."""

from __future__ import annotations

import argparse
import json
import os
import runpy
import sys
from collections.abc import Sequence

from latentguard.errors import GuardError, LatentGuardError
from latentguard.guard.hub import find_guard
from latentguard.guard.latent_guard import LatentGuard
from latentguard.integrations.vllm.backend import TRANSFER
from latentguard.integrations.vllm.columns import require_columns
from latentguard.integrations.vllm.middleware import (
    HOLD_TOKENS,
    POLICIES,
    POLICY,
    RATE_OF,
    RATES,
    REFUSAL,
    REPLY_POLICIES,
    REPLY_POLICY,
    SEGMENT_HEADER,
)
from latentguard.integrations.vllm.plugin import VARIABLE
from latentguard.models.sources import resolve
from latentguard.serve.chat_thresholds import ChatThresholds
from latentguard.serve.config import ServeConfig

MIDDLEWARE = "latentguard.integrations.vllm.middleware.GuardMiddleware"
OWN = ("--kv-transfer-config", "--middleware", "--kv-offloading", "--task", "--runner")
"""Options of vLLM that are set here, or that would open another way."""


def arguments(words: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """VLLM's arguments and the environment, from ours.

    Raises:
        GuardError: if the guard cannot run inside vLLM, or an option is not for the user to set.
    """
    parser = argparse.ArgumentParser(prog="python -m latentguard.integrations.vllm")
    parser.add_argument("guard", help="folder that 'latentguard fit' wrote, Hub id, or 'default'")
    parser.add_argument("--policy", choices=POLICIES, default="block")
    parser.add_argument("--refusal", default=ServeConfig.refusal, help="a blocked chat's answer")
    parser.add_argument(
        "--reply-policy",
        choices=REPLY_POLICIES,
        help="what happens to flagged replies; default: cut, or as --policy annotate",
    )
    parser.add_argument(
        "--hold-tokens",
        type=int,
        default=ServeConfig.hold_tokens,
        help="tokens of a reply that are read beyond one until it is shown",
    )
    parser.add_argument("--model", help="if the model has moved")
    parser.add_argument(
        "--rate-of", choices=RATES, default="chat", help="whose false-positive rate it is"
    )
    parser.add_argument("--segment-header", help="HTTP header that names a request's segment")
    options, rest = parser.parse_known_args(words)
    if reserved := [word for word in rest if word.replace("_", "-").startswith(OWN)]:
        raise GuardError(f"{reserved[0]} is set by the guard; leave it out.")
    folder = find_guard(options.guard)
    guard = LatentGuard.load(folder)
    require_columns(guard)
    ChatThresholds(guard)  # says what is wrong now, and not at the first chat
    if options.segment_header and not (guard.thresholds and guard.thresholds.segments):
        raise GuardError("This guard has no segments; calibrate it with --segment-column.")
    if options.reply_policy:
        guard.require_reply_probe()
    if options.hold_tokens < 0:
        raise GuardError(f"--hold-tokens is {options.hold_tokens}; expected 0 or more.")
    model = resolve(options.model or guard.fingerprint.model)
    own = ["--model", model, "--dtype", guard.fingerprint.dtype, "--middleware", MIDDLEWARE]
    own += ["--kv-transfer-config", json.dumps(TRANSFER)]
    variables = {VARIABLE: str(folder.resolve()), SEGMENT_HEADER: options.segment_header or ""}
    if options.reply_policy:
        variables[REPLY_POLICY] = options.reply_policy
    return [*own, *rest], variables | {
        POLICY: options.policy,
        REFUSAL: options.refusal,
        RATE_OF: options.rate_of,
        HOLD_TOKENS: str(options.hold_tokens),
    }


def main() -> None:
    """Start vLLM's server with the guard inside."""
    try:
        words, variables = arguments(sys.argv[1:])
    except LatentGuardError as error:
        sys.exit(f"Error: {error}")
    os.environ |= variables
    sys.argv[1:] = words
    runpy.run_module("vllm.entrypoints.openai.api_server", run_name="__main__")


if __name__ == "__main__":
    main()
