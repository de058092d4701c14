"""What each choice in the default guard is worth: readings, probes, training sets, one at a time.

    python benchmarks/detection_search.py --cache DIR [--out F.json] [--only WORD ...]

DIR is the cache of ``detection.py`` for one model; no model is run. Each variant (``variants``) is
fitted on built-in prompts and scored on the eight public contrasts. The table gives the mean AUROC
and how far it is from the start's, with the 95 % interval of 1,000 bootstrap draws of prompts
within each class of each set, the same for all. The seed is fixed. Scores are kept in DIR/search,
so a killed run goes on.
"""

from __future__ import annotations

import argparse
import json
import re
from collections import Counter
from collections.abc import Callable, Sequence
from importlib.resources import files
from pathlib import Path
from zlib import crc32

import numpy as np
import torch
from detection import mixed
from numpy.typing import NDArray
from search_probes import Dual, logistic, low_rank, ridge, solved

from latentguard.probes.fitting import fit_probe, slots
from latentguard.probes.probe import BAND, Probe, layers_of
from latentguard.probes.ridge import Design
from latentguard.prompts import Prompt
from latentguard.report.document import write_text
from latentguard.states import DEFAULT_READING, Reading, States
from latentguard.stats.metrics import auroc, resampled

Score = Callable[[States], NDArray[np.float64]]
Fit = Callable[[Path], Score]
"""From the cache of a model."""

Scores = dict[str, NDArray[np.float64]]

STARTED = Reading("pooled", ("t_inst", "t_post", "mean"))
"""What the default read when the search began."""
PUBLIC = "advbench alpaca_harmless catqa jailbreaks jbb openai_moderation xstest".split()
START, STRENGTH, SEED = "start", 3.0, 0
"""The start and the default choose their penalty by cross-validation; other ridges take
``STRENGTH``."""

PARTS = {"an eighth": 8, "a quarter": 4, "a half": 2}
KINDS = (
    "borderline chat code confession fiction language pasted question register roleplay "
    "statement wrapper"
).split()
"""Of the built-in traffic."""


def main() -> None:
    """Fit, score, tell."""
    options = arguments()
    torch.set_num_threads(1)
    torch.manual_seed(SEED)
    test = mixed({n: States.load(options.cache / f"{n}.safetensors") for n in PUBLIC})
    found = {}
    for name, fit in variants().items():
        if name == START or any(word in name for word in options.only or [""]):
            found[name] = scores_of(options.cache, name, fit, test)
            print(name, flush=True)
    table = compared(found, {name: labels_of(states) for name, states in test.items()})
    print(text := json.dumps(table, indent=1))
    if options.out:
        write_text(options.out, text)


def variants() -> dict[str, Fit]:
    """Name -> how a probe is fitted."""
    now, instead = Reading.of(DEFAULT_READING, 0), Reading("instead", ("t_inst", "post", "mean"))
    known: dict[str, Fit] = {START: chosen(STARTED), "the default": chosen(now)}
    known["post in the place of t_post"] = chosen(instead)
    for source, said in {"paper": "AdvBench and Alpaca", "pairs": "the form-matched set"}.items():
        known |= {f"the start, from {said}": chosen(STARTED, source)}
        known |= {f"post in the place of t_post, from {said}": chosen(instead, source)}
        known |= {f"the default, from {said}": chosen(now, source)}
    known |= {f"penalty {s:g}": linear(solve=ridge(s)) for s in (0.1, 1, 3, 10, 30, 100)}
    known |= {f"read at {p} alone": linear(positions=(p,)) for p in STARTED.positions}
    known |= {"read at every token after the instruction, too": linear(positions=())}
    bands = ((0.0, 0.33), (0.47, 0.53), (0.67, 1.0), (0.0, 1.0))
    known |= {f"layers from {a:.0%} to {b:.0%} of the depth": linear(band=(a, b)) for a, b in bands}
    known |= {"one ridge a layer, added up": added_up}
    known |= {f"{k} principal components": linear(solve=low_rank(k)) for k in (64, 512)}
    known |= {f"logistic, penalty {s:g}": linear(solve=logistic(s)) for s in (0.1, 0.3, 1)}
    known |= {"every form weighs the same": linear(alike="form")}
    known |= {"every kind weighs the same": linear(alike="kind")}
    known |= {f"fitted on {one} of the traffic": part(n) for one, n in PARTS.items()}
    known |= {f"fitted on all but {kind} prompts": without(kind) for kind in KINDS}
    known |= {"fitted on pairs of the traffic alone": linear(kept=lambda p: bool(p.pair))}
    known |= {"fitted on traffic and contrast set": linear(sources=("traffic", "pairs"))}
    return known | {"fitted on traffic, AdvBench, Alpaca": linear(sources=("traffic", "paper"))}


def chosen(reading: Reading, source: str = "traffic") -> Fit:
    """What ``latentguard fit`` does with a reading and a training set."""

    def fit(cache: Path) -> Score:
        states = States.load(cache / f"{source}.safetensors")
        probe = fit_probe(states, reading, "linear", max(states.layers)).probe
        return scorer(probe, reading.positions)

    return fit


def linear(
    *,
    solve: Dual | None = None,
    positions: tuple[str, ...] = STARTED.positions,
    band: tuple[float, float] = BAND,
    sources: Sequence[str] = ("traffic",),
    kept: Callable[[Prompt], bool] | None = None,
    alike: str = "",
) -> Fit:
    """The start with something else in a place.

    Args:
        solve: The probe; a ridge with ``STRENGTH``.
        positions: Where it reads; at all captured ones if none is named.
        band: The layers, as shares of the depth.
        sources: Training sets.
        kept: Which rows of these.
        alike: ``form`` or ``kind``: each weighs the same within its class.
    """

    def fit(cache: Path) -> Score:
        states = training(cache, band, sources)
        states = states.where(kept) if kept else states
        where = positions or tuple(p for p in states.positions if p != "post")
        design = design_of(states, where, weights_of(states, alike))
        probe = Probe("linear", states.layers, *solved(solve or ridge(STRENGTH), design))
        return scorer(probe, where)

    return fit


def part(of: int) -> Fit:
    """Fitted on one in so many rows, chosen by name; pairs stay together."""
    return linear(kept=lambda p: crc32((p.pair or p.id).encode()) % of == 0)


def without(kind: str) -> Fit:
    """Fitted on the rows of all other kinds."""
    known = manners("kind")
    return linear(kept=lambda p: known[p.id] != kind)


def added_up(cache: Path) -> Score:
    """A ridge for each layer of the band, and the sum of them."""
    states = training(cache, BAND)
    weights, parts = weights_of(states), []
    for layer in states.layers:
        design = design_of(states.select((layer,)), STARTED.positions, weights)
        parts.append(solved(ridge(STRENGTH), design))
    weight = torch.stack([w for w, _ in parts], dim=1).flatten(0, 1)  # positions, then layers
    probe = Probe("linear", states.layers, weight, sum(b for _, b in parts))
    return scorer(probe, STARTED.positions)


def training(
    cache: Path, band: tuple[float, float], sources: Sequence[str] = ("traffic",)
) -> States:
    """What ``detection.py`` captured of these training sets in a band of layers."""
    loaded = (States.load(cache / f"{name}.safetensors") for name in sources)
    parts = [states.select(layers_of("linear", max(states.layers), band)) for states in loaded]
    return parts[0] if len(parts) == 1 else States.collect(parts)  # which copies gigabytes


def design_of(states: States, positions: Sequence[str], weights: torch.Tensor) -> Design:
    """What predicts +1 and -1."""
    y = torch.from_numpy(labels_of(states))
    return Design(slots(states, positions), (y.double() * 2 - 1)[:, None], weights)


def weights_of(states: States, alike: str = "") -> torch.Tensor:
    """Each class with half of the weight, and within it each form or kind with the same."""
    known = manners(alike) if alike else {}
    groups = [(bool(p.harmful), known.get(p.id)) for p in states.prompts]
    sizes, classes = Counter(groups), Counter(label for label, _ in set(groups))
    shares = [0.5 / classes[label] / sizes[label, group] for label, group in groups]
    return torch.tensor(shares, dtype=torch.float64) * len(shares)


def manners(field: str) -> dict[str, str]:
    """The form or the kind of each built-in prompt."""
    lines = (files("latentguard.data") / "traffic.jsonl").read_text("utf-8").splitlines()
    return {row["id"]: row[field] for row in map(json.loads, lines)}


def scorer(probe: Probe, positions: Sequence[str]) -> Score:
    """A probe at positions."""
    return lambda test: probe(slots(test.select(probe.layers), positions)).double().numpy()


def labels_of(states: States) -> NDArray[np.bool_]:
    """True for harmful."""
    return np.array([bool(p.harmful) for p in states.prompts])


def scores_of(cache: Path, name: str, fit: Fit, test: dict[str, States]) -> Scores:
    """The scores of a variant on each set; fitted if they are not in the cache."""
    path = cache / "search" / f"{re.sub('[^a-z0-9.]+', '-', name.lower())}.npz"
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        score = fit(cache)
        partial = path.with_suffix(".partial.npz")
        np.savez(partial, **{n: score(states) for n, states in test.items()})
        partial.replace(path)
    with np.load(path) as file:
        return {n: file[n] for n in test}


def compared(found: dict[str, Scores], labels: dict[str, NDArray[np.bool_]]) -> list[dict]:
    """A row a variant: AUROC of each set, the mean, and its distance from the start's."""
    rows = []
    for name, scores in found.items():
        both = {n: np.stack([found[START][n], scores[n]], axis=1) for n in labels}
        sides = [both[n][labels[n] == side] for n in labels for side in (True, False)]
        mean = resampled(lambda *drawn: means(drawn)[1], *sides, seed=SEED)
        change = resampled(lambda *drawn: float(np.diff(means(drawn))[0]), *sides, seed=SEED)
        row = dict(variant=name, mean=mean.value, interval=[mean.low, mean.high])
        row |= dict(change=change.value, change_interval=[change.low, change.high])
        rows.append(row | dict(sets={n: auroc(y, scores[n]) for n, y in labels.items()}))
    return rows


def means(sides: Sequence[NDArray[np.float64]]) -> list[float]:
    """The mean AUROC of the start and of a variant; harmful and harmless rows of each set."""
    figures = []
    for harmful, harmless in zip(sides[::2], sides[1::2], strict=True):
        y, scores = np.arange(len(harmful) + len(harmless)) < len(harmful), np.r_[harmful, harmless]
        figures.append([auroc(y, column) for column in scores.T])
    return np.mean(figures, axis=0).tolist()


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cache", type=Path, required=True, help="what detection.py captured")
    parser.add_argument("--only", action="append", help="variants with this in their name")
    parser.add_argument("--out", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    main()
