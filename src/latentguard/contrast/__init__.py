"""The built-in contrast set: 660 form-matched pairs and 300 harmless prompts.

Both members of a pair share frame, form, ending and length, over ten risk categories (MLCommons
hazard names), so that surface form cannot separate the classes. 150 of the lone harmless prompts
use alarming words in a benign sense, 150 are ordinary. Requests only; no answers.

Beside it, traffic: pairs and harmless prompts in the manner of messages that people send to chat
models and services (chats, statements, role play, jailbreak wrappers with a harmful and a harmless
core, pasted texts, code, fiction, other languages), matched in the same way.
"""

from __future__ import annotations

import hashlib
from dataclasses import replace
from importlib.resources import as_file, files
from typing import Literal

from latentguard.prompts import Prompt, read_prompts

Split = Literal["train", "validation", "test"]


def load_contrast(split: Split | None = None, *, traffic: bool = False) -> list[Prompt]:
    """The prompts of one split, or all; about 60 / 20 / 20 %, by pair, fixed by id.

    Args:
        split: Which part; None is all of them.
        traffic: Add the traffic, with the source ``traffic``; it is split in the same way.
    """
    prompts = _read("contrast") + (_read("traffic") if traffic else [])
    return [p for p in prompts if split in (None, split_of(p))]


def load_samples() -> list[Prompt]:
    """Twenty unlabelled prompts, harmful and harmless, that are in no split."""
    with as_file(files(__name__) / "samples.jsonl") as path:
        return read_prompts(path)


def split_of(prompt: Prompt) -> Split:
    """The split of a prompt: both members of a pair fall into the same one."""
    digest = hashlib.sha256((prompt.pair or prompt.id).encode()).digest()
    return ("validation", "test", "train", "train", "train")[digest[0] % 5]


def _read(name: str) -> list[Prompt]:
    with as_file(files(__name__) / f"{name}.jsonl") as path:
        return [replace(p, source=name) for p in read_prompts(path)]
