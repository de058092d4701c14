"""The page as one file that needs no service, for a saved set of prompts."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from importlib import resources
from pathlib import Path
from typing import Any

from latentguard.guard.latent_guard import LatentGuard
from latentguard.guard.thresholds import Calibration
from latentguard.guard.verdict import Verdict
from latentguard.models.chat_model import ChatModel
from latentguard.prompts import Prompt
from latentguard.serve.drift import Reference
from latentguard.serve.scoring import judge_all, trace

FOLDER = resources.files("latentguard.serve") / "page"


def describe(guard: LatentGuard) -> dict[str, Any]:
    """What the page says of a guard."""
    calibration = guard.part(Calibration)
    band = calibration and calibration.common.review
    return {
        "reading": guard.reading.name,
        "layers": list(guard.probe.layers),
        "axes": [axis.name for axis in guard.axes],
        "threshold": guard.threshold,
        "review": band.threshold if band else None,
        "promise": guard.promise,
    }


def point_of(verdict: Verdict) -> dict[str, Any]:
    """A verdict as a point on the page's plane, without its text."""
    return dict(score=verdict.score, beliefs=verdict.beliefs, flagged=verdict.flagged)


def static_page(
    guard: LatentGuard,
    model: ChatModel,
    prompts: Sequence[Prompt],
    reference: Reference | None = None,
) -> str:
    """Judge prompts and write the page around them: one HTML file, scripts allowed by digest.

    Raises:
        PromptError: if a prompt is empty or too long.
    """
    found = judge_all(guard, model, prompts)
    results = [
        asdict(one.verdict)
        | dict(text=prompt.text, by_layer=one.by_layer)
        | dict(layers=list(guard.probe.layers))
        | dict(tokens=[asdict(token) for token in trace(guard, model, prompt)])
        for prompt, one in zip(prompts, found, strict=True)
    ]
    known = dict(what="saved prompts", points=[point_of(one.verdict) for one in found])
    if reference is not None and reference.points:
        known = dict(what="reference prompts", points=list(reference.points))
    about = dict(model=Path(guard.fingerprint.model).name, policy="none", reference=known)
    return _inlined({"guard": describe(guard) | about, "results": results})


def _inlined(saved: dict[str, Any]) -> str:
    texts = {name: (FOLDER / name).read_text("utf-8") for name in ("page.css", "page.js")}
    policy = (
        f"default-src 'none'; style-src {_source(texts['page.css'])}; "
        f"script-src {_source(texts['page.js'])}; base-uri 'none'; form-action 'none'"
    )
    data = json.dumps(saved).replace("<", "\\u003c")  # so that no text ends the element
    page = (FOLDER / "index.html").read_text("utf-8")
    head = f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
    swaps = {
        '<meta charset="utf-8">': f'<meta charset="utf-8">\n{head}',
        '<link rel="icon" href="/favicon.ico" type="image/svg+xml">\n': "",
        '<link rel="stylesheet" href="/page.css">': f"<style>{texts['page.css']}</style>",
        '<script src="/page.js" defer></script>\n': "",
        "</body>": (
            f'<script type="application/json" id="saved">{data}</script>\n'
            f"<script>{texts['page.js']}</script>\n</body>"
        ),
    }
    for old, new in swaps.items():
        page = page.replace(old, new)
    return page


def _source(text: str) -> str:
    digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    return f"'sha256-{digest}'"
