"""Rows of a label file, which reviewers append to, and what counts of them.

- A later row of the same prompt by the same reviewer replaces the earlier one.
- A row without a label takes the reviewer's label back.
- The label that more reviewers gave counts. Where as many say harmful as harmless, they disagree,
  and the prompt counts as unlabelled.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain
from typing import Any, Literal

from latentguard.errors import PromptError
from latentguard.prompts import Prompt

Label = Literal["harmful", "harmless"]

FIELDS = frozenset({"text", "label", "reviewer", "time"})
"""What each row of a label file has."""

WORDS = ("harmful", "harmless", None, "")
"""What its labels may be; a label that is taken back is null, or empty in CSV."""

Row = tuple[str, str, Mapping[str, Any]]
"""Where a row is, its default id, and what it holds."""


def is_label_row(row: Mapping[str, Any]) -> bool:
    """Whether a row says who labelled it, and when, in the words of a label file."""
    return row.keys() >= FIELDS and row["label"] in WORDS


def majority(labels: Iterable[Label]) -> Label | None:
    """The label that more reviewers gave; None if as many gave the other, or none gave any."""
    given = list(labels)
    harmful = given.count("harmful")
    harmless = len(given) - harmful
    if harmful == harmless:
        return None
    return "harmful" if harmful > harmless else "harmless"


def settle_rows(rows: Iterator[Row]) -> Iterator[Row]:
    """One row for each prompt that has a label, if this is a label file; else the rows as they are.

    Args:
        rows: Of a file; the first says whether it is a label file.

    Raises:
        PromptError: if a later row of a label file is none.
    """
    first = next(rows, None)
    if first is None:
        return
    whole = chain([first], rows)
    yield from _settled(whole) if is_label_row(first[2]) else whole


def _settled(rows: Iterator[Row]) -> Iterator[Row]:
    """One row for each prompt that has a label, in the order in which they were first labelled."""
    first_rows = dict[str, Row]()
    labels = dict[str, dict[str, Any]]()
    for row in rows:
        where, _, fields = row
        if not is_label_row(fields):
            raise PromptError(
                f"{where}: a row of a label file has {', '.join(sorted(FIELDS))}, and its label is "
                "harmful, harmless or null."
            )
        key = json.dumps([fields["text"], fields.get("history")], sort_keys=True)
        first_rows.setdefault(key, row)
        labels.setdefault(key, {})[str(fields["reviewer"])] = fields["label"]
    for key, (where, default_id, fields) in first_rows.items():
        label = majority(given for given in labels[key].values() if given)
        if label is not None:
            yield where, default_id, {**fields, "label": label}


def prompt_row(prompt: Prompt) -> dict[str, Any]:
    """A prompt as a row of a prompt file, without its label."""
    row: dict[str, Any] = {"id": prompt.id, "text": prompt.text}
    if prompt.history:
        row["history"] = [{"role": m.role, "content": m.content} for m in prompt.history]
    names = ("category", "segment", "source", "pair")
    return row | {name: own for name in names if (own := getattr(prompt, name)) is not None}
