"""The built-in contrast set: 660 form-matched pairs and 300 harmless prompts.

Both members of a pair share frame, form, ending and length, over ten risk categories (MLCommons
hazard names), so that surface form cannot separate the classes. 150 of the lone harmless prompts
use alarming words in a benign sense, 150 are ordinary. Requests only; no answers.

Beside it, traffic, on which guards are fitted: pairs and harmless prompts in the manner of what
people send to chat models and services (requests, instructions, chats, posts, letters, role play,
jailbreak wrappers with a harmful and a harmless core, pieces of documents, code, fiction, other
languages), matched in the same way.
"""

from __future__ import annotations

import hashlib
from dataclasses import replace
from importlib.resources import as_file, files
from typing import Literal

from latentguard.prompts import Prompt, read_prompts

Split = Literal["train", "validation", "test"]


def load_contrast(split: Split | None = None) -> list[Prompt]:
    """The contrast set, or one split of it; 60 / 20 / 20 %, by pair, fixed by id."""
    return _split(_read("contrast"), split)


def load_traffic(split: Split | None = None) -> list[Prompt]:
    """The traffic, or one split of it; 80 / 10 / 10 %, by pair, fixed by id."""
    return _split(_read("traffic"), split)


def load_samples() -> list[Prompt]:
    """Twenty unlabelled prompts, harmful and harmless, that are in no split."""
    with as_file(files(__package__) / "samples.jsonl") as path:
        return read_prompts(path)


def split_of(prompt: Prompt) -> Split:
    """The split of a prompt: both members of a pair fall into the same one."""
    digest = hashlib.sha256((prompt.pair or prompt.id).encode()).digest()
    part = digest[0] % (10 if prompt.source == "traffic" else 5)
    return ("validation", "test", "train")[min(part, 2)]


def _split(prompts: list[Prompt], split: Split | None) -> list[Prompt]:
    return [p for p in prompts if split in (None, split_of(p))]


def _read(name: str) -> list[Prompt]:
    with as_file(files(__package__) / f"{name}.jsonl") as path:
        return [replace(p, source=name) for p in read_prompts(path)]
