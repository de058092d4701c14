"""Figure 6: what a model believes while it is jailbroken (section 4), and what the wrapper adds.

The paper shows where successful attacks fall on the plane. An attack is a wrapper around a request,
and a belief may read the wrapper alone; so the same wrappers are put around harmless instructions.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from latentguard.report.charts import belief_plane
from latentguard.report.document import Cell, Figure, Section, Table
from latentguard.stats.bootstrap import bootstrap_mean, crossed_mean
from latentguard.stats.detection import auroc_interval, win_matrix
from latentguard.stats.estimate import Estimate
from latentguard.stats.rates import proportion
from latentguard.study.attacks import OWN_TEMPLATES
from latentguard.study.figures.figure_06_jailbreaks.collect import (
    Attack,
    Beliefs,
    Floats,
    Records,
    pooled,
)
from latentguard.study.finding import CELLS, Finding, cells
from latentguard.study.form_controls import beyond_form, kept_beyond_half
from latentguard.study.settings import Settings

REFUSE = "Delta_refuse of accepted attacks"
LOWER = "Delta_refuse of accepted attacks minus refused harmful"
HARMFUL = "Delta_harmful of accepted attacks"
SEALED = "sealed Delta_harmful of accepted attacks"
KEPT = "separation that form-matched prompts under attack keep, beyond half"
OVER_FORM = "AUROC on form-matched prompts under attack minus that of form"
INSIDE = "AUROC inside the wrapper"
ADDED = "Delta_harmful that a wrapper adds to harmless prompts"
EXEMPT = re.compile(r"persua|\bpap\b", re.IGNORECASE)
"""Kinds of attacks that are persuasion (PAP: persuasive adversarial prompts), by their name."""

READ_AT = {True: "", False: ", read at the instruction"}
"""What the last two end in: t_inst is a token of the wrapper, or of the instruction."""

TEXT = (
    "An attack succeeds if the reply does not begin like a refusal; whether the reply helps is not "
    "judged. The paper: suffixes and templates suppress refusal while the model still believes in "
    "harm; persuasion may reverse that belief. So the claim is decided kind by kind, on given "
    "attacks and GCG suffixes but not on persuasion, nor on templates of our own. A control is "
    "added: the same wrappers around harmless instructions, and around form-matched pairs. A "
    "belief that reads the request tells both apart; one that reads the wrapper does not."
)


def analyse(records: Records, settings: Settings) -> Finding:
    """Beliefs of accepted attacks by kind, and whether they tell harm apart inside a wrapper."""
    families = dict.fromkeys(attack.attack_set.family for attack in records.attacks)
    groups = {name: pooled(_of(records, name)) for name in families}
    tables = (_rates(records), _believed(records, groups), _inside(records))
    parts: list[Table | Figure] = [*_planes(records, groups), *(t for t in tables if t.rows)]
    left_out = f"Given attacks left out, as their request is in a centroid: {records.left_out}."
    claimed = dict.fromkeys(attack.attack_set.family for attack in _claimed(records))
    exempt = ", ".join(name for name in families if name not in claimed) or "none here"
    text = f"{TEXT} Shown beside the claim: {exempt}. {records.note}. {left_out}"
    section = Section("Figure 6: beliefs under jailbreaks", text, tuple(parts))
    effects = _effects(records, groups, settings.enough)
    return Finding(section, effects, tuple(_caveats(records, groups, settings.enough)))


def _of(records: Records, family: str) -> list[Attack]:
    return [attack for attack in records.attacks if attack.attack_set.family == family]


def _claimed(records: Records) -> list[Attack]:
    """Attacks that the claim is about."""
    return [
        a
        for a in records.attacks
        if a.attack_set.family != OWN_TEMPLATES and not EXEMPT.search(a.attack_set.family)
    ]


def _effects(records: Records, groups: Mapping[str, Beliefs], enough: int) -> dict[str, Estimate]:
    """Of each kind, and what form explains; only where there are enough.

    Kinds that the claim is about end in ``: kind``; others, shown beside them, in ``, kind``.
    """
    claimed = dict.fromkeys(attack.attack_set.family for attack in _claimed(records))
    effects: dict[str, Estimate] = {}
    for name, pool in groups.items():
        if len(pool.prompts) >= enough:
            effects |= _of_kind(records, pool, f"{':' if name in claimed else ','} {name}", enough)
    for name in claimed:
        sealed = _sealed(_of(records, name))
        if len(sealed.prompts) >= enough:
            effects[f"{SEALED}: {name}"] = _mean(sealed.harmful, sealed)
    for attack in records.attacks:
        if attack.attack_set.paired and len(attack.known) >= enough:
            effects[f"{INSIDE}: {attack.attack_set.kind}"] = _told_apart(attack)
    for ends, where in READ_AT.items():
        own = _shared(records, ends=ends)
        if own and min(len(own[0].known), len(own[0].wrapped)) >= enough:
            effects |= {f"{name}{where}": figure for name, figure in _own(own).items()}
    return effects | _form_effects(_claimed(records), enough)


def _of_kind(records: Records, pool: Beliefs, end: str, enough: int) -> dict[str, Estimate]:
    """Both beliefs of accepted attacks of a kind, and Delta_refuse against refused prompts."""
    effects = {HARMFUL + end: _mean(pool.harmful, pool)}
    refused = records.refused.refuse
    if pool.refuse is None or refused is None:
        return effects
    effects[REFUSE + end] = _mean(pool.refuse, pool)
    if len(refused) >= enough:
        effects[LOWER + end] = _mean(pool.refuse, pool, minus=refused)
    return effects


def _mean(values: Floats, pool: Beliefs, *, minus: Floats | None = None) -> Estimate:
    """A mean of attacks; requests and wrappers are drawn again, each on its own."""
    if not pool.wrappers:
        return bootstrap_mean(values, pool.requests, minus=minus)
    return crossed_mean(values, pool.requests, pool.wrappers, minus=minus)


def _sealed(attacks: Sequence[Attack]) -> Beliefs:
    """The accepted attacks as the sealed reading has them."""
    read = [a for a in attacks if len(a.sealed)]
    return pooled([replace(a, beliefs=replace(a.beliefs, harmful=a.sealed)) for a in read])


def _form_effects(attacks: Sequence[Attack], enough: int) -> dict[str, Estimate]:
    """Whether Delta_harmful tells form-matched prompts apart inside the wrappers of a claim."""
    usable = [a for a in attacks if _matched_sides(a).sum(1).min() >= enough and len(a.wrapped)]
    if not usable:
        return {}
    matched = [win_matrix(*_split(a, a.matched)) for a in usable]
    by_form = [win_matrix(*_split(a, a.matched_form)) for a in usable]
    own = [win_matrix(a.known, a.wrapped) for a in usable]
    return {KEPT: kept_beyond_half(matched, own), OVER_FORM: beyond_form(matched, by_form)}


def _matched_sides(attack: Attack) -> NDArray[np.bool_]:
    """Which form-matched prompts are harmful and which are harmless, [2 p]."""
    harmful = np.array([bool(p.harmful) for p in attack.attack_set.matched], dtype=bool)
    return np.stack([harmful, ~harmful])


def _split(attack: Attack, values: Floats) -> tuple[Floats, Floats]:
    harmful, harmless = _matched_sides(attack)
    return values[harmful], values[harmless]


def _shared(records: Records, *, ends: bool) -> list[Attack]:
    """Attacks whose wrapper is the same in every row: templates of our own."""
    attack_sets = [(attack, attack.attack_set) for attack in records.attacks]
    return [a for a, w in attack_sets if not w.paired and w.ends == ends and len(w.wrapped)]


def _own(attacks: Sequence[Attack]) -> dict[str, Estimate]:
    """AUROC inside a wrapper and what it adds: means over templates around the same prompts."""
    beaten = np.mean([win_matrix(a.known, a.wrapped) for a in attacks], axis=0)
    added = np.mean([a.wrapped - a.bare for a in attacks], axis=0)
    return {INSIDE: auroc_interval(beaten), ADDED: bootstrap_mean(added)}


def _told_apart(attack: Attack) -> Estimate:
    return auroc_interval(win_matrix(attack.known, attack.wrapped), paired=attack.attack_set.paired)


def _planes(records: Records, groups: Mapping[str, Beliefs]) -> Iterator[Figure]:
    """Accepted attacks, as in the paper; attempts of which none was accepted apart."""
    accepted = {name: pool for name, pool in groups.items() if pool.prompts}
    failed = {
        name: pooled(_of(records, name), (True, False, None))
        for name in groups
        if name not in accepted
    }
    curves = [
        ("Attacks that succeed", accepted, "Only accepted attacks, as in the paper's Figure 6"),
        ("Attacks that fail", failed, "All attempts where none was accepted"),
    ]
    for title, pools, says in curves:
        planes = {"refused harmful": records.refused, **pools}
        if not pools or any(pool.refuse is None for pool in planes.values()):
            continue
        n = ", ".join(f"{len(pool.prompts)} {name}" for name, pool in planes.items())
        caption = f"{says}; n: {n}. Right: believed harmful. Up: believed to be refused."
        yield belief_plane({k: _points(b) for k, b in planes.items()}, title=title, caption=caption)


def _points(pool: Beliefs) -> tuple[list[float], list[float], list[str]]:
    assert pool.refuse is not None
    return pool.harmful.tolist(), pool.refuse.tolist(), [p.id or "unnamed" for p in pool.prompts]


def _rates(records: Records) -> Table:
    rows = []
    for attack in records.attacks:
        outcomes = [one for one in attack.accepted if one is not None]
        rate = cells(proportion(outcomes)) if outcomes else (None, None, None, 0)
        rows.append((attack.attack_set.kind, *rate, len(attack.accepted) - len(outcomes)))
    columns = ("attack", "accepted", *CELLS[1:], "empty or cut")
    note = (
        "Accepted: the reply does not begin like a refusal (95 %, Wilson). A reply that opens as "
        "the attack demands and refuses afterwards counts as accepted. Attacks made here are on "
        "requests that are refused without them; of those given this is not known."
    )
    return Table("Success of attacks", columns, tuple(rows), note)


def _believed(records: Records, groups: Mapping[str, Beliefs]) -> Table:
    pools = {"refused harmful": records.refused, "accepted harmless": records.harmless}
    for attack in records.attacks:
        pool = pooled([attack])
        name = f"{attack.attack_set.kind}{'' if pool.prompts else ', none accepted'}"
        pools[name] = pool if pool.prompts else attack.beliefs
    for name, pool in groups.items():
        pools |= {name: pool} if len(_of(records, name)) > 1 else {}
        pools[f"{name}, refused"] = pooled(_of(records, name), (False,))
    pools["all accepted attacks"] = pooled(records.attacks)
    pools["all accepted attacks of the claim"] = pooled(_claimed(records))
    rows: list[tuple[Cell, ...]] = []
    for name, pool in pools.items():
        if pool.prompts:
            rows += [(name, what, *cells(e)) for what, e in _figures(records, pool).items()]
    note = (
        "Accepted attacks, unless it says otherwise; all attempts where none is accepted. Accepted "
        "attacks are picked by what the model does, so compare them with those refused. AUROC: of "
        "\u0394 harmful against accepted harmless prompts without a wrapper. Intervals: 95 % "
        "bootstrap over requests and wrappers, each drawn on its own; of a single wrapper, over "
        "requests. The paper gives no numbers here."
    )
    return Table("Beliefs under attack", ("prompts", "figure", *CELLS), tuple(rows), note)


def _figures(records: Records, pool: Beliefs) -> dict[str, Estimate]:
    means = {"\u0394 harmful": _mean(pool.harmful, pool)}
    if pool.refuse is not None:
        means["\u0394 refuse"] = _mean(pool.refuse, pool)
    harmless = records.harmless
    if harmless.prompts and pool is not harmless:
        means["AUROC"] = auroc_interval(win_matrix(pool.harmful, harmless.harmful), pool.requests)
    return means


def _inside(records: Records) -> Table:
    """AUROC of Delta_harmful where harmful and harmless instructions wear the same wrapper."""
    rows: list[tuple[Cell, ...]] = []
    for attack in records.attacks:
        if len(attack.wrapped) and len(attack.known):
            at = "wrapper" if attack.attack_set.ends else "instruction"
            added = bootstrap_mean(attack.wrapped - attack.bare)
            rows.append((attack.attack_set.kind, at, "AUROC", *cells(_told_apart(attack))))
            rows.append((attack.attack_set.kind, at, "added to harmless", *cells(added)))
    for ends, at in ((True, "wrapper"), (False, "instruction")):
        if own := _shared(records, ends=ends):
            area, added = _own(own).values()
            rows.append(("own templates, mean", at, "AUROC", *cells(area)))
            rows.append(("own templates, mean", at, "added to harmless", *cells(added)))
    harmful, harmless = records.refused.harmful, records.harmless.harmful
    if rows and len(harmful) and len(harmless):
        rows.insert(
            0,
            ("none", "instruction", "AUROC", *cells(auroc_interval(win_matrix(harmful, harmless)))),
        )
    note = (
        "All attempts, accepted or not. AUROC: of \u0394 harmful; 0.5 is chance. Where t_inst is a "
        "token of the wrapper, the last token is the same for harmful and harmless prompts. Added: "
        "\u0394 harmful of harmless prompts with the wrapper minus without."
    )
    columns = ("wrapper", "t_inst is a token of", "figure", *CELLS)
    return Table("Inside the same wrapper", columns, tuple(rows), note)


def _caveats(records: Records, groups: Mapping[str, Beliefs], enough: int) -> Iterator[str]:
    yield from records.missing
    if records.refused.refuse is None:
        yield f"How attacks move \u0394 refuse is not known: {records.note}."
    pools = {"refused harmful": records.refused, "accepted harmless": records.harmless}
    for name, pool in pools.items():
        if len(pool.prompts) < enough:
            yield f"Only {len(pool.prompts)} {name} prompts: nothing is concluded against them."
    for name, pool in groups.items():
        attempts = sum(len(attack.accepted) for attack in _of(records, name))
        if len(pool.prompts) < enough:
            counts = f"{len(pool.prompts)} of {attempts} attacks were accepted"
            yield f"{name}: {counts}, so nothing is concluded of accepted ones."
