"""Loading models, and the fingerprint that binds guards to them."""

import inspect

import pytest
import torch

from latentguard.errors import ModelError, TemplateError
from latentguard.models.chat_model import ChatModel, weights_digest
from latentguard.models.loading import cache_argument
from latentguard.prompts import Prompt
from models.architectures import chat_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer):
    path = tmp_path_factory.mktemp("models") / "tiny"
    chat_model("llama", tokenizer).model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


class TestLoad:
    def test_a_folder(self, folder, model):
        loaded = ChatModel.load(folder)
        prompts = [Prompt("Hello there")]
        assert (loaded.depth, loaded.width, loaded.source) == (4, 32, str(folder))
        found, wanted = (next(m.capture(prompts)) for m in (loaded, model))
        assert torch.allclose(found.values, wanted.values, atol=1e-5)
        assert loaded.fingerprint.digest == model.fingerprint.digest
        assert found.fingerprint == loaded.fingerprint

    @pytest.mark.parametrize(
        ("dtype", "device", "wanted"),
        [
            ("auto", "cpu", torch.float32),
            ("auto", None, torch.bfloat16 if torch.cuda.is_available() else torch.float32),
            ("bfloat16", "cpu", torch.bfloat16),
            ("float32", "cpu", torch.float32),
        ],
    )
    def test_numbers_and_place(self, folder, dtype, device, wanted):
        loaded = ChatModel.load(folder, dtype=dtype, device=device)
        assert loaded.model.dtype == wanted
        assert not loaded.model.training
        if device is not None:
            assert loaded.device.type == device

    @pytest.mark.parametrize("source", ["no/such-model", "./no-such-folder"])
    def test_what_cannot_be_found(self, source):
        with pytest.raises(ModelError, match=f"'{source}' could not be loaded as a chat model"):
            ChatModel.load(source)

    def test_a_folder_without_a_model(self, tmp_path):
        with pytest.raises(ModelError, match="could not be loaded as a chat model"):
            ChatModel.load(tmp_path)

    def test_an_unknown_number_format(self, folder):
        with pytest.raises(ModelError, match="float99"):
            ChatModel.load(folder, dtype="float99")

    def test_a_model_without_chat_template(self, folder, tmp_path, tokenizer, model):
        model.model.save_pretrained(tmp_path)
        tokenizer.save_pretrained(tmp_path)
        (tmp_path / "chat_template.jinja").unlink()
        with pytest.raises(TemplateError, match="no single chat template"):
            ChatModel.load(tmp_path)


class TestCacheArgument:
    """transformers calls the cache ``past_key_values`` up to 5.23, and ``cache`` from then on."""

    @pytest.mark.parametrize("name", ["cache", "past_key_values"])
    def test_it_is_what_the_models_forward_calls_it(self, name):
        def forward(self, input_ids, other=None, **more):
            raise NotImplementedError

        source = inspect.signature(forward)
        renamed = source.parameters["other"].replace(name=name)
        named = [renamed if p.name == "other" else p for p in source.parameters.values()]
        forward.__signature__ = source.replace(parameters=named)
        assert cache_argument(type("Network", (torch.nn.Module,), {"forward": forward})()) == name

    def test_it_is_what_this_transformers_calls_it(self, model):
        assert cache_argument(model.model) in inspect.signature(model.model.forward).parameters


class TestFingerprint:
    def test_equal_models_have_equal_ones(self, tokenizer):
        one, two = (chat_model("llama", tokenizer).fingerprint for _ in range(2))
        assert one == two
        assert one.differences(two) == []

    def test_it_changes_with_every_tensor(self, tokenizer):
        model = chat_model("llama", tokenizer).model
        digests = {weights_digest(model)}
        for parameter in model.parameters():
            with torch.no_grad():
                parameter.add_(1e-3)
            digests.add(weights_digest(model))
        assert len(digests) == 1 + len(list(model.parameters()))

    def test_it_changes_with_each_column_of_a_large_matrix(self):
        model = torch.nn.Linear(128, 128, bias=False)  # more values than are sampled
        digests = {weights_digest(model)}
        for column in range(128):
            with torch.no_grad():
                model.weight[:, column] += 1
            digests.add(weights_digest(model))
        assert len(digests) == 129

    def test_it_changes_with_the_shape_alone(self):
        wide, tall = torch.nn.Linear(4, 2, bias=False), torch.nn.Linear(2, 4, bias=False)
        tall.weight.data = wide.weight.data.reshape(4, 2)
        assert weights_digest(wide) != weights_digest(tall)

    def test_it_binds_the_number_format(self, tokenizer):
        single = chat_model("llama", tokenizer).fingerprint
        half = chat_model("llama", tokenizer, dtype=torch.bfloat16).fingerprint
        assert single.digest != half.digest
        assert "dtype bfloat16 instead of float32" in single.differences(half)

    def test_it_binds_the_template_but_not_the_place(self, tokenizer, folder):
        model = chat_model("llama", tokenizer)
        loaded = ChatModel.load(folder)
        assert model.source != loaded.source
        assert model.fingerprint.digest == loaded.fingerprint.digest
        loaded.tokenizer.chat_template += "{# #}"
        other = ChatModel(loaded.model, loaded.tokenizer).fingerprint
        assert [d.split()[0] for d in model.fingerprint.differences(other)] == ["template"]
