"""Large models on small ones: offloaded and quantised; ``test_split`` splits one."""

import sys

import accelerate
import pytest
import torch

from latentguard.data.builtin import load_contrast
from latentguard.errors import ModelError, ModelMismatch
from latentguard.guard.latent_guard import LatentGuard
from latentguard.interventions import Intervention
from latentguard.models.chat_model import ChatModel
from latentguard.models.quantize import quantized_weights
from latentguard.models.weights_digest import weights_digest
from latentguard.prompts import Prompt
from latentguard.states import States
from models.architectures import WIDE, chat_model

PROMPTS = [Prompt(f"Tell me of thing {n}" + " and more" * (n % 5), id=str(n)) for n in range(20)]
DISK = dict.fromkeys(
    ["model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head", "model.layers"], "disk"
)
MIXED = {
    **dict.fromkeys(["model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"], "cpu"),
    **{f"model.layers.{n}": "disk" if n % 2 else "cpu" for n in range(4)},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer):
    path = tmp_path_factory.mktemp("models") / "tiny"
    chat_model("llama", tokenizer).model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def wide(tmp_path_factory, tokenizer):
    path = tmp_path_factory.mktemp("models") / "wide"
    chat_model("llama", tokenizer, **WIDE).model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def plain(folder):
    return ChatModel.load(folder)


def states(model):
    return States.collect(model.capture(PROMPTS)).values


def require_same_model(found, plain, tolerance=0.0):
    """States, fingerprint, replies and guard do not tell where the weights are."""
    wanted = states(plain)
    for _ in range(2):  # the second time with the prefix in the cache
        assert torch.allclose(states(found), wanted, rtol=0, atol=tolerance)
        assert found.fingerprint.digest == plain.fingerprint.digest
        found._fingerprint = None  # as it is after a pass was left early
    steer = Intervention(2, torch.ones(plain.width), 3.0)
    for how in (None, steer):
        replies = [m.sweep(PROMPTS[:3], [how], max_new_tokens=4)[0] for m in (found, plain)]
        assert [r.ids for r in replies[0]] == [r.ids for r in replies[1]]


class TestOffload:
    @pytest.mark.parametrize("placed", [DISK, MIXED], ids=["disk", "mixed"])
    def test_device_map(self, placed, folder, plain, tmp_path):
        found = ChatModel.load(folder, device_map=placed, offload_folder=str(tmp_path))
        assert any(p.device.type == "meta" for p in found.model.parameters())
        assert found.device.type == "cpu"
        require_same_model(found, plain)

    def test_weights_in_memory_and_fetched_for_each_pass(self, folder, plain):
        loaded = ChatModel.load(folder)
        accelerate.cpu_offload(loaded.model, execution_device=torch.device("cpu"))
        found = ChatModel(loaded.model, loaded.tokenizer)
        assert all(p.device.type == "meta" for p in found.model.parameters())
        require_same_model(found, plain)

    def test_auto(self, folder, plain):
        require_same_model(ChatModel.load(folder, device_map="auto"), plain)

    def test_a_guard_goes_from_one_to_the_other(self, folder, plain, tmp_path):
        guard = LatentGuard.fit(plain, load_contrast("validation"), probe="centroid")
        found = ChatModel.load(folder, device_map=DISK, offload_folder=str(tmp_path))
        guard.verify_model(found)

    def test_an_edit_of_offloaded_weights_is_seen(self, folder, tmp_path, plain):
        other = ChatModel.load(folder)
        with torch.no_grad():
            other.model.model.layers[1].mlp.up_proj.weight += 1e-3
        other.model.save_pretrained(tmp_path / "other")
        other.tokenizer.save_pretrained(tmp_path / "other")
        where = dict(device_map=DISK, offload_folder=str(tmp_path / "weights"))
        found = ChatModel.load(tmp_path / "other", **where)
        assert found.fingerprint.weights != plain.fingerprint.weights

    def test_weights_that_were_never_loaded(self):
        with torch.device("meta"):
            model = torch.nn.Linear(2, 2)
        with pytest.raises(ModelError, match="weight bias was never loaded"):
            weights_digest(model)


PACKAGES = [("int8", "torchao"), ("nf4", "bitsandbytes")]
GAPS = {"int8": 0.05, "nf4": 0.5}
"""How far states may move, as a part of their size: a level of int8 is less than 1% of a row's
largest weight, but NF4 is wrong by a tenth of each matrix, and the blocks add that up."""


def gap(found, wanted):
    return ((found - wanted).norm() / wanted.norm()).item()


class TestQuantised:
    @pytest.mark.parametrize(("scheme", "package"), PACKAGES)
    def test_a_guard_knows_how_its_model_was_quantised(self, scheme, package, wide, tmp_path):
        pytest.importorskip(package)
        plain, found = ChatModel.load(wide), ChatModel.load(wide, dtype=f"float32/{scheme}")
        assert found.fingerprint.dtype == f"float32/{scheme}"
        assert found.fingerprint.weights != plain.fingerprint.weights
        assert states(found).isfinite().all()
        assert 0 < gap(states(found), states(plain)) < GAPS[scheme]

        guard = LatentGuard.fit(found, load_contrast("validation")[:80], probe="centroid")
        guard.save(tmp_path)
        loaded = LatentGuard.load(tmp_path)
        loaded.verify_model(ChatModel.load(wide, dtype=loaded.fingerprint.dtype))
        with pytest.raises(ModelMismatch, match=r": weights .*; dtype "):
            loaded.verify_model(plain)

    def test_nf4_states_are_those_of_rounded_weights(self, wide):
        """Beside bitsandbytes' own rounding, which is put back to float32 and run by torch."""
        pytest.importorskip("bitsandbytes")
        plain, found = ChatModel.load(wide), states(ChatModel.load(wide, dtype="float32/nf4"))
        with quantized_weights(plain, 4) as rounded:
            wanted = states(rounded)
        assert gap(found, wanted) < 0.04  # some processors multiply it in bfloat16
        whole = states(plain)
        assert gap(found, whole) > 0.1
        alike = torch.cosine_similarity(found, whole, dim=-1)
        assert alike.min() > 0.8
        assert alike.mean() > 0.9

    def test_a_checkpoint_that_was_quantised_before(self, wide, tmp_path):
        """The first pass packs its weights anew: the digest is that of what was loaded."""
        pytest.importorskip("bitsandbytes")
        made = ChatModel.load(wide, dtype="float32/nf4")
        made.model.save_pretrained(tmp_path)
        made.tokenizer.save_pretrained(tmp_path)
        found = ChatModel.load(tmp_path)
        assert torch.equal(states(found), states(made))
        assert found.fingerprint.weights == made.fingerprint.weights

    @pytest.mark.parametrize(("scheme", "package"), PACKAGES)
    def test_a_missing_package(self, scheme, package, folder, monkeypatch):
        monkeypatch.setitem(sys.modules, package, None)
        monkeypatch.setitem(sys.modules, f"{package}.quantization", None)
        with pytest.raises(ModelError, match=f"needs {package}: pip install {package}"):
            ChatModel.load(folder, dtype=f"float32/{scheme}")

    def test_an_unknown_scheme(self, folder):
        with pytest.raises(ModelError, match="no quantisation 'int3': expected int8 and nf4"):
            ChatModel.load(folder, dtype="float32/int3")
