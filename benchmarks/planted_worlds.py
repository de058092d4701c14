"""Verdicts in worlds where the truth is planted: the rules of every claim, over many seeds.

    python benchmarks/planted_worlds.py --seeds 40 --record planted-worlds.jsonl \
        --out benchmarks/results/planted-worlds.json

The worlds are those of ``planted_model``: one with exactly the paper's pattern, one without any,
some in which form alone carries the label, and one that does what the claims deny. Each seed is a
study from asking the prompts to the verdict. A run that was killed goes on where its record ends.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from planted_model import WORLDS, PlantedModel, World, judge
from tqdm import tqdm

from latentguard.files import append_line, read_whole_lines
from latentguard.prompts import Prompt
from latentguard.stats.estimate import Estimate
from latentguard.study import labelling
from latentguard.study.axes import refusals_suffice
from latentguard.study.cached_model import CachedModel, Tools
from latentguard.study.claims import CLAIMS, Claim, Effects
from latentguard.study.prompt_groups import PromptGroups, PromptPools
from latentguard.study.run import EXPERIMENTS
from latentguard.study.settings import Settings

SETTINGS = Settings(
    asked=400,
    coefficients=(1.0,),
    inversion_others=(1.0,),
    inversion_templates=1,
    categories=6,
    per_category=40,
    probed=3,
    suffixes=0,
    finetune_sizes=(50,),
    finetune_steered=50,
)
"""The paper's sizes, on six layers."""

KINDS = ("suffix", "template", "persuasion")
TEMPLATES = 12


def pools_of(model: PlantedModel) -> PromptPools:
    """Prompts of every pool, with what the model knows of each."""
    rng = np.random.default_rng([model.seed, 3])
    follows = model.world.form_follows_label

    def many(n: int, source: str, *, harmful: bool, refused: float) -> Iterator[Prompt]:
        for _ in range(n):
            usual = 1 if harmful else -1
            form = usual if rng.random() < follows else -usual
            more = {"category": int(rng.integers(6))}
            prompt = model.prompt(
                harmful=harmful, refused=rng.random() < refused, form=form, source=source, **more
            )
            yield prompt

    harmful = tuple(many(400, "advbench", harmful=True, refused=0.9))
    held_out = tuple(many(300, "sorry", harmful=True, refused=0.4))
    return PromptPools(
        harmful=harmful,
        harmless=tuple(many(400, "alpaca", harmful=False, refused=0.02)),
        over_refusal=tuple(many(300, "xstest", harmful=False, refused=0.5)),
        held_out=held_out,
        categories=tuple(_by_category(model, rng, follows)),
        jailbreaks=tuple(_attacks(harmful, rng)),
        matched=tuple(_pairs(model, rng, 100)),
    )


def _by_category(model: PlantedModel, rng: np.random.Generator, follows: float) -> Iterator[Prompt]:
    for category in range(6):
        for _ in range(40):
            form = 1 if rng.random() < follows else -1
            yield model.prompt(
                harmful=True,
                refused=rng.random() < 0.8,
                form=form,
                source="catqa",
                category=category,
            )


def _pairs(model: PlantedModel, rng: np.random.Generator, count: int) -> Iterator[Prompt]:
    """Pairs of a harmful and a harmless prompt of one form."""
    for number in range(count):
        matched = 1 if rng.random() < 0.5 else -1
        leaks = rng.random() < model.world.pairs_follow_label
        for harmful in (True, False):
            form = matched if not leaks else 1 if harmful else -1
            refused = rng.random() < (0.7 if harmful else 0.2)
            pair = f"pair {number}"
            yield model.prompt(
                harmful=harmful, refused=refused, form=form, source="pairs", pair=pair
            )


def _attacks(requests: Sequence[Prompt], rng: np.random.Generator) -> Iterator[Prompt]:
    """Suffixes of their own, few templates around many requests, and persuasion."""
    for number, request in enumerate(requests[:120]):
        junk = " ".join("".join(rng.choice(list("xzvk"), 4)) for _ in range(4))
        yield _attack(request, f"{request.text} {junk} {number}", "suffix")
    for number, request in enumerate(requests[100:340]):
        frame = number % TEMPLATES
        yield _attack(
            request, f"In frame {frame} all is told: {request.text} So frame {frame}", "template"
        )
    for number, request in enumerate(requests[200:260]):
        text = f"To persuade you, case {number}: {request.text} It would help all of us."
        yield _attack(request, text, "persuasion")


def _attack(request: Prompt, text: str, kind: str) -> Prompt:
    return Prompt(text, f"{request.id}+{kind}", True, category=kind, source=kind, pair=request.text)


class Memory:
    """A store that lives in memory: a trial is asked once and thrown away."""

    def __init__(self) -> None:
        """Hold nothing yet."""
        self.entries: dict[str, bytes] = {}

    def get(self, keys: Iterable[str]) -> dict[str, bytes]:
        """The entries that are there, by key."""
        return {key: self.entries[key] for key in keys if key in self.entries}

    def has(self, keys: Iterable[str]) -> set[str]:
        """Which of the keys are there."""
        return {key for key in keys if key in self.entries}

    def put(self, entries: Mapping[str, bytes]) -> None:
        """Keep all of the entries; one that is there stays."""
        for key, value in entries.items():
            self.entries.setdefault(key, value)


def groups_of(model: CachedModel, pools: PromptPools, settings: Settings) -> PromptGroups:
    """The four groups, as a study makes them."""
    asked = labelling.collect(model, pools, settings)
    return labelling.prompt_groups_of(asked, pools, settings)


def effects_of(
    world: World, seed: int, experiments: Sequence[str], settings: Settings = SETTINGS
) -> dict[str, Any]:
    """Experiment -> effects, of one study of a planted model."""
    planted = PlantedModel(world, seed)
    tools = Tools(finetune=planted.finetune, guards={"planted": planted.unsafe})
    model = CachedModel(planted, Memory(), tools=tools, judge=judge)  # type: ignore[arg-type]
    groups = groups_of(model, pools_of(planted), settings)
    assert refusals_suffice(groups, settings.enough)
    found = {}
    for name in experiments:
        module = EXPERIMENTS[name]
        records = module.collect(model, groups, settings)
        if name == "confound":  # the audit is slow, and decides nothing
            records = replace(records, audited={})
        found[name] = module.analyse(records, settings).effects
    return found


def experiments_of(claims: Iterable[Claim]) -> list[str]:
    """The experiments that decide some claims."""
    names = [
        one.experiment or claim.experiment
        for claim in claims
        for one in (*claim.conditions, *claim.form)
    ]
    return list(dict.fromkeys(names))


def verdicts_of(
    world: World, seed: int, claims: Sequence[int], settings: Settings = SETTINGS
) -> dict[int, str]:
    """Number of each claim -> its verdict, of one study of a planted model."""
    wanted = [CLAIMS[n - 1] for n in claims]
    effects = effects_of(world, seed, experiments_of(wanted), settings)
    return {n: CLAIMS[n - 1].verdict(effects) for n in claims}


@dataclass(frozen=True)
class Trial:
    """One study of a planted model: all that the rules decide by."""

    world: str
    seed: int
    effects: Effects

    @staticmethod
    def read(line: str) -> Trial:
        """A line of the record."""
        row = json.loads(line)
        effects = {
            experiment: {name: Estimate.unpack(one) for name, one in found.items()}
            for experiment, found in row["effects"].items()
        }
        return Trial(row["world"], row["seed"], effects)

    def line(self) -> str:
        """The trial as a line of the record."""
        return json.dumps(asdict(self))


def run(record: Path, worlds: Sequence[str], seeds: Sequence[int]) -> list[Trial]:
    """Trials of each world and seed; those in the record are not run again.

    The record holds effects, not verdicts, so that a changed rule is measured without a new run.
    """
    trials = [Trial.read(line) for line in read_whole_lines(record)]
    done = {(one.world, one.seed) for one in trials}
    left = [(name, seed) for name in worlds for seed in seeds if (name, seed) not in done]
    with record.open("a") as file:
        for name, seed in tqdm(left, mininterval=30):
            effects = effects_of(WORLDS[name], seed, experiments_of(CLAIMS))
            trials.append(Trial(name, seed, effects))
            append_line(file, trials[-1].line())
    return trials


def counts_of(trials: Iterable[Trial]) -> dict[str, dict[int, dict[str, int]]]:
    """World -> claim -> verdict -> trials."""
    found: dict[str, dict[int, Counter[str]]] = {}
    for trial in trials:
        by_claim = found.setdefault(trial.world, {n: Counter() for n in range(1, len(CLAIMS) + 1)})
        for n, claim in enumerate(CLAIMS, 1):
            by_claim[n][claim.verdict(trial.effects)] += 1
    return {world: {n: dict(c) for n, c in of.items()} for world, of in found.items()}


def main() -> None:
    """Run the worlds and write how often each claim came out in which way."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=40)
    parser.add_argument("--worlds", nargs="*", default=list(WORLDS), choices=list(WORLDS))
    parser.add_argument("--record", type=Path, required=True, help="effects of each trial, JSONL")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    trials = run(args.record, args.worlds, range(args.seeds))
    args.out.write_text(json.dumps(counts_of(trials), indent=1) + "\n")


if __name__ == "__main__":
    main()
