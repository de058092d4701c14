"""Corpora: files of prompts, cut into blocks of rows that any worker can read on its own."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from glob import glob
from itertools import accumulate, islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from latentguard.data.prompt_files import Columns, parse_json_row, parse_prompt, read_rows
from latentguard.errors import PromptError
from latentguard.files import atomic_path
from latentguard.prompts import Prompt

LINES = (".jsonl", ".ndjson")
SCHEMA = 2
"""Of the files of verdicts; part of their names."""


@dataclass(frozen=True)
class SourceFile:
    """One file of a corpus, read once."""

    path: str
    sha256: str
    rows: int
    """Lines of JSON Lines, blank ones included; rows of Parquet."""

    offsets: tuple[int, ...]
    """Byte at which each block starts in JSON Lines; zeros for Parquet."""


@dataclass(frozen=True)
class Block:
    """Some rows of one file, next to each other."""

    index: int
    """Its place in the corpus."""

    path: str
    start: int
    """Its first row in the file."""

    stop: int
    """The row after its last."""

    offset: int
    """The byte at which it starts in JSON Lines."""

    base: int
    """The number in the corpus of the file's first row."""

    name: str
    """The file of its verdicts."""


@dataclass(frozen=True)
class Row:
    """One row of a corpus."""

    number: int
    """In the corpus, from 0."""

    id: str

    prompt: Prompt | None
    """None if the row cannot be used."""

    error: str | None = None
    """Why."""


def find_files(
    source: str, columns: Columns, staging: Path, apart: Path | None = None
) -> list[str]:
    """The Parquet and JSON Lines files of a file, a folder or a pattern, sorted by name.

    Anything else that ``stream_prompts`` reads, a Hub set above all, is first copied into
    one Parquet file in ``staging``. What lies under ``apart``, where verdicts go, is left out.

    Raises:
        PromptError: if there is no such file, or a row of a copied source cannot be used.
    """
    if source == "-":
        raise PromptError(
            "Standard input cannot be read by several workers; give a file or folder."
        )
    if Path(source).is_dir():
        paths = [str(p) for p in Path(source).rglob("*") if not p.name.startswith(("_", "."))]
    else:
        pattern = any(c in source for c in "*?[") and not Path(source).exists()
        paths = glob(source) if pattern else [source]
    every = sorted(here(p) for p in paths if Path(p).suffix.lower() in (*LINES, ".parquet"))
    files = [f for f in every if apart is None or apart.resolve() not in Path(f).parents]
    if files:
        return files
    if count := len(every):
        raise PromptError(
            f"All of the {count} files of {source} lie in {apart}, where verdicts are to go; name "
            "another folder with --out."
        )
    if paths != [source] or Path(source).is_dir():
        raise PromptError(f"{source} holds no .parquet, .jsonl or .ndjson file.")
    return [_staged(source, columns, staging)]


def _staged(source: str, columns: Columns, folder: Path) -> str:
    """Copy a source row by row into one Parquet file, unless an earlier run did."""
    identity: list[Any] = [source, asdict(columns)]
    if Path(source).exists():
        identity += [Path(source).stat().st_size, Path(source).stat().st_mtime_ns]
    path = folder / f"{_digest(identity)}.parquet"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        rows = read_rows(source, columns.text)
        with (
            atomic_path(path) as partial,
            pq.ParquetWriter(partial, _staged_schema(columns)) as writer,
        ):
            while some := [_staged_row(*row, columns) for row in islice(rows, 8192)]:
                writer.write_table(pa.Table.from_pylist(some, schema=writer.schema))
    return here(str(path))


def here(name: str) -> str:
    """The name of a file or folder of this machine, for processes that run elsewhere in it."""
    return str(Path(name).resolve()) if Path(name).exists() else name


def _staged_schema(columns: Columns) -> pa.Schema:
    turn = pa.struct({"role": pa.string(), "content": pa.string()})
    names = (columns.text, columns.id, columns.label, columns.segment, "refused")
    return pa.schema({n: pa.string() for n in names if n} | {"history": pa.list_(turn)})


def _staged_row(
    where: str, default_id: str, row: Mapping[str, Any], columns: Columns
) -> dict[str, Any]:
    prompt = parse_prompt(row, columns, where=where)
    fields: dict[str, Any] = {columns.text: prompt.text, columns.id: prompt.id or default_id}
    fields |= {
        columns.segment: prompt.segment,
        columns.label: _word(prompt.harmful),
        "refused": _word(prompt.refused),
    }
    return fields | {"history": [asdict(turn) for turn in prompt.history]}


def _word(label: bool | None) -> str | None:
    return None if label is None else str(label)


def survey(path: str, rows_per_block: int) -> SourceFile:
    """Read a file once: its digest, its number of rows, and where its blocks start.

    Raises:
        PromptError: if it cannot be read.
    """
    digest, rows, place, offsets = hashlib.sha256(), 0, 0, list[int]()
    try:
        if Path(path).suffix.lower() not in LINES:
            rows = pq.read_metadata(path).num_rows
            with open(path, "rb") as file:
                digest = hashlib.file_digest(file, "sha256")
            offsets = [0] * -(-rows // rows_per_block)
            return SourceFile(path, digest.hexdigest(), rows, tuple(offsets))
        with open(path, "rb") as lines:
            for rows, line in enumerate(lines, start=1):
                if (rows - 1) % rows_per_block == 0:
                    offsets.append(place)
                digest.update(line)
                place += len(line)
    except (OSError, pa.ArrowInvalid) as error:
        reason = str(error).split("\n")[0]
        raise PromptError(f"{path} cannot be read: {reason}") from None
    return SourceFile(path, digest.hexdigest(), rows, tuple(offsets))


def cut(files: Sequence[SourceFile], rows_per_block: int, mark: str) -> list[Block]:
    """The blocks of a corpus, in order.

    Args:
        files: The files, in order.
        rows_per_block: As ``survey`` was told.
        mark: What else makes the verdicts: the digest of the guard, the column.
    """
    blocks: list[Block] = []
    bases = accumulate((file.rows for file in files), initial=0)
    for file, base in zip(files, bases, strict=False):
        for number, offset in enumerate(file.offsets):
            start = number * rows_per_block
            stop = min(start + rows_per_block, file.rows)
            identity = [SCHEMA, mark, file.sha256, Path(file.path).stem, base, start, stop]
            name = f"part-{len(blocks):06d}-{_digest(identity)}.parquet"
            blocks.append(Block(len(blocks), file.path, start, stop, offset, base, name))
    return blocks


def read_block(block: Block, columns: Columns) -> Iterator[Row]:
    """The rows of a block; blank lines are none."""
    lines = Path(block.path).suffix.lower() in LINES
    stem, kind = Path(block.path).stem, "line" if lines else "row"
    for number, record in (_lines if lines else _records)(block, columns):
        where, name = f"{block.path}, {kind} {number + 1}", f"{stem}-{number + 1}"
        try:
            row = (
                record if isinstance(record, dict) else parse_json_row(_text(record, where), where)
            )
            name = str(row.get(columns.id) or name)
            prompt = parse_prompt(row, columns, where=where)
        except PromptError as error:
            yield Row(block.base + number, name, None, str(error))
            continue
        yield Row(block.base + number, prompt.id or name, replace(prompt, id=prompt.id or name))


def _lines(block: Block, _: Columns) -> Iterator[tuple[int, bytes]]:
    with open(block.path, "rb") as lines:
        lines.seek(block.offset)
        for number, line in enumerate(islice(lines, block.stop - block.start), start=block.start):
            if line.strip():
                yield number, line


def _records(block: Block, columns: Columns) -> Iterator[tuple[int, dict[str, Any]]]:
    """Only the row groups that hold the block are read, a batch at a time."""
    with pq.ParquetFile(block.path) as file:
        sizes = [file.metadata.row_group(n).num_rows for n in range(file.num_row_groups)]
        edges = list(accumulate(sizes, initial=0))
        groups = [
            n for n in range(len(sizes)) if edges[n] < block.stop and edges[n + 1] > block.start
        ]
        names = {*asdict(columns).values(), "refused", "source", "pair", "history"}
        column_names = [name for name in file.schema_arrow.names if name in names]
        number = edges[groups[0]]
        for batch in file.iter_batches(4096, row_groups=groups, columns=column_names):
            low, high = max(block.start - number, 0), block.stop - number
            if low < len(batch) and high > 0:
                rows = batch.slice(low, high - low).to_pylist()
                yield from enumerate(rows, start=number + low)
            number += len(batch)


def _text(line: bytes, where: str) -> str:
    try:
        return line.decode("utf-8-sig")  # a mark may only be at the start of a file
    except UnicodeDecodeError as error:
        raise PromptError(f"{where}: not UTF-8 text ({error.reason}).") from None


def _digest(identity: Any) -> str:
    return hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:16]
