"""Figure 2: planted curves with known signs, and the tiny model end to end."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from latentguard.study.figures.figure_02_clusters import GAP, Records, analyse, collect
from latentguard.study.settings import Settings
from study.figures.planted import Silent

GROUPS = ("accepted_harmful", "refused_harmless", "refused_harmful", "accepted_harmless")


def planted(means, n=40, layers=6, noise=0.01):
    rng = np.random.default_rng(0)
    at = {
        position: {
            g: m + noise * rng.standard_normal((n, layers)) for g, m in zip(GROUPS, of, strict=True)
        }
        for position, of in means.items()
    }
    return Records(at, "Centroids: planted")


def rows_of(finding):
    (table,) = [p for p in finding.section.parts if hasattr(p, "rows")]
    return {row[:2]: dict(zip(table.columns[2:], row[2:], strict=True)) for row in table.rows}


def test_the_papers_pattern_is_found():
    records = planted({"t_inst": (0.05, -0.04, 0.1, -0.1), "t_post": (-0.03, 0.02, 0.1, -0.1)})
    finding = analyse(records, Settings())
    assert not finding.caveats
    signs = {name: np.sign([e.low, e.high]).tolist() for name, e in finding.effects.items()}
    assert signs["s at t_inst, accepted harmful"] == [1, 1]
    assert signs["s at t_inst, refused harmless"] == [-1, -1]
    assert signs["s at t_post, accepted harmful"] == [-1, -1]
    assert signs["s at t_post, refused harmless"] == [1, 1]
    gap = finding.effects[f"s at t_inst, {GAP}"]
    assert gap.value == pytest.approx(0.09, abs=0.005) and gap.n == (40, 40)
    for row in rows_of(finding).values():
        assert row["share of prompts"] in (1.0, None) and row["share of layers"] in (1.0, None)


def test_the_other_side_is_counted_as_such():
    finding = analyse(planted({"t_inst": (-0.05, -0.04, 0.1, -0.1)}), Settings())
    row = rows_of(finding)["t_inst", "accepted harmful"]
    assert row["share of prompts"] == 0 and row["share of layers"] == 0
    assert "no clusters at t_post" in finding.caveats[0]


def test_layer_0_is_neither_in_the_figure_nor_in_the_mean():
    records = planted({at: (0.0, 0.0, 0.0, 0.0) for at in ("t_inst", "t_post")}, noise=0)
    records.at["t_inst"]["accepted_harmful"][:, 0] = 9.0
    finding = analyse(records, Settings())
    assert finding.effects["s at t_inst, accepted harmful"].value == 0
    figure = next(p for p in finding.section.parts if hasattr(p, "plot"))
    lines = [trace for trace in figure.plot.data if trace.name]
    assert max(lines[0].y) == 0.0 and lines[0].x[0] == 1 and len(lines) == 4


@pytest.mark.parametrize("n", [0, 3])
def test_small_groups_are_shown_but_nothing_is_concluded(n):
    records = planted({"t_inst": (0.05, -0.04, 0.1, -0.1), "t_post": (0.05, -0.04, 0.1, -0.1)})
    for groups in records.at.values():
        groups["refused_harmless"] = groups["refused_harmless"][:n]
        if not n:
            del groups["refused_harmless"]
    finding = analyse(records, Settings())
    assert finding.caveats == (
        f"Figure 2: {n} refused harmless prompts are too few to place them.",
    )
    assert not any("refused harmless" in name for name in finding.effects)
    assert any("accepted harmful" in name for name in finding.effects)


def test_end_to_end_by_brute_force(cached_model, prompt_groups, settings):
    records = collect(cached_model, prompt_groups, settings)
    states = {
        g: cached_model.states(of.get(g, ())).values.double()
        for of, g in (
            (prompt_groups.fit, "refused_harmful"),
            (prompt_groups.fit, "accepted_harmless"),
            (prompt_groups.test, "accepted_harmful"),
        )
    }
    up, down = (states[g][:, 1].mean(0) for g in ("refused_harmful", "accepted_harmless"))
    h = states["accepted_harmful"][:, 1]
    cosine = torch.nn.functional.cosine_similarity
    expected = cosine(h, up, dim=-1) - cosine(h, down, dim=-1)
    found = records.at["t_post"]["accepted_harmful"]
    np.testing.assert_allclose(found, expected.numpy(), atol=1e-5)
    finding = analyse(records, settings)
    assert len(finding.effects) == 6 and not finding.caveats
    assert [p.title for p in finding.section.parts][1:] == [
        "Clusters at t_inst",
        "Clusters at t_post",
    ]


def test_asks_the_model_once(cached_model, prompt_groups, settings, monkeypatch):
    first = collect(cached_model, prompt_groups, settings)
    monkeypatch.setattr(cached_model, "uncached", Silent(cached_model.uncached))
    again = collect(cached_model, prompt_groups, settings)
    for position, groups in first.at.items():
        for group, s in groups.items():
            np.testing.assert_array_equal(s, again.at[position][group])


def test_a_model_that_refuses_nothing(cached_model, prompt_groups, settings):
    fit = {g: tuple(replace(p, refused=False) for p in of) for g, of in prompt_groups.fit.items()}
    fit["accepted_harmful"], fit["refused_harmful"] = fit["refused_harmful"], ()
    test = {g: of for g, of in prompt_groups.test.items() if g.startswith("accepted")}
    bare = replace(prompt_groups, fit=fit, test=test)
    finding = analyse(collect(cached_model, bare, settings), settings)
    assert len(finding.caveats) == 2 and "t_post" in finding.caveats[1]
    nobody = analyse(collect(cached_model, replace(bare, test={}), settings), settings)
    assert not nobody.effects
