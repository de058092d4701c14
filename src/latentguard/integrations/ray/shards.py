"""Verdicts of a corpus: one Parquet file a block, and ``_SUCCESS`` when all are there.

A block's file is named by a digest of the guard and of the input, written under a temporary name
and renamed. So a file that is there is whole and of these very prompts: a run that goes on skips
it, and a block that was scored twice is there once.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from latentguard.errors import PromptError
from latentguard.files import atomic_path, write_atomic
from latentguard.guard.verdict import Verdict
from latentguard.integrations.ray.corpora import SCHEMA, Block, Row, SourceFile

SUCCESS = "_SUCCESS"
"""Written last: what was scored, by which guard, in which files."""

_SCORES = pa.map_(pa.string(), pa.float64())

_EVIDENCE = pa.struct(
    [("message", pa.int64()), ("start", pa.int64()), ("end", pa.int64()), ("score", pa.float64())]
)

COLUMNS = pa.schema(
    [
        ("row", pa.int64()),
        ("id", pa.string()),
        ("score", pa.float64()),
        ("probability", pa.float64()),
        ("flagged", pa.bool_()),
        ("beliefs", _SCORES),
        ("decision", pa.string()),
        ("category", pa.string()),
        ("category_scores", _SCORES),
        ("quadrant", pa.string()),
        ("evidence", pa.list_(_EVIDENCE)),
        ("obfuscations", pa.list_(pa.string())),
        ("calibrated", pa.bool_()),
        ("operating_point", pa.string()),
        ("second_opinion", pa.string()),
        ("left_early", pa.bool_()),
        ("error", pa.string()),
    ]
)
"""The number of the row in the corpus, the verdict, and why there is none."""


@dataclass(frozen=True)
class Summary:
    """What a scored corpus holds."""

    rows: int
    flagged: int
    unscored: int
    """Rows that could not be used; ``error`` says why, and they are not flagged but null."""

    parts: int


def write_part(folder: Path, block: Block, records: Iterable[Mapping[str, Any]]) -> None:
    """Write what ``record`` made of each row of a block; the file is whole or not there.

    Args:
        folder: Where; on a file system that all workers share.
        block: The block.
        records: In the order of the rows.
    """
    table = pa.Table.from_pylist(list(records), COLUMNS)
    with atomic_path(folder / block.name) as partial:
        pq.write_table(table, partial, compression="zstd")


def record(row: Row, verdict: Verdict | None, error: str | None = None) -> dict[str, Any]:
    """What is written of a row: its verdict, or why it has none."""
    fields = verdict.to_dict() if verdict else {"id": row.id}
    maps = {name: list(value.items()) for name, value in fields.items() if isinstance(value, dict)}
    return {"row": row.number, **fields, **maps, "error": row.error or error}


def finished(folder: Path, blocks: Sequence[Block]) -> set[str]:
    """Names of the blocks' files that are there; leftovers of a killed run are removed.

    Raises:
        PromptError: if the folder holds verdicts of another guard, or of other prompts.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for leftover in folder.glob(".part-*"):
        leftover.unlink(missing_ok=True)
    there = {path.name for path in folder.glob("part-*.parquet")}
    if other := there - {block.name for block in blocks}:
        raise PromptError(
            f"{folder} holds {len(other)} files of verdicts by another guard, of other prompts or "
            "in blocks of another size; give another folder, or remove them."
        )
    return there


def write_success(
    folder: Path, guard: str, files: Sequence[SourceFile], blocks: Sequence[Block]
) -> Summary:
    """Count what is there and write ``_SUCCESS``, last of all."""
    counts = [_count(folder / block.name) for block in blocks]
    rows, flagged, unscored = (sum(count[n] for count in counts) for n in range(3))
    total = Summary(rows, flagged, unscored, parts=len(blocks))
    inputs = [{"path": f.path, "sha256": f.sha256, "rows": f.rows} for f in files]
    parts = [block.name for block in blocks]
    summary = asdict(total) | {"schema": SCHEMA, "guard": guard, "inputs": inputs, "files": parts}
    write_atomic(folder / SUCCESS, json.dumps(summary, indent=1))
    return total


def _count(path: Path) -> tuple[int, int, int]:
    table = pq.read_table(path, columns=["flagged"])
    flags = table["flagged"]
    return len(flags), pc.sum(flags).as_py() or 0, flags.null_count
