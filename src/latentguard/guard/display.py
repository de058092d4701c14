"""How guards and verdicts look in a notebook."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from latentguard.guard.spec import GuardSpec


def facts_table(title: str, facts: Mapping[str, str]) -> str:
    """An HTML table of names and values under a title; everything is escaped."""
    rows = "".join(
        f'<tr><th style="text-align:left">{escape(name)}</th>'
        f'<td style="text-align:left">{escape(value)}</td></tr>'
        for name, value in facts.items()
        if value
    )
    caption = f'<caption style="text-align:left"><b>{escape(title)}</b></caption>'
    return f"<table>{caption}{rows}</table>"


def guard_table(guard: GuardSpec) -> str:
    """An HTML table of what a guard is."""
    from latentguard.states import show_numbers  # verdicts are shown without torch

    categories = guard.categories
    facts = {
        "model": f"{guard.fingerprint.model} ({guard.fingerprint.dtype})",
        "reads": f"{guard.reading.name}: {', '.join(guard.reading.positions)}",
        "probe": f"{guard.probe.kind}, layers {show_numbers(guard.probe.layers)}",
        "threshold": f"{guard.threshold:.4g}: {guard.promise}",
        "axes": ", ".join(f"{axis.name} at {axis.position}" for axis in guard.axes),
        "long prompts": guard.chunking.notes()[0] if guard.chunking else "read whole",
        "replies": guard.replies.promise if guard.replies else "not judged",
        "obfuscated text": "also read decoded" if guard.deobfuscate else "read as it stands",
        "categories": ", ".join(categories.directions.names) if categories else "",
        "packs": ", ".join(categories.packs) if categories else "",
        "labels": ", ".join(b.name for b in guard.adaptation.batches) if guard.adaptation else "",
    }
    return facts_table("Latent guard", facts)
