"""How often the judge of a study is wrong on real replies, per kind of reply.

    python benchmarks/judge.py --out benchmarks/results/judge.json
        [--url http://localhost:8000/v1 --judge-model M]   # a judge model as well

The replies were labelled by hand. The built-in judge's phrases were made to fit the part ``tune``;
the part ``held`` was labelled after they were fixed, and judged after that. The rows were chosen to
be hard, each text once: on the replies of a plain run, most of them alike, both rules err less.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from latentguard.prompts import Prompt, Reply
from latentguard.stats.rates import proportion
from latentguard.study.endpoint import Endpoint
from latentguard.study.judge import Judge, judge, refused
from latentguard.study.judge_model import EndpointJudge
from latentguard.study.paper_judge import PaperJudge

REPLIES = Path(__file__).parents[1] / "tests" / "data" / "replies.jsonl"

KINDS = ("accepted", "refused", "cut", "empty")


@dataclass(frozen=True)
class Labelled:
    """A reply and what it is by hand."""

    part: str
    """``tune`` or ``held``."""

    reply: Reply
    outcome: str
    """One of ``KINDS``."""


@dataclass(frozen=True)
class ErrorRate:
    """How often a rule is wrong about one kind of reply, with its 95 % Wilson interval."""

    judge: str
    part: str
    kind: str
    """One of ``KINDS`` by hand, or ``all``."""

    counted: str
    """``outcome``: the rule's word differs from the hand's. ``refusal``: it is counted as a
    refusal, or as none, against the hand; a cut or empty reply is then no refusal."""

    error: float
    low: float
    high: float
    n: int


def main() -> None:
    """Write how often each rule is wrong."""
    options = arguments()
    rows = read(options.replies)
    rules: dict[str, Judge] = {"built in": judge, "paper": PaperJudge()}
    if options.url:
        rules[options.judge_model] = EndpointJudge(Endpoint(options.url, options.judge_model))
    rates = [one for name, rule in rules.items() for one in error_rates(name, rule, rows)]
    for one in rates:
        print(
            f"{one.judge:10} {one.part:5} {one.kind:9} {one.counted:8} "
            f"{one.error:.3f} [{one.low:.3f}, {one.high:.3f}] n = {one.n}"
        )
    if options.out:
        options.out.write_text(json.dumps([asdict(one) for one in rates], indent=1) + "\n")


def error_rates(name: str, rule: Judge, rows: Sequence[Labelled]) -> Iterator[ErrorRate]:
    """Errors of a rule on each part and kind."""
    outcomes = [rule(row.reply) for row in rows]
    for part in ("tune", "held"):
        for kind in ("all", *KINDS):
            here = [
                (outcome, row.outcome)
                for outcome, row in zip(outcomes, rows, strict=True)
                if row.part == part and kind in ("all", row.outcome)
            ]
            differs = [outcome != by_hand for outcome, by_hand in here]
            counted = [
                bool(refused(outcome)) != (by_hand == "refused") for outcome, by_hand in here
            ]
            for how, wrong in (("outcome", differs), ("refusal", counted)):
                rate = proportion(wrong)
                yield ErrorRate(name, part, kind, how, rate.value, rate.low, rate.high, len(wrong))


def read(path: Path) -> list[Labelled]:
    """The labelled replies."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        reply = Reply(Prompt("not kept"), row["text"], (), row["finished"])
        rows.append(Labelled(row["id"].split("-")[0], reply, row["outcome"]))
    return rows


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--replies", type=Path, default=REPLIES)
    parser.add_argument("--url")
    parser.add_argument("--judge-model", default="judge model")
    parser.add_argument("--out", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    main()
