"""What a model says and believes while it is attacked (section 4)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial

import numpy as np
from numpy.typing import NDArray

from latentguard.prompts import Prompt
from latentguard.study.attacks import (
    TARGET,
    AttackSet,
    given_attacks,
    outside,
    suffix_attacks,
    template_attacks,
    with_matched,
)
from latentguard.study.axes import Axes, belief, fit_axes
from latentguard.study.cached_model import CachedModel
from latentguard.study.form_controls import form_scores, matched_pairs, seal, sealed_groups
from latentguard.study.prompt_groups import BEHAVING, PromptGroups
from latentguard.study.settings import Settings

Floats = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Beliefs:
    """What a model believes of some prompts."""

    prompts: tuple[Prompt, ...]
    """The n prompts."""

    harmful: Floats
    """Delta_harmful at t_inst (equation 3), [n]."""

    refuse: Floats | None
    """Delta_refuse at t_post (equation 4), [n]; None if there is no refusal axis."""

    wrappers: tuple[str, ...] = ()
    """The wrapper of each, [n]: the same for attacks of one template; none if not attacked."""

    @property
    def requests(self) -> list[str]:
        """What each asks for, [n]: the same for attacks on one request."""
        return [p.pair or p.text for p in self.prompts]


@dataclass(frozen=True, eq=False)
class Attack:
    """Attacks of one kind, asked."""

    attack_set: AttackSet
    """The prompts."""

    beliefs: Beliefs
    """Of those attacked, [n]."""

    accepted: tuple[bool | None, ...]
    """Whether each succeeds, [n]; None where the reply is empty or cut."""

    wrapped: Floats
    """Delta_harmful of harmless instructions in the wrappers, [m]."""

    bare: Floats
    """Delta_harmful of the same without, [m]."""

    sealed: Floats = field(default_factory=lambda: np.zeros(0))
    """Delta_harmful of those attacked by the sealed reading, [n]; empty if it was not read."""

    matched: Floats = field(default_factory=lambda: np.zeros(0))
    """Delta_harmful of form-matched prompts in the wrappers, [p]."""

    matched_form: Floats = field(default_factory=lambda: np.zeros(0))
    """What form alone says of them, [p]."""

    @property
    def known(self) -> Floats:
        """Delta_harmful of the attacked prompts whose wrapper is known, [k]."""
        return self.beliefs.harmful[list(self.attack_set.known)]


@dataclass(frozen=True)
class Readers:
    """How attacks are read."""

    axes: Axes
    """The paper's."""

    sealed: Axes
    """The same with uniform endings."""

    fitted: tuple[Prompt, ...]
    """Labelled prompts behind the centroids, that form alone is learnt from."""


def ask(model: CachedModel, readers: Readers, attack_set: AttackSet, settings: Settings) -> Attack:
    """Ask what is attacked, unsteered; read the beliefs of it and of its controls."""
    what = f"Figure 6: {attack_set.kind}"
    (replies,) = model.replies(attack_set.attacked, what=what, max_new_tokens=settings.reply_tokens)
    accepted = tuple(
        None if is_refused is None else not is_refused for is_refused in model.refused(replies)
    )
    attacked, wrapped, bare, matched = (
        read_beliefs(model, readers.axes, side, what=what)
        for side in (attack_set.attacked, attack_set.wrapped, attack_set.bare, attack_set.matched)
    )
    sealed = read_beliefs(model, readers.sealed, seal(attack_set.attacked), what=f"{what}, sealed")
    by_form = form_scores(readers.fitted, matched.prompts) if matched.prompts else np.zeros(0)
    return Attack(
        attack_set,
        replace(attacked, wrappers=tuple(attack_set.wrappers)),
        accepted,
        wrapped.harmful,
        bare.harmful,
        sealed.harmful,
        matched.harmful,
        by_form,
    )


def read_beliefs(
    model: CachedModel, axes: Axes, prompts: Sequence[Prompt], *, what: str
) -> Beliefs:
    """Both beliefs of some prompts, over the layers 1 to L."""
    if not prompts:
        return Beliefs((), np.zeros(0), np.zeros(0) if axes.refuse else None)
    states = model.states(prompts, what=what)
    harmful = belief(axes.harmful, states.at("t_inst"))
    refuse = belief(axes.refuse, states.at("t_post")) if axes.refuse else None
    return Beliefs(tuple(prompts), harmful, refuse)


def search_suffixes(
    model: CachedModel, prompts: Sequence[Prompt], *, steps: int, seed: int
) -> list[str]:
    """A GCG suffix for each prompt; each is kept as it is found. None without the tool."""
    search = model.tools.suffix
    if search is None:
        return []
    advance = model.step("Figure 6: GCG suffixes", len(prompts))
    suffixes = []
    for prompt in prompts:
        history = [asdict(turn) for turn in prompt.history]
        compute = partial(search, prompt, TARGET, steps=steps, seed=seed)
        parts = ["gcg", prompt.text, history, TARGET, steps, seed]
        suffixes.append(str(model.cached(parts, compute)))
        advance(1)
    return suffixes


def pooled(attacks: Iterable[Attack], which: Sequence[bool | None] = (True,)) -> Beliefs:
    """Attacks of some kinds together: the accepted ones, or others (``Attack.accepted``)."""
    rows = [
        (attack.beliefs, row)
        for attack in attacks
        for row, accepted in enumerate(attack.accepted)
        if accepted in which
    ]
    refuse = [float(one.refuse[row]) for one, row in rows if one.refuse is not None]
    return Beliefs(
        tuple(one.prompts[row] for one, row in rows),
        np.array([one.harmful[row] for one, row in rows]),
        np.array(refuse) if len(refuse) == len(rows) else None,
        tuple(one.wrappers[row] for one, row in rows if one.wrappers),
    )


@dataclass(frozen=True, eq=False)
class Records:
    """All attacks and what they are compared with."""

    attacks: tuple[Attack, ...]
    """By kind."""

    refused: Beliefs
    """Refused harmful test prompts, unattacked."""

    harmless: Beliefs
    """Accepted harmless test prompts."""

    left_out: int
    """Given attacks on requests that are in a centroid; they are not asked."""

    note: str
    """What the centroids are made of."""

    missing: tuple[str, ...] = ()
    """What was not done, and why."""


def collect(model: CachedModel, prompt_groups: PromptGroups, settings: Settings) -> Records:
    """Ask every attacked prompt, unsteered; read the beliefs of these and of their controls."""
    readers = _readers(model, prompt_groups, settings)
    axes = readers.axes
    tested = [prompt_groups.test_prompts(side)[: settings.test] for side in BEHAVING]
    refused, others = (read_beliefs(model, axes, p, what="Figure 6: groups") for p in tested)
    harmful, harmless = (prompts[: settings.attacked] for prompts in tested)
    seed, few = settings.seed, harmful[: settings.suffixes]
    suffixes = search_suffixes(model, few, steps=settings.suffix_steps, seed=seed)
    attack_sets = [
        *given_attacks(prompt_groups, harmless, settings.attacked, seed=seed),
        *template_attacks(harmful, harmless),
        suffix_attacks(few[: len(suffixes)], suffixes, harmless),
    ]
    pairs = matched_pairs(prompt_groups, settings.attacked)
    attacks = tuple(
        ask(model, readers, with_matched(attack_set, pairs), settings)
        for attack_set in attack_sets
        if attack_set.attacked
    )
    left_out = len(prompt_groups.pools.jailbreaks) - len(outside(prompt_groups))
    missing = tuple(_missing(model, prompt_groups, settings))
    return Records(attacks, refused, others, left_out, axes.note, missing)


def _readers(model: CachedModel, prompt_groups: PromptGroups, settings: Settings) -> Readers:
    enough = settings.enough
    axes = fit_axes(model, prompt_groups, enough=enough)
    sealed = fit_axes(model, sealed_groups(prompt_groups), enough=enough)
    fitted = tuple(p for group in prompt_groups.fit.values() for p in group)
    return Readers(axes, sealed, fitted)


def _missing(model: CachedModel, prompt_groups: PromptGroups, settings: Settings) -> Iterator[str]:
    if not prompt_groups.pools.jailbreaks:
        yield (
            "No attacks were given (pool jailbreaks): only attacks made here are shown, and claim "
            "7 is decided by GCG suffixes alone."
        )
    if settings.suffixes and model.tools.suffix is None:
        yield "No GCG suffix was searched: nanogcg is not at hand (extra 'attacks')."
