"""Public sets into a data folder, from the Hub or from a mirror folder, with their digests."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from latentguard.data.prompt_files import Columns, parse_json_row, parse_prompt, read_hub_rows
from latentguard.data.public_sets import HubSource, PublicSet
from latentguard.errors import PromptError
from latentguard.files import write_atomic

SOURCES = "sources.json"
"""In a data folder: where each file comes from, and its digest."""

State = Literal["missing", "there", "changed", "unknown source"]
"""Of a file in a data folder: ``changed`` since it was fetched, or not fetched by this program."""


@dataclass(frozen=True)
class FetchedSet:
    """A public set as it lies in a data folder."""

    name: str
    """Of its file, without ``.jsonl``."""

    rows: int
    """How many rows it has."""

    sha256: str
    """Of the file."""

    licence: str
    """Of the texts."""

    source: str
    """Where it comes from: a Hub id with its revision, or a file of a mirror."""


@dataclass(frozen=True)
class LocalSet:
    """What a data folder holds of a public set."""

    state: State
    """Whether it is there."""

    rows: int = 0
    """How many rows its file has."""

    source: str = ""
    """Where it comes from, if that is known."""


def fetch_set(
    public_set: PublicSet, folder: Path, *, mirror: Path | None = None, overwrite: bool = False
) -> FetchedSet:
    """Put a public set into a data folder as ``NAME.jsonl``, and note it in ``sources.json``.

    Args:
        public_set: Which.
        folder: The data folder; made if it is not there.
        mirror: Take it from this folder, not from the Hub.
        overwrite: Replace a file that is there and holds something else.

    Raises:
        PromptError: if it cannot be had, a row cannot be used, or another file is there.
        MissingExtra: if it comes from the Hub, and the extra ``hub-data`` is not installed.
    """
    lines, source = _mirrored(public_set, mirror) if mirror else _from_hub(public_set)
    content = "".join(f"{line}\n" for line in lines).encode()
    path = folder / f"{public_set.name}.jsonl"
    if path.exists() and path.read_bytes() != content and not overwrite:
        raise PromptError(
            f"{path} is there and holds something else; move it away, or add --overwrite."
        )
    digest = hashlib.sha256(content).hexdigest()
    fetched = FetchedSet(public_set.name, len(lines), digest, public_set.licence, source)
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(path, content)
    notes = read_sources(folder) | {public_set.name: fetched}
    record = {name: asdict(one) for name, one in sorted(notes.items())}
    write_atomic(folder / SOURCES, json.dumps(record, indent=1) + "\n")
    return fetched


def read_sources(folder: Path) -> dict[str, FetchedSet]:
    """What ``sources.json`` of a data folder says of each set; nothing if it is not there.

    Raises:
        PromptError: if it cannot be read.
    """
    path = folder / SOURCES
    if not path.exists():
        return {}
    try:
        record: dict[str, Any] = json.loads(path.read_text("utf-8"))
        return {name: FetchedSet(**one) for name, one in record.items()}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise PromptError(f"{path} cannot be read ({error}); remove it, and fetch again.") from None


def inspect_set(public_set: PublicSet, folder: Path) -> LocalSet:
    """Say what a data folder holds of a public set."""
    path = folder / f"{public_set.name}.jsonl"
    if not path.is_file():
        return LocalSet("missing")
    content = path.read_bytes()
    rows = sum(1 for line in content.splitlines() if line.strip())
    noted = read_sources(folder).get(public_set.name)
    if noted is None:
        return LocalSet("unknown source", rows)
    is_same = hashlib.sha256(content).hexdigest() == noted.sha256
    return LocalSet("there" if is_same else "changed", rows, noted.source)


def _mirrored(public_set: PublicSet, mirror: Path) -> tuple[list[str], str]:
    """The lines of a set in a mirror folder, unchanged, and the file that they come from."""
    files = ((public_set.name, None), *public_set.mirrors)
    for name, category in files:
        path = mirror / f"{name}.jsonl"
        if path.is_file():
            lines = list(_checked_lines(path, category))
            if lines:
                return lines, str(path)
    names = " or ".join(f"{name}.jsonl" for name, _ in files)
    raise PromptError(f"{mirror} holds no {names}. It is published at {public_set.upstream}.")


def _checked_lines(path: Path, category: str | None) -> Iterator[str]:
    """The lines of a file whose rows are prompts, of one category or of all.

    Raises:
        PromptError: if a row cannot be used: names file, line and reason.
    """
    try:
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise PromptError(f"{path} cannot be read ({error}).") from None
    for number, line in enumerate(text.split("\n"), start=1):  # not the other ends of Unicode
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        prompt = parse_prompt(parse_json_row(line, where), Columns(), where=where)
        if category in (None, prompt.category):
            yield line


def _from_hub(public_set: PublicSet) -> tuple[list[str], str]:
    """The rows of a set on the Hub as lines, and its id with its revision."""
    hub = public_set.hub
    if hub is None:
        raise PromptError(
            f"{public_set.name} is not on the Hub. It is published at {public_set.upstream}: put "
            f"it into a folder as {public_set.name}.jsonl, and name the folder with --mirror."
        )
    try:
        lines = list(islice(_hub_lines(public_set, hub), public_set.limit))
    except PromptError as error:
        raise PromptError(f"{error}{_access_advice(hub)}") from None
    return lines, f"{hub.id}@{hub.revision}" if hub.revision else hub.id


def _access_advice(hub: HubSource) -> str:
    if not hub.is_gated:
        return ""
    return (
        f" It is gated: accept its terms at https://huggingface.co/datasets/{hub.id}, then run "
        "'hf auth login'."
    )


def _hub_lines(public_set: PublicSet, hub: HubSource) -> Iterator[str]:
    number = 0
    for split in hub.splits:
        rows = read_hub_rows(hub.id, config=hub.config, split=split, revision=hub.revision)
        for row in rows:
            try:
                request = hub.read(row, split)
            except (KeyError, IndexError, TypeError) as error:
                raise PromptError(
                    f"{hub.id}, split {split}: a row has not the expected columns ({error!r}); "
                    f"found {', '.join(map(str, row))}."
                ) from None
            if request is None or not request.text.strip():
                continue
            number += 1
            label = "harmful" if request.harmful else "harmless"
            line = dict(id=f"{public_set.name}-{number:04}", text=request.text.strip(), label=label)
            if request.category:
                line |= dict(category=request.category)
            yield json.dumps(line | dict(source=f"{hub.id}:{split}"), ensure_ascii=False)
