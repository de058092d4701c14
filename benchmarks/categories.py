"""Categories: how often the nearest one is the right one, and how well each is told from the rest.

    python benchmarks/categories.py --model M --data-dir DIR --states DIR [--guard G] [--out F.json]
        [--dtype D]

The guard is G, or as ``fit --all-rows`` makes it. Measured on the test split of the guard prompts,
and on two development sets from ``--data-dir``: catqa.jsonl (harmful questions, categories mapped
by ``CATQA``) and openai_moderation.jsonl (labelled texts, categories mapped by ``MODERATED``).
Baseline: TF-IDF n-grams and a logistic regression, fitted on the same rows. States are kept in
``--states``, so that a killed run goes on and ``packs.py`` need not capture them again.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from latentguard.data.builtin import load_guard_prompts
from latentguard.data.prompt_files import read_prompts
from latentguard.data.surface_audit import ngram_model
from latentguard.guard.latent_guard import LatentGuard
from latentguard.guard.loading import load_guard
from latentguard.models.chat_model import ChatModel
from latentguard.probes.probe import layers_of
from latentguard.prompts import Prompt
from latentguard.states import DEFAULT_READING, Reading, States, digest_prompts
from latentguard.stats.detection import auroc, estimate_metric
from latentguard.stats.estimate import Estimate
from latentguard.stats.rates import proportion

CATQA = {
    "Adult Content": "sexual_content",
    "Economic Harm": "non_violent_crimes",
    "Fraud": "fraud",
    "Hate": "hate",
    "Illegal Activity": "non_violent_crimes",
    "Malware Viruses": "cybercrime",
    "Physical Harm": "violent_crimes",
    "Political Campaigning": "elections",
    "Privacy Violation Activity": "privacy",
    "Tailored Financial Advice": "specialized_advice",
}
"""CatQA's names -> the built-in ones."""

MODERATED = {
    "S": "sexual_content",
    "H": "hate",
    "V": "violent_crimes",
    "HR": "harassment",
    "SH": "suicide_self_harm",
}
"""Names of the OpenAI moderation set -> the nearest built-in ones."""

CHUNK = 150


def main() -> None:
    """Run and print."""
    options = arguments()
    model = ChatModel.load(options.model, dtype=options.dtype)
    sets = prompt_sets(options.data_dir, options.harmless, options.longest)
    guard = opened(options, model, sets["train"])
    states = {
        name: kept(model, sets[name], options.states, guard)
        for name in ("test", "moderation", "catqa")
    }
    words = ngram_model()
    words.fit([p.text for p in sets["train"]], [of(p) for p in sets["train"]])
    record = dict(model=Path(options.model).name, dtype=options.dtype, fitted=guard.fitted)
    record["naming"] = {
        "test split": naming(guard, words, states["test"], {}),
        "CatQA": naming(guard, words, states["catqa"], CATQA),
    }
    record["one against the rest"] = {
        "test split": apart(guard, words, states["test"]),
        "OpenAI moderation set": apart(guard, words, states["moderation"], MODERATED),
    }
    record["cost"] = cost(guard, model, sets["test"][:16])
    print(text := json.dumps(record, indent=1))
    if options.out:
        options.out.write_text(text)


def prompt_sets(folder: Path, harmless: int, longest: int) -> dict[str, list[Prompt]]:
    """Every set; of the moderation set, short texts and a fixed sample of the harmless ones."""
    texts = [p for p in read_prompts(folder / "openai_moderation.jsonl") if len(p.text) <= longest]
    calm = random.Random(0).sample([p for p in texts if not p.harmful], harmless)
    return {
        "train": load_guard_prompts("train"),
        "validation": [p for p in load_guard_prompts("validation") if not p.harmful],
        "test": load_guard_prompts("test"),
        "moderation": [p for p in texts if p.harmful] + calm,
        "catqa": [p for p in read_prompts(folder / "catqa.jsonl") if p.category in CATQA],
    }


def kept(
    model: ChatModel, prompts: Sequence[Prompt], folder: Path, guard: LatentGuard | None = None
) -> States:
    """What the guard reads, or is fitted on, captured once."""
    reading = guard.reading if guard else Reading.of(DEFAULT_READING, model.post)
    parts = []
    positions = tuple(dict.fromkeys([*reading.positions, "t_inst", "t_post"]))
    layers = layers_of("linear", model.depth)
    how = dict(positions=positions, layers=layers, queries=reading.queries)
    key = model.fingerprint.weights[:8] + (
        f"-{guard.digest[:8]}" if guard and reading.queries else ""
    )
    for start in range(0, len(prompts), CHUNK):
        rows = prompts[start : start + CHUNK]
        name = f"{key}-{digest_prompts(rows)[:16]}.safetensors"
        if not (folder / name).exists():
            States.collect(model.capture(rows, **how)).save(folder / name)
        parts.append(replace(States.load(folder / name), prompts=tuple(rows)))
    return States.collect(parts)


def opened(
    options: argparse.Namespace, model: ChatModel, training_rows: Sequence[Prompt]
) -> LatentGuard:
    """The guard that was asked for, or one that is fitted once."""
    if options.guard:
        return load_guard(options.guard, model)
    made = options.states / f"{model.fingerprint.weights[:8]}-{digest_prompts(training_rows)[:16]}"
    if not made.exists():
        reading = Reading.of(DEFAULT_READING, model.post)
        LatentGuard.from_states(model, kept(model, training_rows, options.states), reading).save(
            made
        )
    return LatentGuard.load(made)


def of(prompt: Prompt) -> str:
    """The category of a harmful prompt, else ``none``."""
    return prompt.category or "none" if prompt.harmful else "none"


def naming(
    guard: LatentGuard, words: object, states: States, names: Mapping[str, str]
) -> dict[str, str]:
    """Share of harmful prompts whose nearest category is theirs."""
    states = states.where(lambda p: bool(p.harmful))
    wanted = [names.get(of(p), of(p)) for p in states.prompts]
    verdicts = list(guard.judge(states))
    columns = [n for n in words.classes_ if n != "none"]
    chances = word_scores(words, states.prompts)
    guessed = max(
        (np.mean([w == one for w in wanted]), one) for one in set(wanted)
    )  # what always naming the most frequent category would give
    baseline = [max(columns, key=lambda n: chances[n][i]) for i in range(len(wanted))]
    flagged = [v.category == w for v, w in zip(verdicts, wanted, strict=True)]
    return {
        "guard": told(proportion(flagged)),
        "n-grams": told(proportion([b == w for b, w in zip(baseline, wanted, strict=True)])),
        "always the most frequent": f"{guessed[0]:.3f} ({guessed[1]})",
        "chance among all": f"{1 / len(columns):.3f}",
    }


def apart(
    guard: LatentGuard, words: object, states: States, names: Mapping[str, str] | None = None
) -> dict[str, dict[str, str]]:
    """AUROC of each category's score against all other rows, harmless ones included."""
    verdicts = list(guard.judge(states))
    known = guard.categories.directions.names
    pairs = names or {name: name for name in known}
    chances, found, means = word_scores(words, states.prompts), {}, []
    for code, name in pairs.items():
        rows = np.array([code in of(p).split(",") for p in states.prompts])
        scores = np.array([v.category_scores[name] for v in verdicts])
        means.append((auroc(rows, scores), auroc(rows, chances[name])))
        found[f"{code} -> {name}" if names else name] = {
            "guard": told(estimate_metric(auroc, rows, scores)),
            "n-grams": told(estimate_metric(auroc, rows, chances[name])),
        }
    own, other = np.mean(means, axis=0)
    return found | {"mean": {"guard": f"{own:.3f}", "n-grams": f"{other:.3f}"}}


def word_scores(words: object, prompts: Iterable[Prompt]) -> dict[str, NDArray[np.float64]]:
    """The baseline's score of each category."""
    table = words.predict_proba([p.text for p in prompts])
    return dict(zip(words.classes_, table.T, strict=True))


def cost(guard: LatentGuard, model: ChatModel, prompts: Sequence[Prompt]) -> dict[str, object]:
    """Processor time of ``scan`` with and without categories: five paired rounds."""
    torch.set_num_threads(1)
    bare = replace(guard, deobfuscate=False, quadrants=None, thresholds=None, categories=None)
    ratios = []
    for _ in range(5):
        spent = []
        for one in (guard, bare):
            start = time.process_time()
            list(one.scan(model, prompts))
            spent.append(time.process_time() - start)
        ratios.append(spent[0] / spent[1])
    return {"with / without": sorted(round(r, 3) for r in ratios), "prompts": len(prompts)}


def told(found: Estimate) -> str:
    """A figure with its interval and n."""
    return f"{found} n = {found.n[0]} + {found.n[1]}"


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--states", type=Path, required=True)
    parser.add_argument("--guard", help="of the model: folder, Hub id or 'default'")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--harmless", type=int, default=300, help="texts of the moderation set")
    parser.add_argument("--longest", type=int, default=500, help="characters of such a text")
    parser.add_argument("--out", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    main()
