"""What the penalty and the positions of the default guard are worth, one changed at a time.

    python benchmarks/detection_search.py --cache DIR [--out F.json] [--only WORD ...]

DIR is the cache of ``detection.py`` for one model; no model is run. Each variant is fitted on the
built-in traffic and scored on the eight public contrasts. The table gives the mean AUROC and how
far it is from the default's, with the 95 % interval of 1,000 bootstrap draws of prompts within each
class of each set, the same for all. Scores are kept in DIR/search, so a killed run goes on.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from detection import mixed
from numpy.typing import NDArray

from latentguard.fitting import fit_readout, slots
from latentguard.metrics import auroc
from latentguard.readings import Reading
from latentguard.readouts import Readout, balanced, layers_of
from latentguard.report import write_text
from latentguard.ridge import Design, Ridge
from latentguard.states import States

Score = Callable[[States], NDArray[np.float64]]
Fit = Callable[[States], Score]
Scores = dict[str, NDArray[np.float64]]

POOLED = Reading("pooled", ("t_inst", "t_post", "mean"))
PUBLIC = "advbench alpaca_harmless catqa jailbreaks jbb openai_moderation xstest".split()
DEFAULT, STRENGTH, SEED, DRAWS = "default", 3.0, 0, 1000
"""The default chooses its penalty by cross-validation; other positions take ``STRENGTH``."""


def main() -> None:
    """Fit, score, tell."""
    options = arguments()
    torch.set_num_threads(1)
    train = States.load(options.cache / "traffic.safetensors")
    test = mixed({n: States.load(options.cache / f"{n}.safetensors") for n in PUBLIC})
    found = {}
    for name, fit in variants().items():
        if name == DEFAULT or any(word in name for word in options.only or [""]):
            found[name] = scores_of(options.cache / "search", name, train, fit, test)
    table = compared(found, {name: labels_of(states) for name, states in test.items()})
    print(text := json.dumps(table, indent=1))
    if options.out:
        write_text(options.out, text)


def variants() -> dict[str, Fit]:
    """Name -> how a readout is fitted."""
    known: dict[str, Fit] = {DEFAULT: default}
    known |= {f"penalty {s:g}": ridge(strength=s) for s in (0.1, 1, 3, 10, 30, 100)}
    known |= {f"read at {p} alone": ridge(positions=(p,)) for p in POOLED.positions}
    return known | {"read at every token after the instruction, too": ridge(positions=())}


def default(states: States) -> Score:
    """What ``latentguard fit`` does."""
    readout = fit_readout(states, POOLED, "linear", max(states.layers)).readout
    return scorer(readout, POOLED.positions)


def ridge(strength: float = STRENGTH, positions: tuple[str, ...] = POOLED.positions) -> Fit:
    """The default's ridge; at all captured positions if none is named."""

    def fit(states: States) -> Score:
        where, layers = positions or states.positions, layers_of("linear", max(states.layers))
        weight, bias = Ridge(design(states, layers, where), strength).solve()
        return scorer(Readout("linear", layers, weight[0], float(bias[0])), where)

    return fit


@lru_cache(maxsize=1)  # the penalties share it
def design(states: States, layers: tuple[int, ...], positions: tuple[str, ...]) -> Design:
    """What a ridge at these layers and positions is fitted to."""
    return balanced(slots(states.select(layers), positions), torch.from_numpy(labels_of(states)))


def scorer(readout: Readout, positions: tuple[str, ...]) -> Score:
    """A readout at positions."""
    return lambda test: readout(slots(test.select(readout.layers), positions)).double().numpy()


def labels_of(states: States) -> NDArray[np.bool_]:
    """True for harmful."""
    return np.array([bool(p.harmful) for p in states.prompts])


def scores_of(folder: Path, name: str, train: States, fit: Fit, test: dict[str, States]) -> Scores:
    """The scores of a variant on each set; fitted if they are not in the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name.replace(' ', '-')}.npz"
    if not path.exists():
        score = fit(train)
        partial = path.with_suffix(".partial.npz")
        np.savez(partial, **{n: score(states) for n, states in test.items()})
        partial.replace(path)
    with np.load(path) as file:
        return {n: file[n] for n in test}


def compared(found: dict[str, Scores], labels: dict[str, NDArray[np.bool_]]) -> list[dict]:
    """A row a variant: AUROC of each set, the mean, and its distance from the default's."""
    drawn = np.array([means(found, labels, resampled(labels, SEED + i)) for i in range(DRAWS)])
    whole = {name: np.arange(len(y)) for name, y in labels.items()}
    values = means(found, labels, whole)
    base, rows = list(found).index(DEFAULT), []
    for column, (name, scores) in enumerate(found.items()):
        row = dict(variant=name, mean=values[column], change=values[column] - values[base])
        row["interval"] = ends(drawn[:, column])
        row["change_interval"] = ends(drawn[:, column] - drawn[:, base])
        rows.append(row | dict(sets={n: auroc(y, scores[n]) for n, y in labels.items()}))
    return rows


def ends(values: NDArray[np.float64]) -> list[float]:
    """Of the 95 % interval."""
    return [float(end) for end in np.quantile(values, [0.025, 0.975])]


def resampled(labels: dict[str, NDArray[np.bool_]], seed: int) -> dict[str, NDArray[np.int64]]:
    """Rows of each set, drawn within each class."""
    rng, rows = np.random.default_rng(seed), {}
    for name, y in labels.items():
        sides = np.flatnonzero(y), np.flatnonzero(~y)
        rows[name] = np.concatenate([rng.choice(side, len(side)) for side in sides])
    return rows


def means(
    found: dict[str, Scores],
    labels: dict[str, NDArray[np.bool_]],
    rows: dict[str, NDArray[np.int64]],
) -> list[float]:
    """The mean AUROC of each variant on these rows."""
    return [
        float(np.mean([auroc(labels[n][r], scores[n][r]) for n, r in rows.items()]))
        for scores in found.values()
    ]


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cache", type=Path, required=True, help="what detection.py captured")
    parser.add_argument("--only", action="append", help="variants with this in their name")
    parser.add_argument("--out", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    main()
