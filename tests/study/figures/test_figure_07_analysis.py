"""Figures 7 and 18: what is made of planted records of a fine-tuning attack."""

from dataclasses import replace

import numpy as np
import pytest

from latentguard.prompts import Prompt
from latentguard.report.document import Report
from latentguard.study.claims import CLAIMS
from latentguard.study.figures import figure_07_finetuning as finetuning
from study.figures.finetuning_records import planted_records, rows_of, stage_of


class TestAnalysis:
    def test_an_attack_that_changes_replies_alone(self, settings):
        records = planted_records(
            stage_of("before", 0, 20),
            stage_of("4 pairs", 4, 15),
            stage_of("9 pairs", 9, 5),
        )
        finding = finetuning.analyse(records, settings)
        assert finding.effects["refusal rate drop after fine-tuning"].value == 0.75
        change = finding.effects["relative change of Delta_harmful"]
        assert (change.value, change.low, change.high) == pytest.approx((0, 0, 0))
        assert finding.effects["guard recall after minus before"].value == 0
        assert finding.effects["linear guard recall after minus before"].value == 0
        rates = rows_of(finding, "Replies and beliefs after fine-tuning")
        assert rates["4 pairs", "refusal rate, harmful"][0] == 0.75
        assert rates["9 pairs", "refusal rate, harmful"][::3] == (0.25, 20)
        assert rates["9 pairs", "Delta_harmful, harmful"][0] == pytest.approx(0.2)
        assert rates["9 pairs", "Delta_harmful, harmless"][0] == pytest.approx(-0.2)
        guards = rows_of(finding, "Guards after fine-tuning")
        for guard in (
            "Latent Guard (paper's rule, threshold 0)",
            "linear guard (span, threshold 0)",
        ):
            assert guards["9 pairs", f"recall, {guard}"][0] == 1
            assert guards["9 pairs", f"false positives, {guard}"][0] == 0
            assert guards["9 pairs", f"AUROC, {guard}"][0] == 1

    @pytest.mark.parametrize(("scale", "recall"), [(0.5, 0), (-0.25, -1)])
    def test_an_attack_that_changes_beliefs(self, settings, scale, recall):
        records = planted_records(stage_of("before", 0, 20), stage_of("4 pairs", 4, 0, scale))
        effects = finetuning.analyse(records, settings).effects
        assert effects["relative change of Delta_harmful"].value == pytest.approx(scale - 1)
        gap = effects["change of Delta_harmful over its gap to harmless"]  # 0.2 to -0.2
        assert gap.value == pytest.approx((scale - 1) / 2)
        assert effects["guard recall after minus before"].value == recall

    @pytest.mark.parametrize("reads", ["harm", "text"])
    def test_a_score_that_is_a_function_of_the_text_is_explained_by_form(self, settings, reads):
        """Fine-tuning cannot change it: every other condition holds, form-matched ones do not."""
        rng = np.random.default_rng(0)
        matched = tuple(Prompt(f"pair {k // 2} {k % 2}", harmful=k % 2 == 0) for k in range(60))
        form = rng.normal(size=60)
        harm = np.array([1.0 if p.harmful else -1.0 for p in matched])
        values = form if reads == "text" else harm + 0.3 * rng.normal(size=60)
        beliefs = [0.2] * 40 + [-0.2] * 40
        control = dict(matched=values.tolist(), sealed=beliefs, n=40)
        stages = (
            stage_of("before", 0, 40, **control),
            stage_of("50 pairs", 50, 0, **control),
        )
        records = replace(
            planted_records(*stages, n=40),
            matched=matched,
            form=tuple(form),
        )
        effects = finetuning.analyse(records, replace(settings, enough=10)).effects
        wanted = "replicated" if reads == "harm" else "replicated, but form explains it"
        assert CLAIMS[8].verdict({"finetuning": effects}) == wanted

    def test_the_earlier_test_set_is_shown_and_decides_nothing(self, settings):
        """Refused harmful prompts of every source: half of them lose their belief."""
        before = stage_of(
            "before", 0, 20, every_source=[0.3] * 20, every_source_refused=[True] * 20
        )
        after = stage_of(
            "50 pairs", 50, 0, every_source=[0.3, -0.3] * 10, every_source_refused=[False] * 20
        )
        finding = finetuning.analyse(planted_records(before, after), settings)
        found = finding.effects
        assert found["guard recall after minus before"].value == 0
        assert found["guard recall after minus before, every source"].value == -0.5
        gap = found["change of Delta_harmful over its gap to harmless, every source"]
        assert gap.value == pytest.approx(-0.3 / 0.5)
        assert found["refusal rate drop after fine-tuning, every source"].value == 1
        shown = rows_of(finding, "Changes by fine-tuning")
        assert shown["50 pairs", "guard recall after minus before, every source"][0] == -0.5
        named = {c.effect for one in CLAIMS for c in one.conditions}
        assert not any(name.endswith("every source") for name in named)

    @pytest.mark.parametrize(("scale", "told"), [(1, True), (-1, False)])
    def test_a_guard_that_caught_nothing_has_nothing_to_lose(self, settings, scale, told):
        records = planted_records(
            stage_of("before", 0, 20, scale), stage_of("9 pairs", 9, 0, scale)
        )
        finding = finetuning.analyse(records, settings)
        assert ("guard recall after minus before" in finding.effects) is told
        assert any("paper's guard does not surely catch" in s for s in finding.caveats) is not told

    def test_effects_are_of_the_largest_attack_and_the_control_stands_beside(self, settings):
        control = stage_of("9 harmless pairs (control)", 9, 20, 0.9, control=True)
        records = planted_records(
            stage_of("before", 0, 20), stage_of("9 pairs", 9, 0, 0.5), control
        )
        finding = finetuning.analyse(records, settings)
        assert finding.effects["refusal rate drop after fine-tuning"].value == 1
        found = rows_of(finding, "Changes by fine-tuning")
        name = control.name
        assert found[name, "refusal rate drop after fine-tuning"][0] == 0
        assert found[name, "relative change of Delta_harmful"][0] == pytest.approx(-0.1)

    def test_the_direction_beside_chance(self, settings):
        """Before, layer 2 is best; afterwards it acts on half of the prompts, chance on none."""
        none, all_, half = [False] * 8, [True] * 8, [True, True, False, False] * 2
        steered = dict(cosine=[0.5, 0.7], random=[none, none])
        records = planted_records(
            stage_of("before", 0, 20, steered=[none, all_], **steered),
            stage_of("9 pairs", 9, 0, steered=[all_, half], **steered),
        )
        finding = finetuning.analyse(records, settings)
        over = finding.effects["refusal along the direction after fine-tuning minus random"]
        assert over.value == 0.5
        found = rows_of(finding, "Refusal direction after fine-tuning")
        assert found["9 pairs", "refusal along its direction"][0] == 0.5
        assert found["before", "difference"][0] == 1
        assert found["9 pairs", "cosine with the direction from before"][0] == pytest.approx(0.6)

    def test_replies_that_cannot_be_judged_are_left_out(self, settings):
        after = stage_of("9 pairs", 9, 0)
        after = replace(after, refused=[None] * 10 + [False] * 30)
        finding = finetuning.analyse(planted_records(stage_of("before", 0, 20), after), settings)
        drop = finding.effects["refusal rate drop after fine-tuning"]
        assert (drop.value, drop.n) == (1, (10, 0))

    def test_no_reply_could_be_judged(self, settings):
        after = replace(stage_of("9 pairs", 9, 0), refused=[None] * 40)
        finding = finetuning.analyse(planted_records(stage_of("before", 0, 20), after), settings)
        assert "refusal rate drop after fine-tuning" not in finding.effects
        assert Report("r", (finding.section,)).html()

    def test_an_attack_without_effect_is_named(self, settings):
        records = planted_records(stage_of("before", 0, 20), stage_of("9 pairs", 9, 20))
        finding = finetuning.analyse(records, settings)
        assert any("did not lower refusal" in line for line in finding.caveats)

    def test_beliefs_that_were_not_there_before(self, settings):
        records = planted_records(stage_of("before", 0, 20, -1.0), stage_of("9 pairs", 9, 0, -1.0))
        finding = finetuning.analyse(records, settings)
        assert "relative change of Delta_harmful" not in finding.effects
        assert any("not above 0 before" in line for line in finding.caveats)
        assert any("little to lose" in line for line in finding.caveats)

    def test_too_few_prompts(self, settings):
        records = planted_records(stage_of("before", 0, 20), stage_of("9 pairs", 9, 0))
        finding = finetuning.analyse(records, replace(settings, enough=21))
        assert not finding.effects
        assert any(line.startswith("Only 20 held-out") for line in finding.caveats)
        assert any(line.startswith("Only 9 pairs") for line in finding.caveats)
