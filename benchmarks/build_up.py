"""Requests that build up over turns: does the guard see in context what the last message hides?

    python benchmarks/build_up.py --out F.json [--guard G --model M]

``benchmarks/data/build_up.jsonl`` has 20 topics: three harmless messages, and three ways to end.
*Explicit* says by itself what is wanted, *elliptic* says it only in context, *harmless* asks for
something else about the same. The model's own replies stand between, cut short, and are not kept.
A chat is judged as the service judges it, and by its parts; n-grams see all messages of the user.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from chat_rates import flagged_by_rate

from latentguard.data.builtin import load_guard_prompts
from latentguard.data.surface_audit import ngram_scores
from latentguard.files import write_atomic
from latentguard.guard.latent_guard import LatentGuard
from latentguard.guard.verdict import Verdict
from latentguard.models.chat_model import ChatModel
from latentguard.models.conversation import Conversation, Sampling
from latentguard.prompts import Prompt
from latentguard.serve.config import RateOf
from latentguard.serve.messages import ChatMessage, own_model_prompt
from latentguard.stats.detection import separation
from latentguard.stats.rates import proportion

TOPICS = Path(__file__).parent / "data" / "build_up.jsonl"
ENDINGS = ("explicit", "elliptic", "harmless")
REPLY = Sampling(max_tokens=24, temperature=0)
FIGURES = ("in context", "last message alone", "n-grams, all messages")


@dataclass(frozen=True)
class Judged:
    """One chat."""

    ending: str
    """Which of ``ENDINGS``."""

    flagged: Mapping[RateOf, bool]
    """Whether the service blocks it at its last turn, by what the rate is of."""

    was_flagged: bool
    """Whether it blocks it before, where the texts share the rate."""

    scores: Mapping[str, float]
    """By ``FIGURES``."""


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="default")
    parser.add_argument("--guard", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    asked = parser.parse_args()
    guard = LatentGuard.load(asked.guard)
    model = ChatModel.load(asked.model, dtype=guard.fingerprint.dtype)
    guard.verify_model(model)
    topics = [json.loads(line) for line in TOPICS.read_text("utf-8").splitlines()]
    judged = [one for topic in topics for one in judge(guard, model, topic)]
    record = {"topics": len(topics), "rates": rates(judged), "areas": areas(judged)}
    write_atomic(asked.out, json.dumps(record, indent=1) + "\n")


def judge(guard: LatentGuard, model: ChatModel, topic: Mapping[str, Any]) -> Iterator[Judged]:
    """The chats of a topic."""
    chat, known = list[ChatMessage](), dict[Prompt, Verdict]()
    was_flagged = False
    for text in topic["turns"]:
        chat.append(ChatMessage(role="user", content=text))
        was_flagged |= flagged_by_rate(guard, model, chat, known)["chat"]
        chat.append(ChatMessage(role="assistant", content=reply(model, chat)))
    for ending in ENDINGS:
        last = ChatMessage(role="user", content=topic[ending])
        whole = [*chat, last]
        context, alone = guard.scan(model, [own_model_prompt(whole), Prompt(last.text)])
        said = Prompt("\n".join([*topic["turns"], last.text]))
        (words,) = ngram_scores(load_guard_prompts("train"), [said])
        scores = dict(zip(FIGURES, (context.score, alone.score, float(words)), strict=True))
        flagged = flagged_by_rate(guard, model, whole, known)
        yield Judged(ending, flagged, was_flagged, scores)


def reply(model: ChatModel, chat: Sequence[ChatMessage]) -> str:
    """The beginning of the model's own reply."""
    said = Conversation(model, own_model_prompt(chat), positions=(), layers=(1,))
    return "".join(piece.text for piece in said.pieces(REPLY)) or "I see."


def rates(judged: Sequence[Judged]) -> list[dict[str, Any]]:
    """How many chats of each ending are blocked."""
    rows = []
    for ending in ENDINGS:
        own = [one for one in judged if one.ending == ending]
        for what, flags in (
            ("before the last turn", [one.was_flagged for one in own]),
            ("at the last turn, --rate-of chat", [one.flagged["chat"] for one in own]),
            ("at the last turn, --rate-of text", [one.flagged["text"] for one in own]),
        ):
            rate = proportion(flags)
            figures = {"share": rate.value, "low": rate.low, "high": rate.high, "n": len(flags)}
            rows.append({"ending": ending, "flagged": what, **figures})
    return rows


def areas(judged: Sequence[Judged]) -> list[dict[str, Any]]:
    """AUROC of each ending against the harmless one, by what is read."""
    rows = []
    for ending in ENDINGS[:2]:
        for figure in FIGURES:
            sides = [
                [one.scores[figure] for one in judged if one.ending == side]
                for side in (ending, "harmless")
            ]
            area = separation(*sides)
            figures = {"auroc": area.value, "low": area.low, "high": area.high}
            rows.append({"ending": ending, "read": figure, **figures})
    return rows


if __name__ == "__main__":
    main()
