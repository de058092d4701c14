"""Rows of files, of standard input and of Hub data sets, before anything is made of them.

JSON Lines, plain text and CSV are read here, line by line, so that a bad row is named by its line
and no value is guessed to be a number or missing; Parquet and Hub ids go through ``datasets``.
"""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from latentguard.errors import PromptError


def read_rows(source: str, text: str) -> Iterator[tuple[str, str, Mapping[str, Any]]]:
    """Yield where it is, a default id and what it holds, for each row of ``source``.

    Args:
        source: A file, ``-`` or a Hub id, as for ``prompts.stream_prompts``.
        text: The column that a plain line becomes.

    Raises:
        PromptError: if the source or a row cannot be read.
    """
    suffix = Path(source).suffix.lower()
    if source == "-" or suffix in (".jsonl", ".ndjson", ".json", ".txt"):
        yield from _lines(source, text)
    elif suffix in (".csv", ".tsv"):
        yield from _table(source, "\t" if suffix == ".tsv" else ",")
    else:
        for number, row in enumerate(_dataset(source), start=1):
            yield f"{source}, row {number}", f"{Path(source).stem}-{number}", row


def _lines(source: str, text: str) -> Iterator[tuple[str, str, Mapping[str, Any]]]:
    name = _NAME.get(source, source)
    stem = "stdin" if source == "-" else Path(source).stem
    plain = source.lower().endswith(".txt")
    for number, line in enumerate(_open_lines(source), start=1):
        where = f"{name}, line {number}"
        if not line.strip():
            continue
        if plain or (source == "-" and not line.lstrip().startswith("{")):
            yield where, f"{stem}-{number}", {text: line.rstrip("\r\n")}
        else:
            yield where, f"{stem}-{number}", json_row(line, where)


def _table(source: str, delimiter: str) -> Iterator[tuple[str, str, Mapping[str, Any]]]:
    csv.field_size_limit(1 << 30)  # texts may be long
    table = csv.DictReader(_open_lines(source), delimiter=delimiter, strict=True)
    try:
        for number, row in enumerate(table, start=1):
            if None in row:
                raise csv.Error("more fields than columns; put texts in quotes")
            yield f"{source}, line {table.line_num}", f"{Path(source).stem}-{number}", row
    except csv.Error as error:
        where = f"{source}, line {table.reader.line_num}"
        raise PromptError(f"{where}: not CSV ({error}).") from None


_NAME = {"-": "standard input"}


def _open_lines(source: str) -> Iterator[str]:
    number = 0
    try:
        with nullcontext(sys.stdin.buffer) if source == "-" else open(source, "rb") as lines:
            for number, line in enumerate(lines, start=1):
                yield line.decode("utf-8" if number > 1 else "utf-8-sig")
    except OSError as error:
        raise PromptError(f"{source} cannot be read: {error.strerror}.") from None
    except UnicodeDecodeError as error:
        name = _NAME.get(source, source)
        raise PromptError(f"{name}, line {number}: not UTF-8 text ({error.reason}).") from None


def json_row(line: str, where: str) -> dict[str, Any]:
    """Read one line of JSON Lines; ``where`` names it in errors.

    Raises:
        PromptError: if it is not a JSON object.
    """
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise PromptError(f"{where}: not JSON ({error.msg} at column {error.colno}).") from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, deep nesting
        raise PromptError(f"{where}: JSON that cannot be read ({error}).") from None
    if not isinstance(row, dict):
        raise PromptError(f"{where}: expected a JSON object, found a {type(row).__name__}.")
    return row


def _dataset(source: str) -> Iterator[Mapping[str, Any]]:
    import datasets

    what: dict[str, Any]
    if source.lower().endswith(".parquet"):
        what = dict(path="parquet", split="train", data_files=source)
    else:
        name, _, split = source.partition(":")
        org, _, rest = name.partition("/")
        repo, _, config = rest.partition("/")
        what = dict(path=f"{org}/{repo}", name=config or None, split=split or "train")
    try:
        yield from datasets.load_dataset(streaming=True, **what)
    except Exception as error:  # datasets raises a different class for each cause
        reason = str(error).split("\n")[0]
        raise PromptError(
            f"{source} cannot be read: {reason} Expected a .jsonl, .txt, .csv, .tsv or .parquet "
            "file, or a Hub data set as org/name:split."
        ) from error
