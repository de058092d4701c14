"""Both beliefs of Figure 3 at each token of replies, and of other replies behind the same prompts.

- Random directions of equal norm about the same middles are read beside both axes.
- The reply of another prompt of the same group stands behind each prompt.
- So does the reply of a harmless prompt: what the words of the reply do.

Axis names in shapes: n prompts, t tokens (the first is t_post), a axes (the model's own, then
random ones), b beliefs (of harmfulness, of refusal).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from latentguard.prompts import Group, Prompt, Reply
from latentguard.study.attacks import given_attacks, template_attacks
from latentguard.study.axes import Axes, fit_axes
from latentguard.study.belief_weights import belief_weights, weighted_beliefs
from latentguard.study.cached_model import CachedModel
from latentguard.study.figures.beyond_replies.changes import (
    ACCEPTED,
    ANOTHER,
    HARMLESS,
    JAILBROKEN,
    OF_HARMLESS,
    OWN,
    REFUSED,
    Array,
    Records,
    ReplyGroup,
)
from latentguard.study.prompt_groups import BEHAVING, PromptGroups, sample_prompts
from latentguard.study.settings import Settings
from latentguard.study.steering import random_axis

DRAWS = 100
"""Random directions; they cost no pass of the model."""

PLAIN: Mapping[str, Group] = {
    REFUSED: "refused_harmful",
    ACCEPTED: "accepted_harmful",
    HARMLESS: "accepted_harmless",
}
"""Groups of the study whose replies are read."""

READINGS = 11
"""How often as many replies as a group has are read: of three groups three, of harmless two."""


def collect(model: CachedModel, prompt_groups: PromptGroups, settings: Settings) -> Records:
    """Read both beliefs along the replies of each group, and along those of others."""
    axes = fit_axes(model, prompt_groups, enough=settings.enough)
    weights = _weights(axes)
    replies = {name: _replies(model, prompt_groups, name, settings) for name in PLAIN}
    wrappers = {name: [reply.prompt.text for reply in of] for name, of in replies.items()}
    replies[JAILBROKEN], wrappers[JAILBROKEN] = _jailbroken(model, prompt_groups, settings)
    groups = {
        name: _read_group(
            model,
            name,
            replies=replies,
            wrappers=wrappers[name],
            weights=weights,
            settings=settings,
        )
        for name in (REFUSED, ACCEPTED, JAILBROKEN, HARMLESS)
    }
    return Records(groups, axes.note)


def other_replies(replies: Sequence[Reply]) -> list[Reply | None]:
    """Behind each prompt the next reply that says something else to another request, if any."""
    others: list[Reply | None] = []
    for n, own in enumerate(replies):
        following = (*replies[n + 1 :], *replies[:n])
        differing = (
            replace(one, prompt=own.prompt)
            for one in following
            if one.ids != own.ids and _request(one.prompt) != _request(own.prompt)
        )
        others.append(next(differing, None))
    return others


def _weights(axes: Axes) -> Float[Tensor, "a b l d"]:
    """Of both axes, then of random ones of equal norm."""
    own = [axes.harmful, *([axes.refuse] if axes.refuse else [])]
    draws = [
        [random_axis(axis, draw * len(own) + b) for b, axis in enumerate(own)]
        for draw in range(DRAWS)
    ]
    return torch.stack([torch.stack([*map(belief_weights, one)]) for one in [own, *draws]])


def _request(prompt: Prompt) -> str:
    return prompt.pair or prompt.text


def _replies(
    model: CachedModel, prompt_groups: PromptGroups, name: str, settings: Settings
) -> list[Reply]:
    prompts = prompt_groups.test_prompts(PLAIN[name])
    what = f"along replies: {name}"
    (replies,) = model.replies(prompts, what=what, max_new_tokens=settings.reply_tokens)
    return [reply for reply in replies if _has_tokens(reply)]


def _has_tokens(reply: Reply) -> bool:
    """Whether it has a token besides its end."""
    return len(reply.ids) > int(reply.finished)


def _jailbroken(
    model: CachedModel, prompt_groups: PromptGroups, settings: Settings
) -> tuple[list[Reply], list[str]]:
    """Replies to accepted attacks, given and of our own, and the wrapper of each."""
    harmful, harmless = (prompt_groups.test_prompts(g)[: settings.attacked] for g in BEHAVING)
    accepted: dict[Prompt, tuple[Reply, str]] = {}
    for attack_set in (
        *given_attacks(prompt_groups, harmless, settings.attacked, seed=settings.seed),
        *template_attacks(harmful, harmless),
    ):
        (replies,) = model.replies(
            attack_set.attacked,
            what=f"along replies: {attack_set.kind}",
            max_new_tokens=settings.reply_tokens,
        )
        rows = zip(replies, attack_set.wrappers, model.refused(replies), strict=True)
        accepted |= {
            reply.prompt: (reply, wrapper)
            for reply, wrapper, is_refused in rows
            if is_refused is False and _has_tokens(reply)
        }
    picks = sample_prompts(accepted, settings.test, seed=settings.seed)
    return [accepted[p][0] for p in picks], [accepted[p][1] for p in picks]


def _in_turn(replies: Sequence[Reply], donors: Sequence[Reply]) -> list[Reply | None]:
    """Behind the prompts of some replies those of the donors, in turn."""
    if not donors:
        return [None] * len(replies)
    return [replace(donors[n % len(donors)], prompt=own.prompt) for n, own in enumerate(replies)]


def _read_group(
    model: CachedModel,
    name: str,
    *,
    replies: Mapping[str, Sequence[Reply]],
    wrappers: Sequence[str],
    weights: Float[Tensor, "a b l d"],
    settings: Settings,
) -> ReplyGroup:
    """Read the replies of a group; those behind one prompt one after the other."""
    behind: dict[str, Sequence[Reply | None]] = {
        OWN: replies[name],
        ANOTHER: other_replies(replies[name]),
    }
    if name != HARMLESS:
        behind[OF_HARMLESS] = _in_turn(replies[name], replies[HARMLESS])
    prompts = [reply.prompt for reply in replies[name]]
    shape = (len(prompts), settings.reply_tokens + 1, *weights.shape[:2])
    beliefs = {whose: np.full(shape, np.nan) for whose in behind}
    slots = [
        (whose, row, reply)
        for row in range(len(prompts))
        for whose, of in behind.items()
        if (reply := of[row]) is not None
    ]
    along = model.reply_beliefs(
        [reply for _, _, reply in slots], weights.flatten(0, 1), what=f"along replies: {name}"
    )
    for (whose, row, _), values in zip(slots, along, strict=True):
        beliefs[whose][row, : len(values)] = values.reshape(-1, *shape[2:])
    return ReplyGroup(
        tuple(map(_request, prompts)),
        tuple(wrappers),
        _read_t_inst(model, prompts, weights),
        beliefs,
    )


def _read_t_inst(
    model: CachedModel, prompts: Sequence[Prompt], weights: Float[Tensor, "a b l d"]
) -> Float[Array, "n a b"]:
    shape = (len(prompts), *weights.shape[:2])
    if not prompts:
        return np.empty(shape)
    states = model.states(prompts, what="along replies: t_inst").at("t_inst")
    return weighted_beliefs(states, weights.flatten(0, 1)).double().numpy().reshape(shape)
