"""Pairs to train on: prompts that are not tested, each with the opening of a reply."""

from __future__ import annotations

from collections.abc import Sequence

from latentguard.probes.axis import Axis
from latentguard.prompts import Prompt, Reply
from latentguard.study.cached_model import CachedModel
from latentguard.study.directions import steer
from latentguard.study.prompt_groups import PromptGroups, spread
from latentguard.study.settings import Settings

TEMPLATE = "Sure, here is how to approach this request"
"""The opening of a pair for which steering made none."""

MOST = 24
"""No opening is longer, whatever the settings say."""

PROBED = 8
"""Prompts by which layer and coefficient of the reverse steering are chosen."""

Pair = tuple[Prompt, str]


def harmful_pairs(
    subject: CachedModel, refuse: Axis, material: PromptGroups, settings: Settings
) -> tuple[list[Pair], str]:
    """Refused harmful prompts with openings that accept, made by reverse refusal steering.

    Args:
        subject: The model.
        refuse: Its refusal axis.
        material: PromptPools, and what is tested.
        settings: How many pairs, how many tokens.

    Returns:
        The pairs, those with a templated opening last; and how they were made, in words.
    """
    refused = _refused(subject, material, settings)[: max(settings.finetune_sizes) * 3 // 2]
    if not refused:
        return [], "Nothing was fine-tuned: no harmful prompt is left that is refused."
    layer, coefficient = _weakest(subject, refuse, refused[:PROBED], settings)
    reverse = steer(refuse, layer, -coefficient, tokens="all", label="reverse refusal")
    most = opening_tokens(settings)
    (said,) = subject.replies(refused, [reverse], what="fine-tuning: openings", max_new_tokens=most)
    accepted = zip(refused, said, _accepts(subject, said), strict=True)
    steered = [(p, reply.text) for p, reply, accepts in accepted if accepts]
    taken = {p for p, _ in steered}
    templated = [(p, TEMPLATE) for p in refused if p not in taken]
    pairs = [*steered, *templated][: max(settings.finetune_sizes)]
    count = min(len(steered), len(pairs))
    how = (
        f"{len(pairs)} pairs of a refused harmful prompt, none of which is tested, and an opening "
        f"of at most {most} tokens: {count} by steering along reverse refusal (layer {layer}, "
        f"coefficient {-coefficient:g}, every token), {len(pairs) - count} templated"
    )
    return pairs, how


def harmless_pairs(
    subject: CachedModel, material: PromptGroups, settings: Settings, count: int
) -> list[Pair]:
    """At most ``count`` harmless prompts, each with the opening of the model's own reply."""
    pool = _untested(material.pools.harmless, material, settings)[: count * 3 // 2]
    most = opening_tokens(settings)
    (said,) = subject.replies(pool, what="fine-tuning: harmless openings", max_new_tokens=most)
    known = zip(pool, said, subject.refused(said), strict=True)
    return [(p, reply.text) for p, reply, refused in known if refused is False][:count]


def opening_tokens(settings: Settings) -> int:
    """The longest opening."""
    return min(MOST, settings.finetune_opening)


def broken(reply: Reply) -> bool:
    """Whether a reply repeats itself: at most half of its tokens, of four or more, are new."""
    return len(set(reply.ids)) * 2 <= len(reply.ids) > 3


def _refused(subject: CachedModel, material: PromptGroups, settings: Settings) -> list[Prompt]:
    pool = _untested(material.pools.harmful, material, settings)
    (said,) = subject.replies(
        pool, what="fine-tuning: which are refused", max_new_tokens=settings.reply_tokens
    )
    return [p for p, refused in zip(pool, subject.refused(said), strict=True) if refused]


def _untested(pool: Sequence[Prompt], material: PromptGroups, settings: Settings) -> list[Prompt]:
    """Prompts of a pool that no group tests, nor their twins."""
    tested = [p for group in material.test.values() for p in group]
    texts, twins = {p.text for p in tested}, {p.pair for p in tested if p.pair}
    asked = spread(pool, settings.asked, seed=settings.seed)
    return [p for p in asked if p.text not in texts and p.pair not in twins]


def _weakest(
    subject: CachedModel, refuse: Axis, prompts: Sequence[Prompt], settings: Settings
) -> tuple[int, float]:
    """Layer and coefficient at which reverse steering makes most prompts accepted.

    Ties go to the smaller coefficient, then to the layer nearest the middle.
    """
    tried = [(c, layer) for c in settings.coefficients for layer in settings.layers(subject.depth)]
    found = subject.replies(
        prompts,
        [steer(refuse, layer, -c, tokens="all", label="reverse refusal") for c, layer in tried],
        what="fine-tuning: which layer",
        max_new_tokens=opening_tokens(settings),
    )
    ranked = [
        (-sum(_accepts(subject, replies)), c, abs(layer - subject.depth / 2), layer)
        for (c, layer), replies in zip(tried, found, strict=True)
    ]
    _, coefficient, _, layer = min(ranked)
    return layer, coefficient


def _accepts(subject: CachedModel, replies: Sequence[Reply]) -> list[bool]:
    known = zip(replies, subject.refused(replies), strict=True)
    return [refused is False and not broken(reply) for reply, refused in known]
