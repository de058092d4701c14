"""``--protocol paper``: its template, its groups, and every deviation beside each verdict."""

from dataclasses import replace

import pytest

from latentguard.errors import LatentGuardError, TemplateError
from latentguard.prompts import Prompt
from latentguard.study.claims import CLAIMS
from latentguard.study.claims_report import claims_section
from latentguard.study.labelling import Asked, prompt_groups_of
from latentguard.study.prompt_groups import PromptGroups, PromptPools
from latentguard.study.protocol import (
    OWN_TEMPLATE,
    PAPER_SETS,
    Deviation,
    beside_verdicts,
    deviations,
    deviations_section,
    paper_pools,
    with_protocol_template,
)
from latentguard.study.settings import Settings, preset, read_settings

PAPER = preset("paper")


def prompts(count, name, *, harmful, refused=None):
    return tuple(
        Prompt(f"{name} {n}", id=f"{name}-{n}", harmful=harmful, refused=refused, source=name)
        for n in range(count)
    )


def complete():
    """Groups as the protocol asks for, each set named."""
    pools = PromptPools(
        **{
            pool: tuple(p for name in sets for p in prompts(1, name, harmful=True))
            for pool, sets in PAPER_SETS.items()
        }
    )
    fit = {
        "refused_harmful": prompts(100, "advbench", harmful=True),
        "accepted_harmless": prompts(100, "alpaca_harmless", harmful=False),
    }
    return PromptGroups(pools, fit, {})


class TestTemplate:
    def test_the_models_own_by_default(self, model):
        assert with_protocol_template(model, Settings(), {}) == (model, OWN_TEMPLATE)
        assert with_protocol_template(model, PAPER, {}) == (model, OWN_TEMPLATE)

    def test_that_of_the_configuration_comes_first(self, model):
        other, name = with_protocol_template(model, PAPER, {"text": "Q: {instruction}\nA:"})
        assert name == "[template] of the configuration"
        assert model.fingerprint.differences(other.fingerprint)[0].startswith("template")

    @pytest.mark.parametrize(
        "table", [{"txt": "a"}, {"text": 3}, {"text": "{instruction}", "x": 1}]
    )
    def test_another_table(self, model, table):
        with pytest.raises(LatentGuardError, match=r"\[template\] needs 'text'"):
            with_protocol_template(model, PAPER, table)

    def test_a_text_without_a_slot(self, model):
        with pytest.raises(TemplateError, match="should hold"):
            with_protocol_template(model, PAPER, {"text": "Q:"})


class TestDeviations:
    def test_none_when_all_is_as_the_protocol_asks(self):
        assert deviations(PAPER, complete(), template="Table 4, Qwen2", judge=None) == ()
        assert deviations(Settings(), complete(), template=OWN_TEMPLATE, judge=None) == ()

    def test_a_setting_names_the_experiments_that_it_changes(self):
        found = deviations(
            replace(PAPER, steered=20, fit=60), complete(), template="Table 4, Qwen2", judge=None
        )
        assert [(one.what, one.preset, one.here) for one in found] == [
            ("fit", "100", "60"),
            ("steered", "100", "20"),
        ]
        assert [one.concerns("guards") for one in found] == [True, False]
        assert all(one.concerns("steering") for one in found)

    def test_a_template_a_judge_a_set_and_a_small_centroid(self):
        groups = complete()
        few = replace(
            groups,
            pools=replace(groups.pools, toxicchat=(), harmful=prompts(1, "mine", harmful=True)),
            fit={**groups.fit, "refused_harmful": prompts(3, "advbench", harmful=True)},
        )
        found = deviations(PAPER, few, template=OWN_TEMPLATE, judge="a model")
        said = {one.what: one.here for one in found}
        assert said == {
            "judge": "a model",
            "template": OWN_TEMPLATE,
            "prompts: harmful": "mine",
            "prompts: toxicchat": "none",
            "centroid of refused harmful prompts": "3",
        }
        scopes = {one.what: one.experiments for one in found}
        assert scopes["prompts: toxicchat"] == ("guards",)
        assert scopes["template"] == ()

    @pytest.mark.parametrize(
        ("name", "experiments"),
        [
            ("layer_step", {"patching", "knockout", "ablation", "dose"}),
            ("probed", {"patching", "ablation"}),
            ("coefficients", {"steering", "finetuning"}),
            ("attacked", {"jailbreaks", "guards"}),
        ],
    )
    def test_a_setting_concerns_each_experiment_that_reads_it(self, name, experiments):
        value = (3.0,) if name == "coefficients" else 3
        settings = replace(PAPER, **{name: value})
        (found,) = deviations(settings, complete(), template="Table 4", judge=None)
        assert experiments <= set(found.experiments)

    def test_they_stand_beside_each_verdict(self):
        found = [Deviation("steered", "100", "20", ("steering",)), Deviation("fit", "100", "6")]
        section = beside_verdicts(claims_section({}), found)
        table = section.parts[0]
        cells = [row[-1] for row in table.rows]
        assert table.columns[-1] == "deviations (protocol)"
        assert len(cells) == len(CLAIMS)
        for claim, cell in zip(CLAIMS, cells, strict=True):
            assert "fit: 6 (100)" in cell
            assert ("steered: 20 (100)" in cell) is (claim.experiment == "steering")

    def test_no_deviation_is_said_to_be_none(self):
        table = beside_verdicts(claims_section({}), []).parts[0]
        assert {row[-1] for row in table.rows} == {"none"}
        assert "No deviation" in deviations_section(PAPER, [], template="Table 4, Qwen2").text


class TestSettings:
    def test_the_file_or_the_option_names_it(self, tmp_path):
        path = tmp_path / "s.toml"
        path.write_text('protocol = "paper"\nsteered = 7\n')
        assert read_settings(path) == replace(PAPER, steered=7)
        assert read_settings(path, protocol="paper") == replace(PAPER, steered=7)
        with pytest.raises(LatentGuardError, match="--protocol is 'controlled'"):
            read_settings(path, protocol="controlled")

    def test_a_small_budget_of_it_keeps_what_makes_it(self):
        small = read_settings(budget="small", protocol="paper")
        kept = ("protocol", "middle_of", "finetune_seeds", "inversion_coefficient")
        assert all(getattr(small, name) == getattr(PAPER, name) for name in kept)

    @pytest.mark.parametrize("value", ['"strict"', "1", "true"])
    def test_an_unknown_protocol(self, tmp_path, value):
        path = tmp_path / "s.toml"
        path.write_text(f"protocol = {value}\n")
        with pytest.raises(LatentGuardError, match="'protocol' should be like 'controlled'"):
            read_settings(path)


class TestGroups:
    def groups(self, settings):
        plain = [
            *prompts(30, "advbench", harmful=True, refused=True),
            *prompts(9, "jbb", harmful=True, refused=False),
        ]
        safe = prompts(30, "alpaca_harmless", harmful=False, refused=False)
        over = [
            *prompts(10, "xstest", harmful=False, refused=True),
            *(
                replace(p, text=f"{p.text}!")
                for p in prompts(10, "xstest", harmful=False, refused=False)
            ),
        ]
        sorry = [
            *prompts(10, "sorry_bench", harmful=True, refused=False),
            *(
                replace(p, text=f"{p.text}!")
                for p in prompts(5, "sorry_bench", harmful=True, refused=True)
            ),
        ]
        pools = paper_pools(PromptPools((), (), sorry_bench=tuple(sorry)))
        assert pools.held_out == pools.sorry_bench
        names = {"harmful": plain, "harmless": safe, "over_refusal": over, "held_out": sorry}
        asked = [Asked(name, tuple(of), ("accepted",) * len(of)) for name, of in names.items()]
        return prompt_groups_of(asked, pools, settings)

    def test_centroids_are_of_appendix_b(self):
        found = self.groups(replace(PAPER, fit=20))
        sources = {group: {p.source for p in of} for group, of in found.fit.items()}
        assert sources["refused_harmful"] == {"advbench"}
        assert sources["accepted_harmful"] == {"jbb"}
        assert sources["accepted_harmless"] == {"alpaca_harmless", "xstest"}
        assert sources["refused_harmless"] == set()
        assert len(found.fit["refused_harmful"]) == len(found.fit["accepted_harmless"]) == 20

    def test_tests_are_those_that_the_paper_holds_out(self):
        found = self.groups(replace(PAPER, fit=20))
        sources = {group: {p.source for p in of} for group, of in found.test.items()}
        assert sources["accepted_harmful"] == {"sorry_bench"}
        assert sources["refused_harmless"] == {"xstest"}
        assert sources["refused_harmful"] == {"advbench"}
        fitted = {p.text for of in found.fit.values() for p in of}
        assert not fitted & {p.text for of in found.test.values() for p in of}

    def test_the_controlled_protocol_keeps_xstest_out_of_centroids(self):
        found = self.groups(replace(Settings(), fit=20))
        assert {p.source for p in found.fit["accepted_harmless"]} == {"alpaca_harmless"}
