"""Scores inside vLLM against those on transformers, under each condition that could part them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from latentguard.data.builtin import load_contrast
from latentguard.guard.latent_guard import LatentGuard
from latentguard.guard.verdict import Verdict
from latentguard.integrations.vllm.backend import VllmModel
from latentguard.prompts import Prompt
from latentguard.report.document import Table

CHUNK = 128
"""Tokens of one step of the engine; a long prompt takes several."""

ENGINE = dict(max_num_batched_tokens=CHUNK, max_num_seqs=32, block_size=32, enforce_eager=True)


SMALL = dict(num_gpu_blocks_override=96, max_model_len=1024, gpu_memory_utilization=0.3)
"""A cache so small that a full batch does not fit, and requests are preempted."""


def material(n: int) -> list[Prompt]:
    """Prompts of the built-in test split: half of them single, half joined and so long."""
    texts = [p.text for p in load_contrast("test")]
    longer = [" ".join(texts[k : k + 12]) for k in range(n // 2)]
    return [Prompt(text, id=str(k)) for k, text in enumerate([*texts[: n - n // 2], *longer])]


@dataclass(frozen=True)
class Difference:
    """How far apart two backends are on some prompts."""

    condition: str
    n: int
    score: float
    """Largest difference of a score, in its own unit."""

    spread: float
    """The same in standard deviations of the training scores."""

    belief: float
    """Largest difference of a belief."""

    flips: int
    """Verdicts that differ."""


def compare(
    guard: LatentGuard,
    reference: Sequence[Verdict],
    model: VllmModel,
    prompts: Sequence[Prompt],
    *,
    spare: Callable[[], int] | None = None,
) -> list[Difference]:
    """Measure each condition.

    Args:
        guard: The guard of the engine.
        reference: Its verdicts on transformers, one for each prompt.
        model: The engine; its cache is emptied first.
        prompts: Short ones, and some that are longer than a chunk.
        spare: Counts preemptions so far; the last condition is measured if it is given.
    """
    texts = [(p, v) for p, v in zip(prompts, reference, strict=True)]
    lengths = [len(layout.ids) for layout in model.chat(prompts)]
    sides = {
        "short": [pair for pair, n in zip(texts, lengths, strict=True) if n <= CHUNK],
        "long": [pair for pair, n in zip(texts, lengths, strict=True) if n > CHUNK],
    }
    differences = []
    for name, pairs in sides.items():
        for batch in (1, 32):
            model.engine.reset_prefix_cache()
            for cached in ("uncached", "cached"):
                condition = f"{name}, batch {batch}, {cached}"
                differences.append(_measure(condition, guard, model, pairs, batch))
    if spare is not None:
        model.engine.reset_prefix_cache()
        before = spare()
        difference = _measure("", guard, model, texts, len(texts), max_tokens=48)
        condition = f"all at once, {spare() - before} preemptions"
        differences.append(Difference(**{**vars(difference), "condition": condition}))
    return differences


def table(differences: Sequence[Difference]) -> Table:
    """The differences as a table."""
    columns = ("condition", "n", "max score diff", "in spreads", "max belief diff", "flips")
    rows = [
        (d.condition, d.n, f"{d.score:.2e}", f"{d.spread:.2e}", f"{d.belief:.2e}", d.flips)
        for d in differences
    ]
    return Table("vLLM against transformers", columns, tuple(rows))


def preemptions(model: VllmModel) -> int:
    """How often the engine has preempted a request."""
    counts = [m.value for m in model.engine.get_metrics() if m.name == "vllm:num_preemptions"]
    return int(sum(counts))


def _measure(
    condition: str,
    guard: LatentGuard,
    model: VllmModel,
    pairs: Sequence[tuple[Prompt, Verdict]],
    batch: int,
    *,
    max_tokens: int = 1,
) -> Difference:
    verdicts = list[Verdict]()
    for start in range(0, len(pairs), batch):
        prompts = [prompt for prompt, _ in pairs[start : start + batch]]
        verdicts += model.verdicts(guard, prompts, max_tokens=max_tokens)
    both = [(a, b) for (_, a), b in zip(pairs, verdicts, strict=True)]
    score = max((abs(a.score - b.score) for a, b in both), default=0.0)
    belief = max(
        (abs(a.beliefs[k] - b.beliefs[k]) for a, b in both for k in a.beliefs), default=0.0
    )
    flips = sum(a.flagged != b.flagged for a, b in both)
    return Difference(condition, len(both), score, score / guard.spread, belief, flips)
