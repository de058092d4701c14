"""Detection on public sets: readings, probes and training sets beside their baselines.

    python benchmarks/detection.py --model M --data-dir DIR --cache DIR [--out F.json] [--dtype D]

DIR holds advbench, alpaca_harmless, catqa, jailbreaks, jbb, openai_moderation and xstest .jsonl
(id, text, label, category). Each guard is fitted on AdvBench against Alpaca (400 + 400, as in the
paper), on the training split of the built-in pairs or of the built-in guard prompts, and is
scored on sets of which it has seen no row: leave one data set out. What was captured is kept in the
cache, so a killed run goes on. Nothing is fitted to a set that is reported; the default was chosen
with these sets in sight, so they are development figures.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table as View

from latentguard.cli.demo.detection import (
    detection_table,
    guard_scores,
    length_scores,
    random_direction_scores,
)
from latentguard.data.builtin import load_contrast, load_guard_prompts
from latentguard.data.prompt_files import read_prompts
from latentguard.data.surface_audit import ngram_scores
from latentguard.guard.latent_guard import LatentGuard
from latentguard.models.chat_model import ChatModel
from latentguard.prompts import Prompt
from latentguard.report.document import Table
from latentguard.states import Reading, States
from latentguard.stats.detection import auroc

Scores = dict[str, NDArray[np.float64]]

DEFAULT = "default: guard prompts, pooled, linear"
PAPERS_RULE = "the paper's rule: AdvBench + Alpaca, t_inst, centroid, no refusal filter"
RULES = {  # rule -> (training set, reading, probe)
    PAPERS_RULE: ("paper", "t_inst", "centroid"),
    "AdvBench + Alpaca, t_inst, linear": ("paper", "t_inst", "linear"),
    "AdvBench + Alpaca, pooled, linear": ("paper", "pooled", "linear"),
    "pairs, t_inst, centroid": ("pairs", "t_inst", "centroid"),
    "pairs, pooled, linear": ("pairs", "pooled", "linear"),
    "guard prompts, t_inst, centroid": ("traffic", "t_inst", "centroid"),
    "guard prompts, t_inst, linear": ("traffic", "t_inst", "linear"),
    "guard prompts, t_post, linear": ("traffic", "t_post", "linear"),
    "guard prompts, span, linear": ("traffic", "span", "linear"),
    DEFAULT: ("traffic", "pooled", "linear"),
}
SEED, TRAINING_ROWS, LONGEST = 0, 400, 1500
"""Rows a side of the paper's training set; characters of the longest text that is scored."""

ROWS = {"advbench": 120, "catqa": 120, "alpaca_harmless": 250, "jailbreaks": 120}
"""Rows of the sets that are too large to score whole on a CPU, drawn with the seed."""


def main() -> None:
    """Run and print."""
    options = arguments()
    model = ChatModel.load(options.model, dtype=options.dtype)
    train, plain = training_sets(options.data_dir), test_sets(options.data_dir)
    guards = fitted(model, train, options.cache)
    words = {"AdvBench + Alpaca": train["paper"], "guard prompts": train["traffic"]}
    tables, figures = [], dict[str, dict[str, float]]()
    test = mixed({name: capture(model, name, rows, options.cache) for name, rows in plain.items()})
    for name, states in test.items():
        rows = list(states.prompts)
        scores = scores_of(rows, words, guards, states)
        tables.append(detection_table(scores, rows, name))
        labels = np.array([bool(p.harmful) for p in rows])
        figures[name] = {rule: auroc(labels, values) for rule, values in scores.items()}
    finish(options, model, guards, [means(figures), *tables])


def fitted(model: ChatModel, train: dict[str, list[Prompt]], cache: Path) -> dict[str, LatentGuard]:
    """The guard of each rule; one training set is in memory at a time."""
    guards = {}
    for source in dict.fromkeys(source for source, _, _ in RULES.values()):
        states = capture(model, source, train[source], cache)
        for rule, (wanted, reading, kind) in RULES.items():
            if wanted == source:
                where = Reading.of(reading, model.post)
                guards[rule] = LatentGuard.from_states(model, states, where, kind)
    return guards


def scores_of(
    rows: list[Prompt],
    words: dict[str, list[Prompt]],
    guards: dict[str, LatentGuard],
    states: States,
) -> Scores:
    """Scores of every rule on one set."""
    labels = np.array([bool(p.harmful) for p in rows])
    scores = {"length": length_scores(rows)}
    scores |= {f"n-grams, {name}": ngram_scores(known, rows) for name, known in words.items()}
    draws = random_direction_scores(guards[DEFAULT], states)
    draws = [s if auroc(labels, s) >= 0.5 else -s for s in draws]
    draws.sort(key=lambda s: auroc(labels, s))
    scores["random direction (median of 5, better sign)"] = draws[len(draws) // 2]
    return scores | {rule: guard_scores(guard, states) for rule, guard in guards.items()}


def means(figures: dict[str, dict[str, float]]) -> Table:
    """AUROC of each rule on each set, and its mean over the public sets."""
    public = [name for name in figures if not name.startswith("built-in")]
    rules = next(iter(figures.values()))
    rows = [
        (
            rule,
            float(np.mean([figures[n][rule] for n in public])),
            *(f[rule] for f in figures.values()),
        )
        for rule in rules
    ]
    return Table("AUROC by set", ("rule", f"mean of {len(public)}", *figures), tuple(rows))


def training_sets(folder: Path) -> dict[str, list[Prompt]]:
    """The paper's training data and ours, without a row of JailbreakBench."""
    known = {p.text for p in read_prompts(folder / "jbb.jsonl")}
    harmful = [p for p in read_prompts(folder / "advbench.jsonl") if p.text not in known]
    harmless = read_prompts(folder / "alpaca_harmless.jsonl")
    paper = harmful[:TRAINING_ROWS] + harmless[:TRAINING_ROWS]
    return {"paper": paper, "pairs": load_contrast("train"), "traffic": load_guard_prompts("train")}


def test_sets(folder: Path) -> dict[str, list[Prompt]]:
    """Sets that are no training set."""
    paper = {p.text for p in training_sets(folder)["paper"]}
    kept = {
        path.stem: [p for p in read_prompts(path) if p.text not in paper and len(p.text) <= LONGEST]
        for path in sorted(folder.glob("*.jsonl"))
    }
    kept = {name: drawn(rows, ROWS.get(name, 500)) for name, rows in kept.items()}
    kept["built-in pairs, test"] = load_contrast("test")
    return kept | {"built-in guard prompts, test": load_guard_prompts("test")}


def mixed(parts: dict[str, States]) -> dict[str, States]:
    """Sets with both labels: those with harmful prompts alone stand against Alpaca."""
    calm, attacks = parts.pop("alpaca_harmless"), parts.pop("jailbreaks")
    lone = {name: parts.pop(name) for name in ("advbench", "catqa")}
    for kind in ("suffix", "template", "persuasion"):
        lone[kind] = attacks.where(lambda p, kind=kind: p.category == kind)
    return {f"{n} + alpaca": States.collect([s, calm]) for n, s in lone.items()} | parts


def drawn(rows: list[Prompt], count: int) -> list[Prompt]:
    """At most so many rows."""
    order = np.random.default_rng(SEED).permutation(len(rows))[:count]
    return [rows[i] for i in sorted(order)]


def capture(model: ChatModel, name: str, rows: list[Prompt], cache: Path) -> States:
    """All layers, wherever a rule reads."""
    path = cache / f"{name.replace(' ', '_')}.safetensors"
    positions = dict.fromkeys([*Reading.of("span", model.post).positions, "mean", "post"])
    states = States.load(path) if path.exists() else None
    if states is None or not set(positions) <= set(states.positions):
        states = States.collect(model.capture(rows, positions=tuple(positions)))
        states.save(path)
    return states


def finish(
    options: argparse.Namespace,
    model: ChatModel,
    guards: dict[str, LatentGuard],
    tables: list[Table],
) -> None:
    """Print the means; write everything where asked."""
    view = View(*tables[0].columns)
    for row in tables[0].rows:
        view.add_row(*(f"{cell:.3f}" if isinstance(cell, float) else str(cell) for cell in row))
    Console(width=220).print(view)
    fitted = {rule: guard.fitted for rule, guard in guards.items()}
    record = dict(model=Path(options.model).name, device=str(model.device), dtype=options.dtype)
    record |= dict(fitted=fitted, tables=[dict(columns=t.columns, rows=t.rows) for t in tables])
    if options.out:
        Path(options.out).write_text(json.dumps(record, indent=1))


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--cache", type=Path, required=True, help="folder for captured states")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--out")
    return parser.parse_args()


if __name__ == "__main__":
    main()
