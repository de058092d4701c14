"""Replies of reasoning models: what they think, and the final answer, which alone is judged.

A reply that is cut inside its thinking has no answer yet, so nothing is said of it.
"""

from __future__ import annotations

from dataclasses import replace

from latentguard.models.thinking_places import CLOSE, OPEN
from latentguard.prompts import Reply


def is_cut_in_thinking(reply: Reply) -> bool:
    """Whether a reply was cut, at the most tokens allowed, before its thinking ended."""
    begins = reply.text.lstrip().startswith(OPEN)
    return begins and CLOSE not in reply.text and not reply.finished


def final_answer(reply: Reply) -> Reply | None:
    """The reply without its thinking; None if it was cut inside it."""
    if is_cut_in_thinking(reply):
        return None
    if CLOSE in reply.text:
        return replace(reply, text=reply.text.rpartition(CLOSE)[2])
    if reply.text.lstrip().startswith(OPEN):  # it ended without an answer
        return replace(reply, text="")
    return reply
