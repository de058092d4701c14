"""The sets of the suite, and their prompts out of a data folder.

A file of the folder holds the rows that ``latentguard data fetch`` writes, or rows as the set is
published. Its name is the set's; case, dashes and underscores do not matter.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from latentguard.data.prompt_files import Columns, parse_prompt, read_rows
from latentguard.data.public_sets import PUBLIC_SETS, PublicSet
from latentguard.errors import PromptError
from latentguard.prompts import Prompt

SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
"""Kinds of files that may hold a set."""


@dataclass(frozen=True)
class SuiteSet:
    """One set of the suite."""

    name: str
    """As in ``latentguard data list``."""

    title: str
    """As people call it."""

    @property
    def public(self) -> PublicSet:
        """Where it is published, and under which licence."""
        return next(one for one in PUBLIC_SETS if one.name == self.name)


SUITE = (
    SuiteSet("toxicchat", "ToxicChat"),
    SuiteSet("openai_moderation", "OpenAI moderation"),
    SuiteSet("aegis", "Aegis"),
    SuiteSet("aegis2", "Aegis 2"),
    SuiteSet("simple_safety_tests", "SimpleSafetyTests"),
    SuiteSet("harmbench", "HarmBench"),
    SuiteSet("wildguardtest", "WildGuardTest"),
    SuiteSet("xstest", "XSTest"),
    SuiteSet("or_bench", "OR-Bench"),
)
"""Every set, in the order of the tables."""


@dataclass(frozen=True)
class LoadedSet:
    """A set with its prompts."""

    suite_set: SuiteSet
    """Which."""

    prompts: tuple[Prompt, ...]
    """All labelled."""

    path: Path
    """The file."""

    available: int
    """How many prompts the file holds; more than ``prompts`` if a limit was asked for."""

    @property
    def note(self) -> str:
        """How many prompts were read, where it is not the whole set."""
        read = len(self.prompts)
        whole = self.suite_set.public.rows
        return f"{read:,}" if read == whole else f"{read:,} (the whole set: {whole:,})"


def load_set(suite_set: SuiteSet, folder: Path, *, limit: int | None = None) -> LoadedSet | None:
    """Read a set out of a data folder; None if the folder has no file of it.

    Args:
        suite_set: Which.
        folder: The data folder.
        limit: At most so many prompts, evenly spaced; None for all.

    Raises:
        PromptError: if the file cannot be read as rows of this set.
    """
    path = find_file(suite_set.public, folder)
    if path is None:
        return None
    prompts = read_set(suite_set.public, path)
    sample = prompts
    if limit is not None and limit < len(prompts):
        sample = [prompts[n * len(prompts) // limit] for n in range(limit)]
    return LoadedSet(suite_set, tuple(sample), path, len(prompts))


def find_file(public: PublicSet, folder: Path) -> Path | None:
    """The file of a set in a folder; None if there is none.

    Raises:
        PromptError: if there are several, which may differ.
    """
    for name in (public.name, *(name for name, category in public.mirrors if category is None)):
        matches = [
            path
            for path in sorted(folder.iterdir())
            if path.suffix.lower() in SUFFIXES and _plain(path.stem) == _plain(name)
        ]
        if len(matches) > 1:
            names = " and ".join(path.name for path in matches)
            raise PromptError(f"{folder} holds {names}, both {public.name}; leave one of them.")
        if matches:
            return matches[0]
    return None


def read_set(public: PublicSet, path: Path) -> list[Prompt]:
    """The labelled prompts of a file of a set, as fetched or as published.

    Raises:
        PromptError: if a row is neither, or there is none.
    """
    prompts = list[Prompt]()
    for where, id, row in read_rows(str(path), "text"):
        prompt = _prompt(public, row, where)
        if prompt is not None:
            prompts.append(prompt if prompt.id else replace(prompt, id=id))
    if not prompts:
        raise PromptError(f"{path} holds no prompts of {public.name}.")
    return prompts


def _prompt(public: PublicSet, row: Mapping[str, Any], where: str) -> Prompt | None:
    if "text" in row and "label" in row:
        prompt = parse_prompt(row, Columns(), where=where)
        if prompt.harmful is None:
            raise PromptError(f"{where}: expected a label, 'harmful' or 'harmless'; found none.")
        return prompt
    if public.hub is None:
        raise PromptError(f"{where}: expected the columns 'text' and 'label'.")
    try:
        request = public.hub.read(row, public.hub.splits[0])
    except (KeyError, IndexError, TypeError, ValueError):
        raise PromptError(
            f"{where}: expected the columns 'text' and 'label', or those that {public.hub.id} "
            f"has; found {', '.join(map(str, row))}."
        ) from None
    if request is None or not request.text.strip():
        return None
    return Prompt(request.text.strip(), harmful=request.harmful, category=request.category)


def _plain(name: str) -> str:
    """A file name without case, dashes and underscores."""
    return re.sub(r"[^a-z0-9]", "", name.lower())
