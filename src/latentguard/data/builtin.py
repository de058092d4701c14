"""The built-in prompts: the contrast set, the traffic, and unlabelled samples.

- The *contrast set* has 660 form-matched pairs and 300 harmless prompts. Both members of a pair
  share frame, form, ending and length, over ten risk categories (MLCommons hazard names), so that
  surface form cannot separate the classes. Of the unpaired harmless prompts, 150 use alarming
  words in a benign sense and 150 are ordinary.
- The *traffic*, on which guards are fitted, resembles what people send to chat models: requests,
  instructions, chats, posts, letters, role play, jailbreak wrappers with a harmful and a harmless
  core, pieces of documents, code, fiction, other languages. It is matched in the same way.

All are requests; no answers are included.
"""

from __future__ import annotations

import hashlib
from dataclasses import replace
from functools import cache
from importlib.resources import as_file, files
from typing import Literal, get_args

from latentguard.errors import PromptError
from latentguard.prompts import Prompt, read_prompts

Split = Literal["train", "validation", "test"]


def load_contrast(split: Split | None = None) -> list[Prompt]:
    """Return the contrast set or one split of it; 60 / 20 / 20 %, by pair, fixed by id.

    Raises:
        PromptError: if there is no such split.
    """
    return _select_split("contrast", split)


def load_traffic(split: Split | None = None) -> list[Prompt]:
    """Return the traffic or one split of it; 80 / 10 / 10 %, by pair, fixed by id.

    Raises:
        PromptError: if there is no such split.
    """
    return _select_split("traffic", split)


def load_samples() -> list[Prompt]:
    """Return twenty unlabelled prompts, harmful and harmless, that are in no split."""
    with as_file(files(__package__) / "samples.jsonl") as path:
        return read_prompts(path)


def split_of(prompt: Prompt) -> Split:
    """Return the split of a prompt; both members of a pair are in the same one."""
    digest = hashlib.sha256((prompt.pair or prompt.id).encode()).digest()
    part = digest[0] % (10 if prompt.source == "traffic" else 5)
    return ("validation", "test", "train")[min(part, 2)]


def _select_split(name: str, split: Split | None) -> list[Prompt]:
    if split is None:
        return list(_read(name))
    if split not in get_args(Split):
        raise PromptError(
            f"The built-in prompts have no split '{split}'; expected one of "
            f"{', '.join(get_args(Split))}, or none for all prompts."
        )
    return [p for p in _read(name) if split_of(p) == split]


@cache
def _read(name: str) -> tuple[Prompt, ...]:
    with as_file(files(__package__) / f"{name}.jsonl") as path:
        return tuple(replace(p, source=name) for p in read_prompts(path))
