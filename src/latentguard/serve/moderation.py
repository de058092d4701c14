"""``POST /v1/moderations`` in OpenAI's schema, and ``POST /v1/score`` with all that is known.

The guard has one harm score and no categories: a flagged input is ``illicit``; of the other
categories nothing is claimed (false, 0, applied to nothing). The score of ``illicit`` is the
guard's probability, moved so that it is over 0.5 exactly if the input is flagged: clients that
compare it with 0.5 keep the calibrated threshold. The probability itself is an extra field.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request
from pydantic import BaseModel, ConfigDict, Field
from scipy.special import expit

from latentguard.guard import LatentGuard
from latentguard.prompts import Prompt
from latentguard.serve.faults import BadRequest
from latentguard.serve.judging import Judgement, trace
from latentguard.serve.messages import ChatMessage, Part, only_text, prompts_of
from latentguard.serve.service import Case, Service

CATEGORIES = (
    "harassment",
    "harassment/threatening",
    "hate",
    "hate/threatening",
    "illicit",
    "illicit/violent",
    "self-harm",
    "self-harm/intent",
    "self-harm/instructions",
    "sexual",
    "sexual/minors",
    "violence",
    "violence/graphic",
)
"""OpenAI's."""

HARM = "illicit"
"""The category that stands for the guard's one score."""

Text = Annotated[str, Field(min_length=1)]


class ModerationRequest(BaseModel):
    """What is asked."""

    input: (
        Text
        | Annotated[list[Text], Field(min_length=1)]
        | Annotated[list[Part], Field(min_length=1)]
    )
    """A text, several texts, or the parts of one message."""

    model: str | None = None
    """Any; there is one guard."""


class Scores(BaseModel):
    """The guard's own words."""

    score: float
    probability: float
    threshold: float
    beliefs: dict[str, float]


class ModerationResult(BaseModel):
    """What is said of one input."""

    flagged: bool
    categories: dict[str, bool]
    category_scores: dict[str, float]
    category_applied_input_types: dict[str, list[Literal["text"]]]
    latentguard: Scores


class ModerationResponse(BaseModel):
    """OpenAI's answer."""

    id: str
    model: str
    results: list[ModerationResult]


class ScoreRequest(BaseModel):
    """Texts, or one chat."""

    model_config = ConfigDict(extra="forbid")

    input: Text | Annotated[list[Text], Field(min_length=1)] | None = None
    """A text or several texts."""

    messages: Annotated[list[ChatMessage], Field(min_length=1)] | None = None
    """A chat, instead of ``input``."""

    tokens: bool = False
    """Also the belief after each token of the instruction; for one prompt only."""


class TokenBelief(BaseModel):
    """The belief after one token."""

    text: str
    belief: float


class ScoreResult(BaseModel):
    """All that is known of one prompt."""

    score: float
    probability: float
    flagged: bool
    beliefs: dict[str, float]
    by_layer: dict[str, list[float]]
    quadrant: str | None
    tokens: list[TokenBelief] | None


class ScoreResponse(BaseModel):
    """All that is known of some prompts."""

    id: str
    model: str
    threshold: float
    layers: list[int]
    results: list[ScoreResult]


def routes(service: Service) -> APIRouter:
    """The two endpoints."""
    router = APIRouter()

    @router.post("/v1/moderations", response_model=ModerationResponse)
    async def moderations(request: Request, body: ModerationRequest) -> Any:
        """Classify texts, in OpenAI's schema."""
        case = Case(service, request, "moderations")
        found = await _judged(case, _texts(body.input))
        results = [_result(service.scorer.guard, one) for one in found]
        return ModerationResponse(id=_id("modr", case), model=service.guard_name, results=results)

    @router.post("/v1/score", response_model=ScoreResponse)
    async def score(request: Request, body: ScoreRequest) -> Any:
        """Score prompts: beliefs by layer and, if asked for, by token."""
        case = Case(service, request, "score")
        if (body.input is None) == (body.messages is None):
            raise BadRequest("Give either 'input' or 'messages'.")
        prompts = _texts(body.input) if body.input else prompts_of(body.messages or [])[:1]
        if body.tokens and len(prompts) > 1:
            raise BadRequest("'tokens' is for one prompt at a time.")
        results = [_score(one) for one in await _judged(case, prompts)]
        if body.tokens:
            tokens = await service.scorer.do(prompts[0], lambda g, m: trace(g, m, prompts[0]))
            results[0].tokens = [TokenBelief(text=t.text, belief=t.belief) for t in tokens]
        guard = service.scorer.guard
        return ScoreResponse(
            id=_id("score", case),
            model=service.guard_name,
            threshold=guard.threshold,
            layers=list(guard.readout.layers),
            results=results,
        )

    return router


async def _judged(case: Case, prompts: list[Prompt]) -> list[Judgement]:
    most = case.service.options.max_inputs
    if len(prompts) > most:
        raise BadRequest(f"{len(prompts)} inputs were sent; at most {most} are read at once.")
    found = await case.judge(prompts)
    await case.decided(prompts, found, ["score"] * len(found))
    return found


def _texts(given: str | list[str] | list[Part]) -> list[Prompt]:
    texts = [given] if isinstance(given, str) else [one for one in given if isinstance(one, str)]
    if not texts:  # parts of one message
        texts = [only_text([one for one in given if not isinstance(one, str)])]
    for number, text in enumerate(texts):
        if not text.strip():
            raise BadRequest(f"Input {number} is empty; there is nothing to judge.")
    return [Prompt(text, id=str(number)) for number, text in enumerate(texts)]


def _result(guard: LatentGuard, judgement: Judgement) -> ModerationResult:
    verdict = judgement.verdict
    share = float(expit(abs(guard.platt[0]) * (verdict.score - guard.threshold)))
    own = Scores(
        score=verdict.score,
        probability=verdict.probability,
        threshold=guard.threshold,
        beliefs=verdict.beliefs,
    )
    return ModerationResult(
        flagged=verdict.flagged,
        categories={name: verdict.flagged and name == HARM for name in CATEGORIES},
        category_scores={name: share if name == HARM else 0.0 for name in CATEGORIES},
        category_applied_input_types={n: ["text"] if n == HARM else [] for n in CATEGORIES},
        latentguard=own,
    )


def _score(judgement: Judgement) -> ScoreResult:
    verdict = judgement.verdict
    return ScoreResult(
        score=verdict.score,
        probability=verdict.probability,
        flagged=verdict.flagged,
        beliefs=verdict.beliefs,
        by_layer=judgement.by_layer,
        quadrant=judgement.quadrant,
        tokens=None,
    )


def _id(kind: str, case: Case) -> str:
    return f"{kind}-{case.id.removeprefix('req-')}"
