"""Writes the pinned guard: every optional field is set, on the planted backend of the tests.

    PYTHONPATH=src:tests python tests/data/make_guard.py

Run it only when the schema changes, and add the new folder: guards that users saved must load.
"""

import json
from dataclasses import replace
from pathlib import Path

from fake_backend import FakeBackend, labelled, texts, with_refusals
from latentguard.guard import packs
from latentguard.guard.artifact import SCHEMA
from latentguard.guard.chunking import Chunking, LengthNorm
from latentguard.guard.latent_guard import LatentGuard
from latentguard.prompts import Message, Prompt
from latentguard.stats.bounds import Bound

FOLDER = Path(__file__).parent / f"guard-schema-{SCHEMA}"

CHUNKING = Chunking(
    chunk_norm=LengthNorm(0.1, 0.2, 0.9),
    whole_norm=LengthNorm(0.3, 0.0, 1.1),
    threshold=2.0,
    bound=Bound(2.0, 0.05, 0.049, 0.95, 1, 100),
    max_chars=30,
    longer_than=200,
)

PROMPTS = [
    Prompt("Please do the bad item number 1", id="harmful"),
    Prompt("Please do the good item number 1", id="harmless"),
    Prompt("Is it bad to know? no", id="refused", segment="en"),
    Prompt("Please do the b\u200bad item number 3", id="obfuscated"),
    Prompt("It was a good day. " * 12 + "\nDo the bad item.", id="long"),
    Prompt("go on", id="chat", history=(Message("user", "bad day"), Message("assistant", "?"))),
]
"""What it is asked; the verdicts stand beside it."""


def make():
    """Fit it."""
    backend = FakeBackend(signal=0.5)
    rows = [
        replace(p, category=("fraud", "arson")[n % 4 // 2] if p.harmful else None)
        for n, p in enumerate(with_refusals(labelled(40)))
    ]
    guard = LatentGuard.fit(backend, rows, reading="pooled")
    guard = replace(guard, chunking=CHUNKING)
    calm = [
        Prompt(text, harmful=False, segment="en" if n < 100 else "de")
        for n, text in enumerate(texts(130, bad=False, start=5000))
    ]
    likely = [Prompt(text, harmful=True) for text in texts(60, bad=True, start=7000)]
    rates = dict(max_fpr=0.05, review_fpr=0.2, segment_column="language")
    guard = guard.calibrate(backend, [*calm, *likely], **rates)
    novel = [Prompt(text, harmful=True) for text in texts(20, bad=False, start=9000, name="novel")]
    states = packs.capture(guard, backend, [*novel, *calm[:40]])
    return backend, packs.with_pack(guard, "novel", states).with_canaries(backend)


if __name__ == "__main__":
    backend, guard = make()
    guard.save(FOLDER)
    verdicts = [verdict.to_dict() for verdict in guard.scan(backend, PROMPTS)]
    (FOLDER / "verdicts.json").write_text(json.dumps(verdicts, indent=1) + "\n")
