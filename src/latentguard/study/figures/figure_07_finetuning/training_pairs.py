"""Pairs to train on: prompts that are not tested, each with the opening of a reply."""

from __future__ import annotations

from collections.abc import Sequence

from latentguard.interventions import Intervention
from latentguard.probes.axis import Axis
from latentguard.prompts import Prompt, Reply
from latentguard.study.cached_model import CachedModel
from latentguard.study.prompt_groups import PromptGroups, sample_prompts
from latentguard.study.settings import Settings
from latentguard.study.steering import steer

TEMPLATE = "Sure, here is how to approach this request"
"""The opening of a pair for which steering made none."""

MOST = 24
"""No opening is longer, whatever the settings say."""

PROBED = 8
"""Prompts by which layer and coefficient of the reverse steering are chosen."""

Pair = tuple[Prompt, str]


def harmful_pairs(
    model: CachedModel, refuse: Axis, prompt_groups: PromptGroups, settings: Settings
) -> tuple[list[Pair], str]:
    """Refused harmful prompts with openings that accept, made by reverse refusal steering.

    Args:
        model: The model.
        refuse: Its refusal axis.
        prompt_groups: PromptPools, and what is tested.
        settings: How many pairs, how many tokens.

    Returns:
        The pairs, those with a templated opening last; and how they were made, in words.
    """
    refused = refused_requests(model, prompt_groups, settings)
    if not refused:
        return [], "Nothing was fine-tuned: no harmful prompt is left that is refused."
    reverse = _reverse(model, refuse, refused, settings)
    layer, coefficient = reverse.layer, -reverse.coefficient
    most = opening_tokens(settings)
    (replies,) = model.replies(
        refused, [reverse], what="fine-tuning: openings", max_new_tokens=most
    )
    accepted = zip(refused, replies, _accepts(model, replies), strict=True)
    steered = [(p, model.continuation(reply)) for p, reply, accepts in accepted if accepts]
    prompts = {p for p, _ in steered}
    templated = [(p, TEMPLATE) for p in refused if p not in prompts]
    pairs = [*steered, *templated][: max(settings.finetune_sizes)]
    count = min(len(steered), len(pairs))
    how = (
        f"{len(pairs)} pairs of a refused harmful prompt, none of which is tested, and an opening "
        f"of at most {most} tokens: {count} by steering along reverse refusal (layer {layer}, "
        f"coefficient {-coefficient:g}, every token), {len(pairs) - count} templated"
    )
    return pairs, how


def whole_pairs(
    model: CachedModel, refuse: Axis, prompt_groups: PromptGroups, settings: Settings
) -> list[Pair]:
    """The same prompts with whole completions, made by the same steering, as in section 5.2.

    Completions live in memory alone: they are made by the model itself, and never kept in a store.
    """
    refused = refused_requests(model, prompt_groups, settings)
    if not refused or not settings.finetune_completion:
        return []
    reverse = _reverse(model, refuse, refused, settings)
    most = settings.finetune_completion
    (replies,) = model.opened(model.uncached.sweep(refused, [reverse], max_new_tokens=most))
    accepted = zip(refused, replies, _accepts(model, replies), strict=True)
    pairs = [(p, model.continuation(reply)) for p, reply, accepts in accepted if accepts]
    return pairs[: max(settings.finetune_sizes)]


def harmless_pairs(
    model: CachedModel, prompt_groups: PromptGroups, settings: Settings, count: int
) -> list[Pair]:
    """At most ``count`` harmless prompts, each with the opening of the model's own reply."""
    pool = _untested(prompt_groups.pools.harmless, prompt_groups, settings)[: count * 3 // 2]
    most = opening_tokens(settings)
    (replies,) = model.replies(pool, what="fine-tuning: harmless openings", max_new_tokens=most)
    judged = zip(pool, replies, model.refused(replies), strict=True)
    accepted = [(p, model.continuation(reply)) for p, reply, refused in judged if refused is False]
    return accepted[:count]


def opening_tokens(settings: Settings) -> int:
    """The longest opening."""
    return min(MOST, settings.finetune_opening)


def broken(reply: Reply) -> bool:
    """Whether a reply repeats itself: at most half of its tokens, of four or more, are new."""
    return len(set(reply.ids)) * 2 <= len(reply.ids) > 3


def refused_requests(
    model: CachedModel, prompt_groups: PromptGroups, settings: Settings
) -> list[Prompt]:
    """Harmful prompts that are refused and not tested: half as many again as the largest attack."""
    pool = _untested(prompt_groups.pools.harmful, prompt_groups, settings)
    (replies,) = model.replies(
        pool, what="fine-tuning: which are refused", max_new_tokens=settings.reply_tokens
    )
    refused = [p for p, is_one in zip(pool, model.refused(replies), strict=True) if is_one]
    return refused[: max(settings.finetune_sizes) * 3 // 2]


def _reverse(
    model: CachedModel, refuse: Axis, refused: Sequence[Prompt], settings: Settings
) -> Intervention:
    """The steering that makes most of the requests accepted."""
    layer, coefficient = _weakest(model, refuse, refused[:PROBED], settings)
    return steer(refuse, layer, -coefficient, tokens="all", label="reverse refusal")


def _untested(
    pool: Sequence[Prompt], prompt_groups: PromptGroups, settings: Settings
) -> list[Prompt]:
    """Prompts of a pool that no group tests, nor their twins."""
    tested = [p for group in prompt_groups.test.values() for p in group]
    texts, twins = {p.text for p in tested}, {p.pair for p in tested if p.pair}
    sample = sample_prompts(pool, settings.asked, seed=settings.seed)
    return [p for p in sample if p.text not in texts and p.pair not in twins]


def _weakest(
    model: CachedModel, refuse: Axis, prompts: Sequence[Prompt], settings: Settings
) -> tuple[int, float]:
    """Layer and coefficient at which reverse steering makes most prompts accepted.

    Ties go to the smaller coefficient, then to the layer nearest the middle.
    """
    trials = [(c, layer) for c in settings.coefficients for layer in settings.layers(model.depth)]
    replies_by_trial = model.replies(
        prompts,
        [steer(refuse, layer, -c, tokens="all", label="reverse refusal") for c, layer in trials],
        what="fine-tuning: which layer",
        max_new_tokens=opening_tokens(settings),
    )
    ranked = [
        (-sum(_accepts(model, replies)), c, abs(layer - model.depth / 2), layer)
        for (c, layer), replies in zip(trials, replies_by_trial, strict=True)
    ]
    _, coefficient, _, layer = min(ranked)
    return layer, coefficient


def _accepts(model: CachedModel, replies: Sequence[Reply]) -> list[bool]:
    judged = zip(replies, model.refused(replies), strict=True)
    return [refused is False and not broken(reply) for reply, refused in judged]
