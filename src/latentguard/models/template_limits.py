"""Limits of a chat template while it renders: processor time, and characters that it writes.

A template that ends for the short chats of its trial may still loop or print without end for
others. It is Python code, so it is stopped at one of its lines. What it does within one line, such
as a text times a million, is not bounded here.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from time import thread_time
from types import FrameType
from typing import Any

from latentguard.errors import TemplateError

CPU_SECONDS = 5.0
"""Processor time for one chat."""

MAX_OUTPUT = 16_000_000
"""Characters that a template may write for one chat."""

FILE = "<template>"
"""What Jinja calls the file of a template."""


@contextmanager
def template_limits() -> Iterator[None]:
    """Stop templates that this thread renders inside.

    Raises:
        TemplateError: where one takes too long or writes too much.
    """
    limits = _Limits()
    before = sys.gettrace()
    sys.settrace(limits.enter)
    try:
        yield
    finally:
        sys.settrace(before)


class _Limits:
    """Watches the lines of templates; Python calls it."""

    def __init__(self) -> None:
        self._end = thread_time() + CPU_SECONDS
        self._written = 0

    def enter(self, frame: FrameType, _event: str, _value: Any) -> Any:
        """Watch a function if it is of a template."""
        return self.watch if frame.f_code.co_filename == FILE else None

    def watch(self, _frame: FrameType, event: str, value: Any) -> Any:
        """Count what is written, and look at the clock."""
        if event == "return" and isinstance(value, str):  # or yields it
            self._written += len(value)
        if self._written > MAX_OUTPUT:
            raise TemplateError(
                f"The chat template writes more than {MAX_OUTPUT:,} characters for a chat, so it "
                "was stopped. Use another template or model."
            )
        if thread_time() > self._end:
            raise TemplateError(
                f"The chat template takes more than {CPU_SECONDS:g} seconds for a chat, so it was "
                "stopped. Use another template or model."
            )
        return self.watch
