"""Tables 3, 8 and 9: planted scores and states with known answers, and a tiny model end to end."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from latentguard.data.builtin import load_contrast
from latentguard.guard.latent_guard import LatentGuard
from latentguard.prompts import Prompt
from latentguard.report.document import Figure
from latentguard.states import Fingerprint, Reading, States
from latentguard.stats.bounds import threshold_for_fpr
from latentguard.study.cached_model import CachedModel, Tools
from latentguard.study.detectors import FORM, LENGTH, NGRAMS, RANDOM
from latentguard.study.figures.table_03_guards.collect import Records, collect
from latentguard.study.figures.table_03_guards.compared_guards import (
    LINEAR,
    PAPER,
    Scored,
    Training,
    latent_rules,
    training,
)
from latentguard.study.figures.table_03_guards.report import (
    ACCURACY,
    FALSE,
    MINUS,
    OVER_WORDS,
    analyse,
)
from latentguard.study.figures.table_03_guards.user_traffic import (
    CODES,
    LONGEST,
    CategoryTrial,
    Traffic,
    Trial,
    _flagged,
    category_trials,
    drawn,
    traffic_parts,
)
from latentguard.study.prompt_groups import PromptGroups, is_fit_side
from latentguard.study.store import Store


def group(name, *, harmful, **flagged):
    """A group of 10 of which each rule flags so many: prompts that it flags come first."""
    prompts = tuple(Prompt(f"{name} {i}", harmful=harmful) for i in range(10))
    scores = {rule: np.where(np.arange(10) < n, 1.0, -1.0)[None] for rule, n in flagged.items()}
    return Scored(name, prompts, scores)


def names(**flagged):
    return {
        {"paper": PAPER, "ngrams": NGRAMS, "model": "some/guard"}[k]: v for k, v in flagged.items()
    }


@pytest.fixture
def planted():
    return Records(
        groups=(
            group("jailbreak: suffix", harmful=True, **names(paper=10, ngrams=5, model=10)),
            group("refused harmless", harmful=False, **names(paper=2, ngrams=8, model=0)),
            group("accepted harmful", harmful=True, **names(paper=6, ngrams=6, model=9)),
            group("refused harmful", harmful=True, **names(paper=0, ngrams=10, model=10)),
        ),
        harmless=group("harmless", harmful=False, **names(paper=3, ngrams=0, model=1)),
        models=("some/guard",),
    )


def table(finding, start):
    return next(p for p in finding.section.parts if p.title.startswith(start))


def test_accuracy_false_positives_and_the_gain_over_the_baseline(planted, settings):
    finding = analyse(planted, settings)
    rows = {(r[0], r[1]): r[2:] for r in table(finding, "Table 3").rows}
    assert rows["refused harmless", PAPER][0] == pytest.approx(0.8)
    assert rows["accepted harmful", "some/guard"][0] == pytest.approx(0.9)
    assert rows["accepted harmful", PAPER][4] == pytest.approx(0.3)  # false positives
    assert rows["accepted harmful", PAPER][8] == pytest.approx(0.65)  # (1 + .6 - .3) / 2
    assert rows["refused harmless", PAPER][8] is None
    assert finding.effects[ACCURACY].value == pytest.approx(0.6)
    assert finding.effects[FALSE].value == pytest.approx(0.3)
    gain = ((1.0 - 1.0) + (0.8 - 1.0) + (0.6 - 0.9)) / 3  # refused harmful is no column
    assert finding.effects[MINUS].value == pytest.approx(gain)
    assert finding.effects[MINUS].n == (30, 0)
    assert finding.effects[MINUS].low < gain < finding.effects[MINUS].high
    assert "some/guard (a guard model)" in finding.section.text


def test_without_a_guard_model_the_baseline_is_n_grams(planted, settings):
    """And nothing is said of the claim, which is about a dedicated guard."""
    finding = analyse(replace(planted, models=()), settings)
    gain = ((1.0 - 0.5) + (0.8 - 0.2) + (0.6 - 0.6)) / 3
    assert finding.effects[OVER_WORDS].value == pytest.approx(gain)
    assert MINUS not in finding.effects
    assert "n-grams (no guard model was given)" in finding.section.text


def test_small_and_missing_groups_are_named_and_give_no_effect(planted, settings):
    few = analyse(planted, replace(settings, enough=11))
    assert not few.effects
    assert sum("Only 10 prompts" in sentence for sentence in few.caveats) == 4
    none = analyse(Records(missing=("No guard.",)), settings)
    assert not none.effects
    assert not none.section.parts
    assert none.caveats[0] == "No guard."
    assert any("no false-positive rate" in sentence for sentence in none.caveats)


def texts(*categories, harmless=0):
    found = [Prompt(f"text {i}", harmful=True, category=c) for i, c in enumerate(categories)]
    return [*found, *(Prompt(f"fine {i}", harmful=False) for i in range(harmless))]


def test_in_domain_examples_are_at_most_half_of_each_category():
    prompts = texts(*["S"] * 20, *["H"] * 6, *["H,V"] * 2, *["V"] * 1, harmless=30)
    rng = np.random.default_rng(0)
    for seed in range(20):  # a text of several categories counts in each
        many = drawn(prompts, 50, np.random.default_rng(seed), "harmful")
        assert many[:20].sum() == 10 and many[20:28].sum() <= 4 and many[26:29].sum() <= 1
    picked = drawn(prompts, 5, rng, "harmful")
    by = {c: sum(picked[i] for i, p in enumerate(prompts) if p.category == c) for c in ("S", "V")}
    assert by["S"] == 5
    assert by["V"] <= 1  # of three that are violent, one is drawn
    assert sum(picked[20:28]) == 4
    assert not picked[29:].any()
    both = drawn(prompts, 5, np.random.default_rng(0), "harmful and harmless")
    assert (both[:29] == picked[:29]).all()
    assert both[29:].sum() == picked.sum()
    assert drawn(prompts, 50, rng, "harmful and harmless")[29:].sum() <= 15


def test_harmful_examples_alone_raise_false_positives_in_their_domain():
    """Texts of users lie far from the prompts; only harmless examples tell which of them harm.

    Five examples make nine harmful prompts: too few for a linear guard, which would need a model.
    """
    torch.manual_seed(1)
    harm, domain = torch.eye(16)[0], torch.eye(16)[1]

    def states(prompts, *, shift):
        sides = torch.tensor([1.0 if p.harmful else -1.0 for p in prompts])
        rows = sides[:, None] * harm + shift * domain + 0.2 * torch.randn(len(prompts), 16)
        values = rows[:, None, None].repeat(1, 1, 3, 1)
        return States(
            values,
            tuple(prompts),
            ("t_inst",),
            (0, 1, 2),
            Fingerprint("m", "w", "t", "c", "float32"),
        )

    base = [Prompt(f"p{i}", harmful=bool(i % 2)) for i in range(8)]
    users = texts(*["S"] * 40, harmless=60)
    learnt = Training(states(base, shift=0.0), (), "")
    seen = states(users, shift=6.0)
    rates = {}
    for added in ("harmful", "harmful and harmless"):
        flags = np.array(_flagged(None, learnt, seen, 5, added, 0)[PAPER], dtype=float)
        rates[added] = np.nanmean(flags[:40]), np.nanmean(flags[40:])
    assert rates["harmful"][0] == pytest.approx(1.0)
    assert rates["harmful"][1] > 0.5 > rates["harmful and harmless"][1]


def test_table_9_averages_over_draws_and_leaves_out_what_was_learnt_from(settings):
    prompts = tuple(texts("S", "S", "S,HR", harmless=2))
    scored = Scored("user traffic", prompts, {PAPER: np.array([[1.0, -1, -1, 1, -1]])})
    trial = Trial(PAPER, "harmful", 10, np.array([np.nan, 1.0, 0.5, 1.0, 0.0]))
    parts = {p.title: p for p in traffic_parts(Traffic(scored, (trial,), 0))}
    rows = {
        (r[0], r[2], r[3]): (r[4], r[7]) for r in parts["Table 9: with in-domain examples"].rows
    }
    assert rows["S (sexual)", "none", 0] == (pytest.approx(1 / 3), 3)
    assert rows["S (sexual)", "harmful", 10] == (pytest.approx(0.75), 2)
    assert rows["HR (harassment)", "harmful", 10] == (pytest.approx(0.5), 1)
    assert rows["harmless", "harmful", 10] == (pytest.approx(0.5), 2)
    safe = {r[:2]: r[2] for r in parts["Guards on moderation texts"].rows}
    assert safe[PAPER, "safe"] == pytest.approx(0.5)
    assert safe[PAPER, "unsafe"] == pytest.approx(1 / 3)
    assert f"In-domain examples: {PAPER}" in parts


def test_table_9_as_printed_has_each_column_of_the_paper_and_one_category_at_a_time():
    prompts = tuple(texts("S", "S", harmless=2))
    scored = Scored("user traffic", prompts, {PAPER: np.array([[1.0, -1, 1, -1]])})
    trials = (
        CategoryTrial("S", 0, 0, np.array([1.0, 0.0]), np.array([1.0, 0.0])),
        CategoryTrial("S", 50, 1, np.array([1.0, np.nan]), np.array([0.5, 1.0])),
    )
    parts = {p.title: p for p in traffic_parts(Traffic(scored, (), 0, trials))}
    rows = parts["Table 9: one category at a time"].rows
    assert [row[0] for row in rows] == [
        f"{CODES[c]} ({c})" for c in CODES for _ in range(1 + (c == "S"))
    ]
    assert rows[0][1:5] == (2, 0, 0, 0.5)
    assert (*rows[1][1:5], rows[1][7], rows[1][8]) == (2, 50, 1, 1.0, 1, 0.75)
    minors = next(row for row in rows if "minors" in row[0])
    assert minors[1:] == (0, *[None] * 9)


def test_examples_of_one_category_alone_are_added_and_never_tested(cached_model, settings):
    rows = [p for p in load_contrast("train") if p.harmful][:8]
    safe = [p for p in load_contrast("train") if not p.harmful][:8]
    domain = tuple(replace(p, category="SV"[n % 2]) for n, p in enumerate(rows[4:]))
    learnt = Training(
        cached_model.states([*rows[:4], *safe[:4]], positions=cached_model.span), (), ""
    )
    seen = cached_model.states([*domain, *safe[4:]], positions=cached_model.span)
    trials = {
        (t.category, t.k): t
        for t in category_trials(learnt, seen, replace(settings, domain=(0, 9)))
    }
    assert set(trials) == {(c, k) for c in "SV" for k in (0, 9)}
    assert [trials[c, 9].added for c in "SV"] == [1, 1]
    assert trials["S", 0].added == 0
    assert all(len(t.recall) == 2 and len(t.wrong) == 4 for t in trials.values())
    assert not np.isnan(trials["S", 0].recall).any()


@pytest.mark.parametrize("protocol", ["controlled", "paper"])
def test_the_guard_is_called_the_papers_under_its_protocol_alone(
    cached_model, prompt_groups, settings, protocol
):
    learnt = training(cached_model, prompt_groups, replace(settings, protocol=protocol))
    assert ("Latent Guard is the paper's" in learnt.note) is (protocol == "paper")
    assert ("is not the paper's guard" in learnt.note) is (protocol == "controlled")


def test_table_8_is_of_toxicchat_where_it_is_given(planted, settings):
    toxic = Scored(
        "ToxicChat", tuple(texts("S", "S", harmless=2)), {PAPER: np.array([[1.0, -1, 1, -1]])}
    )
    found = analyse(replace(planted, toxicchat=toxic), settings)
    rows = {row[:2]: row[2] for row in table(found, "Table 8: ToxicChat").rows}
    assert (rows[PAPER, "safe"], rows[PAPER, "unsafe"]) == (0.5, 0.5)


@pytest.fixture
def large(prompt_groups, settings):
    """Enough prompts for a linear guard, and for its calibration."""
    train = [replace(p, refused=bool(p.harmful)) for p in load_contrast("train")]
    fit = {
        "refused_harmful": [p for p in train if p.harmful and is_fit_side(p)][:12],
        "accepted_harmless": [p for p in train if not p.harmful and is_fit_side(p)][:12],
    }
    fit = {name: tuple(prompts) for name, prompts in fit.items()}
    return PromptGroups(prompt_groups.pools, fit, prompt_groups.test), replace(settings, fit=32)


def test_training_takes_accepted_harmful_prompts_too_and_never_a_tested_one(
    cached_model, prompt_groups
):
    from latentguard.study.settings import Settings

    accepted = tuple(p for p in load_contrast("validation") if p.harmful)[:4]
    accepted = tuple(replace(p, refused=False) for p in accepted)
    ours = replace(prompt_groups, fit={**prompt_groups.fit, "accepted_harmful": accepted})
    learnt = training(cached_model, ours, Settings(fit=20, test=6))
    found = {p.text for p in learnt.states.prompts}
    assert {p.text for p in accepted} <= found
    tested = {p.text for members in prompt_groups.test.values() for p in members}
    calibration = {p.text for p in learnt.calibration}
    assert len(calibration) == 40
    assert not (found | calibration) & tested
    assert not found & calibration
    assert not any(p.harmful for p in learnt.calibration)
    assert training(cached_model, replace(prompt_groups, fit={}), Settings()) is None


@pytest.mark.parametrize("calibrated", [True, False])
def test_the_linear_guard_is_that_of_the_package(cached_model, large, calibrated):
    learnt = training(cached_model, *large)
    held = learnt.calibration if calibrated else ()
    assert len(learnt.calibration) == 64
    rule = latent_rules(cached_model, learnt.states, held)[LINEAR]
    model = cached_model.uncached
    guard = LatentGuard.from_states(model, learnt.states, Reading.of("span", model.post))
    prompts = large[0].test["refused_harmful"] + large[0].test["accepted_harmless"]
    verdicts = list(guard.scan(model, prompts))
    if calibrated:
        scores = [v.score for v in guard.scan(model, held)]
        least = threshold_for_fpr(scores, 0.05).threshold
        wanted = [v.score - least for v in verdicts]
    else:
        wanted = [v.probability - 0.5 for v in verdicts]
    found = rule(cached_model.states(prompts, positions=cached_model.span))
    assert found.tolist() == [pytest.approx(wanted, abs=1e-4)]


class Baseline:
    """A guard model that finds long prompts unsafe."""

    def __init__(self):
        self.asked = 0

    def __call__(self, prompts, *, progress=None):
        self.asked += len(prompts)
        return [0.9 if len(p.text) > 60 else 0.1 for p in prompts]


def test_end_to_end(model, tmp_path, large, monkeypatch):
    prompt_groups, settings = large
    harmful = [p for p in load_contrast("validation") if p.harmful]
    harmless = [p for p in load_contrast("validation") if not p.harmful]
    moderation = [replace(p, category="S" if i % 2 else "H,V") for i, p in enumerate(harmful[:12])]
    moderation += [*harmless[:20], Prompt("word " * LONGEST, harmful=False)]
    attacks = [replace(p, text=f"{p.text} !!", category="suffix") for p in harmful[12:20]]
    pools = replace(prompt_groups.pools, moderation=tuple(moderation), jailbreaks=tuple(attacks))
    prompt_groups, guard = replace(prompt_groups, pools=pools), Baseline()
    cached_model = CachedModel(
        model, Store(tmp_path / "s"), tools=Tools(guards={"some/guard": guard})
    )
    monkeypatch.setattr(cached_model, "judge", lambda reply: "accepted")
    records = collect(cached_model, prompt_groups, settings)
    rules = [PAPER, LINEAR, RANDOM, LENGTH, NGRAMS, FORM, "some/guard"]
    assert [g.name for g in records.groups][:3] == [
        "jailbreak: suffix",
        "refused harmless",
        "accepted harmful",
    ]
    for one in (*records.groups, records.harmless, records.traffic.scored):
        assert list(one.scores) == rules
        assert {s.shape[1] for s in one.scores.values()} == {len(one.prompts)}
    assert {(t.rule, t.added) for t in records.traffic.trials} == {
        (rule, added) for rule in (PAPER, LINEAR) for added in ("harmful", "harmful and harmless")
    }
    finding = analyse(records, settings)
    assert set(finding.effects) == {ACCURACY, FALSE, MINUS}
    assert any("1 texts of user traffic were left out" in sentence for sentence in finding.caveats)
    figures = [part for part in finding.section.parts if isinstance(part, Figure)]
    assert len(figures) == 3
    for one in finding.section.parts:
        if not isinstance(one, Figure):
            assert all(len(row) == len(one.columns) for row in one.rows)
    asked = guard.asked
    monkeypatch.setattr(type(model), "capture", asked_again)
    monkeypatch.setattr(type(model), "sweep", asked_again)
    again = analyse(collect(cached_model, prompt_groups, settings), settings)
    assert guard.asked == asked
    assert [p.rows for p in again.section.parts if not isinstance(p, Figure)] == [
        p.rows for p in finding.section.parts if not isinstance(p, Figure)
    ]
    cached_model.store.close()


def asked_again(*_, **__):
    raise AssertionError("the model was asked again")


def test_attacks_on_requests_that_a_centroid_saw_are_left_out(
    cached_model, prompt_groups, settings
):
    seen = prompt_groups.fit["refused_harmful"][0]
    attack = replace(seen, text=f"{seen.text} !!", category="suffix", refused=None)
    pools = replace(prompt_groups.pools, jailbreaks=(attack,))
    test = {**prompt_groups.test, "refused_harmless": ()}
    records = collect(cached_model, replace(prompt_groups, pools=pools, test=test), settings)
    assert any("no prompt in refused harmless" in sentence for sentence in records.missing)
    assert not any(one.name.startswith("jailbreak") for one in records.groups)
    assert any("linear guard" in sentence for sentence in records.missing)


def test_nothing_to_fit_is_a_finding(cached_model, prompt_groups, settings):
    finding = analyse(collect(cached_model, replace(prompt_groups, fit={}), settings), settings)
    assert "No guard" in finding.caveats[0]
