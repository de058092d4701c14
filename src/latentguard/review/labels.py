"""The label file: rows that people give, appended one by one and forced to the disk."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections import defaultdict
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from threading import RLock
from typing import Any

from latentguard.data.label_rows import Label, is_label_row, majority, prompt_row
from latentguard.data.prompt_files import Columns, parse_json_row, parse_prompt, read_prompts
from latentguard.errors import LatentGuardError, PromptError
from latentguard.files import read_whole_lines
from latentguard.guard.leakage import prompt_digest
from latentguard.prompts import Prompt


def prompt_key(prompt: Prompt) -> str:
    """What names a prompt on the page and in the file of scores: equal for equal chats."""
    return f"{prompt_digest(prompt):016x}"


class LabelFile:
    """Appends labels; a process that is killed loses at most the row it is writing.

    It is held by one process at a time. Any thread may use it.
    """

    def __init__(self, path: str | Path) -> None:
        """Open or create the file; a torn last line is cut off.

        Raises:
            PromptError: if a row cannot be read, or is not one of a label file.
            LatentGuardError: if it cannot be written, or another process writes it.
        """
        self.path = Path(path)
        self._lock = RLock()
        self._labels = defaultdict[str, dict[str, Label]](dict)
        self._prompts = dict[str, Prompt]()
        self._undo = defaultdict[str, list[tuple[str, Label | None]]](list)
        self._file = _open_locked(self.path)
        try:
            self._replay()
        except LatentGuardError:
            self.close()
            raise

    def _replay(self) -> None:
        for number, line in enumerate(read_whole_lines(self.path), start=1):
            where = f"{self.path}, line {number}"
            row = parse_json_row(line, where)
            if not is_label_row(row):
                raise PromptError(
                    f"{where}: a row of a label file names its reviewer and its time; this one "
                    "does not. Name another file with --out."
                )
            prompt = parse_prompt(row, Columns(), where=where)
            words: dict[bool | None, Label | None] = {True: "harmful", False: "harmless"}
            self._keep(prompt, str(row["reviewer"]), words.get(prompt.harmful))

    def _keep(self, prompt: Prompt, reviewer: str, label: Label | None) -> None:
        key = prompt_key(prompt)
        self._prompts[key] = prompt
        if label is None:
            self._labels[key].pop(reviewer, None)
        else:
            self._labels[key][reviewer] = label

    def label(
        self, prompt: Prompt, label: Label, reviewer: str, facts: Mapping[str, Any] | None = None
    ) -> None:
        """Append a label.

        Args:
            prompt: What is labelled.
            label: What the reviewer says of it.
            reviewer: Who.
            facts: Written too, such as the score.

        Raises:
            LatentGuardError: if the row cannot be written whole; then nothing of it is there.
        """
        with self._lock:
            key = prompt_key(prompt)
            before = self._labels[key].get(reviewer)
            self._append(prompt, label, reviewer, facts or {})
            self._undo[reviewer].append((key, before))

    def undo(self, reviewer: str) -> str | None:
        """Append a row that takes the reviewer's last label back; those of earlier runs stay.

        Returns:
            The key of the prompt; None if there is nothing to undo.

        Raises:
            LatentGuardError: if the row cannot be written whole.
        """
        with self._lock:
            if not self._undo[reviewer]:
                return None
            key, before = self._undo[reviewer][-1]
            self._append(self._prompts[key], before, reviewer, {})
            self._undo[reviewer].pop()
            return key

    def labels_of(self, key: str) -> dict[str, Label]:
        """Reviewer -> label, of those who gave one."""
        if key not in self._labels:
            return {}
        with self._lock:
            return dict(self._labels[key])

    def is_disputed(self, key: str) -> bool:
        """Whether reviewers labelled a prompt, and as many say harmful as harmless."""
        labels = self.labels_of(key)
        return bool(labels) and majority(labels.values()) is None

    @property
    def agreed_count(self) -> int:
        """How many prompts have a label that counts."""
        with self._lock:
            return sum(majority(labels.values()) is not None for labels in self._labels.values())

    def agreed_prompts(self) -> list[Prompt]:
        """The prompts that have a label that counts, labelled, as every other verb reads them."""
        with self._lock:
            return read_prompts(self.path) if self.agreed_count else []

    def close(self) -> None:
        """Let another process write."""
        os.close(self._file)

    def _append(
        self, prompt: Prompt, label: Label | None, reviewer: str, facts: Mapping[str, Any]
    ) -> None:
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        row = prompt_row(prompt) | dict(label=label, reviewer=reviewer, time=now) | dict(facts)
        data = f"{json.dumps(row)}\n".encode()
        end = os.lseek(self._file, 0, os.SEEK_END)
        try:
            if os.write(self._file, data) < len(data):
                raise OSError(0, "the disk is full")
            os.fsync(self._file)
        except OSError as error:
            with contextlib.suppress(OSError):
                os.ftruncate(self._file, end)
            raise LatentGuardError(f"{self.path} cannot be written: {error.strerror}.") from None
        self._keep(prompt, reviewer, label)


def _open_locked(path: Path) -> int:
    """The file, open to append and locked; readable by its owner alone, since it holds texts."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
    except OSError as error:
        raise LatentGuardError(f"{path} cannot be written: {error.strerror}.") from None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(file)
        raise LatentGuardError(
            f"Another process writes {path}; end it, or name another file."
        ) from None
    except OSError:
        pass  # a file system without locks
    return file
