"""Contributions of tokens and layers add up to the probe's score, whatever it reads."""

from itertools import product

import pytest
import torch

from latentguard.probes.contributions import explain_score, slot_terms
from latentguard.probes.probe import Probe

SPANS = ((3, 3), (4, 6), (6, 6), (0, 3))
"""Of the reading ``pooled``: t_inst, the mean after it, t_post, the mean of the instruction."""


def shares_of(spans, tokens):
    """What each token weighs in the mean of each span."""
    shares = torch.zeros(len(spans), tokens)
    for share, (first, last) in zip(shares, spans, strict=True):
        share[first : last + 1] = 1 / (last + 1 - first)
    return shares


def planted(kind):
    """A probe of four positions at two layers, and seven tokens."""
    torch.manual_seed(3)
    probe = Probe(kind, (1, 2), torch.randn(8, 16), -0.4)
    return probe, torch.randn(7, 2, 16) + 5


def slots_of(states):
    """What the probe reads."""
    return torch.cat([states[a : b + 1].mean(0) for a, b in SPANS])[None]


@pytest.mark.parametrize("kind", ["linear", "centroid"])
def test_they_add_up_to_the_score(kind):
    probe, states = planted(kind)
    parts = explain_score(probe, states, shares_of(SPANS, 7), torch.randn(8))
    score = float(probe(slots_of(states)))
    assert parts.score == pytest.approx(score, abs=1e-5)
    assert parts.baseline + float(parts.by_layer.sum()) == pytest.approx(score, abs=1e-5)


@pytest.mark.parametrize("kind", ["linear", "centroid"])
def test_a_prompt_like_the_reference_has_none(kind):
    probe, states = planted(kind)
    states = states[:1].expand(7, -1, -1)
    terms = slot_terms(probe, slots_of(states))[0]
    parts = explain_score(probe, states, shares_of(SPANS, 7), terms)
    assert parts.by_token.abs().max() < 1e-6
    assert parts.baseline == pytest.approx(float(probe(slots_of(states))), abs=1e-5)


def test_each_is_what_the_score_loses_when_its_state_is_the_references():
    """A linear probe that reads single tokens: by brute force, one token and layer at a time."""
    torch.manual_seed(4)
    probe = Probe("linear", (1, 2), torch.randn(4, 16), 0.2)
    spans, usual = ((1, 1), (2, 2)), torch.randn(2, 2, 16)
    states = torch.randn(3, 2, 16)
    reference = slot_terms(probe, usual.flatten(0, 1)[None])[0]
    parts = explain_score(probe, states, shares_of(spans, 3), reference)
    score = float(probe(states[1:].flatten(0, 1)[None]))
    lost = torch.zeros(3, 2)
    for token, layer in product((1, 2), (0, 1)):
        changed = states.clone()
        changed[token, layer] = usual[token - 1, layer]
        lost[token, layer] = score - float(probe(changed[1:].flatten(0, 1)[None]))
    assert torch.allclose(parts.by_token.float(), lost.sum(1), atol=1e-4)
    assert torch.allclose(parts.by_layer.float(), lost.sum(0), atol=1e-4)
