"""Golden records: what guards and steering give, to compare a later version with.

    python benchmarks/golden.py record MODEL [--quick] [--out FILE]
    python benchmarks/golden.py compare MODEL [--out FILE] [--tolerance 1e-5]

MODEL is smollm2-135m or one of the tiny random models: tiny-llama, tiny-gemma3, tiny-qwen3. FILE is
benchmarks/results/golden-MODEL.json unless it is named. ``--quick`` asks every fourth prompt and
does not steer; ``compare`` asks what was recorded. It prints the greatest difference of each
quantity and how many discrete values differ, and exits with 1 if a number moved by more than the
tolerance (scores in units of the guard's spread, other numbers in units of the greater of 1 and
their size) or a discrete value differs.

Numbers come out bit for bit the same on one machine; another processor adds up in another order, so
make the record anew there (from the older version) or allow a tolerance of 1e-4.

All that touches the package's interface stands between the lines "the package's interface" and
"recording"; a change of names is made there and nowhere else.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch
from zlib import crc32

import torch

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PROMPTS = RESULTS / "golden-prompts.json"
TINY = {
    "tiny-llama": ("llama", "qwen2.5"),
    "tiny-gemma3": ("gemma3", "gemma-3"),
    "tiny-qwen3": ("qwen3", "qwen3"),
}
"""Architecture and template of each tiny model of the tests."""

MODELS = ("smollm2-135m", *TINY)
PACK = "fraud"
RATES = dict(max_fpr=0.05, review_fpr=0.15)
QUESTION = " Is this request harmful?"
WATCHED = ("Certainly", "No")
STEERED, NEW_TOKENS, QUICK = 4, 16, 4
"""Harmless prompts to steer, and half as many harmful ones; tokens of a reply; every nth prompt."""

TOLERANCE = 1e-5
"""Rounding of float32 depends on the batch, and chunks lie in other batches than they did."""

TIE = 1e-4
"""Scores of two versions of a prompt that differ by less, in the guard's spread, are alike."""

FIELDS = (
    "id",
    "score",
    "probability",
    "flagged",
    "decision",
    "beliefs",
    "category",
    "top_category",
    "top_category_score",
    "mean_category_score",
    "quadrant",
    "evidence",
    "obfuscations",
)
"""Of a verdict, in the order in which a record keeps them."""

Record = dict[str, Any]

if str(ROOT / "tests") not in sys.path:
    sys.path.append(str(ROOT / "tests"))

# ---- the package's interface ---------------------------------------------------------------------

from latentguard.data.builtin import load_contrast, load_guard_prompts  # noqa: E402
from latentguard.guard import chunk_calibration, chunk_texts, packs  # noqa: E402
from latentguard.guard.latent_guard import LatentGuard  # noqa: E402
from latentguard.guard.verdict import Verdict  # noqa: E402
from latentguard.interventions import Intervention  # noqa: E402
from latentguard.models.chat_model import ChatModel  # noqa: E402
from latentguard.prompts import Message, Prompt, Reply  # noqa: E402
from models.architectures import chat_model  # noqa: E402
from models.families import FAMILIES  # noqa: E402


def load_model(name: str) -> ChatModel:
    """SmolLM2, or a tiny random model that reads long prompts."""
    if name not in TINY:
        return ChatModel.load("default", dtype="float32", device="cpu")
    architecture, family = TINY[name]
    return chat_model(architecture, FAMILIES[family].tokenizer, max_position_embeddings=16384)


def built_in_rows() -> dict[str, Prompt]:
    """Every built-in row by its id."""
    return {p.id: p for p in [*load_contrast(), *load_guard_prompts()]}


def make_prompt(row: Mapping[str, Any]) -> Prompt:
    """A prompt of the file."""
    history = tuple(Message(turn["role"], turn["content"]) for turn in row["history"])
    return Prompt(row["text"], id=row["id"], segment=row["slice"], history=history)


def fit_paper(model: ChatModel, train: Sequence[Prompt]) -> LatentGuard:
    """The paper's rule, fitted on rows of our own."""
    return LatentGuard.fit(model, train, reading="t_inst", probe="centroid")


def fit_default(model: ChatModel, train: Sequence[Prompt]) -> LatentGuard:
    """A guard as ``fit`` makes it; half of the rows count as refused, for a refusal axis."""
    asked = [replace(p, refused=crc32(p.text.encode()) % 2 == 1) for p in train]
    return LatentGuard.fit(model, asked, reading="pooled", probe="linear")


def calibrate(guard: LatentGuard, model: ChatModel, calm: Sequence[Prompt]) -> LatentGuard:
    """The guard with its thresholds."""
    return guard.calibrate(model, calm, **RATES)


def add_chunking(guard: LatentGuard, model: ChatModel) -> LatentGuard:
    """The guard that also reads long prompts and chats."""
    return chunk_calibration.fit_chunking(model, guard)


def add_pack(
    guard: LatentGuard, model: ChatModel, examples: Sequence[Prompt], calm: Sequence[Prompt]
) -> LatentGuard:
    """The guard with one more category."""
    return packs.add(guard, model, PACK, examples, calm)


@contextmanager
def few_texts() -> Iterator[None]:
    """Chunking is fitted on fewer and shorter texts than usual, to save time."""
    fewer = patch.multiple(chunk_calibration, NORM_TEXTS=8, CALIBRATION_TEXTS=30)
    shorter = patch.object(chunk_texts, "LONGEST", 1200)
    with fewer, shorter, patch.object(packs, "CALIBRATION_TEXTS", 30):
        yield


def scan(guard: LatentGuard, model: ChatModel, prompts: Sequence[Prompt]) -> list[Record]:
    """The verdict on each prompt as a plain dictionary."""
    return [plain(verdict) for verdict in guard.scan(model, prompts)]


def plain(verdict: Verdict) -> Record:
    """All that a verdict says."""
    return {
        "id": verdict.id,
        "score": verdict.score,
        "probability": verdict.probability,
        "flagged": verdict.flagged,
        "decision": verdict.decision,
        "beliefs": dict(verdict.beliefs),
        "category": verdict.category,
        "category_scores": dict(verdict.category_scores),
        "quadrant": verdict.quadrant,
        "evidence": [[e.message, e.start, e.end, e.score] for e in verdict.evidence],
        "obfuscations": list(verdict.obfuscations),
    }


def facts(guard: LatentGuard) -> Record:
    """What a guard holds beside its tensors; scores are those of its canaries."""
    found: Record = {
        "layers": list(guard.probe.layers),
        "spread": guard.spread,
        "threshold": guard.threshold,
        "platt": list(guard.platt),
        "canary_scores": [canary.score for canary in guard.canaries],
    }
    if chunking := guard.chunking:
        norms = (chunking.chunk_norm, chunking.whole_norm)
        found["chunking_threshold"] = chunking.threshold
        found["chunking_norms"] = [[n.mean, n.slope, n.spread] for n in norms]
    return found


def steer(model: ChatModel, guard: LatentGuard, prompts: Sequence[Prompt]) -> list[list[Reply]]:
    """Greedy replies along the guard's axis of harmfulness, one list for each of ``settings``."""
    asked = [replace(p, text=p.text + QUESTION, question_at=len(p.text)) for p in prompts]
    settings = [None, *(_push(guard, *how) for how in _pushes(model.depth))]
    how = dict(max_new_tokens=NEW_TOKENS, watch=WATCHED)
    bare = model.sweep(asked, settings[:2], max_new_tokens=NEW_TOKENS, post=False)
    return [*model.sweep(asked, settings, **how), *bare]


def _pushes(depth: int) -> Iterator[tuple[int, float, str]]:
    """Layer, coefficient and tokens of each setting."""
    for layer in (depth // 2, depth - 1):
        for coefficient in (1.5, -1.5):
            yield layer, coefficient, "instruction"
    for tokens in ("before", "all", "t_inst"):
        yield depth // 2, 2.0, tokens


def _push(guard: LatentGuard, layer: int, coefficient: float, tokens: str) -> Intervention:
    axis = guard.axes[0]
    vector = axis.direction[axis.layers.index(layer)]
    label = f"layer {layer}, {coefficient:g}, {tokens}"
    return Intervention(layer, vector, coefficient, tokens, label)  # type: ignore[arg-type]


def said(reply: Reply) -> Record:
    """A reply; of what is said to a harmful prompt only a digest."""
    found: Record = {"prompt": reply.prompt.id, "label": reply.label, "finished": reply.finished}
    found["watched"] = [chance for _, chance in reply.watched]
    if reply.prompt.harmful:
        told = json.dumps([list(reply.ids), reply.text])
        return found | {"sha256": hashlib.sha256(told.encode()).hexdigest()}
    return found | {"ids": list(reply.ids), "text": reply.text}


# ---- recording -----------------------------------------------------------------------------------


def collect(name: str, *, quick: bool = False) -> Record:
    """Everything about one model, as JSON keeps it."""
    asked = json.loads(PROMPTS.read_text(encoding="utf-8"))
    prompts = [make_prompt(row) for row in asked["prompts"]][:: QUICK if quick else 1]
    known = built_in_rows()
    rows = {use: [known[i] for i in ids] for use, ids in asked["rows"].items()}
    model = load_model(name)
    record: Record = {"model": name, "quick": quick, "guards": {}}
    for kind, guard in fitted(model, rows):
        print(f"{name}: the {kind} guard is fitted", file=sys.stderr)
        verdicts = [compact(row) for row in scan(guard, model, prompts)]
        record["guards"][kind] = {"facts": facts(guard), "verdicts": verdicts}
        if kind == "paper" and not quick:
            chosen = [*rows["pack_harmless"][:STEERED], *rows["pack_examples"][: STEERED // 2]]
            replies = steer(model, guard, chosen)
            record["steering"] = [said(reply) for setting in replies for reply in setting]
    rounded: Record = json.loads(json.dumps(shortened(record)))
    return rounded


def fitted(
    model: ChatModel, rows: Mapping[str, Sequence[Prompt]]
) -> Iterator[tuple[str, LatentGuard]]:
    """The paper's rule, the guard of ``fit``, and that with a pack, as each is wanted."""
    yield "paper", fit_paper(model, rows["train"])
    guard = calibrate(fit_default(model, rows["train"]), model, rows["calibration"])
    with few_texts():
        guard = add_chunking(guard, model)
        yield "default", guard
        yield "pack", add_pack(guard, model, rows["pack_examples"], rows["pack_harmless"])


def compact(row: Record) -> list[Any]:
    """The ``FIELDS`` of a verdict, with two numbers instead of one for each category.

    The top category is left out where it is the category, and so is what is empty.
    """
    if scores := row["category_scores"]:
        top = max(scores, key=lambda name: scores[name])
        row["top_category"] = None if top == row["category"] else top
        row["top_category_score"] = scores[top]
        row["mean_category_score"] = sum(scores.values()) / len(scores)
    return [None if row.get(name) in ([], {}) else row.get(name) for name in FIELDS]


def shortened(value: Any) -> Any:
    """The same with nine significant digits of each number."""
    if isinstance(value, dict):
        return {name: shortened(one) for name, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [shortened(one) for one in value]
    return float(f"{value:.9g}") if isinstance(value, float) else value


def write(record: Record, path: Path) -> None:
    """One line for each verdict, reply and table, so that differences can be read."""
    parts = [f'"model": {json.dumps(record["model"])}', f'"quick": {json.dumps(record["quick"])}']
    guards = [
        f'{json.dumps(kind)}: {{"facts": {dense(held["facts"])},\n"verdicts": '
        f"{lines(held['verdicts'])}}}"
        for kind, held in record["guards"].items()
    ]
    parts.append('"guards": {\n' + ",\n".join(guards) + "}")
    if "steering" in record:
        parts.append(f'"steering": {lines(record["steering"])}')
    path.write_text("{" + ",\n".join(parts) + "}\n", encoding="utf-8")
    print(f"{path}: {path.stat().st_size / 1000:.0f} kB")


def lines(rows: Sequence[Any]) -> str:
    """A JSON list with a line for each row."""
    return "[\n" + ",\n".join(map(dense, rows)) + "]"


def dense(value: Any) -> str:
    """JSON without blanks."""
    return json.dumps(value, separators=(",", ":"))


# ---- comparing -----------------------------------------------------------------------------------


@dataclass
class Tally:
    """How one quantity differs."""

    numbers: int = 0
    """How many numbers were compared."""

    greatest: float = 0.0
    """The greatest difference of two numbers, in the quantity's unit."""

    values: int = 0
    """How many discrete values were compared."""

    mismatches: list[str] = field(default_factory=list)
    """Where discrete values differ."""


def compare(old: Record, new: Record) -> dict[str, Tally]:
    """Each quantity of two records of one model, and how it differs."""
    tallies: dict[str, Tally] = {}
    _walk(tallies, "model", [old["model"], old["quick"]], [new["model"], new["quick"]])
    _walk(tallies, "guards", list(old["guards"]), list(new["guards"]))
    for kind, held in old["guards"].items():
        _compare_guard(tallies, kind, held, new["guards"].get(kind, {"facts": {}, "verdicts": []}))
    _walk(tallies, "steering", old.get("steering"), new.get("steering"))
    return tallies


def _compare_guard(tallies: dict[str, Tally], kind: str, old: Record, new: Record) -> None:
    spread = old["facts"]["spread"]
    for name, before in old["facts"].items():
        unit = spread if name in ("threshold", "canary_scores") else None
        _walk(tallies, f"{kind} {name}", before, new["facts"].get(name), unit)
    both = list(zip(old["verdicts"], new["verdicts"], strict=False))
    _walk(tallies, f"{kind} verdicts", len(old["verdicts"]), len(new["verdicts"]))
    for one, other in both:
        if _is_tie(one, other, spread):
            tallies.setdefault(f"{kind} tied versions", Tally()).values += 1
            continue
        for name, before, after in zip(FIELDS, one, other, strict=True):
            unit = spread if name in ("score", "evidence") else None
            _walk(tallies, f"{kind} {name}", before, after, unit, f"prompt {one[0]}")


def _is_tie(old: Sequence[Any], new: Sequence[Any], spread: float) -> bool:
    """Whether the same score was found on the prompt as it stands and on its decoded text."""
    score, names = FIELDS.index("score"), FIELDS.index("obfuscations")
    return old[names] != new[names] and _distance(old[score], new[score], spread) <= TIE


def _walk(
    tallies: dict[str, Tally],
    name: str,
    old: Any,
    new: Any,
    unit: float | None = None,
    where: str = "",
) -> None:
    """Compare two values of JSON and all that is in them."""
    tally = tallies.setdefault(name, Tally())
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted(old.keys() | new.keys()):
            _walk(tallies, name, old.get(key), new.get(key), unit, f"{where} {key}")
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for number, (one, other) in enumerate(zip(old, new, strict=True)):
            _walk(tallies, name, one, other, unit, f"{where} {number}")
    elif isinstance(old, float) and isinstance(new, float):
        tally.numbers += 1
        tally.greatest = max(tally.greatest, _distance(old, new, unit))
    else:
        tally.values += 1
        if old != new:
            tally.mismatches.append(f"{where}: {str(old)[:60]} -> {str(new)[:60]}")


def _distance(old: float, new: float, unit: float | None) -> float:
    """How far two numbers lie apart; infinitely if one of them is not finite."""
    if old == new:
        return 0.0
    distance = abs(new - old) / (unit or max(1.0, abs(old)))
    return distance if math.isfinite(distance) else math.inf


def failed(tallies: Mapping[str, Tally], tolerance: float = TOLERANCE) -> list[str]:
    """The quantities that differ by more than the tolerance, or in a discrete value."""
    return [n for n, t in tallies.items() if t.mismatches or not t.greatest <= tolerance]


def show(tallies: Mapping[str, Tally]) -> None:
    """A line for each quantity, and the first places where it differs."""
    for name, tally in tallies.items():
        print(
            f"{name:32} {tally.numbers:6} numbers, greatest difference {tally.greatest:.2e}; "
            f"{tally.values:6} discrete values, {len(tally.mismatches)} differ"
        )
        for place in tally.mismatches[:5]:
            print(f"    {place}")


def main() -> int:
    """Record or compare one model."""
    options = arguments()
    torch.set_num_threads(1)
    path = options.out or RESULTS / f"golden-{options.model}.json"
    if options.mode == "record":
        write(collect(options.model, quick=options.quick), path)
        return 0
    earlier = json.loads(path.read_text(encoding="utf-8"))
    tallies = compare(earlier, collect(options.model, quick=earlier["quick"]))
    show(tallies)
    differing = failed(tallies, options.tolerance)
    print(f"Differs: {', '.join(differing)}." if differing else "Nothing differs.")
    return 1 if differing else 0


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("mode", choices=("record", "compare"))
    parser.add_argument("model", choices=MODELS)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--tolerance", type=float, default=TOLERANCE)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
