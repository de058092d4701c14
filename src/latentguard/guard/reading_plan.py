"""One way to read a prompt: plan what is read, score it in one flat call, combine the scores.

1. ``plan`` lists the variants of a prompt: as it stands, each decoded text, and the chunks of each
   if it is long or a chat.
2. A backend scores a flat list of variants: transformers, vLLM and the service differ only here.
   ``score_plans`` makes one lazy stream of the variants of many prompts, which share batches.
3. ``combine`` takes the most severe version.

So nothing that is flagged as it stands is missed because another version was read as well, and a
prompt that is short and does not look obfuscated costs one pass.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby, islice

from jaxtyping import Float
from torch import Tensor

from latentguard.guard.chunking import Chunk, Chunking
from latentguard.guard.verdict import Evidence, Verdict
from latentguard.prompts import Message, Prompt
from latentguard.states import Reading
from latentguard.text.deobfuscation import deobfuscate


@dataclass(frozen=True)
class Variant:
    """One text that is read for a prompt."""

    prompt: Prompt
    """Exactly what the model is given."""

    version: int = 0
    """Which version of the prompt: 0 is as it stands, then come the decoded texts."""

    obfuscations: tuple[str, ...] = ()
    """What was decoded; empty if it is the prompt as it stands."""

    chunk: Chunk | None = None
    """Which part of the version it is; None if it is the whole, which comes before its chunks."""


@dataclass(frozen=True)
class CategoryScores:
    """How near one text is to each category."""

    scores: Mapping[str, float]
    """Probability of each category."""

    pack: str | None = None
    """The pack with the highest score; None if the guard has none."""

    pack_score: float | None = None
    """Its score, in the unit of the guard's own."""


@dataclass(frozen=True, eq=False)
class VariantScore:
    """What a guard measures on one variant."""

    score: float
    """The greatest of the probe's score and those of the packs."""

    beliefs: Mapping[str, float]
    """Delta of each axis."""

    layer_beliefs: Mapping[str, Float[Tensor, "l"]] = field(default_factory=dict)
    """The belief of each axis by layer; none where a backend lets no states out."""

    categories: CategoryScores | None = None
    """None where a guard knows no categories, or a backend lets no states out."""


@dataclass(frozen=True)
class ScoredPlan:
    """A prompt with all that was read for it."""

    prompt: Prompt
    """As it was asked."""

    variants: Sequence[Variant]
    """What was read."""

    scores: Sequence[VariantScore]
    """Of each variant."""


@dataclass(frozen=True)
class Version:
    """The prompt as it stands or one decoded text, with what its chunks show."""

    obfuscations: tuple[str, ...]
    """What was decoded."""

    whole: VariantScore
    """Of the whole."""

    evidence: Sequence[Evidence]
    """By turn, in standard deviations; empty if the version is short."""


@dataclass(frozen=True)
class Outcome:
    """The verdict on a prompt, and what was measured on the version that decided."""

    verdict: Verdict
    """What the guard says."""

    whole: VariantScore
    """Of the version that decided, read whole."""


def plan(
    prompt: Prompt, *, reading: Reading, chunking: Chunking | None = None, decode: bool = False
) -> list[Variant]:
    """What is read of a prompt, each version before the next, the whole before its chunks.

    Args:
        prompt: As it was asked.
        reading: How each text is prepared.
        chunking: Cuts long prompts and chats; None reads everything whole.
        decode: Whether text that looks obfuscated is also read decoded.

    Raises:
        PromptError: if a prompt that is to be cut says nothing.
    """
    versions = [(prompt, ()), *(decoded_variants(prompt) if decode else ())]
    variants = list[Variant]()
    for number, (version, names) in enumerate(versions):
        variants.append(Variant(reading.prepare(version), number, names))
        if chunking is not None and chunking.applies_to(version):
            for chunk in chunking.chunks(version):
                text = reading.prepare(Prompt(chunk.text, id=version.id))
                variants.append(Variant(text, number, names, chunk))
    return variants


def score_plans(
    prompts: Iterable[Prompt],
    plan_prompt: Callable[[Prompt], list[Variant]],
    score: Callable[[Iterator[Prompt]], Iterator[VariantScore]],
) -> Iterator[ScoredPlan]:
    """Plan each prompt, score all variants as one lazy stream, and yield them prompt by prompt.

    Args:
        prompts: Consumed lazily.
        plan_prompt: What is read of a prompt.
        score: Yields one score for each text, in order.
    """
    planned = deque[tuple[Prompt, list[Variant]]]()

    def texts() -> Iterator[Prompt]:
        for prompt in prompts:
            variants = plan_prompt(prompt)
            planned.append((prompt, variants))
            yield from (variant.prompt for variant in variants)

    scores = score(texts())
    for first in scores:
        prompt, variants = planned.popleft()
        yield ScoredPlan(prompt, variants, [first, *islice(scores, len(variants) - 1)])


def versions_of(scored: ScoredPlan, chunking: Chunking | None) -> Iterator[Version]:
    """Each version of a prompt with the evidence of its chunks.

    Raises:
        GuardError: if the score of a chunk is not finite.
    """
    rows = zip(scored.variants, scored.scores, strict=True)
    for _, own in groupby(rows, key=lambda row: row[0].version):
        (variant, whole), *parts = own
        evidence = list[Evidence]()
        if chunking is not None and parts:
            chunks = [part.chunk for part, _ in parts if part.chunk is not None]
            scores = [score.score for _, score in parts]
            evidence = chunking.find_evidence(chunks, whole.score, scores)
        yield Version(variant.obfuscations, whole, evidence)


def combine(
    scored: ScoredPlan,
    chunking: Chunking | None,
    decide: Callable[[Prompt, Version], Verdict],
    *,
    tie: float = 0.0,
) -> Outcome:
    """The verdict on the most severe version of a prompt; the first of those that are alike.

    Args:
        scored: What was read.
        chunking: What the prompt was cut by.
        decide: The verdict on one version.
        tie: Scores that differ by no more are alike. Rounding depends on the batch, and must not
            choose between a prompt as it stands and its decoded text.

    Raises:
        GuardError: if a number is not finite.
    """
    outcomes = [
        Outcome(
            _with_obfuscations(scored.prompt, version, decide(scored.prompt, version)),
            version.whole,
        )
        for version in versions_of(scored, chunking)
    ]
    worst = outcomes[0]
    for other in outcomes[1:]:
        if other.verdict.is_more_severe_than(worst.verdict, tie=tie):
            worst = other
    return worst


def _with_obfuscations(prompt: Prompt, version: Version, verdict: Verdict) -> Verdict:
    """The verdict on a decoded text names what was decoded.

    Its evidence names whole turns: places in a decoded text are not those of the text.
    """
    if not version.obfuscations:
        return verdict
    turns = [*(turn.content for turn in prompt.history), prompt.text]
    evidence = tuple(replace(one, start=0, end=len(turns[one.message])) for one in verdict.evidence)
    return replace(verdict, obfuscations=version.obfuscations, evidence=evidence)


def decoded_variants(prompt: Prompt) -> list[tuple[Prompt, tuple[str, ...]]]:
    """The prompt with all that the user says decoded, and what was decoded, for each decoded text.

    Where several turns are obfuscated, their first decoded texts go together, and so on.
    """
    turns = [*prompt.history, Message("user", prompt.text)]
    decoded = [
        list(deobfuscate(turn.content).items()) if turn.role == "user" else [] for turn in turns
    ]
    return [_decoded(prompt, turns, decoded, at) for at in range(max(map(len, decoded)))]


def _decoded(
    prompt: Prompt,
    turns: Sequence[Message],
    decoded: Sequence[Sequence[tuple[str, tuple[str, ...]]]],
    at: int,
) -> tuple[Prompt, tuple[str, ...]]:
    names = dict[str, None]()
    messages = list[Message]()
    for turn, texts in zip(turns, decoded, strict=True):
        text, undone = texts[min(at, len(texts) - 1)] if texts else (turn.content, ())
        names |= dict.fromkeys(undone)
        messages.append(replace(turn, content=text))
    version = replace(
        prompt,
        text=messages[-1].content,
        history=tuple(messages[:-1]),
        decoded_from_length=len(prompt.text),
    )
    return version, tuple(names)
