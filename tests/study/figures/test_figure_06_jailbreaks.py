"""Beliefs under attack: what is asked, what is compared with what, and what cannot be told."""

import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given as drawn
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from latentguard.prompts import Prompt
from latentguard.report.document import Report
from latentguard.stats.bootstrap import bootstrap_mean
from latentguard.stats.detection import auroc_interval, win_matrix
from latentguard.study.attacks import TARGET, TEMPLATES, AttackSet
from latentguard.study.cached_model import CachedModel, Tools
from latentguard.study.figures import figure_06_jailbreaks as jailbreaks
from latentguard.study.figures.figure_06_jailbreaks.collect import Attack, Beliefs, Records, pooled
from latentguard.study.figures.figure_06_jailbreaks.report import (
    ADDED,
    HARMFUL,
    INSIDE,
    KEPT,
    LOWER,
    OVER_FORM,
    REFUSE,
    SEALED,
)
from latentguard.study.settings import Settings
from study.figures.planted import Planted, Silent

SORRY, FINE = "I'm sorry, but I cannot help with that.", "Sure, here is a poem about the sea."


def believed(name, harmful, refuse=()):
    prompts = tuple(Prompt(f"{name} {n}", id=f"{name}{n}") for n in range(len(harmful)))
    refuse = None if refuse is None else np.resize(np.asarray(refuse or [0.0]), len(harmful))
    return Beliefs(prompts, np.asarray(harmful, dtype=float), refuse)


def attack(kind, beliefs, accepted, wrapped=(), bare=(), family=None, **how):
    twins = tuple(Prompt(f"twin {n}") for n in range(len(wrapped)))
    known = tuple(range(len(beliefs.prompts))) if len(wrapped) else ()
    frames = tuple(f"{{instruction}} {kind} {n}" for n in known)
    attack_set = AttackSet(
        kind, family or kind, beliefs.prompts, known, frames, twins, twins, **how
    )
    sides = (np.asarray(side, dtype=float) for side in (wrapped, bare))
    return Attack(attack_set, beliefs, tuple(accepted), *sides)


def records(attacks=(), refused=None, harmless=None, **more):
    refused = refused or believed("refused", [0.3, 0.5], [0.2, 0.4])
    harmless = harmless or believed("harmless", [-0.3, -0.1], [-0.2, -0.2])
    return Records(tuple(attacks), refused, harmless, 0, "Centroids: some", **more)


def rows_of(finding, title):
    table = next(p for p in finding.section.parts if p.title == title)
    return {tuple(c for c in row if isinstance(c, str)): row for row in table.rows}


def values_of(finding, title):
    columns = next(p for p in finding.section.parts if p.title == title).columns
    at = columns.index("value")
    return {key: row[at] for key, row in rows_of(finding, title).items()}


FEW = Settings(enough=2)


class TestEffects:
    def test_only_accepted_attacks_count(self):
        one = attack("suffix", believed("s", [0.1, 0.2, 9.0, 7.0], [-0.1, -0.3, 5.0, 6.0]), [
            True, True, False, None
        ])  # fmt: skip
        found = jailbreaks.analyse(records([one]), FEW).effects
        assert found[f"{HARMFUL}: suffix"].value == pytest.approx(0.15)
        assert found[f"{REFUSE}: suffix"].value == pytest.approx(-0.2)
        assert found[f"{LOWER}: suffix"].value == pytest.approx(-0.2 - 0.3)
        assert found[f"{HARMFUL}: suffix"].n == found[f"{REFUSE}: suffix"].n == (2, 0)
        assert found[f"{LOWER}: suffix"].n == (2, 2)

    @pytest.mark.parametrize("name", ["persuasion", "Persuasive", "PAP", "pap (logical appeal)"])
    def test_the_claim_is_about_each_given_kind_but_persuasion(self, name):
        """Own templates and persuasion are shown beside it: no condition takes their names."""
        kinds = [
            attack("own template: a", believed("a", [0.1]), [True], family="own templates"),
            attack("own template: b", believed("b", [0.5]), [True], family="own templates"),
            attack(name, believed("p", [-0.6, -0.6]), [True, True]),
            attack("suffix", believed("s", [0.2, 0.4]), [True, True]),
            attack("own suffixes", believed("o", [0.6, 0.8]), [True, True]),
        ]
        finding = jailbreaks.analyse(records(kinds), FEW)
        found = finding.effects
        assert found[f"{HARMFUL}, own templates"].value == pytest.approx(0.3)
        assert found[f"{HARMFUL}, {name}"].value == pytest.approx(-0.6)
        claimed = {key for key in found if key.startswith(f"{HARMFUL}: ")}
        assert claimed == {f"{HARMFUL}: suffix", f"{HARMFUL}: own suffixes"}
        assert f"Shown beside the claim: own templates, {name}." in finding.section.text
        shown = values_of(finding, "Beliefs under attack")
        whole = shown["all accepted attacks of the claim", "\u0394 harmful"]
        assert whole == pytest.approx(0.5)

    def test_requests_and_templates_are_drawn_each_on_its_own(self):
        """Two templates far apart, ten requests each: the templates decide the interval."""
        values = np.repeat([-1.0, 1.0], 10) + 0.01 * np.random.default_rng(0).normal(size=20)
        prompts = tuple(Prompt(f"t{k % 2} {k // 2}", pair=f"r{k % 10}") for k in range(20))
        wrappers = tuple(f"template {k // 10}" for k in range(20))
        beliefs = Beliefs(prompts, values, values - 5, wrappers)
        one = attack("template", beliefs, [True] * 20)
        wide = jailbreaks.analyse(records([one]), FEW).effects[f"{HARMFUL}: template"]
        assert wide.low < -0.9 < 0.9 < wide.high

    @pytest.mark.parametrize("reads", ["request", "form"])
    def test_form_matched_pairs_inside_the_wrapper_decide(self, reads):
        """A belief in the request tells twins apart; one in their form does not."""
        n, rng = 30, np.random.default_rng(0)
        pairs = tuple(
            Prompt(f"{k} {side}", harmful=side) for k in range(n) for side in (True, False)
        )
        harm = np.array([1.0 if p.harmful else -1.0 for p in pairs])
        values = (harm if reads == "request" else 0) + 0.3 * rng.normal(size=2 * n)
        one = attack(
            "suffix", believed("s", rng.normal(1, 0.3, n)), [True] * n, -np.ones(n), np.ones(n)
        )
        one = replace(
            one,
            attack_set=replace(one.attack_set, matched=pairs),
            sealed=np.ones(n),
            matched=values,
            matched_form=rng.normal(size=2 * n),
        )
        found = jailbreaks.analyse(records([one]), FEW).effects
        assert found[f"{SEALED}: suffix"].value == 1
        assert (found[KEPT].low > 0) is (reads == "request")
        assert (found[OVER_FORM].low > 0.1) is (reads == "request")
        assert (found[KEPT].high < 0) is (reads == "form")

    def test_too_few_give_no_effect_but_a_sentence(self):
        one = attack("suffix", believed("s", [0.1, 0.2, 0.3]), [True, False, None])
        finding = jailbreaks.analyse(records([one]), FEW)
        assert finding.effects == {}
        assert "suffix: 1 of 3 attacks were accepted" in " ".join(finding.caveats)

    def test_inside_the_wrapper(self):
        """Mean over the templates that end in their own token; the others apart."""
        rng = np.random.default_rng(0)
        kinds, areas, bare = [], {True: [], False: []}, rng.normal(size=7)
        for n in range(4):
            harmful, wrapped = rng.normal(0.5, 1, size=5), rng.normal(size=7)
            ends = n < 3
            kinds.append(
                attack(f"own template: {n}", believed("t", harmful), [False] * 5, wrapped, bare,
                       family="own templates", paired=False, ends=ends)
            )  # fmt: skip
            areas[ends].append(roc_auc_score([1] * 5 + [0] * 7, [*harmful, *wrapped]))
        finding = jailbreaks.analyse(records(kinds), FEW)
        found = finding.effects
        assert found[INSIDE].value == pytest.approx(np.mean(areas[True]))
        assert found[INSIDE].n == (5, 7)
        assert found[f"{INSIDE}, read at the instruction"].value == pytest.approx(areas[False][0])
        added = np.mean([k.wrapped for k in kinds[:3]], axis=0) - bare
        assert found[ADDED].value == pytest.approx(added.mean())
        assert found[ADDED].n == (7, 0)
        shown = values_of(finding, "Inside the same wrapper")
        assert shown["own template: 0", "wrapper", "AUROC"] == pytest.approx(areas[True][0])
        assert shown["own template: 3", "instruction", "AUROC"] == pytest.approx(areas[False][0])
        assert shown["own templates, mean", "wrapper", "AUROC"] == found[INSIDE].value
        assert shown["none", "instruction", "AUROC"] == 1.0

    def test_a_belief_that_reads_the_wrapper_alone_is_found_out(self):
        """Far from harmless prompts, yet no different from harmless prompts in the wrapper."""
        same = np.linspace(0.8, 0.9, 30)
        one = attack("suffix", believed("s", same), [True] * 30, same, same - 1.5)
        finding = jailbreaks.analyse(records([one]), FEW)
        believed_table = values_of(finding, "Beliefs under attack")
        assert believed_table["suffix", "AUROC"] == 1.0
        assert finding.effects[f"{INSIDE}: suffix"].value == 0.5
        inside = values_of(finding, "Inside the same wrapper")
        assert inside["suffix", "wrapper", "added to harmless"] == pytest.approx(1.5)

    def test_paired_wrappers_are_drawn_in_pairs(self):
        """Where each wrapper shifts both alike, pairs leave the order as it is."""
        shift = np.arange(40.0)
        one = attack("suffix", believed("s", shift + 0.5), [True] * 40, shift, shift)
        found = jailbreaks.analyse(records([one]), FEW).effects[f"{INSIDE}: suffix"]
        assert found.n == (40, 0)
        assert found.low > 0.5  # independent draws would straddle chance
        assert found.value == pytest.approx(
            roc_auc_score([1] * 40 + [0] * 40, [*shift + 0.5, *shift])
        )


class TestBootstrap:
    def test_attacks_on_one_request_are_drawn_together(self):
        """Ten copies of a row are one observation."""
        values = np.random.default_rng(1).normal(size=20)
        names = [f"request {n}" for n in range(20)]
        once, again = (
            bootstrap_mean(values),
            bootstrap_mean(np.repeat(values, 10), np.repeat(names, 10).tolist()),
        )
        assert (again.value, again.n) == (pytest.approx(once.value), (200, 0))
        assert again.high - again.low == pytest.approx(once.high - once.low, rel=0.1)
        assert once.high - once.low == pytest.approx(2 * 1.96 * values.std() / 20**0.5, rel=0.15)

    @drawn(st.integers(1, 8), st.integers(1, 8), st.integers(0, 2**32 - 1))
    def test_area_by_wins(self, n, m, seed):
        rng = np.random.default_rng(seed)
        harmful, harmless = rng.integers(0, 4, n).astype(float), rng.integers(0, 4, m).astype(float)
        found = auroc_interval(win_matrix(harmful, harmless))
        labels, scores = [1] * n + [0] * m, [*harmful, *harmless]
        assert found.value == pytest.approx(roc_auc_score(labels, scores))
        assert 0 <= found.low <= found.high <= 1

    def test_pool(self):
        one = attack("a", believed("a", [1, 2, 3], [4, 5, 6]), [True, False, None])
        two = attack("b", believed("b", [7], [8]), [True])
        assert pooled([one, two]).harmful.tolist() == [1, 7]
        assert pooled([one, two]).refuse.tolist() == [4, 8]
        assert pooled([one, two], (False,)).harmful.tolist() == [2]
        assert pooled([one], (True, False, None)).harmful.tolist() == [1, 2, 3]
        assert [p.id for p in pooled([one, two]).prompts] == ["a0", "b0"]
        assert pooled([]).prompts == ()
        assert pooled([attack("a", believed("a", [1], None), [True])]).refuse is None


class TestShown:
    def test_rates(self):
        flags = [True, True, False, None]
        finding = jailbreaks.analyse(records([attack("a", believed("a", range(4)), flags)]), FEW)
        row = rows_of(finding, "Success of attacks")[("a",)]
        assert row[1] == pytest.approx(2 / 3)
        assert row[4:] == (3, 1)

    def test_what_fails_is_drawn_apart(self):
        kinds = [
            attack("works", believed("w", [0.1, 0.2, 0.3]), [True, True, False]),
            attack("fails", believed("f", [0.4, 0.5]), [False, None]),
        ]
        finding = jailbreaks.analyse(records(kinds), FEW)
        good, bad = (p for p in finding.section.parts if hasattr(p, "plot"))
        assert {t.name: len(t.x) for t in good.plot.data} == {"refused harmful": 2, "works": 2}
        assert {t.name: len(t.x) for t in bad.plot.data} == {"refused harmful": 2, "fails": 2}
        assert "2 works" in good.caption
        assert "2 fails" in bad.caption
        assert list(good.plot.data[1].hovertext) == ["w0", "w1"]
        shown = values_of(finding, "Beliefs under attack")
        assert shown["fails, none accepted", "Δ harmful"] == pytest.approx(0.45)
        assert shown["fails, refused", "Δ harmful"] == pytest.approx(0.4)
        assert shown["works", "Δ harmful"] == pytest.approx(0.15)
        assert shown["accepted harmless", "Δ harmful"] == pytest.approx(-0.2)
        assert ("accepted harmless", "AUROC") not in shown

    def test_it_can_be_saved(self, tmp_path):
        one = attack("suffix", believed("s", [0.1, 0.2]), [True, True], [0, 0], [0, 0])
        finding = jailbreaks.analyse(records([one]), FEW)
        Report("t", (finding.section,)).save(tmp_path)
        assert "Inside the same wrapper" in (tmp_path / "report.html").read_text()

    def test_nothing_at_all(self):
        none = believed("n", []), believed("n", [])
        finding = jailbreaks.analyse(records([], *none, missing=("No attacks.",)), FEW)
        assert (finding.section.parts, finding.effects) == ((), {})
        assert finding.caveats[0] == "No attacks."
        assert sum("nothing is concluded" in one for one in finding.caveats) == 2

    def test_without_a_refusal_axis(self):
        one = attack("s", believed("s", [0.1, 0.2], None), [True, True])
        none = believed("r", [0.3], None), believed("h", [0.0], None)
        finding = jailbreaks.analyse(records([one], *none), FEW)
        assert set(finding.effects) == {f"{HARMFUL}: s"}
        assert not any(hasattr(part, "plot") for part in finding.section.parts)
        assert any("refuse is not known" in one for one in finding.caveats)

    def test_without_harmless_prompts(self):
        one = attack("s", believed("s", [0.1, 0.2]), [True, False])
        finding = jailbreaks.analyse(records([one], harmless=believed("h", [])), FEW)
        assert not any("AUROC" in row for row in rows_of(finding, "Beliefs under attack"))


def given(prompt_groups, settings):
    """Attacks on two test prompts and on one of a centroid."""
    fitted = prompt_groups.fit["refused_harmful"][0]
    asked = [*prompt_groups.test["refused_harmful"][:2], fitted]
    attacks = [replace(p, text=f"{p.text} ! x", category="suffix", refused=None) for p in asked]
    attacks.append(Prompt("Kindly consider", id="k", harmful=True, category="persuasion"))
    return replace(prompt_groups, pools=replace(prompt_groups.pools, jailbreaks=tuple(attacks)))


def answer(prompt, one):
    return FINE if prompt.category in ("suffix", "fiction") else SORRY


class TestCollect:
    def test_end_to_end(self, cached_model, prompt_groups, settings, tmp_path):
        prompt_groups = given(prompt_groups, settings)
        finding = jailbreaks.analyse(
            jailbreaks.collect(cached_model, prompt_groups, settings), settings
        )
        Report("t", (finding.section,)).save(tmp_path)
        json.dumps([list(map(str, row)) for row in rows_of(finding, "Success of attacks")])

    def test_what_is_asked_and_read(self, cached_model, prompt_groups, settings):
        cached_model.uncached = Planted(cached_model.uncached, answer)
        prompt_groups = given(prompt_groups, settings)
        found = jailbreaks.collect(cached_model, prompt_groups, settings)
        kinds = {a.attack_set.kind: a for a in found.attacks}
        assert list(kinds) == [
            "suffix",
            "persuasion",
            *(f"own template: {t.name}" for t in TEMPLATES),
        ]
        assert found.left_out == 1
        assert found.missing == ()
        assert kinds["suffix"].accepted == (True, True)
        assert kinds["own template: fiction"].accepted == (True,) * settings.attacked
        assert kinds["own template: academic"].accepted == (False,) * settings.attacked
        assert len(kinds["suffix"].wrapped) == len(kinds["suffix"].known) == 2
        assert kinds["persuasion"].wrapped.shape == (0,)
        assert found.refused.prompts == prompt_groups.test["refused_harmful"]
        one = kinds["own template: opening"]
        assert one.attack_set.bare == prompt_groups.test["accepted_harmless"][: settings.attacked]
        assert one.bare == pytest.approx(found.harmless.harmful[: settings.attacked])

    def test_beliefs_are_the_papers(self, cached_model, prompt_groups, settings):
        """Equations 3 and 4 restated, over the layers 1 to L."""
        found = jailbreaks.collect(cached_model, prompt_groups, settings).refused
        fit = {
            g: cached_model.states(prompt_groups.fit[g])
            for g in ("refused_harmful", "accepted_harmless")
        }
        tested = cached_model.states(prompt_groups.test["refused_harmful"])

        def cosine(a, b):
            return a @ b / np.linalg.norm(a) / np.linalg.norm(b)

        for position, values in (("t_inst", found.harmful), ("t_post", found.refuse)):
            means = [one.at(position).double().mean(0).numpy() for one in fit.values()]
            for h, value in zip(tested.at(position).double().numpy(), values, strict=True):
                layers = range(1, len(h))
                s = [cosine(h[k], means[0][k]) - cosine(h[k], means[1][k]) for k in layers]
                assert value == pytest.approx(np.mean(s), abs=1e-5)

    def test_a_second_time_nothing_is_asked(self, cached_model, prompt_groups, settings):
        tools = Tools(suffix=lambda prompt, target, *, steps, seed: f" {steps}")
        first = CachedModel(cached_model.uncached, cached_model.store, tools=tools)
        settings = replace(settings, suffixes=2)
        prompt_groups = given(prompt_groups, settings)
        once = jailbreaks.collect(first, prompt_groups, settings)
        silent = CachedModel(
            Silent(cached_model.uncached), cached_model.store, tools=Tools(suffix=never_again)
        )
        again = jailbreaks.collect(silent, prompt_groups, settings)
        for one, other in zip(once.attacks, again.attacks, strict=True):
            assert (one.attack_set, one.accepted) == (other.attack_set, other.accepted)
            assert one.beliefs.harmful.tolist() == other.beliefs.harmful.tolist()

    def test_suffixes(self, cached_model, prompt_groups, settings):
        asked = []

        def search(prompt, target, *, steps, seed):
            asked.append((prompt, target, steps, seed))
            return f" !{len(asked)}"

        cached_model.tools = Tools(suffix=search)
        settings = replace(settings, suffixes=2, suffix_steps=5, seed=9)
        found = jailbreaks.collect(cached_model, prompt_groups, settings).attacks[-1]
        bases = prompt_groups.test["refused_harmful"][:2]
        assert asked == [(p, TARGET, 5, 9) for p in bases]
        assert [p.text for p in found.attack_set.attacked] == [
            f"{bases[0].text} !1",
            f"{bases[1].text} !2",
        ]
        assert len(found.wrapped) == 2

    def test_suffixes_without_the_tool(self, cached_model, prompt_groups, settings):
        found = jailbreaks.collect(cached_model, prompt_groups, replace(settings, suffixes=2))
        assert any("nanogcg" in one for one in found.missing)

    @pytest.mark.parametrize("empty", ["refused_harmful", "accepted_harmless"])
    def test_empty_groups(self, cached_model, prompt_groups, settings, empty):
        prompt_groups = given(
            replace(prompt_groups, test=prompt_groups.test | {empty: ()}), settings
        )
        cached_model.tools = Tools(suffix=lambda prompt, target, *, steps, seed: " x")
        settings = replace(settings, suffixes=2)
        finding = jailbreaks.analyse(
            jailbreaks.collect(cached_model, prompt_groups, settings), settings
        )
        assert any("nothing is concluded" in one for one in finding.caveats)
        assert INSIDE not in finding.effects

    def test_a_model_that_does_not_refuse(self, cached_model, prompt_groups, settings):
        fit = {
            g: tuple(replace(p, refused=False) for p in ps) for g, ps in prompt_groups.fit.items()
        }
        fit = {
            "accepted_harmful": fit["refused_harmful"],
            "accepted_harmless": fit["accepted_harmless"],
        }
        test = {"accepted_harmless": prompt_groups.test["accepted_harmless"]}
        found = jailbreaks.collect(
            cached_model, replace(prompt_groups, fit=fit, test=test), settings
        )
        assert found.attacks == ()
        finding = jailbreaks.analyse(found, settings)
        assert finding.effects == {}
        assert any("refusal axis" in one for one in finding.caveats)


def never_again(prompt, target, *, steps, seed):
    raise AssertionError("a suffix was searched again")
