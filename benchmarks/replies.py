"""What turns the states at the tokens of a reply into one score: leave one data set out.

    python benchmarks/replies.py --model M --data-dir DIR --cache DIR [--training-states GLOB]
        [--out F.json]

Reads what ``reply_states.py`` captured. Every probe is fitted on replies of one set and scored on
the other; training rows whose prompt occurs in the test set are left out. Intervals draw prompts
again, with all their replies. No text is printed or written.
"""

from __future__ import annotations

import argparse
import glob
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from reply_states import (
    SETS,
    TokenStates,
    as_one_text,
    cut_replies,
    pooled_states,
    read_replies,
    token_states,
)
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from latentguard.data.surface_audit import ngram_scores
from latentguard.errors import GuardError
from latentguard.models.chat_model import ChatModel
from latentguard.probes.axis import Axis
from latentguard.probes.fitting import slots
from latentguard.probes.probe import Probe, centroid, fit_linear, layers_of
from latentguard.prompts import Prompt, Reply
from latentguard.states import Reading, States
from latentguard.stats.bootstrap import resample_weights
from latentguard.stats.bounds import threshold_for_fpr
from latentguard.stats.detection import auroc, f1_at, tpr_at, weighted_auroc, win_matrix

Scores = NDArray[np.float64]
Pool = Callable[[Scores], float]

PREFIXES = (16, 64, 10**6)
"""After how many tokens the mean states end that a probe is fitted on."""

MAX_FPR = 0.05
FOLDS = 5


@dataclass(frozen=True, eq=False)
class ReplySet:
    """One data set, as it was captured."""

    name: str
    """Its name."""

    replies: list[Reply]
    """Cut at the longest reply that is read."""

    tokens: TokenStates
    """States at their tokens."""

    prompts: States | None
    """States of their prompts, where ``pooled`` reads."""

    one_text: States | None
    """States of prompt and reply as one message."""

    @property
    def labels(self) -> NDArray[np.bool_]:
        """True for harmful."""
        return np.array([bool(reply.harmful) for reply in self.replies])

    @property
    def owners(self) -> list[str]:
        """The prompt of each reply."""
        return [reply.prompt.text for reply in self.replies]

    def means(self, end: int, rows: Sequence[int]) -> Tensor:
        """Mean states over the first tokens of some replies, [n l d]."""
        return torch.stack([self.tokens.of_reply(row)[:end].mean(0) for row in rows])


# ---- from token scores to one score


def running(scores: Scores, prior: float) -> Scores:
    """Means so far, drawn toward zero as by so many tokens of score zero."""
    return np.asarray(scores.cumsum() / (np.arange(len(scores)) + 1 + prior))


def smoothed(scores: Scores, half_life: float) -> Scores:
    """Exponentially smoothed scores, from zero on."""
    keep = 0.5 ** (1 / half_life)
    level = 0.0
    levels = []
    for score in scores:
        level = keep * level + (1 - keep) * score
        levels.append(level)
    return np.array(levels)


def window_means(scores: Scores, size: int) -> Scores:
    """Means over windows of so many tokens; of all if there are fewer."""
    if len(scores) <= size:
        return scores[:0].copy() if not len(scores) else np.array([scores.mean()])
    sums = np.concatenate([[0.0], scores.cumsum()])
    return np.asarray((sums[size:] - sums[:-size]) / size)


def attended(scores: Scores, sharpness: float) -> float:
    """Mean weighted by the softmax of the scores themselves."""
    weights = np.exp(sharpness * (scores - scores.max()))
    return float((weights * scores).sum() / weights.sum())


def moving(scores: Scores, size: int) -> Scores:
    """Means of the last so many tokens; those before the first count as zero."""
    sums = np.concatenate([np.zeros(size + 1), scores.cumsum()])
    return np.asarray((sums[size + 1 :] - sums[1:-size]) / size)


POOLS: dict[str, Pool] = {
    "mean of all tokens": lambda s: float(s.mean()),
    "highest running mean, prior 16": lambda s: float(running(s, 16).max()),
    "highest smoothed, half-life 16": lambda s: float(smoothed(s, 16).max()),
    "highest moving mean of 8": lambda s: float(moving(s, 8).max()),
    "highest moving mean of 16": lambda s: float(moving(s, 16).max()),
    "highest moving mean of 32": lambda s: float(moving(s, 32).max()),
    "highest whole window of 16": lambda s: float(window_means(s, 16).max()),
    "highest whole window of 48": lambda s: float(window_means(s, 48).max()),
    "softmax-weighted mean": lambda s: attended(s, 1.0),
    "highest token": lambda s: float(s.max()),
    "last token": lambda s: float(s[-1]),
}
SHIPPED = "highest moving mean of 16"
CHOSEN = "reply probe (windows)"


def token_scores(states: TokenStates, probe: Probe, rows: Sequence[int]) -> list[Scores]:
    """What the tokens of each reply score."""
    return [probe(states.of_reply(row)).double().numpy() for row in rows]


# ---- probes


def fit_on_means(data: ReplySet, rows: Sequence[int], ends: Sequence[int], layers: Any) -> Probe:
    """A linear probe of mean states over the first tokens."""
    states = torch.cat([data.means(end, rows) for end in ends])
    labels = [bool(data.labels[row]) for row in rows] * len(ends)
    groups = [data.owners[row] for row in rows] * len(ends)
    return fit_linear(states, labels, groups, layers).probe


def fit_on_windows(data: ReplySet, rows: Sequence[int], layers: Any, size: int = 16) -> Probe:
    """A linear probe of the mean states of windows, each labelled as its reply."""
    states, labels, groups = [], list[bool](), list[str]()
    for row in rows:
        tokens = data.tokens.of_reply(row)
        for start in range(0, max(1, len(tokens) - size // 2), size):
            states.append(tokens[start : start + size].mean(0))
            labels.append(bool(data.labels[row]))
            groups.append(data.owners[row])
    return fit_linear(torch.stack(states), labels, groups, layers).probe


def fit_on_last(data: ReplySet, rows: Sequence[int], layers: Any) -> Probe:
    """A linear probe of the last token."""
    states = torch.stack([data.tokens.of_reply(row)[-1] for row in rows])
    labels = [bool(data.labels[row]) for row in rows]
    return fit_linear(states, labels, [data.owners[row] for row in rows], layers).probe


def fit_for_both(data: ReplySet, rows: Sequence[int], training: States, layers: Any) -> Probe:
    """One linear probe of the means over replies and over the built-in training prompts."""
    asked = training.at("mean").float()
    states = torch.cat([data.means(PREFIXES[-1], rows), asked])
    labels = [bool(data.labels[row]) for row in rows]
    labels += [bool(prompt.harmful) for prompt in training.prompts]
    groups = [data.owners[row] for row in rows]
    groups += [prompt.pair or prompt.text for prompt in training.prompts]
    return fit_linear(states, labels, groups, layers).probe


def fit_prompt_probe(training: States, positions: Sequence[str], layers: Any) -> Probe:
    """A linear probe of the built-in training prompts."""
    labels = [bool(prompt.harmful) for prompt in training.prompts]
    groups = [prompt.pair or prompt.text for prompt in training.prompts]
    return fit_linear(
        slots(training, positions), labels, groups, tuple(layers) * len(positions)
    ).probe


def papers_rule(data: ReplySet, rows: Sequence[int], layers: Any) -> Probe:
    """Difference of the cosines to the centroids of harmful and of harmless replies."""
    states = data.means(PREFIXES[-1], rows)
    prompts = tuple(Prompt("not kept", harmful=bool(data.labels[row])) for row in rows)
    held = States(states[:, None], prompts, ("reply",), tuple(layers), FINGERPRINT)
    return centroid(Axis.fit(held, "reply"))


FINGERPRINT: Any = None
"""States of means are bound to no model here."""


# ---- one direction: fitted on one set, scored on the other


def compare(
    train: ReplySet, test: ReplySet, training: States | None, layers: Any
) -> dict[str, Any]:
    """Scores of every rule on the test set."""
    asked = set(test.owners)
    rows = [n for n, owner in enumerate(train.owners) if owner not in asked]
    every = range(len(test.replies))
    probes: dict[str, Probe] = {
        "reply probe (mean)": fit_on_means(train, rows, PREFIXES[-1:], layers),
        "reply probe (prefixes)": fit_on_means(train, rows, PREFIXES, layers),
        "reply probe (windows)": fit_on_windows(train, rows, layers),
        "reply probe (last token)": fit_on_last(train, rows, layers),
        "the paper's rule on replies": papers_rule(train, rows, layers),
    }
    if training is not None:
        probes["prompt probe transferred"] = fit_prompt_probe(training, ("mean",), layers)
        probes["one probe for both"] = fit_for_both(train, rows, training, layers)
    scores: dict[str, Scores] = {}
    for name, probe in probes.items():
        tokens = token_scores(test.tokens, probe, every)
        for pool, reduce in POOLS.items():
            scores[f"{name}: {pool}"] = np.array([reduce(own) for own in tokens])
    attention = fit_attention(train, rows, layers)
    scores["attention-pooled probe"] = np.array([attention(test.tokens.of_reply(n)) for n in every])
    scores |= baselines(train, rows, test, training, layers)
    with_prompt(scores, train, rows, test, training, layers)
    figures = {name: figure(test, values) for name, values in scores.items()}
    chosen = probes[CHOSEN]
    at = shipped_threshold(train, rows, layers)
    stream = stream_figures(test, chosen, at)
    control = random_direction(test, chosen)
    return dict(
        train=train.name,
        test=test.name,
        training_rows=len(rows),
        harmful=int(test.labels.sum()),
        harmless=int((~test.labels).sum()),
        prompts=len(asked),
        figures=figures,
        random_direction=control,
        stream=stream,
        shuffled_tokens=shuffled(test, chosen),
        over_ngrams=difference(test, scores[f"{CHOSEN}: {SHIPPED}"], scores["n-grams on reply"]),
        over_prompt=difference(
            test,
            scores[f"{CHOSEN}: {SHIPPED}"],
            scores.get("prompt score alone", np.zeros(len(test.replies))),
        ),
    )


def fit_attention(train: ReplySet, rows: Sequence[int], layers: Any) -> Callable[[Tensor], float]:
    """A probe with learnt attention over tokens: two directions in the first 64 components."""
    means = train.means(PREFIXES[-1], rows).flatten(1)
    center = means.mean(0)
    _, _, axes = torch.pca_lowrank(means - center, q=64, niter=4)
    scale = ((means - center) @ axes).std(0).clamp_min(1e-6)

    def features(states: Tensor) -> Tensor:
        return ((states.flatten(1) - center) @ axes) / scale

    inputs = [features(train.tokens.of_reply(row)) for row in rows]
    targets = torch.tensor([1.0 if train.labels[row] else 0.0 for row in rows])
    length = max(map(len, inputs))
    padded = torch.zeros(len(rows), length, 64)
    mask = torch.full((len(rows), length), -torch.inf)
    for n, one in enumerate(inputs):
        padded[n, : len(one)] = one
        mask[n, : len(one)] = 0
    torch.manual_seed(0)
    query = torch.zeros(64, requires_grad=True)
    value = torch.zeros(64, requires_grad=True)
    bias = torch.zeros(1, requires_grad=True)
    steps = torch.optim.AdamW([query, value, bias], lr=0.02, weight_decay=0.1)
    for _ in range(150):
        chances = (padded @ query + mask).softmax(1)
        logits = ((padded @ value) * chances).sum(1) + bias
        loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, targets)
        steps.zero_grad()
        loss.backward()
        steps.step()

    def score(states: Tensor) -> float:
        with torch.no_grad():
            own = features(states)
            return float(((own @ value) * (own @ query).softmax(0)).sum() + bias)

    return score


def baselines(
    train: ReplySet, rows: Sequence[int], test: ReplySet, training: States | None, layers: Any
) -> dict[str, Scores]:
    """What knows nothing of the states at the reply's tokens."""
    labels = [bool(train.labels[row]) for row in rows]
    replies = [Prompt(train.replies[r].text, harmful=y) for r, y in zip(rows, labels, strict=True)]
    both = [as_one_text(train.replies[row]) for row in rows]
    found: dict[str, Scores] = {
        "length": np.array([float(len(reply.ids)) for reply in test.replies]),
        "n-grams on reply": ngram_scores(replies, [Prompt(r.text) for r in test.replies]),
        "n-grams on prompt + reply": ngram_scores(both, [as_one_text(r) for r in test.replies]),
    }
    positions = Reading.of("pooled", 10).positions
    if train.one_text is not None and test.one_text is not None:
        states = slots(train.one_text, positions)[list(rows)]
        groups = [train.owners[row] for row in rows]
        fit = fit_linear(states, labels, groups, tuple(layers) * len(positions))
        found["second pass, fitted on prompt + reply"] = _scored(fit.probe, test.one_text)
    if training is not None:
        probe = fit_prompt_probe(training, positions, layers)
        if test.prompts is not None:
            found["prompt score alone"] = _scored(probe, test.prompts)
        if test.one_text is not None:
            found["second pass, the prompt guard"] = _scored(probe, test.one_text)
    return found


def with_prompt(
    scores: dict[str, Scores],
    train: ReplySet,
    rows: Sequence[int],
    test: ReplySet,
    training: States | None,
    layers: Any,
) -> None:
    """Add the reply score with the prompt score beside it, weighed on the training set."""
    if training is None or train.prompts is None or test.prompts is None:
        return
    probe = fit_prompt_probe(training, Reading.of("pooled", 10).positions, layers)
    asked = _scored(probe, train.prompts)[list(rows)]
    held = held_out_tokens(train, rows, layers)
    reply = np.array([POOLS[SHIPPED](own) for own in held])
    model = LogisticRegression(class_weight="balanced")
    labels = train.labels[list(rows)]
    scale = np.array([reply.std(), asked.std()])
    model.fit(np.stack([reply, asked], 1) / scale, labels)
    said = scores[f"{CHOSEN}: {SHIPPED}"]
    features = np.stack([said, scores["prompt score alone"]], 1) / scale
    scores["reply and prompt score together"] = model.decision_function(features)


def held_out_tokens(train: ReplySet, rows: Sequence[int], layers: Any) -> list[Scores]:
    """Token scores of training replies by probes that saw no reply to their prompt."""
    names = sorted({train.owners[row] for row in rows})
    order = np.random.default_rng(0).permutation(len(names))
    fold_of = {names[i]: n % FOLDS for n, i in enumerate(order)}
    found: dict[int, Scores] = {}
    for fold in range(FOLDS):
        inside = [row for row in rows if fold_of[train.owners[row]] == fold]
        others = [row for row in rows if fold_of[train.owners[row]] != fold]
        probe = fit_on_windows(train, others, layers)
        found |= dict(zip(inside, token_scores(train.tokens, probe, inside), strict=True))
    return [found[row] for row in rows]


def shipped_threshold(train: ReplySet, rows: Sequence[int], layers: Any) -> float:
    """The threshold that keeps the rate on harmless training replies, scored held-out."""
    held = held_out_tokens(train, rows, layers)
    harmless = [own for own, row in zip(held, rows, strict=True) if not train.labels[row]]
    scores = [POOLS[SHIPPED](own) for own in harmless]
    try:
        return threshold_for_fpr(scores, MAX_FPR).threshold
    except GuardError:  # too few for the exact bound: the plain quantile
        return float(np.quantile(scores, 1 - MAX_FPR))


def stream_figures(test: ReplySet, probe: Probe, threshold: float) -> dict[str, Any]:
    """What a stream at the shipped threshold catches, and how much of it was out by then."""
    labels = test.labels
    tokens = token_scores(test.tokens, probe, range(len(test.replies)))
    paths = [moving(own, 16) for own in tokens]
    flagged = np.array([path.max() > threshold for path in paths])
    at = [int(np.argmax(path > threshold)) + 1 for path in paths]
    caught = [n for n in range(len(paths)) if flagged[n] and labels[n]]
    leaked = {
        f"held back {hold}": _quartiles([max(0, at[n] - 1 - hold) for n in caught])
        for hold in (0, 8, 16, 32)
    }
    scores = np.array([path.max() for path in paths])
    return dict(
        threshold=threshold,
        max_fpr=MAX_FPR,
        recall=float(flagged[labels].mean()),
        false_positive_rate=float(flagged[~labels].mean()),
        f1=f1_at(threshold)(labels, scores),
        tokens_of_a_reply=_quartiles([len(path) for path in paths]),
        tokens_out_before_the_cut=leaked,
    )


def random_direction(test: ReplySet, probe: Probe) -> list[float]:
    """AUROC of random directions of the same scale by layer, the better sign."""
    draws = []
    for seed in range(5):
        noise = torch.randn(probe.weight.shape, generator=torch.Generator().manual_seed(seed))
        size = probe.weight.norm(dim=1, keepdim=True) / noise.norm(dim=1, keepdim=True)
        other = Probe("linear", probe.layers, noise * size, 0.0)
        tokens = token_scores(test.tokens, other, range(len(test.replies)))
        area = auroc(test.labels, np.array([own.mean() for own in tokens]))
        draws.append(max(area, 1 - area))
    return draws


def shuffled(test: ReplySet, probe: Probe) -> float:
    """AUROC where each score stands with another reply to some prompt: half, if nothing leaks."""
    tokens = token_scores(test.tokens, probe, range(len(test.replies)))
    scores = np.array([POOLS[SHIPPED](own) for own in tokens])
    draws = [auroc(test.labels, np.random.default_rng(s).permutation(scores)) for s in range(20)]
    return float(np.mean(draws))


# ---- figures


def figure(test: ReplySet, scores: Scores) -> dict[str, Any]:
    """AUROC with its interval over prompts; TPR at 1 and 5 % FPR; within prompts."""
    labels = test.labels
    value = auroc(labels, scores)
    weights = resample_weights(test.owners)
    wins = win_matrix(scores[labels], scores[~labels])
    draws = weighted_auroc(wins, weights[1:, labels], weights[1:, ~labels])
    low, high = np.nanpercentile(draws, [2.5, 97.5])
    tpr = {f"tpr_at_{rate:g}": tpr_at(rate)(labels, scores) for rate in (0.01, 0.05)}
    return dict(auroc=value, low=float(low), high=float(high), **tpr, **within(test, scores))


def within(test: ReplySet, scores: Scores) -> dict[str, float]:
    """AUROC among replies to the same prompt alone: what the prompt cannot tell."""
    by_prompt: dict[str, list[int]] = {}
    for row, owner in enumerate(test.owners):
        by_prompt.setdefault(owner, []).append(row)
    wins = []
    for rows in by_prompt.values():
        up = [scores[row] for row in rows if test.labels[row]]
        down = [scores[row] for row in rows if not test.labels[row]]
        if up and down:
            wins.append(float(win_matrix(up, down).mean()))
    return dict(within_prompts=float(np.mean(wins)), prompts_with_both=len(wins)) if wins else {}


def difference(test: ReplySet, one: Scores, other: Scores) -> dict[str, float]:
    """AUROC of one minus that of another, paired, with its interval over prompts."""
    labels = test.labels
    weights = resample_weights(test.owners)
    areas = [
        weighted_auroc(win_matrix(s[labels], s[~labels]), weights[:, labels], weights[:, ~labels])
        for s in (one, other)
    ]
    gap = areas[0] - areas[1]
    low, high = np.nanpercentile(gap[1:], [2.5, 97.5])
    return dict(value=float(gap[0]), low=float(low), high=float(high))


def _scored(probe: Probe, states: States) -> Scores:
    scores: Scores = probe(slots(states, Reading.of("pooled", 10).positions)).double().numpy()
    return scores


def _quartiles(values: Sequence[int]) -> dict[str, float]:
    if not values:
        return {}
    low, middle, high = np.quantile(values, [0.25, 0.5, 0.75])
    return dict(low=float(low), median=float(middle), high=float(high), n=len(values))


# ---- the command


def load_sets(model: ChatModel, options: argparse.Namespace) -> dict[str, ReplySet]:
    """Both sets, with what was captured of them."""
    sets = {}
    for name in SETS:
        replies = read_replies(options.data_dir, name, options.rows)
        replies = cut_replies(model, replies, options.tokens)
        folder = options.cache / name
        prompts = [reply.prompt for reply in replies]
        texts = [as_one_text(reply) for reply in replies]
        sets[name] = ReplySet(
            name,
            replies,
            token_states(model, replies, folder / "tokens"),
            _captured(model, prompts, folder / "prompts"),
            _captured(model, texts, folder / "one-text"),
        )
    return sets


def _captured(model: ChatModel, prompts: list[Prompt], folder: Path) -> States | None:
    """States if they were captured."""
    is_there = (folder / f"{(len(prompts) - 1) // 100 * 100:05}.safetensors").exists()
    return pooled_states(model, prompts, folder) if is_there else None


def load_training(pattern: str | None, layers: Sequence[int]) -> States | None:
    """States of the built-in training prompts, where ``pooled`` reads."""
    paths = sorted(glob.glob(pattern)) if pattern else []
    if not paths:
        return None
    return States.collect([States.load(path).select(layers) for path in paths])


def main() -> None:
    """Compare, print the means, write everything."""
    options = arguments()
    torch.set_num_threads(options.threads)
    model = ChatModel.load(options.model, dtype=options.dtype)
    layers = layers_of("linear", model.depth)
    sets = load_sets(model, options)
    training = load_training(options.training_states, layers)
    one, other = (sets[name] for name in SETS)
    directions = [compare(a, b, training, layers) for a, b in ((one, other), (other, one))]
    name = Path(model.source).name
    record = dict(
        model=name,
        dtype=model.fingerprint.dtype,
        layers=list(layers),
        tokens=options.tokens,
        max_rows=options.rows,
        training_prompts=len(training.prompts) if training else 0,
        fingerprint=asdict(model.fingerprint) | {"model": name},
        directions=directions,
    )
    if options.out:
        Path(options.out).write_text(json.dumps(record, indent=1, default=float) + "\n")
    show(directions)


def show(directions: Sequence[Mapping[str, Any]]) -> None:
    """Print AUROC by rule, both directions beside each other."""
    names = directions[0]["figures"]
    for name in names:
        cells = [one["figures"].get(name) for one in directions]
        row = "  ".join(
            f"{c['auroc']:.3f} [{c['low']:.3f}, {c['high']:.3f}] "
            f"within {c.get('within_prompts', np.nan):.3f} "
            f"tpr {c['tpr_at_0.01']:.2f} {c['tpr_at_0.05']:.2f}"
            for c in cells
            if c
        )
        print(f"{name:62} {row}")
    for one in directions:
        print({k: v for k, v in one.items() if k != "figures"})


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--cache", type=Path, required=True, help="folder of captured states")
    parser.add_argument("--training-states", help="files of states of the training prompts")
    parser.add_argument("--rows", type=int, default=1500, help="most replies of a set")
    parser.add_argument("--tokens", type=int, default=96, help="most tokens of a reply")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out")
    return parser.parse_args()


if __name__ == "__main__":
    main()
