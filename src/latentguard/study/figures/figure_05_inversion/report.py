"""What the answers tell: who says 'No' when steered, beside chance, at layers chosen elsewhere."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from latentguard.report.charts import (
    SHARE,
    Curve,
    control_panels,
    lines_by_layer,
    stacked_shares,
    to_curve,
)
from latentguard.report.document import Cell, Figure, Section, Table
from latentguard.stats.bootstrap import bootstrap_mean
from latentguard.stats.estimate import Estimate
from latentguard.stats.rates import proportion, share
from latentguard.study.figures.figure_05_inversion.collect import (
    CALLED,
    SIDES,
    Records,
    Task,
    along,
    chance,
)
from latentguard.study.figures.figure_05_inversion.flips import (
    PLAIN,
    SURELY,
    Turned,
    differences,
    left_alone,
    moved,
    turned,
)
from latentguard.study.finding import Finding, cells
from latentguard.study.judge import Answer
from latentguard.study.settings import Settings
from latentguard.study.steering import Steering

ANSWERS: tuple[Answer, ...] = ("certainly", "no", "refusal", "other")
INTERVAL = ("low", "high")

LAYERS = (
    "Each half of the prompts is steered at the layer that is best for the other half; both are "
    "named. Same layers: those of the harmfulness direction. Where it acts: those at which the "
    "same vector turns most replies to the same instructions asked as they are."
)
"""What the notes of both tables say of layers."""


def analyse(records: Records, settings: Settings) -> Finding:
    """Answers by layer, and what is turned at layers chosen on other prompts."""
    tasks = [task for task in records.tasks if len(task.unsteered)]
    if not tasks:
        return Finding(_section(records, ()), {}, tuple(_missing(records)))
    effects: dict[str, Estimate] = {}
    caveats = _missing(records)
    has_two_answers = all(task.right.sum() >= settings.enough for task in _first(tasks))
    for task in _first(tasks):
        effects |= _effects(task, records, settings)
        count, n = int(task.right.sum()), len(task.right)
        if count < settings.enough:
            caveats.append(
                f"Only {count} of {n} {task.side.name} instructions are answered "
                f"'{task.side.right.capitalize()}' when nothing is steered, at {task.question}, "
                "the question that is answered best: nothing is concluded of turning them."
            )
    caveats += [
        f"{name} is not surely above {SURELY:g}: what that direction leaves alone is no finding."
        for name, one in effects.items()
        if name.startswith(PLAIN) and name.endswith("minus random") and one.low <= SURELY
    ]
    if not has_two_answers:
        # a model that answers all alike leaves its answer alone under any direction
        effects = {name: one for name, one in effects.items() if not name.endswith(", surely")}
    steered = [task for task in tasks if task.answers]
    parts: list[Table | Figure] = [
        _unsteered(tasks),
        _flips(steered, records, settings),
        _shifts(_first(tasks), records, settings),
        *(figure for task in steered for figure in _answer_figures(task, records, settings)),
        *(f for task in _first(tasks) for f in _first_figures(task, records, settings)),
        *(_by_layer(task, records.layers) for task in steered),
    ]
    return Finding(_section(records, parts), effects, tuple(caveats))


def _first(tasks: Sequence[Task]) -> list[Task]:
    """Both labels of the question that is answered best."""
    return [task for task in tasks if task.question == tasks[0].question]


def _effects(task: Task, records: Records, settings: Settings) -> dict[str, Estimate]:
    """What claims may need; nothing of fewer prompts than are enough."""
    effects: dict[str, Estimate] = {}
    if len(task.right) >= settings.enough:
        right = f"{task.side.right.capitalize()} unsteered, {task.side.name}"
        effects[right] = proportion(task.right)
        shares = moved(task, records, settings)
        effects |= {one.name: one.estimate for one in shares} | differences(shares)
    if task.right.sum() >= settings.enough:
        shares = turned(task, records, settings)
        effects |= {one.name: one.estimate for one in shares} | differences(shares)
        effects |= left_alone(shares)
    return effects


def _missing(records: Records) -> list[str]:
    there = {task.side.name for task in records.tasks if len(task.unsteered)}
    sentences = [
        f"No {side.name} instructions to ask about: nothing is concluded of them."
        for side in SIDES
        if side.name not in there
    ]
    sentences += [
        f"Where the refusal direction acts on {side.name} prompts is unknown: too few of them are "
        f"{'refused' if side.sign < 0 else 'accepted'}, or there is no refusal direction."
        for side in SIDES
        if side.name in there and side.name not in records.refused
    ]
    return sentences


def _row(task: Task, one: Turned, layers: Sequence[int]) -> tuple[Cell, ...]:
    at = " / ".join(str(layers[i]) for i in dict.fromkeys(one.picks.tolist()))
    return (task.question, task.side.name, one.along, at, one.what, *cells(one.estimate))


def _flips(tasks: Sequence[Task], records: Records, settings: Settings) -> Table:
    rows = [_row(t, one, records.layers) for t in tasks for one in turned(t, records, settings)]
    note = (
        f"Only instructions that are answered right when nothing is steered (n). {LAYERS} "
        f"Coefficient {settings.inversion_coefficient:g} unless named; random: mean of "
        f"{settings.random_draws} draws. The paper shows curves only (Figures 5, 11, 12)."
    )
    columns = ("question", "instructions", "steered along", "layers", "said", "share")
    return Table("Answers turned", (*columns, *INTERVAL, "n"), tuple(rows), note)


def _shifts(tasks: Sequence[Task], records: Records, settings: Settings) -> Table:
    rows = [_row(t, one, records.layers) for t in tasks for one in moved(t, records, settings)]
    note = (
        "How far the log-odds of the wrong answer as first word rise, in nats, mean over all "
        f"instructions: it shows what moves, even where no answer turns. {LAYERS} Intervals: 95 % "
        "bootstrap over the instructions. The paper has no such figures."
    )
    columns = ("question", "instructions", "steered along", "layers", "measured", "nats")
    return Table("Log-odds moved", (*columns, *INTERVAL, "n"), tuple(rows), note)


def _four(answers: NDArray[np.str_]) -> tuple[Cell, ...]:
    """Share of each answer with its interval, then n; of answers [draws n]."""
    shares = [share(answers == one) for one in ANSWERS]
    return (*(cell for e in shares for cell in cells(e)[:3]), answers.shape[1])


def _heads() -> tuple[str, ...]:
    names = [one.capitalize() for one in ANSWERS]
    return (*(head for name in names for head in (name, *(f"{name}, {i}" for i in INTERVAL))), "n")


def _unsteered(tasks: Sequence[Task]) -> Table:
    rows = tuple((t.question, t.side.name, *_four(t.unsteered[None])) for t in tasks)
    columns: tuple[str, ...] = ("question", "instructions", *_heads())
    if all(task.own_unsteered is not None for task in tasks):
        own = [task.own_unsteered for task in tasks]
        rows = tuple((*r, *_own(o[None])) for r, o in zip(rows, own, strict=True) if o is not None)
        columns = (*columns, *OWN)
    note = (
        "Right is 'Certainly' for harmful and 'No' for harmless instructions. The question that is "
        "answered best comes first; claims are decided by it (the paper, too, takes the template "
        "that a model understands, appendix E.2). Intervals: 95 %, Wilson."
    )
    return Table("Answers without steering", columns, rows, note)


def _by_layer(task: Task, layers: Sequence[int]) -> Table:
    rows = tuple(
        (
            *(way.name, abs(way.coefficient), layer, *_four(answers[:, slot])),
            *(_own(task.own_answers[way][:, slot]) if task.own_answers else ()),
        )
        for way, answers in task.answers.items()
        for slot, layer in enumerate(layers)
    )
    counted = (
        "As the paper counts, a reply is 'Certainly' if it holds 'ertainly' anywhere, else 'No' if "
        "it holds 'No' or 'no' anywhere ('know' too); its refusal rate is the share of No among "
        "both. The last columns are of the program's own judge, which reads how a reply begins."
        if task.own_answers
        else "A reply is 'Certainly' or 'No' if it begins with that word, else a refusal if it "
        "begins like one."
    )
    note = (
        f"All {len(task.unsteered)} {task.side.name} instructions. {counted} Intervals: 95 %, "
        "Wilson; of random directions a bootstrap over the instructions."
    )
    columns = ("steered along", "coefficient", "layer", *_heads())
    columns = (*columns, *OWN) if task.own_answers else columns
    return Table(f"Answers to {task.question}, {task.side.name}", columns, rows, note)


OWN = tuple(f"built-in judge: {one}" for one in ANSWERS)
"""Columns of the program's own judge, where another one decides."""


def _own(answers: NDArray[np.str_]) -> tuple[Cell, ...]:
    """Share of each answer, of answers [draws n]."""
    return tuple(float((answers == one).mean()) if answers.size else None for one in ANSWERS)


def _answer_figures(task: Task, records: Records, settings: Settings) -> list[Figure]:
    """Figures 5, 11 and 12; Figure 10 where the refusal direction was added before the question."""
    sign, c = task.side.sign, settings.inversion_coefficient
    refusal = [along("refuse", s * sign * c) for s in (1, -1)]
    controls = [chance(of, settings) for of in CALLED]
    whole = [along("harmful", sign * c), *refusal, *controls]
    before = [along("refuse", s * sign * c, before=True) for s in (1, -1)]
    figures = [_curves(task, whole, records.layers, "Figures 5, 11, 12")]
    if before[0] in task.answers:
        figures.append(_curves(task, [*before, controls[0]], records.layers, "Figure 10"))
    return figures


def _first_figures(task: Task, records: Records, settings: Settings) -> list[Figure]:
    """All four answers, the log-odds, and where the refusal direction acts."""
    c = task.side.sign * settings.inversion_coefficient
    harm, refuse = along("harmful", c), along("refuse", c)
    ways = [way for way in (harm, refuse) if way in task.answers]
    controls = [way for of in CALLED if (way := chance(of, settings)) in task.answers]
    return [
        *(_stack(task, way, records.layers) for way in ways),
        _odds(task, [*ways, *controls], records.layers),
        *_acting(task, refuse, records),
    ]


def _curves(task: Task, ways: Sequence[Steering], layers: Sequence[int], name: str) -> Figure:
    n, side = len(task.unsteered), task.side
    curves = {w.name: _curve(task.answers[w] == "no") for w in ways if w in task.answers}
    start = float((task.unsteered == "no").mean())
    turns = "rises" if side.sign < 0 else "falls"
    caption = (
        f"Share of n = {n} {side.name} instructions answered 'No'; {start:.2f} when nothing is "
        f"steered. A direction that turns the judgement is one whose curve {turns} and leaves the "
        "grey one of random directions as long as it. Bands: 95 %."
    )
    title = f"'No' to {side.name} instructions, {task.question} ({name})"
    panels = control_panels(curves)
    return lines_by_layer(
        curves, layers, title=title, y="answered 'No'", caption=caption, limits=SHARE, panels=panels
    )


def _curve(hits: NDArray[np.bool_]) -> Curve:
    """Share by layer, of hits [draws layers n]."""
    return to_curve([share(flags) for flags in np.moveaxis(hits, 1, 0)])


def _stack(task: Task, way: Steering, layers: Sequence[int]) -> Figure:
    answers = task.answers[way]
    shares = {one.capitalize(): (answers == one).mean((0, 2)).tolist() for one in ANSWERS}
    caption = f"n = {len(task.unsteered)}; {task.question}. 'Other': neither word, and no refusal."
    title = f"Four answers to {task.side.name} instructions along {way.name}"
    return stacked_shares(shares, layers, title=title, caption=caption)


def _odds(task: Task, ways: Sequence[Steering], layers: Sequence[int]) -> Figure:
    curves: dict[str, Curve] = {}
    for way in ways:
        shifts = (task.steered_odds[way] - task.odds).mean(0)
        curves[way.name] = to_curve([bootstrap_mean(rows) for rows in shifts])
    caption = (
        f"How far the log-odds of 'Certainly' against 'No' as first word move, in nats; mean of "
        f"n = {len(task.odds)} {task.side.name} instructions; {task.question}. Above 0 they are "
        "judged more harmful. Bands: 95 % bootstrap."
    )
    title = f"Log-odds of 'Certainly' to {task.side.name} instructions"
    panels = control_panels(curves)
    return lines_by_layer(
        curves, layers, title=title, y="nats", caption=caption, zero=True, panels=panels
    )


def _acting(task: Task, way: Steering, records: Records) -> list[Figure]:
    """Replies to plain prompts and answers to the question under the same vector."""
    refused = records.refused.get(task.side.name)
    if refused is None or way not in task.answers:
        return []
    right = task.side.right
    curves = {
        "plain prompt refused": _curve(refused[None] == 1),
        f"question answered '{right.capitalize()}'": _curve(task.answers[way] == right),
    }
    caption = (
        f"n = {refused.shape[1]} {task.side.name} instructions, the same vector on every token. "
        "Where the first curve turns and the second stays, the direction changes what the model "
        "does but not how it judges. Bands: 95 %."
    )
    title = f"Where {way.name} acts on {task.side.name} instructions"
    return [
        lines_by_layer(
            curves, records.layers, title=title, y="share", caption=caption, limits=SHARE
        )
    ]


def _section(records: Records, parts: Sequence[Table | Figure]) -> Section:
    text = (
        "After the instruction the model is asked whether it is harmful: 'Certainly' is right for "
        "a harmful one, 'No' for a harmless one. So a direction that carries harmfulness turns the "
        f"answer, and one that only makes the model refuse does not. {records.note}."
    )
    return Section("Figures 5, 10, 11, 12: reply inversion", text, tuple(parts))
