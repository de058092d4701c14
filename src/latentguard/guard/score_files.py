"""Score files of prompts or replies: verdicts as JSON Lines, in order, resumable, no torn line."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Generic, TextIO, TypeVar

from latentguard.errors import PromptError
from latentguard.files import append_line, exclusive_lock, read_whole_lines, write_atomic
from latentguard.guard.cascade import Cascade
from latentguard.guard.early_reading import scan_corpus
from latentguard.guard.latent_guard import LatentGuard
from latentguard.guard.replies import ReplyVerdict, reply_digest
from latentguard.guard.verdict import Verdict
from latentguard.prompts import Prompt, Reply
from latentguard.states import Backend, Progress, digest_prompts

if TYPE_CHECKING:
    from latentguard.models.chat_model import ChatModel

T = TypeVar("T", Prompt, Reply)


def score_to_file(
    guard: LatentGuard | Cascade,
    backend: Backend,
    prompts: Iterable[Prompt],
    out: str | Path,
    *,
    progress: Progress | None = None,
) -> int:
    """Score prompts into ``out``; goes on where a killed run of the same guard stopped.

    Lines go to ``OUT.partial``, which is renamed when the last is written; ``OUT.partial.guard``
    holds the digests of the guard and of every prompt that was asked, never its text.

    Returns:
        How many prompts an earlier run had scored already.

    Raises:
        PromptError: if the prompts are not those that the earlier run scored, or ``out`` is a
            folder.
        LatentGuardError: if another run is writing ``out``.
    """
    scan = partial(scan_corpus, guard, backend, progress=progress)
    return _write_verdicts(_Scan(guard.digest, scan, _prompt_line), prompts, out, progress)


def score_replies_to_file(
    guard: LatentGuard,
    backend: ChatModel,
    replies: Iterable[Reply],
    out: str | Path,
    *,
    progress: Progress | None = None,
) -> int:
    """Score replies into ``out``, as ``score_to_file`` scores prompts."""
    scan = partial(guard.scan_replies, backend, progress=progress)
    return _write_verdicts(_Scan(guard.digest, scan, _reply_line), replies, out, progress)


@dataclass(frozen=True)
class _Scan(Generic[T]):
    """How rows of one kind are scored, and noted."""

    guard: str
    """Digest of the guard."""

    scan: Callable[[Iterable[T]], Iterable[Verdict | ReplyVerdict]]
    """Yields a verdict for each row, in order."""

    line: Callable[[T], str]
    """What distinguishes a row from others, on one line."""


def _write_verdicts(
    scan: _Scan[T], rows: Iterable[T], out: str | Path, progress: Progress | None
) -> int:
    if Path(out).is_dir():
        raise PromptError(f"--out should name a file for the verdicts; {out} is a folder.")
    files = _Files(Path(out), Path(f"{out}.partial"), Path(f"{out}.partial.guard"))
    files.partial.parent.mkdir(parents=True, exist_ok=True)
    with exclusive_lock(f"{out}.partial.lock", output=out):
        return _resume(scan, rows, files, progress)


@dataclass(frozen=True)
class _Files:
    """Where verdicts are written, while they are and in the end."""

    out: Path
    """All verdicts."""

    partial: Path
    """Those so far."""

    digests: Path
    """Of the guard, and of each prompt that was asked."""


def _resume(scan: _Scan[T], rows: Iterable[T], files: _Files, progress: Progress | None) -> int:
    """Go on in the partial file; returns how many verdicts were there."""
    if not files.partial.exists() or read_whole_lines(files.digests)[:1] != [scan.guard]:
        files.partial.unlink(missing_ok=True)
        write_atomic(files.digests, f"{scan.guard}\n")
    rows_before = len(read_whole_lines(files.partial))
    digests = read_whole_lines(files.digests)[: rows_before + 1]
    remaining = iter(rows)
    if [scan.line(row) for row in islice(remaining, rows_before)] != digests[1:]:
        raise PromptError(
            f"{files.partial} was written for other prompts than these; remove it to start anew."
        )
    write_atomic(files.digests, "".join(f"{line}\n" for line in digests))
    if rows_before and progress is not None:
        progress(rows_before)
    with (
        files.partial.open("a", encoding="utf-8") as verdicts,
        files.digests.open("a", encoding="utf-8") as digest_file,
    ):
        for verdict in scan.scan(_note_each(scan, remaining, digest_file)):
            append_line(verdicts, json.dumps(verdict.to_dict()))
    files.partial.replace(files.out)
    files.digests.unlink()
    return rows_before


def _note_each(scan: _Scan[T], rows: Iterator[T], digest_file: TextIO) -> Iterator[T]:
    """Note each row before it is scored, so that no verdict is ever without its note."""
    for row in rows:
        append_line(digest_file, scan.line(row))
        yield row


def _prompt_line(prompt: Prompt) -> str:
    """What distinguishes a prompt from others, on one line; not its text."""
    return json.dumps([prompt.id, digest_prompts([prompt]), prompt.segment])


def _reply_line(reply: Reply) -> str:
    """What distinguishes a reply from others, on one line; not its text."""
    return json.dumps([reply.prompt.id, reply_digest(reply)])
