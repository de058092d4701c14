"""The review page and what it asks, for a server of its own and for the service."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import resources
from typing import Annotated, Any

from fastapi import APIRouter, Depends, HTTPException, Query, Request, Response
from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from latentguard.data.label_rows import Label
from latentguard.errors import LatentGuardError
from latentguard.guard.explanation import Explanation
from latentguard.review.session import Filter, Order, ReviewItem, ReviewSession
from latentguard.review.teaching import Teacher

PATH = "/review"
"""Where the page is, and below it all that it asks."""

FOLDER = resources.files("latentguard.review") / "page"

FILES = {
    PATH: ("index.html", "text/html; charset=utf-8"),
    f"{PATH}/page.css": ("page.css", "text/css; charset=utf-8"),
    f"{PATH}/page.js": ("page.js", "text/javascript; charset=utf-8"),
    f"{PATH}/icon.svg": ("icon.svg", "image/svg+xml"),
}
"""Path -> file and kind. They hold nothing of anybody, so they need no key."""

HEADERS = {
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
        "img-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-store",
}


def _named(name: str) -> str:
    """A reviewer's name without blanks around it."""
    name = name.strip()
    if not name or not name.isprintable():
        raise ValueError("expected a name")
    return name


Reviewer = Annotated[str, Field(max_length=80), AfterValidator(_named)]


class Place(BaseModel):
    """Who asks, and in which list."""

    model_config = ConfigDict(extra="forbid")

    reviewer: Reviewer
    which: Filter = "unlabelled"
    order: Order = "file"


class NextRequest(Place):
    """Asks for the next prompt of a list."""

    after: str | None = None


class LabelRequest(Place):
    """Labels a prompt."""

    key: str
    label: Label


@dataclass(frozen=True)
class Review:
    """What the page works on."""

    session: ReviewSession
    """Prompts and labels."""

    explain: Callable[[ReviewItem], Awaitable[Explanation]]
    """Says what each token adds; raises ``LatentGuardError`` if that cannot be done now."""

    about: Callable[[], dict[str, Any]]
    """What the page says: ``name`` of the guard, ``source``, ``labels`` for the file, and
    ``reviewer``, if that is known."""

    teacher: Teacher | None = None
    """Adapts the guard; None if it cannot be adapted."""


def routes(review: Review, require: Callable[[Request], None]) -> APIRouter:
    """The page, and what it asks.

    Args:
        review: What it works on.
        require: Raises unless a request has the key in a header, which no form and no page of
            others can send.
    """
    router = APIRouter(include_in_schema=False)
    for path, (name, kind) in FILES.items():
        router.add_api_route(path, page_file(name, kind))
    data = APIRouter(prefix=PATH, dependencies=[Depends(require)])
    _add_reading(data, review)
    _add_labelling(data, review)
    _add_teaching(data, review)
    router.include_router(data)
    return router


def page_file(name: str, kind: str) -> Any:
    """An endpoint that sends a file of the page."""
    content = (FOLDER / name).read_bytes()

    async def file() -> Response:
        return Response(content, media_type=kind, headers=HEADERS)

    return file


def _add_reading(data: APIRouter, review: Review) -> None:
    session = review.session

    @data.get("/about")
    def about() -> dict[str, Any]:
        """What guard and source are."""
        low, high = session.items.score_range()
        can_teach = review.teacher is not None
        return review.about() | dict(low=low, high=high, can_teach=can_teach)

    @data.post("/next")
    def next_prompt(asked: NextRequest) -> dict[str, Any]:
        """The next prompt of a list."""
        return _page(session, asked, asked.after)

    @data.get("/tokens")
    async def tokens(key: Annotated[str, Query()]) -> dict[str, Any]:
        """What each token of a prompt adds to its score."""
        item = _require_item(session, key)
        with _errors_as_answers():
            explanation = await review.explain(item)
        own = [token for token in explanation.tokens if token.belief is not None]
        return {"key": key, "tokens": [[one.text, one.contribution] for one in own]}


def _add_labelling(data: APIRouter, review: Review) -> None:
    session = review.session

    @data.post("/label")
    def label(asked: LabelRequest) -> dict[str, Any]:
        """Write a label; the next prompt of the list."""
        item = _require_item(session, asked.key)
        with _errors_as_answers():
            session.label(item, asked.label, asked.reviewer)
        labelled = {"labelled": session.to_dict(item, asked.reviewer)}
        return _page(session, asked, asked.key) | labelled

    @data.post("/undo")
    def undo(asked: Place) -> dict[str, Any]:
        """Take the reviewer's last label back; the prompt that had it."""
        with _errors_as_answers():
            key = session.labels.undo(asked.reviewer)
        if key is None:
            raise HTTPException(409, "There is nothing to undo since this page was started.")
        item = session.items.get(key)
        return _counts(session, asked) | {
            "item": session.to_dict(item, asked.reviewer) if item else None
        }


def _add_teaching(data: APIRouter, review: Review) -> None:
    @data.get("/teach")
    def state() -> dict[str, Any]:
        """How far the teaching is."""
        return review.teacher.to_dict() if review.teacher else {"state": "idle"}

    @data.post("/teach")
    def teach() -> dict[str, Any]:
        """Begin to teach the guard with all labels that count."""
        if review.teacher is None:
            raise HTTPException(409, "This guard cannot be adapted.")
        with _errors_as_answers():
            prompts = review.session.labels.agreed_prompts()
        if not prompts:
            raise HTTPException(409, "There are no labels yet; label some prompts first.")
        if not review.teacher.start(prompts):
            raise HTTPException(409, "The guard is being taught already.")
        return review.teacher.to_dict()


@contextmanager
def _errors_as_answers() -> Iterator[None]:
    """Answer with the sentence of an error."""
    try:
        yield
    except LatentGuardError as error:
        raise HTTPException(503, str(error)) from None


def _require_item(session: ReviewSession, key: str) -> ReviewItem:
    item = session.items.get(key)
    if item is None:
        raise HTTPException(404, "This prompt is not in the list any more.")
    return item


def _page(session: ReviewSession, asked: Place, after: str | None) -> dict[str, Any]:
    """The prompt after another, and how far the reviewer is."""
    item = session.next_item(asked.reviewer, asked.which, asked.order, after)
    shown = session.to_dict(item, asked.reviewer) if item else None
    return _counts(session, asked) | {"item": shown}


def _counts(session: ReviewSession, asked: Place) -> dict[str, Any]:
    return {"counts": session.counts(asked.reviewer, asked.which)}
