"""The page at ``/``, and what it asks of the service."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import resources
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from latentguard.guard.latent_guard import LatentGuard
from latentguard.serve.served_guards import ServedGuard
from latentguard.serve.service import Service
from latentguard.serve.upstream import UpstreamClient

FOLDER = resources.files("latentguard.serve") / "page"

MAX_SCORES = 2000
"""Most scores that the page is sent."""

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
FILES = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/page.css": ("page.css", "text/css; charset=utf-8"),
    "/page.js": ("page.js", "text/javascript; charset=utf-8"),
    "/figures.js": ("figures.js", "text/javascript; charset=utf-8"),
    "/favicon.ico": ("icon.svg", "image/svg+xml"),
}


def routes(service: Service, upstream: UpstreamClient | None) -> APIRouter:
    """The page's files, ``/v1/guard`` and ``/v1/models``."""
    router = APIRouter()
    for path, (name, kind) in FILES.items():
        file = _file((FOLDER / name).read_bytes(), kind)
        router.add_api_route(path, file, include_in_schema=False)

    @router.get("/v1/guard")
    async def guard() -> dict[str, Any]:
        """What the guard is and promises, and known scores to compare with."""
        guards = service.guards
        names: dict[str, Any] = {"name": guards.default.label, "model": service.config.name}
        names["guards"] = [one.name for one in guards]
        config = service.config
        reference = _reference(service)
        about = {"policy": config.policy, "on_review": config.on_review, "reference": reference}
        return names | describe(guards.default.guard) | about | _shadow(guards.default)

    @router.get("/v1/models", response_model=None)
    async def models(request: Request) -> dict[str, Any] | Response:
        """The upstream's models, or the guard's own one, in OpenAI's form."""
        if upstream is not None:
            return await upstream.models(request)
        model = dict(id=service.config.name, object="model", created=0, owned_by="latentguard")
        return {"object": "list", "data": [model]}

    return router


def _reference(service: Service) -> dict[str, Any]:
    """Scores to compare with: of given verdicts, the calibration or the canaries; no texts."""
    reference = service.reference
    if reference.points:
        scores = [point["score"] for point in reference.points]
        return {"what": "reference prompts", "scores": scores, "points": reference.points}
    if reference.scores:
        sample = _evenly(reference.scores, MAX_SCORES)
        return {"what": "harmless calibration prompts", "scores": sample, "points": []}
    scores = [canary.score for canary in service.engine.guard.canaries]
    return {"what": "canary prompts", "scores": scores, "points": []}


def _shadow(served: ServedGuard) -> dict[str, Any]:
    """What a guard and its shadow decided; nothing without a shadow."""
    if served.shadow is None:
        return {}
    names = {"guard": served.shadow.digest[:12], "decided_by": served.digest[:12]}
    return {"shadow": names | served.comparison.to_dict()}


def _evenly(scores: Sequence[float], most: int) -> list[float]:
    """At most so many scores, evenly spaced among the sorted ones."""
    ordered = sorted(scores)
    if len(ordered) <= most:
        return ordered
    last = len(ordered) - 1
    return [ordered[round(n * last / (most - 1))] for n in range(most)]


def _file(content: bytes, kind: str) -> Any:
    async def file() -> Response:
        return Response(content, media_type=kind, headers={"content-security-policy": POLICY})

    return file


def describe(guard: LatentGuard) -> dict[str, Any]:
    """What the page shows of a guard."""
    band = guard.thresholds.common.review if guard.thresholds else None
    return {
        "reading": guard.reading.name,
        "layers": list(guard.probe.layers),
        "axes": [axis.name for axis in guard.axes],
        "threshold": guard.threshold,
        "review": band.threshold if band else None,
        "promise": guard.promise,
    }
