"""The confound page: planted scores with known areas, and end to end on a tiny model."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

from latentguard.errors import GuardError
from latentguard.probes.axis import Axis
from latentguard.prompts import Prompt
from latentguard.report.document import Figure
from latentguard.states import Fingerprint, States
from latentguard.stats.detection import separation, win_matrix
from latentguard.study.detectors import (
    FORM,
    LENGTH,
    NGRAMS,
    RANDOM,
    belief_detector,
    control_detectors,
)
from latentguard.study.figures.confound.collect import OWN, PLAIN, ReadSet, Records, collect
from latentguard.study.figures.confound.readings import MATCHED, PAPER, SEALED
from latentguard.study.figures.confound.report import (
    AGAIN,
    KEPT,
    LOSS,
    OVER_FORM,
    SEALED_BELIEF,
    analyse,
)
from latentguard.study.figures.confound.surface_table import features, guessed
from latentguard.study.prompt_groups import PromptGroups


def prompts_of(name, n=24):
    """As many of each label, the first half of each refused."""
    return tuple(
        Prompt(f"{name} {side} {i}", harmful=side, refused=i < n // 2, source=name)
        for side in (True, False)
        for i in range(n)
    )


def ordered(prompts, *, by):
    """Scores that put ``by`` prompts above all others, without ties."""
    return np.array([[10.0 * bool(by(p)) + i / 1000 for i, p in enumerate(prompts)]])


def planted(name, *, tells):
    """A set on which the paper's axis knows the label, or nothing at all."""
    prompts = prompts_of(name)
    harm = ordered(prompts, by=lambda p: p.harmful if tells else False)
    if not tells:  # every harmful prompt has a harmless one of the same score
        harm = np.concatenate([np.arange(24.0), np.arange(24.0)])[None]
    refuse = ordered(prompts, by=lambda p: p.refused)
    return ReadSet(name, prompts, {PAPER: harm, LENGTH: -harm}, {PAPER: refuse})


def table(finding, title):
    return next(p for p in finding.section.parts if p.title == title)


def test_what_the_axis_loses_on_form_matched_sets_is_measured(settings):
    sets = (planted(OWN, tells=True), planted("a", tells=False), planted("b", tells=True))
    finding = analyse(Records({}, sets, "note"), settings)
    assert finding.effects[AGAIN].value == pytest.approx(0.75)
    assert finding.effects[LOSS].value == pytest.approx(0.25)
    assert finding.effects[AGAIN].n == (48, 48)
    assert finding.effects[LOSS].n == (72, 72)
    assert finding.effects[LOSS].low > 0.1
    rows = {(r[0], r[1]): r[2:] for r in table(finding, "Harmful or harmless, again").rows}
    assert (rows[OWN, PAPER][0], *rows[OWN, PAPER][2:]) == (1.0, 1.0, 24, 24)
    assert 0.85 < rows[OWN, PAPER][1] < 1  # 24 prompts a side are not without doubt
    assert rows[OWN, LENGTH][0] == 0.0
    assert rows["a", PAPER][0] == pytest.approx(0.5)
    assert rows["a", PAPER][1] < 0.5 < rows["a", PAPER][2]


@pytest.mark.parametrize("outlasts", [True, False])
def test_form_is_what_matched_sets_leave_nothing_of(settings, outlasts):
    """The axis tells the paper's own groups apart; the matched set, or not."""
    matched = planted("a", tells=outlasts)
    by_form = planted("a", tells=False).harmful[PAPER]
    matched = replace(matched, harmful=dict(matched.harmful) | {FORM: by_form})
    own = planted(OWN, tells=True)
    effects = analyse(Records({}, (own, matched), "note"), settings).effects
    assert effects[KEPT].value == pytest.approx(0.25 if outlasts else -0.25)
    assert effects[OVER_FORM].value == pytest.approx(0.5 if outlasts else 0)
    assert effects[KEPT].low > 0 if outlasts else effects[KEPT].high < 0
    assert (effects[OVER_FORM].low > 0.1) is outlasts


def test_the_sealed_reading_places_the_misbehaving_groups(settings):
    own = planted(OWN, tells=True)
    scores = np.array([[1.0 if p.harmful else -1.0 for p in own.prompts]])
    own = replace(own, harmful=dict(own.harmful) | {SEALED: scores})
    effects = analyse(Records({}, (own,), "note"), settings).effects
    assert effects[f"{SEALED_BELIEF} of refused harmless"].value == -1
    assert effects[f"{SEALED_BELIEF}, accepted harmful minus refused harmless"].value == 2


def test_the_mean_of_accepted_harmful_prompts_is_theirs_alone(settings):
    one = planted(OWN, tells=True)
    finding = analyse(Records({}, (one,), "note"), settings)
    members = [i for i, p in enumerate(one.prompts) if p.group == "accepted_harmful"]
    (row,) = table(finding, "Accepted harmful prompts at t_inst, again").rows
    assert row[:2] == (OWN, PAPER)  # not length, which has another unit
    assert row[2] == pytest.approx(one.harmful[PAPER][0, members].mean())
    assert row[5:7] == (len(members), 1.0)


def test_refusal_is_told_apart_within_each_label(settings):
    finding = analyse(Records({}, (planted(OWN, tells=True),), "note"), settings)
    rows = table(finding, "Refused or accepted within one label, again").rows
    assert [(r[1], r[3], r[6], r[7]) for r in rows] == [
        ("harmful", 1.0, 12, 12),
        ("harmless", 1.0, 12, 12),
    ]


def test_missing_sides_and_sets_are_named_and_nothing_fails(settings):
    empty = analyse(Records({}, (), "note"), settings)
    assert not empty.effects
    assert len(empty.caveats) == 2
    prompts = tuple(p for p in prompts_of("a") if p.harmful)
    lone = ReadSet("a", prompts, {PAPER: np.arange(24.0)[None]}, {})
    finding = analyse(Records({}, (lone,), "note", ("No refusal axis.",)), settings)
    assert not finding.effects
    assert finding.caveats[0] == "No refusal axis."
    assert any("Only 0 harmless prompts in a" in sentence for sentence in finding.caveats)


def test_areas_are_those_of_sklearn_and_a_mean_over_draws():
    rng = np.random.default_rng(3)
    up, down = rng.integers(0, 9, (3, 11)) * 1.0, rng.integers(0, 7, (3, 8)) * 1.0
    labels = np.arange(19) < 11
    wanted = [roc_auc_score(labels, np.concatenate(pair)) for pair in zip(up, down, strict=True)]
    assert win_matrix(up, down).mean() == pytest.approx(np.mean(wanted))
    found = separation(up, down)
    assert found.value == pytest.approx(np.mean(wanted))
    assert found.low < found.value < found.high
    assert found.n == (11, 8)
    assert separation(up[0], down[0]).value == pytest.approx(wanted[0])
    with pytest.raises(GuardError, match="found 3 and 0"):
        separation(up[:, :3], down[:, :0])


def test_the_better_guess_is_the_audits_and_its_interval_shrinks_with_n():
    few, many = ({".": (9 * k, k), "?": (k, 9 * k)} for k in (1, 100))
    assert guessed(few).value == guessed(many).value == pytest.approx(0.9)
    assert guessed(many).n == (1000, 1000)
    assert guessed({".": (31, 30), "?": (30, 31)}).low < 31 / 61 < 0.6
    assert guessed(few).high - guessed(few).low > 3 * (guessed(many).high - guessed(many).low)


def test_each_feature_of_form_is_found():
    texts = [("Build thing %d now.", True), ("What is thing %d and why is it there?", False)]
    prompts = [Prompt(t % i, harmful=side) for i in range(12) for t, side in texts]
    found = features(prompts)
    assert {name: one.value for name, one in found.items()} == {
        name: pytest.approx(1.0) for name in ("ending", "form", "length", "n-grams")
    }


def planted_states(n=12, seed=0):
    """Harmful texts are short and point along the first axis of the layers above 0."""
    torch.manual_seed(seed)
    prompts = tuple(
        Prompt(f"bad {i}" if side else f"good and long {i}", harmful=side)
        for i in range(n)
        for side in (True, False)
    )
    values = torch.randn(2 * n, 1, 4, 8) * 0.3
    sides = torch.tensor([1.0 if p.harmful else -1.0 for p in prompts])
    values[:, 0, 1:, 0] += sides[:, None]
    values[:, 0, 0] = sides[:, None] * torch.eye(8)[1]  # the embedding gives all away
    fingerprint = Fingerprint("m", "w", "t", "c", "float32")
    return States(values, prompts, ("t_inst",), (0, 1, 2, 3), fingerprint)


def test_the_papers_rule_is_delta_over_the_blocks():
    states = planted_states()
    axis = Axis.fit(states, "t_inst")
    wanted = axis.layer_beliefs(states.at("t_inst"))[:, 1:].mean(1)
    assert belief_detector(axis)(states)[0] == pytest.approx(wanted.numpy(), abs=1e-5)


def test_controls_are_turned_by_the_prompts_that_they_were_fitted_on():
    fit, other = planted_states(), planted_states(seed=1)
    harmful = np.array([p.harmful for p in fit.prompts])
    rules = control_detectors(Axis.fit(fit, "t_inst"), fit, 3)
    assert list(rules) == [RANDOM, LENGTH, NGRAMS, FORM]
    found = {name: rule(fit) for name, rule in rules.items()}
    assert {name: scores.shape for name, scores in found.items()} == {
        RANDOM: (3, 24),
        LENGTH: (1, 24),
        NGRAMS: (1, 24),
        FORM: (1, 24),
    }
    for name in (RANDOM, LENGTH):
        up, down = found[name][:, harmful].mean(1), found[name][:, ~harmful].mean(1)
        assert (up > 0).all()
        assert up == pytest.approx(-down)  # 0 lies midway
    for name in (LENGTH, NGRAMS, FORM):
        assert ((rules[name](other)[0] > 0) == harmful).all()
    again = control_detectors(Axis.fit(fit, "t_inst"), fit, 3)[RANDOM](other)
    assert (again == rules[RANDOM](other)).all()


def test_end_to_end(cached_model, prompt_groups, settings, monkeypatch):
    records = collect(cached_model, prompt_groups, settings)
    fitted = {p.text for group in prompt_groups.fit.values() for p in group}
    assert [one.name for one in records.sets] == [OWN, PLAIN, "contrast"]
    readings = [PAPER, MATCHED, SEALED, RANDOM, LENGTH, NGRAMS, FORM]
    for one in records.sets:
        assert not fitted & {p.text for p in one.prompts}
        assert list(one.harmful) == readings
        for name, scores in one.harmful.items():
            draws = settings.random_draws if name == RANDOM else 1
            assert scores.shape == (draws, len(one.prompts))
    finding = analyse(records, settings)
    sealed = f"{SEALED_BELIEF} of refused harmless"
    gap = f"{SEALED_BELIEF}, accepted harmful minus refused harmless"
    assert set(finding.effects) == {AGAIN, LOSS, KEPT, OVER_FORM, sealed, gap}
    figures = [part for part in finding.section.parts if isinstance(part, Figure)]
    assert len(figures) == 1
    assert len(table(finding, "Surface audit").rows) > 8
    for one in finding.section.parts:
        if not isinstance(one, Figure):
            assert all(len(row) == len(one.columns) for row in one.rows)
    monkeypatch.setattr(type(cached_model.uncached), "capture", asked_again)
    monkeypatch.setattr(type(cached_model.uncached), "sweep", asked_again)
    again = collect(cached_model, prompt_groups, settings)
    assert repr(analyse(again, settings).section.parts[1:]) == repr(finding.section.parts[1:])


def asked_again(*_, **__):
    raise AssertionError("the model was asked again")


def test_a_model_that_does_not_refuse_has_no_refusal_rows(cached_model, prompt_groups, settings):
    def never(group):
        return tuple(replace(p, refused=False) for p in group)

    fit = {"accepted_harmful": never(prompt_groups.fit["refused_harmful"])}
    fit["accepted_harmless"] = prompt_groups.fit["accepted_harmless"]
    test = {"accepted_harmless": prompt_groups.test["accepted_harmless"]}
    records = collect(cached_model, PromptGroups(prompt_groups.pools, fit, test), settings)
    assert not any(PAPER in one.refuse for one in records.sets)
    finding = analyse(records, settings)
    assert any("No refusal axis" in sentence for sentence in finding.caveats)
    assert set(finding.effects) == {AGAIN, OVER_FORM}
