"""Teaching: the guard is adapted to the labels in a thread of its own, compared, and saved."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from threading import Lock, Thread
from time import monotonic
from typing import Any, Literal

from latentguard.errors import LatentGuardError
from latentguard.guard.adapting import Adapted
from latentguard.guard.artifact import JSON_FILE
from latentguard.prompts import Prompt
from latentguard.report.document import Table

State = Literal["idle", "running", "done", "failed"]


Adapt = Callable[[list[Prompt]], Adapted]
"""Adapts a guard to labelled prompts."""

UNEXPECTED = "Adapting ended with an error that was not expected; the terminal shows it."


class Teacher:
    """Adapts a guard, one run at a time, and writes the result to a folder that holds no guard."""

    def __init__(self, adapt: Adapt, folder: Path, model: AbstractContextManager[Any]) -> None:
        """Prepare.

        Args:
            adapt: Adapts the guard.
            folder: Where the first result goes; later ones go to ``FOLDER-2`` and so on.
            model: Held while the model is used.
        """
        self._adapt, self._folder, self._model = adapt, folder, model
        self._lock = Lock()
        self._state: State = "idle"
        self._outcome: dict[str, Any] = {}
        self._began = 0.0

    def start(self, prompts: Sequence[Prompt]) -> bool:
        """Begin to adapt in a thread of its own; False if a run is under way."""
        with self._lock:
            if self._state == "running":
                return False
            self._state, self._outcome = "running", {"labels": len(prompts)}
            self._began = monotonic()
        Thread(target=self._run, args=[list(prompts)], name="teach", daemon=True).start()
        return True

    def to_dict(self) -> dict[str, Any]:
        """How far it is: state, error, tables, folder and the command that serves the guard.

        ``seconds`` says how long a run that is under way has taken so far.
        """
        with self._lock:
            seconds = int(monotonic() - self._began) if self._state == "running" else 0
            return {"state": self._state, "seconds": seconds} | self._outcome

    def _run(self, prompts: list[Prompt]) -> None:
        outcome: dict[str, Any] = {"error": UNEXPECTED}
        try:
            with self._model:
                adaptation = self._adapt(prompts)
            folder = free_folder(self._folder)
            adaptation.guard.save(folder)
            outcome = dict(
                tables=[_table(table) for table in adaptation.tables()],
                folder=str(folder),
                command=f"latentguard serve {folder}",
            )
        except (LatentGuardError, OSError) as error:
            outcome = {"error": str(error)}
        finally:
            with self._lock:
                self._state = "failed" if "error" in outcome else "done"
                self._outcome |= outcome


def free_folder(folder: Path) -> Path:
    """The folder, or the first of ``FOLDER-2``, ``FOLDER-3``, ... that holds no guard."""
    number = 1
    candidate = folder
    while (candidate / JSON_FILE).exists():
        number += 1
        candidate = folder.with_name(f"{folder.name}-{number}")
    return candidate


def _table(table: Table) -> dict[str, Any]:
    """A table as the page shows it."""
    page = table.page
    rows = [[cell.text for cell in row] for row in page.rows]
    return dict(title=table.title, note=table.note, columns=list(page.columns), rows=rows)
