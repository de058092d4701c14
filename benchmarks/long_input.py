"""Long input: a harmful or a harmless request somewhere in a long text, or in a chat.

    python benchmarks/long_input.py --model M --data-dir DIR --work W [--out F.json] [--dtype D]
        [--needles 256=60 --needles 1024=30 ...] [--only fit|cost|documents|chats]

DIR holds jbb.jsonl, xstest.jsonl, alpaca_harmless.jsonl and openai_moderation.jsonl. The default
guard is fitted on the built-in set with its windows; nothing of DIR is seen before it is scored.
Scores go to W/scores-*.jsonl as they come: a killed run goes on where it stopped.

The texts around the requests are not those of training: Python's own language reference, and the
harmless posts of the OpenAI moderation set. Both members of a pair stand at the same place of the
same text.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from pydoc_data import topics
from typing import Any

import numpy as np
from default_guard import default_guard

from latentguard.data.builtin import load_contrast, load_guard_prompts
from latentguard.data.prompt_files import read_prompts
from latentguard.data.surface_audit import ngram_model
from latentguard.files import append_line, read_whole_lines
from latentguard.guard.chunk_calibration import fit_chunking, require_chunking
from latentguard.guard.latent_guard import LatentGuard
from latentguard.models.chat_model import ChatModel
from latentguard.prompts import Message, Prompt
from latentguard.stats.detection import auroc, estimate_metric, tpr_at
from latentguard.stats.rates import proportion

FIGURES = {"AUROC": auroc, "TPR at 5% FPR": tpr_at(0.05), "TPR at 1% FPR": tpr_at(0.01)}
RULES = {
    "length": "length",
    "n-grams": "ngrams",
    "n-grams, worst line": "ngrams_line",
    "last token (default guard)": "last",
    "pieces": "piece",
    "windows (both readings)": "score",
}

FILLERS, KINDS = 4, ("forum posts", "language reference")
"""Texts around the requests, of either kind in turn."""

TURNS = 5
"""Of the user in a chat."""

CHARACTERS = 4.0
"""A token's, about."""

PLACES = {
    "start": (0.0, "\n\n"),
    "middle": (0.5, "\n\n"),
    "end": (1.0, "\n\n"),
    "middle, between two words": (0.5, " "),
}
"""Where a request stands, as a share of the text, and what parts it from the rest."""


def main() -> None:
    """Fit, score, tell."""
    options = arguments()
    options.work.mkdir(parents=True, exist_ok=True)
    model = ChatModel.load(options.model, dtype=options.dtype)
    guard = fitted(model, options.work)
    if options.only in (None, "cost"):
        save(options.work / "cost.json", cost(model, guard))
    needles = requests(options.data_dir)
    counts = {int(k): int(n) for k, n in (pair.split("=") for pair in options.needles)}
    texts = fillers(options.data_dir, max(counts, default=256))
    if options.only in (None, "documents"):
        for text_id, text in enumerate(texts):
            if options.text in (None, text_id):
                asked = documents(text_id, text, needles, counts)
                score(model, guard, asked, options, f"scores-{text_id}.jsonl")
    if options.only in (None, "chats"):
        asked = chats(needles[: options.chats], options.data_dir)
        score(model, guard, asked, options, "scores-chats.jsonl")
    if options.out:
        save(Path(options.out), report(options))


def fitted(model: ChatModel, work: Path) -> LatentGuard:
    """A guard as ``fit`` makes it, with windows, kept in the work folder."""
    if (work / "guard" / "guard.json").exists():
        return LatentGuard.load(work / "guard")
    began = time.process_time()
    guard = default_guard(model, work / "plain")
    middle = time.process_time()
    guard = fit_chunking(model, guard)
    times = dict(fit=middle - began, windows=time.process_time() - middle)
    save(work / "fit.json", times)
    guard.save(work / "guard")
    return guard


def score(
    model: ChatModel,
    guard: LatentGuard,
    asked: Iterator[Asked],
    options: argparse.Namespace,
    name: str,
) -> None:
    """Append what is not there yet."""
    path = options.work / name
    done = {row["key"] for row in rows_of(path)}
    chunking, words = require_chunking(guard), n_grams()
    plain = replace(guard, deobfuscate=False, chunking=replace(chunking, longer_than=0))
    with path.open("a", encoding="utf-8") as file:
        for one in asked:
            if one.key in done:
                continue
            if time.process_time() > options.seconds:
                raise SystemExit(f"{options.seconds} s of processor time are over; run it again.")
            pieces = chunking.chunks(one.prompt)
            texts = (variant.prompt for variant in plain.plan(one.prompt))
            own, *each = (found.score for found in plain.score(model, texts))
            told = max(e.score for e in chunking.find_evidence(pieces, own, each))
            best = pieces[int(np.argmax(each))]
            hit = best.message == one.message and best.start < one.stop and best.end > one.start
            row = dict(key=one.key, cell=one.cell, harmful=one.prompt.harmful, pieces=len(pieces))
            row |= dict(tokens=tokens(model, one.prompt), last=own, piece=max(each), score=told)
            row |= dict(last_flagged=own > guard.threshold, flagged=told > chunking.threshold)
            row |= dict(hit=hit, around=one.around)
            row |= baselines(words, one.prompt)
            append_line(file, json.dumps(row))


def tokens(model: ChatModel, prompt: Prompt) -> int:
    """Of all that the user says."""
    said = [*(m.content for m in prompt.history if m.role == "user"), prompt.text]
    return sum(len(model.tokenizer(text)["input_ids"]) for text in said)


def n_grams() -> Any:
    """The n-gram baseline, fitted on what the guard is fitted on."""
    train = load_guard_prompts("train")
    return ngram_model().fit([p.text for p in train], [bool(p.harmful) for p in train])


def baselines(words: Any, prompt: Prompt) -> dict[str, float]:
    """What no model is needed for: of the whole, and of its worst line."""
    said = [*(m.content for m in prompt.history if m.role == "user"), prompt.text]
    lines = [line for text in said for line in text.splitlines() if line.strip()]
    whole, *each = words.decision_function(["\n".join(said), *lines])
    return dict(length=sum(map(len, said)), ngrams=float(whole), ngrams_line=float(max(each)))


def cost(model: ChatModel, guard: LatentGuard) -> dict[str, Any]:
    """Processor seconds and memory by length; what short prompts cost with and without windows."""
    text, found = "\n\n".join(sorted(topics.topics.values())), list[dict[str, float]]()
    bare = replace(guard, deobfuscate=False, chunking=None, quadrants=None, categories=None)
    for length in (256, 1024, 2048, 4096, 7600):
        prompt = Prompt(_tokens(model, text, length))
        row: dict[str, float] = dict(tokens=tokens(model, prompt))
        for name, one in {"windows": guard, "last": bare}.items():
            began = time.process_time()
            list(one.scan(model, [prompt]))
            row[name] = time.process_time() - began
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
            row[f"{name}, peak MiB so far"] = peak
        found.append(row)
    short, ratios = load_contrast("test")[:96], list[float]()
    for _ in range(5):
        times = []
        for one in (bare, guard):
            began = time.process_time()
            scores = [v.score for v in one.scan(model, short)]
            times.append((time.process_time() - began, scores))
        ratios.append(times[1][0] / times[0][0])
        assert times[0][1] == times[1][1]  # short prompts score the same
    return dict(by_length=found, short=dict(n=len(short), ratios=sorted(ratios)))


def _tokens(model: ChatModel, text: str, length: int) -> str:
    """The first so many tokens of a text."""
    offsets = model.tokenizer(text[: 8 * length], return_offsets_mapping=True)["offset_mapping"]
    return text[: offsets[length][0]]


def report(options: argparse.Namespace) -> dict[str, Any]:
    """Each cell's figures by rule, each with interval and n."""
    rows = [row for path in sorted(options.work.glob("scores-*.jsonl")) for row in rows_of(path)]
    cells = {}
    for cell, mine in cells_of(rows).items():
        labels = [row["harmful"] for row in mine]
        figures = {
            rule: {
                name: asdict(estimate_metric(metric, labels, [row[key] for row in mine]))
                for name, metric in FIGURES.items()
            }
            for rule, key in RULES.items()
        }
        sides = {
            f"{rule}, {'true' if side else 'false'} positives": asdict(
                proportion([row[key] for row in mine if row["harmful"] is side])
            )
            for rule, key in {"windows": "flagged", "last token": "last_flagged"}.items()
            for side in (True, False)
        }
        hits = asdict(proportion([row["hit"] for row in mine if row["harmful"]]))
        tokens = float(np.mean([row["tokens"] for row in mine]))
        cells[cell] = dict(
            tokens=tokens, figures=figures, at_threshold=sides, best_piece_is_in_request=hits
        )
    files = {name: options.work / f"{name}.json" for name in ("fit", "cost")}
    kept = {name: json.loads(path.read_text()) for name, path in files.items() if path.exists()}
    guard = LatentGuard.load(options.work / "guard")
    chunking = require_chunking(guard)
    return dict(
        model=Path(options.model).name,
        dtype=guard.fingerprint.dtype,
        guard=guard.fitted,
        windows=chunking.to_dict(),
        cells=cells,
        **kept,
    )


def cells_of(rows: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """The rows of each place and length, in all texts and in either kind."""
    found: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        for around in dict.fromkeys(("", row["around"])):
            found.setdefault(", ".join(filter(None, (row["cell"], around))), []).append(row)
    return found


def rows_of(path: Path) -> list[dict[str, Any]]:
    """What was scored so far; a torn last line is scored again."""
    return [json.loads(line) for line in read_whole_lines(path)]


def save(path: Path, record: dict[str, Any]) -> None:
    """Write JSON."""
    path.write_text(json.dumps(record, indent=1))


@dataclass(frozen=True)
class Asked:
    """One request in one text."""

    cell: str
    key: str
    prompt: Prompt
    message: int
    start: int
    stop: int
    around: str = ""


def requests(folder: Path) -> list[tuple[Prompt, Prompt]]:
    """A harmful and a harmless request of the same set: JBB's pairs, XSTest's by kind."""
    draw = random.Random(0)
    pairs = []
    jbb = read_prompts(folder / "jbb.jsonl")
    sides = [[p for p in jbb if p.harmful is side] for side in (True, False)]
    pairs += list(zip(*sides, strict=True))
    xstest = read_prompts(folder / "xstest.jsonl")
    harmful = draw.sample([p for p in xstest if p.harmful], 100)
    harmless = draw.sample([p for p in xstest if not p.harmful], 100)
    pairs += list(zip(harmful, harmless, strict=True))
    draw.shuffle(pairs)
    return pairs


def fillers(folder: Path, most: int) -> list[str]:
    """Texts of at least ``most`` tokens."""
    manual = [text.strip() for text in topics.topics.values()]
    posts = [p.text for p in read_prompts(folder / "openai_moderation.jsonl") if not p.harmful]
    texts = []
    for number in range(FILLERS):
        draw = random.Random(number)
        parts = draw.sample(*((manual, len(manual)) if number % 2 else (posts, len(posts))))
        text = "\n\n".join(parts)[: 8 * most]
        texts.append(text)
    return texts


def documents(
    text_id: int, text: str, needles: list[tuple[Prompt, Prompt]], counts: dict[int, int]
) -> Iterator[Asked]:
    """Requests at each place of this text."""
    ends = cuts(text)
    own = needles[text_id::FILLERS]
    for length, count in counts.items():
        for pair in own[: -(-count // FILLERS)]:
            for place in PLACES:
                for request in pair:
                    yield document(text, ends, request, length, place, text_id)


def cuts(text: str) -> list[int]:
    """Where a text may be cut: after each blank."""
    return [n + 1 for n, letter in enumerate(text) if letter.isspace()]


def document(
    text: str, ends: list[int], request: Prompt, length: int, place: str, text_id: int
) -> Asked:
    """A text of about so many tokens with a request at a place, mostly as its own paragraph."""
    size = round(length * CHARACTERS)
    at, gap = PLACES[place]
    at = round(at * size)
    cut, stop = (ends[int(np.searchsorted(ends, n))] if n else 0 for n in (at, size))
    head = f"{text[:cut].rstrip()}{gap}" if cut else ""
    whole = f"{head}{request.text}{gap}{text[cut:stop]}".strip()
    prompt = replace(request, text=whole)
    key = f"{place} {length} {request.id} {text_id}"
    stop = len(head) + len(request.text)
    around = KINDS[text_id % len(KINDS)]
    return Asked(f"{place} {length}", key, prompt, 0, len(head), stop, around)


def chats(needles: list[tuple[Prompt, Prompt]], folder: Path) -> Iterator[Asked]:
    """Chats of several turns in which one is the request."""
    ordinary = [p.text for p in read_prompts(folder / "alpaca_harmless.jsonl")]
    for number, pair in enumerate(needles):
        draw = random.Random(number)
        others, replies = draw.sample(ordinary, TURNS - 1), draw.sample(ordinary, TURNS)
        for place in (0, TURNS // 2, TURNS - 1):
            for request in pair:
                said = [*others[:place], request.text, *others[place:]]
                history = [
                    m
                    for text, reply in zip(said[:-1], replies, strict=False)
                    for m in (Message("user", text), Message("assistant", f"Sure. {reply}"))
                ]
                prompt = replace(request, text=said[-1], history=tuple(history))
                cell = f"turn {place + 1} of {TURNS}"
                yield Asked(cell, f"{cell} {request.id}", prompt, 2 * place, 0, len(request.text))


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--out")
    parser.add_argument("--needles", nargs="*", default=["256=60", "1024=24", "4096=4"])
    parser.add_argument("--chats", type=int, default=40)
    parser.add_argument("--only", choices=["fit", "cost", "documents", "chats", "report"])
    parser.add_argument("--text", type=int, help="only this one of the texts around the requests")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop after so many")
    return parser.parse_args()


if __name__ == "__main__":
    main()
