"""Queries on planted worlds: one token tells, nothing tells, and length alone tells."""

import numpy as np
import pytest
import torch

from latentguard.probes.queries import fit_attended, token_moments
from latentguard.stats.detection import auroc

WIDTH = 24


def world(count, *, marker, seed):
    """States [t 1 d] of prompts and their labels.

    Every token says one thing or the other along direction 1, at random. Direction 0 marks one
    token of each prompt; with ``marker`` what that token says is the label.
    """
    generator = torch.Generator().manual_seed(seed)
    states, labels = [], []
    for _ in range(count):
        length = int(torch.randint(8, 30, (), generator=generator))
        tokens = 0.3 * torch.randn(length, 1, WIDTH, generator=generator)
        says = torch.randint(0, 2, (length,), generator=generator) * 2.0 - 1
        place = int(torch.randint(0, length, (), generator=generator))
        tokens[:, 0, 1] += says
        tokens[place, 0, 0] += 3.0
        other = bool(torch.randint(0, 2, (), generator=generator))
        states.append(tokens)
        labels.append(bool(says[place] > 0) if marker else other)
    return states, labels


def fit(states, labels, layers):
    return fit_attended(states, labels, [str(n) for n in range(len(labels))], layers)


def scores(fitted, states):
    """The probe of the weighted means, [n]."""
    shares = [(fitted.queries.vectors @ one[:, 0].T).softmax(1) for one in states]
    means = [torch.einsum("ht,tld->hld", s, one) for s, one in zip(shares, states, strict=True)]
    return torch.stack([(m * fitted.weight).sum() + fitted.bias for m in means]).numpy()


def test_they_find_the_token_that_tells_where_the_mean_does_not():
    train, known = world(600, marker=True, seed=1)
    fitted = fit(train, known, (3,))
    states, labels = world(300, marker=True, seed=2)
    plain = np.array([float(one[:, 0, 1].mean()) for one in states])
    assert auroc(np.array(labels), plain) < 0.75
    assert auroc(np.array(labels), scores(fitted, states)) > 0.95
    assert auroc(np.array(known), fitted.held_out) > 0.95
    assert fitted.queries.layer == 3


def test_they_find_nothing_where_nothing_tells():
    train, known = world(600, marker=False, seed=3)
    fitted = fit(train, known, (3,))
    states, labels = world(300, marker=False, seed=4)
    assert abs(auroc(np.array(labels), scores(fitted, states)) - 0.5) < 0.1
    assert abs(auroc(np.array(known), fitted.held_out) - 0.5) < 0.1
    assert auroc(np.array(known), scores(fitted, train)) > 0.8  # which is why it is held out


def test_rows_of_a_group_are_held_out_together():
    """Each prompt stands twice: a network that saw its twin would know the label by heart."""
    states, labels = world(150, marker=False, seed=8)
    groups = [str(n) for n in range(150)] * 2
    fitted = fit_attended(states * 2, labels * 2, groups, (3,))
    assert abs(auroc(np.array(labels * 2), fitted.held_out) - 0.5) < 0.2
    apart = fit_attended(states * 2, labels * 2, [str(n) for n in range(300)], (3,))
    assert auroc(np.array(labels * 2), apart.held_out) > 0.75


def test_the_same_prompts_give_the_same_fit_and_no_other_random_numbers():
    states, labels = world(80, marker=True, seed=5)
    torch.manual_seed(9)
    expected = torch.randn(3)
    torch.manual_seed(9)
    with torch.no_grad():
        first = fit(states, labels, (1,))
    assert torch.equal(torch.randn(3), expected)
    again = fit(states, labels, (1,))
    assert first.queries.digest == again.queries.digest
    assert torch.equal(first.weight, again.weight)
    assert np.array_equal(first.held_out, again.held_out)


def test_moments_are_those_of_all_tokens():
    states, _ = world(20, marker=True, seed=6)
    every = torch.cat(states)
    mean, spread = token_moments(states)
    torch.testing.assert_close(mean, every.mean(0))
    torch.testing.assert_close(spread, every.std(0, correction=0), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("layers", [(1,), (2, 5, 9)])
def test_the_queries_look_at_the_first_layer(layers):
    states, labels = world(60, marker=True, seed=7)
    several = [one.expand(-1, len(layers), -1) for one in states]
    fitted = fit(several, labels, layers)
    assert fitted.queries.layer == layers[0]
    assert fitted.weight.shape[1:] == (len(layers), WIDTH)
