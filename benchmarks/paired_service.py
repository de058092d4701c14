"""The service of this source beside that of an earlier one: processor time of the same requests.

    python benchmarks/paired_service.py --base CHECKOUT [--model M --guard G --guard-base G]

Both services run at the same time and are sent the same requests in turns, one at a time. No prompt
is sent twice, so that no cache answers. Two loads:

* ``moderations``: one prompt a request;
* ``first token``: a streamed chat of one message that the guard's own model answers with one token.

A ratio is this source over the earlier one, of the processor time of the server's process; wall
time is given, too. Each pair is written to standard error as it comes, so that a run that ends
early is not lost. ``--control`` compares the earlier source with itself.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from attack_service import ROOT, ServiceProcess, Side, ratio_interval, serving

LOADS = ("moderations", "first token")
WARM_UP = 2
"""Pairs that are not counted: they load what is loaded at first use."""

TEXTS = 24
"""Built-in prompts that both guards score first; those that both let through are sent."""


@dataclass(frozen=True)
class Cost:
    """What one request took, in seconds."""

    processor: float
    """Processor time of the server's process."""

    wall: float
    """Until the answer was whole."""


def main() -> None:
    """Measure and print."""
    options = arguments()
    base = Side(options.base, options.model, options.guard_base)
    here = base if options.control else Side(ROOT, options.model, options.guard)
    limits: dict[str, Any] = {"queue": 4096, "drain": 60.0, "texts": TEXTS}
    with serving(base, **limits) as old, serving(here, **limits) as new:
        figures = {load: measure(old, new, load, options.pairs) for load in options.loads}
    record = dict(model=options.model, control=options.control, load_average=os.getloadavg())
    sys.stdout.write(f"{json.dumps(record | figures, indent=1)}\n")


def measure(old: ServiceProcess, new: ServiceProcess, load: str, pairs: int) -> dict[str, Any]:
    """Ratios of one load, new over old."""
    costs: dict[str, list[Cost]] = {"old": [], "new": []}
    services = {"old": old, "new": new}
    texts = numbered_texts(old, new, load)
    for number in range(pairs + WARM_UP):
        text = next(texts)
        order = ("old", "new") if number % 2 else ("new", "old")
        pair = {side: send(services[side], load, text) for side in order}
        if number < WARM_UP:
            continue
        for side, cost in pair.items():
            costs[side].append(cost)
        sys.stderr.write(f"{json.dumps([load, *(vars(pair[side]) for side in costs)])}\n")
    return {"pairs": pairs} | {
        clock: summary(
            [getattr(cost, clock) for cost in costs["old"]],
            [getattr(cost, clock) for cost in costs["new"]],
        )
        for clock in ("processor", "wall")
    }


def summary(before: Sequence[float], after: Sequence[float]) -> dict[str, Any]:
    """Medians in milliseconds, and the median ratio with its interval."""
    ratios = [b / a for a, b in zip(before, after, strict=True)]
    return dict(
        ms_before=round(1000 * statistics.median(before), 3),
        ms_after=round(1000 * statistics.median(after), 3),
        ratio=round(statistics.median(ratios), 4),
        interval=ratio_interval(ratios, digits=4),
    )


def numbered_texts(old: ServiceProcess, new: ServiceProcess, load: str) -> Iterator[str]:
    """Prompts that both guards pass, each with a number of its own."""
    passed = [text for text in old.passed if text in set(new.passed)]
    place = LOADS.index(load)
    for number, text in zip(itertools.count(), itertools.cycle(passed), strict=False):
        yield f"{text} ({place}, {number})"


def send(service: ServiceProcess, load: str, text: str) -> Cost:
    """Send one request."""
    chat = {"messages": [{"role": "user", "content": text}], "stream": True, "max_tokens": 1}
    path, body = {
        "moderations": ("/v1/moderations", {"input": text}),
        "first token": ("/v1/chat/completions", chat | {"temperature": 0}),
    }[load]
    wall, processor = time.perf_counter(), processor_seconds(service.pid)
    answer = httpx.post(f"{service.url}{path}", json=body, timeout=300, verify=False)
    cost = Cost(processor_seconds(service.pid) - processor, time.perf_counter() - wall)
    answer.raise_for_status()
    return cost


def processor_seconds(pid: int) -> float:
    """Processor time of a process so far, by the kernel's clock of that process."""
    return time.clock_gettime((~pid << 3) | 2)


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", type=Path, required=True, help="a checkout of the earlier source")
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--guard", type=Path, help="for this source; the tiny model has its own")
    parser.add_argument("--guard-base", type=Path)
    parser.add_argument("--pairs", type=int, default=100)
    parser.add_argument("--loads", nargs="+", choices=LOADS, default=list(LOADS))
    parser.add_argument("--control", action="store_true", help="the earlier source twice")
    return parser.parse_args()


if __name__ == "__main__":
    main()
