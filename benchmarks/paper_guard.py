"""By how much the paper's own guard differs from the same rule without its choice of prompts.

    python benchmarks/paper_guard.py --model M --data-dir DIR --store FILE --out F.json

Both guards are equation 3 at t_inst. Both are scored on the same rows, of which neither has seen
one, nor a twin. What the model held and said is kept in the store.

- *as the paper*: 100 harmful prompts of AdvBench and JailbreakBench, refused and accepted ones,
  against 100 accepted harmless ones of Alpaca and XSTest; the model is asked first, and the paper's
  phrases decide.
- *unfiltered*: 400 of AdvBench against 400 of Alpaca, not asked, as in ``detection.py``.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from latentguard.data.prompt_files import read_prompts
from latentguard.models.chat_model import ChatModel
from latentguard.probes.axis import Axis
from latentguard.prompts import Prompt
from latentguard.stats.detection import auroc_interval, combine_areas, win_matrix
from latentguard.study import labelling
from latentguard.study.axes import belief
from latentguard.study.cached_model import CachedModel
from latentguard.study.prompt_groups import (
    PromptGroups,
    PromptPools,
    pair_key,
    read_pools,
    sample_prompts,
)
from latentguard.study.run import Study, prepare
from latentguard.study.settings import Settings, preset

SIDE = 400
"""Rows a side of the unfiltered guard."""

TESTED = 120
"""Most rows of each label of a set that are scored."""

LONGEST = 1500
"""Characters of the longest text that is scored."""

AS_THE_PAPER, UNFILTERED = "as the paper", "unfiltered"


@dataclass(frozen=True)
class Compared:
    """AUROC of both guards on one set, with 95 % intervals."""

    name: str
    as_the_paper: tuple[float, float, float]
    """Value, low, high."""

    unfiltered: tuple[float, float, float]
    difference: tuple[float, float, float]
    """The first minus the second, on the same rows."""

    harmful: int
    harmless: int


def main() -> None:
    """Fit both guards, score both, write the table."""
    options = arguments()
    settings = replace(preset("paper"), asked=options.asked, reply_tokens=options.reply_tokens)
    model = ChatModel.load(options.model, dtype=options.dtype)
    pools = read_pools(options.data_dir)
    study = prepare(model, options.store, settings, replace(pools, held_out=(), sorry_bench=()))
    fitted = {AS_THE_PAPER: of_the_paper(study), UNFILTERED: unfiltered(pools)}
    axes = {name: fit(study.model, rows) for name, rows in fitted.items()}
    seen = {pair_key(p) for rows in fitted.values() for p in rows}
    compared = [
        compare(study.model, name, rows, axes)
        for name, rows in test_sets(options.data_dir, pools, seen).items()
    ]
    report(options, study, fitted, compared)


def of_the_paper(study: Study) -> list[Prompt]:
    """The labelled prompts of appendix B."""
    asked = labelling.collect(study.model, study.pools, study.settings)
    groups = labelling.prompt_groups_of(asked, study.pools, study.settings)
    return training_prompts(groups, study.settings)


def training_prompts(groups: PromptGroups, settings: Settings) -> list[Prompt]:
    """Refused and accepted harmful prompts, and accepted harmless ones."""
    harmful = [p for g in ("refused_harmful", "accepted_harmful") for p in groups.fit_prompts(g)]
    chosen = sample_prompts(harmful, settings.fit, seed=settings.seed)
    return [*chosen, *groups.fit_prompts("accepted_harmless")[: settings.fit]]


def unfiltered(pools: PromptPools) -> list[Prompt]:
    """AdvBench against Alpaca."""
    advbench = [p for p in pools.harmful if p.source == "advbench"]
    return [*advbench[:SIDE], *pools.harmless[:SIDE]]


def fit(model: CachedModel, rows: Sequence[Prompt]) -> Axis:
    """Centroids of both labels at t_inst."""
    return Axis.fit(model.states(rows, positions=("t_inst",), what="centroids"), "t_inst")


def test_sets(folder: Path, pools: PromptPools, seen: set[str]) -> dict[str, list[Prompt]]:
    """Public sets without what a guard has seen; those of one label stand against Alpaca."""
    alpaca = unseen(pools.harmless, seen)[:TESTED]
    found: dict[str, list[Prompt]] = {}
    for path in sorted(folder.glob("*.jsonl")):
        if path.stem.startswith("replies") or path.stem == "alpaca_harmless":
            continue
        rows = unseen(read_prompts(path), seen)
        if path.stem == "jailbreaks":
            kinds = dict.fromkeys(p.category for p in rows)
            sets = {f"{kind} attacks": [p for p in rows if p.category == kind] for kind in kinds}
        else:
            sets = {path.stem: rows}
        for name, members in sets.items():
            harmful = [p for p in members if p.harmful][:TESTED]
            harmless = [p for p in members if not p.harmful][:TESTED]
            negatives = harmless or alpaca
            if harmful and negatives:
                found[name if harmless else f"{name} + alpaca"] = [*harmful, *negatives]
            else:
                print(f"{name}: left out, as no unseen prompt of one label is left")
    return found


def unseen(rows: Sequence[Prompt], seen: set[str]) -> list[Prompt]:
    """In an order by hash, those that no guard has seen and that are not too long."""
    left = [p for p in rows if pair_key(p) not in seen and len(p.text) <= LONGEST]
    return sample_prompts(left, len(left))


def compare(
    model: CachedModel, name: str, rows: Sequence[Prompt], axes: Mapping[str, Axis]
) -> Compared:
    """Both guards on one set."""
    states = model.states(rows, positions=("t_inst",), what=name)
    harmful = np.array([bool(p.harmful) for p in rows])
    wins: dict[str, NDArray[np.float64]] = {}
    for guard, axis in axes.items():
        scores = belief(axis, states.at("t_inst"))
        wins[guard] = win_matrix(scores[harmful], scores[~harmful])
    gap = combine_areas([wins[AS_THE_PAPER] - wins[UNFILTERED]], [1.0], undecided=0.0)
    both = [auroc_interval(wins[guard]) for guard in (AS_THE_PAPER, UNFILTERED)]
    first, second, difference = ((e.value, e.low, e.high) for e in (*both, gap))
    return Compared(name, first, second, difference, int(harmful.sum()), int((~harmful).sum()))


def report(
    options: argparse.Namespace,
    study: Study,
    fitted: Mapping[str, Sequence[Prompt]],
    compared: Sequence[Compared],
) -> None:
    """Print, and write where asked."""
    counts = {name: counted(rows) for name, rows in fitted.items()}
    for name, of in counts.items():
        print(name, of)
    for one in compared:
        cells = (one.as_the_paper, one.unfiltered, one.difference)
        shown = "  ".join(f"{v:.3f} [{low:.3f}, {high:.3f}]" for v, low, high in cells)
        print(f"{one.name:32} {shown}  n = {one.harmful} + {one.harmless}")
    record = {
        "model": study.name,
        "dtype": options.dtype,
        "template": study.template,
        "asked": options.asked,
        "reply_tokens": options.reply_tokens,
        "fitted": counts,
        "sets": [asdict(one) for one in compared],
    }
    if options.out:
        options.out.write_text(json.dumps(record, indent=1) + "\n")


def counted(rows: Sequence[Prompt]) -> dict[str, int]:
    """How many rows of each label, source and reply."""
    words = {True: "refused", False: "accepted", None: "not asked"}
    found: dict[str, int] = {}
    for p in rows:
        label = "harmful" if p.harmful else "harmless"
        key = f"{label}, {p.source}, {words[p.refused]}"
        found[key] = found.get(key, 0) + 1
    return found


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="default")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--store", type=Path, required=True)
    parser.add_argument("--asked", type=int, default=520, help="most prompts of a pool")
    parser.add_argument("--reply-tokens", type=int, default=128)
    parser.add_argument("--out", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    main()
