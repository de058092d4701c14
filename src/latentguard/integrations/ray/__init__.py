"""Whole corpora on Ray Data: one actor a device holds model and guard and does blocks of rows.

Only the places of blocks travel through Ray; an actor reads its rows from the corpus and writes
their verdicts itself (``corpora``, ``shards``), so nothing is shuffled and no memory grows. A block
whose actor or node died is handed out again (``rounds``); one that is written is written once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from latentguard.data.prompt_files import Columns
from latentguard.errors import PromptError
from latentguard.guard.latent_guard import LatentGuard
from latentguard.integrations.ray.actors import Folder, Scorer
from latentguard.integrations.ray.corpora import cut, find_files, here
from latentguard.integrations.ray.rounds import EACH_DEVICE, Workers, each, start, surveyed
from latentguard.integrations.ray.shards import SUCCESS, Summary, finished, write_success
from latentguard.probes.axis import Axis, Centroid
from latentguard.probes.fitting import Poles, axes_of, merge_poles
from latentguard.states import Progress

__all__ = ["Workers", "fit_axes", "score_corpus"]


def score_corpus(
    guard: LatentGuard,
    source: str,
    out: str | Path,
    *,
    model: str | None = None,
    columns: Columns | None = None,
    workers: Workers = EACH_DEVICE,
    progress: Progress | None = None,
) -> Summary:
    """Score a corpus into Parquet files in ``out``; goes on where a killed run stopped.

    Rows keep their order and ids. A row that cannot be used has no verdict but an error.

    Args:
        guard: The guard.
        source: A Parquet or JSON Lines file, a folder or pattern of them, or what else
            ``stream_prompts`` reads, such as a Hub set; that is first copied into ``out``.
        out: A folder on a file system that all nodes share.
        model: Where the guard's model is, if it has moved.
        columns: Which column holds what; labels are not read.
        workers: How many, and how large their blocks are.
        progress: Called with the number of rows just done.

    Raises:
        PromptError: if the corpus cannot be read, or ``out`` holds other verdicts.
        ModelMismatch: if the model is not the guard's.
        LatentGuardError: if a block's workers die again and again.

    Examples:
        >>> lg.score_corpus(guard, "corpus/*.parquet", "verdicts")  # doctest: +SKIP
        Summary(rows=100000, flagged=812, unscored=0, parts=13)
    """
    out, columns = Path(out), columns or Columns(label="")
    start()
    files = surveyed(find_files(source, columns, out / "_staged", apart=out), workers)
    blocks = cut(files, workers.block_rows, f"{guard.digest} {columns}")
    there = finished(out, blocks)
    waiting = [block for block in blocks if block.name not in there]
    if waiting:
        (out / SUCCESS).unlink(missing_ok=True)  # of a smaller corpus
    tell = progress or (lambda _: None)
    tell(sum(block.stop - block.start for block in blocks if block.name in there))
    source = here(model or guard.fingerprint.model)
    how = dict(guard=guard, source=source, columns=columns, out=out.resolve())
    for result in each(waiting, Scorer, how, workers):
        tell(result["rows"])
    return write_success(out, guard.digest, files, blocks)


def fit_axes(
    model: str,
    source: str,
    *,
    dtype: str = "auto",
    layers: Sequence[int] | None = None,
    columns: Columns | None = None,
    workers: Workers = EACH_DEVICE,
) -> tuple[Axis, ...]:
    """The two axes of a labelled corpus (equations 4 and 5), as ``fitting.fit_axes`` makes them.

    Each worker folds its own blocks into centroids; these are merged here, in any order, so that
    the axes are those of one process up to rounding in float64.

    Args:
        model: What ``ChatModel.load`` takes, on every node.
        source: As for ``score_corpus``.
        dtype: As for ``ChatModel.load``.
        layers: All by default.
        columns: Which column holds what.
        workers: As for ``score_corpus``.

    Raises:
        PromptError: if the corpus or a row cannot be read.
        GuardError: if there are no harmful or no harmless prompts.
        LatentGuardError: if a block's workers die again and again.
    """
    columns = columns or Columns()
    start()
    with TemporaryDirectory() as staging:
        files = find_files(source, columns, Path(staging))
        blocks = cut(surveyed(files, workers), workers.block_rows, "")
        how = dict(source=here(model), dtype=dtype, layers=layers, columns=columns)
        poles: Poles | None = None
        for result in each(blocks, Folder, how, workers):
            poles = merge_poles(poles, _poles(result)) if poles else _poles(result)
            used = result["layers"]
    if poles is None:
        raise PromptError(f"{source} holds no prompts; expected at least one row with a text.")
    return axes_of(poles, tuple(int(layer) for layer in used))


def _poles(result: Mapping[str, Any]) -> Poles:
    flat = [
        Centroid(int(count), torch.tensor(mean))
        for count, mean in zip(result["counts"], result["means"], strict=True)
    ]
    return list(zip(flat[::2], flat[1::2], strict=True))
