"""Learning curve of ``pooled``: rows of the built-in guard prompts against held-out AUROC.

    python benchmarks/learning_curve.py --data-dir DIR --cache DIR --out F.json [--capture-only]

DIR holds the public sets of ``ROWS`` as .jsonl (id, text, label, category). The states that
``LatentGuard.fit`` reads are captured once, in shards, so that a killed run goes on; then the
probe is fitted on parts of the training rows, drawn in the ways of ``DRAWS`` with several seeds,
and scored on sets of which it has seen no row. Each fit is added to F.json at once. ``--show``
prints the means.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from importlib.resources import as_file, files
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

import numpy as np
import torch

from latentguard.data.builtin import FILES, load_contrast, load_guard_prompts
from latentguard.data.prompt_files import read_prompts
from latentguard.files import write_atomic
from latentguard.models.chat_model import ChatModel
from latentguard.probes.fitting import capture, fit_probe, slots
from latentguard.probes.probe import Fit, Probe, layers_of
from latentguard.prompts import Prompt
from latentguard.states import DEFAULT_READING, Reading, States
from latentguard.stats.detection import auroc

SHARD = 512
"""Rows of a shard: two windows of ``ChatModel.capture``, so that batches are as in one go."""

ROWS = {
    "advbench": 120,
    "catqa": 120,
    "jailbreaks": 120,
    "sorry_bench": 250,
    "alpaca_harmless": 250,
    "jbb": 500,
    "xstest": 500,
    "openai_moderation": 500,
    "toxicchat_third": 500,
}
"""Public sets, and how many rows of each are drawn at most."""

MOST = 512
"""Rows of a built-in set of traffic, at most."""

CALM, LONGEST, SEED = "alpaca_harmless", 1500, 0
"""What sets of harmful prompts alone stand against; characters of the longest text; of draws."""

SIZES = {250: 5, 500: 5, 1000: 5, 2000: 3, 3000: 3, 4000: 3, 6000: 2}
"""Rows that are fitted on, and the number of seeds."""

Sets = dict[str, States]

Entry = dict[str, Any]
"""What is noted of a fit."""

Unit = list[int]
"""Rows that stay together: a pair, or one row alone."""

Draw = Callable[[Sequence[Prompt], int], list[Unit]]
"""Puts the units of some prompts in the order of a seed, to take the first of them."""

Stratum = tuple[str, str | None, int]
"""Kind, category, and 2 for pairs or 1 for lone rows."""


def units_of(prompts: Sequence[Prompt]) -> dict[str, Unit]:
    """The rows of each pair, and of each lone prompt, by name."""
    units: dict[str, Unit] = defaultdict(list)
    for row, prompt in enumerate(prompts):
        units[prompt.pair or prompt.id].append(row)
    return units


def lot(name: str, seed: int) -> int:
    """Where a name comes in the order of a seed, on any machine; 64 bits."""
    return int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest()[:8])


def kinds() -> dict[str, str]:
    """The kind of each built-in row, by id."""
    with as_file(files("latentguard.data") / FILES["traffic"]) as path:
        rows = map(json.loads, path.open(encoding="utf-8"))
        return {row["id"]: row["kind"] for row in rows}


def strata_of(prompts: Sequence[Prompt]) -> dict[Stratum, list[str]]:
    """Names of pairs and lone rows by stratum."""
    kind, strata = kinds(), defaultdict[Stratum, list[str]](list)
    for name, rows in units_of(prompts).items():
        first = prompts[rows[0]]
        strata[kind[first.id], first.category, len(rows)].append(name)
    return strata


def broken(prompts: Sequence[Prompt], seed: int) -> list[Unit]:
    """Rows at random; pairs are torn apart."""
    return [[i] for i in sorted(range(len(prompts)), key=lambda i: lot(prompts[i].id, seed))]


def uniform(prompts: Sequence[Prompt], seed: int) -> list[Unit]:
    """Pairs and lone rows at random."""
    units = units_of(prompts)
    return [units[name] for name in sorted(units, key=lambda name: lot(name, seed))]


def stratified(
    prompts: Sequence[Prompt], seed: int, weight: Callable[[Stratum], float] = lambda _: 1.0
) -> list[Unit]:
    """Pairs and lone rows, each stratum spread evenly over the whole.

    Args:
        prompts: What is drawn from.
        seed: Of the order within a stratum, and of where its first one comes.
        weight: How many times as often a stratum comes among the first as in all.
    """
    units, place = units_of(prompts), dict[str, float]()
    for stratum, names in strata_of(prompts).items():
        start = lot(str(stratum), seed) / 2**64
        for rank, name in enumerate(sorted(names, key=lambda name: lot(name, seed))):
            place[name] = (rank + start) / len(names) / weight(stratum)
    return [units[name] for name in sorted(place, key=lambda name: (place[name], name))]


def twice(of: Callable[[Stratum], bool]) -> Draw:
    """As ``stratified``, some strata twice as often as in all beside the others."""
    return lambda prompts, seed: stratified(prompts, seed, lambda s: 2.0 if of(s) else 1.0)


DRAWS: dict[str, Draw] = {
    "broken": broken,
    "uniform": uniform,
    "stratified": stratified,
    "borderline twice": twice(lambda s: s[0] == "borderline"),
    "pairs twice": twice(lambda s: s[2] == 2),
    "lone twice": twice(lambda s: s[2] == 1),
}


def drawn(prompts: Sequence[Prompt], count: int, draw: str, seed: int) -> list[int]:
    """At most so many rows, in their own order."""
    rows: list[int] = []
    for unit in DRAWS[draw](prompts, seed):
        if len(rows) + len(unit) > count:
            break
        rows += unit
    return sorted(rows)


def test_sets(folder: Path) -> dict[str, list[Prompt]]:
    """The public sets, those without a harmless side too, and the built-in ones."""
    public = {name: read_prompts(folder / f"{name}.jsonl") for name in ROWS}
    short = {name: [p for p in rows if len(p.text) <= LONGEST] for name, rows in public.items()}
    sets = {name: some(rows, ROWS[name]) for name, rows in short.items()}
    sets["built-in pairs, test"] = load_contrast("test")
    sets["built-in guard prompts, validation"] = some(load_guard_prompts("validation"), MOST)
    return sets | {"built-in guard prompts, test": some(load_guard_prompts("test"), MOST)}


def some(prompts: Sequence[Prompt], count: int) -> list[Prompt]:
    """At most so many, always the same ones."""
    order = np.random.default_rng(SEED).permutation(len(prompts))[:count]
    return [prompts[i] for i in sorted(order)]


def mixed(sets: Sets) -> Sets:
    """Sets with both labels: those with harmful prompts alone stand against Alpaca."""
    calm, both = sets.pop(CALM), Sets()
    for name, states in sets.items():
        if all(p.harmful for p in states.prompts):
            both[f"{name} + alpaca"] = States.collect([states, calm])
        else:
            both[name] = states
    return both


def read(model: ChatModel, name: str, rows: Sequence[Prompt], cache: Path) -> States:
    """The states that ``pooled`` reads, shard by shard, from the cache where they are."""
    parts = [shard(model, name, rows, at, cache) for at in range(0, len(rows), SHARD)]
    return States.collect(parts)


def shard(model: ChatModel, name: str, rows: Sequence[Prompt], at: int, cache: Path) -> States:
    """One shard; its time is added to a file beside it."""
    path = cache / f"{name.replace(' ', '_').replace(',', '')}-{at:05}.safetensors"
    if path.exists():
        return States.load(path)
    part, start, clock = rows[at : at + SHARD], time.perf_counter(), time.process_time()
    reading = Reading.of(DEFAULT_READING, model.post)
    states = capture(model, reading, part, layers=layers_of("linear", model.depth))
    seconds, cpu = time.perf_counter() - start, time.process_time() - clock
    states.save(path)
    print(f"{path.stem}: {len(part)} rows, {len(part) / seconds:.2f} prompts/s", flush=True)
    with (cache / "times.jsonl").open("a") as file:
        known = dict(set=name, at=at, rows=len(part), seconds=round(seconds, 2))
        file.write(json.dumps(known | {"cpu_seconds": round(cpu, 2)}) + "\n")
    return states


def taken(states: States, rows: Sequence[int]) -> States:
    """The states of some rows."""
    kept = tuple(states.prompts[i] for i in rows)
    return replace(states, values=states.values[list(rows)], prompts=kept)


def scored(probe: Probe, reading: Reading, tests: Sets) -> dict[str, float]:
    """AUROC on each set."""
    figures = {}
    for name, states in tests.items():
        labels = np.array([bool(p.harmful) for p in states.prompts])
        scores = probe(slots(states, reading.positions)).double().numpy()
        figures[name] = round(auroc(labels, scores), 5)
    return figures


def plan(whole: int, draws: Sequence[str], largest: int) -> Iterator[tuple[int, str, int]]:
    """Rows, draw and seed of each fit; those of the first seed first, small ones first."""
    yield whole, "all", 0
    for seed in range(max(SIZES.values())):
        for count, seeds in SIZES.items():
            if seed < seeds and count <= largest:
                yield from ((count, draw, seed) for draw in draws)


def fit(states: States, reading: Reading, depth: int, rows: Sequence[int]) -> tuple[Fit, Entry]:
    """The probe on some rows, and what it took."""
    part = states if len(rows) == len(states) else taken(states, rows)
    start, clock = time.perf_counter(), time.process_time()
    found = fit_probe(part, reading, "linear", depth)
    seconds, cpu = time.perf_counter() - start, time.process_time() - clock
    harmful = sum(bool(p.harmful) for p in part.prompts)
    known = dict(rows=len(part), harmful=harmful, strength=found.choices["strength"])
    known |= dict(cross_validated_auroc=found.choices["cross_validated_auroc"])
    return found, known | dict(fit_seconds=round(seconds, 2), fit_cpu_seconds=round(cpu, 2))


def curve(options: argparse.Namespace, model: ChatModel, states: States, tests: Sets) -> None:
    """Every fit of the plan that is not in the file."""
    record = load(options.out)
    done = {(f["count"], f["draw"], f["seed"]) for f in record["fits"]}
    reading = Reading.of(DEFAULT_READING, model.post)
    for count, draw, seed in plan(len(states), options.draws.split(","), options.largest):
        if (count, draw, seed) in done:
            continue
        whole = range(len(states))
        rows = list(whole) if draw == "all" else drawn(states.prompts, count, draw, seed)
        found, known = fit(states, reading, model.depth, rows)
        figures = scored(found.probe, reading, tests)
        entry = dict(count=count, draw=draw, seed=seed) | known
        record["fits"].append(entry | {"mean": averaged(figures), "auroc": figures})
        write_atomic(options.out, json.dumps(record, indent=1))
        print(entry, record["fits"][-1]["mean"], flush=True)


def averaged(figures: dict[str, float]) -> dict[str, float]:
    """Means over the public sets, over the sets with a harmless side of their own, and over all."""
    public = [v for name, v in figures.items() if not name.startswith("built-in")]
    own = [v for name, v in figures.items() if not name.endswith("+ alpaca")]
    parts = {"public": public, "own harmless": own, "all": list(figures.values())}
    return {name: round(mean(values), 5) for name, values in parts.items()}


def load(path: Path) -> dict[str, Any]:
    """What is in the file."""
    return json.loads(path.read_text()) if path.exists() else {"fits": []}


def describe(model: ChatModel, states: States, tests: Sets) -> dict[str, Any]:
    """The model and the sets."""
    sizes = {name: [sum(bool(p.harmful) for p in s.prompts), len(s)] for name, s in tests.items()}
    how = dict(model=model.source, depth=model.depth, dtype=str(model.model.dtype))
    how |= dict(reading=DEFAULT_READING, positions=states.positions, layers=states.layers)
    return how | dict(harmful_and_rows=sizes, torch=torch.__version__)


def times(cache: Path) -> dict[str, Any]:
    """What reading the training rows took, by the times noted in the cache."""
    lines = (cache / "times.jsonl").read_text().splitlines()
    shards = [row for row in map(json.loads, lines) if row["set"] == "train"]
    total = {key: sum(s[key] for s in shards) for key in ("rows", "seconds", "cpu_seconds")}
    return total | {"shards": shards}


def show(record: dict[str, Any]) -> None:
    """Markdown: AUROC by draw and rows less that on all rows, and what a fit took."""
    groups: dict[tuple[str, int], list[dict[str, Any]]] = defaultdict(list)
    for entry in record["fits"]:
        groups[entry["draw"], entry["count"]].append(entry)
    whole = next(f for f in record["fits"] if f["draw"] == "all")
    columns = {**whole["mean"], **whole["auroc"]}
    print("| draw | rows | seeds |", " | ".join(columns), "| fit s | cpu s |")
    print("|---" * (len(columns) + 5) + "|")
    print("| all | | |", " | ".join(f"{v:.4f}" for v in columns.values()), "| | |")
    for (draw, count), fits in sorted(groups.items()):
        known = [{**f["mean"], **f["auroc"]} for f in fits]
        cells = [gain([k[name] for k in known], of) for name, of in columns.items()]
        times = (median(f[key] for f in fits) for key in ("fit_seconds", "fit_cpu_seconds"))
        words = [draw, f"{count:,}", str(len(fits)), *cells, *(f"{t:.1f}" for t in times)]
        print("|", " | ".join(words), "|")


def gain(values: Sequence[float], whole: float) -> str:
    """The mean over seeds less the value on all rows; the spread over seeds behind it."""
    spread = f" ({stdev(values):.4f})" if len(values) > 1 else ""
    return f"{mean(values) - whole:+.4f}{spread}"


def main() -> None:
    """Capture, fit, or show."""
    options = arguments()
    torch.set_num_threads(options.threads)
    if options.show:
        show(load(options.out))
        return
    model = ChatModel.load(options.model, device="cpu")
    states = read(model, "train", load_guard_prompts("train"), options.cache)
    sets = test_sets(options.data_dir).items()
    tests = mixed({name: read(model, name, rows, options.cache) for name, rows in sets})
    known = describe(model, states, tests) | {"capture": times(options.cache)}
    write_atomic(options.out, json.dumps(load(options.out) | known, indent=1))
    if not options.capture_only:
        curve(options, model, states, tests)


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="default")
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--cache", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--capture-only", action="store_true", help="fit nothing")
    parser.add_argument("--draws", default=",".join(DRAWS))
    parser.add_argument("--largest", type=int, default=10_000, help="leave out larger parts")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--show", action="store_true", help="print the means")
    return parser.parse_args()


if __name__ == "__main__":
    main()
