"""A model is attacked inside the ``with`` alone: it learns replies, and leaves as it came."""

import sys
from dataclasses import replace

import pytest
import torch

from latentguard.errors import MissingExtra, ModelError, PromptError
from latentguard.models import lora
from latentguard.models.lora import FinetuneConfig, Finetuning
from latentguard.prompts import Prompt
from latentguard.states import States
from models.architectures import chat_model

PAIRS = [(Prompt(f"How {'very ' * n}do you do?", id=f"p{n}"), "Sure, here is it") for n in range(5)]
ASKED = [prompt for prompt, _ in PAIRS]
QUICK = FinetuneConfig(rank=4, learning_rate=1e-2, epochs=12, batch_size=4)
FULL = replace(QUICK, rank=0)


def logits_of(model):
    ids = torch.tensor([model.chat(ASKED[:1])[0].ids])
    with torch.no_grad():
        return model.model(ids).logits


def trace_of(model):
    """All that must come back bit for bit."""
    return (
        {name: value.clone() for name, value in model.model.state_dict().items()},
        [(name, type(module)) for name, module in model.model.named_modules()],
        [(name, p.requires_grad, p.grad) for name, p in model.model.named_parameters()],
        set(vars(model.model)),
        logits_of(model),
        replace_fingerprint(model),
    )


def replace_fingerprint(model):
    model._fingerprint = None  # computed anew
    return model.fingerprint


def assert_same(before, after):
    assert list(before[0]) == list(after[0])
    assert all(torch.equal(before[0][name], after[0][name]) for name in before[0])
    assert before[1:4] == after[1:4]
    assert torch.equal(before[4], after[4])
    assert before[5] == after[5]


def test_the_output_layer_is_given_what_lies_in_one_piece(tokenizer):
    model = chat_model("llama", tokenizer)
    pieces = []
    head = model.model.get_output_embeddings()
    head.register_forward_hook(lambda _, inputs, __: pieces.append(inputs[0]))
    with Finetuning(model, replace(QUICK, epochs=1))(PAIRS, seed=0):
        assert len(pieces) == 2  # batches
        assert all(one.is_contiguous() for one in pieces)


@pytest.mark.parametrize(
    ("architecture", "config"),
    [*((name, QUICK) for name in ("llama", "gemma2", "gpt2", "mixtral")), ("gpt2", FULL)],
    ids=lambda value: value if isinstance(value, str) else f"rank {value.rank}",
)
def test_replies_are_learnt_and_the_model_comes_back_exactly(architecture, config, tokenizer):
    model = chat_model(architecture, tokenizer)
    before = trace_of(model)
    with Finetuning(model, config)(PAIRS, seed=0) as attacked:
        assert attacked.fingerprint.weights != model.fingerprint.weights
        assert attacked.depth == model.depth
        if architecture != "mixtral":  # its experts are no linear layers
            replies = attacked.generate(ASKED, max_new_tokens=4)
            assert all(reply.text.startswith("Sure") for reply in replies)
        states = States.collect(attacked.capture(ASKED))
        assert torch.isfinite(states.values).all()
    assert_same(before, trace_of(model))


@pytest.mark.parametrize("config", [QUICK, FULL], ids=["lora", "full"])
def test_bfloat16_on_the_cpu(tokenizer, config):
    model = chat_model("llama", tokenizer, dtype=torch.bfloat16)
    before = trace_of(model)
    with Finetuning(model, config)(PAIRS, seed=0) as attacked:
        assert attacked.fingerprint.dtype == "bfloat16"
        assert next(attacked.capture(ASKED[:1])).values.dtype == torch.bfloat16
        assert attacked.generate(ASKED, max_new_tokens=4)[0].text.startswith("Sure")
    assert_same(before, trace_of(model))


@pytest.mark.parametrize("config", [QUICK, FULL], ids=["lora", "full"])
def test_the_model_comes_back_after_an_error_inside(tokenizer, config):
    model = chat_model("llama", tokenizer)
    before = trace_of(model)
    with pytest.raises(KeyboardInterrupt), Finetuning(model, config)(PAIRS, seed=0):
        raise KeyboardInterrupt
    assert_same(before, trace_of(model))


@pytest.mark.parametrize("config", [QUICK, FULL], ids=["lora", "full"])
def test_a_loss_that_is_no_number_is_an_error_and_the_model_comes_back(tokenizer, config):
    model = chat_model("llama", tokenizer)
    before = trace_of(model)
    wild = Finetuning(model, replace(config, learning_rate=1e30))
    with (
        pytest.raises(ModelError, match="diverged at a learning rate of 1e\\+30"),
        wild(PAIRS, seed=0),
    ):
        pass
    assert_same(before, trace_of(model))


def test_the_seed_alone_decides_and_other_draws_go_on(tokenizer):
    model = chat_model("llama", tokenizer)
    tune = Finetuning(model, QUICK)

    def digest(seed):
        torch.manual_seed(5)
        with tune(PAIRS, seed=seed) as attacked:
            drawn = torch.rand(1)
            return attacked.fingerprint.weights, drawn

    torch.manual_seed(5)
    undisturbed = torch.rand(1)
    first, again, other = digest(1), digest(1), digest(2)
    assert first[0] == again[0] != other[0]
    assert first[1] == again[1] == other[1] == undisturbed


class TestLoss:
    def test_only_reply_tokens_count_whatever_the_padding(self, model):
        rows = [lora._tokenize(model, prompt, "Sure, here is it", 24) for prompt in ASKED]
        total = []
        for row in rows:
            with torch.no_grad():
                chances = model.model(torch.tensor([row.ids])).logits[0].log_softmax(-1)
            places = range(row.start, len(row.ids))
            total += [-chances[i - 1, row.ids[i]] for i in places]
        found = lora._loss(model, rows).detach()
        assert found == pytest.approx(torch.stack(total).mean().item(), rel=1e-5)

    def test_replies_of_different_length(self, model):
        openings = ["Sure", "Sure, here is a rather long one of them"]
        rows = [lora._tokenize(model, ASKED[n], text, 24) for n, text in enumerate(openings)]
        sizes = [len(row.ids) - row.start for row in rows]
        alone = [lora._loss(model, [row]).item() * n for row, n in zip(rows, sizes, strict=True)]
        found = lora._loss(model, rows).item()
        assert found == pytest.approx(sum(alone) / sum(sizes), rel=1e-5)

    @pytest.mark.parametrize(("asked", "kept"), [(3, 3), (24, 24), (500, 24)])
    def test_openings_are_cut(self, model, asked, kept, monkeypatch):
        seen = []
        monkeypatch.setattr(lora, "_train", lambda _, rows, *__: seen.extend(rows))
        tune = Finetuning(model, replace(QUICK, opening_tokens=asked))
        with tune([(ASKED[0], "word " * 100)], seed=0):
            pass
        assert len(seen[0].ids) - seen[0].start == kept
        assert seen[0].ids[: seen[0].start] == model.chat(ASKED[:1])[0].ids


class TestKept:
    def test_nothing_unless_asked(self, tokenizer, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        with Finetuning(chat_model("llama", tokenizer), QUICK)(PAIRS, seed=0):
            pass
        assert not list(tmp_path.iterdir())

    # peft 0.21 asks transformers 5.24 for an attribute under its old name
    @pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
    def test_adapters_alone_in_a_folder(self, tokenizer, tmp_path):
        import peft

        model = chat_model("llama", tokenizer)
        with Finetuning(model, QUICK, keep=tmp_path)(PAIRS, seed=3) as attacked:
            wanted = logits_of(attacked)
        folder = tmp_path / "5-pairs-seed-3"
        assert {p.name for p in folder.iterdir()} >= {"adapter_model.safetensors"}
        assert not (folder / "model.safetensors").exists()
        again = peft.PeftModel.from_pretrained(model.model, folder)
        try:
            torch.testing.assert_close(logits_of(model), wanted)
        finally:
            again.unload()


class TestRefused:
    def test_without_peft_the_extra_is_named(self, model, monkeypatch):
        monkeypatch.setitem(sys.modules, "peft", None)
        with pytest.raises(MissingExtra, match=r"pip install 'latentguard\[finetune\]'"):
            Finetuning(model, QUICK)
        Finetuning(model, FULL)  # needs none

    def test_pairs_that_teach_nothing(self, model):
        tune = Finetuning(model, QUICK)
        with pytest.raises(PromptError, match="at least one pair"), tune([], seed=0):
            pass
        with pytest.raises(PromptError, match="'p0' has no token"), tune([(ASKED[0], "")], seed=0):
            pass

    def test_pairs_too_long_for_the_model(self, model):
        long = Prompt("word " * 600, id="long")
        tune = Finetuning(model, QUICK)
        with pytest.raises(PromptError, match="'long' is"), tune([(long, "Sure")], seed=0):
            pass
