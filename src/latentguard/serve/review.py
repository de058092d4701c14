"""The review page of the service: recent prompts in memory, labels in a file, for admins alone."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, Request

from latentguard.errors import GuardError, LatentGuardError
from latentguard.guard.adapting import Adapted
from latentguard.guard.explanation import Explanation
from latentguard.guard.latent_guard import LatentGuard
from latentguard.guard.own_model import OwnModel
from latentguard.models.segments import Segments
from latentguard.models.shared_model import SharedModel
from latentguard.prompts import Prompt
from latentguard.review.labels import LabelFile
from latentguard.review.routes import Review, routes
from latentguard.review.session import ReviewItem, ReviewItems, ReviewSession
from latentguard.review.teaching import Teacher
from latentguard.serve.engine import ScoringEngine
from latentguard.serve.errors import ApiError
from latentguard.serve.keys import ApiKeys
from latentguard.serve.scoring import ScoredPrompt
from latentguard.serve.served_guards import ServedGuard
from latentguard.states import Progress, States, TokenQueries, no_progress

if TYPE_CHECKING:
    from latentguard.serve.service import Service

RECENT = 500
"""Prompts that are kept, the newest."""

ACCOUNT = "review"
"""Whose work the page's is, for the queue."""

BATCH = 8
"""Prompts that are read at once to teach the guard, with the work of others in between."""


class ServiceReview:
    """What the page of a service works on."""

    def __init__(self, service: Service) -> None:
        """Open the label file.

        Raises:
            LatentGuardError: if it cannot be written, or nobody has the admin key.
        """
        config = service.config
        if config.admin_key is None:
            raise LatentGuardError("--review-labels needs a key: set LATENTGUARD_ADMIN_KEY.")
        assert config.review_labels is not None
        self._service, self._path = service, Path(config.review_labels)
        self._keys = ApiKeys([config.admin_key])
        self._items = ReviewItems(RECENT)
        self._labels = LabelFile(self._path)

    def start(self) -> None:
        """Note the event loop, which the thread that teaches asks for readings."""
        self._loop = asyncio.get_running_loop()

    def keep(self, prompt: Prompt, scored: ScoredPrompt, served: ServedGuard) -> None:
        """Keep a prompt for the page; one that no file could hold is left out."""
        try:
            item = ReviewItem(prompt, scored.verdict, scored.threshold, served.digest)
            self._items.add(item)
        except UnicodeEncodeError:  # half a character
            return

    def routes(self) -> APIRouter:
        """The page, and what it asks."""
        folder = self._path.with_name(f"{self._path.stem}-guard")
        teacher = Teacher(self._adapt, folder, nullcontext())
        review = Review(
            session=ReviewSession(self._items, self._labels),
            explain=self._explain,
            about=self._about,
            teacher=teacher,
        )
        return routes(review, self._require)

    def close(self) -> None:
        """Let another process write the label file."""
        self._labels.close()

    def _require(self, request: Request) -> None:
        self._keys.require(request.headers.get("authorization", ""))

    def _about(self) -> dict[str, Any]:
        source = f"the last {RECENT} prompts of this service"
        name = self._service.guards.default.label
        return dict(name=name, source=source, labels=self._path.name)

    async def _explain(self, item: ReviewItem) -> Explanation:
        guards = {one.digest: one for one in self._service.guards}
        if item.guard not in guards:
            raise GuardError("The guard that judged this prompt is not served any more.")
        explainer = self._service.explainer
        explanation: Explanation = await self._service.engine.run_alone(
            item.prompt,
            lambda guard, model, segments: explainer.explain(
                guard, model, item.prompt, item.verdict, segments=segments
            ),
            account=ACCOUNT,
            served=guards[item.guard],
        )
        return explanation

    def _adapt(self, prompts: list[Prompt]) -> Adapted:
        """Adapt the default guard, which reads the prompts on the scoring thread."""
        guard = self._service.guards.default.guard
        guard = replace(guard, own_model=OwnModel(EngineBackend(self._service.engine, self._loop)))
        return guard.adapt(prompts, name=self._path.stem)


class EngineBackend:
    """The model of a service for another thread: it reads some prompts, then serves others.

    Everything but reading is asked of the model itself.
    """

    def __init__(self, engine: ScoringEngine, loop: asyncio.AbstractEventLoop) -> None:
        """Wrap the model of an engine that is loaded, and runs in this event loop."""
        self._engine, self._loop = engine, loop

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine.model, name)

    def capture(
        self,
        prompts: Iterable[Prompt],
        *,
        positions: Sequence[str] = ("t_inst", "t_post"),
        layers: Sequence[int] | None = None,
        queries: TokenQueries | None = None,
        progress: Progress | None = None,
    ) -> Iterator[States]:
        """Yield states in the order of the prompts, as ``ChatModel.capture`` does.

        Raises:
            GuardError: if the service has no time for it.
        """
        how = dict(positions=positions, layers=layers, queries=queries, progress=no_progress)
        rest = iter(prompts)
        while batch := tuple(islice(rest, BATCH)):
            yield from self._read(batch, how)
            if progress is not None:
                progress(len(batch))

    def _read(self, batch: Sequence[Prompt], how: dict[str, Any]) -> list[States]:
        def work(_: LatentGuard, model: Any, segments: Segments | None) -> list[States]:
            shared = model if segments is None else SharedModel(model, segments)
            return list(shared.capture(batch, **how))

        longest = max(batch, key=lambda prompt: len(prompt.text))
        engine = self._engine
        reading = engine.run_alone(longest, work, account=ACCOUNT, seconds=engine.config.stall)
        try:
            states: list[States] = asyncio.run_coroutine_threadsafe(reading, self._loop).result()
        except ApiError as error:
            raise GuardError(str(error)) from None
        return states
