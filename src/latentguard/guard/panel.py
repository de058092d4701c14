"""Several guards of one model on one capture: a forward pass for all, a verdict from each."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from itertools import chain, tee

from latentguard.errors import GuardError
from latentguard.guard.chunking import Windows
from latentguard.guard.latent_guard import LatentGuard
from latentguard.guard.obfuscations import Obfuscations, Told, read_through, worse
from latentguard.guard.verdict import Verdict
from latentguard.prompts import Prompt, as_prompts
from latentguard.states import Backend, Progress

Verdicts = tuple[Verdict, ...]
"""Of each guard."""


def scan_many(
    guards: Iterable[LatentGuard],
    backend: Backend,
    prompts: Iterable[Prompt | str],
    *,
    progress: Progress | None = None,
) -> Iterator[Verdicts]:
    """Yield, for each prompt in order, the verdict of each guard, in the guards' order.

    The verdicts are those of ``LatentGuard.scan``. One forward pass reads the union of what the
    guards need; those whose reading is ``sealed`` read another text, and share a second pass.

    Args:
        guards: Guards of one model.
        backend: That model.
        prompts: What to judge; consumed lazily.
        progress: Called with the number of prompts captured.

    Raises:
        ModelMismatch: if the model is not the one that each guard was fitted on.
        GuardError: if there is no guard, one has windows, or a state is not finite (fail closed).
    """
    panel = tuple(guards)
    if not panel:
        raise GuardError("There is no guard to scan with: expected at least one, found none.")
    for guard in panel:
        guard.require_match(backend.fingerprint)
        if guard.part(Windows):
            raise GuardError(
                "A guard with windows reads long prompts in passes of its own: scan with it alone."
            )
    known = [guard.part(Obfuscations) is not None for guard in panel]

    def choose(one: Verdicts, other: Verdicts, named: Told) -> Verdicts:
        pairs = zip(one, other, known, strict=True)
        return tuple(worse(a, b, named) if wanted else a for a, b, wanted in pairs)

    read = partial(_read, panel, backend)
    for verdicts in read_through(any(known), as_prompts(prompts), read, choose):
        if progress is not None:
            progress(1)
        yield verdicts


def _read(
    panel: Sequence[LatentGuard], backend: Backend, prompts: Iterator[Prompt]
) -> Iterator[Verdicts]:
    """The verdicts of each guard on prompts as they stand."""
    sealed = [guard.reading.name == "sealed" for guard in panel]
    seats = [[i for i, s in enumerate(sealed) if s is kind] for kind in dict.fromkeys(sealed)]
    streams = tee(prompts, len(seats))
    passes = [
        _together([panel[i] for i in seat], backend, stream)
        for seat, stream in zip(seats, streams, strict=True)
    ]
    order = list(chain(*seats))
    for rows in zip(*passes, strict=True):
        found = dict(zip(order, chain(*rows), strict=True))
        yield tuple(found[i] for i in range(len(panel)))


def _together(
    panel: Sequence[LatentGuard], backend: Backend, prompts: Iterable[Prompt]
) -> Iterator[Verdicts]:
    """One pass for guards that read the same text."""
    positions = tuple(dict.fromkeys(name for guard in panel for name in guard.positions))
    layers = sorted({layer for guard in panel for layer in guard.probe.layers})
    ready = map(panel[0].reading.prepare, prompts)
    for states in backend.capture(ready, positions=positions, layers=layers):
        yield from zip(*(guard.judge(states) for guard in panel), strict=True)
