"""A trial of a chat template in a process of its own, with limits of time, memory and output.

A template is a program that came with a model: it may loop, or print without end. Jinja's sandbox
keeps it from the machine, and bounds nothing else.
"""

from __future__ import annotations

import functools
import json
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from latentguard.errors import TemplateError

MAX_TEMPLATE = 1 << 20
"""Characters of a template."""

CPU_SECONDS = 5
"""Processor time for a few short chats; common templates need some milliseconds."""

WALL_SECONDS = 60.0
"""Time by the clock, on a machine that is busy."""

MEMORY = 1 << 30
"""Bytes of memory, with Python's own."""

MAX_OUTPUT = 1_000_000
"""Characters that the template may write for one of these chats."""

TOO_LONG_OUTPUT, NO_MEMORY = 3, 4
"""Exit codes of the process."""

SCRIPT = """
import json, resource, sys
from datetime import datetime
given = json.load(sys.stdin)
resource.setrlimit(resource.RLIMIT_CPU, (given["seconds"], given["seconds"]))
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
import jinja2, jinja2.ext
from jinja2.sandbox import ImmutableSandboxedEnvironment
resource.setrlimit(resource.RLIMIT_AS, (given["memory"], given["memory"]))

class Generation(jinja2.ext.Extension):
    tags = {"generation"}
    def parse(self, parser):
        next(parser.stream)
        return parser.parse_statements(["name:endgeneration"], drop_needle=True)

def raise_exception(message):
    raise jinja2.TemplateError(message)

environment = ImmutableSandboxedEnvironment(
    trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
)
def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators,
                      sort_keys=sort_keys)

environment.filters["tojson"] = tojson
environment.globals["raise_exception"] = raise_exception
environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
try:
    template = environment.from_string(given["template"])  # constants are put together here
except MemoryError:
    sys.exit(given["codes"][1])
except Exception:  # no template: it cannot run without end, and rendering it says why
    sys.exit(0)
for chat in given["chats"]:
    written = 0
    try:
        how = given["tokens"] | dict(messages=chat, add_generation_prompt=True)
        for piece in template.generate(tools=None, documents=None, **how):
            written += len(piece)
            if written > given["output"]:
                sys.exit(given["codes"][0])
    except MemoryError:
        sys.exit(given["codes"][1])
    except Exception:  # it rejects this chat, in any way it likes; the others are still tried
        pass
"""
"""Renders chats as transformers does; what a template rejects is said where it is rendered."""


def require_bounded(template: str, tokens: dict[str, Any], texts: Sequence[str]) -> None:
    """Check that a template comes to an end for a few chats.

    Args:
        template: Jinja.
        tokens: Special tokens by name, which templates use.
        texts: Messages of the chats that are tried.

    Raises:
        TemplateError: if it takes too long, needs too much memory or writes too much.
    """
    _try(template, json.dumps(tokens, default=str), tuple(texts))


@functools.lru_cache(maxsize=256)
def _try(template: str, tokens: str, texts: tuple[str, ...]) -> None:
    if len(template) > MAX_TEMPLATE:
        raise TemplateError(
            f"The chat template has {len(template):,} characters; expected at most "
            f"{MAX_TEMPLATE:,}. Use another template or model."
        )
    turns = [{"role": "user", "content": text} for text in texts]
    reply = {"role": "assistant", "content": texts[0]}
    trial = dict(
        template=template,
        tokens=json.loads(tokens),
        chats=[*([turn] for turn in turns), [turns[0], reply, turns[0]]],
        seconds=CPU_SECONDS,
        memory=MEMORY,
        output=MAX_OUTPUT,
        codes=(TOO_LONG_OUTPUT, NO_MEMORY),
    )
    _explain(*_run(json.dumps(trial)))


def _run(trial: str) -> tuple[int | None, str]:
    """The exit code, None if it did not come to an end, and what the process complained of."""
    command = [sys.executable, "-c", SCRIPT]
    how: dict[str, Any] = dict(capture_output=True, text=True, timeout=WALL_SECONDS)
    try:
        process = subprocess.run(command, input=trial, check=False, **how)
    except subprocess.TimeoutExpired:
        return None, ""
    return process.returncode, process.stderr


def _explain(code: int | None, complaint: str) -> None:
    if code == 0:
        return
    reasons = {
        TOO_LONG_OUTPUT: f"writes more than {MAX_OUTPUT:,} characters",
        NO_MEMORY: f"needs more than {MEMORY >> 20:,} MiB of memory",
    }
    if code is not None and code > 0 and code not in reasons:
        last = (complaint.strip() or "no reason").splitlines()[-1]
        raise TemplateError(f"The chat template could not be tried in a process of its own: {last}")
    reason = reasons.get(code or 0, f"takes more than {CPU_SECONDS} seconds")
    raise TemplateError(
        f"The chat template {reason} for a short chat, so it was cut. Use another template or "
        "model."
    )
