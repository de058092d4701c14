"""Reading prompts and replies: JSON Lines, CSV, Parquet, plain text, a Hub data set."""

from __future__ import annotations

import csv
import json
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from latentguard.data.label_rows import settle_rows
from latentguard.errors import PromptError, require_extra
from latentguard.prompts import Message, Prompt, Reply, parse_chat, parse_reply, parse_turns

MESSAGES = "messages"
"""The column of a chat in OpenAI's form."""

HARMFUL_WORDS = frozenset({"harmful", "unsafe", "true", "yes", "1", "1.0"})
HARMLESS_WORDS = frozenset({"harmless", "safe", "benign", "false", "no", "0", "0.0"})


@dataclass(frozen=True)
class Columns:
    """Which column of a file holds what."""

    text: str = "text"
    """The instruction; the only column that must exist."""

    label: str = "label"
    """``harmful`` / ``harmless``, also 1 / 0, true / false, unsafe / safe."""

    id: str = "id"
    """A name for the row."""

    category: str = "category"
    """Risk category."""

    segment: str = "segment"
    """Which part of the traffic a row belongs to."""


def read_prompts(
    source: str | Path, *, columns: Columns | None = None, harmful: bool | None = None
) -> list[Prompt]:
    """Read every prompt of ``source``; see ``stream_prompts``.

    Raises:
        PromptError: as ``stream_prompts``, and if ``source`` has no rows at all.

    Examples:
        >>> [prompt.text for prompt in lg.read_prompts(folder / "prompts.jsonl")]
        ['Hello.', 'How are you?']
    """
    prompts = list(stream_prompts(source, columns=columns, harmful=harmful))
    if not prompts:
        raise PromptError(f"{source} holds no prompts; expected at least one row with a text.")
    return prompts


def stream_prompts(
    source: str | Path, *, columns: Columns | None = None, harmful: bool | None = None
) -> Iterator[Prompt]:
    """Yield the prompts of a file, of standard input (``-``) or of a Hub data set, in order.

    Of a label file (``latentguard review``) these are the prompts on whose label the reviewers
    agree (``label_rows``).

    Args:
        source: ``.jsonl``, ``.json`` (JSON Lines, or one list), ``.txt`` (one prompt a line),
            ``.csv``, ``.tsv``, ``.parquet``, ``-`` (JSON Lines or plain lines), or a Hub id as
            ``org/name``, ``org/name:split`` or ``org/name/config:split``.
        columns: Which column holds what.
        harmful: The label of rows that carry none.

    Raises:
        PromptError: if the source or a row cannot be used: names file, line and reason.
        MissingExtra: if a Parquet file or a Hub data set is read without the extra ``hub-data``.
    """
    columns = columns or Columns()
    for where, default_id, row in settle_rows(read_rows(str(source), columns.text)):
        prompt = parse_prompt(row, columns, where=where)
        label = prompt.harmful if prompt.harmful is not None else harmful
        yield replace(prompt, id=prompt.id or default_id, harmful=label)


PROMPT_COLUMN = "prompt"
REPLY_COLUMNS = ("reply", "response")
SAFE_COLUMN = "is_safe"
"""A label the other way round, as BeaverTails has it."""


def read_replies(source: str | Path, *, harmful: bool | None = None) -> list[Reply]:
    """Read every reply of ``source``; see ``stream_replies``.

    Raises:
        PromptError: as ``stream_replies``, and if ``source`` has no rows at all.
    """
    replies = list(stream_replies(source, harmful=harmful))
    if not replies:
        raise PromptError(f"{source} holds no replies; expected rows with a prompt and a reply.")
    return replies


def stream_replies(source: str | Path, *, harmful: bool | None = None) -> Iterator[Reply]:
    """Yield the replies of a file or of a Hub data set, in order.

    A row holds either ``prompt`` and ``reply`` (or ``response``), or ``messages`` that end with the
    assistant. Its ``label`` (or ``is_safe``, the other way round) is that of the reply.

    Args:
        source: As for ``stream_prompts``.
        harmful: The label of rows that carry none.

    Raises:
        PromptError: if the source or a row cannot be used: names file, line and reason.
        MissingExtra: if a Parquet file or a Hub data set is read without the extra ``hub-data``.
    """
    for where, default_id, row in read_rows(str(source), PROMPT_COLUMN):
        reply = parse_reply_row(row, where=where)
        label = reply.harmful if reply.harmful is not None else harmful
        prompt = replace(reply.prompt, id=reply.prompt.id or default_id)
        yield replace(reply, prompt=prompt, harmful=label)


def parse_reply_row(row: Mapping[str, Any], *, where: str = "row") -> Reply:
    """Make a reply of one row; ``where`` names the row in errors.

    Raises:
        PromptError: if prompt or reply is missing, empty or not text, or the label is unknown.
    """
    if PROMPT_COLUMN not in row and row.get(MESSAGES):
        reply = parse_reply(row[MESSAGES], where)
    else:
        column = next((name for name in REPLY_COLUMNS if name in row), REPLY_COLUMNS[0])
        if missing := [name for name in (PROMPT_COLUMN, column) if name not in row]:
            columns = ", ".join(map(str, row)) or "none"
            raise PromptError(f"{where}: no column '{missing[0]}'; columns found: {columns}.")
        history = parse_turns(row.get("history"), f"{where}: each of 'history'")
        prompt = Prompt(_text(row[PROMPT_COLUMN], PROMPT_COLUMN, where), history=history)
        reply = Reply(prompt, _text(row[column], column, where))
    label = _label(row.get("label"), "label", where)
    safe = _label(row.get(SAFE_COLUMN), SAFE_COLUMN, where)
    if label is None and safe is not None:
        label = not safe
    request = replace(
        reply.prompt,
        id=str(_value_or(row.get("id"), "")),
        category=_word(row.get("category")),
        source=_word(row.get("source")),
        pair=_word(row.get("pair")),
    )
    return replace(reply, prompt=request, harmful=label)


def select_side(prompts: Iterable[Prompt], *, harmful: bool) -> list[Prompt]:
    """Take the prompts of one side: rows labelled otherwise are left out, unlabelled ones join."""
    return [replace(p, harmful=harmful) for p in prompts if p.harmful in (None, harmful)]


def parse_prompt(row: Mapping[str, Any], columns: Columns, *, where: str = "row") -> Prompt:
    """Make a prompt of one row; ``where`` names the row in errors.

    A row without the text column, but with OpenAI's ``messages``, is a chat.

    Raises:
        PromptError: if the text is missing, empty or not text, or the label is unknown.
    """
    text, history = _text_and_history(row, columns.text, where)
    return Prompt(
        text=text,
        id=str(_value_or(row.get(columns.id), "")),
        harmful=_label(_at(row, columns.label), columns.label, where),
        refused=_label(row.get("refused"), "refused", where),
        category=_word(row.get(columns.category)),
        segment=_word(_at(row, columns.segment)),
        source=_word(row.get("source")),
        pair=_word(row.get("pair")),
        history=history,
    )


def _at(row: Mapping[str, Any], column: str) -> Any:
    """What a column holds; an empty name is no column, though pandas writes its index under one."""
    return row.get(column) if column else None


def _word(value: object) -> str | None:
    return str(value) if _value_or(value, None) is not None else None


def _text_and_history(
    row: Mapping[str, Any], column: str, where: str
) -> tuple[str, tuple[Message, ...]]:
    if column in row:
        history = parse_turns(row.get("history"), f"{where}: each of 'history'")
        return _text(row[column], column, where), history
    if row.get(MESSAGES):
        chat = parse_chat(row[MESSAGES], where)
        return _text(chat.text, MESSAGES, where), chat.history
    columns = ", ".join(map(str, row)) or "none"
    raise PromptError(
        f"{where}: no column '{column}'; columns found: {columns}. Name the right one with "
        "--text-column."
    )


def _value_or(value: object, otherwise: Any) -> Any:
    return otherwise if value is None or value == "" else value


def _text(value: object, column: str, where: str) -> str:
    if not isinstance(value, str):
        kind = "nothing" if value is None else f"a {type(value).__name__}"
        raise PromptError(f"{where}: '{column}' should be text, found {kind}.")
    if not value.strip():
        raise PromptError(f"{where}: '{column}' is empty; remove the row or give it a text.")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise PromptError(f"{where}: '{column}' is not valid Unicode ({error.reason}).") from None
    return value


def _label(value: object, column: str, where: str) -> bool | None:
    word = str(_value_or(value, "")).strip().lower()
    if word in HARMFUL_WORDS:
        return True
    if word in HARMLESS_WORDS:
        return False
    if not word:
        return None
    raise PromptError(f"{where}: '{column}' should be harmful or harmless, found '{value}'.")


def read_rows(source: str, text: str) -> Iterator[tuple[str, str, Mapping[str, Any]]]:
    """Yield where it is, a default id and what it holds, for each row of ``source``.

    Args:
        source: A file, ``-`` or a Hub id, as for ``stream_prompts``.
        text: The column that a plain line becomes.

    Raises:
        PromptError: if the source or a row cannot be read.
        MissingExtra: if a Parquet file or a Hub data set is read without the extra ``hub-data``.
    """
    suffix = Path(source).suffix.lower()
    if source == "-" or suffix in (".jsonl", ".ndjson", ".json", ".txt"):
        yield from _lines(source, text)
    elif suffix in (".csv", ".tsv"):
        yield from _table(source, "\t" if suffix == ".tsv" else ",")
    else:
        rows = _parquet(source) if suffix == ".parquet" else _dataset(source)
        for number, row in enumerate(rows, start=1):
            yield f"{source}, row {number}", f"{Path(source).stem}-{number}", row


def _lines(source: str, text: str) -> Iterator[tuple[str, str, Mapping[str, Any]]]:
    name = _NAME.get(source, source)
    stem = "stdin" if source == "-" else Path(source).stem
    plain = source.lower().endswith(".txt")
    if _is_json_list(source):
        yield from _json_list(source)
        return
    for number, line in enumerate(_open_lines(source), start=1):
        where = f"{name}, line {number}"
        if not line.strip():
            continue
        if plain or (source == "-" and not line.lstrip().startswith("{")):
            yield where, f"{stem}-{number}", {text: line.rstrip("\r\n")}
        else:
            yield where, f"{stem}-{number}", parse_json_row(line, where)


def _is_json_list(source: str) -> bool:
    """Whether a ``.json`` file is one list, and not JSON Lines."""
    if not source.lower().endswith(".json"):
        return False
    first = next((line for line in _open_lines(source) if line.strip()), "").lstrip()
    return first.startswith("[")


def _json_list(source: str) -> Iterator[tuple[str, str, Mapping[str, Any]]]:
    rows = parse_json("".join(_open_lines(source)), source)
    for number, row in enumerate(rows, start=1):
        where = f"{source}, item {number}"
        yield where, f"{Path(source).stem}-{number}", _require_object(row, where)


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


def parse_json_row(line: str, where: str) -> dict[str, Any]:
    """Read one line of JSON Lines; ``where`` names it in errors.

    Raises:
        PromptError: if it is not a JSON object.
    """
    return _require_object(parse_json(line, where), where)


def parse_json(text: str, where: str) -> Any:
    """Read JSON; ``where`` names it in errors.

    Raises:
        PromptError: if it is not JSON, or cannot be read.
    """
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise PromptError(f"{where}: not JSON ({error.msg} at column {error.colno}).") from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, deep nesting
        raise PromptError(f"{where}: JSON that cannot be read ({error}).") from None


def _require_object(row: Any, where: str) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise PromptError(f"{where}: expected a JSON object, found a {type(row).__name__}.")
    return row


HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*(/[\w.-]+)?(:[^/\\]+)?")
"""``org/name``, ``org/name:split`` or ``org/name/config:split``."""

EXPECTED = (
    "Expected a .jsonl, .json, .txt, .csv, .tsv or .parquet file, or a Hub data set as "
    "org/name:split."
)


def _parquet(source: str) -> Iterator[Mapping[str, Any]]:
    pyarrow = require_extra("pyarrow", "hub-data", "Reading Parquet files")
    parquet = require_extra("pyarrow.parquet", "hub-data", "Reading Parquet files")
    try:
        with open(source, "rb") as file:
            for batch in parquet.ParquetFile(file).iter_batches(batch_size=1024):
                yield from batch.to_pylist()
    except (OSError, pyarrow.ArrowException) as error:
        reason = getattr(error, "strerror", None) or _first_line(error)
        raise PromptError(f"{source} cannot be read: {reason}. {EXPECTED}") from None


def _dataset(source: str) -> Iterator[Mapping[str, Any]]:
    if Path(source).is_dir():
        raise PromptError(f"{source} is a folder. {EXPECTED}")
    if Path(source).exists():
        raise PromptError(f"{source} is a file of an unknown kind. {EXPECTED}")
    if not HUB_ID.fullmatch(source):
        raise PromptError(f"{source} cannot be read: no such file. {EXPECTED}")
    name, _, split = source.partition(":")
    org, _, rest = name.partition("/")
    repo, _, config = rest.partition("/")
    which = dict(path=f"{org}/{repo}", name=config or None, split=split or "train")
    yield from _hub_rows(which, source, EXPECTED)


def read_hub_rows(
    id: str, *, config: str | None, split: str, revision: str | None = None
) -> Iterator[Mapping[str, Any]]:
    """Yield the rows of a Hub data set.

    Args:
        id: As ``org/name``.
        config: Which of its configurations; None for the only one.
        split: Such as ``train``.
        revision: A commit, tag or branch; None for the newest.

    Raises:
        PromptError: if it cannot be read.
        MissingExtra: without the extra ``hub-data``.
    """
    pinned = {"revision": revision} if revision else {}
    yield from _hub_rows(dict(path=id, name=config, split=split) | pinned, id, "")


def _hub_rows(which: dict[str, Any], name: str, advice: str) -> Iterator[Mapping[str, Any]]:
    datasets = require_extra("datasets", "hub-data", "Reading Hub data sets")
    try:
        yield from datasets.load_dataset(streaming=True, **which)
    except Exception as error:  # datasets raises a different class for each cause
        reason = f"{name} cannot be read: {_first_line(error)}. {advice}"
        raise PromptError(reason.strip()) from error


def _first_line(error: Exception) -> str:
    return str(error).split("\n")[0].rstrip(".")
