"""Rounds: blocks handed out to Ray actors until each of them is done, whoever dies."""

from __future__ import annotations

import gc
import logging
import os
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import ray
from ray.data import ActorPoolStrategy, DataContext

from latentguard.errors import LatentGuardError
from latentguard.integrations.ray.corpora import Block, SourceFile, survey

BLOCK_ROWS = 8192
"""A multiple of the window of ``ChatModel.capture``: blocks are batched as one process does."""

TRIES = 3
"""Rounds on end in which nothing at all is done before a run is given up."""

LOSSES = 1
"""Blocks that a round may lose for each actor before it is begun anew with what is left; an actor
that dies loses two, so that at most half of them are missed until then."""

MOST_TASKS = 2000
"""Blocks are handed out in at most so many tasks."""


@dataclass(frozen=True)
class Workers:
    """How a corpus is shared out."""

    actors: int | None = None
    """How many; by default one for each GPU, or for each node if there is none."""

    block_rows: int = BLOCK_ROWS
    """Rows of one block: of one output file, and what is done again after a death."""


EACH_DEVICE = Workers()


def start() -> None:
    """Join the cluster that RAY_ADDRESS or this machine names, or start Ray here, quietly."""
    if not ray.is_initialized():
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is reported to anybody
        ray.init(logging_level=logging.ERROR, log_to_driver=False)
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # a record would hold its actors


def surveyed(paths: Sequence[str], workers: Workers) -> list[SourceFile]:
    """Survey files on whichever nodes are free: a corpus is read at the speed of all of them."""
    look = ray.remote(survey)
    try:
        return list(ray.get([look.remote(path, workers.block_rows) for path in paths]))
    except ray.exceptions.RayTaskError as error:
        raise error.cause from None


def each(
    blocks: Sequence[Block], worker: type, how: dict[str, Any], workers: Workers
) -> Iterator[dict[str, Any]]:
    """The result of every block, once; those whose worker died are handed out again."""
    waiting, idle, reason = {block.index: block for block in blocks}, 0, "a worker died"
    while waiting and idle < TRIES:
        before = len(waiting)
        try:
            for result in _round(list(waiting.values()), worker, how, workers.actors):
                if result["failure"]:
                    raise LatentGuardError(result["failure"])
                if waiting.pop(result["index"], None):
                    yield result
        except ray.exceptions.RayError as error:
            reason = str(error).strip().split("\n")[-1]
        gc.collect()  # an actor lives, on its device, as long as anything knows of it
        idle = idle + 1 if len(waiting) == before else 0
    if waiting:
        lost = next(iter(waiting.values()))
        raise LatentGuardError(
            f"{len(waiting)} blocks could not be done in {TRIES} rounds, the first of them rows "
            f"{lost.start + 1} to {lost.stop} of {lost.path} ({reason}). If memory is short, use "
            "fewer actors or smaller blocks; run it again to go on."
        )


def _round(
    blocks: Sequence[Block], worker: type, how: dict[str, Any], actors: int | None
) -> Iterator[dict[str, Any]]:
    """Hand out blocks once. What was with an actor when it died is missing from the results.

    Ray would start an actor again where there is room, and a task would wait for its own actor:
    for ever, if that node is gone. So neither is done by Ray; the next round has new actors.
    """
    size, device = _devices(actors)
    context = DataContext.get_current().copy()
    context.enable_progress_bars = False
    context.max_errored_blocks = LOSSES * size
    context.max_consecutive_actor_init_deaths = size
    with DataContext.current(context), warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # max_restarts has no other name
        items = [asdict(block) for block in blocks]
        data = ray.data.from_items(items, override_num_blocks=min(len(items), MOST_TASKS))
        pool = ActorPoolStrategy(size=size, max_tasks_in_flight_per_actor=2)
        data = data.map(worker, fn_constructor_kwargs=how, compute=pool, max_restarts=0, **device)
    yield from data.iter_rows()


def _devices(actors: int | None) -> tuple[int, dict[str, float]]:
    """How many actors, and what each of them occupies."""
    there = ray.cluster_resources()
    if gpus := int(there.get("GPU", 0)):
        return actors or gpus, {"num_gpus": 1}
    size = actors or sum(node["Alive"] for node in ray.nodes())
    return size, {"num_cpus": max(1, int(there.get("CPU", 1)) // size)}
