"""A guard on three sets of the field, with every figure of ``latentguard benchmark``.

    python benchmarks/field_table.py GUARD --data-dir D --work DIR --name NAME --out FILE

D holds toxicchat_third, openai_moderation and xstest .jsonl. Of the moderation set so many prompts
are drawn, as in ``detection.py``. The guard reads each prompt as it is served, long ones by chunks
if the guard does so. Verdicts are kept in DIR: a killed run goes on.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

from detection import LONGEST, drawn
from tqdm import tqdm

from latentguard.benchmark.run import run_benchmark
from latentguard.benchmark.suite import SUITE, LoadedSet
from latentguard.data.prompt_files import read_prompts
from latentguard.files import write_atomic
from latentguard.guard.loading import load_guard
from latentguard.states import Progress

FILES = {
    "toxicchat": ("toxicchat_third", "951 of 2,853 prompts"),
    "openai_moderation": ("openai_moderation", "500 of 1,595 prompts, up to 1,500 characters"),
    "xstest": ("xstest", "all 450 prompts"),
}
"""Set of the suite -> its file, and what is read of it."""

MOST = {"openai_moderation": 500}
"""Prompts of a set, where not all are read."""


def load_sets(folder: Path) -> Iterator[LoadedSet]:
    """The prompts of each set."""
    for one in SUITE:
        if one.name in FILES:
            path = folder / f"{FILES[one.name][0]}.jsonl"
            prompts = read_prompts(path)
            if one.name in MOST:
                prompts = drawn([p for p in prompts if len(p.text) <= LONGEST], MOST[one.name])
            yield LoadedSet(one, tuple(prompts), path, len(prompts))


def begin(name: str, total: int | None) -> Progress:
    """A bar for a step."""
    return tqdm(desc=name, total=total).update


def main() -> None:
    """Read, measure, and write the record."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("guard", help="folder, Hub id or 'default'")
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True, help="folder that keeps verdicts")
    parser.add_argument("--name", required=True, help="of the guard in the record")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    guard = load_guard(options.guard)
    sets = list(load_sets(options.data_dir))
    result = run_benchmark(guard, guard.model, sets, options.work, step=begin)
    record = {"model": options.name, "threshold": guard.threshold, "promise": guard.promise}
    for one in result.sets:
        figures = {name: measured.to_dict() for name, measured in one.figures.items()}
        record[one.name] = {"note": FILES[one.name][1], "figures": figures}
    write_atomic(options.out, json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
