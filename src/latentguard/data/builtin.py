"""The built-in prompts: the contrast set, the guard prompts, and unlabelled samples.

- The *contrast set* has 660 form-matched pairs and 300 harmless prompts. Both members of a pair
  share frame, form, ending and length, over ten risk categories (MLCommons hazard names), so that
  surface form cannot separate the classes. Of the unpaired harmless prompts, 150 use alarming
  words in a benign sense and 150 are ordinary.
- The *guard prompts*, on which guards are fitted, are like what people send to chat models: plain
  requests, instructions, chats, posts, letters, role play, jailbreak wrappers with a harmful and a
  harmless core, pieces of documents, code, fiction, other languages. They are matched in the same
  way.

All are requests; no answers are included.
"""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from importlib.resources import as_file, files
from typing import Literal, get_args

from latentguard.data.prompt_files import read_prompts
from latentguard.errors import PromptError
from latentguard.prompts import Prompt

Split = Literal["train", "validation", "test"]

DEFAULT_ROWS = 4000
"""Rows that a guard is fitted on unless another number is given: the knee of the learning curve.

Of SmolLM2-135M's guard, all 9,755 rows raise the mean AUROC on eight public sets from 0.917 to
0.923, for 2.4 times the reading and ten times the fitting.
"""

FILES = {"contrast": "contrast.jsonl", "traffic": "guard_prompts.jsonl"}
"""The file of each set: form-matched pairs; the guard prompts, whose older name is in guards."""

ORDER_SEED = 0
"""Seed of the order in which training rows are taken."""


def load_contrast(split: Split | None = None) -> list[Prompt]:
    """Return the contrast set or one split of it; 60 / 20 / 20 %, by pair, fixed by id.

    Raises:
        PromptError: if there is no such split.

    Examples:
        >>> prompts = lg.load_contrast("test")
        >>> prompts[0].harmful, prompts[1].harmful
        (True, False)
    """
    return _select_split("contrast", split)


def load_guard_prompts(split: Split | None = None) -> list[Prompt]:
    """Return the guard prompts or one split of them; 80 / 10 / 10 %, by pair, fixed by id.

    Raises:
        PromptError: if there is no such split.

    Examples:
        >>> harmless = [p for p in lg.load_guard_prompts("validation") if not p.harmful]
        >>> len(harmless) > 100
        True
    """
    return _select_split("traffic", split)


def load_training_rows(count: int | None = DEFAULT_ROWS) -> list[Prompt]:
    """Return the guard prompts that guards are fitted on: at most ``count`` rows, or all if None.

    - Kinds of text and risk categories have the shares that they have among all rows.
    - Both members of a pair are in, or none.
    - The rows depend on ``count`` alone, and those of a smaller count are among those of a larger.

    Raises:
        PromptError: if ``count`` is below 2, the rows of one pair.
    """
    rows = load_guard_prompts("train")
    if count is None:
        return rows
    if count < 2:
        raise PromptError(f"At least 2 training rows are needed, one pair; found {count}.")
    ids = set[str]()
    for unit in _stratified_units(rows):
        if len(ids) + len(unit) > count:
            break
        ids.update(prompt.id for prompt in unit)
    return [prompt for prompt in rows if prompt.id in ids]


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


def _stratified_units(prompts: Sequence[Prompt]) -> list[list[Prompt]]:
    """Pairs and unpaired prompts, each stratum spread evenly over the whole list.

    A stratum is a kind of text, a category, and whether its rows are paired. Its units come in the
    order of a hash of their names, from a place that a hash of the stratum gives.
    """
    kinds = _text_kinds()
    units = defaultdict[str, list[Prompt]](list)
    for prompt in prompts:
        units[prompt.pair or prompt.id].append(prompt)
    strata = defaultdict[tuple[str, str | None, int], list[str]](list)
    for name, unit in units.items():
        strata[kinds[unit[0].id], unit[0].category, len(unit)].append(name)
    places = dict[str, float]()
    for stratum, names in strata.items():
        start = _hash_fraction(str(stratum))
        for rank, name in enumerate(sorted(names, key=_hash_fraction)):
            places[name] = (rank + start) / len(names)
    return [units[name] for name in sorted(places, key=lambda name: (places[name], name))]


def _hash_fraction(name: str) -> float:
    """A number from 0 to 1 that depends on the name alone."""
    digest = hashlib.sha256(f"{ORDER_SEED} {name}".encode()).digest()
    return int.from_bytes(digest[:8]) / 2**64


@cache
def _text_kinds() -> dict[str, str]:
    """The kind of text of each guard prompt, by id."""
    with as_file(files(__package__) / FILES["traffic"]) as path:
        rows = map(json.loads, path.read_text("utf-8").splitlines())
        return {row["id"]: row["kind"] for row in rows}


@cache
def _read(name: str) -> tuple[Prompt, ...]:
    with as_file(files(__package__) / FILES[name]) as path:
        return tuple(replace(p, source=name) for p in read_prompts(path))
