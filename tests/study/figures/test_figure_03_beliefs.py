"""Figure 3: planted planes with known correlations, and the tiny model end to end."""

from dataclasses import replace
from itertools import islice

import numpy as np
import pytest
import torch
from scipy.stats import pearsonr

from latentguard.prompts import Prompt
from latentguard.study.axes import fit_axes
from latentguard.study.figures.figure_03_beliefs import (
    CONTROLS,
    Records,
    _random,
    analyse,
    collect,
    correlation,
)
from latentguard.study.prompt_groups import BEHAVING
from latentguard.study.settings import Settings
from study.figures.planted import Silent

GROUPS = {
    "refused_harmful": (True, True),
    "accepted_harmful": (True, False),
    "refused_harmless": (False, True),
    "accepted_harmless": (False, False),
}


def planted(centres, n=30, refuse=True):
    rng = np.random.default_rng(0)
    prompts, rows = [], []
    for group, centre in centres.items():
        harmful, refused = GROUPS[group]
        prompts += [Prompt("x", f"{group}-{k}", harmful, refused) for k in range(n)]
        rows.append(np.array(centre) + 0.01 * rng.standard_normal((n, 2)))
    beliefs = np.concatenate(rows)
    if not refuse:
        beliefs[:, 1] = np.nan
    behaving = sum(p.group in BEHAVING for p in prompts)
    chance = {"kind": tuple(rng.standard_normal((CONTROLS, behaving, 2)))}
    return Records(tuple(prompts), beliefs, chance if refuse else {}, "Centroids: planted")


PAPER = {
    "refused_harmful": (0.1, 0.2),
    "accepted_harmful": (0.08, -0.1),
    "refused_harmless": (-0.1, 0.1),
    "accepted_harmless": (-0.1, -0.2),
}


def tables(finding):
    return {p.title: p for p in finding.section.parts if hasattr(p, "rows")}


def test_the_papers_pattern():
    finding = analyse(planted(PAPER), Settings())
    effects = finding.effects
    assert not finding.caveats
    assert effects["Delta_harmful of refused harmless"].high < 0
    assert effects["Delta_refuse of refused harmless"].low > 0
    assert effects["Delta_harmful of accepted harmful"].low > 0
    assert effects["correlation of beliefs in the behaving groups"].low > 0.95
    assert effects["chance planes as correlated: kind"].value == 0
    assert effects["chance planes as correlated: kind"].high < 0.05
    rows = {row[0]: row[1:] for row in tables(finding)["Correlation of both beliefs"].rows}
    assert rows["refused harmful and accepted harmless"][0] > 0.95
    assert rows["accepted harmful and refused harmless"][0] < -0.9
    assert abs(rows["chance: kind"][0]) < 0.1 and rows["chance: kind"][3] == CONTROLS
    sides = {row[:2]: row[2:] for row in tables(finding)["Beliefs of the four groups"].rows}
    assert sides["refused harmless", "\u0394 harmful"][4] == 0.0
    assert sides["refused harmless", "\u0394 refuse"][4] == 1.0


def test_all_four_groups_together_may_hide_a_perfect_pattern():
    """Label and refusal part in two groups, so over all four they need not correlate."""
    square = {g: (0.1 * (1 if h else -1), 0.1 * (1 if r else -1)) for g, (h, r) in GROUPS.items()}
    finding = analyse(planted(square), Settings())
    rows = {row[0]: row[1] for row in tables(finding)["Correlation of both beliefs"].rows}
    assert abs(rows["all four groups"]) < 0.1
    assert finding.effects["correlation of beliefs in the behaving groups"].low > 0.9


def test_chance_that_is_as_correlated_is_counted():
    records = planted(PAPER)
    behaving = records.beliefs[[p.group in BEHAVING for p in records.prompts]]
    half = [behaving if k % 2 else planes for k, planes in enumerate(records.chance["kind"])]
    finding = analyse(replace(records, chance={"kind": tuple(half)}), Settings())
    assert finding.effects["chance planes as correlated: kind"].value == pytest.approx(0.5)


def test_random_directions_differ_at_both_positions(cached_model, prompt_groups):
    """One direction for both would make any states that share something correlate."""
    axes = fit_axes(cached_model, prompt_groups, enough=2)
    for harmful, refuse in islice(_random(axes.harmful, axes.refuse), 3):
        cosine = torch.cosine_similarity(harmful.direction, refuse.direction, dim=-1)
        assert (cosine.abs() < 0.9).all()


def test_correlation_is_pearsons():
    rows = np.random.default_rng(1).standard_normal((50, 2)) @ [[1, 0.5], [0, 1]]
    assert correlation(rows) == pytest.approx(pearsonr(*rows.T).statistic)
    assert np.isnan(correlation(np.ones((5, 2))))


def test_the_plane_shows_ids_and_no_texts():
    finding = analyse(planted(PAPER), Settings())
    figure = next(p for p in finding.section.parts if hasattr(p, "plot"))
    assert len(figure.plot.data) == 4
    assert figure.plot.data[0].hovertext[0] == "refused_harmful-0"


def test_groups_that_are_missing_or_small():
    finding = analyse(planted({"refused_harmful": (0.1, 0.2)}, n=4), Settings())
    assert len(finding.caveats) == 4 and not finding.effects
    nothing = analyse(Records((), np.empty((0, 2)), {}, "none"), Settings())
    assert not nothing.effects and not nothing.section.parts


def test_without_a_refusal_axis():
    finding = analyse(planted(PAPER, refuse=False), Settings())
    assert set(finding.effects) == {
        "Delta_harmful of refused harmless",
        "Delta_harmful of accepted harmful",
    }
    assert "no belief of refusal" in finding.caveats[0]
    assert not any(hasattr(part, "plot") for part in finding.section.parts)


def test_end_to_end(cached_model, prompt_groups, settings):
    records = collect(cached_model, prompt_groups, settings)
    assert len(records.prompts) == 24 and np.isfinite(records.beliefs).all()
    assert {len(planes) for planes in records.chance.values()} == {CONTROLS}
    finding = analyse(records, settings)
    assert len(finding.effects) == 6 and not finding.caveats
    cached_model.uncached = Silent(cached_model.uncached)
    again = collect(cached_model, prompt_groups, settings)
    np.testing.assert_array_equal(records.beliefs, again.beliefs)
    for kind, planes in records.chance.items():
        np.testing.assert_array_equal(planes, again.chance[kind])


def test_a_model_that_refuses_nothing(cached_model, prompt_groups, settings):
    fit = {g: tuple(replace(p, refused=False) for p in of) for g, of in prompt_groups.fit.items()}
    fit["accepted_harmful"], fit["refused_harmful"] = fit["refused_harmful"], ()
    bare = replace(prompt_groups, fit=fit)
    records = collect(cached_model, bare, settings)
    assert np.isnan(records.beliefs[:, 1]).all()
    assert "no belief of refusal" in analyse(records, settings).caveats[-1]
    assert not collect(cached_model, replace(bare, test={}), settings).prompts
