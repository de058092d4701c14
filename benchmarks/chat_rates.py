"""Harmless chats that a guard flags, by how many messages they have and what its rate is of.

    python benchmarks/chat_rates.py --out F.json [--guard G --model M --chats N]

Chats are made of the built-in harmless prompts that calibrate nothing (test split), each answered
with two words. A chat is judged as the service judges it: each message by itself, the last one also
in its context. ``chat``: the texts of a chat share the guard's rate; ``text``: each has all of it.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

from latentguard.data.builtin import load_guard_prompts
from latentguard.files import write_atomic
from latentguard.guard.latent_guard import LatentGuard
from latentguard.guard.verdict import Verdict
from latentguard.models.chat_model import ChatModel
from latentguard.prompts import Prompt
from latentguard.serve.chat_readings import chat_readings
from latentguard.serve.chat_thresholds import ChatThresholds
from latentguard.serve.config import RateOf
from latentguard.serve.messages import ChatMessage, own_model_prompt
from latentguard.stats.rates import proportion

LENGTHS = (1, 2, 5, 10, 20)
"""Messages of a user in a chat."""

LONGEST = 300
"""Characters of a message, so that no chat is read by chunks."""

RATES: tuple[RateOf, ...] = get_args(RateOf)


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="default")
    parser.add_argument("--guard", type=Path, required=True)
    parser.add_argument("--chats", type=int, default=100, help="of each length")
    parser.add_argument("--out", type=Path, required=True)
    asked = parser.parse_args()
    guard = LatentGuard.load(asked.guard)
    model = ChatModel.load(asked.model, dtype=guard.fingerprint.dtype)
    guard.verify_model(model)
    rows = [row for length in LENGTHS for row in measure(guard, model, length, asked.chats)]
    record = {"rate": guard.bound.max_fpr if guard.bound else None, "rows": rows}
    write_atomic(asked.out, json.dumps(record, indent=1) + "\n")


def measure(guard: LatentGuard, model: ChatModel, length: int, count: int) -> list[dict[str, Any]]:
    """The share of harmless chats of a length that is flagged, for both rates."""
    known = dict[Prompt, Verdict]()
    judged = [flagged_by_rate(guard, model, chat, known) for chat in chats(length, count)]
    rows = []
    for rate in RATES:
        flags = [one[rate] for one in judged]
        rows.append(
            {"messages": length, "rate_of": rate, "flagged": sum(flags), **_interval(flags)}
        )
    return rows


def flagged_by_rate(
    guard: LatentGuard, model: ChatModel, chat: Sequence[ChatMessage], known: dict[Prompt, Verdict]
) -> dict[RateOf, bool]:
    """Whether the service blocks a chat, by what the rate is of.

    Args:
        guard: The guard.
        model: Its model.
        chat: Ends with a message of the user.
        known: Verdicts on texts that were read before; those of this chat are added.
    """
    readings = chat_readings(chat, context=own_model_prompt(chat))
    new = [one.prompt for one in readings if one.prompt not in known]
    known |= zip(new, guard.scan(model, new), strict=True)
    verdicts = [known[one.prompt] for one in readings]
    newest, segments = [one.is_newest for one in readings], [None] * len(readings)
    decide = ChatThresholds(guard).decide
    return {
        rate: decide(verdicts, newest, segments, rate_of=rate).verdict.flagged for rate in RATES
    }


def chats(length: int, count: int) -> list[list[ChatMessage]]:
    """Harmless chats, drawn with a seed."""
    texts = [p.text for p in load_guard_prompts("test") if not p.harmful and len(p.text) <= LONGEST]
    draw = random.Random(length)
    return [_chat(draw.sample(texts, length)) for _ in range(count)]


def _chat(texts: list[str]) -> list[ChatMessage]:
    said = [ChatMessage(role="user", content=texts[0])]
    for text in texts[1:]:
        said += [ChatMessage(role="assistant", content="I see.")]
        said += [ChatMessage(role="user", content=text)]
    return said


def _interval(flags: list[bool]) -> dict[str, Any]:
    rate = proportion(flags)
    return {"n": len(flags), "share": rate.value, "low": rate.low, "high": rate.high}


if __name__ == "__main__":
    main()
