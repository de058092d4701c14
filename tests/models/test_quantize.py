"""Quantised weights: near the original, of few levels, and put back bit for bit."""

import sys

import pytest
import torch

from latentguard.errors import MissingExtra
from latentguard.models import quantize as quantise
from latentguard.prompts import Prompt
from latentguard.states import States

pytest.importorskip("bitsandbytes")


def weights(model):
    return {name: w.clone() for name, w in model.model.state_dict().items()}


@pytest.mark.parametrize(("bits", "levels", "near"), [(8, 255, 0.02), (4, 16, 0.2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_few_levels_near_the_original(bits, levels, near, dtype):
    weight = torch.randn(8, 64).to(dtype)
    found = quantise.round_weight(weight, bits)
    assert (found.dtype, found.shape) == (dtype, weight.shape)
    assert not torch.equal(found, weight)
    error = (found.float() - weight.float()).abs().amax(1)
    assert (error <= near * weight.float().abs().amax(1)).all()
    assert all(len(row.unique()) <= levels for row in found)


def test_eight_bits_are_the_nearest_of_the_levels():
    """The reference: round to nearest with one scale for each output channel."""
    weight = torch.randn(8, 64)
    scale = weight.abs().amax(1, keepdim=True) / 127
    expected = (weight / scale).round() * scale
    assert ((quantise.round_weight(weight, 8) - expected).abs() <= 1.01 * scale).all()
    assert (quantise.round_weight(weight, 8) - expected).abs().mean() < 0.05 * scale.mean()


@pytest.mark.parametrize("bits", [8, 4])
def test_a_model_is_changed_inside_and_put_back(model, bits):
    before, prompts = weights(model), [Prompt("a"), Prompt("b c")]
    states = States.collect(model.capture(prompts)).values
    with quantise.quantized_weights(model, bits) as changed:
        assert changed.fingerprint.weights != model.fingerprint.weights
        assert changed.source == f"{model.source}, {bits}-bit weights"
        other = States.collect(changed.capture(prompts)).values
        assert not torch.equal(states, other)
        inside = weights(model)
    kept = {n for n in before if torch.equal(inside[n], before[n])}
    assert {n for n in kept if "embed" in n or "lm_head" in n or "norm" in n} == kept
    assert all(torch.equal(w, before[n]) for n, w in weights(model).items())
    assert torch.equal(States.collect(model.capture(prompts)).values, states)


def test_an_error_inside_leaves_no_trace(model):
    before = weights(model)
    with pytest.raises(RuntimeError, match="inside"), quantise.quantized_weights(model, 4):
        raise RuntimeError("inside")
    assert all(torch.equal(w, before[n]) for n, w in weights(model).items())


def test_without_bitsandbytes(model, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with (
        pytest.raises(MissingExtra, match=r"latentguard\[quantize\]"),
        quantise.quantized_weights(model, 8),
    ):
        pass
