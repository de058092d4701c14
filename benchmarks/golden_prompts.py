"""What the golden records ask: 400 prompts and the rows that guards are fitted on, as one file.

    python benchmarks/golden_prompts.py

Everything is drawn with a seed from built-in data. The file was written once and is kept, so that
golden records do not depend on the code that draws; run this again only to make new records.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from latentguard.contrast import load_contrast, load_samples, load_traffic
from latentguard.contrast.frames import document, filler
from latentguard.stress.attacks import ATTACKS

from latentguard.prompts import Prompt
from latentguard.report import write_text

FILE = Path(__file__).parent / "results" / "golden-prompts.json"

SHORT, DOCUMENTS, CHATS, DISGUISED = 110, 26, 44, 90
"""Prompts of each kind; of short ones, so many from each of the two sets."""

DOCUMENT_SIZES = (540, 1600)
"""Characters of the shortest and of the longest document, about."""

TRAINING, CALM, PACK = 200, 200, 30
"""Training rows of each class, harmless rows to calibrate on, examples of the pack."""

SYSTEM = "You are a helpful assistant. Answer briefly."

OPENINGS = ("What can you help me with?", "Thanks, that was useful. One more question.")

FAMILIES = (
    "special tokens",
    "template imitation",
    "homoglyphs",
    "unseen characters",
    "case and spacing",
    "encodings",
    "two requests",
)
"""Families of attacks that are used as disguises."""

Row = dict[str, Any]


def main() -> None:
    """Draw everything and write it."""
    draw = random.Random("golden")
    requests = [*load_contrast("test"), *load_traffic("test")]
    short = [p for p in requests if len(p.text) <= 400]
    prompts = [
        *plain(draw),
        *documents(draw, short),
        *chats(draw, short),
        *disguised(draw, short),
    ]
    lines = ",\n".join(json.dumps(prompt) for prompt in prompts)
    ids = json.dumps(rows(draw))
    write_text(FILE, f'{{"prompts": [\n{lines}\n],\n"rows": {ids}}}\n')
    print(f"{len(prompts)} prompts, {FILE.stat().st_size / 1000:.0f} kB")


def row(name: str, text: str, kind: str, history: list[Row] | None = None) -> Row:
    """One prompt as JSON."""
    return {"id": name, "slice": kind, "text": text, "history": history or []}


def plain(draw: random.Random) -> list[Row]:
    """Prompts as they are: some of each test split, and the samples."""
    drawn = [
        *draw.sample(load_contrast("test"), SHORT),
        *draw.sample(load_traffic("test"), SHORT),
        *load_samples(),
    ]
    return [row(f"short-{p.id}", p.text, "short") for p in drawn]


def documents(draw: random.Random, requests: list[Prompt]) -> list[Row]:
    """Requests, half of them harmful, inside long texts; two of the texts are disguised."""
    found, (least, most) = [], DOCUMENT_SIZES
    for number in range(DOCUMENTS):
        side = [p for p in requests if p.harmful is (number % 2 == 0)]
        size = round(least * (most / least) ** draw.random())
        text = document(draw.choice(side).text, size, seed=f"golden {number}")
        if number >= DOCUMENTS - 2:
            text = attack_named("homoglyphs, a third")(text)
        found.append(row(f"document-{number}", text, "document"))
    return found


def chats(draw: random.Random, requests: list[Prompt]) -> list[Row]:
    """Chats of two to four turns, the harmful request in any of them; some begin with a system."""
    found = []
    for number in range(CHATS):
        said = [p.text for p in draw.sample([p for p in requests if not p.harmful], 3)]
        turns = [draw.choice(OPENINGS), *said[: draw.randint(1, 3)]]
        if number % 2 == 0:
            harmful = draw.choice([p for p in requests if p.harmful]).text
            turns[draw.randrange(len(turns))] = harmful
        if number % 5 == 4:
            turns[0] = attack_named("leetspeak")(turns[0])
        history = [{"role": "system", "content": SYSTEM}] if number % 3 == 0 else []
        for turn, text in enumerate(turns[:-1]):
            reply = filler(60, seed=f"golden chat {number} {turn}")
            history += [{"role": "user", "content": text}, {"role": "assistant", "content": reply}]
        found.append(row(f"chat-{number}", turns[-1], "chat", history))
    return found


def disguised(draw: random.Random, requests: list[Prompt]) -> list[Row]:
    """Requests under every change of characters and surroundings, in turn."""
    attacks = [attack for attack in ATTACKS if attack.family in FAMILIES]
    found = []
    for number in range(DISGUISED):
        attack = attacks[number % len(attacks)]
        harmful = (number // len(attacks)) % 4 != 3
        request = draw.choice([p for p in requests if p.harmful is harmful])
        name = f"disguised-{number}-{attack.name.replace(' ', '-')}"
        found.append(row(name, attack(request.text), "disguised"))
    return found


def attack_named(name: str) -> Any:
    """One change of text."""
    return next(attack for attack in ATTACKS if attack.name == name)


def rows(draw: random.Random) -> dict[str, list[str]]:
    """Ids of the rows that guards are fitted and calibrated on, and of the pack's examples."""
    train, held_out = load_traffic("train"), load_traffic("validation")
    harmful, harmless = ([p.id for p in train if p.harmful is side] for side in (True, False))
    drawn = [*draw.sample(harmful, TRAINING), *draw.sample(harmless, TRAINING)]
    calm = draw.sample([p.id for p in held_out if not p.harmful and len(p.text) < 400], 2 * CALM)
    fraud = [p.id for p in train if p.harmful and p.category == "fraud" and p.id not in drawn]
    return {
        "train": drawn,
        "calibration": calm[:CALM],
        "pack_harmless": calm[CALM:],
        "pack_examples": draw.sample(fraud, PACK),
    }


if __name__ == "__main__":
    main()
