"""Captured states on disk, so that a killed fit goes on where it stopped.

An entry is a folder of shards: the states of consecutive prompts, one safetensors file for each
batch that the backend yields. Its name is a digest of the model, the prompts, the positions and the
layers. Shards hold no text.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType

from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from latentguard.files import write_atomic
from latentguard.prompts import Prompt
from latentguard.states import Backend, Progress, States, TokenQueries, digest_prompts

log = logging.getLogger("latentguard.capture_cache")

FORMAT = 1
"""Counted up when older shards can no longer be read."""

MAX_DAYS = 30
"""An entry is removed that many days after its last shard."""

MAX_BYTES = 8 << 30
"""The oldest entries are removed until all of them together are this large at most."""


class CaptureCache:
    """A folder of captured states.

    Used in a ``with``: what was captured through it is removed once the block ends without an
    error, and stays for the next run if the block fails or the process is killed.
    """

    def __init__(self, folder: str | Path, *, max_bytes: int = MAX_BYTES) -> None:
        """Name the folder, which is created on first use.

        Args:
            folder: Where the entries lie.
            max_bytes: How large all entries together may be.
        """
        self.folder = Path(folder)
        self.max_bytes = max_bytes
        self._used: list[Path] = []

    def __enter__(self) -> CaptureCache:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is None:
            for entry in self._used:
                shutil.rmtree(entry, ignore_errors=True)

    def capture(
        self,
        backend: Backend,
        prompts: Sequence[Prompt],
        *,
        positions: Sequence[str],
        layers: Sequence[int],
        queries: TokenQueries | None = None,
        progress: Progress | None = None,
    ) -> Iterator[States]:
        """Yield states in order; what a killed run captured of the same is read from the disk.

        The states are bit for bit those of ``backend.capture``; a killed run loses the shard that
        it was capturing.

        Args:
            backend: The model.
            prompts: What to read.
            positions: Where.
            layers: At which layers.
            queries: The queries of the attended positions.
            progress: Called with the number of prompts just done, or found on the disk.
        """
        entry = self.folder / entry_name(backend, prompts, positions, layers, queries)
        self._used.append(entry)
        self._remove_old_entries()
        start = 0
        for values in _read_shards(entry, (len(positions), len(layers))):
            batch = tuple(prompts[start : start + len(values)])
            yield States(values, batch, tuple(positions), tuple(layers), backend.fingerprint)
            start += len(values)
            if progress is not None:
                progress(len(values))
        for states in backend.capture(
            prompts[start:],
            positions=positions,
            layers=layers,
            queries=queries,
            progress=progress,
        ):
            self._write_shard(entry, start, states, len(prompts))
            start += len(states)
            yield states

    def _write_shard(self, entry: Path, start: int, states: States, total: int) -> None:
        """Write a shard, unless the entry would grow larger than entries may."""
        size = states.values.nbytes // len(states) * total
        if start == 0 and not self._make_room(size):
            return
        if start > 0 and not entry.exists():
            return  # there was no room for it
        entry.mkdir(parents=True, exist_ok=True)
        content = save({"values": states.values.contiguous()})
        write_atomic(_shard_path(entry, start), content)

    def _make_room(self, size: int) -> bool:
        """Remove the oldest other entries until ``size`` bytes fit in; returns whether they do."""
        others = sorted(self._unused_entries(), key=_last_change)
        while others and sum(map(_entry_bytes, others)) + size > self.max_bytes:
            shutil.rmtree(others.pop(0), ignore_errors=True)
        self.folder.mkdir(parents=True, exist_ok=True)
        limit = min(self.max_bytes, shutil.disk_usage(self.folder).free)
        if size > limit:
            log.warning(
                "The states take %.1f GB, and %s has room for %.1f GB: they are not kept, so a "
                "killed run starts anew.",
                size / 1e9,
                self.folder,
                limit / 1e9,
            )
        return size <= limit

    def _remove_old_entries(self) -> None:
        oldest = time.time() - MAX_DAYS * 24 * 3600
        for entry in self._unused_entries():
            if _last_change(entry) < oldest:
                shutil.rmtree(entry, ignore_errors=True)

    def _unused_entries(self) -> list[Path]:
        entries = [path for path in self.folder.glob("states-*") if path.is_dir()]
        return [entry for entry in entries if entry not in self._used]


def entry_name(
    backend: Backend,
    prompts: Sequence[Prompt],
    positions: Sequence[str],
    layers: Sequence[int],
    queries: TokenQueries | None = None,
) -> str:
    """The folder of an entry: a digest of the model, the prompts and what is read of them."""
    model, rows = backend.fingerprint.digest, digest_prompts(prompts)
    digest = queries.digest if queries else None
    key = json.dumps([FORMAT, model, rows, list(positions), list(layers), digest])
    return f"states-{hashlib.sha256(key.encode()).hexdigest()[:32]}"


def _shard_path(entry: Path, start: int) -> Path:
    """The shard that begins with the prompt of that number."""
    return entry / f"{start:08}.safetensors"


def _read_shards(entry: Path, shape: tuple[int, int]) -> Iterator[Float[Tensor, "n p l d"]]:
    """Yield shards in order, up to the first that is missing or damaged.

    Args:
        entry: Their folder.
        shape: The number of positions and that of layers.
    """
    start = 0
    while (path := _shard_path(entry, start)).exists():
        try:
            values: Tensor = load(path.read_bytes())["values"]
        except (SafetensorError, KeyError):
            return
        if values.ndim != 4 or tuple(values.shape[1:3]) != shape or not len(values):
            return
        yield values
        start += len(values)


def _last_change(entry: Path) -> float:
    try:
        return entry.stat().st_mtime
    except FileNotFoundError:  # another run has removed it
        return 0.0


def _entry_bytes(entry: Path) -> int:
    return sum(file.stat().st_size for file in entry.glob("*.safetensors"))
