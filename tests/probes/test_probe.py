"""Probes: planted truth, and cross-validation against refitting by hand."""

import dataclasses

import numpy as np
import pytest
import torch
from safetensors.torch import load, save
from torch.nn.functional import cosine_similarity

from fake_backend import FakeBackend, labelled, noise
from latentguard.errors import GuardError
from latentguard.probes.axis import Axis
from latentguard.probes.probe import (
    STRENGTHS,
    Probe,
    balanced,
    centroid,
    choose,
    fit_centroid,
    fit_linear,
    layers_of,
    random_probes,
)
from latentguard.probes.ridge import FOLDS, Ridge, folds_of
from latentguard.states import States
from latentguard.stats.detection import auroc

LAYERS = tuple(range(7))


def drawn(count=60, start=0, **how):
    """States [n l d] at t_inst, labels, groups."""
    states = States.collect(FakeBackend(**how).capture(labelled(count, start=start)))
    labels = [p.harmful for p in states.prompts]
    return states.at("t_inst"), labels, [p.pair for p in states.prompts]


@pytest.fixture(scope="module")
def train():
    return drawn()


@pytest.fixture(scope="module")
def fit(train):
    return fit_linear(*train, LAYERS)


class TestCentroid:
    def test_the_weights(self, train):
        states, labels, _ = train
        backend = FakeBackend()
        axis = Axis.fit(backend.capture(labelled(60)), "t_inst")
        found = fit_centroid(axis, states)
        assert torch.equal(found.probe.weight, centroid(axis).weight)
        assert (found.probe.kind, found.probe.bias) == ("centroid", 0.0)
        assert found.choices == {}
        scores = axis.belief(states).double().numpy()
        assert np.allclose(found.held_out, scores, atol=1e-6)
        assert auroc(np.array(labels), found.held_out) == 1.0

    def test_size_does_not_count_only_direction(self, train):
        probe = centroid(Axis.fit(FakeBackend().capture(labelled(60)), "t_inst"))
        sizes = torch.rand(len(train[0]), 7, 1) * 100 + 0.01
        assert torch.allclose(probe(train[0] * sizes), probe(train[0]), rtol=0, atol=1e-6)


class TestRandom:
    def test_each_row_is_as_long_as_the_probes_own(self, fit):
        for one in random_probes(fit.probe, 3):
            assert torch.allclose(one.weight.norm(dim=-1), fit.probe.weight.norm(dim=-1))
            assert (one.kind, one.layers, one.bias) == (fit.probe.kind, fit.probe.layers, 0.0)

    def test_draws_differ_and_a_seed_gives_them_again(self, fit):
        first, second = random_probes(fit.probe, 2)
        assert not torch.equal(first.weight, second.weight)
        assert torch.equal(random_probes(fit.probe, 2)[1].weight, second.weight)
        assert not torch.equal(random_probes(fit.probe, 1, seed=1)[0].weight, first.weight)


class TestLinear:
    def test_the_planted_truth_is_found(self, fit):
        assert fit.choices["cross_validated_auroc"] == 1.0
        states, labels, _ = drawn(100, start=700)
        slots = list(fit.probe.layers)
        scores = fit.probe(states[:, slots]).double().numpy()
        assert auroc(np.array(labels), scores) == 1.0
        backend = FakeBackend()
        found = fit.probe.weight.flatten(), backend.harm[slots].flatten()
        assert cosine_similarity(*found, dim=0) > 0.9

    def test_the_layers_are_those_given(self, fit):
        assert fit.probe.layers == LAYERS
        assert fit.choices["layers"] == "0-6"

    def test_the_score_is_the_sum_that_it_says(self, fit, train):
        h = train[0][:, list(fit.probe.layers)].double()
        wanted = (h * fit.probe.weight.double()).sum((1, 2)) + fit.probe.bias
        assert torch.allclose(fit.probe(h).double(), wanted, atol=1e-4)

    def test_bfloat16_states_are_scored_in_float32(self, fit, train):
        h = train[0][:, list(fit.probe.layers)].bfloat16()
        assert fit.probe(h).dtype == torch.float32
        assert torch.equal(fit.probe(h), fit.probe(h.float()))

    def test_an_imbalanced_set_is_scored_about_zero_too(self):
        states, labels, groups = drawn(120)
        rows = [n for n, harmful in enumerate(labels) if not harmful or n < 40]
        fit = fit_linear(states[rows], [labels[n] for n in rows], [groups[n] for n in rows], LAYERS)
        fresh, truth, _ = drawn(100, start=700)
        scores = fit.probe(fresh[:, list(fit.probe.layers)])
        truth = torch.tensor(truth)
        assert abs(float(scores[truth].mean() + scores[~truth].mean())) < 0.2
        assert ((scores > 0) == truth).all()

    def test_the_unit_of_a_coordinate_does_not_matter(self, train, fit):
        units = torch.rand(7, 16) * 100 + 0.1
        other = fit_linear(train[0] * units + 3, *train[1:], LAYERS)
        assert other.probe.layers == fit.probe.layers
        assert np.allclose(other.held_out, fit.held_out, atol=1e-3)

    @pytest.mark.parametrize("constant", [0.0, 0.1, -3000.1234, 1e6])
    @pytest.mark.parametrize("imbalanced", [True, False])
    def test_a_coordinate_that_never_changes_carries_nothing(self, train, constant, imbalanced):
        states, labels, groups = train
        rows = [n for n, harmful in enumerate(labels) if not harmful or n < 40 or not imbalanced]
        data = states[rows], [labels[n] for n in rows], [groups[n] for n in rows]
        wide = torch.cat([data[0], torch.full((len(rows), 7, 1), constant)], dim=-1)
        without, with_it = (fit_linear(h, *data[1:], LAYERS) for h in (data[0], wide))
        assert with_it.probe.layers == without.probe.layers
        assert with_it.probe.weight[:, -1].abs().max() == 0
        assert np.allclose(with_it.held_out, without.held_out, atol=1e-3)
        assert with_it.probe.bias == pytest.approx(without.probe.bias, abs=1e-3)

    def test_several_positions_are_a_concatenation(self):
        states = States.collect(FakeBackend(post=2, signal=0.4).capture(labelled(50)))
        labels, groups = [p.harmful for p in states.prompts], [p.pair for p in states.prompts]
        first, second = states.at("t_inst"), states.at("t_post")
        slots = fit_linear(torch.cat([first, second], dim=1), labels, groups, LAYERS * 2)
        wide = fit_linear(torch.cat([first, second], dim=2), labels, groups, LAYERS)
        assert slots.choices == wide.choices
        assert np.allclose(slots.held_out, wide.held_out, atol=1e-5)
        band = len(wide.probe.layers)
        halves = torch.cat([slots.probe.weight[:band], slots.probe.weight[band:]], dim=1)
        assert torch.allclose(halves, wide.probe.weight, atol=1e-5)
        assert slots.probe.bias == pytest.approx(wide.probe.bias, abs=1e-4)

    def test_layers_in_any_order(self, train, fit):
        order = [3, 6, 0, 5, 1, 2, 4]
        other = fit_linear(train[0][:, order], *train[1:], [LAYERS[k] for k in order])
        read = [order.index(layer) for layer in other.probe.layers]
        found = other.probe(train[0][:, order][:, read])
        wanted = fit.probe(train[0][:, list(fit.probe.layers)])
        assert torch.allclose(found, wanted, atol=1e-4)

    def test_the_seed_fixes_it(self, train, fit):
        again = fit_linear(*train, LAYERS)
        assert torch.equal(again.probe.weight, fit.probe.weight)
        assert np.array_equal(again.held_out, fit.held_out)

    @pytest.mark.parametrize(("harmful", "harmless"), [(9, 30), (30, 9), (0, 30), (0, 0)])
    def test_too_few(self, harmful, harmless):
        labels = [True] * harmful + [False] * harmless
        states = torch.randn(len(labels), 7, 16)
        found = f"found {harmful} harmful and {harmless} harmless"
        with pytest.raises(GuardError, match=f"at least 10 prompts of each class; {found}"):
            fit_linear(states, labels, [str(n) for n in range(len(labels))], LAYERS)


class TestCrossValidation:
    def data(self):
        """Few, weak, imbalanced and paired rows."""
        states, labels, groups = drawn(15, signal=0.3)
        rows = [n for n in range(30) if n % 4 != 1]
        return states[rows], torch.tensor(labels)[rows], [groups[n] for n in rows]

    @pytest.mark.parametrize("strength", [0.03, 1.0])
    @pytest.mark.parametrize("band", [(3,), (2, 3, 4)])
    def test_held_out_scores_are_those_of_refitting(self, band, strength):
        states, y, groups = self.data()
        design, folds = balanced(states[:, list(band)], y), folds_of(groups, 0)
        ridge = Ridge(design, strength)
        z = torch.cat([design.slot(slot) for slot in range(len(band))], dim=1).double()
        penalty = strength * (z @ z.T).diagonal().mean()
        wanted = torch.empty(len(y), 1, dtype=torch.float64)
        for rows in folds:
            rest = torch.ones(len(y), dtype=torch.bool)
            rest[rows] = False
            left = z[rest].T @ z[rest] + penalty * torch.eye(z.shape[1])
            weight = torch.linalg.solve(left, z[rest].T @ design.targets[rest])
            wanted[rows] = z[rows] @ weight / design.root[rows]
        assert torch.allclose(ridge.held_out(folds), wanted, rtol=1e-4, atol=1e-5)

    def test_the_strongest_penalty_that_costs_little_is_preferred(self):
        assert choose({1.0: 0.90, 3.0: 0.885, 9.0: 0.87}) == 3.0
        assert choose({1.0: 0.90, 3.0: 0.895, 9.0: 0.88}) == 9.0
        assert choose({1.0: 0.80, 3.0: 0.895, 9.0: 0.80}) == 3.0

    def test_a_good_strength_is_chosen(self):
        """Only the last layers know the label."""
        states, labels, groups = drawn(40, signal=0.0)
        states[:, 5:] += 0.5 * torch.tensor([1 if y else -1 for y in labels])[:, None, None]
        fit = fit_linear(states, labels, groups, LAYERS)
        y = torch.tensor(labels)
        design, folds = balanced(states, y), folds_of(groups, 0)
        held_out = {s: Ridge(design, s).held_out(folds)[:, 0].numpy() for s in STRENGTHS}
        figures = {s: auroc(y.numpy(), found) for s, found in held_out.items()}
        chosen = fit.choices["strength"]
        assert chosen == choose(figures)
        assert figures[chosen] > 0.9
        assert fit.choices["cross_validated_auroc"] == round(figures[chosen], 4)
        assert np.array_equal(fit.held_out, held_out[chosen])

    def test_the_solution_is_that_of_ridge_regression(self):
        states, y, _ = self.data()
        design = balanced(states, y)
        weight, bias = Ridge(design, 0.3).solve()
        z = torch.cat([design.slot(slot) for slot in LAYERS], dim=1).double()
        penalty = 0.3 * (z @ z.T).diagonal().mean()
        primal = torch.linalg.solve(z.T @ z + penalty * torch.eye(z.shape[1]), z.T @ design.targets)
        fitted = z @ primal / design.root
        found = (states * weight[0]).sum((1, 2)) + bias
        assert torch.allclose(found.double(), fitted[:, 0], atol=1e-4)

    def test_rows_are_standardised_and_balanced(self):
        states, y, _ = self.data()
        design = balanced(states, y)
        for slot in LAYERS[1:]:
            z = design.slot(slot) / design.root.float()
            middle = (z[y].mean(0) + z[~y].mean(0)) / 2
            assert middle.abs().max() < 1e-5
            assert torch.allclose(z.std(0), torch.ones(16), atol=1e-4)
        assert design.root.square().sum().item() == pytest.approx(len(y))
        assert design.root[y].square().sum().item() == pytest.approx(len(y) / 2)

    def test_pairs_never_straddlefolds_of(self):
        groups = [f"{n % 37}" for n in range(120)]
        folds = folds_of(groups, 3)
        assert sorted(torch.cat(folds).tolist()) == list(range(120))
        inside = [{groups[n] for n in rows} for rows in folds]
        assert sum(map(len, inside)) == len(set(groups)) == 37
        assert {len(names) for names in inside} == {7, 8}
        assert len(folds) == FOLDS

    def test_folds_depend_on_names_and_seed_not_on_order(self):
        groups = [f"{n}" for n in range(50)]
        forwards, backwards = folds_of(groups, 0), folds_of(groups[::-1], 0)
        assert [sorted(49 - f) for f in backwards] == [sorted(f) for f in forwards]
        assert [f.tolist() for f in folds_of(groups, 1)] != [f.tolist() for f in forwards]

    def test_twins_do_not_inflate_the_figure(self):
        """Pure noise, each row twice: only folds that split the twins could find anything."""
        states = noise("twins", 40, 7, 16).repeat_interleave(2, dim=0)
        labels = [n % 4 < 2 for n in range(80)]
        y = torch.tensor(labels)
        ridge = Ridge(balanced(states, y), 0.1)
        found = [
            auroc(y.numpy(), ridge.held_out(folds_of(groups, 0))[:, 0].numpy())
            for groups in ([f"{n // 2}" for n in range(80)], [f"{n}" for n in range(80)])
        ]
        assert found[0] < 0.7
        assert found[1] > 0.9

    def test_states_that_are_all_alike(self):
        fit = fit_linear(torch.full((40, 7, 16), 2.5), [True, False] * 20, ["a", "b"] * 20, LAYERS)
        assert fit.choices["cross_validated_auroc"] == 0.5
        assert fit.probe(torch.randn(3, len(fit.probe.layers), 16)).abs().max() < 1e-6

    def test_one_pair_for_all_rows(self, train):
        states, labels, _ = train
        with pytest.raises(GuardError, match=r"at least 2 different texts.* found 1"):
            fit_linear(states, labels, ["data set"] * 120, LAYERS)

    def test_fewer_groups_than_folds(self, train):
        states, labels, _ = train
        fit = fit_linear(states, labels, [f"{n % 3}" for n in range(120)], LAYERS)
        assert fit.choices["cross_validated_auroc"] == 1.0


class TestLayers:
    @pytest.mark.parametrize("depth", [1, 2, 4, 6, 24, 80])
    def test_a_run_of_layers_without_layer_0(self, depth):
        band, every = layers_of("linear", depth), layers_of("centroid", depth)
        assert list(band) == list(range(band[0], band[-1] + 1))
        assert every == tuple(range(1, depth + 1))
        assert set(band) <= set(every)

    def test_the_middle(self):
        assert layers_of("linear", 30) == tuple(range(10, 21))


class TestBitForBit:
    @pytest.mark.parametrize("kind", ["linear", "centroid"])
    def test_over_a_file(self, train, fit, kind):
        probe = dataclasses.replace(fit.probe, kind=kind)
        h = train[0][:, list(probe.layers)]
        packed = load(save({"weight": probe.weight}))
        again = Probe(kind, probe.layers, packed["weight"], float(repr(probe.bias)))
        assert torch.equal(again(h), probe(h))
        assert torch.equal(probe(h), probe(h.clone()))
