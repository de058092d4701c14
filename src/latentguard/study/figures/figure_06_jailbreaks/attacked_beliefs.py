"""What a model says and believes while it is attacked (section 4)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from latentguard.prompts import Prompt
from latentguard.study.attacks import TARGET, Wave
from latentguard.study.cached_model import CachedModel
from latentguard.study.directions import Axes, belief
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

    @property
    def requests(self) -> list[str]:
        """What each asks for, [n]: the same for attacks on one request."""
        return [p.pair or p.text for p in self.prompts]


@dataclass(frozen=True, eq=False)
class Attack:
    """Attacks of one kind, asked."""

    wave: Wave
    """The prompts."""

    beliefs: Beliefs
    """Of those attacked, [n]."""

    accepted: tuple[bool | None, ...]
    """Whether each succeeds, [n]; None where the reply is empty or cut."""

    wrapped: Floats
    """Delta_harmful of harmless instructions in the wrappers, [m]."""

    bare: Floats
    """Delta_harmful of the same without, [m]."""

    @property
    def known(self) -> Floats:
        """Delta_harmful of the attacked prompts whose wrapper is known, [k]."""
        return self.beliefs.harmful[list(self.wave.known)]


def ask(subject: CachedModel, axes: Axes, wave: Wave, settings: Settings) -> Attack:
    """Ask what is attacked, unsteered; read the beliefs of it and of its controls."""
    what = f"Figure 6: {wave.kind}"
    (replies,) = subject.replies(wave.attacked, what=what, max_new_tokens=settings.reply_tokens)
    accepted = tuple(None if said is None else not said for said in subject.refused(replies))
    sides = (wave.attacked, wave.wrapped, wave.bare)
    attacked, wrapped, bare = (read_beliefs(subject, axes, side, what=what) for side in sides)
    return Attack(wave, attacked, accepted, wrapped.harmful, bare.harmful)


def read_beliefs(
    subject: CachedModel, axes: Axes, prompts: Sequence[Prompt], *, what: str
) -> Beliefs:
    """Both beliefs of some prompts, over the layers 1 to L."""
    if not prompts:
        return Beliefs((), np.zeros(0), np.zeros(0) if axes.refuse else None)
    states = subject.states(prompts, what=what)
    harmful = belief(axes.harmful, states.at("t_inst"))
    refuse = belief(axes.refuse, states.at("t_post")) if axes.refuse else None
    return Beliefs(tuple(prompts), harmful, refuse)


def search_suffixes(
    subject: CachedModel, prompts: Sequence[Prompt], *, steps: int, seed: int
) -> list[str]:
    """A GCG suffix for each prompt; each is kept as it is found. None without the tool."""
    search = subject.tools.suffix
    if search is None:
        return []
    advance = subject.step("Figure 6: GCG suffixes", len(prompts))
    found = []
    for prompt in prompts:
        history = [asdict(turn) for turn in prompt.history]
        compute = partial(search, prompt, TARGET, steps=steps, seed=seed)
        parts = ["gcg", prompt.text, history, TARGET, steps, seed]
        found.append(str(subject.cached(parts, compute)))
        advance(1)
    return found


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
    )
