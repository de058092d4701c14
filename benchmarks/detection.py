"""Detection on public sets: the paper's guard, the linear readout and the default, with baselines.

    python benchmarks/detection.py --model M --data-dir DIR [--out F.json] [--dtype D]

DIR holds advbench.jsonl, alpaca_harmless.jsonl, jbb.jsonl and xstest.jsonl (id, text, label).
Each guard is fitted either on AdvBench against Alpaca (400 + 400), as in the paper, or on the
training split of the built-in contrast set, and is scored inside JBB and inside XSTest, which are
matched in form. AdvBench rows whose text is also in JBB are left out of training. Nothing is chosen
on a set that is reported.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table as View

from latentguard.audit import ngram_scores
from latentguard.contrast import load_contrast
from latentguard.experiments.detection import (
    detection_table,
    guard_scores,
    length_scores,
    random_direction_scores,
)
from latentguard.guard import LatentGuard
from latentguard.metrics import auroc
from latentguard.model.hf import ChatModel
from latentguard.prompts import Prompt, read_prompts
from latentguard.readings import Reading
from latentguard.report import Table, show
from latentguard.states import States

TRAINING_ROWS = 400
RULES = {  # rule -> (training set, reading, readout)
    "paper's guard (AdvBench + Alpaca, t_inst, centroid)": ("paper", "t_inst", "centroid"),
    "AdvBench + Alpaca, t_inst, linear": ("paper", "t_inst", "linear"),
    "AdvBench + Alpaca, span, linear": ("paper", "span", "linear"),
    "contrast, t_inst, centroid": ("contrast", "t_inst", "centroid"),
    "contrast, t_inst, linear": ("contrast", "t_inst", "linear"),
    "contrast, t_post, linear": ("contrast", "t_post", "linear"),
    "contrast, sealed, linear": ("contrast", "sealed", "linear"),
    "default (contrast, span, linear)": ("contrast", "span", "linear"),
}
DEFAULT = "default (contrast, span, linear)"


def main() -> None:
    """Run and print."""
    options = arguments()
    model = ChatModel.load(options.model, dtype=options.dtype)
    train, test = training_sets(options.data_dir), test_sets(options.data_dir)
    rules = {k: v for k, v in RULES.items() if options.sealed or v[1] != "sealed"}
    states = {
        (name, name_of_seal(sealed)): capture(model, prompts, sealed=sealed)
        for name, prompts in {**train, **test}.items()
        for sealed in ((False, True) if options.sealed and name != "paper" else (False,))
    }
    guards = {
        rule: LatentGuard.from_states(
            model,
            states[source, name_of_seal(reading == "sealed")],
            Reading.of(reading, model.post),
            readout,
        )
        for rule, (source, reading, readout) in rules.items()
    }
    tables = [
        detection_table(scores_of(name, prompts, train, guards, states), prompts, name)
        for name, prompts in test.items()
    ]
    finish(options, model, guards, tables)


def scores_of(
    name: str,
    prompts: list[Prompt],
    train: dict[str, list[Prompt]],
    guards: dict[str, LatentGuard],
    states: dict[tuple[str, str], States],
) -> dict[str, np.ndarray]:
    """Scores of every rule on one set."""
    labels = np.array([bool(p.harmful) for p in prompts])
    scores = {"length": length_scores(prompts)}
    scores |= {
        f"n-grams on {source}": ngram_scores(rows, prompts) for source, rows in train.items()
    }
    plain = states[name, "as is"]
    draws = random_direction_scores(guards[DEFAULT], plain)
    draws = [s if auroc(labels, s) >= 0.5 else -s for s in draws]
    scores["random direction (median of 5, better sign)"] = sorted(
        draws, key=lambda s: auroc(labels, s)
    )[len(draws) // 2]
    for rule, guard in guards.items():
        scores[rule] = guard_scores(
            guard, states[name, name_of_seal(guard.reading.name == "sealed")]
        )
    return scores


def training_sets(folder: Path) -> dict[str, list[Prompt]]:
    """The paper's training data and ours."""
    known = {p.text for p in read_prompts(folder / "jbb.jsonl")}
    harmful = [p for p in read_prompts(folder / "advbench.jsonl") if p.text not in known]
    harmless = read_prompts(folder / "alpaca_harmless.jsonl")
    paper = harmful[:TRAINING_ROWS] + harmless[:TRAINING_ROWS]
    return {"paper": paper, "contrast": load_contrast("train")}


def test_sets(folder: Path) -> dict[str, list[Prompt]]:
    """The form-matched test sets."""
    sets = {
        "JBB": read_prompts(folder / "jbb.jsonl"),
        "XSTest": read_prompts(folder / "xstest.jsonl"),
    }
    return sets | {"contrast test split": load_contrast("test")}


def capture(model: ChatModel, prompts: list[Prompt], *, sealed: bool) -> States:
    """All layers at t_inst and every post-instruction token, or at t_inst of the sealed text."""
    reading = Reading.of("sealed" if sealed else "span", model.post)
    positions = dict.fromkeys([*reading.positions, "t_inst", "t_post"])
    ready = [reading.prepare(p) for p in prompts]
    return States.collect(model.capture(ready, positions=tuple(positions)))


def name_of_seal(sealed: bool) -> str:
    """Key of a capture."""
    return "sealed" if sealed else "as is"


def finish(
    options: argparse.Namespace,
    model: ChatModel,
    guards: dict[str, LatentGuard],
    tables: list[Table],
) -> None:
    """Print the tables; write them where asked."""
    for table in tables:
        view = View(*table.columns[1:], title=table.title)
        for row in table.rows:
            view.add_row(*map(show, row[1:]))
        Console(width=180).print(view)
    fitted = {rule: guard.fitted for rule, guard in guards.items()}
    record = dict(model=str(options.model), device=str(model.device), dtype=options.dtype)
    record |= dict(fitted=fitted, tables=[dict(columns=t.columns, rows=t.rows) for t in tables])
    if options.out:
        Path(options.out).write_text(json.dumps(record, indent=1))


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--out")
    parser.add_argument("--sealed", action="store_true", help="also the sealed reading")
    return parser.parse_args()


if __name__ == "__main__":
    main()
