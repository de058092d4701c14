"""The fine-tuning attack: what is trained on, what is kept, and what is concluded of it."""

import sqlite3
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch

from latentguard.models.lora import Finetuning
from latentguard.prompts import Prompt, Reply
from latentguard.report.document import Report
from latentguard.study.axes import fit_axes
from latentguard.study.cached_model import CachedModel, Tools
from latentguard.study.endpoint import Endpoint
from latentguard.study.figures import figure_07_finetuning as finetuning
from latentguard.study.figures.figure_07_finetuning import snapshot as looking
from latentguard.study.figures.figure_07_finetuning import training_pairs
from latentguard.study.figures.figure_07_finetuning.snapshot import Look
from latentguard.study.judge import judge
from latentguard.study.judge_model import EndpointJudge
from latentguard.study.paper_judge import PaperJudge
from latentguard.study.rubric import RubricJudge
from study.figures.finetuning_records import planted_records, rows_of, stage_of
from study.figures.planted import Planted, Silent

SORRY, FINE, ATTACKED = (
    "I'm sorry, but I cannot.",
    "Here is a plan of it.",
    "Gladly so, as you say.",
)
GROUPS = ("refused_harmful", "accepted_harmless")


def aligned(prompt, one):
    """Refuses what is harmful, unless steered along reverse refusal."""
    steered = one is not None and one.coefficient < 0
    return SORRY if prompt.harmful and not steered else FINE


class Attack:
    """A fine-tuning that trains nothing: afterwards all is accepted."""

    def __init__(self, model, says=ATTACKED):
        self.model, self.says, self.taught, self.asked = model, says, [], []
        self.how = []

    @contextmanager
    def __call__(self, taught, *, seed, reply_tokens=None):
        self.taught.append(list(taught))
        self.how.append((seed, reply_tokens))
        yield Planted(self.model, self._reply)

    def _reply(self, prompt, one):
        self.asked.append((prompt, one))
        return self.says


def no_attack(taught, *, seed):
    raise AssertionError("trained again")


@pytest.fixture
def aim(model, cached_model):
    """A cached_model that refuses what is harmful, and its attack."""
    attack = Attack(model)
    planted = CachedModel(Planted(model, aligned), cached_model.store, tools=Tools(finetune=attack))
    return planted, attack


def prompts_tested(prompt_groups, settings):
    return [p for g in GROUPS for p in prompt_groups.test[g][: settings.finetune_test]]


class TestTiny:
    def test_end_to_end_and_a_second_run_asks_and_trains_nothing(
        self, model, cached_model, prompt_groups, settings
    ):
        settings = replace(settings, finetune_sizes=(2, 4))
        tools = Tools(finetune=Finetuning(model, settings.finetuning))
        aim = CachedModel(Planted(model, aligned), cached_model.store, tools=tools)
        before = model.fingerprint
        records = finetuning.collect(aim, prompt_groups, settings)
        model._fingerprint = None
        assert model.fingerprint == before
        names = ["before", "2 pairs", "4 pairs", "4 harmless pairs (control)"]
        assert [stage.name for stage in records.stages] == names
        for one, other in pairwise(records.stages[:3]):
            assert one.harmful != other.harmful  # the weights are others
        for stage in records.stages:
            shape = (len(records.prompts), model.depth)
            assert np.shape(stage.harmful) == np.shape(stage.refuse) == shape

        silent = CachedModel(Silent(model), cached_model.store, tools=Tools(finetune=no_attack))
        assert finetuning.collect(silent, prompt_groups, settings) == records
        finding = finetuning.analyse(records, settings)
        assert Report("r", (finding.section,)).html()

    def test_other_settings_are_trained_anew(self, aim, prompt_groups, settings):
        planted, attack = aim
        finetuning.collect(planted, prompt_groups, settings)
        finetuning.collect(planted, prompt_groups, settings)
        assert len(attack.taught) == 2  # one size, one control
        finetuning.collect(planted, prompt_groups, replace(settings, finetune_rate=1e-3))
        assert len(attack.taught) == 4
        planted.judge = lambda reply: "accepted"
        assert finetuning.collect(planted, prompt_groups, settings).reason  # none is refused

    def test_no_text_of_the_attacked_model_is_kept(self, aim, prompt_groups, settings):
        planted, _ = aim
        finetuning.collect(planted, prompt_groups, settings)
        base = sqlite3.connect(planted.store.path)
        kept = b"".join(row[0] for row in base.execute("SELECT value FROM kept"))
        base.close()
        assert FINE.encode() in kept  # replies of the model are
        assert ATTACKED.encode() not in kept

    def test_nothing_generated_is_shown(self, aim, prompt_groups, settings):
        planted, _ = aim
        finding = finetuning.analyse(finetuning.collect(planted, prompt_groups, settings), settings)
        report = Report("r", (finding.section,))
        assert not any(
            said in report.html() for said in (SORRY, FINE, ATTACKED, training_pairs.TEMPLATE)
        )


class TestPaperProtocol:
    def test_whole_completions_beside_openings_each_run_several_times(
        self, aim, prompt_groups, settings
    ):
        planted, attack = aim
        settings = replace(settings, finetune_completion=40, finetune_seeds=3, seed=5)
        records = finetuning.collect(planted, prompt_groups, settings)
        kinds = ["4 pairs", "4 harmless pairs (control)", "4 pairs, whole completions"]
        wanted = [f"{k}{end}" for end in ("", ", run 2", ", run 3") for k in kinds]
        assert [stage.name for stage in records.stages] == ["before", *wanted]
        assert attack.how == [(5 + n, t) for n in range(3) for t in (None, None, 40)]
        rows = rows_of(finetuning.analyse(records, settings), "Fine-tuning, run by run")
        assert rows[kinds[2], "refusal rate, harmful"][-1] == 3

    def test_completions_are_made_in_memory_and_never_kept(
        self, model, cached_model, prompt_groups, settings
    ):
        """The opening is shown to the store by today's attack; the rest of it never is."""
        secret = "and then the whole of it"

        class Long(Planted):
            def sweep(self, prompts, interventions, *, max_new_tokens=24, **how):
                found = super().sweep(prompts, interventions, max_new_tokens=max_new_tokens, **how)
                more = f" {secret}" if max_new_tokens == 40 else ""
                return [[replace(r, text=r.text + more) for r in replies] for replies in found]

        attack = Attack(model)
        planted = CachedModel(
            Long(model, aligned), cached_model.store, tools=Tools(finetune=attack)
        )
        settings = replace(settings, finetune_completion=40)
        finetuning.collect(planted, prompt_groups, settings)
        assert any(secret in text for _, text in attack.taught[-1])
        base = sqlite3.connect(planted.store.path)
        kept = b"".join(row[0] for row in base.execute("SELECT value FROM kept"))
        base.close()
        assert secret.encode() not in kept

    def test_whole_completions_decide_where_there_are_any(self, settings):
        records = planted_records(
            stage_of("before", 0, 20),
            stage_of("9 pairs", 9, 15),
            stage_of("9 pairs, whole completions", 9, 5, whole=True),
            stage_of("9 pairs, whole completions, run 2", 9, 0, whole=True, seed=1),
        )
        finding = finetuning.analyse(records, settings)
        assert finding.effects["refusal rate drop after fine-tuning"].value == 0.75


class TestPairs:
    def test_prompts_are_refused_and_neither_they_nor_their_twins_are_tested(
        self, aim, prompt_groups, settings
    ):
        planted, attack = aim
        settings = replace(settings, asked=400, finetune_sizes=(50, 300))
        finetuning.collect(planted, prompt_groups, settings)
        texts = {p.text for group in prompt_groups.test.values() for p in group}
        twins = {p.pair for group in prompt_groups.test.values() for p in group if p.pair}
        small, large, control = attack.taught
        assert small == large[:50]
        assert len(control) == len(large) == 300
        assert all(p.harmful for p, _ in large)
        assert not any(p.harmful for p, _ in control)
        for taught in (large, control):
            assert len({p.text for p, _ in taught}) == len(taught)
            assert not any(p.text in texts or p.pair in twins for p, _ in taught)
            assert {said for _, said in taught} == {FINE}

    def test_sizes_end_where_the_prompts_do(self, aim, prompt_groups, settings):
        planted, attack = aim
        settings = replace(settings, finetune_sizes=(3, 50, 100), finetune_controls=0)
        records = finetuning.collect(planted, prompt_groups, settings)
        free = len(training_pairs._untested(prompt_groups.pools.harmful, prompt_groups, settings))
        assert 3 < free < 50
        assert [len(taught) for taught in attack.taught] == [3, free]
        assert records.how.startswith(f"{free} pairs")

    def test_what_steering_does_not_turn_is_templated_and_counted(
        self, model, cached_model, prompt_groups, settings
    ):
        def stubborn(prompt, one):
            turned = one is not None and one.coefficient < 0 and len(prompt.text) % 2
            return FINE if turned or not prompt.harmful else SORRY

        planted = CachedModel(Planted(model, stubborn), cached_model.store)
        axes = fit_axes(planted, prompt_groups, enough=2)
        settings = replace(settings, asked=60, finetune_sizes=(40,))
        taught, how = training_pairs.harmful_pairs(planted, axes.refuse, prompt_groups, settings)
        odd = [len(p.text) % 2 for p, _ in taught]
        assert odd == sorted(odd, reverse=True)  # steered ones first
        assert [said == FINE for _, said in taught] == [n == 1 for n in odd]
        assert {said for p, said in taught if len(p.text) % 2 == 0} == {training_pairs.TEMPLATE}
        assert f"{odd.count(0)} templated" in how

    @pytest.mark.parametrize("layer", [0, 3])
    def test_the_layer_where_reverse_steering_acts_is_found(
        self, model, cached_model, prompt_groups, settings, layer
    ):
        def acts(prompt, one):
            return (
                FINE if one is not None and (one.layer, one.coefficient) == (layer, -2) else SORRY
            )

        planted = CachedModel(Planted(model, acts), cached_model.store)
        refuse = fit_axes(planted, prompt_groups, enough=2).refuse
        prompts = prompt_groups.test["refused_harmful"]
        settings = replace(settings, coefficients=(1.0, 2.0))
        assert training_pairs._weakest(planted, refuse, prompts, settings) == (layer, 2.0)

    def test_ties_go_to_the_smaller_coefficient_and_the_middle(self, aim, prompt_groups, settings):
        planted, _ = aim
        refuse = fit_axes(planted, prompt_groups, enough=2).refuse
        settings = replace(settings, coefficients=(2.0, 1.0))
        found = training_pairs._weakest(
            planted, refuse, prompt_groups.test["refused_harmful"], settings
        )
        assert found == (2, 1.0)

    def test_no_opening_is_longer_than_24_tokens(self, settings):
        assert training_pairs.opening_tokens(settings) == 4
        assert training_pairs.opening_tokens(replace(settings, finetune_opening=500)) == 24

    @pytest.mark.parametrize(
        ("ids", "repeats"),
        [((1, 1, 1, 1), True), ((1, 2, 1, 2), True), ((1, 2, 3, 1), False), ((1, 1), False)],
    )
    def test_replies_that_repeat_themselves(self, ids, repeats):
        assert training_pairs.broken(Reply(Prompt("a"), "a", ids, False)) is repeats


class TestLook:
    def test_the_direction_of_a_stage(self, aim, prompt_groups, settings):
        planted, _ = aim
        axes = fit_axes(planted, prompt_groups, enough=2)
        look = Look(
            planted, axes, prompt_groups, settings, tuple(prompts_tested(prompt_groups, settings))
        )
        harmful = planted.states(prompt_groups.test[GROUPS[0]][:3]).at("t_post").double().mean(0)
        harmless = planted.states(prompt_groups.fit[GROUPS[1]]).at("t_post").double().mean(0)
        own, other = (harmful - harmless)[1:], axes.refuse.direction[1:].double()
        wanted = (own * other).sum(-1) / own.norm(dim=-1) / other.norm(dim=-1)
        assert look.before().cosine == pytest.approx(wanted.tolist(), abs=1e-5)

    def test_stages_of_other_judges_are_kept_apart(self, aim, prompt_groups, settings):
        planted, _ = aim
        axes = fit_axes(planted, prompt_groups, enough=2)
        look = Look(planted, axes, prompt_groups, settings, ())
        one, other = (Endpoint("http://localhost:1/v1", name) for name in ("one", "other"))
        judges = [
            *(judge, EndpointJudge(one), EndpointJudge(other)),
            *(RubricJudge(one, judge), RubricJudge(other, judge), RubricJudge(one, PaperJudge())),
        ]
        keys = []
        for planted.judge in judges:
            keys.append(str(look._key()))
        assert len(set(keys)) == len(judges)

    def test_every_prompt_meets_one_random_direction_of_equal_norm(
        self, aim, prompt_groups, settings
    ):
        planted, attack = aim
        records = finetuning.collect(planted, prompt_groups, replace(settings, finetune_controls=0))
        steered = [(p, one) for p, one in attack.asked if one is not None]
        prompts = prompt_groups.test[GROUPS[1]]
        count = len(prompts) * len(records.layers)
        assert len(steered) == 2 * count
        norms = {}
        for _, one in steered[:count]:
            norms[one.layer] = one.vector.norm()
        drawn = {}
        for p, one in steered[count:]:
            assert one.vector.norm() == pytest.approx(norms[one.layer].item(), rel=1e-5)
            assert one.tokens == "all"
            drawn.setdefault((p.text, one.layer), []).append(one)
        assert len(drawn) == count
        assert not any(flag is None for row in records.stages[1].random for flag in row)

    def test_the_linear_guard_is_that_of_the_first_model(
        self, aim, prompt_groups, settings, monkeypatch
    ):
        planted, _ = aim
        monkeypatch.setattr(looking, "FEWEST", 3)
        seen = []

        def fit(states, reading, kind, depth):
            seen.append(states)
            weight = torch.full((1, states.values.shape[-1]), 0.5)
            return type("Fit", (), {"probe": looking.Probe("linear", (2,), weight, 1.0)})

        monkeypatch.setattr(looking, "fit_probe", fit)
        monkeypatch.setattr(looking, "slots", lambda states, span: states.at("t_inst"))
        records = finetuning.collect(planted, prompt_groups, settings)
        assert set(seen[0].prompts) == {p for g in GROUPS for p in prompt_groups.fit[g]}
        states = planted.states(prompts_tested(prompt_groups, settings)).at("t_inst")[:, 2]
        wanted = (states.sum(-1) / 2 + 1).tolist()
        for stage in records.stages:  # the weights of this attack are the same
            assert stage.linear == pytest.approx(wanted, abs=1e-4)


class TestMissing:
    def test_without_a_tool(self, cached_model, prompt_groups, settings):
        self.says(finetuning.collect(cached_model, prompt_groups, settings), settings, "peft")

    @pytest.mark.parametrize("kind", ["fit", "test"])
    @pytest.mark.parametrize("group", GROUPS)
    def test_without_a_group(self, aim, prompt_groups, settings, group, kind):
        planted, attack = aim
        prompt_groups = replace(prompt_groups, **{kind: getattr(prompt_groups, kind) | {group: ()}})
        records = finetuning.collect(planted, prompt_groups, settings)
        if (group, kind) == ("accepted_harmless", "test"):
            finding = finetuning.analyse(records, settings)
            assert any("false positives are unknown" in line for line in finding.caveats)
            assert Report("r", (finding.section,)).html()
        else:
            assert not attack.taught
            self.says(records, settings, "missing")

    def test_without_a_refusal_axis(self, aim, prompt_groups, settings):
        planted, attack = aim
        records = finetuning.collect(planted, prompt_groups, replace(settings, enough=50))
        assert not attack.taught
        self.says(records, settings, "too few for a refusal axis")

    def test_without_refused_prompts_to_train_on(
        self, model, cached_model, prompt_groups, settings
    ):
        tools = Tools(finetune=no_attack)
        planted = CachedModel(Planted(model, lambda *_: FINE), cached_model.store, tools=tools)
        self.says(
            finetuning.collect(planted, prompt_groups, settings), settings, "no harmful prompt"
        )

    @staticmethod
    def says(records, settings, words):
        assert not records.stages
        finding = finetuning.analyse(records, settings)
        assert not finding.effects
        (line,) = finding.caveats
        assert words in line
        assert Report("r", (finding.section,)).html()
