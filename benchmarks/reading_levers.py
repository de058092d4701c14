"""Levers of reading that the default rule does not use, each against it on unseen data sets.

    python benchmarks/reading_levers.py --model M --data-dir DIR --cache DIR --out F.json

DIR holds the public sets below as .jsonl (id, text, label). States are captured once, in shards,
and each arm's scores are kept in the cache, so a killed run goes on. Every arm is fitted on
``load_training_rows()``; what it has to choose is chosen by cross-validation on these rows alone.

Arms: probes over the instruction's tokens (mean, attention, maximum), of low rank, with more weight
on hard rows, on prompts read in several surroundings, and on the scores of a teacher.
``--write-scores`` writes a teacher's file and does no more: JSON lines of ``id`` and ``score``, by
the default rule of that model, each score by a probe that did not see the row.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lever_arms import ARMS, DEFAULT, Arm, ReadRows, Training
from lever_probes import Array, TokenStates
from safetensors.torch import load_file, save_file
from torch import Tensor

from latentguard.data.builtin import load_contrast, load_guard_prompts, load_training_rows
from latentguard.data.prompt_files import read_prompts
from latentguard.files import atomic_path, write_atomic
from latentguard.models.chat_model import ChatModel
from latentguard.models.layout import CaptureRow, position_spans
from latentguard.probes.probe import layers_of
from latentguard.prompts import Message, Prompt
from latentguard.states import DEFAULT_READING, Reading, digest_prompts, seal
from latentguard.stats.detection import combine_areas, win_matrix

SEED, LONGEST, PER_CLASS, SHARD = 0, 1500, 250, 64
"""Of draws; characters of a text and rows of a class, at most; rows of a shard."""

MIXED = ("jbb", "xstest", "openai_moderation", "toxicchat_third")
HARMFUL_ALONE = ("sorry_bench", "catqa")
"""Public sets; those with harmful rows alone stand against Alpaca, each against rows of its own."""

SYSTEM = "You answer questions for visitors of a public library."
QUESTION = "Which language is this message written in?"


def with_system(prompt: Prompt, content: str) -> Prompt:
    """The prompt below another system message."""
    turns = tuple(turn for turn in prompt.history if turn.role != "system")
    return replace(prompt, history=(Message("system", content), *turns))


VARIANTS: dict[str, Callable[[Prompt], Prompt]] = {
    "other system prompt": partial(with_system, content=SYSTEM),
    "empty system prompt": partial(with_system, content=""),
    "question behind": lambda p: replace(p, text=f"{p.text}\n\n{QUESTION}"),
    "sealed ending": lambda p: replace(p, text=seal(p.text)),
}
"""Surroundings in which a prompt is read once more."""


# ---- rows and their states


def draw(prompts: Sequence[Prompt], count: int) -> list[Prompt]:
    """At most so many short rows of each class, always the same ones."""
    short = [p for p in prompts if len(p.text) <= LONGEST]
    order = np.random.default_rng(SEED).permutation(len(short))
    sides = [[i for i in order if short[i].harmful is side] for side in (True, False)]
    return [short[i] for i in sorted([*sides[0][:count], *sides[1][:count]])]


def read_sets(folder: Path) -> dict[str, list[Prompt]]:
    """The sets on which arms are compared; no row of the public ones is trained on."""

    def read(name: str) -> list[Prompt]:
        return read_prompts(folder / f"{name}.jsonl")

    sets = {name: draw(read(name), PER_CLASS) for name in MIXED}
    alpaca = draw(read("alpaca_harmless"), PER_CLASS * len(HARMFUL_ALONE))
    for number, name in enumerate(HARMFUL_ALONE):
        own = alpaca[number * PER_CLASS : (number + 1) * PER_CLASS]
        sets[f"{name} + alpaca"] = draw(read(name), PER_CLASS) + own
    sets["built-in pairs, test"] = load_contrast("test")
    return sets | {"built-in guard prompts, test": draw(load_guard_prompts("test"), PER_CLASS)}


@dataclass(frozen=True, eq=False)
class Reader:
    """Reads prompts with a model, from the cache where they are."""

    model: ChatModel
    """The model."""

    cache: Path
    """Folder of the shards."""

    @cached_property
    def layers(self) -> tuple[int, ...]:
        """Those of the default rule."""
        return layers_of("linear", self.model.depth)

    @cached_property
    def token_layers(self) -> tuple[int, int, int]:
        """The first, the middle and the last of them."""
        return self.layers[0], self.layers[len(self.layers) // 2], self.layers[-1]

    @cached_property
    def positions(self) -> tuple[str, ...]:
        """Those of the default rule."""
        return Reading.of(DEFAULT_READING, self.model.post).positions

    def read(self, prompts: Sequence[Prompt], *, has_tokens: bool = True) -> ReadRows:
        """The states of prompts."""
        shards = [prompts[at : at + SHARD] for at in range(0, len(prompts), SHARD)]
        parts = [self.read_shard(shard, has_tokens) for shard in shards]
        states = torch.cat([part["states"] for part in parts])
        if not has_tokens:
            return ReadRows(tuple(prompts), states)
        lengths = tuple(int(n) for part in parts for n in part["lengths"])
        tokens = TokenStates(torch.cat([part["tokens"] for part in parts]), lengths)
        return ReadRows(tuple(prompts), states, tokens)

    def read_shard(self, prompts: Sequence[Prompt], has_tokens: bool) -> dict[str, Tensor]:
        """The tensors of some prompts: states, and tokens with their lengths."""
        key = json.dumps([self.model.fingerprint.digest, digest_prompts(prompts), has_tokens])
        path = self.cache / f"{hashlib.sha256(key.encode()).hexdigest()[:24]}.safetensors"
        if not path.exists():
            self.cache.mkdir(parents=True, exist_ok=True)
            with atomic_path(path) as partial_path:
                save_file(self.capture_shard(prompts, has_tokens), partial_path)
        return load_file(path)

    def capture_shard(self, prompts: Sequence[Prompt], has_tokens: bool) -> dict[str, Tensor]:
        """As ``read_shard``, from one reading; the last span is repeated up to as many for all."""
        layouts = self.model.chat(prompts)
        tokens = [list(layout.instruction) if has_tokens else [] for layout in layouts]
        most = max(map(len, tokens))
        rows = []
        for layout, own in zip(layouts, tokens, strict=True):
            spans = position_spans(layout, self.positions) + [(at, at) for at in own]
            spans += spans[-1:] * (len(self.positions) + most - len(spans))
            rows.append(CaptureRow.of_spans(layout.ids, spans))
        values = self.model.capture_rows(rows, self.layers)
        states = values[:, : len(self.positions)].contiguous()
        if not has_tokens:
            return {"states": states}
        slots = [self.layers.index(layer) for layer in self.token_layers]
        chosen = values[:, len(self.positions) :, slots]
        pieces = [row[: len(own)] for row, own in zip(chosen, tokens, strict=True)]
        packed = torch.cat(pieces).half()
        if not torch.isfinite(packed).all():
            raise ValueError("A state does not fit float16; expected numbers up to 65,504.")
        return {"states": states, "tokens": packed, "lengths": torch.tensor([*map(len, tokens)])}


# ---- scores of arms


@dataclass(frozen=True)
class ArmScores:
    """What an arm scored."""

    name: str
    """Of the arm."""

    sets: Mapping[str, Sequence[float]]
    """Scores of each set."""

    spread: float | None
    """Standard deviation of its held-out scores on the training rows, if there are any."""

    choices: Mapping[str, Any]
    """What was chosen, and how many choices were tried."""

    reads: int
    """How often a prompt is read."""


def score_arms(
    training: Training, sets: Mapping[str, ReadRows], names: Sequence[str], folder: Path
) -> list[ArmScores]:
    """Scores of the named arms; those that are in the folder are not computed again."""
    scored = []
    for name in names:
        path = folder / f"{training.key_of(name)}.json"
        if not path.exists():
            start = time.process_time()
            arms = [score_sets(arm, sets) for arm in ARMS[name](training)]
            folder.mkdir(parents=True, exist_ok=True)
            write_atomic(path, json.dumps([asdict(arm) for arm in arms]))
            seconds = time.process_time() - start
            print(f"{name}: {seconds:.0f} s of processor time", flush=True)
        scored += [ArmScores(**record) for record in json.loads(path.read_text())]
    return scored


def score_sets(arm: Arm, sets: Mapping[str, ReadRows]) -> ArmScores:
    """The scores of an arm on each set."""
    spread = None if arm.held_out is None else float(np.std(arm.held_out))
    scores = {name: arm.score(rows).tolist() for name, rows in sets.items()}
    return ArmScores(arm.name, scores, spread, dict(arm.choices), arm.reads)


def add_to_default(default: ArmScores, other: ArmScores) -> ArmScores:
    """The mean of both scores, each in units of its own spread."""
    assert default.spread is not None
    assert other.spread is not None
    sets = {
        name: (np.array(scores) / default.spread + np.array(other.sets[name]) / other.spread) / 2
        for name, scores in default.sets.items()
    }
    plain = {name: scores.tolist() for name, scores in sets.items()}
    return ArmScores(f"default + {other.name}", plain, None, other.choices, other.reads)


# ---- comparison


def compare(arms: Sequence[ArmScores], labels: Mapping[str, Array]) -> dict[str, Any]:
    """AUROC of each arm by set and in the mean over public sets, and its gain over the default.

    Args:
        arms: Scores.
        labels: True for harmful, of each set.
    """
    public = [name for name in labels if not name.startswith("built-in")]
    default = next(wins_by_set(arm, labels) for arm in arms if arm.name == DEFAULT)
    figures = {}
    for arm in arms:
        wins = wins_by_set(arm, labels)
        record: dict[str, Any] = {"reads": arm.reads, "choices": dict(arm.choices)}
        for title, names in {**{name: [name] for name in labels}, "mean": public}.items():
            shares = [1 / len(names)] * len(names)
            area = combine_areas([wins[name] for name in names], shares)
            gaps = [wins[name] - default[name] for name in names]
            gain = combine_areas(gaps, shares, undecided=0.0)
            record[title] = {
                key: [round(value, 4) for value in (one.value, one.low, one.high)]
                for key, one in {"auroc": area, "gain": gain}.items()
            }
        figures[arm.name] = record
    return figures


def wins_by_set(arm: ArmScores, labels: Mapping[str, Array]) -> dict[str, Array]:
    """Which harmful rows an arm scores above which harmless ones, of each set."""
    scores = {name: np.array(arm.sets[name]) for name in labels}
    return {name: win_matrix(s[labels[name]], s[~labels[name]]) for name, s in scores.items()}


def measure(
    training: Training, sets: Mapping[str, ReadRows], names: Sequence[str], folder: Path
) -> dict[str, Any]:
    """The figures of the named arms and of the default rule with each probe over tokens added."""
    arms = score_arms(training, sets, ["default", *names], folder)
    added = [arm for arm in arms if arm.name in ("tokens: attention", "tokens: max", "low rank")]
    arms += [add_to_default(arms[0], arm) for arm in added]
    labels = {name: rows.labels.numpy() for name, rows in sets.items()}
    return {
        "training_rows": len(training.rows.prompts),
        "n": {name: [int(y.sum()), int((~y).sum())] for name, y in labels.items()},
        "arms": compare(arms, labels),
    }


# ---- command line


def read_teacher(path: Path | None) -> dict[str, float]:
    """A teacher's scores by id; none without a file."""
    if path is None:
        return {}
    rows = map(json.loads, path.read_text("utf-8").splitlines())
    return {row["id"]: float(row["score"]) for row in rows}


def read_everything(
    reader: Reader, options: argparse.Namespace
) -> tuple[ReadRows, dict[str, ReadRows]]:
    """The training rows and the sets, each also in the other surroundings."""
    training = load_training_rows(options.rows)
    few = load_training_rows(options.variant_rows)
    read = partial(reader.read, has_tokens=False)

    def with_variants(rows: ReadRows, prompts: Sequence[Prompt]) -> ReadRows:
        variants = {v: read([VARIANTS[v](p) for p in prompts]) for v in options.variants}
        return replace(rows, variants=variants)

    plain = reader.read(training)
    sets = {name: reader.read(rows) for name, rows in read_sets(options.data_dir).items()}
    print(f"Read {len(training)} training rows and {sum(len(s.prompts) for s in sets.values())}.")
    sets = {name: with_variants(rows, rows.prompts) for name, rows in sets.items()}
    return with_variants(plain, few), sets


def write_scores(path: Path, reader: Reader, count: int) -> None:
    """Held-out scores of training rows by the default rule, for a smaller model to learn."""
    training = Training(reader.read(load_training_rows(count)), reader.layers)
    rows = zip(training.rows.prompts, training.fit.held_out, strict=True)
    lines = [json.dumps({"id": p.id, "score": round(float(score), 5)}) for p, score in rows]
    write_atomic(path, "\n".join(lines) + "\n")


def main() -> None:
    """Read, fit, compare, and write the record."""
    options = arguments()
    torch.set_num_threads(options.threads)
    model = ChatModel.load(options.model, dtype=options.dtype, device="cpu")
    reader = Reader(model, options.cache / "states")
    if options.write_scores:
        write_scores(options.write_scores, reader, options.rows)
        return
    rows, sets = read_everything(reader, options)
    if options.capture_only:
        return
    training = Training(rows, reader.layers, read_teacher(options.teacher))
    tested = [model.fingerprint.digest, *(digest_prompts(one.prompts) for one in sets.values())]
    folder = options.cache / hashlib.sha256(json.dumps(tested).encode()).hexdigest()[:24]
    record = {
        "model": options.name or Path(options.model).name,
        "dtype": model.fingerprint.dtype,
        "layers": list(reader.layers),
        "token_layers": list(reader.token_layers),
        "variants": options.variants,
        **measure(training, sets, options.arms.split(","), folder),
    }
    if options.out:
        write_atomic(options.out, json.dumps(record, indent=1) + "\n")
    for name, figures in record["arms"].items():
        print(name, figures["mean"])


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--model", default="default")
    parser.add_argument("--name", help="of the model in the record")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--data-dir", type=Path, help="of the public sets")
    parser.add_argument("--cache", type=Path, required=True, help="folder for states and scores")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--rows", type=int, default=4000, help="training rows")
    parser.add_argument("--variants", nargs="*", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--variant-rows", type=int, default=4000, help="read in each variant")
    parser.add_argument("--arms", default=",".join(name for name in ARMS if name != "default"))
    parser.add_argument("--teacher", type=Path, help="JSON lines of id and score")
    parser.add_argument("--write-scores", type=Path, help="write a teacher's scores, no more")
    parser.add_argument("--capture-only", action="store_true")
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


if __name__ == "__main__":
    main()
