"""What each choice of the default guard is worth: layers, readout and data, one changed at a time.

    python benchmarks/detection_search.py --cache DIR [--out F.json] [--only WORD]

DIR is the cache of ``detection.py`` for one model; no model is run. Each variant is fitted on the
built-in traffic, or on a part of it, and scored on the eight public contrasts. The table gives the
mean AUROC and how far it is from the default's, with the 95 % interval of 1,000 bootstrap draws of
prompts within each class of each set, the same for all. Scores are kept in DIR/search, so a killed
run goes on. All seeds are fixed.
"""

from __future__ import annotations

import argparse
import json
import zlib
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from detection import mixed
from jaxtyping import Float
from numpy.typing import NDArray
from sklearn.decomposition import PCA
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.linear_model import LogisticRegression
from sklearn.linear_model import Ridge as PrimalRidge
from sklearn.model_selection import GroupKFold, cross_val_predict
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from latentguard.audit import ending, form
from latentguard.fitting import fit_readout, slots
from latentguard.metrics import auroc
from latentguard.prompts import Prompt
from latentguard.readings import Reading
from latentguard.readouts import BAND, Readout
from latentguard.report import write_text
from latentguard.ridge import Design, Ridge
from latentguard.states import States

Score = Callable[[States], NDArray[np.float64]]
Fit = Callable[[States], Score]
Keep = Callable[[Prompt], bool]
Weigh = Callable[[Sequence[Prompt]], Tensor]

POOLED = Reading("pooled", ("t_inst", "t_post", "mean"))
PUBLIC = "advbench alpaca_harmless catqa jailbreaks jbb openai_moderation xstest".split()
DEFAULT, STRENGTH, SEED, DRAWS = "default", 3.0, 0, 1000
"""The default chooses its penalty by cross-validation; all others take ``STRENGTH``."""

FAMILIES = {  # how the ids of the built-in traffic name its kinds
    "instructions and plain requests": "chore errand plain lone",
    "two requests on one topic": "topic theme blunt deed borderline",
    "requests matched by form": "command order query wonder question ask",
    "posts, remarks and statements": "post remark statement adult confession",
    "wrappers, letters, suffixes, role play": "wrapper letter persuade suffix roleplay",
    "pieces of documents": "text line pasted",
    "chats, code, fiction, languages": "chat code fiction register language",
}


def main() -> None:
    """Fit, score, tell."""
    options = arguments()
    torch.set_num_threads(1)
    train = States.load(options.cache / "traffic.safetensors")
    test = mixed({n: States.load(options.cache / f"{n}.safetensors") for n in PUBLIC})
    found = {}
    for name, (keep, fit) in variants().items():
        if name == DEFAULT or (options.only or "") in name:
            rows = train if keep is everything else train.where(keep)
            found[name] = scores_of(options.cache / "search", name, rows, fit, test)
            print(f"{name}: {mean_auroc(found[name], test):.4f}", flush=True)
    table = compared(found, test)
    print(markdown(table))
    if options.out:
        write_text(options.out, json.dumps(table, indent=1))


def variants() -> dict[str, tuple[Keep, Fit]]:
    """Name -> which rows are kept, and how a readout is fitted on them."""
    known: dict[str, Fit] = {DEFAULT: default}
    known |= {f"penalty {s:g}": ridge(strength=s) for s in (0.1, 1, 3, 10, 30, 100)}
    bands = {"first third": (0, 0.33), "last third": (0.67, 1), "all but the first fifth": (0.2, 1)}
    known |= {f"layers: {name}": ridge(band=band) for name, band in bands.items()}
    known |= {f"read at {p} alone": ridge(positions=(p,)) for p in POOLED.positions}
    known["read at every token after the instruction, too"] = ridge(positions=())
    known["classes balanced within each form and ending"] = ridge(weigh=by_form)
    known["one ridge a layer, mean of scores"] = by_layer(stacked=False)
    known["one ridge a layer, weights of layers fitted"] = by_layer(stacked=True)
    known["64 components, linear discriminant"] = low_rank(64, LinearDiscriminantAnalysis())
    logistic = LogisticRegression(class_weight="balanced", max_iter=1000)
    known["256 components, logistic regression"] = low_rank(256, logistic)
    found = {name: (everything, fit) for name, fit in known.items()}
    for share in (2, 4, 8):
        found[f"data: a part in {share}"] = (part(share), ridge())
    return found | {f"data: without {f}": (without(f), ridge()) for f in FAMILIES}


def default(states: States) -> Score:
    """What ``latentguard fit`` does."""
    readout = fit_readout(states, POOLED, "linear", max(states.layers)).readout
    return scorer(readout, POOLED.positions)


def ridge(
    strength: float = STRENGTH,
    band: tuple[float, float] = BAND,
    positions: Sequence[str] = POOLED.positions,
    weigh: Weigh | None = None,
) -> Fit:
    """One ridge on the slots of a band, at all captured positions if none is named."""

    def fit(states: States) -> Score:
        layers, where = in_band(states, band).layers, tuple(positions) or states.positions
        weight, bias = Ridge(design(states, layers, where, weigh or balanced), strength).solve()
        return scorer(Readout("linear", layers, weight[0], float(bias[0])), where)

    return fit


@lru_cache(maxsize=1)  # the penalties share it
def design(
    states: States, layers: tuple[int, ...], positions: tuple[str, ...], weigh: Weigh
) -> Design:
    """What a ridge on these slots is fitted to."""
    targets = torch.from_numpy(labels_of(states) * 2.0 - 1)[:, None]
    return Design(slots(states.select(layers), positions), targets, weigh(states.prompts))


def scorer(readout: Readout, positions: Sequence[str]) -> Score:
    """A readout at positions."""
    return lambda test: readout(slots(test.select(readout.layers), positions)).double().numpy()


def by_layer(stacked: bool) -> Fit:
    """A ridge for each layer of the band; their mean, or a logistic regression on them."""

    def fit(states: States) -> Score:
        layers = in_band(states, BAND).layers
        y, weights = labels_of(states), balanced(states.prompts).numpy()
        how = {"primalridge__sample_weight": weights}
        models = [
            plain_ridge(states).fit(features(states, (k,)), y * 2.0 - 1, **how) for k in layers
        ]
        mix = np.ones(len(layers))
        if stacked:
            folds = dict(
                groups=groups_of(states), cv=GroupKFold(5, shuffle=True, random_state=SEED)
            )
            told = [
                cross_val_predict(m, features(states, (k,)), y * 2.0 - 1, params=how, **folds)
                for m, k in zip(models, layers, strict=True)
            ]
            head = LogisticRegression(class_weight="balanced").fit(np.stack(told, 1), y)
            mix = head.coef_[0]
        return lambda test: sum(
            share * m.predict(features(test, (k,)))
            for share, m, k in zip(mix, models, layers, strict=True)
        )

    return fit


def plain_ridge(states: States) -> Pipeline:
    """Ridge on the states of one layer, its penalty on the scale of ``ridge``."""
    width = len(POOLED.positions) * states.values.shape[-1]
    return make_pipeline(StandardScaler(), PrimalRidge(STRENGTH * width))


def low_rank(rank: int, head: LinearDiscriminantAnalysis | LogisticRegression) -> Fit:
    """A classifier on the principal components of the band."""

    def fit(states: States) -> Score:
        layers = in_band(states, BAND).layers
        components = PCA(rank, svd_solver="randomized", random_state=SEED)
        model = make_pipeline(StandardScaler(copy=False), components, StandardScaler(), head)
        model.fit(features(states, layers), labels_of(states))
        return lambda test: model.decision_function(features(test, layers))

    return fit


def features(states: States, layers: tuple[int, ...]) -> NDArray[np.float32]:
    """The states of some layers as rows of numbers."""
    return slots(states.select(layers), POOLED.positions).float().flatten(1).numpy()


def in_band(states: States, band: tuple[float, float]) -> States:
    """The states of the layers between two shares of the depth; layer 0 has no context."""
    low, high = (share * max(states.layers) for share in band)
    return states.select(tuple(k for k in states.layers if k and low <= k <= high))


def labels_of(states: States) -> NDArray[np.bool_]:
    """True for harmful."""
    return np.array([bool(p.harmful) for p in states.prompts])


def groups_of(states: States) -> list[str]:
    """What stays together in a fold."""
    return [p.pair or p.id for p in states.prompts]


def balanced(prompts: Sequence[Prompt]) -> Float[Tensor, "n"]:
    """Each class has half of the weight."""
    return weights_within(prompts, lambda p: "all")


def by_form(prompts: Sequence[Prompt]) -> Float[Tensor, "n"]:
    """Each class has half of the weight of each form and ending; those with one class have none."""
    return weights_within(prompts, lambda p: f"{form(p.text)} {ending(p.text)}")


def weights_within(prompts: Sequence[Prompt], cell: Callable[[Prompt], str]) -> Float[Tensor, "n"]:
    """Weights with mean 1, the same for both classes of each cell."""
    cells = np.array([cell(p) for p in prompts])
    y, weights = np.array([bool(p.harmful) for p in prompts]), np.zeros(len(prompts))
    for name in set(cells):
        rows = cells == name
        if 0 < y[rows].mean() < 1:
            for side in (True, False):
                weights[rows & (y == side)] = rows.sum() / (rows & (y == side)).sum()
    return torch.from_numpy(weights / weights.mean())


def everything(prompt: Prompt) -> bool:
    """Keep it."""
    return True


def part(count: int) -> Keep:
    """One pair, or lone row, in so many."""
    return lambda p: zlib.crc32((p.pair or p.id).encode()) % count == 0


def without(family: str) -> Keep:
    """All but the kinds of a family."""
    kinds = FAMILIES[family].split()
    return lambda p: p.id.split("-")[1] not in kinds


def scores_of(folder: Path, name: str, train: States, fit: Fit, test: dict[str, States]) -> dict:
    """The scores of a variant on each set; fitted if they are not in the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name.replace(' ', '-').replace(':', '')}.npz"
    if not path.exists():
        score = fit(train)
        partial = path.with_suffix(".partial.npz")
        np.savez(partial, n=len(train), **{n: score(states) for n, states in test.items()})
        partial.replace(path)
    with np.load(path) as file:
        return dict(file)


def mean_auroc(scores: dict, test: dict[str, States]) -> float:
    """Over the sets."""
    return float(np.mean([auroc(labels_of(s), scores[name]) for name, s in test.items()]))


def compared(found: dict[str, dict], test: dict[str, States]) -> list[dict]:
    """A row a variant, with the interval of its difference to the default."""
    labels = {name: labels_of(states) for name, states in test.items()}
    drawn = np.array([means(found, labels, np.random.default_rng(SEED + i)) for i in range(DRAWS)])
    names, rows = list(found), []
    for column, (name, scores) in enumerate(found.items()):
        shift = drawn[:, column] - drawn[:, names.index(DEFAULT)]
        sets = {n: round(auroc(y, scores[n]), 4) for n, y in labels.items()}
        value = mean_auroc(scores, test)
        change = value - mean_auroc(found[DEFAULT], test)
        ends = np.quantile(shift, [0.025, 0.975]), np.quantile(drawn[:, column], [0.025, 0.975])
        figures = dict(
            mean=value, interval=list(ends[1]), change=change, change_interval=list(ends[0])
        )
        rows.append(dict(variant=name, rows=int(scores["n"]), **figures, sets=sets))
    return rows


def means(
    found: dict[str, dict], labels: dict[str, NDArray[np.bool_]], rng: np.random.Generator
) -> list[float]:
    """The mean AUROC of each variant on one bootstrap draw of the prompts."""
    drawn = {}
    for name, y in labels.items():
        sides = np.flatnonzero(y), np.flatnonzero(~y)
        drawn[name] = np.concatenate([rng.choice(side, len(side)) for side in sides])
    return [
        float(np.mean([auroc(labels[n][rows], scores[n][rows]) for n, rows in drawn.items()]))
        for scores in found.values()
    ]


def markdown(table: list[dict]) -> str:
    """For the document."""
    lines = ["| variant | training rows | mean of 8 | against the default |", "|---|---|---|---|"]
    for row in table:
        low, high = row["change_interval"]
        change = (
            "" if row["variant"] == DEFAULT else f"{row['change']:+.3f} [{low:+.3f}, {high:+.3f}]"
        )
        lines.append(f"| {row['variant']} | {row['rows']:,} | {row['mean']:.3f} | {change} |")
    return "\n".join(lines)


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cache", type=Path, required=True, help="what detection.py captured")
    parser.add_argument("--only", help="variants with this in their name")
    parser.add_argument("--out", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    main()
