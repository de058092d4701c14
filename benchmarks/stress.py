"""The tables of docs/results/stress.md: a guard as ``fit`` makes it under every attack.

    python benchmarks/stress.py MODEL --name NAME [--dtype D] [--budget B]
        [--docs docs/results/stress.md]

Fits and calibrates it (reused if it is in OUT/guard), runs ``latentguard stress`` on
it, and puts the tables between the marks of NAME in the document.
A killed run goes on where it stopped. One thread is used: results do not depend on the machine's
number of cores.
"""

from __future__ import annotations

import argparse
import re
import time
from pathlib import Path

import torch
from default_guard import default_guard

from latentguard.cli.console import progress
from latentguard.data.builtin import load_contrast
from latentguard.files import write_atomic
from latentguard.models.chat_model import ChatModel
from latentguard.report.document import Table
from latentguard.robustness import weights
from latentguard.robustness.run import STORE, StressPlan, run_stress
from latentguard.robustness.suite import attack_families
from latentguard.robustness.weights import GuardUnderTest
from latentguard.study.cached_model import CachedModel
from latentguard.study.store import Store


def main() -> None:
    """Fit, stress, write."""
    options = arguments()
    torch.set_num_threads(1)
    model = ChatModel.load(options.model, dtype=options.dtype)
    only = [*attack_families(), weights.FAMILY] if options.finetune else []
    plan = StressPlan(tuple(load_contrast("test")), options.budget, (*only, *options.only))
    with progress("stress") as bar:
        guard = default_guard(model, options.out / "guard")
        target = GuardUnderTest(
            guard, model, CachedModel(model, Store(options.out / STORE), step=bar.step)
        )
        report = run_stress(target, plan)
    report.save(options.out)
    took = f"the call took {time.process_time():.0f} s of processor time"
    text = "\n\n".join(
        [f"Threshold {guard.threshold:.4g}; {took}."]
        + [rows_of(table) for table in report.tables if table.title in SHOWN]
    )
    print(text)
    if options.docs:
        write_atomic(options.docs, filled(options.docs.read_text("utf-8"), options.name, text))


SHOWN = ("Harmful prompts refused", "All figures", "Not run")


def rows_of(table: Table) -> str:
    """A table in Markdown, without its title and note."""
    return table.markdown().partition("\n\n")[2]


def filled(document: str, name: str, text: str) -> str:
    """The document with a text between the marks of a name."""
    begin, end = f"<!-- begin {name} -->", f"<!-- end {name} -->"
    pattern = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.DOTALL)
    if not pattern.search(document):
        raise SystemExit(f"The document needs the marks {begin} and {end}.")
    return pattern.sub(lambda found: f"{begin}\n{text}\n{end}", document)


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--name", required=True)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--budget", default="small", choices=["small", "full"])
    parser.add_argument("--only", action="append", default=[])
    parser.add_argument("--finetune", action="store_true", help="with the small budget, too")
    parser.add_argument("--out", type=Path, help="default: reports/stress-NAME")
    parser.add_argument("--docs", type=Path)
    options = parser.parse_args()
    options.out = options.out or Path(f"reports/stress-{options.name}")
    return options


if __name__ == "__main__":
    main()
