"""A guard meets changed models: each change is noticed, named and, if asked for, measured."""

import copy
import json
from dataclasses import replace

import pytest
import torch
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from latentguard.errors import ModelMismatch
from latentguard.guard.latent_guard import LatentGuard
from latentguard.models.chat_model import ChatModel
from latentguard.prompts import Prompt
from models.architectures import chat_model

TEXTS = [
    Prompt(f"Tell me the {word} thing number {n}", harmful=word == "sly", pair=str(n))
    for n in range(20)
    for word in ("sly", "kind")
]


@pytest.fixture(scope="module")
def guard(model):
    return LatentGuard.fit(model, TEXTS)


def changed(model, change=lambda weights: None, tokenizer=None):
    """A copy of the model with other weights or another tokenizer."""
    weights = copy.deepcopy(model.model)
    with torch.no_grad():
        change(weights)
    return ChatModel(weights, tokenizer or model.tokenizer, source="changed")


def linears(weights):
    return [m for m in weights.model.modules() if isinstance(m, torch.nn.Linear)]


def quantised(weights):
    """Int8 and back, one scale a row."""
    for layer in linears(weights):
        scale = layer.weight.abs().amax(1, keepdim=True) / 127
        layer.weight.copy_((layer.weight / scale).round() * scale)


def merged(weights):
    """A LoRA of rank 2 on the queries and values, merged."""
    draw = torch.Generator().manual_seed(1)
    for block in weights.model.layers:
        for layer in (block.self_attn.q_proj, block.self_attn.v_proj):
            rows, columns = layer.weight.shape
            a = torch.randn(rows, 2, generator=draw)
            layer.weight.add_(0.05 * a @ torch.randn(2, columns, generator=draw))


def edited_template(tokenizer):
    other = copy.deepcopy(tokenizer)
    other.chat_template = tokenizer.chat_template.replace("<|im_end|>", " <|im_end|>")
    return other


def edited_tokenizer(tokenizer):
    """Two tokens change places."""
    spec = json.loads(tokenizer.backend_tokenizer.to_str())
    vocabulary = spec["model"]["vocab"]
    vocabulary["a"], vocabulary["e"] = vocabulary["e"], vocabulary["a"]
    other = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(spec)))
    other.chat_template = tokenizer.chat_template
    return other


CHANGES = {
    "lora merge": ("weights", lambda m: changed(m, merged)),
    "int8": ("weights", lambda m: changed(m, quantised)),
    "swapped": ("weights", lambda m: chat_model("llama", m.tokenizer, seed=7)),
    "template": ("template", lambda m: changed(m, tokenizer=edited_template(m.tokenizer))),
    "tokenizer": ("tokenizer", lambda m: changed(m, tokenizer=edited_tokenizer(m.tokenizer))),
}


class TestChanges:
    @pytest.mark.parametrize(("what", "change"), CHANGES.values(), ids=CHANGES)
    def test_it_is_named(self, guard, model, tmp_path, what, change):
        guard.save(tmp_path)
        with pytest.raises(ModelMismatch) as error:
            LatentGuard.load(tmp_path, change(model))
        said = str(error.value)
        assert f": {what} " in said
        assert not any(f"; {other} " in said for other in ("weights", "template", "tokenizer"))
        assert "--allow-mismatch" in said

    @pytest.mark.parametrize(("what", "change"), CHANGES.values(), ids=CHANGES)
    def test_it_can_go_on(self, guard, model, tmp_path, what, change):
        other = change(model)
        guard.save(tmp_path)
        there = LatentGuard.load(tmp_path, other, allow_mismatch=True)
        assert there.fingerprint == other.fingerprint
        assert there.fitted["fitted_on"]["weights"] == guard.fingerprint.weights
        assert there.bound is None
        assert "nothing is promised" in there.promise
        list(there.scan(other, TEXTS))
        there.verify_model(other)
        shift = guard.shift_to(there)
        assert shift.n == len(guard.canaries)
        assert shift.differences[0].startswith(what)
        assert shift.largest > 0
        assert f"{shift.largest:.2f} at most" in str(shift)

    def test_a_swap_moves_more_than_rounding_weights(self, guard, model):
        moved = {
            name: guard.shift_to(guard.rebind(change(model))).largest
            for name, (_, change) in CHANGES.items()
        }
        assert moved["int8"] < moved["lora merge"]
        assert moved["int8"] < moved["swapped"]

    def test_an_edit_that_the_digest_does_not_sample(self, guard, model):
        """The fingerprint is the same; the canaries tell."""

        other = changed(model, lambda m: m.model.layers[0].mlp.down_proj.weight.mul_(3.0))
        other._fingerprint = model.fingerprint
        with pytest.raises(ModelMismatch, match="looks like the guard's own but scores"):
            guard.verify_model(other)
        with pytest.raises(
            ModelMismatch, match=r"if its chat template prints it .* calibrate again"
        ):
            guard.verify_model(other)
        there = guard.accept_model(other)
        assert there is not guard
        assert "nothing that is hashed differs" in str(guard.shift_to(there))

    def test_its_own_model_needs_no_leave(self, guard, model, tmp_path):
        assert guard.accept_model(model) is guard
        guard.save(tmp_path)
        assert LatentGuard.load(tmp_path, model, allow_mismatch=True).digest == guard.digest

    def test_another_width_cannot_be_read(self, guard, tokenizer):
        with pytest.raises(ModelMismatch, match="width 16, 4 layers"):
            guard.rebind(FakeWidth(chat_model("llama", tokenizer)))

    def test_it_can_be_calibrated_anew(self, guard, model):
        other = changed(model, merged)
        calm = [Prompt(f"Tell me the kind thing number {n}") for n in range(100, 160)]
        there = guard.accept_model(other).calibrate(other, calm, max_fpr=0.05)
        assert there.bound.n == 60
        there.verify_model(other)


class FakeWidth:
    """A model whose states are half as wide."""

    def __init__(self, model):
        self.depth, self.post = model.depth, model.post
        self.fingerprint = chat_model("llama", model.tokenizer, seed=5).fingerprint
        self._model = model

    def capture(self, prompts, *, positions, layers=None, queries=None, progress=None):
        for states in self._model.capture(prompts, positions=positions, layers=layers):
            yield replace(states, values=states.values[..., :16])
