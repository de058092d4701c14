"""``latentguard label``: prompts with what the model does with them, for fitting a refusal axis."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Any

from latentguard.files import write_atomic
from latentguard.prompts import Prompt
from latentguard.states import Progress, Speaker
from latentguard.study.cached_model import CachedModel
from latentguard.study.judge import Outcome, refused
from latentguard.study.store import Store


def write_labels(
    model: Speaker,
    prompts: Sequence[Prompt],
    out: str | Path,
    *,
    max_new_tokens: int = 24,
    progress: Progress | None = None,
) -> dict[Outcome, int]:
    """Ask the model every prompt and write JSON Lines with a column ``refused``.

    A killed run goes on where it stopped: replies are kept in ``OUT.replies`` until the file is
    written, and then removed.

    Returns:
        How many replies were of which kind.

    Raises:
        PromptError: if a prompt is empty or too long.
    """
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    replies_file = Path(f"{out}.replies")
    step = (lambda what, total: progress) if progress else None
    with closing(Store(replies_file)) as store:
        cached = CachedModel(model, store, step=step)
        (replies,) = cached.replies(prompts, max_new_tokens=max_new_tokens)
        outcomes = [cached.judge(reply) for reply in replies]
        lines = map(_line, prompts, outcomes)
        write_atomic(out, "".join(f"{json.dumps(line)}\n" for line in lines))
    replies_file.unlink()
    return dict(Counter(outcomes))


def _line(prompt: Prompt, outcome: Outcome) -> dict[str, Any]:
    label = None if prompt.harmful is None else "harmful" if prompt.harmful else "harmless"
    row: dict[str, Any] = dict(id=prompt.id, text=prompt.text, label=label)
    row |= dict(category=prompt.category, source=prompt.source, pair=prompt.pair)
    row |= dict(refused=refused(outcome), reply=outcome)
    row |= dict(history=[asdict(turn) for turn in prompt.history] or None)
    return {name: value for name, value in row.items() if value is not None}
