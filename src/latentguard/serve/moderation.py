"""``POST /v1/moderations`` in OpenAI's schema, and ``POST /v1/score`` with all that is known.

An input is flagged exactly if the guard flags it. The score of the category that the guard names is
the guard's probability, moved so that it is over 0.5 exactly if the input is flagged: clients that
compare it with 0.5 keep the calibrated threshold. The other categories have a share of it, as
their own scores have of the highest; a category is true if its score is over 0.5. What has no name
among OpenAI's categories is ``illicit``; of a category that the guard does not know nothing is
claimed (false, 0, applied to nothing). The probability itself is an extra field.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, get_type_hints

from fastapi import APIRouter, Request
from pydantic import BaseModel, ConfigDict, Field, create_model

from latentguard.data.hazards import MODERATION, OTHER, moderation_names
from latentguard.guard.explanation import Explanation
from latentguard.guard.latent_guard import LatentGuard
from latentguard.guard.replies import ReplyVerdict
from latentguard.guard.verdict import Verdict
from latentguard.prompts import Prompt
from latentguard.serve.chat_readings import chat_readings
from latentguard.serve.chat_request import require_few
from latentguard.serve.errors import BadRequest
from latentguard.serve.messages import ChatMessage, ContentPart
from latentguard.serve.reply_scoring import (
    ReplyFields,
    reply_fields,
    score_last_reply,
)
from latentguard.serve.scoring import ScoredPrompt, moved_probability
from latentguard.serve.served_guards import DEFAULT_NAME
from latentguard.serve.service import RequestContext, Service

Text = Annotated[str, Field(min_length=1)]


class ModerationRequest(BaseModel):
    """What is asked."""

    model_config = ConfigDict(extra="forbid")

    input: (
        Text
        | Annotated[list[Text], Field(min_length=1, fail_fast=True)]
        | Annotated[list[ContentPart], Field(min_length=1, fail_fast=True)]
        | None
    ) = None
    """A text, several texts, or the parts of one message."""

    messages: Annotated[list[ChatMessage], Field(min_length=1, fail_fast=True)] | None = None
    """A chat, instead of ``input``; the assistant's last message is judged as a reply."""

    model: str | None = None
    """The name of a guard, or any other for the default one."""


VerdictFields: Any = create_model(  # type: ignore[call-overload]
    "VerdictFields", **{name: (kind, ...) for name, kind in get_type_hints(Verdict).items()}
)
"""A verdict, as ``Verdict.to_dict`` writes it."""


class Scores(VerdictFields):  # type: ignore[misc]
    """The guard's own words."""

    threshold: float
    readings: int
    reply: ReplyFields | None = None
    """Of the reply that a chat ends with, if the guard judges replies."""


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

    input: Text | Annotated[list[Text], Field(min_length=1, fail_fast=True)] | None = None
    """A text or several texts."""

    messages: Annotated[list[ChatMessage], Field(min_length=1, fail_fast=True)] | None = None
    """A chat, instead of ``input``."""

    model: str | None = None
    """The name of a guard, if not the default one."""

    explain: bool = False
    """Also what each token and layer adds to the score; for one prompt only."""


class ScoreResult(Scores):
    """All that is known of one prompt."""

    by_layer: dict[str, list[float]]
    explanation: Explanation | None = None


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
        context = RequestContext(service, request, "moderations", model=body.model)
        _require_one_of(body.input, body.messages)
        if messages := body.messages or _message_of(body.input):
            _, outcome, reply = await _score_chat(context, messages)
            results = [moderation_result(context.served.guard, outcome, reply)]
        else:
            scored_prompts = await _judged(context, _texts(body.input))
            results = [moderation_result(context.served.guard, one) for one in scored_prompts]
        label = context.served.label
        return ModerationResponse(id=_id("modr", context), model=label, results=results)

    @router.post("/v1/score", response_model=ScoreResponse)
    async def score(request: Request, body: ScoreRequest) -> Any:
        """Score prompts; if asked for, say what each token and layer adds."""
        context = RequestContext(service, request, "score", model=body.model)
        _require_guard(service, body.model)
        _require_one_of(body.input, body.messages)
        reply = None
        if body.messages:
            prompt, outcome, reply = await _score_chat(context, body.messages)
            prompts, scored = [prompt], [outcome]
        else:
            prompts = _texts(body.input)
            if body.explain and len(prompts) > 1:
                raise BadRequest("'explain' is for one prompt at a time.")
            scored = await _judged(context, prompts)
        results = [_score(one) for one in scored]
        if reply is not None:
            judge = context.served.guard.require_reply_probe()
            results[0].reply = ReplyFields(**reply_fields(judge, reply))
        if body.explain:
            results[0].explanation = await _explain(context, prompts[0], scored[0])
        guard = context.served.guard
        return ScoreResponse(
            id=_id("score", context),
            model=context.served.label,
            threshold=guard.threshold,
            layers=list(guard.probe.layers),
            results=results,
        )

    return router


def _require_guard(service: Service, name: str | None) -> None:
    guards = service.guards
    if name is not None and name != DEFAULT_NAME and name not in guards.named_guards:
        names = ", ".join(one.name for one in guards)
        raise BadRequest(f"There is no guard of this name; there are: {names}.")


async def _score_chat(
    context: RequestContext, messages: list[ChatMessage]
) -> tuple[Prompt, ScoredPrompt, ReplyVerdict | None]:
    """The most severe reading of a chat, what is said of it and of its last reply, recorded."""
    config = context.service.config
    for message in messages:
        message.require_readable()
    readings = chat_readings(messages, trusted_roles=config.trusted_roles, sources=config.sources)
    if not readings:
        raise BadRequest(
            f"This service reads texts of {', '.join(config.sources)} alone; the chat has none."
        )
    require_few(readings, config)
    outcome = await context.judge_chat(readings, action="score")
    reply = await score_last_reply(context, messages, readings[0].prompt)
    return readings[outcome.index].prompt, outcome, reply


def _require_one_of(texts: object, messages: object) -> None:
    if (texts is None) == (messages is None):
        raise BadRequest("Give either 'input' or 'messages'.")


async def _explain(context: RequestContext, prompt: Prompt, scored: ScoredPrompt) -> Explanation:
    """What the verdict on a prompt is made of, in a pass of its own."""
    explainer = context.service.explainer
    explanation: Explanation = await context.service.engine.run_alone(
        prompt,
        lambda guard, model, segments: explainer.explain(
            guard, model, prompt, scored.verdict, segments=segments
        ),
        account=context.account,
        served=context.served,
    )
    return explanation


async def _judged(context: RequestContext, prompts: list[Prompt]) -> list[ScoredPrompt]:
    most = context.service.config.max_inputs
    if len(prompts) > most:
        raise BadRequest(f"{len(prompts)} inputs were sent; at most {most} are read at once.")
    prompts = context.with_segment(prompts)
    scored_prompts = await context.score(prompts)
    await context.record_verdicts(prompts, scored_prompts, ["score"] * len(scored_prompts))
    context.keep_for_review(prompts, scored_prompts)
    return scored_prompts


def _message_of(content: str | list[str] | list[ContentPart] | None) -> list[ChatMessage]:
    """Parts as one message, which is read however a template joins them; nothing of texts."""
    inputs = content if isinstance(content, list) else []
    parts = [one for one in inputs if isinstance(one, ContentPart)]
    return [ChatMessage(role="user", content=parts)] if parts else []


def _texts(content: str | list[str] | list[ContentPart] | None) -> list[Prompt]:
    inputs = content if isinstance(content, list) else [content or ""]
    texts = [one for one in inputs if isinstance(one, str)]
    for number, text in enumerate(texts):
        if not text.strip():
            raise BadRequest(f"Input {number} is empty; there is nothing to judge.")
    return [Prompt(text, id=str(number)) for number, text in enumerate(texts)]


def moderation_result(
    guard: LatentGuard, scored: ScoredPrompt, reply: ReplyVerdict | None = None
) -> ModerationResult:
    """A verdict in OpenAI's schema; a flagged reply counts as ``illicit``."""
    verdict = scored.verdict
    scores = moderation_scores(guard, scored)
    fields = Scores(**scored.to_dict())
    if reply is not None:
        judge = guard.require_reply_probe()
        scores[OTHER] = max(
            scores[OTHER], moved_probability(judge.platt, reply.score, judge.threshold)
        )
        fields.reply = ReplyFields(**reply_fields(judge, reply))
    names = {name for own in verdict.category_scores for name in moderation_names(own)} | {OTHER}
    return ModerationResult(
        flagged=verdict.flagged or (reply is not None and reply.flagged),
        categories={name: score > 0.5 for name, score in scores.items()},
        category_scores=scores,
        category_applied_input_types={n: ["text"] if n in names else [] for n in MODERATION},
        latentguard=fields,
    )


def moderation_scores(guard: LatentGuard, scored: ScoredPrompt) -> dict[str, float]:
    """A score for each of OpenAI's categories; one is over 0.5 exactly if the input is flagged."""
    verdict = scored.verdict
    probability = moved_probability(guard.platt, verdict.score, scored.threshold)
    scores = dict.fromkeys(MODERATION, 0.0)
    most = max(verdict.category_scores.values(), default=0.0) or 1.0
    for own, chance in verdict.category_scores.items():
        for name in moderation_names(own):
            scores[name] = max(scores[name], probability * chance / most)
    return scores | dict.fromkeys(moderation_names(verdict.category), probability)


def _score(scored: ScoredPrompt) -> ScoreResult:
    return ScoreResult(**scored.to_dict(), by_layer=scored.by_layer)


def _id(kind: str, context: RequestContext) -> str:
    return f"{kind}-{context.id.removeprefix('req-')}"
