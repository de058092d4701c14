"""Seconds to read prompts as ``fit`` does, on a CPU: threads, processes, compiled blocks.

    python benchmarks/reading_speed.py --out benchmarks/results/reading-speed-smollm2-135m.json

The arms take turns, back and forth, in one process; the two workers of the arm with processes are
forked once. ``--busy 2`` keeps two other processes busy meanwhile. Ratios are against one thread.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.context import ForkProcess
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.multiprocessing as mp

from latentguard.data.builtin import load_guard_prompts
from latentguard.models.chat_model import ChatModel
from latentguard.probes.fitting import capture
from latentguard.probes.probe import layers_of
from latentguard.prompts import Prompt
from latentguard.states import DEFAULT_READING, Reading


@dataclass
class Arm:
    """One way to read the prompts, and what was measured of it."""

    run: Callable[[], torch.Tensor]
    threads: int = 1
    spent: Callable[[], float] = time.process_time
    """Processor seconds so far, of all processes."""

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)

    def measure(self) -> torch.Tensor:
        """Run once; keep both times."""
        torch.set_num_threads(self.threads)
        cpu = self.spent()
        start = time.perf_counter()
        values = self.run()
        self.wall.append(time.perf_counter() - start)
        self.cpu.append(self.spent() - cpu)
        return values


def read(model: ChatModel, rows: list[Prompt]) -> torch.Tensor:
    """The states that ``LatentGuard.fit`` captures, [n, p, l, d]."""
    where = Reading.of(DEFAULT_READING, model.post)
    return capture(model, where, rows, layers=layers_of("linear", model.depth)).values


class Workers:
    """Two forked processes of one thread each; each reads every other row into shared memory."""

    def __init__(self, model: ChatModel, rows: list[Prompt], like: torch.Tensor) -> None:
        """Fork; the workers wait."""
        context = mp.get_context("fork")
        self.values = torch.empty((len(rows), *like.shape[1:])).share_memory_()
        self.begin = [context.Semaphore(0) for _ in range(2)]
        self.done = context.Semaphore(0)
        self.seconds = context.Array("d", 2)
        self.processes: list[ForkProcess] = []
        for k in range(2):
            process = context.Process(target=self._work, args=(model, rows, k), daemon=True)
            process.start()
            self.processes.append(process)

    def _work(self, model: ChatModel, rows: list[Prompt], k: int) -> None:
        torch.set_num_threads(1)
        while True:
            self.begin[k].acquire()
            start = time.process_time()
            self.values[k::2] = read(model, rows[k::2])
            self.seconds[k] += time.process_time() - start
            self.done.release()

    def run(self) -> torch.Tensor:
        """One round."""
        for begin in self.begin:
            begin.release()
        for _ in self.begin:
            self.done.acquire()
        return self.values

    def spent(self) -> float:
        """Processor seconds so far of this process and both workers."""
        return time.process_time() + sum(self.seconds)


def read_compiled(model: ChatModel, rows: list[Prompt]) -> Callable[[], torch.Tensor]:
    """Reading with compiled MLPs and norms; the hooks on blocks stay outside of them."""
    torch._dynamo.config.recompile_limit = 128
    parts = [
        part
        for block in model.blocks
        for part in (block.mlp, block.input_layernorm, block.post_attention_layernorm)
    ]
    compiled = {part: torch.compile(part.forward, dynamic=True) for part in parts}

    def run() -> torch.Tensor:
        for part, forward in compiled.items():
            part.forward = forward
        try:
            return read(model, rows)
        finally:
            for part in compiled:
                del part.forward

    return run


@contextmanager
def busy(processes: int) -> Iterator[None]:
    """Keep other processes busy with matrix products meanwhile."""
    context = mp.get_context("fork")
    others = [context.Process(target=_multiply, daemon=True) for _ in range(processes)]
    for other in others:
        other.start()
    try:
        yield
    finally:
        for other in others:
            other.kill()


def _multiply() -> None:
    torch.set_num_threads(1)
    matrix = torch.randn(512, 512)
    while True:
        matrix @ matrix


def summary(arms: Mapping[str, Arm]) -> dict[str, Any]:
    """Medians, and ratios to the first arm of the same round."""
    first = next(iter(arms.values()))
    return {
        name: {
            "wall_seconds": round(median(arm.wall), 2),
            "cpu_seconds": round(median(arm.cpu), 2),
            "wall_ratios": [round(a / b, 3) for a, b in zip(arm.wall, first.wall, strict=True)],
            "cpu_ratios": [round(a / b, 3) for a, b in zip(arm.cpu, first.cpu, strict=True)],
        }
        for name, arm in arms.items()
    }


def main() -> None:
    """Time and write."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=200)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--busy", type=int, default=0)
    parser.add_argument("--compile", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    train = load_guard_prompts("train")
    rows = train[:: len(train) // options.rows][: options.rows]
    model = ChatModel.load("default", device="cpu")
    workers = Workers(model, rows, read(model, rows[:8]))
    arms = {
        "one thread": Arm(lambda: read(model, rows)),
        f"{os.cpu_count()} threads": Arm(lambda: read(model, rows), os.cpu_count() or 1),
        "two processes": Arm(workers.run, spent=workers.spent),
    }
    if options.compile:
        arms["compiled parts"] = Arm(read_compiled(model, rows))
    with busy(options.busy):
        expected = arms["one thread"].run()
        gaps = {
            n: float((arm.measure() - expected).norm() / expected.norm()) for n, arm in arms.items()
        }
        first = {name: round(arm.wall.pop(), 2) for name, arm in arms.items()}
        for arm in arms.values():
            arm.cpu.clear()
        for repeat in range(options.repeats):
            for arm in list(arms.values())[:: 1 if repeat % 2 == 0 else -1]:
                arm.measure()
            print({name: round(arm.wall[-1], 2) for name, arm in arms.items()}, flush=True)
    record = {
        "rows": len(rows),
        "cores": os.cpu_count(),
        "busy_processes": options.busy,
        "load": os.getloadavg(),
        "first_seconds": first,
        "relative_gaps": gaps,
        "arms": summary(arms),
    }
    options.out.write_text(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
